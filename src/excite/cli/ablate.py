"""``excite ablate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from excite.allocator import keep_freed_buffers
from excite.cli.common import (
    AllMinutes,
    Data,
    Device,
    Json,
    RecipeName,
    Settings,
    StartWeights,
    TestData,
    print_json,
    show_log,
)

NAME = "ablate"


def run(
    grid: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE...",
            help="What varies: an argument of the unit (reduction=2,4,8), of one of several (se.reduction=4,8), of "
            "the network (width=0.5,1), or a recipe key (optimizer.lr=0.05,0.1). Several keys make a product.",
        ),
    ],
    network: Annotated[
        str, typer.Option("--network", help="The network whose arguments vary.", metavar="SPEC")
    ] = "resnet20+se",
    data: Data = None,
    test_data: TestData = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs at each point; three are the fewest for a verdict.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each run.", show_default=False)] = None,
    minutes: AllMinutes = None,
    recipe: RecipeName = None,
    weights: StartWeights = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The ablation's folder.", show_default=False)] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a network at every point of a grid, and show errors and costs as the papers' tables do.

    The host without units is trained, too, as the baseline. Interrupted, the same command goes on where it was;
    values can be added to a finished one.
    """
    from rich.console import Console

    from excite.report.ablate_table import ablate_table
    from excite.training.recipe import load, parse_settings
    from excite.verbs.ablate import ablate
    from excite.verbs.ablate_grid import parse_grid
    from excite.verbs.compare import default_recipe

    show_log()
    keep_freed_buffers()
    changes = {"trainer.device": device} | parse_settings(settings or [])
    weights = weights or changes.get("network.weights")
    chosen = load(recipe) if recipe else default_recipe(data, weights)
    result = ablate(
        parse_grid(grid),
        network,
        data,
        test=test_data,
        seeds=seeds,
        recipe=chosen.replace(changes),
        epochs=epochs,
        minutes=minutes,
        weights=weights,
        out=out,
        progress=True,
    )
    if json:
        print_json(result)
        return
    console = Console()
    console.print(ablate_table(result))
    console.print(f"Page: {result['folder']}/reports/ablate.html", soft_wrap=True, highlight=False)

"""``excite compare``."""

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

NAME = "compare"


def run(
    contestants: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC|RUN]...",
            help="Networks, or folders of finished runs; the first is the baseline. "
            "Default: resnet20 resnet20+se resnet20+sk.",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    test_data: TestData = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each network; three are the fewest for a verdict.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each run.", show_default=False)] = None,
    minutes: AllMinutes = None,
    control: Annotated[
        bool, typer.Option("--control", help="Add the baseline, widened until it is as slow as the slowest network.")
    ] = False,
    recipe: RecipeName = None,
    weights: StartWeights = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The comparison's folder.", show_default=False)] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train networks from the same seeds, and say which is better, by how much, at what cost.

    Interrupted, the same command goes on where it was. Finished, it shows the result again at once.
    """
    from rich.console import Console

    from excite.report.table import compare_table
    from excite.training.recipe import load, parse_settings
    from excite.verbs.compare import DEFAULT_SPECS, compare, default_recipe

    show_log()
    keep_freed_buffers()
    changes = {"trainer.device": device} | parse_settings(settings or [])
    weights = weights or changes.get("network.weights")
    chosen = load(recipe) if recipe else default_recipe(data, weights)
    result = compare(
        contestants or DEFAULT_SPECS,
        data,
        test=test_data,
        seeds=seeds,
        recipe=chosen.replace(changes),
        epochs=epochs,
        minutes=minutes,
        control=control,
        weights=weights,
        out=out,
        progress=True,
    )
    if json:
        print_json(result)
        return
    console = Console()
    console.print(compare_table(result))
    console.print(f"Page: {result['folder']}/reports/compare.html", soft_wrap=True, highlight=False)

"""``excite train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from excite.allocator import keep_freed_buffers
from excite.cli.common import Data, Device, Json, Settings, TestData, print_json, show_log
from excite.errors import UsageError

NAME = "train"


def run(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's name or file. Default: what suits the data; with --weights, finetune.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[str | None, typer.Option(help="A network spec.", show_default=False)] = None,
    data: Data = None,
    test_data: TestData = None,
    epochs: Annotated[int | None, typer.Option(min=1, show_default=False)] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Choose the epochs so that training takes so long.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default=False)] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights to start from: imagenet, or a file.", show_default=False)
    ] = None,
    settings: Settings = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was cut off.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default=False)] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train one network; --resume goes on exactly where a run was cut off."""
    from rich.console import Console

    from excite.training.recipe import load, parse_settings
    from excite.verbs.compare import default_recipe
    from excite.verbs.train import train

    show_log()
    keep_freed_buffers()
    given: dict[str, Any] = {
        "data.path": data,
        "data.test_path": test_data,
        "network.spec": network,
        "network.weights": weights,
        "trainer.epochs": epochs,
        "trainer.minutes": minutes,
        "trainer.device": device if device != "auto" else None,
        "seed": seed,
    }
    changes = {key: value for key, value in given.items() if value is not None} | parse_settings(settings or [])
    if resume:
        if recipe or changes or out:
            raise UsageError("--resume goes on with the run's own recipe: it takes no other settings")
        result = train(resume=resume, progress=True)
    else:
        if not (recipe or data or network):
            raise UsageError("train needs a recipe, or --network and --data; see: excite recipes, excite networks")
        chosen = load(recipe) if recipe else default_recipe(data, changes.get("network.weights"))
        result = train(chosen.replace(changes), out=out, progress=True)
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    if result["metrics"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
        console.print(f"{result['spec']}: {figures} on {result['count']} test {result['samples']}")
    console.print(f"Run: {result['run']}", soft_wrap=True)

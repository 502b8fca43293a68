"""``excite evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from excite.cli.common import Device, Json, TestData, numbers, print_json, show_log

NAME = "evaluate"


def run(
    source: Annotated[
        str, typer.Argument(metavar="RUN|SPEC", help="A run's folder, or a network spec with --weights.")
    ],
    data: Annotated[
        str, typer.Option("--data", help="digits, cifar10, cifar100, or a folder or tar of class folders.")
    ],
    test_data: TestData = None,
    weights: Annotated[Path | None, typer.Option(help="A file of weights for the spec.", show_default=False)] = None,
    mean: Annotated[
        str | None, typer.Option(help="Per channel, of pixels in 0–1: .485,.456,.406", show_default=False)
    ] = None,
    std: Annotated[str | None, typer.Option(help="Likewise: .229,.224,.225", show_default=False)] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the input in pixels.", show_default=False)
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Add each class's accuracy and the confusion.")
    ] = False,
    refuse_broken: Annotated[
        bool, typer.Option("--refuse-broken", help="Fail on an image that cannot be read, instead of skipping it.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Score a trained network on the test images of a set."""
    from rich.console import Console
    from rich.table import Table

    from excite.errors import UsageError
    from excite.verbs.evaluate import evaluate

    show_log()
    if weights is None and not (Path(source) / "recipe.yaml").is_file():
        if Path(source).is_dir():
            raise UsageError(f"{source} is not a run: it has no recipe.yaml")
        raise UsageError(f"'{source}' has random weights: give --weights FILE, or the folder of a run")
    result = evaluate(
        source,
        data,
        test=test_data,
        weights=weights,
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        image_size=image_size,
        broken="refuse" if refuse_broken else "skip",
        device=device,
        per_class=per_class,
        progress=True,
    )
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    for name, value in result["metrics"].items():
        console.print(f"{name:>5}  {value:.4f}" if name == "loss" else f"{name:>5}  {value:.2f} %")
    console.print(f"{result['images']} images")
    if per_class:
        table = Table("class", "images", "top1 %", "most often taken for")
        for i, (name, right) in enumerate(zip(result["classes"], result["per_class"], strict=True)):
            row = result["confusion"][i]
            wrong = [
                (count, other) for j, (count, other) in enumerate(zip(row, result["classes"], strict=True)) if j != i
            ]
            count, other = max(wrong, default=(0, ""))
            share = "–" if right is None else f"{right:.2f}"
            table.add_row(name, str(sum(row)), share, f"{other} ({count})" if count else "")
        console.print(table)

"""``excite predict``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from excite.cli.common import Device, numbers, show_log
from excite.cli.evaluate import ImageSize, Interpolation, Mean, Resize, Std, Weights

NAME = "predict"


class Format(StrEnum):
    """How predictions are printed."""

    table = "table"
    jsonl = "jsonl"
    csv = "csv"
    json = "json"


def run(
    source: Annotated[
        str, typer.Argument(metavar="RUN|SPEC", help="A run's folder, or a network spec with --weights.")
    ],
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Image files and folders of them.")],
    weights: Weights = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    format: Annotated[Format, typer.Option(help="table, jsonl, csv (one line a class) or json.")] = Format.table,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Name what is in images; a broken file is reported and the rest goes on (exit code 1 at the end)."""
    import csv
    import json as writer
    import sys

    from rich.console import Console
    from rich.table import Table

    from excite.verbs.predict import predict

    show_log()
    rows = predict(
        source,
        paths,
        weights,
        top=top,
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        image_size=image_size,
        resize=resize,
        interpolation=interpolation,
        device=device,
        progress=True,
    )
    format = Format.json if json else format
    failed = 0
    table = Table("file", "prediction")
    lines = csv.writer(sys.stdout, lineterminator="\n")
    if format is Format.csv:
        lines.writerow(["file", "rank", "class", "probability", "error"])
    gathered = []
    for row in rows:
        failed += "error" in row
        if format is Format.json:
            gathered.append(row)
        elif format is Format.jsonl:
            print(writer.dumps(row), flush=True)
        elif format is Format.csv:
            if "error" in row:
                lines.writerow([row["file"], "", "", "", row["error"]])
            for rank, guess in enumerate(row.get("predictions", []), 1):
                lines.writerow([row["file"], rank, guess["class"], f"{guess['probability']:.6f}", ""])
        else:
            guesses = "  ".join(f"{g['class']} {100 * g['probability']:.1f} %" for g in row.get("predictions", []))
            table.add_row(row["file"], guesses or f"[red]{row['error']}[/red]")
    if format is Format.json:
        print(writer.dumps({"predictions": gathered}, indent=2))
    elif format is Format.table:
        Console(highlight=False).print(table)
    if failed:
        print(f"excite: {failed} files could not be read", file=sys.stderr)
        raise typer.Exit(1)

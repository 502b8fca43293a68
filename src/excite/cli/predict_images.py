"""``excite predict`` for images with classes: the call, and how its answers are printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from excite.cli.formats import Format


def name_images(source: str, paths: list[Path], format: Format, **options: Any) -> None:
    """Name what is in images and print it."""
    import csv
    import json as writer
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from excite.verbs.predict import predict

    rows = predict(source, paths, progress=True, **options)
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
            table.add_row(escape(row["file"]), escape(guesses) or f"[red]{escape(row['error'])}[/red]")
    if format is Format.json:
        print(writer.dumps({"predictions": gathered}, indent=2))
    elif format is Format.table:
        Console(highlight=False).print(table)
    if failed:
        print(f"excite: {failed} {'file' if failed == 1 else 'files'} could not be read", file=sys.stderr)
        raise typer.Exit(1)

"""``excite predict`` for denoising: the call, and how its rows are printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from excite.cli.common import print_json
from excite.cli.formats import Format


def denoise(source: str, paths: list[Path], out: Path, format: Format, **options: Any) -> None:
    """Denoise files and print a row for each."""
    import json
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from excite.verbs.predict_denoising import denoise_files

    table = Table("file", "size", *(["σ"] if options["estimate"] else []), "seconds", "written to")
    for column in table.columns:
        column.overflow = "fold"
    rows = []
    for row in denoise_files(source, paths, out, progress=True, **options):
        rows.append(row)
        if format is Format.jsonl:
            print(json.dumps(row), flush=True)
        elif "error" in row:
            table.add_row(escape(row["file"]), *[""] * (len(table.columns) - 2), f"[red]{escape(row['error'])}[/red]")
        else:
            size = f"{row['width']:,} × {row['height']:,}"
            measured = [f"{row['sigma_estimated']:.1f}"] if options["estimate"] else []
            written = escape(row["out"])
            if "weights" in row:
                written += f"\nwith {escape(Path(row['weights']).name)}"
            for remark in ("warning", "note"):
                if remark in row:
                    written += f"\n[yellow]{escape(row[remark])}[/yellow]"
            table.add_row(escape(row["file"]), size, *measured, f"{row['seconds']:.2f}", written)
    if format is Format.json:
        print_json({"files": rows})
    elif format is Format.table:
        Console(highlight=False).print(table)
    if failed := sum("error" in row for row in rows):
        print(f"excite: {failed} of {len(rows)} files could not be denoised", file=sys.stderr)
        raise typer.Exit(1)

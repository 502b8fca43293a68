"""``excite index``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from excite.cli.common import Device, Json, print_json, show_log

NAME = "index"

_SHOWN = 20  # of what could not be indexed; --json has all


class Stored(StrEnum):
    """What the numbers of a vector are stored as."""

    float32 = "float32"
    float16 = "float16"


def run(
    source: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run of task retrieval.")],
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A folder of images, an image, a CSV file with the columns file and text (or one of them), or a "
            ".txt file with a text a line.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The index's folder; one that exists is added to. Default: RUN/index.", show_default=False),
    ] = None,
    dtype: Annotated[
        Stored | None,
        typer.Option(help="What a new index stores: float32, or float16 for half the size.", show_default=False),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Make an index of pictures and texts, to be searched by excite search, or add to one.

    What the index holds already is not embedded again. What cannot be read is reported and the rest goes on (exit
    code 1 at the end).
    """
    import sys

    from rich.console import Console
    from rich.text import Text

    from excite.report.search import legible
    from excite.report.wording import duration
    from excite.verbs.index import index

    show_log()
    result = index(source, path, out, dtype=dtype, device=device, progress=True)
    errors = result["errors"]
    if json:
        print_json(result)
    else:
        console = Console(highlight=False)
        changes = [f"{result['added']:,} added"]
        changes += [f"{result[name]:,} {said}" for name, said in _CHANGES.items() if result[name]]
        console.print(f"{', '.join(changes)} in {duration(result['seconds'])}")
        console.print(f"The index holds {result['images']:,} images and {result['texts']:,} texts")
        console.print(Text(f'Search it:  excite search {legible(result["index"])} --text "…"'), soft_wrap=True)
    for row in errors[:_SHOWN]:
        print(f"excite: {legible(row.get('file') or row['text'])}: {legible(row['error'])}", file=sys.stderr)
    if errors:
        more = f" ({len(errors) - _SHOWN} more are not shown)" if len(errors) > _SHOWN else ""
        print(f"excite: {len(errors)} could not be indexed{more}", file=sys.stderr)
        raise typer.Exit(1)


_CHANGES = {"replaced": "changed and replaced", "known": "there already"}

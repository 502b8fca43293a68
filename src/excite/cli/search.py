"""``excite search``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from excite.cli.common import Device, Json, print_json, show_log

NAME = "search"


class Among(StrEnum):
    """What is searched."""

    image = "image"
    text = "text"
    all = "all"


def run(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="An index's folder, made by excite index.")],
    image: Annotated[Path | None, typer.Option(help="Search by this image file, or", show_default=False)] = None,
    text: Annotated[str | None, typer.Option(help="by this text.", show_default=False)] = None,
    top: Annotated[int, typer.Option(min=1, help="How many hits.")] = 10,
    among: Annotated[
        Among | None,
        typer.Option(
            help="image, text or all. Default: images for a text, texts for an image, where there are any.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write a page (.html) that shows the hits.", show_default=False)
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--run", help="The run that made the index, where it is no longer where it was.", show_default=False
        ),
    ] = None,
    faiss: Annotated[
        bool, typer.Option("--faiss", help="Search with FAISS (pip install 'excite\\[faiss]'): the same hits.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find what is nearest to a picture or a text in an index; exact."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from excite.report.search import legible
    from excite.report.wording import fixed
    from excite.verbs.search import search

    show_log()
    result = search(
        index,
        image=image,
        text=text,
        top=top,
        among=among.value if among else None,
        run=source,
        page=page,
        faiss=faiss,
        device=device,
    )
    if json:
        print_json(result)
        return
    table = Table("", "similarity", "file", "text")
    for column in table.columns[2:]:
        column.overflow = "fold"
    for hit in result["hits"]:
        cells = [Text(legible(hit[name] or "")) for name in ("path", "text")]  # as it is: no markup, no emoji
        table.add_row(str(hit["rank"]), fixed(hit["score"], 3), *cells)
    console = Console(highlight=False)
    console.print(table)
    kinds = " and ".join(f"{kind}s" for kind in result["among"])
    console.print(f"{result['items']:,} {kinds} searched in {result['search_ms']:.1f} ms")
    if page is not None:
        console.print(Text(f"Page: {legible(str(page))}"), soft_wrap=True)

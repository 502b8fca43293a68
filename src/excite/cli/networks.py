"""``excite networks``."""

from __future__ import annotations

from typing import Annotated

import typer

from excite.cli.common import Json, print_json

NAME = "networks"


def run(
    pattern: Annotated[str | None, typer.Argument(help="Only names that hold this text.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """The networks that excite knows, with their papers' figures, and the units that can be put into them."""
    from rich.console import Console
    from rich.table import Table

    from excite.networks.catalog import CATALOG

    entries = [entry for name, entry in CATALOG.items() if pattern is None or pattern in name]
    if json:
        from dataclasses import asdict

        print_json({"networks": [asdict(entry) | {"input_size": entry.input_size} for entry in entries]})
        return
    table = Table("network", "what it is", "input", "parameters (M)", "GMACs", "top-1 error %", "data")
    for entry in entries:
        paper = entry.figures[0] if entry.figures else None
        cells = [paper.parameters, paper.macs, paper.top1, paper.data] if paper else [None] * 4
        table.add_row(
            entry.name, entry.title, f"{entry.input_size}²", *("–" if cell is None else str(cell) for cell in cells)
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "Figures are the papers'. Add units with +: resnet50+se  resnet50+se:reduction=8,stages=1-3  resnet20+sk"
    )
    console.print("Other sources: torchvision:resnet50  timm:convnext_tiny")

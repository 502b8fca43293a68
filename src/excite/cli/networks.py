"""``excite networks``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from excite.cli.common import Json, print_json

if TYPE_CHECKING:
    from excite.networks.catalog import Entry

NAME = "networks"


def run(
    pattern: Annotated[str | None, typer.Argument(help="Only names that hold this text.", show_default=False)] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Count each network and set it against all that its papers say.")
    ] = False,
    json: Json = False,
) -> None:
    """The networks that excite knows, with their papers' figures, and the units that can be put into them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from excite.errors import UsageError, nearest
    from excite.networks.catalog import CATALOG
    from excite.report.networks import input_text

    entries = [entry for name, entry in CATALOG.items() if pattern is None or pattern in name]
    if not entries:
        hint = nearest(str(pattern), list(CATALOG))
        raise UsageError(f"no network has '{pattern}' in its name; {hint or 'see: excite networks'}")
    if paper:
        _print_paper(pattern, json)
        return
    if json:
        from dataclasses import asdict

        print_json({"networks": [asdict(entry) | _input(entry) for entry in entries]})
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("network", "input", "parameters", "GMACs", "top-1 error", "on"):
        justify = "left" if title in ("network", "on") else "right"
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for entry in entries:
        table.add_row(entry.name, input_text(**_input(entry)), *_figures(entry))
    console = Console(highlight=False)
    console.print(table)
    console.print("Figures are the papers' own; * with the stride in the first 1×1 convolution (stride_in=1x1).")
    console.print("All of them, beside what is counted here:  excite networks --paper")
    console.print("Add units with +:  resnet50+se  resnet50+se:reduction=8,stages=1-3  resnet20+sk:branches=3-5")
    console.print("Other sources:  torchvision:resnet50  timm:convnext_tiny")


def _input(entry: Entry) -> dict[str, int]:
    return {"input_size": entry.input_size, "in_channels": entry.in_channels}


def _figures(entry: Entry) -> list[str]:
    """Parameters, MACs, top-1 error and data set: of each the first that the papers give."""
    first = {
        name: next((getattr(f, name) for f in entry.figures if getattr(f, name) is not None), None)
        for name in ("parameters", "macs", "top1", "data")
    }
    counted = next((figure for figure in entry.figures if figure.macs is not None), None)
    star = "*" if counted and "stride_in=1x1" in (counted.spec or "") else ""
    return [
        f"{first['parameters']} M" if first["parameters"] else "",
        f"{first['macs']:.2f}{star}" if first["macs"] else "",
        f"{first['top1']:.2f} %" if first["top1"] else "",
        str(first["data"] or "").partition(",")[0].removesuffix(" validation").removesuffix(" test"),
    ]


def _print_paper(pattern: str | None, json: bool) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from excite.report.networks import networks_table
    from excite.verbs.paper import paper

    rows = paper(pattern, progress=True)
    if json:
        print_json({"networks": rows})
        return
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(Markdown(networks_table(rows)))
    else:
        console.print(networks_table(rows), soft_wrap=True, markup=False, end="")

"""``excite cost``."""

from __future__ import annotations

from typing import Annotated

import typer

from excite.cli.common import Json, print_json, show_log

NAME = "cost"


def run(
    specs: Annotated[
        list[str], typer.Argument(metavar="SPEC...", help="Networks; the first is what others are held against.")
    ],
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the input in pixels. Default: the network's own.", show_default=False),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Default: the network's own.", show_default=False)
    ] = None,
    latency: Annotated[bool, typer.Option(help="Measure latency and throughput on this machine.")] = True,
    units: Annotated[bool, typer.Option("--units", help="List the attached units, and what each adds.")] = False,
    json: Json = False,
) -> None:
    """Parameters, MACs, size, and latency on this machine."""
    from rich.console import Console
    from rich.table import Table

    from excite.report.networks import input_text
    from excite.report.wording import magnitude, significant
    from excite.surgery.summary import Attached
    from excite.verbs.costs import costs

    show_log()
    results = costs(specs, size=size, classes=classes, latency=latency, progress=True)
    if json:
        print_json({"results": results})
        return
    columns = ["network", "input", "parameters", "MACs", "size (MiB)"]
    table = Table(*columns, *(["latency (ms)", "× first", "images/s"] if latency else []))
    for row in results:
        cells = [row["spec"], input_text(row["size"], row["channels"])]
        cells += [magnitude(row["parameters"]), magnitude(row["macs"]), significant(row["mebibytes"])]
        if latency:
            ratio = row["latency_ratio"]
            cells += [significant(row["latency_ms"]), f"{ratio:.2f}" if ratio else "", significant(row["throughput"])]
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print(table)
    for row in results if units else []:
        for attached in row["attached"]:
            console.print(f"\n{row['spec']}\n{Attached.read(attached)}", soft_wrap=True)
        if not row["attached"]:
            console.print(f"\n{row['spec']}: no attached units", soft_wrap=True)

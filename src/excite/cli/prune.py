"""``excite prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from excite.allocator import keep_freed_buffers
from excite.cli.common import Data, Device, Json, TestData, print_json, show_log

NAME = "prune"


def run(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained classifier of images.")],
    data: Data = None,
    test_data: TestData = None,
    target_macs: Annotated[
        float | None,
        typer.Option(help="The share of the multiply–adds that may be left. Default: 0.7.", show_default=False),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Instead: how many points of accuracy on validation images it may cost.", show_default=False
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="How channels are chosen: excitation, l1 or random.")] = "excitation",
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Of the training after it. Default: a third of the run's.", show_default=False),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Its peak rate. Default: a fifth of the run's.", show_default=False)
    ] = None,
    constant: Annotated[
        float, typer.Option(help="Units whose gates deviate by no more become a constant scale; -1 keeps all.")
    ] = 0.01,
    multiple: Annotated[int, typer.Option(min=1, help="Widths that are narrowed are multiples of it.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the training after it, and of random choices.")] = 0,
    latency: Annotated[bool, typer.Option(help="Measure latency before and after on this machine.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="The new run's folder. Default: beside the run.", show_default=False)
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Make a trained network smaller by what its gates say, train it on, and show what it cost.

    Interrupted, the same command goes on where it was. Finished, it shows the result again at once.
    """
    from rich.console import Console
    from rich.table import Table

    from excite.report.wording import fixed, magnitude, significant
    from excite.verbs.prune import prune

    show_log()
    keep_freed_buffers()
    result = prune(
        source,
        data,
        test=test_data,
        target_macs=target_macs,
        max_drop=max_drop,
        method=method,
        epochs=epochs,
        lr=lr,
        constant=constant,
        multiple=multiple,
        seed=seed,
        latency=latency,
        out=out,
        device=device,
        progress=True,
    )
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    table = Table("", "before", "pruned", "trained on", title=_title(result), title_justify="left")
    metrics = result["metrics"]
    stages = [metrics["before"], metrics["pruned"], metrics["tuned"]]
    for name in metrics["before"]:
        decimals = 4 if name == "loss" else 2
        table.add_row(name, *(fixed(stage[name] if stage else None, decimals) for stage in stages))
    for name, label in (("macs", "MACs"), ("parameters", "parameters")):
        table.add_row(label, magnitude(result[name]["before"]), "", magnitude(result[name]["after"]))
    if speeds := result["latency"]:
        for key, label in (("latency_ms", "latency (ms)"), ("throughput", "images/s")):
            table.add_row(label, significant(speeds["before"][key]), "", significant(speeds["after"][key]))
    console.print(table)
    for unit in result["constant"]:
        where = f"folded into {unit['into']}" if unit["into"] else "replaced by a constant scale"
        console.print(f"{unit['unit']}: gates deviate by {significant(unit['spread'], 2)}, {where}", soft_wrap=True)
    for trial in result["search"] or []:
        left, drop = f"{trial['target_macs']:.0%}", fixed(trial["drop"], 2)
        console.print(f"tried {left} of the multiply–adds: {drop} points lower on validation images")
    console.print(f"Run: {result['out']}", soft_wrap=True)


def _title(result: dict[str, Any]) -> str:
    return f"{result['network']} on {result['count']:,} {result['split']} images of {result['data']}"

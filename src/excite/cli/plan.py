"""``excite plan``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excite.cli.common import Data, Json, Settings, print_json, show_log
from excite.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

NAME = "plan"

_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_WHY = {
    "gain": "twice as many would be less than 1.5 times as fast",
    "images": "with twice as many each would have fewer than 8 images of a batch",
    "": "no end is seen up to there",
}


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file, or a run's folder.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    devices: Annotated[int, typer.Option(min=1, help="GPUs in each.")] = 8,
    link: Annotated[str, typer.Option(help="A machine's network: 100Gb (bits a second), 12GB (bytes).")] = "100Gb",
    inner_link: Annotated[
        str | None,
        typer.Option(
            help="Between the GPUs of a machine, each way. Default: the GPU's own, else 16GB.", show_default=False
        ),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Take published rates: a100, v100, titan-x.", show_default=False)
    ] = None,
    device_rate: Annotated[
        float | None, typer.Option(help="Images a second that one GPU trains of this network.", show_default=False)
    ] = None,
    peak: Annotated[float | None, typer.Option(help="TFLOPS of one GPU, as printed.", show_default=False)] = None,
    efficiency: Annotated[float, typer.Option(help="The share of --peak that the network reaches.")] = 0.35,
    memory: Annotated[
        str | None, typer.Option(help="Of one GPU: 80GB. Default: the GPU's own.", show_default=False)
    ] = None,
    network: Annotated[str | None, typer.Option(help="A network spec.", show_default=False)] = None,
    data: Data = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Training images, where the data is not here.", show_default=False)
    ] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Likewise its classes.", show_default=False)] = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """What a cluster would take for a recipe: time, traffic and memory of a step, days, and where more stops helping.

    Without --gpu, --device-rate or --peak a step is timed on this machine.
    """
    from rich.console import Console

    from excite.training.recipe import load, parse_settings
    from excite.verbs.plan import plan

    show_log()
    given = {"data.path": data, "network.spec": network}
    changes = {key: value for key, value in given.items() if value is not None} | parse_settings(settings or [])
    result = plan(
        load(recipe).replace(changes),
        nodes=nodes,
        devices=devices,
        link=quantity(link, "--link"),
        inner_link=None if inner_link is None else quantity(inner_link, "--inner-link"),
        gpu_name=gpu,
        device_rate=device_rate,
        peak=None if peak is None else 1e12 * peak,
        efficiency=efficiency,
        memory=None if memory is None else quantity(memory, "--memory"),
        images=images,
        classes=classes,
        progress=True,
    )
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    for line in _lines(result):
        console.print(line, soft_wrap=True)
    console.print(_table(result["scaling"]))
    stop = result["stops_at"]
    console.print(f"It stops scaling at {stop['devices']} devices: {_WHY[stop['why']]}.", soft_wrap=True)


def quantity(text: str, option: str) -> float:
    """Bytes, or bytes per second, of ``100Gb`` (bits), ``12.5GB`` or ``80GiB``.

    Raises:
        UsageError: it is none of these, or not above 0.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kKMGT]?)(i?)([bB])(?:/s|ps)?", text.strip())
    number = float(found[1]) if found else 0.0
    if not found or not number:
        raise UsageError(f"{option} {text}: expected a number and its unit, such as 100Gb (bits) or 80GB (bytes)")
    base = 1024 if found[3] else 1000
    return number * base ** _POWERS[found[2]] / (8 if found[4] == "b" else 1)


def _lines(result: dict[str, Any]) -> list[str]:
    from excite.report.wording import duration, magnitude, percent, significant

    step, memory, device = result["step"], result["memory"], result["device"]
    lines = [
        f"{result['network']}: {magnitude(result['parameters'])} parameters, {magnitude(result['macs'])} MACs; "
        f"{result['epochs']} epochs of {result['images']:,} images in batches of {result['batch']:,}",
        f"One device: {significant(device['images_per_second'])} images/s, {step['micro_batch']} at once, "
        f"{device['source']}",
        f"{result['nodes']} × {result['devices']} devices: {step['images_per_device']} images each, "
        f"{step['rounds']} × {step['micro_batch']} at once",
        f"A step: {significant(step['ms'])} ms = computing {significant(step['compute_ms'])} + gradients "
        f"{significant(step['exposed_ms'])} (of {significant(step['reduce_ms'])} on the wire) + batch norms "
        f"{significant(step['norms_ms'])}",
        f"Each device sends {_bytes(step['bytes'])} of gradients a step"
        + (f", and {_bytes(step['norm_bytes'])} of statistics" if step["norm_bytes"] else ""),
        f"Memory of a device: {_bytes(memory['total'])} = parameters {_bytes(memory['parameters'])} + gradients "
        f"{_bytes(memory['gradients'])} + optimiser {_bytes(memory['optimizer'])} + exchange "
        f"{_bytes(memory['exchange'])} + activations {_bytes(memory['activations'])} + reserve "
        f"{_bytes(memory['reserve'])}",
    ]
    if memory["device"]:
        fits = memory["largest_micro_batch"]
        said = f"up to {fits} images at once fit" if fits else "this does not fit"
        lines.append(f"Into {_bytes(memory['device'])} {said}")
    lines.append(
        f"Together: {significant(result['images_per_second'])} images/s, "
        f"{percent(result['efficiency'])} of as many single devices; an epoch "
        f"{duration(3600 * result['hours_per_epoch'])}, all of it {_days(result['hours'])}"
    )
    lines.append(
        f"Each machine must read and decode {significant(result['images_per_second'] / result['nodes'])} images/s"
    )
    return lines


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    from excite.report.wording import percent, significant

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for title in ("devices", "images each", "step, ms", "waiting", "images/s", "efficiency", "in all"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["devices"]),
            f"{row['rounds']} × {row['micro_batch']}",
            significant(row["ms"]),
            significant(row["exposed_ms"] + row["norms_ms"]),
            significant(row["images_per_second"]),
            percent(row["efficiency"]),
            _days(row["hours"]),
        )
    return table


def _bytes(size: float) -> str:
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if size >= 0.9995 * 1000**power:
            return f"{size / 1000**power:.3g} {unit}"
    return f"{size:.0f} B"


def _days(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"

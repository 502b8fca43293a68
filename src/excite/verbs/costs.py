"""``cost``: what networks take, counted and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from excite import timing
from excite.cost import cost
from excite.create import create, for_window
from excite.networks.catalog import CATALOG
from excite.spec import parse_spec
from excite.surgery.summary import Attached
from excite.training.bars import bar

THROUGHPUT_BATCH = 32


def costs(
    specs: Sequence[str],
    *,
    size: int | None = None,
    classes: int | None = None,
    latency: bool = True,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Parameters, MACs, size and speed of networks.

    Args:
        specs: network specs; the first is what the latency of the others is held against.
        size: side of the input in pixels; by default the one that the network was drawn for, else 224. A network that
            is built for windows of one size is built for this one.
        classes: by default 10 for inputs of 32 × 32 and less, else 1000; for networks that take the windows of a
            hyperspectral scene 16, those of the scene that they were drawn for. Networks that answer with an image
            have none.
        latency: measure, each network in its own process, driven in turn.
        progress: show bars on stderr.

    Returns:
        One dictionary for each spec: ``spec``, ``size`` and ``channels`` of the input, ``classes``, ``parameters``,
        ``macs``, ``mebibytes`` (of fp32 weights), ``attached`` (for each unit of the spec that was put into a
        finished network, what :class:`~excite.surgery.summary.Attached` says of it), and where measured
        ``latency_ms`` (batch 1), ``latency_ratio`` with ``latency_ratio_ci95`` (None for the first) and
        ``throughput`` (images per second, batch 32).
    """
    rows: list[dict[str, Any]] = []
    networks, shapes = [], []
    for text in specs:
        spec = parse_spec(text)
        entry = None if spec.source else CATALOG.get(spec.name)
        channels = entry.in_channels if entry else 3
        side = size or (entry.input_size if entry else 224)
        heads = classes or (entry.classes if entry and channels != 3 else 10 if side <= 32 else 1000)
        heads = heads if not entry or entry.classes else None
        network = create(for_window(spec, size) if size else spec, heads, channels).eval()
        channels, side, _ = getattr(network, "input_shape", None) or (channels, side, side)
        counted = cost(network, (channels, side, side))
        rows.append(
            {
                "spec": str(spec),
                "size": side,
                "channels": channels,
                "classes": heads,
                "parameters": counted.parameters,
                "macs": counted.macs,
                "mebibytes": 4 * counted.parameters / 2**20,
                "attached": [asdict(table) for table in _tables(network)],
            }
        )
        networks.append(network)
        shapes.append((channels, side, side))
    if latency:
        names = [f"{i} {row['spec']}" for i, row in enumerate(rows)]
        measured = speeds(dict(zip(names, zip(networks, shapes, strict=True), strict=True)), progress)
        for name, row in zip(names, rows, strict=True):
            row |= measured[name]
    return rows


def _tables(network: nn.Module) -> tuple[Attached, ...]:
    tables = getattr(network, "attached", ())
    return tables if isinstance(tables, tuple) else ()


def speeds(
    networks: Mapping[str, tuple[nn.Module, tuple[int, ...]]], progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Latency and throughput of networks, each in a process of its own, driven in turn.

    Args:
        networks: by name, the network and the shape of one input; the first is what the others are held against.
        progress: show bars on stderr.

    Returns:
        For each name ``latency_ms``, ``latency_ratio``, ``latency_ratio_ci95`` and ``throughput``, as :func:`costs`.
    """
    calls = {name: timing.InferenceCall(network, shape, batch=1) for name, (network, shape) in networks.items()}
    with bar("timing one image at a time", progress) as step:
        single = timing.time_in_turn(calls, progress=step)
    with bar(f"timing {THROUGHPUT_BATCH} images at a time", progress) as step:
        large = {name: replace(call, batch=THROUGHPUT_BATCH) for name, call in calls.items()}
        many = timing.time_in_turn(large, progress=step)
    first = next(iter(networks))
    measured: dict[str, dict[str, Any]] = {}
    for name in networks:
        ratio = single.ratio(name, first) if name != first else None
        measured[name] = {
            "latency_ms": 1000 * single.median(name),
            "latency_ratio": ratio.value if ratio else None,
            "latency_ratio_ci95": [ratio.low, ratio.high] if ratio else None,
            "throughput": THROUGHPUT_BATCH / many.median(name),
        }
    return measured

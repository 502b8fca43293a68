"""The catalogue against its papers: what the networks here take, beside what was published of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from excite.cost import cost
from excite.create import create
from excite.networks.catalog import CATALOG, Entry, Figures
from excite.training.bars import bar


def paper(pattern: str | None = None, progress: bool = False) -> list[dict[str, Any]]:
    """Count every network, and set the papers' figures beside it.

    Args:
        pattern: only names that hold this text.
        progress: show a bar on stderr.

    Returns:
        For each published figure, and once for a network without any: ``network``, ``spec`` (what was counted),
        ``input_size``, ``in_channels``, ``parameters`` (in millions) and ``macs`` (in 10⁹) as counted here, the same
        as published (``paper_parameters``, ``paper_macs``), ``top1`` and ``top5`` (errors in percent), ``data``,
        ``source`` and ``note``; None where the paper says nothing.
    """
    entries = [entry for name, entry in CATALOG.items() if pattern is None or pattern in name]
    rows = []
    with bar("counting", progress) as step:
        for done, entry in enumerate(entries, start=1):
            rows += [_row(entry, figures) for figures in entry.figures or (None,)]
            if step:
                step(done, len(entries))
    return rows


def _row(entry: Entry, figures: Figures | None) -> dict[str, Any]:
    spec = (figures.spec if figures else None) or entry.name
    outputs = 100 if figures and "CIFAR-100" in figures.data else entry.classes
    parameters, macs = _counted(spec, outputs, entry.in_channels, entry.input_size)
    return {
        "network": entry.name,
        "spec": spec,
        "input_size": entry.input_size,
        "in_channels": entry.in_channels,
        "parameters": parameters / 1e6,
        "macs": macs / 1e9,
        "paper_parameters": figures.parameters if figures else None,
        "paper_macs": figures.macs if figures else None,
        "top1": figures.top1 if figures else None,
        "top5": figures.top5 if figures else None,
        "data": figures.data if figures else None,
        "source": figures.source if figures else None,
        "note": (figures.note or None) if figures else None,
    }


@lru_cache(maxsize=8)  # the figures of one network follow each other
def _counted(spec: str, outputs: int | None, channels: int, size: int) -> tuple[int, int]:
    with torch.device("meta"):  # shapes are all that counts
        network = create(spec, outputs, channels)
    counted = cost(network, (channels, size, size))
    return counted.parameters, counted.macs

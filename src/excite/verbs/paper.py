"""The catalogue against its papers: what the networks here take, beside what was published of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from excite.cost import cost
from excite.create import create
from excite.networks.catalog import CATALOG


def paper(pattern: str | None = None) -> Iterator[dict[str, Any]]:
    """Count every network, and set the papers' figures beside it.

    Args:
        pattern: only names that hold this text.

    Yields:
        For each published figure, and once for a network without any: ``network``, ``spec`` (what was counted),
        ``input_size``, ``parameters`` (in millions) and ``macs`` (in 10⁹) as counted here, the same as published
        (``paper_parameters``, ``paper_macs``), ``top1`` and ``top5`` (errors in percent), ``data``, ``source`` and
        ``note``; None where the paper says nothing.
    """
    for name, entry in CATALOG.items():
        if pattern is not None and pattern not in name:
            continue
        for figures in entry.figures or (None,):
            spec = (figures.spec if figures else None) or name
            outputs = 100 if figures and "CIFAR-100" in figures.data else 10 if entry.input_size <= 64 else 1000
            with torch.device("meta"):
                counted = cost(create(spec, outputs), (3, entry.input_size, entry.input_size))
            yield {
                "network": name,
                "spec": spec,
                "input_size": entry.input_size,
                "parameters": counted.parameters / 1e6,
                "macs": counted.macs / 1e9,
                "paper_parameters": figures.parameters if figures else None,
                "paper_macs": figures.macs if figures else None,
                "top1": figures.top1 if figures else None,
                "top5": figures.top5 if figures else None,
                "data": figures.data if figures else None,
                "source": figures.source if figures else None,
                "note": (figures.note or None) if figures else None,
            }

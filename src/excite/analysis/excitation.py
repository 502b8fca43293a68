"""The role of excitation: how the gates of each unit differ from class to class, and how many are at their ends.

Source: Hu et al., arXiv 1709.01507, Sect. 6.3 and Fig. 8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from excite.analysis.gates import Gate
from excite.analysis.moments import Array, Moments
from excite.errors import ExciteError

AT_AN_END = 0.05
"""A gate that is no farther from the low or the high end of its range is saturated."""
CONSTANT = 0.01
"""The standard deviation below which the gate of a channel is said to be constant."""
DECIMALS = 6  # of the figures that a page draws; the arrays have them all


class Excitation:
    """Gathers the gates of all squeeze-and-excitation units, batch by batch.

    Args:
        gates: the units.
        classes: how many there are.
    """

    def __init__(self, gates: Sequence[Gate], classes: int) -> None:
        self.gates = list(gates)
        widths = [gate.channels for gate in self.gates]
        self._moments = Moments(classes, sum(widths))
        self._at_low = torch.zeros(sum(widths), dtype=torch.int64)
        self._at_high = torch.zeros(sum(widths), dtype=torch.int64)
        low, high = (torch.tensor([gate.range[end] for gate in self.gates], dtype=torch.float64) for end in (0, 1))
        self._low = (low + AT_AN_END).repeat_interleave(torch.tensor(widths))
        self._high = (high - AT_AN_END).repeat_interleave(torch.tensor(widths))

    def update(self, values: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add a batch.

        Args:
            values: by a unit's name its gates, (N, C).
            labels: (N,).

        Raises:
            ExciteError: a gate is not a finite number.
        """
        # All units at once: one update costs as much as one of them.
        every = gathered(self.gates, values).to("cpu", torch.float64)
        self._moments.update(every, labels)
        self._at_low += (every <= self._low).sum(0)
        self._at_high += (every >= self._high).sum(0)

    def merge(self, other: Excitation) -> None:
        """Add what was gathered apart, of the same units and classes."""
        self._moments.merge(other._moments)
        self._at_low += other._at_low
        self._at_high += other._at_high

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images of each class, (classes,)."""
        return self._moments.count

    def arrays(self) -> dict[str, NDArray[Any]]:
        """``excitation/NAME/…`` for each unit.

        ``mean`` and ``deviation`` (within the class) are (classes, C), NaN for a class without images;
        ``overall_mean``, ``overall_deviation``, and ``low`` and ``high``, the shares of images whose gate is at that
        end, are (C,).
        """
        overall = self._moments.overall()
        whole = {
            "mean": self._moments.mean,
            "deviation": np.sqrt(self._moments.variance),
            "overall_mean": overall.mean,
            "overall_deviation": overall.deviation,
            "low": self._at_low.numpy() / overall.samples,
            "high": self._at_high.numpy() / overall.samples,
        }
        return {
            f"excitation/{gate.name}/{name}": array[..., part]
            for gate, part in zip(self.gates, parts(self.gates), strict=True)
            for name, array in whole.items()
        }

    def figures(self, channels: int) -> list[dict[str, Any]]:
        """For each unit what is said and drawn of it, without its place among all units.

        Args:
            channels: of how many channels, spread evenly, the means are given.
        """
        arrays = self.arrays()
        found = []
        for gate in self.gates:
            mean, deviation, overall, spread, low, high = (
                arrays[f"excitation/{gate.name}/{name}"]
                for name in ("mean", "deviation", "overall_mean", "overall_deviation", "low", "high")
            )
            chosen = spread_evenly(gate.channels, channels)
            between, within = _between_and_within(self.counts, mean, deviation, overall)
            total = between**2 + within**2
            found.append(
                {
                    "channels": chosen,
                    "overall": rounded(overall[chosen]),
                    "by_class": {str(number): rounded(row[chosen]) for number, row in enumerate(mean)},
                    "between": between,
                    "within": within,
                    "class_share": between**2 / total if total > 0 else 0.0,
                    "mean": float(overall.mean()),
                    "low": float(low.mean()),
                    "high": float(high.mean()),
                    "constant": float((spread < CONSTANT).mean()),
                    "range": list(gate.range),
                }
            )
        return found


def _between_and_within(
    counts: NDArray[np.int64], mean: Array, deviation: Array, overall: Array
) -> tuple[float, float]:
    """Root mean squares over the channels; the squares add up to the variance of the gates over all images."""
    there = counts > 0
    weights = counts[there] / counts.sum()
    between = weights @ np.square(mean[there] - overall)
    within = weights @ np.square(deviation[there])
    return float(np.sqrt(between.mean())), float(np.sqrt(within.mean()))


def gathered(gates: Sequence[Gate], values: Mapping[str, Tensor]) -> Tensor:
    """The gates of all units side by side, (N, …) each flattened.

    Raises:
        ExciteError: one is not a finite number; the message names the unit.
    """
    every = torch.cat([values[gate.name].flatten(1) for gate in gates], 1)
    if not bool(every.isfinite().all()):
        broken = next(gate for gate in gates if not values[gate.name].isfinite().all())
        raise ExciteError(
            f"The gates of {broken.name} are not finite numbers for some images: the network's weights or its input "
            "overflow, so that nothing can be said of them."
        )
    return every


def parts(gates: Sequence[Gate]) -> list[slice]:
    """Where each unit's channels are among those of all."""
    ends = np.cumsum([gate.channels for gate in gates]).tolist()
    return [slice(end - gate.channels, end) for gate, end in zip(gates, ends, strict=True)]


def spread_evenly(count: int, wanted: int) -> list[int]:
    """At most so many of the numbers 0 … count − 1, uniformly spaced, the first and the last among them."""
    return [int(place) for place in np.unique(np.linspace(0, count - 1, min(count, wanted)).round())]


def rounded(values: NDArray[Any]) -> list[float | None]:
    """Numbers for a page, None for those that are not there."""
    return [round(float(value), DECIMALS) if np.isfinite(value) else None for value in values]


def stage_of(name: str) -> int | None:
    """The stage that a unit's name tells of, as ``layer2`` does; None where it tells of none."""
    found = re.search(r"(?:^|\.)(?:layer|stage)_?(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None

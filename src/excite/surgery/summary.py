"""What was attached where, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttachedUnit:
    """One unit and its place.

    Attributes:
        name: of the unit in the network, which its parameters' names begin with.
        stage: 1 for the units on the largest feature maps, and so on down.
        size: of the feature map, (H, W) for images.
        channels: of the feature map.
        width: of the unit's bottleneck; None for a unit without.
        parameters: added by it.
        macs: multiply–adds that it adds to one forward pass of one image.
    """

    name: str
    stage: int
    size: tuple[int, ...]
    channels: int
    width: int | None
    parameters: int
    macs: int

    @property
    def reduction(self) -> float | None:
        """C over the width of the bottleneck."""
        return self.channels / self.width if self.width else None


@dataclass(frozen=True)
class Attached:
    """What was attached where; as text, a table.

    Attributes:
        unit: its name and arguments.
        units: every unit, in the order of their places.
        missed: places of the kind asked for that could not be reached, each with the reason.
    """

    unit: str
    units: tuple[AttachedUnit, ...]
    missed: tuple[str, ...]

    @classmethod
    def read(cls, content: dict[str, Any]) -> Attached:
        """From the dictionary that :func:`dataclasses.asdict` makes of one."""
        units = tuple(AttachedUnit(**{**item, "size": tuple(item["size"])}) for item in content["units"])
        return cls(content["unit"], units, tuple(content["missed"]))

    @property
    def parameters(self) -> int:
        """Added in total."""
        return sum(item.parameters for item in self.units)

    @property
    def macs(self) -> int:
        """Added in total."""
        return sum(item.macs for item in self.units)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("unit", "stage", "map", "channels", "reduction", "parameters", "MACs")]
        rows += [_row(item) for item in self.units]
        stages = sorted({item.stage for item in self.units})
        totals: list[tuple[str, ...]] = []
        for stage in stages if len(stages) > 1 else []:
            items = [item for item in self.units if item.stage == stage]
            totals.append((f"{len(items)} in stage {stage}", str(stage), *[""] * 3, *_sums(items)))
        totals.append((f"{len(self.units)} in all", *[""] * 4, *_sums(self.units)))
        widths = [max(map(len, column)) for column in zip(*rows, *totals, strict=True)]
        lines = [_aligned(row, widths) for row in rows]
        rule = "-" * len(lines[0])
        lines += [rule, *(_aligned(row, widths) for row in totals)]
        lines.insert(1, rule)
        lines += [f"not reached: {reason}" for reason in self.missed]
        return "\n".join(lines)


def _row(item: AttachedUnit) -> tuple[str, ...]:
    reduction = "" if item.reduction is None else f"{item.reduction:g}"
    size = "×".join(map(str, item.size))
    return item.name, str(item.stage), size, f"{item.channels:,}", reduction, *_sums([item])


def _sums(items: Iterable[AttachedUnit]) -> tuple[str, str]:
    items = list(items)
    return f"{sum(item.parameters for item in items):,}", f"{sum(item.macs for item in items):,}"


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    first, *others = (
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others])

"""What the page of an explanation holds for its script: the gates of every class, packed, and small panels of them.

A network for ImageNet has 1,000 classes and some dozens of units, and all classes can be chosen on the page. So the
numbers are packed into two characters each, and there is a limit to how many are taken along.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from excite.report import wording
from excite.report.figures import short

Values = Sequence[float | None]

FEW = 20
"""Up to so many classes all of them are offered at once; of more, those that are looked for."""
MOST_NUMBERS = 2_000_000
"""Gates that the page takes along, at two bytes each."""
FEWEST_CHANNELS = 25
DRAWN = 4
"""Classes drawn at first, where the result does not say which."""
CODE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
LEVELS = 4094
"""The highest of the levels that two characters tell apart; one more is a value that is missing."""
WIDTH, HEIGHT = 200, 80
"""The box of a small panel, in its own units."""


@dataclass(frozen=True)
class Choice:
    """What of a result is on the page.

    Attributes:
        classes: those that can be chosen, as places in the result's classes.
        shown: those of them that are drawn at first.
        step: every so many of the channels.
    """

    classes: tuple[int, ...]
    shown: tuple[int, ...]
    step: int


def choice(result: Mapping[str, Any]) -> Choice:
    """All classes that had images and all channels, as far as they fit into the page.

    Where they do not, every second or third channel is left out first, then classes.
    """
    seen = [index for index, count in enumerate(result["counts"]) if count]
    shown = [index for index in (result["excitation"] or {}).get("shown_classes", []) if index in set(seen)]
    shown = shown or spread(seen, DRAWN)
    step = next((step for step in (1, 2, 3) if _fit(result, step) >= len(seen)), None)
    if step is None:
        most = max((len(unit["channels"]) for unit in (result["excitation"] or {}).get("units", [])), default=0)
        step = max(1, most // FEWEST_CHANNELS)
    kept = seen
    if _fit(result, step) < len(seen):
        others = [index for index in seen if index not in set(shown)]
        kept = sorted([*shown, *spread(others, _fit(result, step) - len(shown))])
    return Choice(tuple(kept), tuple(shown), step)


def spread(values: Sequence[int], count: int) -> list[int]:
    """At most so many of the values, evenly spread over them."""
    if len(values) <= count:
        return list(values)
    return [values[(2 * place + 1) * len(values) // (2 * count)] for place in range(count)]


def _fit(result: Mapping[str, Any], step: int) -> int:
    """How many classes fit into the page with every so many of the channels."""
    gates = sum(-(-len(unit["channels"]) // step) for unit in (result["excitation"] or {}).get("units", []))
    selection = result["selection"] or {}
    return MOST_NUMBERS // max(1, gates + len(selection.get("units", [])) * len(selection.get("scales", [])))


def gate_data(result: Mapping[str, Any], chosen: Choice) -> dict[str, Any] | None:
    """The mean gates of every class and unit, and the range that their shared axis has.

    Returns:
        ``range``, ``first`` (the unit that is drawn at first: the one whose gates tell most about the class), and
        for each unit its names, ``channels``, ``overall``, and the classes' gates packed (:func:`packed`).
    """
    if not result["excitation"]:
        return None
    names = labels(result["units"])
    units, extremes = [], []
    for entry in result["excitation"]["units"]:
        of_class = {int(index): values for index, values in entry["by_class"].items()}
        rows = [_taken(of_class[index], chosen.step) for index in chosen.classes]
        overall = _taken(entry["overall"], chosen.step)
        extremes += [value for row in (*rows, overall) for value in _extent(row)]
        unit = result["units"][entry["unit"]]
        share = entry["class_share"]
        units.append(
            {
                "name": unit["name"], "label": names[entry["unit"]], "share": wording.percent(share),
                "about": _about(unit, f"the class explains {wording.percent(share)} of its gates’ variance"),
                "channels": _taken(entry["channels"], chosen.step),
                "overall": [value if value is None else short(value) for value in overall],
            }
            | packed(rows)
        )  # fmt: skip
    shares = [entry["class_share"] for entry in result["excitation"]["units"]]
    told = [share if wording.is_number(share) else -1.0 for share in shares]
    return {"units": units, "range": padded(extremes), "first": told.index(max(told))}


def selection_data(result: Mapping[str, Any], chosen: Choice) -> dict[str, Any] | None:
    """Attention to the large kernel minus the small, of every class, unit and scale; as :func:`gate_data` has it."""
    if not result["selection"]:
        return None
    names, found = labels(result["units"]), result["selection"]
    units, extremes = [], []
    drawn = chosen.classes if len(result["classes"]) <= FEW else chosen.shown
    for entry in found["units"]:
        rows = [entry["by_class"][index] for index in chosen.classes]
        extremes += [value for index in drawn for value in _extent(entry["by_class"][index])]
        extremes += _extent(entry["overall"])
        unit = result["units"][entry["unit"]]
        units.append(
            {
                "name": unit["name"], "label": names[entry["unit"]], "small": entry["small"], "large": entry["large"],
                "about": _about(unit, f"{entry['large']} against {entry['small']}"),
                "overall": [short(value) if wording.is_number(value) else None for value in entry["overall"]],
                "rise": wording.signed(entry["rise"], 3),
            }
            | packed(rows)
        )  # fmt: skip
    rises = [abs(entry["rise"]) if wording.is_number(entry["rise"]) else -1.0 for entry in found["units"]]
    return {
        "units": units, "range": padded(extremes), "first": rises.index(max(rises)),
        "scales": [scale_name(scale) for scale in found["scales"]], "steps": steps(len(found["scales"])),
    }  # fmt: skip


def scale_name(scale: float) -> str:
    """``1.5`` as ``1.5×``."""
    return f"{scale:.3g}×"


def steps(count: int) -> list[int]:
    """A colour for each scale, of the five steps of ``page.css``: from the first to the last, evenly."""
    return [round(4 * place / max(1, count - 1)) for place in range(count)]


def _about(unit: Mapping[str, Any], last: str) -> str:
    """What stands above the chart of a unit."""
    size = "×".join(map(str, unit["size"]))
    parts = [f"{unit['channels']} channels", *([f"map of {size}"] if size else []), last]
    return " · ".join(parts)


def labels(units: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names short enough for a tick: ``layer1.0.se`` and ``layer2.1.se`` are ``1.0`` and ``2.1``.

    What all names have in common is left out; what is left tells them apart as well as the whole names do.
    """
    parts = [unit["name"].split(".") for unit in units]
    if len(parts) < 2:
        return [unit["name"] or "network" for unit in units]
    if len({len(names) for names in parts}) == 1:
        kept = [place for place in range(len(parts[0])) if len({names[place] for names in parts}) > 1]
        parts = [[names[place] for place in kept] for names in parts]
    else:
        while len({names[0] for names in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [names[1:] for names in parts]
        while len({names[-1] for names in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [names[:-1] for names in parts]
    numbered = [re.fullmatch(r"([A-Za-z_]+)(\d+)", names[0]) if names else None for names in parts]
    if all(numbered) and len({match[1] for match in numbered if match}) == 1:
        parts = [[match[2], *names[1:]] for match, names in zip(numbered, parts, strict=True) if match]
    return [".".join(names) or unit["name"] for names, unit in zip(parts, units, strict=True)]


# ---------------------------------------------------------------------------------------- packing


def packed(rows: Sequence[Values]) -> dict[str, Any]:
    """Numbers as text, two characters each, row after row.

    Returns:
        ``codes``, ``low`` and ``span``: a pair of characters is a number n in 0 … 4095 of base 64, and stands for
        low + span · n / 4094, or for a missing value where n is 4095. So it is told to 1/8000 of the range.
    """
    known = [value for row in rows for value in _extent(row)]
    low = min(known, default=0.0)
    span = max(known, default=0.0) - low
    codes = []
    for value in itertools.chain.from_iterable(rows):
        if value is None or not wording.is_number(value):
            level = LEVELS + 1
        else:
            level = round(LEVELS * (value - low) / span) if span else 0
        codes.append(CODE[level >> 6] + CODE[level & 63])
    return {"low": low, "span": span, "codes": "".join(codes)}


def _taken(values: Sequence[Any], step: int) -> list[Any]:
    return list(values[::step])


def _extent(values: Values) -> list[float]:
    known = [value for value in values if value is not None and wording.is_number(value)]
    return [min(known), max(known)] if known else []


def padded(values: Sequence[float], share: float = 0.05) -> list[float]:
    """From the least to the greatest value, and some room."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = share * (high - low) or 0.01
    return [short(low - room), short(high + room)]


# ---------------------------------------------------------------------------------------- panels


def gate_panels(result: Mapping[str, Any], chosen: Choice, gates: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A small panel for each unit: the first classes and the overall mean as paths, all on one axis.

    The channels are sorted by their overall mean, so that what a class does differently stands out.
    """
    panels = []
    for unit, entry in zip(gates["units"], result["excitation"]["units"], strict=True):
        of_class = {int(index): _taken(values, chosen.step) for index, values in entry["by_class"].items()}
        overall = unit["overall"]
        order = sorted(range(len(overall)), key=lambda place: overall[place] or 0)
        rows = [of_class[index] for index in chosen.shown]
        mean, *lines = [path([row[place] for place in order], gates["range"]) for row in (overall, *rows)]
        panels.append(unit | {"mean": mean, "lines": lines})
    return panels


def selection_panels(result: Mapping[str, Any], chosen: Choice, selection: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A small panel for each unit: attention against scale, one faint line a class, with a dot for each scale."""
    drawn = chosen.classes if len(result["classes"]) <= FEW else chosen.shown
    panels = []
    for unit, entry in zip(selection["units"], result["selection"]["units"], strict=True):
        lines = [path(entry["by_class"][index], selection["range"], inset=0.14) for index in drawn]
        places = points(unit["overall"], selection["range"], inset=0.14)
        zero = points([0.0], selection["range"])[0]
        panels.append(
            unit
            | {
                "mean": path(unit["overall"], selection["range"], inset=0.14),
                "lines": lines,
                "dots": [place for place in places if place],
                "zero": zero[1] if zero and 0 <= zero[1] <= HEIGHT else None,
            }
        )
    return panels


def points(values: Values, limits: Sequence[float], inset: float = 0.02) -> list[tuple[float, float] | None]:
    """Where values stand in a panel, evenly from left to right; None where there is none."""
    low, high = limits
    room = WIDTH * inset
    stride = (WIDTH - 2 * room) / max(1, len(values) - 1)
    return [
        (round(room + place * stride, 1), round(HEIGHT * (high - value) / (high - low), 1))
        if value is not None and wording.is_number(value)
        else None
        for place, value in enumerate(values)
    ]


def path(values: Values, limits: Sequence[float], inset: float = 0.02) -> str:
    """The line through them as the ``d`` of an SVG path, with a gap for each value that is missing."""
    said, pen = [], "M"
    for place in points(values, limits, inset):
        if place is None:
            pen = "M"
            continue
        said.append(f"{pen}{place[0]:g} {place[1]:g}")
        pen = "L"
    return "".join(said)

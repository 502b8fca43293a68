"""The figure of an ablation: the score against the value that varies, and against what it costs.

The points are those of a comparison's cost scatter (``figures.py``), put over other axes.
"""

from __future__ import annotations

import copy
import html
import math
from collections.abc import Sequence
from typing import Any

from excite.report import figures, wording
from excite.report.figures import Figure

LOGARITHMIC_FROM = 8.0
"""Values that span so large a factor are shown by their logarithm."""


def ablate_figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One figure for each horizontal axis: the value, parameters, MACs and latency.

    Args:
        result: the content of ``ablate.json``.

    Returns:
        Dictionaries with ``id``, ``label`` (of the switch), ``spoken`` and ``plot``; none for fewer than two rows
        with a score.
    """
    named = [row | {"spec": row["label"]} for row in result["rows"]]
    by_cost = {figure["id"]: figure for figure in figures.cost_figures(result | {"results": named})}
    if "cost-macs" not in by_cost:
        return []
    points = by_cost["cost-macs"]
    thousands = [row["parameters"] / 1e3 for row in named]
    found = [
        _by_value(points, result),
        _over(points, "parameters", "Parameters", "Parameters (thousands)", thousands, result),
        points,
        *([by_cost["cost-latency"]] if "cost-latency" in by_cost else []),
    ]
    twins = {f"series-{index}" for index, row in enumerate(result["rows"]) if row["same_as"]}
    for figure in found[1:]:  # the same network stands at the same place: one name is enough
        data = figure["plot"]["data"]
        figure["plot"]["data"] = [trace for trace in data if trace["legendgroup"] not in twins]
    return found


def _over(
    points: dict[str, Any], name: str, label: str, title: str, xs: Sequence[float | None], result: dict[str, Any]
) -> dict[str, Any]:
    """The same points over another axis; ``xs`` is a position for each row, None for one that is left out."""
    figure = copy.deepcopy(points)
    plot = figure["plot"]
    plot["data"] = [trace for trace in plot["data"] if xs[_index(trace)] is not None]
    for trace in plot["data"]:
        trace["x"] = [xs[_index(trace)]] * len(trace["x"])
    plot["layout"]["xaxis"] = figures.plain_layout(title)["xaxis"] | {"range": _padded(xs, 0.14)}
    places = wording.decimals(result["metric"]["unit"])
    said = [f"{row['label']} {wording.fixed(row['score'], places)}" for row in result["rows"]]
    score = wording.capital(wording.metric_name(result["metric"]["name"]))
    return figure | {"id": f"cost-{name}", "label": label, "spoken": f"{score} against {title}: {'; '.join(said)}."}


def _by_value(points: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The points over the values of one key, joined for each setting of the others; a host without it is a band."""
    key, rows = _axis_key(result), result["rows"]
    values: list[str] = result["grid"][key]
    places = _positions(values)
    families = [_family(row, key) for row in rows]
    names = list(dict.fromkeys(family for family in families if family is not None))
    # Points of one value stand side by side.
    step = 0.02 * (max(places.values()) - min(places.values()))
    xs = [
        None if family is None else places[row["setting"][key]] + step * (names.index(family) - (len(names) - 1) / 2)
        for row, family in zip(rows, families, strict=True)
    ]
    figure = _over(points, "value", key, key, xs, result)
    plot = figure["plot"]
    axis = plot["layout"]["xaxis"]
    axis |= {"range": _padded(xs, 0.1), "tickmode": "array", "tickvals": list(places.values())}
    axis |= {
        "ticktext": [html.escape(value) for value in values],
        "title": {**axis["title"], "text": html.escape(key)},
    }
    for trace in plot["data"]:
        if "text" in trace:  # the axis names the points
            del trace["text"]
            trace["mode"] = "markers"
    bands = [trace for i, row in enumerate(rows) if xs[i] is None for trace in _band(i, row, axis["range"])]
    plot["data"] = [*bands, *_lines(rows, xs, families), *plot["data"]]
    return figure


def _axis_key(result: dict[str, Any]) -> str:
    """The key along the axis: the first whose values are several numbers, else the first."""
    numeric = [key for key, values in result["grid"].items() if len(values) > 1 and _numbers(values)]
    return numeric[0] if numeric else next(iter(result["grid"]))


def _positions(values: Sequence[str]) -> dict[str, float]:
    """Where each value stands on the axis: numbers by their size, or its logarithm; others side by side."""
    numbers = _numbers(values)
    if numbers is None:
        numbers = [float(place) for place in range(len(values))]
    elif min(numbers) > 0 and max(numbers) >= LOGARITHMIC_FROM * min(numbers):
        numbers = [math.log2(number) for number in numbers]
    return dict(zip(values, numbers, strict=True))


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        found = [float(value) for value in values]
    except ValueError:
        return None
    return found if all(math.isfinite(value) for value in found) else None


def _family(row: dict[str, Any], key: str) -> tuple[Any, ...] | None:
    """What the rows have in common that differ in this key alone; None for a row without a value of it."""
    if key not in row["setting"]:
        return None
    return (row["original"], *((name, value) for name, value in row["setting"].items() if name != key))


def _lines(
    rows: Sequence[dict[str, Any]], xs: Sequence[float | None], families: Sequence[tuple[Any, ...] | None]
) -> list[Figure]:
    """One quiet line through the rows of each family."""
    lines = []
    for family in dict.fromkeys(families):
        points = sorted(
            (x, row["score"])
            for row, x, own in zip(rows, xs, families, strict=True)
            if x is not None and own == family and wording.is_number(row["score"])
        )
        if family is not None and len(points) > 1:
            dash = "dot" if family[0] else "solid"
            line: Figure = {
                "type": "scatter", "mode": "lines", "x": [x for x, _ in points], "y": [y for _, y in points],
                "line": {"color": "--faint", "width": 1.5, "dash": dash}, "hoverinfo": "skip",
            }  # fmt: skip
            lines.append(line)
    return lines


def _band(index: int, row: dict[str, Any], ends: Sequence[float]) -> list[Figure]:
    """The host, which has no value of the key: a line across, within its interval."""
    if not wording.is_number(row["score"]):
        return []
    group, color = f"series-{index}", f"--series-{index % len(figures.SYMBOLS)}"
    across: Figure = {
        "type": "scatter", "mode": "lines", "x": list(ends), "y": [row["score"]] * 2, "legendgroup": group,
        "line": {"color": color, "width": 2, "dash": "dash"}, "name": html.escape(row["label"]),
        "hovertemplate": f"<b>{html.escape(row['label']).replace('%', '&#37;')}</b> %{{y:.4~g}}<extra></extra>",
    }  # fmt: skip
    bounds = row["score_ci95"]
    if not bounds or not all(wording.is_number(bound) for bound in bounds):
        return [across]
    low, high = bounds
    shade: Figure = {
        "type": "scatter", "mode": "lines", "x": [ends[0], ends[1], ends[1], ends[0]], "y": [low, low, high, high],
        "fill": "toself", "fillcolor": color, "opacity": 0.1, "line": {"width": 0}, "hoverinfo": "skip",
        "legendgroup": group,
    }  # fmt: skip
    return [shade, across]


def _index(trace: Figure) -> int:
    return int(trace["legendgroup"].removeprefix("series-"))


def _padded(values: Sequence[float | None], share: float) -> list[float]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(known), max(known)
    room = share * (high - low) or max(abs(high), 1.0) * 0.1
    return [low - room, high + room]

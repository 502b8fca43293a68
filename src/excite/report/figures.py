"""The Plotly figures of a comparison, as plain data for ``templates/page.js`` to draw.

A figure names its colours as variables of the page's style sheet (``--series-1``), which the page resolves when it
draws, so that the charts follow the light and dark scheme. Names and hover texts are escaped, since Plotly reads
them as a kind of HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from excite.report import wording

Figure = dict[str, Any]
Curves = Mapping[str, Sequence[Mapping[str, Sequence[float | None]]]]

# One marker a network, since twelve colours cannot be told apart by everyone: Plotly's name, and the same shape as
# a path in a 12 × 12 box for the swatches in the tables. The colours are --series-0 … --series-11 of page.css.
SYMBOLS = (
    ("circle", "M6 1.2a4.8 4.8 0 1 0 0 9.6a4.8 4.8 0 1 0 0-9.6z"),
    ("diamond", "M6 .4 11.6 6 6 11.6.4 6z"),
    ("square", "M1.6 1.6h8.8v8.8H1.6z"),
    ("triangle-up", "M6 .8 11.4 10.4H.6z"),
    ("cross", "M4 .8h4V4h3.2v4H8v3.2H4V8H.8V4H4z"),
    ("triangle-down", "M6 11.2.6 1.6h10.8z"),
    ("x", "M3.2.6 6 3.4 8.8.6 11.4 3.2 8.6 6l2.8 2.8-2.6 2.6L6 8.6l-2.8 2.8L.6 8.8 3.4 6 .6 3.2z"),
    ("pentagon", "M6 .8 11.4 4.7 9.3 11H2.7L.6 4.7z"),
    ("hexagon", "M6 .4 10.9 3.2v5.6L6 11.6 1.1 8.8V3.2z"),
    ("star", "M6 .2 7.7 4.2l4.1.4-3.1 2.8.9 4.2L6 9.4l-3.6 2.2.9-4.2L.2 4.6l4.1-.4z"),
    ("bowtie", "M.8 1.6 11.2 10.4V1.6L.8 10.4z"),
    ("hourglass", "M1.6.8h8.8L1.6 11.2h8.8z"),
)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
COST_AXES = {
    "latency": ("latency_ms", "Latency, batch of 1 (ms)", 1.0),
    "macs": ("macs", "Multiply–adds (millions)", 1e6),
}


def curve_figures(result: dict[str, Any], curves: Curves) -> list[dict[str, Any]]:
    """One figure a series: the mean over the seeds as a line, each seed as a faint one behind it."""
    names = dict.fromkeys(name for seeds in curves.values() for seed in seeds for name in seed)
    figures: list[dict[str, Any]] = []
    for name in names:
        if name in ("epoch", "step"):
            continue
        faint, strong, values, last = [], [], [], []
        for index, entry in enumerate(result["results"]):
            points = [_points(seed, name) for seed in curves.get(entry["spec"], []) if name in seed]
            points = [seed for seed in points if seed]
            if not points:
                continue
            shared = sorted(set.intersection(*(set(seed) for seed in points)))
            means = [sum(seed[epoch] for seed in points) / len(points) for epoch in shared]
            values += [value for seed in points for value in seed.values()]
            if len(points) > 1:
                faint.append(_seed_lines(index, points))
            strong.append(_mean_line(index, entry, shared, means))
            if means:
                last.append(f"{entry['spec']} {wording.significant(means[-1], 4)}")
        if not strong:
            continue
        title = _series_title(name, result["metric"])
        layout = plain_layout("Epoch")
        layout["hovermode"] = "x unified"
        layout["xaxis"]["unifiedhovertitle"] = {"text": "Epoch %{x}"}
        if min(values) > 0 and max(values) > 30 * min(values):  # a loss that falls by decades
            layout["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "power"}
        figures.append(
            {
                "id": f"curve-{len(figures)}",
                "title": title,
                "spoken": f"{title} by epoch. Mean at the last epoch: {', '.join(last)}.",
                "plot": {"data": faint + strong, "layout": layout},
            }
        )
    return figures


def _points(seed: Mapping[str, Sequence[float | None]], name: str) -> dict[float, float]:
    """Epoch → value, without the values that are missing or not finite."""
    epochs = seed.get("epoch") or range(len(seed[name]))
    points = {}
    for epoch, value in zip(epochs, seed[name], strict=False):
        if epoch is not None and value is not None and math.isfinite(value):
            points[epoch] = value
    return points


def _seed_lines(index: int, points: list[dict[float, float]]) -> Figure:
    """All seeds of one network as one trace, with a gap between them."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for seed in points:
        xs += [*seed, None]
        ys += [short(value) for value in seed.values()] + [None]
    return {
        "type": "scatter", "mode": "lines", "x": xs, "y": ys, "opacity": 0.28, "hoverinfo": "skip",
        "legendgroup": f"series-{index}", "line": {"color": _color(index), "width": 1},
    }  # fmt: skip


def _mean_line(index: int, entry: dict[str, Any], epochs: list[float], means: list[float]) -> Figure:
    return {
        "type": "scatter", "x": epochs, "y": [short(value) for value in means], "name": html.escape(entry["spec"]),
        "mode": "lines" if len(epochs) > 1 else "markers", "legendgroup": f"series-{index}",
        "line": {"color": _color(index), "width": 2.25, "dash": _dash(index)},
        "marker": {"color": _color(index), "symbol": _symbol(index), "size": 9},
        "hovertemplate": "%{y:.4~g}",
    }  # fmt: skip


def _series_title(name: str, metric: dict[str, Any]) -> str:
    """``val_score`` as ``Validation top-1 accuracy (%)``."""
    part, _, rest = name.partition("_")
    where = {"train": "Training", "val": "Validation", "test": "Test"}.get(part)
    words = rest if where and rest else name
    if words in ("score", metric["name"]):
        words = _score_title(metric)
    words = words.replace("_", " ")
    return f"{where} {words}" if where and rest else wording.capital(words)


def _score_title(metric: dict[str, Any]) -> str:
    return wording.metric_name(metric["name"]) + (f" ({metric['unit']})" if metric["unit"] else "")


def cost_figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Score against cost: one figure for each kind of cost, a point with its interval and its seeds a network.

    None for a lone network, which has nothing to stand against.
    """
    metric = result["metric"]
    figures: list[dict[str, Any]] = []
    for name, (key, title, unit) in COST_AXES.items():
        entries = [
            (index, entry)
            for index, entry in enumerate(result["results"])
            if wording.is_number(entry[key]) and wording.is_number(entry["score"])
        ]
        if len(entries) < 2:
            continue
        xs = [entry[key] / unit for _, entry in entries]
        layout = plain_layout(title)
        layout["hovermode"] = "closest"
        if min(xs) > 0 and max(xs) > 20 * min(xs):
            layout["xaxis"] |= {"type": "log", "dtick": "D2", "minorloglabels": "complete"}
            layout["xaxis"]["range"] = _padded([math.log10(x) for x in xs], 0.14)
        else:
            layout["xaxis"]["range"] = _padded(xs, 0.14)
        ys = [y for _, entry in entries for y in _extent(entry)]
        layout["yaxis"]["range"] = _padded(ys, 0.08)
        seeds = [_seed_dots(index, entry, entry[key] / unit) for index, entry in entries]
        means = [_cost_point(index, entry, entry[key] / unit, result) for index, entry in entries]
        spoken = "; ".join(
            f"{entry['spec']} {wording.fixed(entry['score'], wording.decimals(metric['unit']))} at "
            f"{wording.significant(entry[key] / unit)}"
            for _, entry in entries
        )
        figures.append(
            {
                "id": f"cost-{name}",
                "label": {"latency": "Latency", "macs": "MACs"}[name],
                "spoken": f"{wording.capital(_score_title(metric))} against {title}: {spoken}.",
                "plot": {"data": seeds + means, "layout": layout},
            }
        )
    return figures


def _extent(entry: dict[str, Any]) -> list[float]:
    values = [entry["score"], *entry["scores"], *(entry["score_ci95"] or [])]
    return [value for value in values if wording.is_number(value)]


def _seed_dots(index: int, entry: dict[str, Any], x: float) -> Figure:
    scores = [score for score in entry["scores"] if wording.is_number(score)]
    return {
        "type": "scatter", "mode": "markers", "x": [x] * len(scores), "y": scores, "hoverinfo": "skip",
        "legendgroup": f"series-{index}", "opacity": 0.4,
        "marker": {"color": _color(index), "size": 5, "symbol": "circle"},
    }  # fmt: skip


def _cost_point(index: int, entry: dict[str, Any], x: float, result: dict[str, Any]) -> Figure:
    metric = result["metric"]
    places = wording.decimals(metric["unit"])
    score = f"{wording.metric_name(metric['name'])} {wording.fixed(entry['score'], places)} {metric['unit']}"
    bounds = entry["score_ci95"]
    interval = wording.interval(bounds, places)
    lines = [
        f"<b>{html.escape(entry['spec'])}</b>",
        html.escape(score.rstrip()),
        *([f"95 % interval {interval}"] if interval else []),
        f"{wording.milliseconds(entry['latency_ms'])} · {wording.magnitude(entry['macs'])} MACs · "
        f"{wording.magnitude(entry['parameters'])} parameters",
    ]
    point: Figure = {
        "type": "scatter", "mode": "markers+text", "x": [x], "y": [entry["score"]],
        "name": html.escape(entry["spec"]), "legendgroup": f"series-{index}",
        "text": [html.escape(_ellipsis(entry["spec"]))],
        "textposition": "middle right", "textfont": {"color": "--ink", "size": 13}, "cliponaxis": False,
        "marker": {
            "color": _color(index), "size": 13, "symbol": _symbol(index), "line": {"color": "--card", "width": 1.5}
        },
        "customdata": ["<br>".join(lines)], "hovertemplate": "%{customdata}<extra></extra>",
    }  # fmt: skip
    if interval:
        point["error_y"] = {
            "type": "data", "symmetric": False, "array": [bounds[1] - entry["score"]],
            "arrayminus": [entry["score"] - bounds[0]], "color": _color(index), "thickness": 1.5, "width": 5,
        }  # fmt: skip
    return point


def _padded(values: Sequence[float], share: float) -> list[float]:
    low, high = min(values), max(values)
    room = share * (high - low) or max(abs(high), 1.0) * 0.1
    return [low - room, high + room]


def plain_layout(x_title: str) -> Figure:
    """What the charts of all pages have in common: a quiet grid, no legend, room for the tick labels."""
    axis: Figure = {
        "gridcolor": "--grid", "linecolor": "--line", "zeroline": False, "showline": False, "ticks": "",
        "tickfont": {"color": "--soft", "size": 12}, "fixedrange": False, "automargin": False,
    }  # fmt: skip

    x_title_style = {"text": x_title, "font": {"color": "--soft", "size": 12.5}, "standoff": 10}
    return {
        "xaxis": axis | {"title": x_title_style, "showgrid": False, "showline": True},
        "yaxis": axis | {"tickformat": "~g", "ticklabelstandoff": 5},
        "margin": {"l": 46, "r": 14, "t": 10, "b": 44},
        "paper_bgcolor": "--card", "plot_bgcolor": "--card", "showlegend": False,
        "hoverlabel": {
            "bgcolor": "--raised", "bordercolor": "--line", "align": "left", "font": {"color": "--ink", "size": 13}
        },
    }  # fmt: skip


def _color(index: int) -> str:
    return f"--series-{index % len(SYMBOLS)}"


def _symbol(index: int) -> str:
    return SYMBOLS[index % len(SYMBOLS)][0]


def _dash(index: int) -> str:
    """Solid for the first five, whose colours everyone can tell apart; then a dash of their own."""
    return "solid" if index < 5 else DASHES[1 + (index - 5) % (len(DASHES) - 1)]


def _ellipsis(spec: str, most: int = 30) -> str:
    return spec if len(spec) <= most else f"{spec[: most // 2]}…{spec[-(most // 2 - 1) :]}"


def short(value: float) -> float:
    """Five significant digits: all a chart can show, at half the size on disk."""
    return float(f"{value:.5g}")


def finite(value: Any) -> Any:
    """The same value with ``None`` for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

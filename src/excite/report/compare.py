"""The page of a comparison: one self-contained HTML file that opens from disk.

The interval plot and the tables are plain HTML and SVG, readable without JavaScript; the training curves and
the cost scatter are Plotly figures, described here as data and drawn by ``templates/page.js``. A figure names its
colours as CSS variables (``--series-1``), which the page resolves, so that charts follow the light and dark scheme.
"""

from __future__ import annotations

import functools
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

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


def compare_page(result: dict[str, Any], curves: Curves) -> str:
    """The whole page as HTML text.

    Args:
        result: the content of ``compare.json``.
        curves: for each spec one mapping a seed, from a series' name (``train_loss``, ``val_score``, …) to its values,
            beside ``epoch``; a value that is missing or not finite leaves a gap.
    """
    curve_figures = _curve_figures(result, curves)
    cost_figures = _cost_figures(result)
    figures = {figure["id"]: figure["plot"] for figure in [*curve_figures, *cost_figures]}
    scale = _scale(result)
    return _templates().get_template("compare.html").render(
        result=result,
        title=_title(result),
        heading=_unbroken(result["verdict"] or _title(result)),
        name_capital=wording.capital(wording.metric_name(result["metric"]["name"])),
        facts=_facts(result),
        difference_unit=wording.difference_unit(result["metric"]["unit"]),
        compares=_compares(result),
        scale=scale,
        rows=[_row(index, result, scale) for index in range(len(result["results"]))],
        cost_rows=_cost_rows(result),
        has_control=any(entry["role"] == "control" for entry in result["results"]),
        contenders=sum(entry["role"] != "baseline" for entry in result["results"]),
        runs=_runs(result),
        recipe=_settings(result["recipe"]),
        curve_figures=curve_figures,
        cost_figures=cost_figures,
        figures=_finite(figures),
        plotly_js=_plotly_js() if figures else "",
    )


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("excite.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["symbols"] = [path for _, path in SYMBOLS]
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(spec: str) -> Markup:
    """A long spec that may be broken after its separators rather than within a word."""
    return Markup("<wbr>").join(re.split(r"(?<=[:,+/])", spec))


@functools.cache
def _plotly_js() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def _compares(result: dict[str, Any]) -> bool:
    """Whether there is a difference to show; a lone network shows its score instead."""
    return any(entry["difference"] is not None and entry["role"] != "baseline" for entry in result["results"])


def _title(result: dict[str, Any]) -> str:
    specs = [entry["spec"] for entry in result["results"]]
    named = ", ".join(specs) if len(specs) <= 3 else f"{len(specs)} networks"
    return f"{named} on {result['data']}"


def _unbroken(text: str) -> str:
    """The sentence with every number kept on one line with its percent sign."""
    return text.replace(" %", "\u00a0%")


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    seeds = result["seeds"]
    facts = [
        ("Data", result["data"]),
        ("Networks", str(len(result["results"]))),
        ("Seeds", f"{len(seeds)}" + (f" ({', '.join(map(str, seeds))})" if len(seeds) <= 5 else "")),
    ]
    counts = (("Epochs", result["epochs"]), ("Test images", result["images"]))
    return facts + [(name, f"{count:,}") for name, count in counts if count is not None]


# ---------------------------------------------------------------------------------------- the interval plot


@dataclass(frozen=True)
class Scale:
    """The shared axis of the interval plot, in the metric's unit; ``at`` gives a position in percent of its width."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """Percent of the axis from its left end."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)


def _seed_values(entry: dict[str, Any], result: dict[str, Any]) -> list[tuple[Any, float]]:
    """What each seed says: its paired difference to the baseline, or its score where there is nothing to compare."""
    scores: list[float | None] = entry["scores"]
    if not _compares(result):
        pairs = list(zip(result["seeds"], scores, strict=False))
        return [(seed, score) for seed, score in pairs if score is not None and math.isfinite(score)]
    baseline = next((other for other in result["results"] if other["role"] == "baseline"), None)
    if baseline is None or entry is baseline or len(scores) != len(baseline["scores"]):
        return []
    return [
        (seed, score - reference)
        for seed, score, reference in zip(result["seeds"], scores, baseline["scores"], strict=False)
        if score is not None and reference is not None and math.isfinite(score - reference)
    ]


def _estimate(entry: dict[str, Any], result: dict[str, Any]) -> tuple[float | None, list[float] | None]:
    """The number and the interval that the plot shows for one network."""
    if _compares(result):
        value, bounds = entry["difference"], entry["difference_ci95"]
        if entry["role"] == "baseline":
            value, bounds = 0.0, None
    else:
        value, bounds = entry["score"], entry["score_ci95"]
    if bounds is not None and not all(math.isfinite(bound) for bound in bounds):
        bounds = None
    return (value if wording.is_number(value) else None), bounds


def _scale(result: dict[str, Any]) -> Scale:
    values: list[float] = [0.0] if _compares(result) else []
    for entry in result["results"]:
        value, bounds = _estimate(entry, result)
        values += [] if value is None else [value]
        values += bounds or []
        values += [value for _, value in _seed_values(entry, result)]
    values = values or [0.0]
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
    low, high = low - room, high + room
    if _compares(result):  # both sides of zero keep room for their label
        low, high = min(low, -0.25 * high), max(high, -0.25 * low)
    say = wording.signed if _compares(result) else wording.fixed
    steps = _ticks(low, high)
    places = max(0, -math.floor(math.log10(steps[1] - steps[0]) + 1e-9)) if len(steps) > 1 else 2
    return Scale(low, high, tuple((tick, say(tick, places)) for tick in steps))


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round positions (steps of 1, 2 or 5) strictly inside an axis."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _row(index: int, result: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """One network's row of the interval plot: positions in percent, and every figure as text."""
    entry, metric = result["results"][index], result["metric"]
    compares = _compares(result)
    places = wording.decimals(metric["unit"])
    value, bounds = _estimate(entry, result)
    say = wording.signed if compares else wording.fixed
    unit = wording.difference_unit(metric["unit"]) if compares else metric["unit"]
    is_baseline = entry["role"] == "baseline"
    found = wording.finding(entry, result)
    spoken = f"{entry['spec']}: "
    if compares and is_baseline:
        spoken += "the baseline, at zero"
    else:
        spoken += f"{'difference' if compares else wording.metric_name(metric['name'])} {say(value, places)} {unit}".rstrip()
        if bounds:
            spoken += f", 95 % interval {wording.interval(bounds, places, say)}"
        spoken += f"; {found}" if found else ""
    return {
        "index": index,
        "spec": entry["spec"],
        "role": entry["role"],
        "score": wording.fixed(entry["score"], places),
        "score_interval": wording.interval(entry["score_ci95"], places),
        "at": None if value is None else scale.at(value),
        "low": scale.at(bounds[0]) if bounds else None,
        "high": scale.at(bounds[1]) if bounds else None,
        "seeds": [
            {"at": scale.at(seed_value), "label": f"seed {seed}: {say(seed_value, places)} {unit}".rstrip()}
            for seed, seed_value in _seed_values(entry, result)
        ],
        "difference": "" if is_baseline or entry["difference"] is None else wording.signed(value, places),
        "difference_interval": "" if is_baseline else wording.interval(bounds, places, wording.signed),
        "finding": found,
        "p": wording.probability(entry["p_holm"]),
        "spoken": spoken,
    }


# ---------------------------------------------------------------------------------------- tables


def _cost_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every cost as text, each with its share of the column's largest for the bar beside it."""

    def cell(entry: dict[str, Any], key: str, text: str, note: str = "") -> dict[str, Any]:
        largest = max((other[key] for other in result["results"] if wording.is_number(other[key])), default=0) or 1
        share = round(100 * entry[key] / largest, 1) if wording.is_number(entry[key]) else 0
        return {"text": text, "note": note, "share": share}

    rows = []
    for index, entry in enumerate(result["results"]):
        ratio = ""
        if entry["role"] != "baseline" and wording.is_number(entry["latency_ratio"]):
            ratio = f"{wording.fixed(entry['latency_ratio'], 2)}×"
            bounds = wording.interval(entry["latency_ratio_ci95"], 2)
            ratio += f" ({bounds})" if bounds else ""
        cells = {
            "Parameters": cell(entry, "parameters", wording.magnitude(entry["parameters"])),
            "MACs": cell(entry, "macs", wording.magnitude(entry["macs"])),
            "Latency": cell(entry, "latency_ms", f"{wording.significant(entry['latency_ms'])} ms", ratio),
            "Throughput": cell(entry, "throughput", f"{wording.significant(entry['throughput'])} images/s"),
            "Training": cell(entry, "train_seconds", wording.duration(entry["train_seconds"])),
        }
        rows.append({"index": index, "spec": entry["spec"], "role": entry["role"], "cells": cells})
    return rows


def _runs(result: dict[str, Any]) -> list[dict[str, str]]:
    """One line a run: network, seed, score, folder."""
    places = wording.decimals(result["metric"]["unit"])
    rows = []
    for entry in result["results"]:
        for k in range(max(len(entry["scores"]), len(entry["runs"]))):
            rows.append(
                {
                    "spec": entry["spec"],
                    "seed": str(result["seeds"][k]) if k < len(result["seeds"]) else wording.MISSING,
                    "score": wording.fixed(entry["scores"][k], places) if k < len(entry["scores"]) else wording.MISSING,
                    "run": entry["runs"][k] if k < len(entry["runs"]) else wording.MISSING,
                }
            )
    return rows


def _settings(recipe: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A nested recipe as one group per top-level key, deeper keys joined by dots as ``--set`` takes them."""
    plain = [(key, _yaml(value)) for key, value in recipe.items() if not isinstance(value, Mapping)]
    groups = [("recipe", plain)] if plain else []
    groups += [(key, list(_flat(value))) for key, value in recipe.items() if isinstance(value, Mapping)]
    return [(name, settings) for name, settings in groups if settings]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _yaml(value)


def _yaml(value: Any) -> str:
    """A setting as it stands in the recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    return str(value)


# ---------------------------------------------------------------------------------------- figures


def _curve_figures(result: dict[str, Any], curves: Curves) -> list[dict[str, Any]]:
    """One figure a series: the mean over the seeds as a line, each seed as a faint one behind it."""
    names = dict.fromkeys(name for seeds in curves.values() for seed in seeds for name in seed)
    figures = []
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
        layout = _layout("Epoch")
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
    pairs = zip(epochs, seed[name], strict=False)
    return {epoch: value for epoch, value in pairs if epoch is not None and value is not None and math.isfinite(value)}


def _seed_lines(index: int, points: list[dict[float, float]]) -> Figure:
    """All seeds of one network as one trace, with a gap between them."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for seed in points:
        xs += [*seed, None]
        ys += [_short(value) for value in seed.values()] + [None]
    return {
        "type": "scatter", "mode": "lines", "x": xs, "y": ys, "opacity": 0.28, "hoverinfo": "skip",
        "legendgroup": f"series-{index}", "line": {"color": _color(index), "width": 1},
    }  # fmt: skip


def _mean_line(index: int, entry: dict[str, Any], epochs: list[float], means: list[float]) -> Figure:
    return {
        "type": "scatter", "x": epochs, "y": [_short(value) for value in means], "name": html.escape(entry["spec"]),
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


def _cost_figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Score against cost: one figure for each kind of cost, a point with its interval and its seeds a network.

    None for a lone network, which has nothing to stand against.
    """
    metric = result["metric"]
    figures = []
    for name, (key, title, unit) in COST_AXES.items():
        entries = [
            (index, entry)
            for index, entry in enumerate(result["results"])
            if wording.is_number(entry[key]) and wording.is_number(entry["score"])
        ]
        if len(entries) < 2:
            continue
        xs = [entry[key] / unit for _, entry in entries]
        layout = _layout(title)
        layout["hovermode"] = "closest"
        if min(xs) > 0 and max(xs) > 20 * min(xs):
            layout["xaxis"] |= {"type": "log", "dtick": "D2", "range": _padded([math.log10(x) for x in xs], 0.14)}
        else:
            layout["xaxis"]["range"] = _padded(xs, 0.14)
        ys = [y for _, entry in entries for y in _extent(entry)]
        layout["yaxis"]["range"] = _padded(ys, 0.08)
        seeds = [_seed_dots(index, entry, entry[key] / unit) for index, entry in entries]
        means = [_cost_point(index, entry, entry[key] / unit, name, result) for index, entry in entries]
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


def _cost_point(index: int, entry: dict[str, Any], x: float, name: str, result: dict[str, Any]) -> Figure:
    unit = result["metric"]["unit"]
    places = wording.decimals(unit)
    suffix = f" {unit}" if unit else ""
    bounds = entry["score_ci95"]
    interval = wording.interval(bounds, places)
    lines = [
        f"<b>{html.escape(entry['spec'])}</b>",
        html.escape(f"{wording.metric_name(result['metric']['name'])} {wording.fixed(entry['score'], places)}{suffix}"),
        *([f"95 % interval {interval}"] if interval else []),
        f"{wording.significant(entry['latency_ms'])} ms · {wording.magnitude(entry['macs'])} MACs · "
        f"{wording.magnitude(entry['parameters'])} parameters",
    ]
    point: Figure = {
        "type": "scatter", "mode": "markers+text", "x": [x], "y": [entry["score"]], "name": html.escape(entry["spec"]),
        "legendgroup": f"series-{index}", "text": [html.escape(_ellipsis(entry["spec"]))],
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


def _layout(x_title: str) -> Figure:
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


def _short(value: float) -> float:
    """Five significant digits: all a chart can show, at half the size on disk."""
    return float(f"{value:.5g}")


def _finite(value: Any) -> Any:
    """The same value with ``None`` for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

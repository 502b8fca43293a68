"""The page of a comparison: one self-contained HTML file that opens from disk.

The interval plot and the tables are plain HTML and SVG, readable without JavaScript; the training curves and the
cost scatter are Plotly figures (``figures.py``).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excite.report import figures, wording
from excite.report.figures import Curves
from excite.report.page import plotly_js, settings, templates, unbroken


def compare_page(result: dict[str, Any], curves: Curves) -> str:
    """The whole page as HTML text.

    Args:
        result: the content of ``compare.json``.
        curves: for each spec one mapping a seed: ``epoch``, and beside it any series by name (``train_loss``,
            ``val_score``, …); a value that is missing or not finite leaves a gap.
    """
    curve_figures = figures.curve_figures(result, curves)
    cost_figures = figures.cost_figures(result)
    plots = {figure["id"]: figure["plot"] for figure in [*curve_figures, *cost_figures]}
    scale = _scale(result)
    template = templates().get_template("compare.html")
    return template.render(
        result=result,
        title=_title(result),
        heading=unbroken(result["verdict"] or _title(result)),
        name_capital=wording.capital(wording.metric_name(result["metric"]["name"])),
        facts=_facts(result),
        difference_unit=wording.difference_unit(result["metric"]["unit"]),
        compares=wording.compares(result),
        units="blocks" if result["blocks"] else result["samples"],
        scale=scale,
        rows=[_row(index, result, scale) for index in range(len(result["results"]))],
        cost_rows=_cost_rows(result),
        metric_names=[wording.capital(wording.metric_name(name)) for name in result["results"][0]["metrics"]],
        metric_rows=_metric_rows(result),
        has_starts=wording.has_starts(result),
        has_control=any(entry["role"] == "control" for entry in result["results"]),
        contenders=sum(entry["role"] != "baseline" for entry in result["results"]),
        runs=_runs(result),
        recipe=settings(result["recipe"]),
        curve_figures=curve_figures,
        cost_figures=cost_figures,
        figures=figures.finite(plots),
        plotly_js=plotly_js() if plots else "",
    )


def _title(result: dict[str, Any]) -> str:
    specs = [entry["spec"] for entry in result["results"]]
    named = ", ".join(specs) if len(specs) <= 3 else f"{len(specs)} networks"
    return f"{named} on {result['data']}"


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    seeds = result["seeds"]
    facts = [
        ("Data", result["data"]),
        ("Networks", str(len(result["results"]))),
        ("Seeds", f"{len(seeds)}" + (f" ({', '.join(map(str, seeds))})" if len(seeds) <= 5 else "")),
    ]
    if wording.has_starts(result) and result["weights"]:
        facts.append(("Weights", Path(result["weights"]).name))
    counts = (("Epochs", result["epochs"]), (f"Test {result['samples']}", result["count"]))
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
    if not wording.compares(result):
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
    if wording.compares(result):
        value, bounds = entry["difference"], entry["difference_ci95"]
        if entry["role"] == "baseline":
            value, bounds = 0.0, None
    else:
        value, bounds = entry["score"], entry["score_ci95"]
    if bounds is not None and not all(math.isfinite(bound) for bound in bounds):
        bounds = None
    return (value if wording.is_number(value) else None), bounds


def _scale(result: dict[str, Any]) -> Scale:
    values: list[float] = [0.0] if wording.compares(result) else []
    for entry in result["results"]:
        value, bounds = _estimate(entry, result)
        values += [] if value is None else [value]
        values += bounds or []
        values += [value for _, value in _seed_values(entry, result)]
    values = values or [0.0]
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
    low, high = low - room, high + room
    if wording.compares(result):  # both sides of zero keep room for their label
        low, high = min(low, -0.25 * high), max(high, -0.25 * low)
    say = wording.signed if wording.compares(result) else wording.fixed
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
    compares = wording.compares(result)
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
        what = "difference" if compares else wording.metric_name(metric["name"])
        spoken += f"{what} {say(value, places)} {unit}".rstrip()
        if bounds:
            spoken += f", 95 % interval {wording.interval(bounds, places, say)}"
        spoken += f"; {found}" if found else ""
    return {
        "index": index,
        "spec": entry["spec"],
        "role": entry["role"],
        "start": wording.fixed(entry["start_score"], places),
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
            "Latency": cell(entry, "latency_ms", wording.milliseconds(entry["latency_ms"]), ratio),
            "Images/s": cell(entry, "throughput", wording.significant(entry["throughput"])),
            "Training": cell(entry, "train_seconds", wording.duration(entry["train_seconds"])),
        }
        rows.append({"index": index, "spec": entry["spec"], "role": entry["role"], "cells": cells})
    return rows


def _metric_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean and deviation of every metric as text, one row a network."""
    return [
        {"spec": entry["spec"], "said": [wording.spread(name, **found) for name, found in entry["metrics"].items()]}
        for entry in result["results"]
    ]


def _runs(result: dict[str, Any]) -> list[dict[str, str]]:
    """One line a run: network, seed, score at the start and at the end, folder."""
    places = wording.decimals(result["metric"]["unit"])
    rows = []
    for entry in result["results"]:
        scores = [wording.fixed(score, places) for score in entry["scores"]]
        starts = [wording.fixed(score, places) for score in entry["start_scores"] or []]
        seeds = [str(seed) for seed in result["seeds"]]
        columns = itertools.zip_longest(seeds, starts, scores, entry["runs"], fillvalue=wording.MISSING)
        for seed, start, score, run in columns:
            rows.append({"spec": entry["spec"], "seed": seed, "start": start, "score": score, "run": run})
    return rows

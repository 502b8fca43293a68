"""The bar charts of the timings, one for each group, as plain data for ``templates/page.js`` to draw."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from excite.report import wording
from excite.report.bench_table import ALLOCATORS, lines_of
from excite.report.figures import SYMBOLS, Figure, plain_layout, short

FAINT = 0.45
"""The opacity of the bars of the first of two allocator settings."""


def bench_figures(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A figure for each group that has times: milliseconds of a call by mode, a bar for each network.

    Args:
        result: the content of ``bench.json``.

    Returns:
        Dictionaries with ``id``, ``label`` (of the switch), ``spoken`` and ``plot``.
    """
    specs = list(result["networks"])
    several = len({tuple(lines) for lines in map(_specs_of, _groups(result).values()) if lines}) > 1
    found = []
    for index, lines in _groups(result).items():
        group = result["groups"][index]
        ways = list(dict.fromkeys(line["way"] for line in lines))
        traces = [
            _bars(specs.index(spec), spec, allocator, lines, result["settings"]["allocator"])
            for spec in _specs_of(lines)[::-1]  # plotly draws the first at the bottom
            for allocator in result["settings"]["allocator"][::-1]
        ]
        layout = plain_layout("Milliseconds of a call")
        layout["xaxis"] |= {"showgrid": True, "rangemode": "tozero"}
        # Read from the top: plotly counts categories upwards.
        layout["yaxis"] |= {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": ways[::-1],
            "automargin": True,
        }
        layout["yaxis"].pop("tickformat", None)
        layout |= {"barmode": "group", "bargap": 0.28, "bargroupgap": 0.06, "hovermode": "closest"}
        said = [f"{line['spec']} by {line['way']} {_milliseconds(line['row'])}" for line in lines]
        label = group["title"].replace("Inference, ", "").replace("Training step", "training")
        found.append(
            {
                "id": f"bars-{index}",
                "label": f"{_specs_of(lines)[0]}: {label}" if several else label,
                "spoken": f"{group['title']}: {'; '.join(said)}.",
                "rows": len(lines) * len(result["settings"]["allocator"]),
                "plot": {"data": traces, "layout": layout},
            }
        )
    return found


def _groups(result: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    found = {index: lines_of(result, index) for index in range(len(result["groups"]))}
    return {index: lines for index, lines in found.items() if lines}


def _specs_of(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["spec"] for line in lines))


def _bars(
    index: int, spec: str, allocator: str, lines: Sequence[Mapping[str, Any]], allocators: Sequence[str]
) -> Figure:
    """One network under one allocator setting, a bar for each way of running it."""
    rows = [
        (line["way"], line["allocators"][allocator])
        for line in lines
        if line["spec"] == spec and allocator in line["allocators"]
    ]
    color = f"--series-{index % len(SYMBOLS)}"
    milliseconds = [1000 * row["seconds"] for _, row in rows]
    bounds = [[1000 * bound for bound in row["seconds_ci95"]] for _, row in rows]
    pairs = list(zip(milliseconds, bounds, strict=True))
    setting = f", {ALLOCATORS[allocator]}" if len(allocators) > 1 else ""
    return {
        "type": "bar", "orientation": "h", "name": html.escape(f"{spec}{setting}"), "legendgroup": f"series-{index}",
        "offsetgroup": f"{index}-{allocator}", "y": [way for way, _ in rows],
        "x": [short(one) for one in milliseconds],
        "marker": {"color": color, "opacity": FAINT if allocator != allocators[-1] else 1.0},
        "error_x": {
            "type": "data", "symmetric": False, "color": "--ink", "thickness": 1.2, "width": 2.5,
            "array": [short(high - one) for one, (_, high) in pairs],
            "arrayminus": [short(one - low) for one, (low, _) in pairs],
        },
        "customdata": [_hover(spec, setting, way, row) for way, row in rows],
        "hovertemplate": "%{customdata}<extra></extra>",
    }  # fmt: skip


def _hover(spec: str, setting: str, way: str, row: Mapping[str, Any]) -> str:
    lines = [f"<b>{html.escape(spec)}</b> by {html.escape(way)}{setting}", _milliseconds(row)]
    lines.append(f"{wording.significant(row['images_per_second'])} images a second")
    if row["host_ratio"]:
        lines.append(f"{row['host_ratio']['value']:.3f}× its host")
    return "<br>".join(lines)


def _milliseconds(row: Mapping[str, Any]) -> str:
    low, high = (wording.significant(1000 * bound) for bound in row["seconds_ci95"])
    return f"{wording.milliseconds(1000 * row['seconds'])} ({low} to {high})"

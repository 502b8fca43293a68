"""The Plotly figures of an explanation, as plain data for ``templates/page.js`` to draw: everything by depth.

Colours are named, and names escaped, as in ``figures.py``. The figures of a chosen unit are made by
``templates/explain.js``; their axes are laid out here.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from excite.report import wording
from excite.report.explain_data import labels, padded, scale_name, steps
from excite.report.figures import Figure, plain_layout, short


def depth_figures(result: Mapping[str, Any]) -> list[Figure]:
    """What the class explains, the spread of the gates, their saturation, and channels that hardly move, by depth."""
    if not result["excitation"]:
        return []
    entries = result["excitation"]["units"]
    units = [result["units"][entry["unit"]] for entry in entries]
    x = _labels(result, entries)
    names = [f"<b>{_text(unit['name'])}</b>" for unit in units]

    def series(key: str, of: float, say: Any, sentence: str) -> tuple[list[float | None], list[str]]:
        values = [entry[key] for entry in entries]
        ys = [short(of * value) if wording.is_number(value) else None for value in values]
        return ys, [f"{name}<br>{sentence.format(say(value))}" for name, value in zip(names, values, strict=True)]

    share = series("class_share", 100, wording.percent, "The class explains {} of the variance")
    between = series("between", 1, _three, "{} between the classes’ means")
    within = series("within", 1, _three, "{} within a class")
    low = series("low", 100, wording.percent, "{} of the gates near their lowest value")
    high = series("high", 100, wording.percent, "{} of the gates near their highest value")
    constant = series("constant", 100, wording.percent, "{} of the channels hardly move")
    ends = [f"{end:g}".replace("-", wording.MINUS) for end in entries[0]["range"]]
    return [
        _figure(
            result, entries, "share", "What the class explains", "%",
            "Share of the gates’ variance that lies between the classes. At 0\u00a0% a unit does the same for all.",
            [("Class share", "--series-1", _bars(x, share, "--series-1"))],
        ),
        _figure(
            result, entries, "spread", "How far a gate strays", "",
            "Standard deviation between the classes’ mean gates, and among images of one class.",
            [
                ("between classes", "--series-1", _line(x, between, "--series-1", "circle")),
                ("within a class", "--series-0", _line(x, within, "--series-0", "diamond")),
            ],
        ),
        _figure(
            result, entries, "saturation", "Saturation", "%",
            f"Share of the gates within 0.05 of an end of their range: shut near {ends[0]}, open near {ends[1]}.",
            [
                ("shut", "--series-3", _bars(x, low, "--series-3")),
                ("open", "--series-4", _bars(x, high, "--series-4")),
            ],
        ),
        _figure(
            result, entries, "constant", "Channels that hardly move", "%",
            "Share of the channels whose gate strays by less than 0.01 over all images: a constant would do.",
            [("Constant", "--series-2", _bars(x, constant, "--series-2"))],
        ),
    ]  # fmt: skip


def scale_figures(result: Mapping[str, Any]) -> list[Figure]:
    """Attention to the large kernel minus the small by depth: one line a scale, and its rise with an interval."""
    if not result["selection"]:
        return []
    found = result["selection"]
    entries, scales = found["units"], [scale_name(scale) for scale in found["scales"]]
    x = _labels(result, entries)
    lines = []
    for place, (scale, step) in enumerate(zip(scales, steps(len(scales)), strict=True)):
        values = [entry["overall"][place] for entry in entries]
        hover = [
            f"<b>{_text(result['units'][entry['unit']]['name'])}</b><br>{scale}: {_signed(value)} "
            f"({_text(entry['large'])} − {_text(entry['small'])})"
            for entry, value in zip(entries, values, strict=True)
        ]
        ys = [short(value) if wording.is_number(value) else None for value in values]
        line = _line(x, (ys, hover), f"--step-{step}", "circle", 6 + 6 * place / max(1, len(scales) - 1))
        lines.append((scale, f"--step-{step}", line | {"legendgroup": f"scale-{place}"}))
    figures = [
        _figure(
            result, entries, "scales", "Attention by depth", "",
            "Mean over images and channels: attention to the larger kernel minus attention to the smaller one. "
            "Above zero the larger one has the upper hand.", lines,
        )
    ]  # fmt: skip
    if len(scales) > 1:
        figures.append(
            _figure(
                result, entries, "rise", f"Rise from {scales[0]} to {scales[-1]}", "",
                "How much further the attention goes to the larger kernel, with its 95\u00a0% interval over images. "
                "An interval that crosses zero shows no rise.", [("Rise", "--series-1", _rises(result, entries, x))],
            )
        )  # fmt: skip
    for figure in figures:
        figure["plot"]["layout"]["yaxis"] |= {"zeroline": True, "zerolinecolor": "--faint", "zerolinewidth": 1.5}
        figure["plot"]["layout"]["margin"]["l"] = 54
        figure["plot"]["layout"].pop("barmode", None)
        values = [value for trace in figure["plot"]["data"] for value in _reach(trace)]
        figure["plot"]["layout"]["yaxis"]["range"] = padded([0.0, *values], 0.08)
    return figures


def chosen_layouts() -> dict[str, Figure]:
    """The layouts of the charts of a chosen unit, which the page's script fills."""
    gates = plain_layout("Channel")
    gates |= {"hovermode": "x unified", "margin": {"l": 46, "r": 14, "t": 30, "b": 48}}
    gates["xaxis"] |= {"type": "category", "tickangle": 0}
    gates["annotations"] = [
        {
            "xref": "paper", "yref": "paper", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "xshift": -40,
            "yshift": 8, "showarrow": False, "text": "", "font": {"color": "--soft", "size": 12.5},
        }
    ]  # fmt: skip
    classes = plain_layout("Attention to the larger kernel minus the smaller")
    classes |= {"hovermode": "closest", "margin": {"l": 10, "r": 18, "t": 6, "b": 50}}
    classes["xaxis"] |= {
        "showgrid": True, "showline": False, "zeroline": True, "zerolinecolor": "--faint", "zerolinewidth": 1.5,
        "tickformat": "~g",
    }  # fmt: skip
    classes["yaxis"] = {
        "type": "category", "automargin": True, "showgrid": False, "zeroline": False, "ticks": "", "fixedrange": True,
        "tickfont": {"color": "--ink", "size": 13}, "ticklabelstandoff": 8,
    }  # fmt: skip
    return {"gates": gates, "classes": classes}


# ---------------------------------------------------------------------------------------- parts


def _figure(
    result: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    name: str,
    title: str,
    unit: str,
    how: str,
    traces: Sequence[tuple[str, str, Figure]],
) -> Figure:
    """One chart by depth.

    Args:
        result: of the explanation.
        entries: of its units, those on the horizontal axis.
        name: of the figure on the page.
        title: what stands above it.
        unit: of the vertical axis: ``%``, which starts at zero, or nothing.
        how: how to read it.
        traces: name, colour and trace; where there are several, they are named above the chart.
    """
    layout = plain_layout("Unit, by depth")
    layout |= {"hovermode": "closest", "barmode": "stack", "bargap": 0.32}
    layout["xaxis"] |= {"type": "category", "tickangle": 0, "range": [-0.6, len(entries) - 0.4]}
    layout["margin"] |= {"l": 50, "t": 26}
    layout["yaxis"] |= {"ticksuffix": f"\u00a0{unit}" if unit else ""} | (
        {"range": [0, 100], "nticks": 6} if unit else {"rangemode": "tozero"}
    )
    layout["shapes"], layout["annotations"] = _stages([result["units"][entry["unit"]] for entry in entries])
    said = []
    if unit and not any(value for _, _, trace in traces for value in trace["y"]):
        layout["annotations"].append(
            {
                "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False, "text": "none at all",
                "font": {"color": "--soft", "size": 13},
            }
        )  # fmt: skip
    for label, _, trace in traces:
        known = [value for value in trace["y"] if value is not None]
        if known:
            first, last = wording.significant(known[0]), wording.significant(known[-1])
            said.append(f"{label} {first}{unit} in the first unit, {last}{unit} in the last")
    return {
        "id": name, "title": title, "how": how, "spoken": f"{title} by depth: {'; '.join(said)}.",
        "key": [(label, colour, trace["type"]) for label, colour, trace in traces] if len(traces) > 1 else [],
        "plot": {"data": [trace for _, _, trace in traces], "layout": layout},
    }  # fmt: skip


def _stages(units: Sequence[Mapping[str, Any]]) -> tuple[list[Figure], list[Figure]]:
    """A line between stages, and their names above; nothing where there are none, or so many that names collide."""
    stages = [unit["stage"] for unit in units]
    groups = [(stage, len(list(group))) for stage, group in itertools.groupby(stages)]
    if None in stages or not 1 < len(groups) <= 6 or len(groups) == len(units):
        return [], []
    shapes, names, start = [], [], 0
    for stage, count in groups:
        if start:
            shapes.append(
                {
                    "type": "line", "xref": "x", "yref": "paper", "x0": start - 0.5, "x1": start - 0.5,
                    "y0": 0, "y1": 1, "line": {"color": "--line", "width": 1}, "layer": "below",
                }
            )  # fmt: skip
        names.append(
            {
                "xref": "x", "yref": "paper", "x": start + (count - 1) / 2, "y": 1, "yanchor": "bottom",
                "showarrow": False, "text": f"stage {_text(stage)}" if start == 0 else _text(stage), "yshift": 4,
                "font": {"color": "--soft", "size": 12},
            }
        )  # fmt: skip
        start += count
    return shapes, names


def _labels(result: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    names = labels(result["units"])
    return [_text(names[entry["unit"]]) for entry in entries]


def _bars(x: Sequence[str], series: tuple[list[float | None], list[str]], color: str) -> Figure:
    return {
        "type": "bar", "x": x, "y": series[0], "customdata": series[1],
        "hovertemplate": "%{customdata}<extra></extra>", "marker": {"color": color, "cornerradius": 3},
    }  # fmt: skip


def _line(
    x: Sequence[str], series: tuple[list[float | None], list[str]], color: str, symbol: str, size: float = 8
) -> Figure:
    return {
        "type": "scatter", "mode": "lines+markers", "x": x, "y": series[0], "customdata": series[1],
        "hovertemplate": "%{customdata}<extra></extra>", "line": {"color": color, "width": 2},
        "marker": {"color": color, "symbol": symbol, "size": size, "line": {"color": "--card", "width": 1.2}},
        "cliponaxis": False,
    }  # fmt: skip


def _rises(result: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], x: Sequence[str]) -> Figure:
    ys, up, down, hover = [], [], [], []
    for entry in entries:
        rise, bounds = entry["rise"], entry["rise_ci95"]
        known = wording.is_number(rise)
        ys.append(short(rise) if known else None)
        interval = wording.interval(bounds, 3, wording.signed) if known else ""
        up.append(short(bounds[1] - rise) if interval else 0)
        down.append(short(rise - bounds[0]) if interval else 0)
        name = _text(result["units"][entry["unit"]]["name"])
        hover.append(f"<b>{name}</b><br>{_signed(rise)}" + (f"<br>95 % interval {interval}" if interval else ""))
    return {
        "type": "scatter", "mode": "markers", "x": x, "y": ys, "customdata": hover,
        "hovertemplate": "%{customdata}<extra></extra>", "cliponaxis": False,
        "marker": {"color": "--series-1", "size": 9, "line": {"color": "--card", "width": 1.2}},
        "error_y": {
            "type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": "--series-1",
            "thickness": 3, "width": 0,
        },
    }  # fmt: skip


def _reach(trace: Figure) -> list[float]:
    """How far a trace reaches, with its intervals."""
    errors = trace.get("error_y", {"array": [0] * len(trace["y"]), "arrayminus": [0] * len(trace["y"])})
    ends = zip(trace["y"], errors["array"], errors["arrayminus"], strict=True)
    return [end for y, up, down in ends if y is not None for end in (y - down, y + up)]


def _three(value: float | None) -> str:
    return wording.fixed(value, 3)


def _signed(value: float | None) -> str:
    return wording.signed(value, 3)


def _text(said: Any) -> str:
    """As Plotly is to write it: it reads texts as a kind of HTML, and %{…} as a variable."""
    return html.escape(str(said)).replace("%", "&#37;")

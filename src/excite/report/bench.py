"""The page of the timings: tables of what was driven in turn, and a bar chart.

The tables are plain HTML, readable without JavaScript; the chart is Plotly's (``bench_figures.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from excite.report import wording
from excite.report.bench_figures import bench_figures
from excite.report.bench_table import ALLOCATORS, lines_of, not_timed, peak_text, ratio_cells
from excite.report.figures import finite
from excite.report.page import plotly_js, templates


def bench_page(result: Mapping[str, Any]) -> str:
    """The whole page as HTML text.

    Args:
        result: the content of ``bench.json``.
    """
    drawn = bench_figures(result)
    timed = {row["spec"] for row in result["rows"] if row["status"] == "timed"}
    return (
        templates()
        .get_template("bench.html")
        .render(
            result=result,
            title=f"Speed of {', '.join(spec for spec in result['networks'] if spec in timed) or 'nothing'}",
            facts=_facts(result),
            allocators=[(name, ALLOCATORS[name]) for name in result["settings"]["allocator"]],
            networks=[
                {"index": index, "spec": spec, "said": _counted(counted), "role": "contender"}
                for index, (spec, counted) in enumerate(result["networks"].items())
                if spec in timed
            ],
            groups=[
                _group(result, index, group)
                for index, group in enumerate(result["groups"])
                if lines_of(result, index)
            ],
            not_timed=not_timed(result),
            modes=_modes(result),
            settings=_shown(result["settings"]),
            environment=result["environment"],
            drawn=drawn,
            height=max((90 + 22 * figure["rows"] for figure in drawn), default=0),
            figures=finite({figure["id"]: figure["plot"] for figure in drawn}),
            plotly_js=plotly_js() if drawn else "",
        )
    )


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    environment, settings = result["environment"], result["settings"]
    return [
        ("Processor", environment["cpu"]),
        ("Threads", str(environment["threads"])),
        ("PyTorch", environment["torch"]),
        ("Rounds", str(settings["rounds"])),
        ("Time taken", wording.duration(result["seconds"])),
    ]


def _shown(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key, ", ".join(map(str, value)) if isinstance(value, list) else value)
        for key, value in settings.items()
        if value not in (None, [])
    ]


def _counted(network: Mapping[str, Any]) -> str:
    if network["parameters"] is None:
        return ""
    side = network["shape"][1]
    return (
        f"{wording.magnitude(network['parameters'])} parameters, {wording.magnitude(network['macs'])} MACs at "
        f"{side} × {side}"
    )


def _group(result: Mapping[str, Any], index: int, group: Mapping[str, Any]) -> dict[str, Any]:
    specs = list(result["networks"])
    lines = lines_of(result, index)
    answers = [said for said in result["summary"] if said["group"] == index]
    return {
        "id": f"group-{index}",
        "title": group["title"],
        "answers": [sentence for said in answers for sentence in said["sentences"]],
        "answers_for": ALLOCATORS[answers[0]["allocator"]] if answers else "",
        "lines": [
            {
                "index": specs.index(line["spec"]),
                "spec": line["spec"],
                "way": line["way"],
                "cells": [_cells(line["allocators"].get(name)) for name in result["settings"]["allocator"]],
                "peak": peak_text(line["row"]),
                "over": f"{(line['row']['running_peak_bytes'] - line['row']['imported_bytes']) / 2**20:,.0f}",
                "ready": wording.duration(line["row"]["ready_seconds"]),
                "difference": _difference(line["row"]["difference"]),
            }
            for line in lines
        ],
        "checked": any(line["row"]["difference"] is not None for line in lines),
    }


def _cells(row: Mapping[str, Any] | None) -> dict[str, str]:
    if row is None:
        return {
            "ms": wording.MISSING,
            "interval": "",
            "host": "",
            "host_interval": "",
            "eager": "",
            "eager_interval": "",
        }
    host, host_interval = ratio_cells(row["host_ratio"])
    eager, eager_interval = ratio_cells(row["eager_ratio"], inverse=True)
    low, high = (wording.significant(1000 * bound) for bound in row["seconds_ci95"])
    return {
        "ms": wording.significant(1000 * row["seconds"]),
        "interval": f"{low}–{high}",
        "host": host,
        "host_interval": host_interval,
        "eager": eager,
        "eager_interval": eager_interval,
    }


def _difference(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"


def _modes(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each mode that was timed means, with the kind of work where both have it."""
    used = {(row["what"], row["mode"]) for row in result["rows"] if row["status"] == "timed"}
    return [
        (f"{mode}, {what}" if sum(other == mode for _, other in used) > 1 else mode, said)
        for what, modes in result["modes"].items()
        for mode, said in modes.items()
        if (what, mode) in used
    ]

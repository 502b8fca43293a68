"""The page of an ablation: the papers' table, and the error against the value varied and against cost.

The table is plain HTML, readable without JavaScript; the figure is Plotly's (``ablate_figures.py``).
"""

from __future__ import annotations

from typing import Any

from excite.report import wording
from excite.report.ablate_figures import ablate_figures
from excite.report.figures import finite
from excite.report.page import plotly_js, settings, templates

ORIGINAL = "original"


def ablate_page(result: dict[str, Any]) -> str:
    """The whole page as HTML text.

    Args:
        result: the content of ``ablate.json``.
    """
    drawn = ablate_figures(result)
    heading, _, more = result["summary"].replace(" %", "\u00a0%").removesuffix(".").partition(". ")
    return (
        templates()
        .get_template("ablate.html")
        .render(
            result=result,
            title=f"{', '.join(result['grid'])} of {result['network']} on {result['data']}",
            heading=f"{heading}.",
            more=f"{more}." if more else "",
            facts=_facts(result),
            setting_titles=setting_titles(result),
            titles=columns(result),
            rows=[_row(index, row, result) for index, row in enumerate(result["rows"])],
            has_original=any(row["original"] for row in result["rows"]),
            has_band=any(row["original"] and len(row["setting"]) < len(result["grid"]) for row in result["rows"]),
            pairs=_pairs(result),
            difference_unit=wording.difference_unit(result["metric"]["unit"]),
            name_capital=wording.capital(wording.metric_name(result["metric"]["name"])),
            recipe=settings(result["recipe"]),
            drawn=drawn,
            figures=finite({figure["id"]: figure["plot"] for figure in drawn}),
            plotly_js=plotly_js() if drawn else "",
        )
    )


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    seeds = result["seeds"]
    facts = [
        ("Network", result["network"]),
        ("Data", result["data"]),
        ("Seeds", f"{len(seeds)}" + (f" ({', '.join(map(str, seeds))})" if len(seeds) <= 5 else "")),
    ]
    counts = (("Epochs", result["epochs"]), (f"Test {result['samples']}", result["count"]))
    return facts + [(name, f"{count:,}") for name, count in counts if count is not None]


# ---------------------------------------------------------------------------------------- the table


def columns(result: dict[str, Any]) -> dict[str, str]:
    """The columns of figures, as key → title; the intervals stand beside what they belong to."""
    metric = result["metric"]
    arrow = "↑" if metric["higher_is_better"] else "↓"
    unit = f" ({metric['unit']})" if metric["unit"] else ""
    found = {"score": f"{wording.metric_name(metric['name'])} {arrow}{unit}"}
    if any(row["score_ci95"] for row in result["rows"]):
        found["score_interval"] = "95 % interval"
    if all("top-5 error" in row["metrics"] for row in result["rows"]):
        found["top5"] = "top-5 error ↓ (%)"
    found |= {"parameters": "parameters", "macs": "MACs", "mebibytes": "size (MiB)", "latency": "latency"}
    if any(row["difference"] is not None for row in result["rows"]):
        of_difference = wording.difference_unit(metric["unit"])
        found["difference"] = "difference" + (f" ({of_difference})" if of_difference else "")
        if any(row["difference_ci95"] for row in result["rows"]):
            found |= {"difference_interval": "95 % interval", "finding": "shown"}
    return found


def setting_titles(result: dict[str, Any]) -> list[str]:
    """The keys of the grid, and ``network`` where no key tells the host from the network."""
    titles = list(result["grid"])
    originals = [row for row in result["rows"] if row["original"]]
    return (
        [*titles, "network"] if originals and all(len(row["setting"]) == len(titles) for row in originals) else titles
    )


def setting_cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """A row's values under :func:`setting_titles`; the host is called original, as in the papers."""
    free = [key for key in setting_titles(result) if key not in row["setting"]]
    said = [row["setting"].get(key, "") for key in setting_titles(result)]
    if free == ["network"]:
        said[-1] = row["spec"]
    elif row["original"]:
        said[setting_titles(result).index(free[0])] = ORIGINAL
    return said


def cells(row: dict[str, Any], result: dict[str, Any]) -> dict[str, str]:
    """Every figure of a row as text, by the keys of :func:`columns`."""
    places = wording.decimals(result["metric"]["unit"])
    has_difference = row["difference"] is not None
    top5 = row["metrics"].get("top-5 error")
    return {
        "score": wording.fixed(row["score"], places),
        "score_interval": wording.interval(row["score_ci95"], places),
        "top5": wording.spread("top5", **top5) if top5 else "",
        "parameters": wording.magnitude(row["parameters"]),
        "macs": wording.magnitude(row["macs"]),
        "mebibytes": wording.significant(row["mebibytes"]),
        "latency": wording.milliseconds(row["latency_ms"]),
        "difference": wording.signed(row["difference"], places) if has_difference else "",
        "difference_interval": wording.interval(row["difference_ci95"], places, wording.signed),
        "finding": wording.finding(row, result) if has_difference else "",
    }


def _row(index: int, row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    said = cells(row, result)
    ratio = ""
    if wording.is_number(row["latency_ratio"]):
        ratio = f"{wording.fixed(row['latency_ratio'], 2)}×"
    return {
        "index": index,
        "original": row["original"],
        "settings": setting_cells(row, result),
        "spec": row["spec"],
        "label": row["label"],
        "starts_group": index > 0 and result["rows"][index - 1]["group"] != row["group"],
        "same_as": row["same_as"],
        "cells": said | {"ratio": ratio, "p": wording.probability(row["p_holm"])},
        "runs": [
            {"seed": seed, "score": wording.fixed(score, wording.decimals(result["metric"]["unit"])), "folder": run}
            for seed, score, run in zip(result["seeds"], row["scores"], row["runs"], strict=False)
        ],
    }


def _pairs(result: dict[str, Any]) -> list[dict[str, str]]:
    """The differences between the settings themselves, as text, the surest first."""
    places = wording.decimals(result["metric"]["unit"])
    pairs = [pair for pair in result["between"] if pair["difference_ci95"]]
    pairs.sort(key=lambda pair: pair["p_holm"] if wording.is_number(pair["p_holm"]) else 1.0)
    return [
        {
            "one": pair["one"],
            "other": pair["other"],
            "difference": wording.signed(pair["difference"], places),
            "interval": wording.interval(pair["difference_ci95"], places, wording.signed),
            "finding": wording.finding(pair, result),
            "p": wording.probability(pair["p_holm"]),
        }
        for pair in pairs
    ]

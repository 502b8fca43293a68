"""The page of an explanation: what the attention of one network learned, as one HTML file that opens from disk.

What it says, its tables and a small panel of every unit can be read without JavaScript; the charts are Plotly
figures (``explain_figures.py``), and ``templates/explain.js`` draws the unit and the classes that are chosen
(``explain_data.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from excite.report import explain_data, explain_figures, figures, wording
from excite.report.explain_data import FEW, Choice, scale_name
from excite.report.page import plotly_js, settings, templates

_PERCENTAGES = ("top1", "top5", "oa", "aa")
_BEGINNING = re.compile(r"(yes|no|it is unclear): ", re.IGNORECASE)


def explain_page(result: dict[str, Any]) -> str:
    """The whole page as HTML text, under 10 MB however many classes and units there are.

    Args:
        result: the content of ``explain.json``.
    """
    chosen = explain_data.choice(result)
    gates = explain_data.gate_data(result, chosen)
    selection = explain_data.selection_data(result, chosen)
    depth = explain_figures.depth_figures(result)
    scales = explain_figures.scale_figures(result)
    few = len(result["classes"]) <= FEW
    script = {
        "classes": [result["classes"][index] for index in chosen.classes],
        "shown": [chosen.classes.index(index) for index in chosen.shown],
        "few": few,
        "gates": gates,
        "selection": selection,
        "layouts": explain_figures.chosen_layouts(),
    }
    template = templates().get_template("explain.html")
    return template.render(
        result=result,
        title=f"What {result['network']} learned on {_data(result)}",
        data=_data(result),
        heading=finding(result),
        standfirst=standfirst(result),
        facts=_facts(result),
        few=few,
        chips=_chips(result, chosen, few),
        left_out=len([count for count in result["counts"] if count]) - len(chosen.classes),
        gates=gates,
        gate_panels=explain_data.gate_panels(result, chosen, gates) if gates else [],
        selection=selection,
        selection_panels=explain_data.selection_panels(result, chosen, selection) if selection else [],
        depth_figures=depth,
        scale_figures=scales,
        kernels=_kernels(result),
        answers={kind: _answers(result[kind]) for kind in ("excitation", "selection")},
        gate_rows=_gate_rows(result),
        kernel_rows=_kernel_rows(result),
        recipe=settings(result["recipe"] or {}),
        environment=_environment(result),
        figures=figures.finite({figure["id"]: figure["plot"] for figure in [*depth, *scales]}),
        explained=figures.finite(script),
        plotly_js=plotly_js(),
    )


# ---------------------------------------------------------------------------------------- in words

_EXCITATION = {
    ("yes", "yes"): "{} treats all classes alike at first and tells them apart later on",
    ("yes", "no"): "{} treats all classes alike, early and late",
    ("yes", "unclear"): "{} treats all classes alike at first",
    ("no", "yes"): "{} tells classes apart from its first units on, and more so with depth",
    ("no", "no"): "{} tells classes apart from its first units on, and no more so with depth",
    ("no", "unclear"): "{} tells classes apart from its first units on",
    ("unclear", "yes"): "{} tells classes apart the better, the deeper its units are",
    ("unclear", "no"): "The deeper units of {} tell classes apart no better than the early ones",
    ("unclear", "unclear"): "How far the gates of {} depend on the class stays unclear",
}
"""By the answers to the paper's first two questions: alike in early units? more specific in later ones?"""


def finding(result: Mapping[str, Any]) -> str:
    """What was found: a sentence for each kind of unit."""
    said = []
    if result["excitation"]:
        answers = [observed["answer"] for observed in result["excitation"]["observations"]]
        early, later, saturated = (*answers, *["unclear"] * 3)[:3]
        sentence = _EXCITATION[early, later].format(result["network"])
        said.append(f"{sentence}; its last units are saturated." if saturated == "yes" else f"{sentence}.")
    if result["selection"]:
        said.append(_selection_finding(result, with_excitation=bool(said)))
    return " ".join(said)


def _selection_finding(result: Mapping[str, Any], with_excitation: bool) -> str:
    units, scales = result["selection"]["units"], result["selection"]["scales"]
    count = f"{len(units)} selective kernel" + ("s" if len(units) != 1 else "")
    kernels = f"its {count}" if with_excitation else f"the {count} of {result['network']}"
    if len(scales) < 2:
        return f"One scale alone does not tell how the attention of {kernels} goes with the size of objects."
    bounds = [entry["rise_ci95"] or [0, 0] for entry in units]
    rising = sum(wording.is_number(low) and low > 0 for low, _ in bounds)
    falling = sum(wording.is_number(high) and high < 0 for _, high in bounds)
    moved, kernel = (rising, "larger") if rising >= falling else (falling, "smaller")
    if not moved:
        return f"In none of {kernels} does the attention go with the size of objects."
    where = f"all {kernels}" if moved == len(units) > 1 else f"{moved} of {kernels}"
    return f"As objects grow, attention moves to the {kernel} kernel in {where}."


def standfirst(result: Mapping[str, Any]) -> str:
    """The figures behind the finding."""
    said = []
    if result["excitation"]:
        entries = result["excitation"]["units"]
        told = [entry for entry in entries if wording.is_number(entry["class_share"])]
        if told:
            most = max(told, key=lambda entry: entry["class_share"])
            sentence = f"In {_name(result, told[0])} the class explains {wording.percent(told[0]['class_share'])}"
            sentence += " of the variance of the gates"
            if most is not told[0]:
                sentence += (
                    f", in {_name(result, most)} {wording.percent(most['class_share'])}, the most of all units"
                )
            said.append(sentence + ".")
    if result["selection"] and len(result["selection"]["scales"]) > 1:
        rises = [entry for entry in result["selection"]["units"] if wording.is_number(entry["rise"])]
        if rises:
            most = max(rises, key=lambda entry: abs(entry["rise"]))
            start, end = (wording.signed(most["overall"][place], 3) for place in (0, -1))
            first, last = (scale_name(result["selection"]["scales"][place]) for place in (0, -1))
            said.append(
                f"It moves furthest in {_name(result, most)}: from {start} at {first} to {end} at {last}, where −1 "
                "is all attention to the smaller kernel and +1 all to the larger."
            )
    return " ".join(said)


def _name(result: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    return str(result["units"][entry["unit"]]["name"])


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    kinds = [unit["kind"] for unit in result["units"]]
    units = [f"{kinds.count(kind)} {kind.upper()}" for kind in ("se", "sk") if kind in kinds]
    facts = [
        ("Network", result["network"]),
        ("Data", f"{_data(result)}, {result['split']}"),
        ("Images", f"{result['count']:,}"),
        ("Classes", f"{len(result['classes']):,}"),
        ("Units", ", ".join(units)),
    ]
    for name, value in result["metrics"].items():
        if name in _PERCENTAGES:
            facts.append((wording.capital(wording.metric_name(name)), f"{wording.spread(name, value, None)}\u00a0%"))
    return facts


def _answers(part: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The questions with their answers, which the sentences need not begin with, since the page shows them."""
    return [
        observed | {"sentence": wording.capital(_BEGINNING.sub("", observed["sentence"]))}
        for observed in (part or {}).get("observations", [])
    ]


def _data(result: Mapping[str, Any]) -> str:
    """The name of the data: of a path its last part."""
    return Path(result["data"]).name or str(result["data"])


def _kernels(result: Mapping[str, Any]) -> str:
    """The two kernels that all units choose between, where they are the same: ``3×3 and 5×5``."""
    units = (result["selection"] or {}).get("units", [])
    pairs = {(entry["small"], entry["large"]) for entry in units}
    return " and ".join(pairs.pop()) if len(pairs) == 1 else ""


def _chips(result: Mapping[str, Any], chosen: Choice, few: bool) -> list[dict[str, Any]]:
    """The classes that are offered at first: all of a few, else those that are drawn."""
    offered = chosen.classes if few else chosen.shown
    return [
        {
            "name": result["classes"][index],
            "row": chosen.classes.index(index),
            "slot": chosen.shown.index(index) if index in chosen.shown else None,
        }
        for index in offered
    ]


# ---------------------------------------------------------------------------------------- tables


def _gate_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row for each unit of squeeze-and-excitation."""
    rows = []
    for entry in (result["excitation"] or {}).get("units", []):
        shares = [wording.percent(entry[key]) for key in ("low", "high", "constant")]
        spreads = [wording.fixed(entry[key], 3) for key in ("mean", "between", "within")]
        rows.append([*_unit(result, entry), *spreads, wording.percent(entry["class_share"]), *shares])
    return rows


def _kernel_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A row for each selective kernel."""
    rows = []
    for entry in (result["selection"] or {}).get("units", []):
        differences = [wording.signed(value, 3) for value in entry["overall"]]
        rise = [wording.signed(entry["rise"], 3), wording.interval(entry["rise_ci95"], 3, wording.signed)]
        kernels = f"{entry['small']} / {entry['large']}"
        rows.append([*_unit(result, entry), kernels, *differences, *rise])
    return rows


def _unit(result: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    unit = result["units"][entry["unit"]]
    return [unit["name"], "×".join(map(str, unit["size"])) or wording.MISSING, f"{unit['channels']:,}"]


def _environment(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    run = [("run", str(result["run"]))] if result["run"] else []
    run.append(("data", str(result["data"])))
    versions = [(name, str(version)) for name, version in result["versions"].items()]
    took = [("time", wording.duration(result["seconds"])), ("processes", str(result["processes"]))]
    return [*run, *versions, *took]

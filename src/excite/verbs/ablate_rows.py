"""The rows of an ablation: what the comparisons found, in the shape of the papers' tables, and what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from excite.analysis.statistics import Estimate, holm, paired_difference
from excite.errors import ExciteError
from excite.report import wording
from excite.tasks import task_named
from excite.training.recipe import Recipe
from excite.training.recipe_data import AnyData
from excite.verbs.ablate_grid import Point, label

ERRORS = {"top1": "top-1 error", "top5": "top-5 error"}
"""The accuracies whose complement the papers' tables show."""


@dataclass
class Group:
    """The points of the grid that are trained under one recipe.

    Attributes:
        setting: the recipe keys of the grid with their values; empty where no recipe key varies.
        recipe: with these set.
        folder: of its comparison.
        images: what it learns from and is scored on.
        host: the spec of the network without units.
        points: in the order of the grid.
        same: for a spec the earlier one that builds the same network.
    """

    setting: dict[str, str]
    recipe: Recipe
    folder: Path
    images: AnyData
    host: str
    points: list[Point]
    same: dict[str, str]


def table(
    grid_points: list[Point], network: str, groups: list[Group], comparisons: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """What :func:`excite.verbs.ablate.ablate` returns, but for the folder.

    Args:
        grid_points: the whole grid.
        network: the spec whose arguments vary.
        groups: its points by recipe.
        comparisons: what ``compare`` found for each group, in the same order.
        folder: of the ablation, below which those of the groups are.
    """
    first = comparisons[0]
    metric = first["metric"]
    if is_error := metric["name"] in ERRORS:
        metric = {"name": ERRORS[metric["name"]], "unit": "%", "higher_is_better": False}
    both = zip(groups, comparisons, strict=True)
    rows = [row for number, (group, found) in enumerate(both) for row in _rows(number, group, found, folder)]
    if len(groups) > 1:
        _correct_together(rows, groups, folder)
    result: dict[str, Any] = {
        "network": network,
        "host": first["baseline"],
        "grid": {key: list(dict.fromkeys(p.setting[key] for p in grid_points)) for key in grid_points[0].setting},
        "data": first["data"],
        "seeds": first["seeds"],
        "metric": metric,
        "weights": first["weights"],
        "summary": "",
        "rows": rows,
        "between": _between(rows, groups, folder, -1 if is_error else 1),
        "samples": first["samples"],
        "count": first["count"],
        "epochs": first["epochs"] if len({comparison["epochs"] for comparison in comparisons}) == 1 else None,
        "recipe": first["recipe"],
        "environment": first["environment"],
        "notes": _notes(rows, comparisons),
        "comparisons": [str(group.folder.relative_to(folder)) for group in groups],
    }
    result["summary"] = summary(result)
    return result


def _rows(number: int, group: Group, comparison: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The host first, then every point of the group."""
    measured = {entry["spec"]: entry for entry in comparison["results"]}
    prefix = group.folder.relative_to(folder)
    asked = [(point.setting, point.label, point.spec) for point in group.points]
    if [spec for _, _, spec in asked] != [group.host]:  # else the network has no units, and only the recipe varies
        asked.insert(0, (group.setting, ", ".join([*filter(None, [label(group.setting)]), "original"]), group.host))
    rows: list[dict[str, Any]] = []
    for position, (setting, name, spec) in enumerate(asked):
        trained = group.same.get(spec, spec)
        twin = next((row for row in rows if row["trained"] == trained), None)
        entry = _as_errors(measured[trained])
        rows.append(
            entry
            | {
                "setting": setting,
                "label": name,
                "group": number,
                "original": position == 0 and len(asked) > len(group.points),
                "spec": spec,
                "trained": trained,
                "same_as": twin["label"] if twin else None,
                "mebibytes": 4 * entry["parameters"] / 2**20,
                "runs": [str(prefix / run) for run in entry["runs"]],
            }
        )
    return rows


def _as_errors(entry: dict[str, Any]) -> dict[str, Any]:
    """What a comparison says of a network, with accuracies turned into errors."""
    metrics = {
        ERRORS.get(name, name): {**found, "mean": 100 - found["mean"]} if name in ERRORS else found
        for name, found in entry["metrics"].items()
    }
    if "top1" not in entry["metrics"]:
        return entry | {"metrics": metrics}
    turned: dict[str, Any] = {"metrics": metrics, "scores": [100 - score for score in entry["scores"]]}
    for key, whole in (("score", 100.0), ("start_score", 100.0), ("difference", 0.0)):
        turned[key] = None if entry[key] is None else whole - entry[key]
    for key, whole in (("score_ci95", 100.0), ("difference_ci95", 0.0)):
        turned[key] = None if entry[key] is None else [whole - entry[key][1], whole - entry[key][0]]
    if entry["start_scores"] is not None:
        turned["start_scores"] = [100 - score for score in entry["start_scores"]]
    return entry | turned


def _correct_together(rows: list[dict[str, Any]], groups: list[Group], folder: Path) -> None:
    """Correct the p-values against the host for all groups at once: each comparison has done so for its own only."""
    hosts = {row["group"]: row for row in rows if row["original"]}
    judged = [row for row in rows if row["same_as"] is None and row["group"] in hosts and not row["original"]]
    p_values = []
    for row in judged:
        host, blocks = hosts[row["group"]], _blocks(groups[row["group"]])
        p_values.append(paired_difference(_scores(row, folder), _scores(host, folder), blocks=blocks).p)
    known = [p for p in p_values if p is not None]
    if len(known) == len(judged):
        adjusted = dict(zip([row["label"] for row in judged], holm(known), strict=True))
        for row in rows:
            row["p_holm"] = adjusted.get(row["same_as"] or row["label"])


def _blocks(group: Group) -> NDArray[np.int64] | None:
    """For each test pixel of a scene its block of ground; None where there are none."""
    blocks = getattr(group.images.test, "blocks", None)
    return None if blocks is None else blocks.numpy()


def _ends(found: Estimate, factor: float) -> list[float] | None:
    if found.low is None or found.high is None:
        return None
    return sorted((factor * found.low, factor * found.high))


def _between(rows: list[dict[str, Any]], groups: list[Group], folder: Path, sign: int) -> list[dict[str, Any]]:
    """Every setting against every other, paired by seed and sample; the host is left to the rows."""
    settings = [row for row in rows if row["same_as"] is None and not row["original"]]
    tables = {row["label"]: _scores(row, folder) for row in settings}
    factor = sign * task_named(groups[0].images.task).metric.factor
    pairs: list[dict[str, Any]] = []
    for one, other in combinations(settings, 2):
        group = groups[one["group"]]
        if group.images is not groups[other["group"]].images:
            continue  # other test images, or the same ones of another size
        found = paired_difference(tables[one["label"]], tables[other["label"]], blocks=_blocks(group))
        pairs.append(
            {
                "one": one["label"],
                "other": other["label"],
                "difference": factor * found.value,
                "difference_ci95": _ends(found, factor),
                "p_holm": found.p,
            }
        )
    p_values = [pair["p_holm"] for pair in pairs]
    if None not in p_values:
        for pair, p in zip(pairs, holm(p_values), strict=True):
            pair["p_holm"] = float(p)
    return pairs


def _scores(row: dict[str, Any], folder: Path) -> NDArray[np.float64]:
    """The score of every seed on every sample, (S, n), as the comparison left it beside the runs."""
    found = []
    for run in row["runs"]:
        path = folder / run / "test.safetensors"
        try:
            found.append(safetensors.numpy.load_file(path)["scores"])
        except (OSError, KeyError, safetensors.SafetensorError):
            raise ExciteError(f"{path} is missing or damaged: run the same command again.") from None
    return np.stack(found).astype(np.float64)


def _notes(rows: list[dict[str, Any]], comparisons: list[dict[str, Any]]) -> list[str]:
    notes = []
    for row in rows:
        if row["same_as"]:
            least = "reduction" in {key.rpartition(".")[2] for key in row["setting"]}
            why = " (its bottlenecks have a least width, min_width, which decides here)" if least else ""
            notes.append(f"{row['label']} builds the same network as {row['same_as']}{why}: it was trained once.")
    notes += [note for comparison in comparisons for note in comparison["notes"]]
    return list(dict.fromkeys(notes))


def summary(result: Mapping[str, Any]) -> str:
    """What the table shows, in two or three sentences.

    A difference counts as shown when its own 95 % interval leaves out zero and it stands after Holm's correction.
    """
    metric = result["metric"]
    name, places = wording.metric_name(metric["name"]), wording.decimals(metric["unit"])
    settings = [row for row in result["rows"] if not row["original"]]
    best = (max if metric["higher_is_better"] else min)(settings, key=lambda row: row["score"])
    extreme = "highest" if metric["higher_is_better"] else "lowest"
    unit = f" {metric['unit']}".rstrip()
    sentence = f"{best['label']} has the {extreme} {name}, {wording.fixed(best['score'], places)}{unit}"
    host = next((row for row in result["rows"] if row["original"] and row["group"] == best["group"]), None)
    if host:
        sentence += f", against {wording.fixed(host['score'], places)}{unit} of the original, {result['host']}"
    if len(result["seeds"]) < 3:
        return f"{sentence}. It takes at least three seeds to say whether that is more than chance."
    return " ".join([f"{sentence}.", *_against_host(result, settings), *_among_settings(result)])


def _against_host(result: Mapping[str, Any], settings: Sequence[dict[str, Any]]) -> list[str]:
    judged = {row["label"]: wording.finding(row, dict(result)) for row in settings}
    shown = {found: [name for name in judged if judged[name] == found] for found in (wording.BETTER, wording.WORSE)}
    if not any(judged.values()):
        return []
    if not any(shown.values()):
        return [f"No difference to {result['host']} is shown for any setting."]
    return [
        f"Shown to be {found} than {result['host']}: {'; '.join(names)}." for found, names in shown.items() if names
    ]


def _among_settings(result: Mapping[str, Any]) -> list[str]:
    pairs = result["between"]
    judged = [(pair, wording.finding(pair, dict(result))) for pair in pairs]
    if not any(found for _, found in judged):
        return []
    shown = [(pair, found) for pair, found in judged if found in (wording.BETTER, wording.WORSE)]
    if not shown:
        return ["Among the settings themselves no difference is shown."]
    pair, found = max(shown, key=lambda item: abs(item[0]["difference"]))
    unit = wording.difference_unit(result["metric"]["unit"])
    size = wording.fixed(abs(pair["difference"]), wording.decimals(result["metric"]["unit"]))
    one, other = (pair["one"], pair["other"]) if found == wording.BETTER else (pair["other"], pair["one"])
    return [
        f"Among the settings themselves {len(shown)} of {len(pairs)} differences are shown, the largest that of "
        f"{one} over {other}, {size} {unit}".rstrip()
        + "."
    ]

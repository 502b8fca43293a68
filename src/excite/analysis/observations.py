"""What the papers observed of their networks, asked of this one: yes, no or unclear, with the figures.

Of excitation these are the three observations of Hu et al., arXiv 1709.01507, Sect. 6.3; of selection those of Li et
al., arXiv 1903.06586, Sect. 4.4. The thresholds are ours, for the papers judge by eye.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

FEW, MUCH = 0.10, 0.25
"""Shares of the gates' variance that the class explains: below, hardly; from here on, to a good part."""
TOGETHER = 0.02
"""Standard deviation of the classes' means, of a range of 1, below which their curves lie on each other."""
HARDLY, MOSTLY = 0.10, 0.50
"""Shares of saturated gates: up to here it is not saturated; from here on it is."""
NEGLIGIBLE = 0.10
"""A rise of less than this share of the largest one counts as none."""

Answer = Literal["yes", "no", "unclear"]
_BEGINS = {"yes": "Yes: ", "no": "No: ", "unclear": "It is unclear: "}


def on_excitation(
    figures: Sequence[dict[str, Any]], units: Sequence[dict[str, Any]], counts: Sequence[int]
) -> list[dict[str, Any]]:
    """The three observations.

    Args:
        figures: those of :meth:`~excite.analysis.excitation.Excitation.figures`, in the order of the depth.
        units: for each its ``name``, ``stage`` and ``size``.
        counts: images of each class.
    """
    third = max(1, round(len(figures) / 3))
    early, late = figures[:third], figures[-third:]
    classes, images = sum(count > 0 for count in counts), sum(counts)
    # As much a class explains that has nothing to do with the gates.
    chance = (classes - 1) / max(images - 1, 1)
    last = _late(early, late, [unit["name"] for unit in units[-third:]], chance)
    return [_early(early, len(figures), chance), last, _last_stage(figures, units)]


def _early(early: Sequence[dict[str, Any]], count: int, chance: float) -> dict[str, Any]:
    share, apart = _mean(early, "class_share"), _apart(early)
    answer: Answer = "unclear"
    if apart < TOGETHER or share < max(FEW, 2 * chance):
        answer = "yes"
    elif share >= MUCH:
        answer = "no"
    units = f"the first {len(early)} of {count} units" if count > 1 else "the only unit"
    sentence = (
        f"in {units} the class explains {_percent(share)} of the gates' variance, and the means of the classes have "
        f"a standard deviation of {apart:.3f} of the range."
    )
    figures = {"class_share": share, "between": apart, "chance": chance, "units": len(early)}
    return _observation("Are the early units the same for every class?", answer, sentence, figures)


def _late(
    early: Sequence[dict[str, Any]], late: Sequence[dict[str, Any]], names: Sequence[str], chance: float
) -> dict[str, Any]:
    first, last, apart = _mean(early, "class_share"), _mean(late, "class_share"), _apart(late)
    most = max(range(len(late)), key=lambda number: float(late[number]["class_share"]))
    answer: Answer = "unclear"
    if last < max(FEW, 2 * chance) or last <= first:
        answer = "no"
    elif last >= MUCH and apart >= TOGETHER:
        answer = "yes"
    sentence = (
        f"in the last {len(late)} the class explains {_percent(last)} of the gates' variance, against "
        f"{_percent(first)} in the first {len(early)}, and the means of the classes have a standard deviation of "
        f"{apart:.3f} of the range; most in {names[most]}, where it explains {_percent(late[most]['class_share'])}."
    )
    figures: dict[str, Any] = {"class_share": last, "class_share_early": first, "between": apart, "chance": chance}
    figures |= {"most": names[most], "most_share": late[most]["class_share"]}
    return _observation("Do the late units answer to the class?", answer, sentence, figures)


def _last_stage(figures: Sequence[dict[str, Any]], units: Sequence[dict[str, Any]]) -> dict[str, Any]:
    inside = _stage_of_last(units)
    last = [one for one, here in zip(figures, inside, strict=True) if here]
    before = [one for one, here in zip(figures, inside, strict=True) if not here]
    saturated, constant = _saturated(last), _mean(last, "constant")
    answer: Answer = "yes" if saturated >= MOSTLY else "no" if saturated <= HARDLY else "unclear"
    units_are = "1 unit" if len(last) == 1 else f"{len(last)} units"
    sentence = f"in the last stage ({units_are}) {_percent(saturated)} of the gates are within 0.05 of an end"
    if before:
        sentence += f", against {_percent(_saturated(before))} in the units before"
    sentence += f"; {_percent(constant)} of its channels have a gate that hardly changes from image to image."
    found = {"saturated": saturated, "before": _saturated(before) if before else None, "constant": constant}
    return _observation("Is the last stage saturated?", answer, sentence, found)


def _stage_of_last(units: Sequence[dict[str, Any]]) -> list[bool]:
    """Which units are of the last one's stage: by name, else by the size of their maps, else the last third."""
    for key in ("stage", "size"):
        inside = [unit[key] == units[-1][key] for unit in units]
        if units[-1][key] is not None and not all(inside):
            return inside
    third = max(1, round(len(units) / 3))
    return [number >= len(units) - third for number in range(len(units))]


def on_selection(
    figures: Sequence[dict[str, Any]], names: Sequence[str], scales: Sequence[float]
) -> list[dict[str, Any]]:
    """Whether the attention of the large kernel rises with scale, and where it stops doing so.

    Args:
        figures: those of :meth:`~excite.analysis.selection.Selection.figures`, in the order of the depth.
        names: of the units.
        scales: at which objects were seen.
    """
    rises = np.array([one["rise"] for one in figures])
    rising = np.array([one["rise_ci95"][0] > 0 for one in figures])
    falling = np.array([one["rise_ci95"][1] < 0 for one in figures])
    most = int(rises.argmax())
    count = len(figures)
    answer: Answer = "unclear"
    if rising.sum() > count / 2 and rises.mean() > 0:
        answer = "yes"
    elif rising.sum() <= falling.sum():
        answer = "no"
    step = f"from a scale of {scales[0]:.3g} to {scales[-1]:.3g}"
    sentence = f"{step} it rises in {rising.sum()} of {count} units and falls in {falling.sum()}, by "
    sentence += f"{_signed(rises.mean())} on average"
    if rising.any():
        low, high = figures[most]["rise_ci95"]
        sentence += f"; most in {names[most]}, by {_signed(rises[most])} (95 % interval {low:.3f} to {high:.3f})"
    common = {
        "rising": [name for name, one in zip(names, rising, strict=True) if one],
        "falling": [name for name, one in zip(names, falling, strict=True) if one],
        "mean_rise": float(rises.mean()),
    }
    first = _observation(
        "Does the attention of the large kernel rise with the object's scale?", answer, sentence + ".", common
    )
    return [first, _where_it_stops(rises, rising, names)]


def _where_it_stops(rises: Any, rising: Any, names: Sequence[str]) -> dict[str, Any]:
    question = "Does it stop rising in the last units?"
    count = len(names)
    notable = rising & (rises >= NEGLIGIBLE * rises.max())
    figures: dict[str, Any] = {"rising": int(rising.sum()), "late_rising": None, "last_rising": None}
    if rising.sum() <= count / 2:
        sentence = f"it rises in {rising.sum()} of {count} units, too few to say where it stops."
        return _observation(question, "unclear", sentence, figures)
    last = int(np.flatnonzero(notable)[-1])
    third = max(1, round(count / 3))
    late = notable[-third:]
    answer: Answer = "unclear"
    if count > 1 and not late.any():
        answer = "yes"
    elif late.all() or notable[-1]:
        answer = "no"
    end = "the last one" if last == count - 1 else f"number {last + 1} of {count}"
    sentence = (
        f"the last unit with a notable rise is {names[last]}, {end}; of the last {third} units {late.sum()} rise."
    )
    return _observation(
        question, answer, sentence, figures | {"last_rising": names[last], "late_rising": int(late.sum())}
    )


# --- words ---------------------------------------------------------------------------------------------------------


def _observation(question: str, answer: Answer, sentence: str, figures: dict[str, Any]) -> dict[str, Any]:
    return {"question": question, "answer": answer, "sentence": _BEGINS[answer] + sentence, "figures": figures}


def _mean(figures: Sequence[dict[str, Any]], key: str) -> float:
    return float(np.mean([one[key] for one in figures]))


def _apart(figures: Sequence[dict[str, Any]]) -> float:
    """The deviation of the classes' means, as a part of what the gates can answer."""
    return float(np.mean([one["between"] / (one["range"][1] - one["range"][0]) for one in figures]))


def _saturated(figures: Sequence[dict[str, Any]]) -> float:
    return _mean(figures, "low") + _mean(figures, "high")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")

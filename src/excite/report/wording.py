"""How tables and pages say a figure: numbers, units, intervals, and what a comparison shows.

A figure that is missing or not finite is said as an en dash, so that one diverged run does not spoil a report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

MISSING = "–"
MINUS = "−"

_METRICS = {
    "top1": ("top-1 accuracy", 2),
    "top5": ("top-5 accuracy", 2),
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 4),
    "oa": ("overall accuracy", 2),
    "aa": ("average accuracy", 2),
    "kappa": ("kappa × 100", 2),
}
"""How prose calls a metric, and its decimals."""

BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


def is_number(value: float | None) -> bool:
    """Whether there is a finite number to say."""
    return value is not None and math.isfinite(value)


def fixed(value: float | None, decimals: int) -> str:
    """``-0.5`` as ``−0.50``: a set number of decimals and a real minus sign."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:.{decimals}f}"
    if text.startswith("-"):
        text = text[1:] if float(text) == 0 else MINUS + text[1:]
    return text


def signed(value: float | None, decimals: int) -> str:
    """``0.5`` as ``+0.50``; zero has no sign."""
    text = fixed(value, decimals)
    return text if text.startswith((MINUS, MISSING)) or float(text) == 0 else "+" + text


def interval(bounds: Sequence[float] | None, decimals: int, say: Callable[[float, int], str] = fixed) -> str:
    """``[lo, hi]`` as ``lo to hi``; empty where there is no interval."""
    if bounds is None or not all(math.isfinite(bound) for bound in bounds):
        return ""
    return f"{say(bounds[0], decimals)} to {say(bounds[1], decimals)}"


def significant(value: float | None, digits: int = 3) -> str:
    """``2.1387`` as ``2.14``, ``12345.6`` as ``12,346``: decimals up to ``digits`` digits in all."""
    if value is None or not math.isfinite(value):
        return MISSING
    rounded = float(f"{value:.{digits - 1}e}") if value else 0.0  # 9.996 counts as 10.0 when its digits are laid out
    whole = math.floor(math.log10(abs(rounded))) + 1 if rounded else 1
    return f"{value:,.{max(0, digits - whole)}f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    """A share as ``2.6 %``, to two digits, on one line with its sign."""
    return f"{significant(100 * share, 2)}\u00a0%" if share is not None and math.isfinite(share) else MISSING


def magnitude(count: float | None) -> str:
    """Parameters or MACs to three digits: ``272 k``, ``40.8 M``, ``4.09 G``."""
    if count is None or not math.isfinite(count):
        return MISSING
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{significant(count / size)} {prefix}"
    return f"{count:.0f}"


def milliseconds(value: float | None) -> str:
    """A latency to three digits: ``2.14 ms``."""
    return f"{significant(value)} ms" if is_number(value) else MISSING


def duration(seconds: float | None) -> str:
    """``41 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 99.5:
        return f"{significant(seconds, 2)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def probability(p: float | None) -> str:
    """A p-value as ``p = 0.031`` or ``p < 0.001``; empty where there is none."""
    if p is None or not math.isfinite(p):
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def metric_name(name: str) -> str:
    """A metric as prose says it; a name that is not known here is said as it is."""
    return _METRICS.get(name, (name, 4))[0]


def spread(name: str, mean: float | None, std: float | None) -> str:
    """A metric's ``98.39 ± 0.12``; without a deviation the mean alone."""
    places = _METRICS.get(name, (name, 4))[1]
    return fixed(mean, places) + (f" ± {fixed(std, places)}" if std is not None else "")


def capital(text: str) -> str:
    """The text with a capital first letter and the rest left alone."""
    return text[:1].upper() + text[1:]


def decimals(unit: str) -> int:
    """Decimals of a score: two for percentages and decibels, four for a bare number such as a loss."""
    return 2 if unit else 4


def difference_unit(unit: str) -> str:
    """A difference of percentages is in percentage points."""
    return "points" if unit == "%" else unit


def compares(result: dict[str, Any]) -> bool:
    """Whether there is a difference to show; a lone network shows its score instead."""
    return any(entry["difference"] is not None and entry["role"] != "baseline" for entry in result["results"])


def has_starts(result: dict[str, Any]) -> bool:
    """Whether it is known what the networks scored before their first step, as it is of those with weights."""
    return any(is_number(entry["start_score"]) for entry in result["results"])


def finding(entry: dict[str, Any], result: dict[str, Any]) -> str:
    """What one contender's interval shows: better, worse or no difference shown.

    Nothing at all is said of the baseline, without an interval, or below three seeds. With several contenders
    the Holm-corrected p-value has to agree with the interval.
    """
    bounds = entry["difference_ci95"]
    if bounds is None or len(result["seeds"]) < 3 or not all(math.isfinite(bound) for bound in bounds):
        return ""
    p = entry["p_holm"]
    if bounds[0] <= 0 <= bounds[1] or (p is not None and p >= 0.05):
        return UNDECIDED
    return BETTER if (bounds[0] > 0) == result["metric"]["higher_is_better"] else WORSE

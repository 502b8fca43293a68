from __future__ import annotations

import math

import pytest

from excite.report import wording


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.fixed(-0.5, 2), "−0.50"),
        (wording.fixed(-0.001, 2), "0.00"),  # a rounded zero has no sign
        (wording.fixed(None, 2), "–"),
        (wording.fixed(math.nan, 2), "–"),
        (wording.signed(0.5, 1), "+0.5"),
        (wording.signed(-0.5, 1), "−0.5"),
        (wording.signed(0.001, 2), "0.00"),
        (wording.signed(None, 2), "–"),
        (wording.interval([-0.123, 4.5], 1), "−0.1 to 4.5"),
        (wording.interval([-0.123, 4.5], 1, wording.signed), "−0.1 to +4.5"),
        (wording.interval(None, 1), ""),
        (wording.interval([math.nan, math.nan], 1), ""),
        (wording.significant(2.1387), "2.14"),
        (wording.significant(0.0213), "0.0213"),
        (wording.significant(9.996), "10.0"),
        (wording.significant(12345.6), "12,346"),
        (wording.significant(-41.26), "−41.3"),
        (wording.significant(0), "0.00"),
        (wording.significant(math.inf), "–"),
        (wording.magnitude(999), "999"),
        (wording.magnitude(272_474), "272 k"),
        (wording.magnitude(999_700), "1.00 M"),
        (wording.magnitude(40_813_184), "40.8 M"),
        (wording.magnitude(4_089_000_000), "4.09 G"),
        (wording.magnitude(None), "–"),
        (wording.milliseconds(2.1387), "2.14 ms"),
        (wording.milliseconds(None), "–"),
        (wording.duration(0.4), "0.40 s"),
        (wording.duration(41.4), "41 s"),
        (wording.duration(200), "3 min 20 s"),
        (wording.duration(3599.7), "1 h 00 min"),
        (wording.duration(7500), "2 h 05 min"),
        (wording.probability(0.0312), "p = 0.031"),
        (wording.probability(0.0002), "p < 0.001"),
        (wording.probability(None), ""),
        (wording.difference_unit("%"), "points"),
        (wording.difference_unit("dB"), "dB"),
    ],
)
def test_figures_as_text(said: str, expected: str) -> None:
    assert said == expected


def finding(interval: list[float] | None, p: float | None, *, higher: bool = True, seeds: int = 3) -> str:
    result = {"seeds": list(range(seeds)), "metric": {"name": "top1", "unit": "%", "higher_is_better": higher}}
    return wording.finding({"difference_ci95": interval, "p_holm": p}, result)


def test_finding_follows_the_interval_and_the_direction_of_the_metric() -> None:
    assert finding([0.2, 1.0], 0.01) == "better"
    assert finding([-1.0, -0.2], 0.01) == "worse"
    assert finding([0.2, 1.0], 0.01, higher=False) == "worse"
    assert finding([-1.0, -0.2], 0.01, higher=False) == "better"
    assert finding([-0.1, 1.0], 0.2) == "no difference shown"
    assert finding([0.0, 1.0], None) == "no difference shown"


def test_finding_needs_the_corrected_p_value_to_agree() -> None:
    assert finding([0.01, 1.0], 0.09) == "no difference shown"
    assert finding([0.01, 1.0], None) == "better"


def test_no_finding_without_an_interval_or_below_three_seeds() -> None:
    assert finding(None, None) == ""
    assert finding([math.nan, math.nan], 0.01) == ""
    assert finding([0.2, 1.0], 0.01, seeds=2) == ""

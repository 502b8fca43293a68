from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from excite.report.table import compare_table


def printed(result: dict[str, Any], width: int) -> str:
    console = Console(width=width, color_system=None, force_terminal=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(compare_table(result))
    return capture.get()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_every_figure_is_printed_within_the_width(result: dict[str, Any], width: int) -> None:
    text = printed(result, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for figure in (
        "resnet20+se", "96.20", "95.50 to 96.90", "+1.20", "+0.40 to +2.00", "−0.70 to +0.90", "276 k", "40.9 M",
        "2.50 ms", "1.25×", "1,511", "48 s", "better", "baseline", "control",
        "resnet20+se is better than resnet20 by 1.20 points.", "1,450 test images",
    ):  # fmt: skip
        assert figure in text, figure


def test_a_wide_terminal_has_one_line_a_network(result: dict[str, Any]) -> None:
    row = next(line for line in printed(result, 200).splitlines() if line.split()[:1] == ["resnet20+se"])
    assert row.split()[:2] == ["resnet20+se", "96.20"]
    for figure in ("+1.20", "40.9 M", "1.25×", "48 s", "better"):
        assert figure in row


def test_brackets_in_a_spec_are_not_markup(result: dict[str, Any]) -> None:
    result["results"][1]["spec"] = "my[bold]net[/]:smile:"
    result["verdict"] = "[red]my[bold]net is better."
    text = printed(result, 200)
    assert "my[bold]net[/]:smile:" in text
    assert "[red]my[bold]net is better." in text


def test_a_lone_network_has_no_difference(result: dict[str, Any]) -> None:
    result["results"] = result["results"][:1]
    result["verdict"] = ""
    text = printed(result, 80)
    assert "95.00" in text
    assert "points" not in text
    assert "Verdict" not in text


def test_figures_that_are_missing_are_dashes(result: dict[str, Any]) -> None:
    result["results"][1] |= {"score": float("nan"), "score_ci95": None, "difference_ci95": None, "throughput": None}
    row = next(line for line in printed(result, 200).splitlines() if line.split()[:1] == ["resnet20+se"])
    assert row.split()[1] == "–"
    assert "nan" not in row


def test_the_direction_of_the_metric_is_said(result: dict[str, Any]) -> None:
    assert "top1 ↑ (%)" in printed(result, 200)
    result["metric"] = {"name": "loss", "unit": "", "higher_is_better": False}
    text = printed(result, 200)
    assert "loss ↓" in text
    assert "0.1000" in text


@pytest.mark.parametrize("width", [80, 200])
def test_the_score_at_the_start_is_a_column_where_there_are_weights(tuned: dict[str, Any], width: int) -> None:
    text = printed(tuned, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert " ".join(text.split()).count("at the") == 1
    rows = [next(line for line in text.splitlines() if figure in line).split() for figure in ("95.00", "96.20")]
    assert [row[:3] for row in rows] == [["resnet20", "12.50", "95.00"], ["resnet20+se", "7.75", "96.20"]]
    for entry in tuned["results"]:
        entry |= {"start_score": None, "start_scores": None}
    assert "at the" not in printed(tuned, width)


def test_long_specs_are_broken_where_they_may_be(tuned: dict[str, Any]) -> None:
    for entry, spec in zip(
        tuned["results"][1:], ("resnet20+se:where=conv3x3,stages=1-2", "resnet20+sk:init=identity"), strict=False
    ):
        entry["spec"] = spec
    lines = [line.strip() for line in printed(tuned, 80).splitlines()]
    for piece in ("resnet20+se:", "where=conv3x3,", "stages=1-2", "resnet20+sk:", "init=identity"):
        assert any(line.startswith(piece) for line in lines), piece
    assert all(len(line) <= 80 for line in lines)


def test_the_table_imports_neither_torch_nor_plotly() -> None:
    code = "import sys, excite.report.table; assert not {'torch', 'plotly', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

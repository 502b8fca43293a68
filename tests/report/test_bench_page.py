from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_compare_page import HOSTILE, Page, complaints, opened

from excite.report.bench import bench_page
from excite.report.bench_table import bench_table

HOST, ATTENTION = "resnet20", "resnet20+se"


def row(spec: str, mode: str, allocator: str, seconds: float, /, **more: Any) -> dict[str, Any]:
    to = {"to": f"{HOST} {mode} fp32", "value": 1.25, "low": 1.2, "high": 1.31}
    eager = {"to": f"{spec} eager fp32", "value": 0.5, "low": 0.4, "high": 0.625}
    timed = {
        "spec": spec, "mode": mode, "precision": "fp32", "batch": 8, "what": "inference", "allocator": allocator,
        "group": 0, "same_as": spec, "status": "timed", "reason": None, "seconds": seconds,
        "seconds_ci95": [0.9 * seconds, 1.2 * seconds], "images_per_second": 8 / seconds, "samples": [seconds] * 6,
        "host_ratio": None if spec == HOST else to, "eager_ratio": None if mode == "eager" else eager,
        "peak_bytes": 2**30, "running_peak_bytes": 640 * 2**20, "imported_bytes": 512 * 2**20, "ready_seconds": 2.0,
        "difference": 3e-7, "report": None,
    }  # fmt: skip
    return timed | more


@pytest.fixture
def timings() -> dict[str, Any]:
    """Two networks in two modes under both allocator settings, one failure, one refusal, one group left out."""
    rows = [
        row(spec, mode, allocator, seconds * (0.8 if allocator == "kept" else 1))
        for spec, mode, seconds in ((HOST, "eager", 0.04), (ATTENTION, "eager", 0.05), (HOST, "excite", 0.02))
        for allocator in ("system", "kept")
    ]
    lost = {"seconds": None, "allocator": None}
    rows.append(row(HOST, "onnx", "", 1, status="failed", reason="ONNX Runtime is not installed.", **lost))
    rows.append(row(ATTENTION, "onnx", "", 1, status="failed", reason="ONNX Runtime is not installed.", **lost))
    rows.append(row(HOST, "eager", "", 1, status="left out", reason="no time was left", group=1, **lost))
    group = {"what": "inference", "precision": "fp32", "batch": 8, "contestants": [], "complete": True}
    network = {"shape": [3, 32, 32], "classes": 10, "parameters": 272_474, "macs": 40_813_184}
    return {
        "schema": 1,
        "settings": {"specs": [HOST, ATTENTION], "rounds": 6, "allocator": ["system", "kept"], "minutes": None},
        "environment": {"cpu": "a processor", "threads": 2, "torch": "2.14.1"},
        "networks": {HOST: network, ATTENTION: network | {"parameters": None}},
        "modes": {"inference": {"eager": "as it comes", "excite": "optimised"}, "training": {"eager": "as it comes"}},
        "summary": [{"group": 0, "allocator": "kept", "sentences": [f"{ATTENTION} takes 1.25× by eager."]}],
        "rows": rows,
        "groups": [
            group | {"title": "Inference, fp32, 8 images", "seconds": 12.0},
            group | {"title": "Inference, fp32, 1 image", "batch": 1, "seconds": None},
        ],
        "notes": ["Left out, for there was no time within 2 minutes: Inference, fp32, 1 image."],
        "seconds": 75.0,
    }  # fmt: skip


def test_the_page_is_well_formed_and_says_every_figure(timings: dict[str, Any]) -> None:
    page = Page(bench_page(timings))
    assert page.open == []
    table = [cells for cells in page.rows if cells[1:2] in (["eager"], ["excite"])]
    assert [(cells[0], cells[1]) for cells in table] == [(HOST, "eager"), (ATTENTION, "eager"), (HOST, "excite")]
    # Time with its interval, over the host, and how many times as fast as eager: 1/0.5 (1/0.625 to 1/0.4); twice.
    assert table[0][2:8] == ["40.036.0–48.0", "", "", "32.028.8–38.4", "", ""]
    assert table[1][2:5] == ["50.045.0–60.0", "1.25×1.20–1.31", ""]
    assert table[2][5:8] == ["16.014.4–19.2", "", "2.00×1.60–2.50"]
    assert [cell.strip() for cell in table[0][8:]] == ["640+ 128", "2.0 s", "3e-07"]
    assert f"{ATTENTION} takes 1.25× by eager." in page.text
    assert "ONNX Runtime is not installed): resnet20 onnx fp32, batch 8; resnet20+se onnx fp32, batch 8." in page.text
    assert "no time was left" not in page.text  # the note says it of the whole group
    assert timings["notes"][0] in page.text
    assert "a processor" in page.text
    assert "272 k parameters, 40.8 M MACs at 32 × 32" in page.text


def test_the_chart_has_a_bar_for_each_network_mode_and_setting(timings: dict[str, Any]) -> None:
    (figure,) = Page(bench_page(timings)).figures().values()
    bars = {
        (trace["name"], way): x for trace in figure["data"] for way, x in zip(trace["y"], trace["x"], strict=True)
    }
    assert bars == {
        (f"{HOST}, buffers given back", "eager"): 40, (f"{HOST}, buffers kept", "eager"): 32,
        (f"{ATTENTION}, buffers given back", "eager"): 50, (f"{ATTENTION}, buffers kept", "eager"): 40,
        (f"{HOST}, buffers given back", "excite"): 20, (f"{HOST}, buffers kept", "excite"): 16,
    }  # fmt: skip
    for trace in figure["data"]:
        error = trace["error_x"]
        for x, more, less in zip(trace["x"], error["array"], error["arrayminus"], strict=True):
            assert (x + more, x - less) == pytest.approx((1.2 * x, 0.9 * x), rel=1e-3)
    # Read from the top, eager comes first, and in it the host.
    assert figure["layout"]["yaxis"]["categoryarray"] == ["excite", "eager"]
    assert figure["data"][-1]["name"] == f"{HOST}, buffers given back"


def test_the_terminal_says_the_same(timings: dict[str, Any]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(bench_table(timings))
    text = console.export_text()
    for said in ("40.0", "32.0", "1.25×", "1.20–1.31", "2.00×", "1.60–2.50", "640", "ONNX Runtime is not installed"):
        assert said in text
    assert f"{ATTENTION} takes 1.25× by eager." in text
    alone = copy.deepcopy(timings)
    alone["settings"]["allocator"] = ["kept"]
    alone["rows"] = [one for one in alone["rows"] if one["allocator"] != "system"]
    console.print(bench_table(alone))
    text = console.export_text()
    assert "32.0" in text
    assert "40.0 " in text  # the other network's, kept
    assert "50.0" not in text


def test_a_page_of_failures_alone_and_foreign_names(timings: dict[str, Any]) -> None:
    timings["rows"] = [one | {"reason": HOSTILE} for one in timings["rows"] if one["status"] != "timed"]
    timings["summary"] = []
    page = Page(bench_page(timings))
    assert page.find("img") == []
    assert not page.find("div", role="img")
    assert HOSTILE.split("'")[0][:9] in page.text


def test_a_browser_draws_it(timings: dict[str, Any], tmp_path: Path) -> None:
    timings["environment"]["cpu"] = HOSTILE
    dom, log = opened(bench_page(timings), tmp_path)
    assert complaints(log) == []
    assert 'data-charts="drawn"' in dom
    assert len(re.findall(r'class="point"', dom)) == 6
    assert "<title>owned" not in dom

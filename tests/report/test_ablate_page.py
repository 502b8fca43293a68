from __future__ import annotations

import html
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_compare_page import HOSTILE, Page, complaints, opened

from excite.report.ablate import ablate_page
from excite.report.ablate_table import ablate_table

MEASURED = {
    "latency_ms": 2.5, "latency_ratio": 1.25, "latency_ratio_ci95": [1.2, 1.3], "throughput": 1500.0,
    "train_seconds": 42.0, "start_score": None, "start_scores": None, "group": 0, "same_as": None,
}  # fmt: skip


def row(setting: dict[str, str], score: float, difference: float | None, p: float | None = None, **more) -> dict:
    """One row; the host is the one without a difference."""
    is_host = difference is None
    name = ", ".join([*(f"{key}={value}" for key, value in setting.items()), *(["original"] if is_host else [])])
    found = {
        "spec": "resnet20" if is_host else f"resnet20+se:{name}".replace(", ", ","), "label": name,
        "role": "baseline" if is_host else "contender", "setting": setting, "original": is_host,
        "score": score, "score_ci95": [score - 0.4, score + 0.5], "scores": [score - 0.1, score, score + 0.1],
        "difference": difference, "difference_ci95": None if is_host else [difference - 0.3, difference + 0.3],
        "p_holm": p, "parameters": 270_000 + round(1000 * score), "macs": 40_800_000, "mebibytes": 1.04,
        "metrics": {"top-1 error": {"mean": score, "std": 0.1}, "top-5 error": {"mean": score / 9, "std": 0.02}},
        "runs": [f"runs/{name}/{seed}" for seed in range(3)],
    }  # fmt: skip
    return MEASURED | found | more


def ablation(rows: list[dict[str, Any]], grid: dict[str, list[str]]) -> dict[str, Any]:
    settings = [item["label"] for item in rows if not item["original"] and not item["same_as"]]
    pairs = [
        {"one": one, "other": other, "difference": 0.2, "difference_ci95": [-0.2, 0.6], "p_holm": 0.4}
        for one, other in combinations(settings, 2)
    ]
    return {
        "network": "resnet20+se", "host": "resnet20", "grid": grid, "data": "digits", "seeds": [0, 1, 2],
        "metric": {"name": "top-1 error", "unit": "%", "higher_is_better": False}, "weights": None,
        "summary": "reduction=8 has the lowest top-1 error, 3.50 %. No difference is shown.", "rows": rows,
        "between": pairs, "samples": "images", "count": 1450, "epochs": 12, "comparisons": ["."],
        "recipe": {"data": {"path": "digits"}, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}},
        "environment": {"cpu": "a processor", "torch": "2.14.1"}, "notes": ["One broken image was skipped."],
    }  # fmt: skip


@pytest.fixture
def ratios() -> dict[str, Any]:
    """Four reductions, the last of which makes the network of the one before, beside the host."""
    rows = [
        row({}, 4.5, None, latency_ms=2.0, latency_ratio=None, latency_ratio_ci95=None),
        row({"reduction": "4"}, 3.75, -0.75, 0.02),
        row({"reduction": "8"}, 3.5, -1.0, 0.004),
        row({"reduction": "16"}, 4.75, 0.25, 0.4),
        row({"reduction": "32"}, 4.75, 0.25, 0.4, same_as="reduction=16"),
    ]
    return ablation(rows, {"reduction": ["4", "8", "16", "32"]})


@pytest.fixture
def rates() -> dict[str, Any]:
    """Host and network under each of three learning rates."""
    rows = []
    for group, rate in enumerate(("0.01", "0.1", "0.2")):
        rows.append(row({"optimizer.lr": rate}, 5.0 + group, None, group=group))
        rows.append(row({"optimizer.lr": rate}, 4.0 + group, -1.0, 0.01, group=group))
    return ablation(rows, {"optimizer.lr": ["0.01", "0.1", "0.2"]})


def body(page: Page, first: str) -> list[list[str]]:
    """The rows of the table whose header begins so, each cell's text on one line."""
    start = next(i for i, cells in enumerate(page.rows) if cells and cells[0].strip() == first)
    found = []
    for cells in page.rows[start:]:
        if len(cells) != len(page.rows[start]):
            break
        found.append([" ".join(cell.split()) for cell in cells])
    return found


def test_the_table_has_the_shape_of_the_papers(ratios: dict[str, Any]) -> None:
    text = ablate_page(ratios)
    page = Page(text)
    assert page.open == []
    assert len(text.encode()) < 10_000_000
    head, *rows = body(page, "reduction")
    assert head[:5] == ["reduction", "top-1 error ↓ (%)", "top-5 error ↓ (%)", "parameters", "MACs"]
    assert [cells[0] for cells in rows] == ["original", "4", "8", "16", "32the same network as reduction=16"]
    original, four = rows[:2]
    assert original[1:5] == ["4.504.10 to 5.00", "0.50 ± 0.02", "274 k", "40.8 M"]
    assert original[-2:] == ["", ""]
    assert four[1] == "3.753.35 to 4.25"
    assert four[-2:] == ["−0.75−1.05 to −0.45", "betterp = 0.020, Holm"]
    assert rows[3][-1].startswith("no difference shown")
    for said in (
        "3.50\u00a0%",
        "One broken image was skipped.",
        "1,450",
        "runs/reduction=8/2",
        "[0.9, 0.99]",
        "2.14.1",
    ):
        assert said in "".join(page.words), said
    assert page.find("h1")
    (heading,) = re.findall(r"<h1[^>]*>([^<]*)</h1>", text)
    assert heading == "reduction=8 has the lowest top-1 error, 3.50\u00a0%."


def test_nothing_is_loaded_and_the_page_can_be_read_without_sight(ratios: dict[str, Any]) -> None:
    page = Page(ablate_page(ratios))
    for tag, attrs in page.elements:
        assert tag not in ("link", "base", "iframe", "object", "embed", "img", "image", "source")
        assert not {"src", "srcset", "href", "xlink:href", "action"} & set(attrs), (tag, attrs)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs["aria-labelledby"] in ids for _, attrs in page.elements if "aria-labelledby" in attrs)
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.find("th"))
    assert all(attrs["aria-label"] for _, attrs in page.elements if attrs.get("role") == "img")


def marks(figure: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Where the mean of each row stands."""
    return {trace["name"]: (trace["x"][0], trace["y"][0]) for trace in figure["data"] if "error_y" in trace}


def test_points_stand_over_their_values_and_costs(ratios: dict[str, Any]) -> None:
    figures = Page(ablate_page(ratios)).figures()
    assert set(figures) == {"cost-value", "cost-parameters", "cost-macs", "cost-latency"}
    value = figures["cost-value"]
    assert marks(value) == {
        "reduction=4": (2, 3.75), "reduction=8": (3, 3.5), "reduction=16": (4, 4.75), "reduction=32": (5, 4.75),
    }  # fmt: skip
    axis = value["layout"]["xaxis"]
    assert dict(zip(axis["ticktext"], axis["tickvals"], strict=True)) == {"4": 2, "8": 3, "16": 4, "32": 5}
    across = next(trace for trace in value["data"] if trace.get("name") == "original")
    assert across["y"] == [4.5, 4.5]
    assert across["x"] == axis["range"]
    shade = next(trace for trace in value["data"] if trace.get("fill") == "toself")
    assert sorted(set(shade["y"])) == [4.1, 5.0]
    parameters = marks(figures["cost-parameters"])
    assert parameters["original"] == (274.5, 4.5)
    assert parameters["reduction=8"] == (273.5, 3.5)
    assert "reduction=32" not in parameters  # it would cover its twin
    low, high = figures["cost-parameters"]["layout"]["xaxis"]["range"]
    assert all(low < x < high for x, _ in parameters.values())
    assert marks(figures["cost-latency"])["original"][0] == 2.0


def test_a_line_joins_what_differs_in_the_value_alone(rates: dict[str, Any]) -> None:
    page = Page(ablate_page(rates))
    value = page.figures()["cost-value"]
    lines = {trace["line"]["dash"]: trace["y"] for trace in value["data"] if trace["mode"] == "lines"}
    assert lines == {"dot": [5, 6, 7], "solid": [4, 5, 6]}
    assert all(trace.get("fill") is None for trace in value["data"])
    rows = body(page, "optimizer.lr")
    assert [cells[:2] for cells in rows[1:3]] == [["0.01", "resnet20"], ["0.01", "resnet20+se:optimizer.lr=0.01"]]


def test_values_that_are_no_numbers_stand_side_by_side(ratios: dict[str, Any]) -> None:
    places = ["branch", "before", "after"]
    rows = [ratios["rows"][0], *(row({"where": place}, 4.0, -0.5, 0.1) for place in places)]
    axis = Page(ablate_page(ablation(rows, {"where": places}))).figures()["cost-value"]["layout"]["xaxis"]
    assert axis["ticktext"] == places
    assert axis["tickvals"] == [0, 1, 2]


def test_a_product_of_two_keys(ratios: dict[str, Any]) -> None:
    grid = {"gate": ["sigmoid", "tanh"], "reduction": ["2", "16"]}
    rows = [row({"gate": g, "reduction": r}, 4.0, -0.5, 0.1) for g in grid["gate"] for r in grid["reduction"]]
    page = Page(ablate_page(ablation([ratios["rows"][0], *rows], grid)))
    assert [cells[:2] for cells in body(page, "gate")] == [
        ["gate", "reduction"], ["original", ""], ["sigmoid", "2"], ["sigmoid", "16"], ["tanh", "2"], ["tanh", "16"],
    ]  # fmt: skip
    value = page.figures()["cost-value"]
    assert value["layout"]["xaxis"]["title"]["text"] == "reduction"  # the key that is a number
    at = [x for x, _ in marks(value).values()]
    assert len(set(at)) == 4  # of one value, but side by side
    assert at[0] == pytest.approx(1, abs=0.1)
    assert at[1] == pytest.approx(4, abs=0.1)


def test_one_seed_and_figures_that_are_missing(ratios: dict[str, Any]) -> None:
    for entry in ratios["rows"]:
        entry |= {"score_ci95": None, "difference_ci95": None, "p_holm": None, "scores": entry["scores"][:1]}
    ratios["rows"][1] |= {"latency_ms": None, "latency_ratio": None}
    ratios |= {"seeds": [0], "between": [], "epochs": None}
    page = Page(ablate_page(ratios))
    assert "better" not in "".join(cells[-1] for cells in page.rows)
    assert "Setting against setting" not in page.text
    assert "–" in body(page, "reduction")[2][6]
    assert "nan" not in page.text.lower()


def test_text_from_outside_is_escaped(ratios: dict[str, Any]) -> None:
    ratios["rows"][1] |= {"label": HOSTILE, "spec": HOSTILE, "setting": {"reduction": HOSTILE}}
    ratios["rows"][0] |= {"label": HOSTILE}
    ratios["rows"][4] |= {"same_as": HOSTILE}
    ratios |= {"network": HOSTILE, "host": HOSTILE, "data": HOSTILE, "summary": HOSTILE, "notes": [HOSTILE]}
    ratios |= {"comparisons": [HOSTILE], "grid": {"reduction": [HOSTILE, "8", "16", "32"]}}
    page = Page(ablate_page(ratios))
    assert page.find("img") == []
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert len(page.scripts) == 3
    figures = page.figures()
    assert "<img" not in json.dumps(figures)
    assert figures["cost-value"]["layout"]["xaxis"]["ticktext"][0] == html.escape(HOSTILE)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_on_the_terminal_fits(ratios: dict[str, Any], rates: dict[str, Any], width: int) -> None:
    for result in (ratios, rates):
        console = Console(width=width, color_system=None, force_terminal=True, legacy_windows=False)
        with console.capture() as capture:
            console.print(ablate_table(result))
        lines = capture.get().splitlines()
        assert max(map(len, lines)) <= width
        assert "One broken image was skipped." in " ".join(lines)
        shown = [line.split() for line in lines]
        for entry in result["rows"]:
            (value, *_) = [*entry["setting"].values(), "original"]
            figures = {f"{entry['score']:.2f}"}
            if entry["difference"] is not None:
                figures.add(f"{entry['difference']:+.2f}".replace("-", "−"))
            assert any(words[:1] == [value] and figures <= set(words) for words in shown), (value, figures)
    assert ("latency" in " ".join(lines)) == (width == 200)


def test_browser_draws_the_figure_and_a_click_changes_it(ratios: dict[str, Any], tmp_path: Path) -> None:
    ratios["rows"][1]["label"] = HOSTILE
    actions = """<script>
        const seen = (name, value) => { document.documentElement.dataset[name] = value; };
        const chart = document.getElementById("axis-chart");
        const title = () => chart.querySelector(".xtitle").textContent;
        seen("first", title());
        seen("ticks", [...chart.querySelectorAll(".xtick")].map((tick) => tick.textContent).join());
        document.querySelectorAll(".switch input")[1].click();
        seen("second", title());
        seen("before", chart.querySelectorAll(".trace").length);
        document.querySelector('button[data-series="series-2"]').click();
        seen("after", chart.querySelectorAll(".trace").length);
        seen("wide", document.documentElement.scrollWidth - document.documentElement.clientWidth);
    </script></body>"""
    dom, log = opened(ablate_page(ratios).replace("</body>", actions), tmp_path, "--window-size=390,844")
    assert complaints(log) == []
    root = dict(re.findall(r'data-(\w+)="([^"]*)"', dom.split(">", 2)[1]))
    assert root["first"] == "reduction"
    assert root["ticks"] == "4,8,16,32"
    assert root["second"] == "Parameters (thousands)"
    assert int(root["after"]) == int(root["before"]) - 2  # the mark and its seeds
    assert root["wide"] == "0"  # only the table scrolls sideways
    assert "<title>owned" not in dom

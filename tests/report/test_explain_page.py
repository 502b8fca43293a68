"""The page of an explanation: what it says, what it draws, and that it works in a browser."""

from __future__ import annotations

import base64
import html
import itertools
import json
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chromium import Chromium, chromium
from excite.report import explain_data
from excite.report.explain import explain_page, finding

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">'{{ 7 * 7 }}%{x}<b>&amp;"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VOID = {"meta", "img", "input", "br", "link", "wbr", "base", "source"}


def explained(
    se: int = 9, sk: int = 9, classes: tuple[str, ...] = CLASSES, drawn: int = 50, seed: int = 0
) -> dict[str, Any]:
    """An explanation made up: early units are alike for all classes, late ones are not; attention rises."""
    draw = np.random.default_rng(seed)
    count = len(classes)
    units, gates, kernels = [], [], []
    for kind, number in (("se", se), ("sk", sk)):
        for depth in range(number):
            stage = 1 + 3 * depth // number
            block = depth - -(-(stage - 1) * number // 3)
            units.append(
                {
                    "name": f"layer{stage}.{block}.{kind}", "kind": kind, "depth": len(units),
                    "stage": stage, "size": [64 >> stage] * 2 if kind == "se" else [], "channels": 32 << stage,
                    "kernels": [] if kind == "se" else [{"name": "3×3", "span": 3}, {"name": "5×5", "span": 5}],
                }
            )  # fmt: skip
            late = depth / max(1, number - 1)
            if kind == "se":
                channels = np.linspace(0, (32 << stage) - 1, min(drawn, 32 << stage)).round().astype(int)
                overall = 0.5 + 0.15 * draw.standard_normal(len(channels))
                spread = 0.005 + 0.12 * late**2
                means = np.clip(overall + spread * draw.standard_normal((count, len(channels))), 0, 1)
                share = spread**2 / (spread**2 + 0.04**2)
                gates.append(
                    {
                        "unit": len(units) - 1, "channels": channels.tolist(), "overall": overall.round(6).tolist(),
                        "by_class": {str(index): row for index, row in enumerate(means.round(6).tolist())},
                        "between": spread, "within": 0.04, "class_share": share, "mean": float(overall.mean()),
                        "low": 0.02 * late, "high": 0.4 * late**3, "constant": 0.3 * (1 - late), "range": [0.0, 1.0],
                    }
                )  # fmt: skip
            else:
                rise = 0.06 * (1 - late) - 0.005
                start = -0.08 + 0.05 * draw.standard_normal(count)
                rows = start[:, None] + np.linspace(0, 1, 3) * (rise + 0.01 * draw.standard_normal(count))[:, None]
                overall = rows.mean(0)
                kernels.append(
                    {
                        "unit": len(units) - 1, "small": "3×3", "large": "5×5", "overall": overall.tolist(),
                        "deviation": [0.05] * 3, "by_class": rows.round(6).tolist(),
                        "rise": float(overall[2] - overall[0]),
                        "rise_ci95": [float(overall[2] - overall[0] - 0.004), float(overall[2] - overall[0] + 0.004)],
                    }
                )  # fmt: skip
    asked = ("Are the early units the same for every class?", "Do the late units answer?", "Is the end saturated?")
    answers = (("yes", "Yes: in the first 3 units 2 %."), ("yes", "Yes: 91 %."), ("unclear", "It is unclear: 31 %."))
    return {
        "network": "resnet20+se+sk", "run": "runs/7", "data": "cifar10", "split": "test", "count": 100 * count,
        "classes": list(classes), "counts": [100] * count, "metrics": {"top1": 91.2, "loss": 0.31}, "units": units,
        "excitation": {
            "shown_classes": [0, 3, 5, 8], "units": gates,
            "observations": [
                {"question": question, "answer": answer, "sentence": sentence, "figures": {}}
                for question, (answer, sentence) in zip(asked, answers, strict=True)
            ],
        } if se else None,
        "selection": {
            "scales": [1.0, 1.5, 2.0], "scale_is": "enlargement of the centre", "counts": [100 * count] * 3,
            "units": kernels,
            "observations": [
                {"question": "Does it rise?", "answer": "no", "sentence": "No: it rises in none.", "figures": {}}
            ],
        } if sk else None,
        "recipe": {"seed": 3, "trainer": {"epochs": 12}}, "versions": {"excite": "0.1.0"}, "seconds": 12.3,
        "processes": 1,
    }  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, the text of the page, its scripts and its rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.styles = "", ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        elif self.open[-1:] == ["style"]:
            self.styles += data
        else:
            self.words += data
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", self.words)

    def json(self, name: str) -> Any:
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == name))


def unpacked(unit: dict[str, Any], row: int, count: int) -> list[float | None]:
    """The values of a class from their text: base 64 by another way than the page's own."""
    pairs = [unit["codes"][2 * (row * count + place) :][:2] for place in range(count)]
    numbers = [int.from_bytes(base64.urlsafe_b64decode(f"{pair}AA")) >> 12 for pair in pairs]
    return [None if number == 4095 else unit["low"] + unit["span"] * number / 4094 for number in numbers]


def number(said: str) -> float:
    return float(re.sub(r"[^\d.e-]", "", said.replace("−", "-")))


@pytest.fixture(scope="module")
def both() -> dict[str, Any]:
    return explained()


@pytest.fixture(scope="module")
def page(both: dict[str, Any]) -> Page:
    return Page(explain_page(both))


def test_the_finding_comes_first_then_every_figure_is_said(both: dict[str, Any], page: Page) -> None:
    assert page.open == []
    tags = [tag for tag, _ in page.elements if re.fullmatch(r"h[1-6]|table|figure|svg", tag)]
    assert tags[:2] == ["h1", "h2"]
    assert tags.count("h1") == 1
    assert "resnet20+se+sk treats all classes alike at first and tells them apart later on." in page.text
    for said in ("91.20 %", "1,000", "cifar10, test", "9 SE, 9 SK", "runs/7", "epochs", "0.1.0", "12 s"):
        assert said in page.text, said


def test_tables_hold_the_figures_of_every_unit(both: dict[str, Any], page: Page) -> None:
    rows = [row for row in page.rows if row[0].endswith(".se")]
    assert [row[0] for row in rows] == [unit["name"] for unit in both["units"][:9]]
    for row, entry in zip(rows, both["excitation"]["units"], strict=True):
        said = [number(cell) for cell in row[3:]]
        keys = ("mean", "between", "within", "class_share", "low", "high", "constant")
        wanted = [entry[key] * (1 if key in keys[:3] else 100) for key in keys]
        assert said == pytest.approx(wanted, rel=0.06, abs=6e-4)
    assert rows[0][1:3] == ["32×32", "64"]
    rows = [row for row in page.rows if row[0].endswith(".sk")]
    for row, entry in zip(rows, both["selection"]["units"], strict=True):
        assert row[3] == "3×3 / 5×5"
        assert [number(cell) for cell in row[4:8]] == pytest.approx([*entry["overall"], entry["rise"]], abs=6e-4)


def test_observations_are_answered_once(page: Page) -> None:
    cards = page.text.split("The paper’s three observations, here")[1]
    assert re.search(r"same for every class\? yes In the first 3 units 2\u00a0?\s?%\.", cards)
    assert re.search(r"Is the end saturated\? unclear 31\s%\.", cards)
    assert re.search(r"Does it rise\? no It rises in none\.", cards)


@pytest.mark.parametrize(
    ("early", "late", "end", "said"),
    [
        ("yes", "yes", "yes", "n treats all classes alike at first and tells them apart later on; its last"),
        ("yes", "no", "no", "n treats all classes alike, early and late."),
        ("no", "yes", "no", "n tells classes apart from its first units on, and more so with depth."),
        ("unclear", "unclear", "unclear", "How far the gates of n depend on the class stays unclear."),
    ],
)
def test_finding_on_excitation(early: str, late: str, end: str, said: str) -> None:
    result = explained(sk=0) | {"network": "n"}
    for observed, answer in zip(result["excitation"]["observations"], (early, late, end), strict=True):
        observed["answer"] = answer
    assert finding(result).startswith(said)


@pytest.mark.parametrize(
    ("rises", "said"),
    [
        ([1, 1, 1], "to the larger kernel in all the 3 selective kernels of n."),
        ([1, 1, -1], "to the larger kernel in 2 of the 3 selective kernels of n."),
        ([-1, 0, -1], "to the smaller kernel in 2 of the 3 selective kernels of n."),
        ([0, 0, 0], "In none of the 3 selective kernels of n does the attention go with the size of objects."),
    ],
)
def test_finding_on_selection(rises: list[int], said: str) -> None:
    result = explained(se=0, sk=3) | {"network": "n"}
    for entry, rise in zip(result["selection"]["units"], rises, strict=True):
        entry["rise_ci95"] = [0.1 * rise - 0.01, 0.1 * rise + 0.01]
    assert finding(result).endswith(said)


def test_gates_of_every_class_are_in_the_page(both: dict[str, Any], page: Page) -> None:
    told = page.json("explained")
    assert told["classes"] == list(CLASSES)
    assert told["shown"] == [0, 3, 5, 8]
    shares = [entry["class_share"] for entry in both["excitation"]["units"]]
    assert told["gates"]["first"] == shares.index(max(shares))
    lowest, highest = told["gates"]["range"]
    for unit, entry in zip(told["gates"]["units"], both["excitation"]["units"], strict=True):
        assert unit["channels"] == entry["channels"]
        for row in range(10):
            wanted = entry["by_class"][str(row)]
            assert unpacked(unit, row, len(wanted)) == pytest.approx(wanted, abs=unit["span"] / 8000)
            assert lowest < min(wanted) <= max(wanted) < highest
    for unit, entry in zip(told["selection"]["units"], both["selection"]["units"], strict=True):
        for row in range(10):
            assert unpacked(unit, row, 3) == pytest.approx(entry["by_class"][row], abs=unit["span"] / 8000)


def test_packing_tells_missing_values_from_the_highest() -> None:
    unit = explain_data.packed([[0.25, None, 0.75], [float("nan"), 0.5, 0.25]])
    assert [value is None for row in (0, 1) for value in unpacked(unit, row, 3)] == [0, 1, 0, 1, 0, 0]
    assert unpacked(unit, 0, 3)[::2] == [0.25, 0.75]
    assert unpacked(explain_data.packed([[0.3, 0.3]]), 0, 2) == [0.3, 0.3]


def test_panels_stand_where_the_values_say(both: dict[str, Any]) -> None:
    text = explain_page(both)
    panels = re.findall(r'<svg viewBox="0 0 200 80".*?</svg>', text, re.S)
    assert len(panels) == 18
    low, high = Page(text).json("explained")["gates"]["range"]
    for panel, entry in zip(panels, both["excitation"]["units"], strict=False):
        order = np.argsort(entry["overall"])
        lines = re.findall(r'class="([\w-]+)" d="M([^"]+)"', panel)
        assert [name for name, _ in lines] == ["series-1", "series-2", "series-3", "series-4", "overall"]
        for (_, line), row in zip(
            lines, [*(entry["by_class"][key] for key in "0358"), entry["overall"]], strict=True
        ):
            points = np.array([[float(part) for part in point.split()] for point in line.split("L")])
            values = high - points[:, 1] / 80 * (high - low)
            assert values == pytest.approx(np.array(row)[order], abs=0.06 * (high - low) / 80)
            assert (np.diff(points[:, 0]) > 0).all()


def test_depth_figures_hold_the_figures_in_order(both: dict[str, Any], page: Page) -> None:
    figures = page.json("figures")
    gates, kernels = both["excitation"]["units"], both["selection"]["units"]
    for name, keys, factor in (
        ("share", ["class_share"], 100), ("spread", ["between", "within"], 1), ("saturation", ["low", "high"], 100),
        ("constant", ["constant"], 100),
    ):  # fmt: skip
        for trace, key in zip(figures[name]["data"], keys, strict=True):
            assert trace["y"] == pytest.approx([factor * entry[key] for entry in gates], rel=1e-4)
            assert "layer1.0.se" in trace["customdata"][0]
            assert len(set(trace["x"])) == 9
    for place, trace in enumerate(figures["scales"]["data"]):
        assert trace["y"] == pytest.approx([entry["overall"][place] for entry in kernels], rel=1e-4)
    rise = figures["rise"]["data"][0]
    ends = [(y - down, y + up) for y, down, up in
            zip(rise["y"], rise["error_y"]["arrayminus"], rise["error_y"]["array"], strict=True)]  # fmt: skip
    assert np.array(ends) == pytest.approx(np.array([entry["rise_ci95"] for entry in kernels]), abs=1e-5)
    assert [note["text"] for note in figures["share"]["layout"]["annotations"]] == ["stage 1", "2", "3"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["layer1.0.se", "layer2.1.se"], ["1.0", "2.1"]),
        (["features.1.block.1", "features.4.block.2"], ["1.1", "4.2"]),
        (["blocks.0.se", "blocks.1.0.se"], ["0", "1.0"]),
        (["one"], ["one"]),
        ([""], ["network"]),
        (["a.se", "b.se"], ["a", "b"]),
        (["a", "a.se"], ["a", "a.se"]),
    ],
)
def test_labels_are_short_and_tell_units_apart(names: list[str], wanted: list[str]) -> None:
    assert explain_data.labels([{"name": name} for name in names]) == wanted


def test_labels_of_made_up_names_tell_units_apart() -> None:
    draw = random.Random(1)
    for _ in range(300):
        parts = ["layer1", "layer2", "0", "1", "se", "x3"]
        names = list({".".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 6))})
        labels = explain_data.labels([{"name": name} for name in names])
        assert len(set(labels)) == len(names), (names, labels)
        assert all(labels)


def test_nothing_is_loaded_and_text_from_outside_stays_text() -> None:
    result = explained(classes=(HOSTILE, *CLASSES[1:]))
    result |= {"network": HOSTILE, "data": HOSTILE, "run": HOSTILE, "recipe": {HOSTILE: {HOSTILE: HOSTILE}}}
    result["versions"] = {HOSTILE: HOSTILE}
    result["units"][0]["name"] = HOSTILE
    result["excitation"]["observations"][0] |= {"question": HOSTILE, "sentence": HOSTILE}
    result["selection"]["units"][0] |= {"small": HOSTILE, "large": HOSTILE}
    page = Page(explain_page(result))
    assert page.open == []
    for tag, attrs in page.elements:
        assert tag not in ("link", "base", "iframe", "object", "embed", "img", "image", "video", "audio", "source")
        assert not {"src", "srcset", "href", "xlink:href", "poster", "data", "action"} & set(attrs), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"@import|url\(", page.styles)
    policy = next(attrs for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])
    assert len(page.scripts) == 5
    assert page.text.count(HOSTILE) >= 9
    for trace in (page.json("figures")["share"]["data"][0], page.json("figures")["scales"]["data"][0]):
        said = json.dumps([trace["x"], trace["customdata"]])
        assert "<img" not in said
        assert "%{" not in said
    assert html.escape(HOSTILE).replace("%", "&#37;") in page.json("figures")["share"]["data"][0]["customdata"][0]


def test_data_of_a_path_are_called_by_its_last_part() -> None:
    text = Page(explain_page(explained(sk=0) | {"data": "/data/sets/cifar10-test.tar"})).text
    assert "cifar10-test.tar, test" in text
    assert text.count("/data/sets/cifar10-test.tar") == 1  # in the environment
    assert "learned on cifar10-test.tar" in text


def test_one_kind_of_unit_alone_makes_a_page() -> None:
    gates, kernels = Page(explain_page(explained(sk=0))), Page(explain_page(explained(se=0)))
    assert "kernel" not in gates.text
    assert set(gates.json("figures")) == {"share", "spread", "saturation", "constant"}
    assert "gate" not in kernels.text.lower()
    assert set(kernels.json("figures")) == {"scales", "rise"}


def test_true_sizes_of_objects_are_said() -> None:
    result = explained(se=0)
    result["selection"] |= {"scale_is": "size of the object", "scales": [0.632, 1.0, 1.58], "counts": [150, 140, 160]}
    text = Page(explain_page(result)).text
    assert "true size of the object" in text
    assert "150 at 0.632×, 140 at 1×, 160 at 1.58×" in text
    assert "enlarged" not in text


def test_what_is_missing_leaves_gaps() -> None:
    result = explained(se=1, sk=1) | {"recipe": None, "run": None, "metrics": {}}
    result["counts"][2] = 0  # no image of the class
    result["excitation"]["units"][0]["by_class"]["2"] = [None] * 50
    result["excitation"]["units"][0] |= {"class_share": float("nan"), "high": None}
    result["selection"]["units"][0]["by_class"][2] = [None] * 3
    result["selection"]["units"][0]["by_class"][4] = [0.1, None, 0.2]
    result["selection"] |= {"scales": [1.0, 1.5, 2.0]}
    page = Page(explain_page(result))
    assert "nan" not in page.text.lower()
    assert "NaN" not in json.dumps([page.json("figures"), page.json("explained")])
    assert "bird" not in page.json("explained")["classes"]
    assert "bird" not in page.text
    lone = explained(se=0, sk=2)
    lone["selection"]["scales"] = [1.0]
    for entry in lone["selection"]["units"]:
        entry |= {"overall": entry["overall"][:1], "by_class": [row[:1] for row in entry["by_class"]], "rise": 0.0}
        entry["rise_ci95"] = [0.0, 0.0]
    assert set(Page(explain_page(lone)).json("figures")) == {"scales"}


def test_a_thousand_classes_can_be_chosen_from() -> None:
    names = tuple(f"class {index}" for index in range(1000))
    text = explain_page(explained(se=16, sk=16, classes=names))
    assert len(text.encode()) < 10_000_000
    page = Page(text)
    told = page.json("explained")
    assert told["classes"] == list(names)
    assert [len(unit["channels"]) for unit in told["gates"]["units"]] == [50] * 16
    chips = [attrs["data-row"] for tag, attrs in page.elements if tag == "button" and "data-row" in attrs]
    assert chips == ["0", "3", "5", "8"] * 2  # those that are drawn, for either kind of unit
    assert "Find one of 1,000 classes" in text


def test_of_too_many_units_channels_are_left_out_then_classes() -> None:
    names = tuple(f"c{index}" for index in range(1000))
    deep = explained(se=61, sk=0, classes=names)
    text = explain_page(deep)
    assert len(text.encode()) < 10_000_000
    told = Page(text).json("explained")
    assert len(told["classes"]) == 1000
    assert told["gates"]["units"][0]["channels"] == deep["excitation"]["units"][0]["channels"][::2]
    chosen = explain_data.choice(deep | {"counts": [1] * 21_000})
    assert 1000 < len(chosen.classes) < 21_000
    assert set(chosen.shown) == {0, 3, 5, 8} <= set(chosen.classes)
    assert max(np.diff(chosen.classes)) < 3 * 21_000 / len(chosen.classes)  # the others from all over
    assert 61 * 25 * 2 * len(chosen.classes) < 4_100_000


def test_page_can_be_read_without_sight(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.elements:
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids
        if attrs.get("role") == "img":
            assert attrs["aria-label"]
        if tag == "th":
            assert attrs["scope"] in ("col", "row")
        if tag == "svg":
            assert attrs["aria-hidden"] == "true"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    spoken = [str(attrs["aria-label"]) for _, attrs in page.elements if attrs.get("role") == "img"]
    assert any(re.search(r"Class share .*% in the first unit, .*% in the last", one) for one in spoken)


# ------------------------------------------------------------------------------------------ in a real browser

READY = "document.documentElement.dataset.charts === 'drawn'"
GATES = "document.querySelector('[data-figure=\"gates\"]')"


def written(result: dict[str, Any], folder: Path) -> str:
    path = folder / "explain.html"
    path.write_text(explain_page(result), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(both: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A browser that shows the page of both kinds of units; it takes a while to start."""
    folder = tmp_path_factory.mktemp("browser")
    with chromium(folder) as browser:
        browser.open(written(both, folder))
        browser.wait(READY)
        yield browser


def resize(browser: Chromium, width: int) -> None:
    browser.ask(
        "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
    )
    browser.wait(
        f"Math.max(...[...document.querySelectorAll('.chart svg.main-svg')].map((e) => e.clientWidth)) < {width}"
    )


def test_clicks_choose_unit_class_order_and_scale(both: dict[str, Any], browser: Chromium) -> None:
    entries = both["excitation"]["units"]

    def drawn() -> dict[str, list[float]]:
        traces = browser.run(f"{GATES}.data.map((trace) => [trace.name, trace.x, trace.y])")
        return {name: dict(zip(x, y, strict=True)) for name, x, y in traces}

    def wanted(unit: int, row: int | None) -> dict[str, float]:
        entry = entries[unit]
        values = entry["overall"] if row is None else entry["by_class"][str(row)]
        return dict(zip(map(str, entry["channels"]), values, strict=True))

    first = drawn()
    assert list(first) == ["all classes", "airplane", "cat", "dog", "ship"]
    assert first["cat"] == pytest.approx(wanted(8, 3), abs=1e-3)
    assert list(first["all classes"].values()) == sorted(first["all classes"].values())

    browser.click('[name="gates-unit"][value="4"] + .face')
    assert drawn()["cat"] == pytest.approx(wanted(4, 3), abs=1e-3)
    assert browser.run("document.getElementById('gates-name').textContent") == both["units"][4]["name"]

    lines = "document.querySelectorAll('[data-chooses=\"gates\"] svg')[2].querySelectorAll('path').length"
    assert browser.run(lines) == 5
    browser.click('.chips [data-row="6"]')
    browser.click('.chips [data-row="0"]')
    now = drawn()
    assert set(now) == {"all classes", "cat", "dog", "ship", "frog"}
    assert now["frog"] == pytest.approx(wanted(4, 6), abs=1e-3)
    assert browser.run(lines) == 5
    pressed = "[...document.querySelectorAll('.chips [aria-pressed=\"true\"]')].map((b) => b.textContent)"
    assert browser.run(pressed) == ["cat", "dog", "frog", "ship"]

    browser.click('[name="gates-order"][value="index"] + span')
    assert list(drawn()["cat"]) == list(map(str, entries[4]["channels"]))
    browser.click('[name="gates-values"][value="difference"] + span')
    cat = drawn()["cat"]
    overall = wanted(4, None)
    assert cat == pytest.approx({key: value - overall[key] for key, value in wanted(4, 3).items()}, abs=1e-3)

    kernels = "document.querySelector('[data-figure=\"kernels\"]')"
    rows = f"{kernels}.data.slice(1).map((trace) => trace.x)"
    browser.click('[name="kernels-unit"][value="1"] + .face')
    values = np.array(both["selection"]["units"][1]["by_class"])
    order = np.argsort(values[:, 2] - values[:, 0])
    assert np.array(browser.run(rows)) == pytest.approx(values[order].T, abs=1e-4)
    assert browser.run(f"{kernels}.layout.yaxis.ticktext.at(-1)") == CLASSES[order[-1]]
    visible = f"{kernels}.data.map((trace) => trace.visible)"
    browser.click('[data-series="scale-1"]')
    assert browser.run(visible) == [True, True, False, True]

    browser.move('[data-figure="gates"] .nsewdrag')
    browser.wait(f"{GATES}.querySelector('.hoverlayer text')")
    hover = browser.run(f"{GATES}.querySelector('.hoverlayer').textContent")
    assert both["units"][4]["name"] in hover
    assert "channel" in hover
    assert "frog" in hover
    assert browser.problems == []
    assert [address.split(":")[0] for address in browser.requested] == ["file"]


def test_the_page_fits_a_phone(browser: Chromium) -> None:
    resize(browser, 390)
    assert browser.run("document.documentElement.scrollWidth") == 390
    resize(browser, 1200)
    assert browser.problems == []


def test_dark_and_print(browser: Chromium) -> None:
    line, ink = f"{GATES}.querySelector('.js-line').style.stroke", "getComputedStyle(document.body).color"
    light = browser.run(line)
    assert light == browser.run(ink)
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.wait(f"{line} !== '{light}'")
    assert browser.run(line) == browser.run(ink)
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(line) == light
    assert browser.run("document.querySelectorAll('details:not([open])').length") == 0
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(line) == browser.run(ink) != light
    assert browser.problems == []


def test_of_many_classes_one_is_looked_for(browser: Chromium, tmp_path: Path) -> None:
    names = (*(f"class {index}" for index in range(99)), HOSTILE)
    browser.open(written(explained(se=61, sk=3, classes=names), tmp_path), width=390, height=844)
    browser.wait(READY)
    assert browser.run("document.documentElement.scrollWidth") == 390
    found = "[...document.querySelector('.found').children].map((item) => item.textContent)"
    browser.click(".find input")
    browser.ask("Input.insertText", text="CLASS 7")
    assert browser.run(found)[:2] == ["class 7", "class 70"]
    browser.click(".found li:nth-child(2) button")
    assert browser.run(f"{GATES}.data.at(-1).name") == "class 70"
    assert "class 70" not in browser.run(found)
    # The rows of the selective kernels follow the same choice.
    assert browser.run("document.querySelector('[data-figure=\"kernels\"]').data[1].x.length") == 5
    browser.run("document.querySelector('.find input').select()")
    browser.ask("Input.insertText", text="img")
    browser.click(".found button")
    assert browser.run("document.querySelector('.chips li:last-child').textContent") == HOSTILE
    assert "<img" not in browser.run(f"{GATES}.data.at(-1).name")
    browser.click('.chips [data-row="70"]')
    assert browser.run("document.querySelectorAll('.chips')[1].textContent.includes('class 70')") is False
    assert browser.run("document.title") != "owned"
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert browser.problems == []

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from excite.report.compare import compare_page

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">'{{ 7 * 7 }}%{x}<b>&amp;"
VOID = {"meta", "img", "input", "br", "link", "wbr", "base", "source"}


class Page(HTMLParser):
    """The page as a reader gets it: elements with their attributes and text, scripts and styles apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles = ""
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
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        elif self.open[-1:] == ["style"]:
            self.styles += data
        else:
            self.words.append(data)
            if "td" in self.open or ("th" in self.open and "tr" in self.open):
                self.rows[-1][-1] += data

    def find(self, tag: str, **attrs: str) -> list[dict[str, str | None]]:
        return [have for name, have in self.elements if name == tag and attrs.items() <= have.items()]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def figures(self) -> dict[str, Any]:
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "figures"))


def test_page_is_well_formed_and_small_and_says_every_figure(result: dict[str, Any], curves: dict[str, Any]) -> None:
    text = compare_page(result, curves)
    page = Page(text)
    assert page.open == []
    assert len(text.encode()) < 10_000_000
    for said in (
        result["verdict"], "resnet20+se", "resnet20:width=1.25", "96.20", "95.50 to 96.90", "+1.20", "+0.40 to +2.00",
        "p = 0.012", "−0.70 to +0.90", "better", "no difference shown", "276 k", "40.9 M", "2.50 ms", "1.25×",
        "1.20 to 1.30", "1,511", "48 s", "runs/se/2", "96.40", "One broken image was skipped.", "1,450", "nesterov",
        "augment.crop", "[4, 4]", "a processor",
    ):  # fmt: skip
        assert said in page.text, said


def test_the_score_at_the_start_is_a_column_where_there_are_weights(
    tuned: dict[str, Any], curves: dict[str, Any]
) -> None:
    page = Page(compare_page(tuned, curves))
    assert page.open == []
    assert "resnet20.th" in page.text
    assert "somewhere" not in page.text
    intervals = page.rows[:5]
    assert [row[1].strip() for row in intervals[:1]] == ["At the start (%)"]
    assert ["12.50" in intervals[1][1], "7.75" in intervals[2][1], "100.00" in intervals[3][1]] == [True] * 3
    assert len({len(row) for row in intervals}) == 1, "header, body and axis have the same columns"
    runs = [row for row in page.rows if row[-1].startswith("runs/")]
    assert [row[2] for row in runs[:3]] == ["12.00", "12.50", "13.00"]
    assert [row[3] for row in runs[:3]] == ["94.90", "95.00", "95.10"]
    for entry in tuned["results"]:
        entry |= {"start_score": None, "start_scores": None}
    plain = Page(compare_page(tuned | {"weights": None}, curves))
    assert "t the start" not in plain.text
    assert [len(row) for row in plain.rows[:5]] == [len(intervals[0]) - 1] * 5


def test_verdict_comes_first(result: dict[str, Any], curves: dict[str, Any]) -> None:
    page = Page(compare_page(result, curves))
    headings = [tag for tag, _ in page.elements if re.fullmatch(r"h[1-6]|table|figure", tag)]
    assert headings[:3] == ["h1", "h2", "table"]
    assert headings.count("h1") == 1


def test_nothing_is_loaded(result: dict[str, Any], curves: dict[str, Any]) -> None:
    page = Page(compare_page(result, curves))
    for tag, attrs in page.elements:
        assert tag not in ("link", "base", "iframe", "object", "embed", "img", "image", "video", "audio", "source"), (
            tag
        )
        assert not {"src", "srcset", "href", "xlink:href", "poster", "data", "action"} & set(attrs), (tag, attrs)
    assert not re.search(r"@import|url\(", page.styles)
    policy = page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_plotly_is_inlined_once_and_not_at_all_without_charts(result: dict[str, Any], curves: dict[str, Any]) -> None:
    assert sum(len(text) > 1_000_000 for _, text in Page(compare_page(result, curves)).scripts) == 1
    result["results"] = result["results"][:1]
    page = Page(compare_page(result, {}))
    assert page.scripts == []


def test_intervals_and_seeds_stand_where_the_axis_says(result: dict[str, Any], curves: dict[str, Any]) -> None:
    text = compare_page(result, curves)
    axis = re.search(r'<svg class="axis".*?</svg>', text, re.S)
    assert axis
    ticks = re.findall(r'<text x="([-\d.]+)%"[^>]*>([^<]+)<', axis[0])
    assert len(ticks) >= 3
    (left, low), *_, (right, high) = [(float(x), float(said.replace("−", "-"))) for x, said in ticks]

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    tracks = re.findall(r'<svg class="track.*?aria-label="([^"]*)">(.*?)</svg></td>', text, re.S)
    assert len(tracks) == 3
    for (spoken, track), entry in zip(tracks, result["results"], strict=True):
        assert entry["spec"] in html.unescape(spoken)
        zero = re.search(r'class="zero" x1="([-\d.]+)%"', track)
        assert zero
        assert float(zero[1]) == pytest.approx(place(0), abs=0.01)
        if entry["role"] == "baseline":
            assert 'class="interval"' not in track
            continue
        ends = re.search(r'class="interval" x1="([-\d.]+)%" x2="([-\d.]+)%"', track)
        assert ends
        assert [float(end) for end in ends.groups()] == pytest.approx(
            [place(bound) for bound in entry["difference_ci95"]], abs=0.01
        )
        mean = re.search(r'class="mean" x="([-\d.]+)%"', track)
        assert mean
        assert float(mean[1]) == pytest.approx(place(entry["difference"]), abs=0.01)
        seeds = [float(x) for x in re.findall(r'class="seed" cx="([-\d.]+)%"', track)]
        paired = [mine - base for mine, base in zip(entry["scores"], [94.9, 95.0, 95.1], strict=True)]
        assert seeds == pytest.approx([place(value) for value in paired], abs=0.01)


def test_curves_hold_the_mean_and_every_seed(result: dict[str, Any], curves: dict[str, Any]) -> None:
    curves["resnet20+se"][1]["train_loss"][1] = float("nan")  # a seed that has no value there
    figures = Page(compare_page(result, curves)).figures()
    loss = figures["curve-0"]["data"]
    mean = next(trace for trace in loss if trace.get("name") == "resnet20+se")
    assert mean["x"] == [1, 3]  # a mean over fewer seeds would jump: the epoch is left out
    assert mean["y"] == pytest.approx([3.0, 0.5])
    seeds = next(trace for trace in loss if "name" not in trace and trace["legendgroup"] == mean["legendgroup"])
    assert seeds["x"] == [1, 2, 3, None, 1, 3, None, 1, 2, 3, None]
    assert seeds["y"] == [2.0, 1.0, 0.5, None, 3.0, 0.5, None, 4.0, 1.0, 0.5, None]


def test_the_cost_scatter_holds_scores_against_latency_and_macs(
    result: dict[str, Any], curves: dict[str, Any]
) -> None:
    figures = Page(compare_page(result, curves)).figures()
    for name, xs in (("cost-latency", [2.0, 2.5, 2.6]), ("cost-macs", [40.813184, 40.871, 63.3])):
        points = [trace for trace in figures[name]["data"] if "error_y" in trace]
        assert [point["name"] for point in points] == ["resnet20", "resnet20+se", "resnet20:width=1.25"]
        assert [point["x"][0] for point in points] == pytest.approx(xs)
        assert [point["y"][0] for point in points] == [95.0, 96.2, 95.1]
        lows = [point["y"][0] - point["error_y"]["arrayminus"][0] for point in points]
        highs = [point["y"][0] + point["error_y"]["array"][0] for point in points]
        assert lows == pytest.approx([94.0, 95.5, 94.5])
        assert highs == pytest.approx([96.0, 96.9, 95.7])
        low, high = figures[name]["layout"]["xaxis"]["range"]
        assert low < min(xs) < max(xs) < high


def test_text_from_outside_is_escaped(result: dict[str, Any], curves: dict[str, Any]) -> None:
    curves[HOSTILE] = curves.pop("resnet20+se")
    result["results"][1] |= {"spec": HOSTILE, "runs": [HOSTILE] * 3}
    result |= {"data": HOSTILE, "verdict": HOSTILE, "notes": [HOSTILE], "baseline": HOSTILE}
    result["recipe"] = {HOSTILE: {HOSTILE: HOSTILE}}
    result["environment"] = {HOSTILE: HOSTILE}
    result["metric"]["name"] = HOSTILE
    page = Page(compare_page(result, curves))
    assert page.find("img") == []
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert len(page.scripts) == 3  # the figures, Plotly and the page's own
    assert page.text.count(HOSTILE) >= 8
    traces = page.figures()["cost-latency"]["data"]
    named = next(trace for trace in traces if "img" in trace.get("name", ""))
    assert named["name"] == html.escape(HOSTILE)  # Plotly reads names as a kind of HTML
    assert "<img" not in json.dumps(traces)
    assert "%{x}" not in named["hovertemplate"]


def test_lower_is_better_turns_the_sides(result: dict[str, Any], curves: dict[str, Any]) -> None:
    assert Page(compare_page(result, curves)).text.find("← worse") >= 0
    result["metric"] = {"name": "loss", "unit": "", "higher_is_better": False}
    page = Page(compare_page(result, curves))
    assert "← better" in page.text
    assert "down and to the left is better" in page.text
    row = next(row for row in page.rows if row and row[0].strip() == "resnet20+se")
    assert "1.2000" in row[3]
    assert "worse" in row[4]


def test_one_network_shows_its_score(result: dict[str, Any], curves: dict[str, Any]) -> None:
    result |= {"results": result["results"][:1], "verdict": ""}
    page = Page(compare_page(result, {"resnet20": curves["resnet20"]}))
    assert "resnet20 on digits" in page.text
    assert "Difference" not in page.text
    assert "94.00 to 96.00" in page.text
    assert set(page.figures()) == {"curve-0", "curve-1"}


def test_one_seed_has_no_interval_and_no_verdict(result: dict[str, Any]) -> None:
    result |= {"seeds": [0], "verdict": ""}
    for entry in result["results"]:
        entry |= {"scores": entry["scores"][:1], "score_ci95": None, "difference_ci95": None, "p_holm": None}
    text = compare_page(result, {})
    page = Page(text)
    assert "No verdict" in page.text
    assert 'class="interval"' not in text
    assert "not judged" in page.text
    assert "no difference shown" not in page.text


def test_figures_that_are_missing_leave_gaps(result: dict[str, Any], curves: dict[str, Any]) -> None:
    nan = float("nan")
    result["results"][1] |= {
        "score": nan, "score_ci95": [nan, nan], "difference": nan, "difference_ci95": [nan, nan], "latency_ms": None,
        "latency_ratio": None, "throughput": None, "scores": [nan, None, 96.0],
    }  # fmt: skip
    del curves["resnet20:width=1.25"]
    result |= {"epochs": None, "count": None}
    page = Page(compare_page(result, curves))
    assert "nan" not in page.text.lower()
    assert "–" in page.text
    assert "NaN" not in json.dumps(page.figures())


def test_twelve_networks(result: dict[str, Any]) -> None:
    one = result["results"][1]
    result["results"][1:] = [one | {"spec": f"resnet20+se:reduction={k}", "macs": 10**k * 41} for k in range(1, 12)]
    text = compare_page(result, {})
    page = Page(text)
    assert all(f"resnet20+se:reduction={k}" in page.text for k in range(1, 12))
    figures = page.figures()
    looks = {
        (trace["marker"]["color"], trace["marker"]["symbol"])
        for trace in figures["cost-macs"]["data"]
        if trace["mode"] == "markers+text"
    }
    assert len(looks) == 12
    assert figures["cost-macs"]["layout"]["xaxis"]["type"] == "log"


def test_page_can_be_read_without_sight(result: dict[str, Any], curves: dict[str, Any]) -> None:
    page = Page(compare_page(result, curves))
    assert page.find("html", lang="en")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.elements:
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids
        if attrs.get("role") == "img":
            assert attrs["aria-label"]
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.find("th"))
    spoken = [attrs["aria-label"] for _, attrs in page.elements if attrs.get("role") == "img"]
    assert "resnet20+se: difference +1.20 points, 95 % interval +0.40 to +2.00; better" in spoken
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(scheme: str) -> None:
    css = resources.files("excite.report").joinpath("templates/page.css").read_text(encoding="utf-8")
    light, dark = css.split("@media screen and (prefers-color-scheme: dark)", 1)
    block = light if scheme == "light" else dark.split("}", 1)[0]
    colors = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block))
    for back in ("--page", "--card"):
        assert contrast(colors["--ink"], colors[back]) >= 7
        for text in ("--soft", "--accent"):
            assert contrast(colors[text], colors[back]) >= 4.5, (text, back)
    for pill in ("--better", "--worse", "--no"):
        assert contrast(colors[pill], colors[pill + "-back"]) >= 4.5, pill
    for k in range(12):
        assert contrast(colors[f"--series-{k}"], colors["--card"]) >= 3, k


# ------------------------------------------------------------------------------------------ in a real browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def opened(page: str, folder: Path, *switches: str) -> tuple[str, str]:
    """The page's DOM after its scripts have run, and what the browser logged."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    path = folder / "compare.html"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr", "--window-size=1200,900", "--virtual-time-budget=8000", *switches,
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    return done.stdout, done.stderr


def complaints(log: str) -> list[str]:
    """Lines of the page's console: errors, and what the content security policy refused."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def test_browser_draws_every_chart_and_runs_no_foreign_script(
    result: dict[str, Any], curves: dict[str, Any], tmp_path: Path
) -> None:
    curves[HOSTILE] = curves.pop("resnet20+se")
    result["results"][1]["spec"] = HOSTILE
    result["verdict"] = HOSTILE
    dom, log = opened(compare_page(result, curves), tmp_path)
    assert complaints(log) == []
    assert 'data-charts="drawn"' in dom
    charts = re.findall(r'class="chart[ "].*?(?=</figure>)', dom, re.S)
    assert len(charts) == 3  # two curves and the scatter
    for chart in charts:
        assert 'class="main-svg"' in chart
        assert chart.count('class="trace scatter') >= 3
    assert "<title>owned" not in dom
    assert "<img" not in dom.split("<script", 1)[0]
    assert "modebar-btn" not in "".join(charts)  # no button that would share the chart with a server


def test_browser_follows_the_dark_scheme_the_switches_and_printing(
    result: dict[str, Any], curves: dict[str, Any], tmp_path: Path
) -> None:
    actions = """<script>
        const seen = (name, value) => { document.documentElement.dataset[name] = value; };
        const scatter = () => document.getElementById("cost-chart");
        seen("first", scatter().querySelector(".xtitle").textContent);
        document.querySelectorAll(".switch input")[1].click();
        seen("second", scatter().querySelector(".xtitle").textContent);
        seen("before", scatter().querySelectorAll(".trace").length);
        document.querySelector('button[data-series="series-1"]').click();
        seen("after", scatter().querySelectorAll(".trace").length);
        seen("pressed", [...document.querySelectorAll('[data-series="series-1"]')].map((b) => b.ariaPressed).join());
        const shade = () => scatter().querySelector(".point").style.fill;
        seen("dark", shade());
        dispatchEvent(new Event("beforeprint"));
        seen("paper", shade());
        seen("opened", document.querySelectorAll("details:not([open])").length);
        dispatchEvent(new Event("afterprint"));
        seen("closed", document.querySelectorAll("details[open]").length);
    </script></body>"""
    page = compare_page(result, curves).replace("</body>", actions)
    dom, log = opened(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert complaints(log) == []
    root = dict(re.findall(r'data-(\w+)="([^"]*)"', dom.split(">", 2)[1]))
    assert root["first"].startswith("Latency")
    assert root["second"].startswith("Multiply–adds")
    assert int(root["after"]) == int(root["before"]) - 2  # the point and its seeds
    assert root["pressed"] == "false,false"  # in both keys
    css = resources.files("excite.report").joinpath("templates/page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r"--series-0: #(\w{6})", css)
    for shade, expected in ((root["dark"], dark), (root["paper"], light)):
        assert shade == f"rgb({', '.join(str(int(expected[i : i + 2], 16)) for i in (0, 2, 4))})"
    assert root["opened"] == "0"
    assert root["closed"] == "0"

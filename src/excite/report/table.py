"""The comparison on the terminal: the verdict and one row per network."""

from __future__ import annotations

import re
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from excite.report import wording

STYLES = {wording.BETTER: "green", wording.WORSE: "red"}


def compare_table(result: dict[str, Any]) -> RenderableType:
    """A comparison for the terminal: the table, and under it the verdict.

    Args:
        result: the content of ``compare.json``.

    Returns:
        Something for ``rich.print``. It fits 80 columns; where there is room every figure has a column of its own.
    """
    parts: list[RenderableType] = [_AdaptiveTable(result)]
    if result["verdict"]:
        parts.append(Panel(Text(result["verdict"], style="bold"), title="Verdict", title_align="left", expand=False))
    return Group(*parts)


class _AdaptiveTable:
    """Chooses the layout when it is drawn, since only the console knows how wide it is."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = _wide(self.result)
        fits = console.measure(wide, options=options.update(width=1000)).maximum <= options.max_width
        yield wide if fits else _narrow(self.result)


def _table(result: dict[str, Any]) -> Table:
    seeds = len(result["seeds"])
    facts = [result["data"], f"{seeds} seed" + ("s" if seeds != 1 else "")]
    if result["epochs"] is not None:
        facts.append(f"{result['epochs']:,} epochs")
    if result["count"] is not None:
        facts.append(f"{result['count']:,} test {result['samples']}")
    title = Text(" · ".join(facts), style="bold")
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _score_title(metric: dict[str, Any]) -> str:
    """The metric, the direction that is better, and the unit."""
    arrow = "↑" if metric["higher_is_better"] else "↓"
    return f"{metric['name']} {arrow}" + (f" ({metric['unit']})" if metric["unit"] else "")


def _difference_title(word: str, metric: dict[str, Any]) -> str:
    unit = wording.difference_unit(metric["unit"])
    return f"{word} ({unit})" if unit else word


def _wide(result: dict[str, Any]) -> Table:
    metric = result["metric"]
    columns = {"spec": "network"}
    if wording.has_starts(result):
        columns |= {"start": "at the start"}
    columns |= {"score": _score_title(metric), "score_interval": "95 % interval"}
    if wording.compares(result):
        columns |= {"difference": _difference_title("difference", metric), "difference_interval": "95 % interval"}
        columns |= {"remark": "shown"}
    columns |= {"parameters": "params", "macs": "MACs", "latency": "latency"}
    columns |= {"ratio": "ratio", "throughput": "images/s", "training": "training"}
    table = _table(result)
    for key, title in columns.items():
        table.add_column(Text(title), justify="left" if key in ("spec", "remark") else "right", no_wrap=True)
    for entry in result["results"]:
        cells = _cells(entry, result)
        table.add_row(*(cells[key] for key in columns))
    return table


def _narrow(result: dict[str, Any]) -> Table:
    """Two lines a network: the figure, and under it its interval or its companion."""
    metric = result["metric"]
    columns = {("spec", "remark"): ("network", "")}
    if wording.has_starts(result):
        columns[("start", "")] = ("at the", "start")
    columns[("score", "score_interval")] = (_score_title(metric), "95 % interval")
    if wording.compares(result):
        columns[("difference", "difference_interval")] = (_difference_title("Δ", metric), "95 % interval")
    columns |= {
        ("parameters", "macs"): ("params", "MACs"),
        ("latency", "ratio"): ("latency", "ratio"),
        ("throughput", "training"): ("images/s", "training"),
    }
    if wording.has_starts(result):  # one column more, and what matters least has to go
        del columns[("throughput", "training")]
    table = _table(result)
    for (key, _), (title, under) in columns.items():
        header = _stack(Text(title), Text(under, style="" if key == "start" else "dim"))
        if key == "spec":
            pieces = [piece for entry in result["results"] for piece in _pieces(entry["spec"])]
            table.add_column(header, overflow="fold", min_width=min(20, max(12, *map(len, pieces))))
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for entry in result["results"]:
        cells = _cells(entry, result)
        cells["spec"] = Text("\n".join(_lines(entry["spec"])), style="bold")
        table.add_row(*(_stack(cells[key], cells[under]) for key, under in columns), end_section=True)
    return table


def _pieces(spec: str) -> list[str]:
    """A spec, taken apart where it may be broken: before a unit, after a colon or comma."""
    return re.split(r"(?=\+)|(?<=[:,])", spec)


def _lines(spec: str, width: int = 18) -> list[str]:
    lines = [""]
    for piece in _pieces(spec):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append(piece)
        else:
            lines[-1] += piece
    return lines


def _stack(above: Text, under: Text) -> Text:
    return Text("\n").join([above, under])


def _cells(entry: dict[str, Any], result: dict[str, Any]) -> dict[str, Text]:
    """Every figure of one row. Text, not markup: a spec's brackets are the user's own."""
    places = wording.decimals(result["metric"]["unit"])
    found = wording.finding(entry, result)
    style = STYLES.get(found, "")
    remark = ", ".join(word for word in (entry["role"].replace("contender", ""), found) if word)
    ratio = difference = difference_interval = ""
    if entry["role"] != "baseline":
        if wording.is_number(entry["latency_ratio"]):
            ratio = f"{wording.fixed(entry['latency_ratio'], 2)}×"
        if entry["difference"] is not None:
            difference = wording.signed(entry["difference"], places)
            difference_interval = wording.interval(entry["difference_ci95"], places, wording.signed)
    return {
        "": Text(),
        "spec": Text(entry["spec"], style="bold"),
        "remark": Text(remark, style=style or "dim"),
        "start": Text(wording.fixed(entry["start_score"], places)),
        "score": Text(wording.fixed(entry["score"], places), style="bold"),
        "score_interval": Text(wording.interval(entry["score_ci95"], places), style="dim"),
        "difference": Text(difference, style=f"bold {style}"),
        "difference_interval": Text(difference_interval, style="dim"),
        "parameters": Text(wording.magnitude(entry["parameters"])),
        "macs": Text(wording.magnitude(entry["macs"])),
        "latency": Text(wording.milliseconds(entry["latency_ms"])),
        "ratio": Text(ratio, style="dim"),
        "throughput": Text(wording.significant(entry["throughput"])),
        "training": Text(wording.duration(entry["train_seconds"]), style="dim"),
    }

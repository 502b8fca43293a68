"""The comparison on the terminal: the verdict and one row per network."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from excite.report import wording

WIDE = 132  # columns from which every figure has a column of its own
STYLES = {wording.BETTER: "green", wording.WORSE: "red"}


def compare_table(result: dict[str, Any]) -> RenderableType:
    """A comparison for the terminal: a table that fits 80 columns and spreads out on wider ones, then the verdict.

    Args:
        result: the content of ``compare.json``.
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
        yield _wide(self.result) if options.max_width >= WIDE else _narrow(self.result)


def _table(result: dict[str, Any]) -> Table:
    seeds = len(result["seeds"])
    title = Text(f"{result['data']} · {seeds} seed" + ("s" if seeds != 1 else ""), style="bold")
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _header(result: dict[str, Any]) -> tuple[Text, Text]:
    """The titles of the score and the difference, with the direction that is better."""
    metric = result["metric"]
    unit, difference = metric["unit"], wording.difference_unit(metric["unit"])
    arrow = "↑" if metric["higher_is_better"] else "↓"
    score = f"{metric['name']} {arrow}" + (f" ({unit})" if unit else "")
    return Text(score), Text("difference" + (f" ({difference})" if difference else ""))


def _wide(result: dict[str, Any]) -> Table:
    table = _table(result)
    score, difference = _header(result)
    table.add_column("network", overflow="fold")
    for title in (score, "95 % interval", difference, "95 % interval", "shown"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("params", "MACs", "latency", "ratio", "images/s", "training"):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in result["results"]:
        cells = _cells(entry, result)
        table.add_row(
            cells["spec"], cells["score"], cells["score_interval"], cells["difference"], cells["difference_interval"],
            cells["finding"], cells["parameters"], cells["macs"], cells["latency"], cells["ratio"],
            cells["throughput"], cells["training"],
        )  # fmt: skip
    return table


def _narrow(result: dict[str, Any]) -> Table:
    """Two lines a network: the figure, and under it its interval or its companion."""
    table = _table(result)
    score, difference = _header(result)
    table.add_column("network", overflow="fold")
    for title, under in (
        (score, "95 % interval"),
        (difference, "95 % interval"),
        (Text("params"), "MACs"),
        (Text("latency"), "ratio"),
        (Text("images/s"), "training"),
    ):
        table.add_column(_stack(title, Text(under, style="dim")), justify="right", no_wrap=True)
    for entry in result["results"]:
        cells = _cells(entry, result)
        table.add_row(
            _stack(cells["spec"], cells["role"]),
            _stack(cells["score"], cells["score_interval"]),
            _stack(cells["difference"], cells["difference_interval"]),
            _stack(cells["parameters"], cells["macs"]),
            _stack(cells["latency"], cells["ratio"]),
            _stack(cells["throughput"], cells["training"]),
            end_section=entry is not result["results"][-1],
        )
    return table


def _stack(above: Text, under: Text) -> Text:
    return Text("\n").join([above, under])


def _cells(entry: dict[str, Any], result: dict[str, Any]) -> dict[str, Text]:
    """Every figure of one row. Text, not markup: a spec's brackets are the user's own."""
    places = wording.decimals(result["metric"]["unit"])
    found = wording.finding(entry, result)
    style = STYLES.get(found, "")
    is_baseline = entry["role"] == "baseline"
    role = ", ".join(word for word in (entry["role"].replace("contender", ""), found) if word)
    ratio = "" if is_baseline or entry["latency_ratio"] is None else f"{wording.fixed(entry['latency_ratio'], 2)}×"
    difference = "" if entry["difference"] is None or is_baseline else wording.signed(entry["difference"], places)
    return {
        "spec": Text(entry["spec"], style="bold"),
        "role": Text(role, style=style or "dim"),
        "score": Text(wording.fixed(entry["score"], places), style="bold"),
        "score_interval": Text(wording.interval(entry["score_ci95"], places), style="dim"),
        "difference": Text(difference, style=f"bold {style}"),
        "difference_interval": Text(
            "" if is_baseline else wording.interval(entry["difference_ci95"], places, wording.signed), style="dim"
        ),
        "finding": Text("baseline" if is_baseline else found, style=style or "dim"),
        "parameters": Text(wording.magnitude(entry["parameters"])),
        "macs": Text(wording.magnitude(entry["macs"])),
        "latency": Text(f"{wording.significant(entry['latency_ms'])} ms"),
        "ratio": Text(ratio, style="dim"),
        "throughput": Text(wording.significant(entry["throughput"])),
        "training": Text(wording.duration(entry["train_seconds"]), style="dim"),
    }

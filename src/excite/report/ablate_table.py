"""The ablation on the terminal: the papers' table, and under it what it shows."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from excite.report import wording
from excite.report.ablate import cells, columns, setting_cells, setting_titles

STYLES = {wording.BETTER: "green", wording.WORSE: "red"}
LEAST_NEEDED = ("latency", "mebibytes", "score_interval", "difference_interval", "macs")
"""The columns that a narrow terminal does without, in this order."""


def ablate_table(result: dict[str, Any]) -> RenderableType:
    """An ablation for the terminal: the table, and under it the summary and the notes.

    Args:
        result: the content of ``ablate.json``.

    Returns:
        Something for ``rich.print``, as wide as there is room for.
    """
    parts: list[RenderableType] = [_AdaptiveTable(result)]
    parts.append(Panel(Text(result["summary"], style="bold"), title="Summary", title_align="left", expand=False))
    parts += [Text(f"Note: {note}", style="dim") for note in result["notes"]]
    return Group(*parts)


class _AdaptiveTable:
    """Leaves columns out until the rest fits, since only the console knows how wide it is."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for count in range(len(LEAST_NEEDED) + 1):
            table = _table(self.result, LEAST_NEEDED[:count])
            if console.measure(table, options=options.update(width=1000)).maximum <= options.max_width:
                break
        yield table


def _table(result: dict[str, Any], left_out: tuple[str, ...]) -> Table:
    seeds = len(result["seeds"])
    facts = [result["network"], result["data"], f"{seeds} seed" + ("s" if seeds != 1 else "")]
    if result["epochs"] is not None:
        facts.append(f"{result['epochs']:,} epoch" + ("s" if result["epochs"] != 1 else ""))
    table = Table(
        title=Text(" · ".join(facts), style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        pad_edge=False,
    )  # fmt: skip
    for title in setting_titles(result):
        widest = max(map(len, [title, *(cell for row in result["rows"] for cell in setting_cells(row, result))]))
        table.add_column(Text(title), overflow="fold", min_width=min(12, widest))
    shown = {key: title for key, title in columns(result).items() if key not in left_out}
    for key, title in shown.items():
        header = Text(title.replace(" ↓", "\n↓").replace(" ↑", "\n↑").replace(" (points)", "\n(points)"))
        # The longest of the findings may be broken, at its words.
        broken = {"min_width": len("difference")} if key == "finding" else {"no_wrap": True}
        table.add_column(header, justify="left" if key == "finding" else "right", **broken)
    for row in result["rows"]:
        said = _cells(row, result)
        last = row is result["rows"][-1] or result["rows"][result["rows"].index(row) + 1]["group"] != row["group"]
        settings = [Text(cell, style="bold") for cell in setting_cells(row, result)]
        table.add_row(*settings, *(said[key] for key in shown), end_section=last)
    return table


def _cells(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Text]:
    """Every figure of one row. Text, not markup: what a setting holds is the user's own."""
    style = STYLES.get(wording.finding(row, result), "")
    styles = {"score": "bold", "difference": f"bold {style}", "finding": style or "dim"}
    return {key: Text(said, style=styles.get(key, "")) for key, said in cells(row, result).items()}

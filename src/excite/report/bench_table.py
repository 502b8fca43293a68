"""The timings on the terminal: a table for each group of contestants that were driven in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from excite.report import wording

ALLOCATORS = {"system": "buffers given back", "kept": "buffers kept"}
"""What a setting does with buffers that are freed."""


def bench_table(result: Mapping[str, Any]) -> RenderableType:
    """The result of ``bench`` for the terminal.

    Args:
        result: the content of ``bench.json``.

    Returns:
        Something for ``rich.print``: for each group its table and what it answers; then what could not be timed.
    """
    parts: list[RenderableType] = []
    for index, group in enumerate(result["groups"]):
        lines = lines_of(result, index)
        if lines:
            parts.append(_table(group["title"], lines, result["settings"]["allocator"]))
        for said in result["summary"]:
            if said["group"] == index:
                text = "\n".join(said["sentences"])
                title = f"{group['title']}, {ALLOCATORS[said['allocator']]}"
                parts.append(Panel(Text(text), title=title, title_align="left", expand=False))
    parts += [Text(note, style="dim") for note in [*not_timed(result), *result["notes"]]]
    return Group(*parts)


def lines_of(result: Mapping[str, Any], group: int) -> list[dict[str, Any]]:
    """The timed contestants of a group, one for all allocator settings.

    Returns:
        Dictionaries with ``spec``, ``way`` (the mode, and the precision where it is not the group's), ``allocators``
        (name → the row) and ``row`` (that of the last of them).
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in result["rows"]:
        if row["group"] == group and row["status"] == "timed":
            other = row["precision"] != result["groups"][group]["precision"]
            way = f"{row['mode']} ({row['precision']})" if other else row["mode"]
            line = found.setdefault(
                (row["spec"], row["mode"], row["precision"]), {"spec": row["spec"], "way": way, "allocators": {}}
            )
            line["allocators"][row["allocator"]] = row
            line["row"] = row
    return list(found.values())


def not_timed(result: Mapping[str, Any]) -> list[str]:
    """One sentence for each reason why contestants have no time."""
    by_reason: dict[tuple[str, str], dict[str, None]] = {}
    for row in result["rows"]:
        if row["status"] in ("refused", "failed") or (row["status"] == "left out" and _begun(result, row)):
            name = f"{row['spec']} {row['mode']} {row['precision']}, batch {row['batch']}"
            by_reason.setdefault((row["status"], row["reason"]), {})[name] = None
    sentences = []
    for (status, reason), names in by_reason.items():
        verb = {"refused": "Not possible", "failed": "Failed", "left out": "Left out"}[status]
        sentences.append(f"{verb} ({reason.rstrip('.')}): {'; '.join(names)}.")
    return sentences


def _begun(result: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether something of its group was timed; groups that were left out as a whole are in the notes."""
    return result["groups"][row["group"]]["seconds"] is not None


def ratio_cells(ratio: Mapping[str, float] | None, *, inverse: bool = False) -> tuple[str, str]:
    """A ratio and its interval as text; ``inverse`` turns times as long into times as fast."""
    if ratio is None:
        return "", ""
    value, low, high = ratio["value"], ratio["low"], ratio["high"]
    if inverse:
        value, low, high = 1 / value, 1 / high, 1 / low
    return f"{value:.2f}×", f"{low:.2f}–{high:.2f}"


def peak_text(row: Mapping[str, Any]) -> str:
    """The peak while it ran, in MiB."""
    return f"{row['running_peak_bytes'] / 2**20:,.0f}"


def _table(title: str, lines: Sequence[Mapping[str, Any]], allocators: Sequence[str]) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column(_stack("network", "by"), overflow="fold", min_width=max(len(line["way"]) for line in lines))
    several = len(allocators) > 1
    for allocator in allocators:
        under = allocator if several else ""
        table.add_column(_stack("ms", under), justify="right", no_wrap=True)
        table.add_column(_stack("× host", under), justify="right", no_wrap=True)
        table.add_column(_stack("speed-up", under), justify="right", no_wrap=True)
    table.add_column(_stack("peak", "MiB"), justify="right", no_wrap=True)
    for line in lines:
        cells = [_stack(line["spec"], line["way"], "bold")]
        for allocator in allocators:
            row = line["allocators"].get(allocator)
            if row is None:
                cells += [Text(wording.MISSING)] * 3
                continue
            cells.append(Text(wording.significant(1000 * row["seconds"]), style="bold"))
            cells.append(_stack(*ratio_cells(row["host_ratio"])))
            cells.append(_stack(*ratio_cells(row["eager_ratio"], inverse=True)))
        table.add_row(*cells, peak_text(line["row"]), end_section=True)
    return table


def _stack(above: str, under: str, style: str = "") -> Text:
    return Text("\n").join([Text(above, style=style), Text(under, style="dim")])

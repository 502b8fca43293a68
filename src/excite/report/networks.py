"""The table of networks against their papers, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_HEAD = ("spec", "input", "parameters, M", "paper", "GMACs", "paper", "top-1 / top-5 error, %", "source")


def networks_table(rows: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of what :func:`excite.verbs.paper.paper` returns, and the notes below it."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---|" + "--:|" * 6 + "---|"]
    notes: list[str] = []
    before = None
    for row in rows:
        mark = ""
        if row["note"]:
            if row["note"] not in notes:
                notes.append(row["note"])
            mark = f" [{notes.index(row['note']) + 1}]"
        counted = (
            input_text(row["input_size"], row["in_channels"]),
            f"{row['parameters']:.3f}",
            f"{row['macs']:.3f}",
        )
        size, parameters, macs = counted if row["spec"] != before else ("", "", "")
        errors = " / ".join(f"{row[key]:.2f}" for key in ("top1", "top5") if row[key] is not None)
        source = f"{row['source']}; {row['data']}" if row["source"] else ""
        cells = (
            f"`{row['spec']}`" if row["spec"] != before else "",
            size,
            parameters,
            _plain(row["paper_parameters"]) + (mark if row["paper_parameters"] else ""),
            macs,
            _plain(row["paper_macs"]) + (mark if row["paper_macs"] else ""),
            errors,
            source,
        )
        lines.append("| " + " | ".join(cells) + " |")
        before = row["spec"]
    lines += ["", *(f"[{number}] {note}.  " for number, note in enumerate(notes, start=1))]
    return "\n".join(lines).rstrip() + "\n"


def input_text(input_size: int, in_channels: int) -> str:
    """An input in short.

    ``224²`` is an image, ``25²×30`` one with other channels than red, green and blue, ``4396 numbers`` are vectors.
    """
    if input_size == 1:
        return f"{in_channels} numbers"
    return f"{input_size}²" if in_channels == 3 else f"{input_size}²×{in_channels}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"

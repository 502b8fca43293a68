"""How ``excite predict`` prints its answers."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """How predictions are printed."""

    table = "table"
    jsonl = "jsonl"
    csv = "csv"
    json = "json"


class Precision(StrEnum):
    """In which numbers a network computes."""

    fp32 = "fp32"
    bf16 = "bf16"

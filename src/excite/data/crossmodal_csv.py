"""Rows of CSV files whose first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from excite.errors import ExciteError, UsageError

_LONGEST_TEXT = 1 << 24  # characters
_SEPARATORS = {";": "';'", "\t": "tabs"}


def csv_rows(path: Path, check: Callable[[list[str]], object]) -> list[dict[str, str]]:
    """The rows of a CSV file in UTF-8, by column, with their fields stripped.

    Args:
        path: the file; commas are between its columns.
        check: is called with the names of the columns, stripped and in lower case, before any row is read.

    Raises:
        UsageError: a row has not as many fields as there are columns, or what ``check`` raises.
        ExciteError: it cannot be read, is not in UTF-8, or a quote is not closed.
    """
    before = csv.field_size_limit(_LONGEST_TEXT)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", strict=True)
            try:
                header = [name.strip().lower() for name in reader.fieldnames or ()]
                check(header)
                reader.fieldnames = header
                return [_stripped(path, reader.line_num, row, len(header)) for row in reader]
            except csv.Error as error:
                raise ExciteError(f"Cannot read {path}, line {reader.reader.line_num}: {error}.") from error
    except UnicodeDecodeError as error:
        raise ExciteError(f"Cannot read {path}: it is not in UTF-8 ({error.reason}): save it so.") from error
    except OSError as error:
        raise ExciteError(f"Cannot read {path}: {error.strerror or error}.") from error
    finally:
        csv.field_size_limit(before)


def other_separator(header: Sequence[str]) -> str:
    """A ready sentence where the columns seem to be parted by something else than commas, or an empty string."""
    for mark, name in _SEPARATORS.items():
        if len(header) == 1 and mark in header[0]:
            return f" It seems to have {name} between its columns: save it with commas."
    return ""


def _stripped(path: Path, line: int, row: dict[str, str], columns: int) -> dict[str, str]:
    if "" in row or None in row.values():
        raise UsageError(
            f"Line {line} of {path} has not the {columns} fields of the first line: put a text that holds commas "
            'into quotes, "like, this".'
        )
    return {name: value.strip() for name, value in row.items()}

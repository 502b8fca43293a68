"""Pairs in a CSV file: a picture's file, its text and its labels in each row.

    file,text,labels,split
    beach.jpg,"Two children build a castle of sand.",people;sea,train

``file`` is relative to the CSV's folder; several labels are parted by ``;``; the column ``split`` (train, val, test)
may be missing. ``images.npy`` or ``texts.npy`` beside the CSV hold ready vectors, a row for each of its rows, which
then take the place of the pictures or the strings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from excite.data.arrays import stored_arrays
from excite.data.crossmodal_arrays import vectors
from excite.data.crossmodal_csv import csv_rows, other_separator
from excite.data.crossmodal_inputs import Floats
from excite.data.crossmodal_pairs import Files, Pairs
from excite.data.layout import SPLITS
from excite.errors import UsageError, nearest

logger = logging.getLogger("excite.data")

COLUMNS = ("file", "text", "labels")
_VECTORS = {"images": "images.npy", "texts": "texts.npy"}


def find_table(path: Path) -> Path | None:
    """The CSV file that a path is, or that is in the folder; None where there is none.

    Raises:
        UsageError: a folder holds several.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".csv" else None
    if not path.is_dir():
        return None
    tables = sorted(file for file in path.iterdir() if file.suffix.lower() == ".csv" and file.is_file())
    if len(tables) > 1:
        names = ", ".join(file.name for file in tables[:5])
        raise UsageError(f"{path} holds several CSV files ({names}): name the one with the pairs, {tables[0]}.")
    return tables[0] if tables else None


def table_pairs(table: Path) -> dict[str, Pairs]:
    """The pairs of a CSV file by split, under ``""`` where it has none.

    Raises:
        UsageError: a column is missing; a row lacks a text, a label, or a field; a picture's file does not exist; or
            vectors beside it are of another number.
        ExciteError: it cannot be read, or vectors beside it hold a value that is not a finite number.
    """
    rows, has_splits = _rows(table)
    images = _beside(table, "images", len(rows))
    texts = _beside(table, "texts", len(rows))
    # One picture is one name, however it is written: its pairs stay together when some are held out.
    names = [os.path.normpath(row["file"]) if row["file"] else "" for row in rows]
    if images is None:
        _refuse_rows(table, [not name for name in names], "name no file")
        # Path.is_file() raises where a text stands in place of a name, and is too long for one.
        missing = [not os.path.isfile(table.parent / name) for name in names]
        _refuse_rows(table, missing, "name a file that does not exist", names)
    strings = [row["text"] for row in rows]
    if texts is None:
        _refuse_rows(table, [not text for text in strings], "have an empty text")
    each = [[label for label in (part.strip() for part in row["labels"].split(";")) if label] for row in rows]
    _refuse_rows(table, [not labels for labels in each], "have no label")

    classes = sorted({label for labels in each for label in labels})
    place = {name: i for i, name in enumerate(classes)}
    labels = np.zeros((len(rows), len(classes)), dtype=bool)
    for row, own in zip(labels, each, strict=True):
        row[[place[label] for label in own]] = True

    pairs = Pairs(
        str(table),
        tuple(name or f"row {i + 2}" for i, name in enumerate(names)),
        images if images is not None else _files(table.parent, names),
        texts if texts is not None else tuple(strings),
        labels,
        tuple(classes),
    )
    if not has_splits:
        return {"": pairs}
    splits = np.array([_split(table, i, row["split"]) for i, row in enumerate(rows)])
    return {split: pairs.only(splits == split) for split in ("train", "val", "test") if (splits == split).any()}


def _rows(table: Path) -> tuple[list[dict[str, str]], bool]:
    """The rows, and whether they say their split."""
    rows = csv_rows(table, lambda header: _check_header(table, header))
    if not rows:
        raise UsageError(f"{table} holds no pairs, only the names of its columns.")
    return rows, "split" in rows[0]


def _check_header(table: Path, header: Sequence[str]) -> None:
    for name in COLUMNS:
        if header.count(name) != 1:
            hint = nearest(name, [other for other in header if other not in COLUMNS])
            shown = ", ".join(map(repr, header)) or "nothing"
            raise UsageError(
                f"{table} has not one column {name!r} in its first line, which has {shown}: expected is "
                f"'{','.join(COLUMNS)}', and 'split' behind it if you like."
                + (other_separator(header) or (f" For {name!r}, {hint}" if hint else ""))
            )


def _split(table: Path, i: int, name: str) -> str:
    if name.lower() not in SPLITS:
        raise UsageError(f"Row {i + 2} of {table} has the split {name!r}: choose train, val or test.")
    return SPLITS[name.lower()]


def _refuse_rows(table: Path, wrong: Sequence[bool], what: str, shown: Sequence[str] = ()) -> None:
    rows = [i for i, one in enumerate(wrong) if one]
    if rows:
        some = ", ".join(f"row {i + 2}" + (f" ({shown[i]})" if shown else "") for i in rows[:5])
        more = f", and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise UsageError(
            f"{len(rows)} of {len(wrong)} rows of {table} {what}: {some}{more}, counting the first line as row 1. "
            "Mend or remove them."
        )


def _beside(table: Path, what: str, rows: int) -> Floats | None:
    path = table.with_name(_VECTORS[what])
    if not path.is_file():
        return None
    logger.info("%s: the vectors of %s take the place of its %s", table, path.name, what)
    return vectors(stored_arrays(path)[0], path, rows)


def _files(folder: Path, names: Sequence[str]) -> Files:
    each, index = np.unique(np.array(names), return_inverse=True)
    return Files(folder, tuple(map(str, each)), index.astype(np.int64))

"""What an index is made of: pictures in a folder, rows of a CSV file, lines of a text file."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from excite.data.crossmodal_csv import csv_rows, other_separator
from excite.data.folder import FolderFiles
from excite.data.images import SUFFIXES, is_image_name
from excite.errors import ExciteError, UsageError, nearest

log = logging.getLogger(__name__)

Kind = Literal["image", "text"]
KINDS: tuple[Kind, ...] = ("image", "text")

_EXPECTED = "a folder of images, an image, a CSV file with the columns file and text, or a .txt file of texts"


@dataclass(frozen=True)
class Item:
    """A picture or a text.

    Attributes:
        kind: ``image`` or ``text``.
        path: the picture, absolute; of a text the picture that it was given for, or None.
        text: the text; of a picture the first one that was given for it, or None.
        size: of the picture's file when it was read, in bytes, to see whether it has changed since; None of a text.
        changed: likewise, when it was last written, in nanoseconds.
    """

    kind: Kind
    path: str | None
    text: str | None
    size: int | None = None
    changed: int | None = None

    @property
    def key(self) -> tuple[str | None, str | None]:
        """What an index holds once: a picture by its path, a text by its words and its picture."""
        return (self.path, None) if self.kind == "image" else (self.path, self.text)

    def renews(self, known: Item) -> bool:
        """Whether this takes the place of an item with the same key: its file has changed, or it has a text now."""
        return (self.size, self.changed) != (known.size, known.changed) or self.text not in (None, known.text)


@dataclass(frozen=True)
class Found:
    """What there is to be indexed.

    Attributes:
        items: each once, pictures first.
        errors: files that are named but cannot be found, each with what is wrong.
    """

    items: list[Item]
    errors: list[tuple[str, str]]


def find_items(path: str | Path) -> Found:
    """The items of a folder or file.

    A folder is searched for pictures, in folders inside too; what is hidden is left out. CSV files that lie in it
    count as well, if they have the columns. A row of a CSV file that has both a file and a text is two items, a
    picture and a text, that know of each other.

    Raises:
        UsageError: no such path, nothing in it to be indexed, or a CSV file without the columns.
        ExciteError: it cannot be read.
    """
    path = Path(path)
    pairs: list[tuple[str | None, str | None]]
    if not os.path.exists(path):  # which takes a name that is too long for one that is not there
        raise UsageError(f"There is no {path}: expected is {_EXPECTED}.")
    if path.is_dir():
        # The tables first: a picture is known by the sentence that stands beside it.
        pairs = list(_tables(path))
        pairs += [(str(file), None) for file in _pictures(path, required=not pairs)]
    elif path.suffix.lower() == ".csv":
        pairs = list(_rows(path))
    elif path.suffix.lower() == ".txt":
        pairs = [(None, line) for line in _lines(path)]
    elif is_image_name(path.name):
        pairs = [(str(path), None)]
    else:
        raise UsageError(f"{path} cannot be indexed: expected is {_EXPECTED}.")
    if not pairs:
        raise UsageError(f"{path} holds nothing to be indexed: expected is {_EXPECTED}.")
    return _items(pairs)


def _items(pairs: list[tuple[str | None, str | None]]) -> Found:
    pictures: dict[str, Item] = {}
    texts: dict[tuple[str | None, str | None], Item] = {}
    errors: dict[str, str] = {}
    for file, text in pairs:
        # Absolute, but with its links as they are: what they lead to may be named by a number.
        place = None if file is None else os.path.abspath(file)
        if place is not None and "\0" in place:
            errors[place], place = "no name of a file", None
        if place is not None and place not in pictures and place not in errors:
            try:
                found = os.stat(place)
            except OSError as error:
                errors[place] = (error.strerror or str(error)).lower()
            else:
                if stat.S_ISREG(found.st_mode):
                    pictures[place] = Item("image", place, text, found.st_size, found.st_mtime_ns)
                else:
                    errors[place] = "not a file"  # a folder, or a device that might have no end
        if text is not None:
            item = Item("text", place, text)
            texts.setdefault(item.key, item)
    return Found([*pictures.values(), *texts.values()], list(errors.items()))


def _tables(folder: Path) -> Iterator[tuple[str | None, str | None]]:
    for table in sorted(folder.glob("*.csv")):
        if table.name.startswith(".") or not table.is_file():
            continue
        try:
            yield from _rows(table)
        except UsageError as error:
            log.info("%s is left out. %s", table, error)


def _pictures(folder: Path, required: bool) -> Iterator[Path]:
    try:
        names = [name for name in FolderFiles(folder).names if is_image_name(name)]
    except OSError as error:  # a link that leads to itself
        raise _unreadable(folder, error) from error
    names = [name for name in names if not any(step.startswith(".") for step in name.split("/"))]
    if not names and required:
        raise UsageError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}).")
    return (folder / name for name in names)


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from (line.strip() for line in file if line.strip())
    except (UnicodeDecodeError, OSError) as error:
        raise _unreadable(path, error) from error


def _rows(path: Path) -> Iterator[tuple[str | None, str | None]]:
    for row in csv_rows(path, lambda header: _check_header(path, header)):
        name, text = row.get("file"), row.get("text")
        if name or text:
            yield str(path.parent / name) if name else None, text or None


def _check_header(path: Path, header: list[str]) -> None:
    columns = [name for name in ("file", "text") if name in header]
    if not columns or any(header.count(name) > 1 for name in columns):
        hint = nearest("file", header) or nearest("text", header)
        shown = ", ".join(map(repr, header)) or "nothing"
        raise UsageError(
            f"{path} needs a column 'file', 'text', or one of each, in its first line, which has {shown}."
            + (other_separator(header) or (f" For it, {hint}" if hint else ""))
        )


def _unreadable(path: Path, error: Exception) -> ExciteError:
    if isinstance(error, UnicodeDecodeError):
        return ExciteError(f"Cannot read {path}: it is not in UTF-8 ({error.reason}): save it so.")
    return ExciteError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.")

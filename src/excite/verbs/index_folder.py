"""The folder of an index: vectors, what they are of, and which network made them.

``index.json`` names the network and the parts. A part is a ``vectors-N.npy`` with a vector in each row and an
``items-N.jsonl`` with a line for each; it is written once and never changed. What is added becomes a new part, and
counts from the moment that ``index.json`` is replaced: a process that is killed before leaves the index as it was,
and one that searches meanwhile sees the whole of the old or of the new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excite.data.arrays import reason
from excite.deploy.vectors import TYPES, VectorFiles, write_vectors
from excite.errors import ExciteError, UsageError
from excite.files import check_writable, write_atomically, write_json
from excite.verbs.index_items import KINDS, Item, Kind

FORMAT = 1
_FILE, _LOCK = "index.json", ".lock"
# What JSON that makes no sense leads to.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Part:
    """Vectors that were added at once, all of one kind.

    Attributes:
        number: of its files.
        kind: ``image`` or ``text``.
        count: how many.
        replaced: rows that no longer count, because the picture has changed since.
    """

    number: int
    kind: Kind
    count: int
    replaced: tuple[int, ...] = ()

    @property
    def vectors(self) -> str:
        """The name of the file with the vectors."""
        return f"vectors-{self.number}.npy"

    @property
    def items(self) -> str:
        """The name of the file that says what they are of."""
        return f"items-{self.number}.jsonl"


@dataclass
class IndexFolder:
    """An index.

    Attributes:
        folder: where it is.
        run: the folder of the run whose network made it, or None for a network that is none of a run.
        checksum: of that network.
        dim: the length of a vector.
        dtype: of what is stored, ``float32`` or ``float16``.
        parts: in the order of their numbers.
    """

    folder: Path
    run: str | None
    checksum: str
    dim: int
    dtype: str = "float32"
    parts: tuple[Part, ...] = ()

    @classmethod
    def exists(cls, folder: str | Path) -> bool:
        """Whether a folder is an index."""
        return os.path.isfile(Path(folder) / _FILE)

    @classmethod
    def open(cls, folder: str | Path) -> IndexFolder:
        """An index that exists.

        Raises:
            UsageError: the folder is none.
            ExciteError: it is damaged, or from a later version.
        """
        path = Path(folder) / _FILE
        if not os.path.isfile(path):  # which takes a name that is too long for one that is not there
            raise UsageError(f"{folder} is not an index: it has no {_FILE}. Make one with: excite index RUN PATH")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] > FORMAT:
                raise ExciteError(f"{folder} was made by a later version of excite: install that one.")
            parts = tuple(
                Part(int(part["number"]), part["kind"], int(part["count"]), tuple(map(int, part["replaced"])))
                for part in content["parts"]
            )
            network = content["network"]
            index = cls(Path(folder), network["run"], network["sha256"], int(content["dim"]), content["dtype"], parts)
        except _DAMAGE as error:
            raise ExciteError(f"{path} is damaged ({reason(error)}): make the index again.") from error
        except OSError as error:
            raise ExciteError(f"Cannot read {path}: {error.strerror or error}.") from error
        if not _fits_together(index):
            raise ExciteError(f"{path} is damaged: make the index again.")
        return index

    def check_network(self, checksum: str, dim: int, source: str) -> None:
        """Refuse another network than the one that made the index.

        Args:
            checksum: of the network at hand.
            dim: of its vectors.
            source: what to call it.

        Raises:
            UsageError: it is another one.
        """
        if (checksum, dim) != (self.checksum, self.dim):
            made = f" ({self.run})" if self.run is not None else ""
            raise UsageError(
                f"The index {self.folder} was made by another network{made}, with weights {self.checksum[:12]}… and "
                f"vectors of {self.dim} numbers; {source} has weights {checksum[:12]}… and vectors of {dim}. Their "
                "vectors cannot be compared: give the network that made the index, or make a new index."
            )

    def count(self, *kinds: Kind) -> int:
        """How many items of some kinds there are, by default of all."""
        return sum(part.count - len(part.replaced) for part in self.parts if part.kind in (kinds or KINDS))

    # --- reading -------------------------------------------------------------------------------------------------

    def of_kinds(self, kinds: Sequence[Kind]) -> tuple[Part, ...]:
        """The parts of some kinds."""
        return tuple(part for part in self.parts if part.kind in kinds)

    def vectors(self, parts: Sequence[Part]) -> VectorFiles:
        """The vectors of some parts, one after the other, those that no longer count among them.

        Raises:
            ExciteError: a file is missing or damaged.
        """
        files = VectorFiles([self.folder / part.vectors for part in parts], self.dim)
        if len(files) != sum(part.count for part in parts):
            raise ExciteError(
                f"The vectors in {self.folder} are {len(files):,}, but {_FILE} says {sum(p.count for p in parts):,}: "
                "the index is damaged, make it again."
            )
        return files

    def items(self, part: Part, rows: Sequence[int] | None = None) -> list[Item]:
        """The items of some rows of a part, by default of all.

        Raises:
            ExciteError: the file is missing or damaged.
        """
        path = self.folder / part.items
        try:
            with open(path, encoding="utf-8") as file:
                if rows is None:
                    lines = dict(enumerate(file))
                else:
                    wanted = frozenset(rows)
                    read = itertools.islice(file, max(wanted, default=-1) + 1)
                    lines = {row: line for row, line in enumerate(read) if row in wanted}
            found = {row: _item(part.kind, line) for row, line in lines.items()}
            return [found[row] for row in (range(part.count) if rows is None else rows)]
        except OSError as error:
            raise ExciteError(f"Cannot read {path}: {error.strerror or error}; make the index again.") from error
        except _DAMAGE as error:
            raise ExciteError(f"{path} is damaged or cut off: make the index again.") from error

    # --- writing -------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write ``index.json``: what it says counts from now on."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "network": {"run": self.run, "sha256": self.checksum},
            "dim": self.dim,
            "dtype": self.dtype,
            "images": self.count("image"),
            "texts": self.count("text"),
            "parts": [
                {"number": part.number, "kind": part.kind, "count": part.count, "replaced": list(part.replaced)}
                for part in self.parts
            ],
        }
        write_json(self.folder / _FILE, content)

    def add(self, items: Sequence[Item], vectors: npt.NDArray[np.floating[Any]]) -> None:
        """Add items of one kind as a new part. Those that they take the place of are to be marked first.

        Args:
            items: one or more.
            vectors: theirs, (n, dim), of any length.

        Raises:
            ExciteError: the vectors hold numbers that are not finite, or the disk is full: the index is as it was.
        """
        kind = items[0].kind
        assert all(item.kind == kind for item in items)
        part = Part(1 + max((part.number for part in self.parts), default=0), kind, len(items))
        write_vectors(self.folder / part.vectors, vectors, self.dtype)
        # ASCII: the name of a file may hold bytes that are no letters, which UTF-8 does not allow.
        lines = "".join(json.dumps(_plain(item)) + "\n" for item in items)
        write_atomically(self.folder / part.items, lines)
        self.parts = (*self.parts, part)
        self.write()

    def replace(self, rows: dict[int, list[int]]) -> None:
        """Mark rows that no longer count, by the number of their part; they are gone with the next :meth:`add`."""
        self.parts = tuple(
            dataclasses.replace(part, replaced=tuple(sorted({*part.replaced, *rows.get(part.number, [])})))
            for part in self.parts
        )

    def sweep(self) -> None:
        """Clear away what a process that was killed has left. Only under :func:`locked`."""
        used = {name for part in self.parts for name in (part.vectors, part.items)}
        for pattern in ("vectors-*.npy", "items-*.jsonl", ".vectors-*.tmp", ".items-*.tmp", f".{_FILE}.*.tmp"):
            for path in self.folder.glob(pattern):
                if path.name not in used:
                    path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes from adding to the index in a folder, which is made if missing.

    Raises:
        UsageError: another process is adding.
        ExciteError: the folder cannot be written.
    """
    lock = Path(folder) / _LOCK
    check_writable(lock)
    with open(lock, "wb") as file:
        _lock(file, folder)
        yield


def _fits_together(index: IndexFolder) -> bool:
    """Whether what ``index.json`` says can be."""
    numbers = {part.number for part in index.parts}
    return (
        index.dtype in TYPES
        and index.dim > 0
        and isinstance(index.checksum, str)
        and isinstance(index.run, str | None)
        and len(numbers) == len(index.parts)
        and all(
            part.kind in KINDS and part.count > 0 and all(0 <= row < part.count for row in part.replaced)
            for part in index.parts
        )
    )


def _item(kind: Kind, line: str) -> Item:
    """An item from its line.

    Raises:
        ValueError: it is none.
        TypeError: it has other fields.
    """
    item = Item(kind, **json.loads(line))
    texts = isinstance(item.path, str | None) and isinstance(item.text, str | None)
    if not texts or (item.path is None and (kind == "image" or item.text is None)):
        raise ValueError("an item without a file or a text")
    if item.path is not None and (not os.path.isabs(item.path) or "\0" in item.path):
        raise ValueError("an item whose path is not absolute")
    return item


def _plain(item: Item) -> dict[str, Any]:
    """An item as JSON, without its kind, which its part has."""
    return {name: value for name, value in dataclasses.asdict(item).items() if name != "kind"}


def _lock(file: Any, folder: str | Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks: there, two at once are the user's to avoid
        return
    try:
        # It goes with the process, however that ends.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"Another process is adding to the index {folder}: wait until it is done.") from None

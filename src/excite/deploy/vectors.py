"""Exact search by cosine similarity among more vectors than memory holds.

Vectors lie in ``.npy`` files, at length 1, so that a similarity is a dot product. A search reads the files piece by
piece and keeps nothing but one number for each vector.

How a processor sums a product depends on how many it computes at once, so that the last digits of a similarity, and
with them the order of near equals, would depend on sizes, threads and libraries. Here these similarities only choose
who might be among the hits, with the error that single precision allows; those few are computed again in double
precision, each for itself. Hits are therefore the same everywhere, in whatever way they were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from excite.data.arrays import stored_arrays
from excite.errors import ExciteError, UsageError
from excite.files import write_atomically

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Step = Callable[[int, int], object]

TYPES = ("float32", "float16")

PIECE = 1 << 19
"""Bytes that are read at once for one query: they stay in the cache of a core until they are multiplied."""
SIMILARITIES = 1 << 28
"""Bytes of similarities that are held at once, though always those of one query at least."""

_MANY = 1 << 25  # bytes that are read at once for several: their products are worth several threads
_AGAIN = 1024  # rows that are computed again at a time
_GRAIN = 1 << 15  # PyTorch converts more numbers than that in several threads, which costs more than it gives here
_LONGEST = 1.01  # a cosine, with what half precision adds
_NOT_FINITE = "numbers that are not finite"
_SPARE = 16  # hits beyond those asked for that FAISS is asked for, to see how close they come


@dataclass(frozen=True)
class Hits:
    """The most similar vectors of each query, best first; equals in the order of their rows.

    Attributes:
        rows: (queries, top), or fewer columns where there are fewer vectors.
        scores: their similarities, float64, likewise: cosines up to the rounding of what is stored.
    """

    rows: Rows
    scores: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _File:
    path: Path
    offset: int
    count: int
    dtype: np.dtype[Any]


class VectorFiles:
    """Vectors in files, one after the other.

    Args:
        files: ``.npy`` files that :func:`write_vectors` wrote; they are not read yet.
        dim: the length of a vector.

    Raises:
        ExciteError: a file is missing, damaged, or holds something else.
    """

    def __init__(self, files: Sequence[Path], dim: int) -> None:
        self.dim = dim
        self._files = [_header(path, dim) for path in files]
        self._starts = np.cumsum([0, *(file.count for file in self._files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def error(self) -> float:
        """The most by which a dot product in single precision, in any order, is off (Higham 2002, section 3.1)."""
        unit = self.dim * 2.0**-24
        # Vectors of half precision are a little longer or shorter than 1.
        return 1.01 * unit / (1 - unit)

    def search(self, queries: npt.ArrayLike, top: int, step: Step | None = None) -> Hits:
        """The vectors that are most similar to each query.

        Time grows with queries × vectors. Memory: 4 bytes for each query and vector, but no more than 256 MiB at
        once or what one query takes, and pieces of 512 KiB (32 MiB for several queries).

        Args:
            queries: (queries, dim) or (dim,), of any length; a vector of zeros has similarity 0 to all.
            top: how many.
            step: called with (vectors read, in all).

        Raises:
            UsageError: ``top`` is not a positive number, or the queries are of another length.
            ExciteError: the queries or the files hold numbers that are not finite, or a file cannot be read.
        """
        wanted = self.check(queries, top)
        group = max(1, SIMILARITIES // (4 * max(1, len(self))))
        found = []
        for start in range(0, len(wanted), group):
            some = wanted[start : start + group]
            before = start * len(self)

            def moved(read: int, before: int = before, queries: int = len(some)) -> None:
                if step is not None:
                    step(before + read * queries, len(wanted) * len(self))

            for query, similarities in zip(some, self._similarities(some, moved), strict=True):
                found.append(self.best(query, _near(similarities, top, self.error), top))
        return _hits(found, min(top, len(self)))

    def check(self, queries: npt.ArrayLike, top: int) -> Floats:
        """The queries at length 1, float32 (queries, dim).

        Raises:
            UsageError: ``top`` is not a positive number, or the queries are of another length.
            ExciteError: they hold numbers that are not finite.
        """
        if top < 1:
            raise UsageError(f"top is {top}: ask for one hit or more.")
        wanted = np.atleast_2d(np.asarray(queries))
        if wanted.ndim != 2 or wanted.shape[1] != self.dim:
            raise UsageError(f"The vectors have {self.dim} numbers, but queries of {wanted.shape} were given.")
        return unit_length(wanted, "a query")

    def best(self, query: Floats, rows: Rows, top: int) -> tuple[Rows, npt.NDArray[np.float64]]:
        """Of some rows, in ascending order, those most similar to a query of length 1, and their similarities."""
        wide = query.astype(np.float64)
        exact = np.empty(len(rows))
        for start in range(0, len(rows), _AGAIN):
            some = self.rows(rows[start : start + _AGAIN]).astype(np.float64)
            exact[start : start + _AGAIN] = (some * wide).sum(axis=1)
        if (np.abs(exact) > _LONGEST).any():
            self.refuse(int(rows[np.argmax(np.abs(exact))]), "vectors that are not of length 1")
        order = np.argsort(-exact, kind="stable")[:top]
        return rows[order], exact[order]

    def refuse(self, row: int, held: str) -> NoReturn:
        """Say which file is damaged.

        Args:
            row: one of its vectors.
            held: what it holds.
        """
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        raise ExciteError(f"{self._files[number].path} is damaged: it holds {held}. Make the index again.")

    def rows(self, rows: npt.ArrayLike) -> Floats:
        """Some of the vectors, float32 (n, dim)."""
        wanted = np.asarray(rows, dtype=np.int64)
        out = np.empty((len(wanted), self.dim), dtype=np.float32)
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(owner):
            own = owner == number
            file = self._files[number]
            # Mapped for this call alone: the pages of a mapping that stays count as memory of this process.
            stored = np.memmap(file.path, file.dtype, "r", file.offset, (file.count, self.dim))
            out[own] = stored[wanted[own] - self._starts[number]]
        return out

    def pieces(self, size: int = PIECE) -> Iterator[tuple[int, Floats]]:
        """All vectors, float32 (n, dim) with n · dim · 4 ≤ ``size`` where one fits, and the row of the first.

        A piece is overwritten by the next one.

        Raises:
            ExciteError: a file cannot be read.
        """
        most = max(1, size // (4 * self.dim))
        room = np.empty((most, self.dim), dtype=np.float32)
        any_narrow = any(file.dtype == np.float16 for file in self._files)
        half = np.empty((most if any_narrow else 0, self.dim), dtype=np.float16)
        for file, first in zip(self._files, self._starts, strict=False):
            narrow = file.dtype == np.float16
            into = half if narrow else room
            try:
                with open(file.path, "rb", buffering=0) as opened:
                    opened.seek(file.offset)
                    for start in range(0, file.count, most):
                        count = min(most, file.count - start)
                        _fill(opened, into[:count], file.path)
                        if narrow:
                            _widen(half[:count], room[:count])
                        yield int(first) + start, room[:count]
            except OSError as error:
                raise ExciteError(f"Cannot read {file.path}: {error.strerror or error}.") from error

    def _similarities(self, queries: Floats, moved: Callable[[int], None]) -> Floats:
        """(queries, vectors)"""
        out = np.empty((len(queries), len(self)), dtype=np.float32)
        for first, rows in self.pieces(PIECE if len(queries) == 1 else _MANY):
            np.matmul(queries, rows.T, out=out[:, first : first + len(rows)])
            moved(first + len(rows))
        if not np.isfinite(out).all():
            self.refuse(int(np.argmin(np.isfinite(out).all(axis=0))), _NOT_FINITE)
        return out


class FlatIndex:
    """The same vectors in memory, searched by FAISS (its ``IndexFlatIP``): the same hits.

    A search among vectors in memory does not read them again, which pays where one process answers many.

    Args:
        files: the vectors; all are read, and held as float32.

    Raises:
        UsageError: FAISS is not installed.
        ExciteError: a file cannot be read, or holds numbers that are not finite.
    """

    def __init__(self, files: VectorFiles) -> None:
        self._files = files
        self._index = faiss_package().IndexFlatIP(files.dim)
        for first, rows in files.pieces(1 << 24):
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                files.refuse(first + int(np.argmin(finite)), _NOT_FINITE)
            self._index.add(rows)

    def __len__(self) -> int:
        return len(self._files)

    def search(self, queries: npt.ArrayLike, top: int) -> Hits:
        """As :meth:`VectorFiles.search`."""
        wanted = self._files.check(queries, top)
        count = len(self._files)
        if not count:
            return self._files.search(wanted, top)
        first = min(count, top + _SPARE)
        found = []
        for query, scores, rows in zip(wanted, *self._index.search(wanted, first), strict=True):
            scores, rows, asked = scores, rows, first
            lowest = scores[min(top, count) - 1] - 2 * self._files.error
            while asked < count and scores[-1] >= lowest:  # some that were not given might be among the hits
                asked = min(count, 4 * asked)
                scores, rows = (answer[0] for answer in self._index.search(query[None], asked))
            found.append(self._files.best(query, np.sort(rows[scores >= lowest]), top))
        return _hits(found, min(top, count))


def write_vectors(path: str | Path, vectors: npt.ArrayLike, dtype: str = "float32") -> Path:
    """Write vectors at length 1 for :class:`VectorFiles`, atomically.

    Args:
        path: the ``.npy`` file.
        vectors: (n, dim), of any length.
        dtype: ``float32``, or ``float16`` for half the size: a similarity is then off by 0.0001 or so.

    Raises:
        ExciteError: they hold numbers that are not finite, or the file cannot be written.
    """
    stored = unit_length(np.asarray(vectors), str(path)).astype(np.dtype(dtype).newbyteorder("<"))
    return write_atomically(path, lambda file: np.save(file, stored, allow_pickle=False))


def unit_length(vectors: npt.NDArray[Any], what: str) -> Floats:
    """Vectors (n, dim) at length 1, float32; those of zeros as they are.

    Raises:
        ExciteError: they hold numbers that are not finite.
    """
    wide = vectors.astype(np.float64)
    # By the largest number first, the square of which would not fit.
    largest = np.abs(wide).max(axis=1, initial=0, keepdims=True)
    if not np.isfinite(largest).all():
        raise ExciteError(f"The vectors of {what} hold numbers that are not finite.")
    wide /= np.where(largest > 0, largest, 1)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(length > 0, length, 1)).astype(np.float32)


def faiss_package() -> Any:
    """The package FAISS.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UsageError("FAISS is not installed: pip install 'excite[faiss]', or search without it.") from None
    return faiss


def _near(similarities: Floats, top: int, error: float) -> Rows:
    """The rows that might be among the ``top`` most similar ones."""
    top = min(top, len(similarities))
    if not top:
        return np.empty(0, dtype=np.int64)
    last = len(similarities) - top
    return np.flatnonzero(similarities >= np.partition(similarities, last)[last] - 2 * error)


def _hits(found: list[tuple[Rows, npt.NDArray[np.float64]]], top: int) -> Hits:
    rows = np.array([own for own, _ in found], dtype=np.int64).reshape(len(found), top)
    return Hits(rows, np.array([scores for _, scores in found], dtype=np.float64).reshape(len(found), top))


def _header(path: Path, dim: int) -> _File:
    if not path.is_file():
        raise ExciteError(f"{path} is missing: the index is damaged, make it again.")
    array = stored_arrays(path)[0].open()
    good = array.ndim == 2 and array.shape[1] == dim and array.dtype.str in ("<f4", "<f2")
    if not (good and array.flags.c_contiguous and isinstance(array, np.memmap)):
        raise ExciteError(
            f"{path} holds {array.dtype} {array.shape} where vectors of {dim} numbers, {' or '.join(TYPES)}, are "
            "expected: the index is damaged, make it again."
        )
    return _File(path, int(array.offset), array.shape[0], array.dtype)


def _fill(opened: Any, into: npt.NDArray[Any], path: Path) -> None:
    room = into.data.cast("B")
    while room:
        read = opened.readinto(room)
        if not read:
            raise ExciteError(f"{path} is cut off: the index is damaged, make it again.")
        room = room[read:]


def _widen(half: npt.NDArray[np.float16], wide: Floats) -> None:
    # NumPy converts half precision one number at a time.
    narrow, into = torch.from_numpy(half).view(-1), torch.from_numpy(wide).view(-1)
    for start in range(0, len(narrow), _GRAIN):
        into[start : start + _GRAIN].copy_(narrow[start : start + _GRAIN])

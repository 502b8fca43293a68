"""Many names as one block of text: a million strings would take a hundred bytes each, and be copied into workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from excite.data.draws import Indices

Bytes = npt.NDArray[np.uint8]


class Names(Sequence[str]):
    """Names that become strings when they are asked for.

    Args:
        text: all names in UTF-8, one after the other.
        ends: where each ends in ``text``, (N,).
        chosen: which of them these are, in this order; None for all.
    """

    def __init__(self, text: Bytes, ends: Indices, chosen: Indices | None = None) -> None:
        self._text = text
        self._ends = ends
        self._chosen = chosen

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """From strings, such as paths, whose bytes need not be UTF-8."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum(lengths))

    @classmethod
    def joined(cls, parts: Sequence[Names]) -> Names:
        """Those of several, one after the other."""
        packed = [part.packed() for part in parts]
        lengths = np.concatenate([lengths for _, lengths in packed])
        return cls(np.concatenate([text for text, _ in packed]), np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends) if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> Names: ...

    def __getitem__(self, i: int | slice) -> str | Names:
        if isinstance(i, slice):
            return self.at(np.arange(len(self))[i])
        i = range(len(self))[i]  # from the end, where negative; IndexError beyond
        place = i if self._chosen is None else int(self._chosen[i])
        begin = int(self._ends[place - 1]) if place else 0
        return self._text[begin : int(self._ends[place])].tobytes().decode("utf-8", "surrogateescape")

    def at(self, positions: Indices) -> Names:
        """Those at these positions, without a copy of the text."""
        return Names(self._text, self._ends, positions if self._chosen is None else self._chosen[positions])

    def packed(self) -> tuple[Bytes, npt.NDArray[np.int32]]:
        """All as text without a gap, and the bytes of each, (N,)."""
        if self._chosen is not None:
            return Names.of(self).packed()
        return self._text, np.diff(self._ends, prepend=0).astype(np.int32)

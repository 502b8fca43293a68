"""Arrays of numbers in ``.mat`` files of versions 5 to 7, listed from their headers.

SciPy reads these files too, but a damaged one can crash it, and it reads what is not packed as a whole. The format is
simple ("MAT-File Format", The MathWorks): a header of 128 bytes, then elements, each of a type, a size and content. A
matrix holds elements again: flags (its class is among them), sides, name, numbers. It may be packed by deflate.

Numbers are stored in the smallest type that holds them, so that an array of class double may well be one of uint16.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from excite.errors import ExciteError, UsageError

_HEADER = 128
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_INT32, _UINT32, _MATRIX, _PACKED = 5, 6, 14, 15
_KINDS = {6: "f", 7: "f"} | dict.fromkeys((8, 10, 12, 14), "i") | dict.fromkeys((9, 11, 13, 15), "u")  # of classes
_COMPLEX = 0x0800
_OPAQUE = 17  # the class of objects of MATLAB's own
_LONGEST_HEAD = 4096  # bytes in front of a matrix's numbers
_MOST_SIDES = 32
_MOST_EXPANSION = 1032  # of deflate


@dataclass(frozen=True)
class Mat5Array:
    """An array in a file.

    Attributes:
        kind: ``"i"``, ``"u"`` or ``"f"`` for real numbers, ``"c"`` for complex ones, empty for all else.
        open: gives the numbers, through a memory map where they are not packed.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    open: Callable[[], Any]


class _DamagedError(Exception):
    """Why a file cannot be read, in a few words."""


def mat5_arrays(path: Path) -> list[Mat5Array]:
    """The arrays of a file, in its order; those that are not of numbers have no kind.

    Raises:
        ExciteError: the file is cut off, damaged, or of another format.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER)
            order = {b"IM": "<", b"MI": ">"}.get(header[126:], "")
            if not order:
                raise _DamagedError("it does not begin as files of versions 5 to 7.3 do")
            return [_array(path, file, order, *element) for element in _matrices(file, order, path.stat().st_size)]
    except _DamagedError as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: _DamagedError) -> ExciteError:
    return ExciteError(f"Cannot read {path}: it is cut off, damaged, or no .mat file ({error}).")


def _matrices(file: Any, order: str, size: int) -> Iterator[tuple[int, int, bool]]:
    """Where each matrix begins, how long it is, and whether it is packed."""
    at = _HEADER
    while at < size:
        file.seek(at)
        tag = file.read(8)
        if len(tag) < 8:
            raise _DamagedError("it ends in the middle of an array")
        kind, length = map(int, np.frombuffer(tag, order + "u4"))
        if at + 8 + length > size:
            raise _DamagedError("it ends in the middle of an array")
        if kind not in _TYPES and kind not in (_MATRIX, _PACKED, 16, 17, 18):
            raise _DamagedError(f"it has an element of an unknown type, {kind}")
        if kind in (_MATRIX, _PACKED):
            yield at, 8 + length, kind == _PACKED
        at += 8 + length


def _array(path: Path, file: Any, order: str, start: int, length: int, packed: bool) -> Mat5Array:
    file.seek(start + 8 if packed else start)
    head = file.read(min(length, 2 * _LONGEST_HEAD))
    if packed:
        head = _unpacked(zlib.decompressobj(), head, _LONGEST_HEAD)
    fields = _Fields(head, order)
    kind, whole, at = fields.tag(0)
    if kind != _MATRIX or (not packed and 8 + whole > length):
        raise _DamagedError("there is no array where one should be")
    if not whole:
        return Mat5Array("", (0, 0), "", lambda: np.empty((0, 0)))
    flags, at = fields.numbers(at, _UINT32)
    if flags and flags[0] & 0xFF == _OPAQUE:  # strings, tables: their sides are not said, and nobody wants them here
        name, _ = fields.text(at)
        return Mat5Array(name, (1, 1), "", lambda: _not_numbers(path, name))
    sides, at = fields.numbers(at, _INT32)
    name, at = fields.text(at)
    if len(flags) != 2 or not 2 <= len(sides) <= _MOST_SIDES or min(sides) < 0:
        raise _DamagedError("an array's flags or sides make no sense")
    shape = tuple(sides)
    of_numbers = _KINDS.get(flags[0] & 0xFF, "")
    if of_numbers and flags[0] & _COMPLEX:
        of_numbers = "c"

    @functools.cache
    def opened() -> Any:
        if not of_numbers or of_numbers == "c":
            _not_numbers(path, name)
        try:
            return _numbers(path, order, start, length, packed, head, at, whole, shape)
        except _DamagedError as error:
            raise _refusal(path, error) from error

    return Mat5Array(name, shape, of_numbers, opened)


def _not_numbers(path: Path, name: str) -> NoReturn:
    raise UsageError(f"{name} in {path} is not of real numbers.")


def _numbers(
    path: Path,
    order: str,
    start: int,
    length: int,
    packed: bool,
    head: bytes,
    at: int,
    whole: int,
    shape: tuple[int, ...],
) -> Any:
    kind, size, first = _Fields(head, order).tag(at)
    if kind not in _TYPES:
        raise _DamagedError("an array's numbers are of no known type")
    dtype = np.dtype(order + _TYPES[kind])
    if size != math.prod(shape) * dtype.itemsize or first + size > 8 + whole:
        raise _DamagedError(f"an array claims {'×'.join(map(str, shape))} numbers, and {size:,} bytes are for them")
    if not size:
        return np.empty(shape, dtype)
    if not packed:
        return np.memmap(path, dtype, "r", start + first, shape, order="F")
    if 8 + whole > _MOST_EXPANSION * length:
        raise _DamagedError(f"an array claims far more than its {length:,} packed bytes can hold")
    with open(path, "rb") as file:
        file.seek(start + 8)
        unpacker = zlib.decompressobj()
        data = _unpacked(unpacker, file.read(length - 8), 8 + whole)
    if len(data) < 8 + whole or _unpacked(unpacker, unpacker.unconsumed_tail, 1) or not unpacker.eof:
        raise _DamagedError("a packed array is of another size than it says")  # the end holds its checksum
    return np.frombuffer(data, dtype, math.prod(shape), first).reshape(shape, order="F")


def _unpacked(unpacker: Any, data: bytes, most: int) -> bytes:
    try:
        return bytes(unpacker.decompress(data, most))
    except zlib.error as error:
        raise _DamagedError("a packed array does not unpack") from error


class _Fields:
    """The elements in front of a matrix's numbers."""

    def __init__(self, head: bytes, order: str) -> None:
        self.head, self.order = head, order

    def tag(self, at: int) -> tuple[int, int, int]:
        """An element's type, its size in bytes, and where its content begins."""
        if at + 8 > len(self.head):
            raise _DamagedError("it ends in the middle of an array")
        first, second = map(int, np.frombuffer(self.head, self.order + "u4", 2, at))
        if first >> 16:  # up to four bytes lie in the tag itself
            return first & 0xFFFF, first >> 16, at + 4
        return first, second, at + 8

    def numbers(self, at: int, kind: int) -> tuple[list[int], int]:
        """An element of 32-bit integers, which some writers take for unsigned, and where the next begins."""
        found, size, first = self.tag(at)
        content, following = self._content(size, first)
        if found not in (kind, _UINT32) or size % 4:
            raise _DamagedError("an array's flags or sides make no sense")
        return np.frombuffer(content, self.order + _TYPES[kind]).tolist(), following

    def text(self, at: int) -> tuple[str, int]:
        """An element of characters, and where the next begins."""
        content, following = self._content(*self.tag(at)[1:])
        return content.decode("latin-1"), following

    def _content(self, size: int, first: int) -> tuple[bytes, int]:
        if first + size > len(self.head):
            raise _DamagedError("what stands in front of an array is too long")
        return self.head[first : first + size], first + size + -(first + size) % 8

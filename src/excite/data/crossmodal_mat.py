"""Named arrays in ``.mat`` files that keep them in structs or as sparse matrices, and in ``.npz`` archives.

A field of a struct is named with dots, ``data.split.ind_train``. SciPy reads structs too, but a damaged file can
crash it. The format is that of :mod:`excite.data.mat5` ("MAT-File Format", The MathWorks): a struct holds the names
of its fields, each in as many bytes as the first number says, then a matrix for each field; a sparse matrix holds,
column after column, the rows of its numbers (ir), where each column begins among them (jc), and the numbers.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from excite.data.arrays import StoredArray, reason, stored_arrays
from excite.errors import ExciteError

if TYPE_CHECKING:
    import h5py

_HDF5 = b"\x89HDF\r\n\x1a\n"
_USER_BLOCK = 512  # bytes that MATLAB puts in front
_HEADER = 128
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _PACKED = 14, 15
_STRUCT, _SPARSE = 2, 5  # classes
_NUMBERS = range(6, 16)
_COMPLEX, _LOGICAL = 0x0800, 0x0200
_DEEPEST = 8
_MOST_DENSE = 1 << 31  # bytes of a sparse matrix with its zeros
_MOST_EXPANSION = 1032  # of deflate: what claims to hold more than this many times its file is damaged
_PROBE = 1024  # bytes in front of a packed matrix, in which its class is

_Numbers = npt.NDArray[Any]


class _DamagedError(Exception):
    """Why a file cannot be read, in a few words."""


def named_arrays(path: Path) -> list[StoredArray]:
    """The arrays of a ``.mat``, ``.npy`` or ``.npz`` file, with those inside of structs; sparse ones become dense.

    Raises:
        UsageError: h5py is needed and not installed.
        ExciteError: the file is cut off, damaged, or no such file.
    """
    if path.suffix.lower() == ".npz":
        return _npz(path)
    whole = stored_arrays(path)
    if path.suffix.lower() == ".npy":
        return whole
    numbers = [array for array in whole if array.kind]
    with open(path, "rb") as file:
        start = file.read(_USER_BLOCK + len(_HDF5))
    if start.startswith(_HDF5) or start[_USER_BLOCK:].startswith(_HDF5):
        return numbers + list(_mat73_inner(path))
    return numbers + list(_mat5_inner(path, ">" if start[126:_HEADER] == b"MI" else "<"))


def _held(name: str, values: _Numbers) -> StoredArray:
    kind = "u" if values.dtype.kind == "b" else values.dtype.kind
    return StoredArray(name, values.shape, kind, False, lambda: values)


def _refusal(path: Path, why: object) -> ExciteError:
    return ExciteError(f"Cannot read {path}: it is cut off or damaged ({why}).")


# --- versions 5 to 7 ------------------------------------------------------------------------------------------


def _mat5_inner(path: Path, order: str) -> Iterator[StoredArray]:
    """What is in the structs and sparse matrices of a file."""
    content = np.memmap(path, np.uint8, "r").data
    at = _HEADER
    try:
        while at < len(content):
            kind, length, first, _ = _Reader(content, order).element(at)
            end = first + length
            element = _unpacked(content[first:end], order) if kind == _PACKED else content[at:end]
            if element is not None and _Reader(element, order).matrix_class(0) in (_STRUCT, _SPARSE):
                yield from _Reader(element, order).arrays(0, "", _DEEPEST)
            at = end
    except _DamagedError as error:
        raise _refusal(path, error) from error


def _unpacked(packed: memoryview, order: str) -> memoryview | None:
    """A packed matrix, if it is a struct or sparse."""
    unpacker = zlib.decompressobj()
    try:
        head = unpacker.decompress(packed, _PROBE)
        reader = _Reader(memoryview(head), order)
        if len(head) < 24 or reader.matrix_class(0) not in (_STRUCT, _SPARSE):
            return None
        size = 8 + reader.word(4)
        if size > _MOST_EXPANSION * len(packed):
            raise _DamagedError(f"an array claims far more than its {len(packed):,} packed bytes can hold")
        if size > len(head):  # 0 would be no limit
            head += unpacker.decompress(unpacker.unconsumed_tail, size - len(head))
        if len(head) != size or unpacker.decompress(unpacker.unconsumed_tail, 1) or not unpacker.eof:
            raise _DamagedError("a packed array is of another size than it says")  # the end holds its checksum
    except zlib.error as error:
        raise _DamagedError("a packed array does not unpack") from error
    return memoryview(head)


class _Reader:
    """Elements in bytes: each has a type, a size, and content that is filled up to eight bytes."""

    def __init__(self, data: memoryview, order: str) -> None:
        self.data, self.order = data, order

    def word(self, at: int) -> int:
        if at + 4 > len(self.data):
            raise _DamagedError("it ends in the middle of an array")
        return int(np.frombuffer(self.data, self.order + "u4", 1, at)[0])

    def element(self, at: int) -> tuple[int, int, int, int]:
        """Type, size, where the content begins, and where the next element does."""
        first = self.word(at)
        if first >> 16:  # up to four bytes lie in the tag itself
            kind, size, start, following = first & 0xFFFF, first >> 16, at + 4, at + 8
        else:
            kind, size, start = first, self.word(at + 4), at + 8
            following = start + size + -size % 8
        if start + size > len(self.data):
            raise _DamagedError("it ends in the middle of an array")
        return kind, size, start, following

    def matrix_class(self, at: int) -> int:
        """The class of the matrix at a place, 0 of none."""
        if self.word(at) != _MATRIX or not self.word(at + 4):
            return 0
        return self.word(at + 16) & 0xFF  # behind the tag of the matrix and that of its flags

    def numbers(self, at: int) -> tuple[_Numbers, int]:
        """An element of numbers, and where the next begins."""
        kind, size, start, following = self.element(at)
        if kind not in _TYPES:
            raise _DamagedError("an array's numbers are of no known type")
        dtype = np.dtype(self.order + _TYPES[kind])
        if size % dtype.itemsize:
            raise _DamagedError("an array's numbers are cut off")
        return np.frombuffer(self.data, dtype, size // dtype.itemsize, start), following

    def arrays(self, at: int, prefix: str, depth: int, name: str | None = None) -> Iterator[StoredArray]:
        """The arrays of numbers in a matrix, named ``prefix`` and its own name or that of its field."""
        kind, size, start, following = self.element(at)
        if kind != _MATRIX:
            raise _DamagedError("there is no array where one should be")
        if not size:
            return
        flags, at = self.numbers(start)
        sides, at = self.numbers(at)
        own, at = self._text(at)
        shape = tuple(int(side) for side in sides)
        if len(flags) != 2 or len(shape) < 2 or min(shape) < 0:
            raise _DamagedError("an array's flags or sides make no sense")
        of, name = int(flags[0]) & 0xFF, prefix + (own if name is None else name)
        if of == _STRUCT:
            yield from self._fields(at, following, name + ".", shape, depth)
        elif int(flags[0]) & _COMPLEX:
            return
        elif of == _SPARSE:
            rows, at = self.numbers(at)
            starts, at = self.numbers(at)
            kind, size, first, _ = self.element(at)
            if int(flags[0]) & _LOGICAL and size == len(rows):  # written as bytes, and called doubles
                values = np.frombuffer(self.data, np.uint8, size, first)
            else:
                values, _ = self.numbers(at)
            yield _held(name, dense(rows, starts, values, shape, name))
        elif of in _NUMBERS:
            values, at = self.numbers(at)
            if len(values) != math.prod(shape):
                raise _DamagedError(f"{name} claims {'×'.join(map(str, shape))} numbers, and has {len(values):,}")
            yield _held(name, values.reshape(shape, order="F"))

    def _fields(self, at: int, end: int, prefix: str, shape: tuple[int, ...], depth: int) -> Iterator[StoredArray]:
        if not depth:
            raise _DamagedError(f"its structs are more than {_DEEPEST} deep")
        if math.prod(shape) != 1:
            return  # a list of structs: no single array has such a name
        longest, at = self.numbers(at)
        _, size, start, at = self.element(at)
        width = int(longest[0]) if len(longest) == 1 else 0
        if width < 1 or size % width:
            raise _DamagedError("the names of a struct's fields make no sense")
        for first in range(start, start + size, width):
            field = bytes(self.data[first : first + width]).split(b"\0")[0].decode("latin-1")
            if at >= end:
                raise _DamagedError("a struct has fewer fields than names")
            yield from self.arrays(at, prefix, depth - 1, field)
            at = self.element(at)[3]

    def _text(self, at: int) -> tuple[str, int]:
        _, size, start, following = self.element(at)
        return bytes(self.data[start : start + size]).decode("latin-1"), following


def dense(rows: _Numbers, starts: _Numbers, values: _Numbers, shape: tuple[int, ...], name: str) -> _Numbers:
    """A sparse matrix with its zeros.

    Args:
        rows: of each number; there may be more than are in use.
        starts: where the numbers of each column begin, and where the last ends, (columns + 1,).
        values: the numbers.
        shape: rows and columns.
        name: for messages.
    """
    count = int(starts[-1]) if len(starts) else -1
    if len(shape) != 2 or len(starts) != shape[1] + 1 or not 0 <= count <= min(len(rows), len(values)):
        raise _DamagedError(f"the sparse matrix {name} does not fit together")
    if math.prod(shape) * values.dtype.itemsize > _MOST_DENSE:
        raise _DamagedError(f"the sparse matrix {name} is {shape[0]:,}×{shape[1]:,}, too large to be held")
    starts, rows = starts.astype(np.int64), rows[:count].astype(np.int64)
    if starts[0] or (np.diff(starts) < 0).any() or (count and not 0 <= rows.min() <= rows.max() < shape[0]):
        raise _DamagedError(f"the sparse matrix {name} does not fit together")
    out = np.zeros(shape, dtype=values.dtype.newbyteorder("="))
    out[rows, np.repeat(np.arange(shape[1]), np.diff(starts))] = values[:count]
    return out


# --- version 7.3, which is HDF5 -------------------------------------------------------------------------------


def _mat73_inner(path: Path) -> Iterator[StoredArray]:
    """What is in the structs and sparse matrices of a file."""
    import h5py  # stored_arrays() has told of it if it is missing

    try:
        with h5py.File(path, "r") as file:
            for name in file:
                if not name.startswith("#") and (group := _group(file, name)) is not None:
                    yield from _members(path, group, name, _DEEPEST)
    except ExciteError:
        raise
    except _DamagedError as error:
        raise _refusal(path, error) from error
    except Exception as error:  # the HDF5 library's are of many kinds
        raise _refusal(path, reason(error)) from error


def _group(parent: h5py.Group, name: str) -> h5py.Group | None:
    import h5py

    # Nothing outside of the file is opened.
    if not isinstance(parent.get(name, getlink=True), h5py.HardLink) or not isinstance(parent[name], h5py.Group):
        return None
    return parent[name]


def _members(path: Path, group: h5py.Group, name: str, depth: int) -> Iterator[StoredArray]:
    import h5py

    if not depth:
        raise _DamagedError(f"its structs are more than {_DEEPEST} deep")
    if "MATLAB_sparse" in group.attrs:
        rows = int(group.attrs["MATLAB_sparse"])
        starts = _read(path, group["jc"])
        # Without a single number there are neither rows nor values.
        some = "ir" in group and "data" in group
        ir, values = (_read(path, group[key]) if some else np.zeros(0) for key in ("ir", "data"))
        yield _held(name, dense(ir, starts, values, (rows, len(starts) - 1), name))
        return
    for field in group:
        if (inner := _group(group, field)) is not None:
            yield from _members(path, inner, f"{name}.{field}", depth - 1)
        elif isinstance(group.get(field, getlink=True), h5py.HardLink) and isinstance(group[field], h5py.Dataset):
            dataset = group[field]
            if dataset.dtype.kind in "iufb" and dataset.shape and "MATLAB_empty" not in dataset.attrs:
                # MATLAB keeps arrays column by column, so that in HDF5 all axes are in reverse.
                reverse = "MATLAB_class" in dataset.attrs
                shape = tuple(map(int, dataset.shape))[:: -1 if reverse else 1]
                kind = "u" if dataset.dtype.kind == "b" else dataset.dtype.kind
                yield StoredArray(f"{name}.{field}", shape, kind, reverse, _mat73_opener(path, dataset.name))


def _mat73_opener(path: Path, name: str) -> Callable[[], _Numbers]:
    def opened() -> _Numbers:
        import h5py

        try:
            with h5py.File(path, "r") as file:
                return _read(path, file[name])
        except Exception as error:
            raise _refusal(path, reason(error)) from error

    return opened


def _read(path: Path, dataset: h5py.Dataset) -> _Numbers:
    stored, claimed = dataset.id.get_storage_size(), math.prod(dataset.shape) * dataset.dtype.itemsize
    packed = dataset.chunks and dataset.compression
    outside = dataset.is_virtual or dataset.external
    if outside or claimed > stored * (_MOST_EXPANSION if packed else 1) or stored > path.stat().st_size:
        raise _DamagedError(f"{dataset.name} claims {claimed:,} bytes and {stored:,} are there")
    return np.asarray(dataset[...])


# --- .npz -----------------------------------------------------------------------------------------------------


def _npz(path: Path) -> list[StoredArray]:
    """The arrays of an archive of NumPy; only their headers are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [
                _npz_array(path, archive, member) for member in archive.infolist() if member.filename.endswith(".npy")
            ]
    except Exception as error:  # headers are Python text, and damage to them can be of any kind
        raise _refusal(path, reason(error)) from error


def _npz_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> StoredArray:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    name = member.filename.removesuffix(".npy")
    if dtype.hasobject:
        return StoredArray(name, tuple(shape), "", False, _npz_opener(path, name))
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > member.file_size or member.file_size > _MOST_EXPANSION * max(member.compress_size, 1):
        raise _DamagedError(f"{name} claims {claimed:,} bytes and has {member.compress_size:,} packed ones")
    kind = {"b": "u", "i": "i", "u": "u", "f": "f"}.get(dtype.kind, "")
    return StoredArray(name, tuple(shape), kind, False, _npz_opener(path, name))


def _npz_opener(path: Path, name: str) -> Callable[[], Any]:
    def opened() -> Any:
        try:
            with np.load(path, allow_pickle=False) as archive:
                return archive[name]
        except Exception as error:
            raise _refusal(path, reason(error)) from error

    return opened

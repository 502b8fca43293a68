"""Arrays in ``.mat`` and ``.npy`` files: what a file holds is listed from its headers, and nothing is unpickled.

A memory map of a ``.npy`` file reads what is asked for; so does that of a ``.mat`` file of version 5, unless the
array is packed, which MATLAB does in one piece. A file of version 7.3 is HDF5, and h5py unpacks the pieces that are
asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from excite.data.mat5 import mat5_arrays
from excite.errors import ExciteError, UsageError

if TYPE_CHECKING:
    import h5py

_HDF5 = b"\x89HDF\r\n\x1a\n"
_NPY = b"\x93NUMPY"
_ZIP = b"PK"
_USER_BLOCK = 512  # MATLAB puts a header of its own in front
_MOST_NAMES = 10_000
_LARGEST_CHUNK = 1 << 28  # bytes: a chunk is unpacked as a whole
_CHUNK_CACHE = 1 << 24  # bytes
_MOST_EXPANSION = 1032  # of deflate: what claims to hold more than this many times its file is damaged


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array of numbers in a file, not read yet.

    Attributes:
        name: of the variable; empty in a ``.npy`` file.
        shape: its axes as MATLAB or NumPy counts them.
        kind: ``"i"``, ``"u"`` or ``"f"``; anything else is not of real numbers.
        reverse: whether the axes of what :meth:`open` gives are in reverse, as in HDF5.
        chunks: the sides of the pieces that the file keeps packed, None where it keeps all in one or unpacked.
        open: gives something that can be sliced, and reads no more than a slice where the format allows that.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    reverse: bool
    open: Callable[[], Any]
    chunks: tuple[int, ...] | None = None

    def read(self) -> np.ndarray[Any, Any]:
        """The whole array.

        Raises:
            ExciteError: it cannot be read.
        """
        values = np.asarray(self.open()[...])
        return values.T if self.reverse else values


def existing(path: str | Path, what: str) -> Path:
    """A path that is a file.

    Raises:
        UsageError: it is not.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"The {what} {path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}.")
    return path


def stored_arrays(path: Path) -> list[StoredArray]:
    """The arrays of a ``.mat`` or ``.npy`` file, in the file's order.

    Raises:
        UsageError: h5py is needed and not installed.
        ExciteError: the file is cut off, damaged, or no such file.
    """
    if path.suffix.lower() == ".npy":
        return [_npy(path)]
    with open(path, "rb") as file:
        start = file.read(_USER_BLOCK + len(_HDF5))
    if start.startswith(_HDF5) or start[_USER_BLOCK:].startswith(_HDF5):
        return _mat73(path)
    return _mat5(path)


def listing(arrays: list[StoredArray]) -> str:
    """What a file holds, for an error: ``indian_pines_gt (145×145), …``."""
    shown = [f"{array.name} ({'×'.join(map(str, array.shape))})" for array in arrays[:8]]
    return ", ".join(shown) + (f", and {len(arrays) - 8} more" if len(arrays) > 8 else "")


def _npy(path: Path) -> StoredArray:
    def mapped() -> Any:
        try:
            # Anew for each piece that is read: the pages of a mapping that stays count as memory of this process.
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # the header is Python text, and damage to it can be of any kind
            raise ExciteError(
                f"Cannot read the array {path}: it is cut off, damaged, or holds Python objects ({reason(error)})."
            ) from error
        if not isinstance(array, np.ndarray):
            raise ExciteError(f"Cannot read the array {path}: it is an archive of several (.npz).")
        return array

    with open(path, "rb") as file:
        start = file.read(len(_NPY))
    if not start.startswith((_NPY, _ZIP)):  # numpy would take it for a pickle, and advise to trust it
        raise ExciteError(f"{path} is no .npy array of numbers.")
    array = mapped()
    return StoredArray("", array.shape, array.dtype.kind, False, mapped)


def _mat5(path: Path) -> list[StoredArray]:
    return [StoredArray(array.name, array.shape, array.kind, False, array.open) for array in mat5_arrays(path)]


def _mat73(path: Path) -> list[StoredArray]:
    try:
        import h5py
    except ImportError as error:
        raise UsageError(
            f"{path} is a .mat file of version 7.3, which takes h5py: pip install 'excite[hyperspectral]'."
        ) from error
    try:
        file = h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE)
        arrays = [array for name in _names(file) if (array := _dataset(path, file, name))]
    except ExciteError:
        raise
    except Exception as error:  # so does the HDF5 library
        raise _damaged(path, error) from error
    return arrays


def _names(file: h5py.File) -> list[str]:
    names = []
    for name in file:
        names.append(name)
        if len(names) > _MOST_NAMES:
            raise ExciteError(f"The .mat file has more than {_MOST_NAMES:,} variables.")
    return names


def _dataset(path: Path, file: h5py.File, name: str) -> StoredArray | None:
    import h5py

    # Nothing outside of the file is opened.
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        return None
    dataset = file[name]
    if not dataset.shape or "MATLAB_empty" in dataset.attrs or dataset.is_virtual or dataset.external:
        return None
    # MATLAB keeps arrays column by column, so that in HDF5 all axes are in reverse. Python's arrays lie as they are.
    reverse = "MATLAB_class" in dataset.attrs
    shape = tuple(map(int, dataset.shape))

    @functools.cache
    def opened() -> Any:
        stored = dataset.id.get_storage_size()
        claimed = math.prod(shape) * dataset.dtype.itemsize
        chunk = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
        packed = dataset.chunks and dataset.compression
        if claimed > stored * (_MOST_EXPANSION if packed else 1) or stored > path.stat().st_size:
            raise ExciteError(f"{path} lacks a part of {name}: it claims {claimed:,} bytes and holds {stored:,}.")
        if chunk > _LARGEST_CHUNK:
            raise ExciteError(
                f"{path} keeps {name} in pieces of {chunk:,} bytes, each of which must be unpacked as a whole; "
                f"{_LARGEST_CHUNK:,} are allowed: save it with smaller ones."
            )
        return dataset

    order = slice(None, None, -1 if reverse else 1)
    chunks = tuple(map(int, dataset.chunks))[order] if dataset.chunks else None
    return StoredArray(name, shape[order], dataset.dtype.kind, reverse, opened, chunks)


def _damaged(path: Path, error: Exception) -> ExciteError:
    return ExciteError(f"Cannot read {path}: it is cut off, damaged, or no .mat file ({reason(error)}).")


def reason(error: BaseException) -> str:
    """The first line of an error's message, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

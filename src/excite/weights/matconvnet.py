"""Weights from MatConvNet: ``.mat`` files of version 7.3, which are HDF5.

A SimpleNN network (``net.layers``, a cell array) is a chain: its convolutions are numbered in their order. A DagNN
network (``net.params``, a struct array) has names of its own.

MATLAB keeps arrays column by column and writes them so: in HDF5 all axes are in reverse. A convolution of kernels
(h, w, in, out) lies there as (out, in, w, h), and a last axis of length 1 is dropped.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from excite.errors import ExciteError, UsageError
from excite.weights.base import Content, Converted

if TYPE_CHECKING:
    import h5py

_HDF5 = b"\x89HDF\r\n\x1a\n"
_USER_BLOCK = 512  # MATLAB puts a header of its own in front
_HEAP, _LAST_GAP, _MOST_GAPS = b"HEAP\0", 1, 10_000
_MOST_LAYERS = 10_000
_LONGEST_NAME = 1024
# Floating-point weights hardly compress. What claims to be this much larger than its file was made to fill a memory.
_MOST_EXPANSION, _ALLOWANCE = 8, 1 << 20


class _RefusedError(Exception):
    """Why a file is not read, without a full stop."""


def is_mat(path: str | Path) -> bool:
    """Whether a file is HDF5, plain or behind MATLAB's header. Never raises for a file."""
    try:
        with open(path, "rb") as file:
            return _superblock(file.read(_USER_BLOCK + len(_HDF5))) is not None
    except OSError:
        return False


def _superblock(start: bytes) -> int | None:
    """Where HDF5 begins in a file that begins so."""
    if start.startswith(_HDF5):
        return 0
    return _USER_BLOCK if start.startswith(b"MATLAB") and start[_USER_BLOCK:].startswith(_HDF5) else None


def read_mat(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a MatConvNet network.

    Of a SimpleNN network ``0.weight``, ``0.bias``, ``1.weight``, …: the convolutions in their order, kernels as
    (out, in, h, w). Of a DagNN network all parameters by their own names: kernels likewise, vectors with one axis,
    other matrices as in MATLAB.

    Raises:
        UsageError: there is no such file, the network has layers with weights other than convolutions, or h5py is not
            installed.
        ExciteError: the file is damaged, holds no MatConvNet network, or reaches outside itself.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"The weights file {path} {what}; expected a .mat file.")
    try:
        import h5py
    except ImportError as error:
        raise UsageError(f"Reading the .mat file {path} takes h5py: pip install 'excite[mat]'.") from error
    try:
        _check_heaps(path)
        with h5py.File(path, "r") as file:
            return _network(_Reader(file, path.stat().st_size))
    except UsageError:
        raise
    except _RefusedError as error:
        raise ExciteError(f"Cannot read {path} as a MatConvNet network: {error}.") from error
    except Exception as error:  # what the HDF5 library says of bytes it does not expect can be of any kind
        raise ExciteError(
            f"Cannot read {path} as a MatConvNet network: it is cut off, damaged, or no .mat file of version 7.3 "
            "(in MATLAB: save(…, '-v7.3'))."
        ) from error


def _check_heaps(path: Path) -> None:
    """Refuse a file whose local heaps, where groups keep their names, have a list of gaps that goes in a circle.

    The HDF5 library (2.0) would follow it until the memory is full. A heap is a signature, a version, 3 bytes of no
    meaning, and in 8 bytes each its size, the first gap and the address of its contents; a gap begins with the next.
    """
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    base = _superblock(data[: _USER_BLOCK + len(_HDF5)])
    if base is None:
        raise _RefusedError("it is no .mat file of version 7.3 (in MATLAB: save(…, '-v7.3'))")
    # Size of addresses and of lengths; where they are depends on the superblock's version.
    widths = base + (13 if data[base + 8] < 2 else 9)
    if data[widths : widths + 2] != b"\x08\x08":
        raise _RefusedError("its addresses are not of 8 bytes, as MATLAB's are")
    at = data.find(_HEAP)
    while at >= 0:
        size, gap, contents = struct.unpack_from("<QQQ", data, at + 8)
        for _ in range(_MOST_GAPS):
            if gap >= size or base + contents + gap + 8 > len(data):
                break  # the list's end, or what the library itself refuses
            gap = struct.unpack_from("<Q", data, base + contents + gap)[0]
            if gap == _LAST_GAP:
                break
        else:
            raise _RefusedError("it is damaged: the gaps among its names go in a circle")
        at = data.find(_HEAP, at + len(_HEAP))


class _Reader:
    """An HDF5 file that is not trusted: nothing outside of it is opened, and nothing much larger than it is made."""

    def __init__(self, file: h5py.File, size: int) -> None:
        self.file, self.size = file, size
        self.bytes_left = _MOST_EXPANSION * size + _ALLOWANCE

    def member(self, group: Any, name: str) -> Any:
        """What a group holds under a name, or None."""
        import h5py

        if not isinstance(group, h5py.Group):
            raise _RefusedError(f"there is no group that could hold {name!r}")
        link = group.get(name, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise _RefusedError(f"{name!r} is a link to somewhere else")
        return group[name]

    def references(self, dataset: Any) -> list[Any]:
        """What the references in a cell array lead to."""
        values = self._values(dataset, "references")
        if values.size > _MOST_LAYERS:
            raise _RefusedError(f"it has {values.size:,} layers or parameters; {_MOST_LAYERS:,} are allowed")
        if not all(values.ravel()):
            raise _RefusedError("a reference in it leads nowhere")
        return [self.file[reference] for reference in values.ravel()]

    def text(self, dataset: Any) -> str:
        """A char array."""
        values = self._values(dataset, "characters")
        if values.size > _LONGEST_NAME:
            raise _RefusedError(f"a name in it has {values.size:,} characters")
        return "".join(map(chr, values.ravel().tolist()))

    def numbers(self, dataset: Any) -> Tensor | None:
        """An array of floating-point numbers, its axes as in HDF5; None for MATLAB's empty array."""
        if "MATLAB_empty" in dataset.attrs:
            return None
        return torch.from_numpy(self._values(dataset, "numbers").astype(np.float32, copy=False))

    def _values(self, dataset: Any, kind: str) -> NDArray[Any]:
        import h5py

        if not isinstance(dataset, h5py.Dataset) or not dataset.shape:
            raise _RefusedError(f"there is no array where {kind} should be")
        types = {
            "references": h5py.check_ref_dtype(dataset.dtype) is h5py.Reference,
            "characters": dataset.dtype == np.uint16,
            "numbers": dataset.dtype in (np.float32, np.float64),
        }
        if not types[kind]:
            raise _RefusedError(f"there are values of type {dataset.dtype} where {kind} should be")
        if dataset.is_virtual or dataset.external:
            raise _RefusedError("it keeps its numbers in other files")
        size = math.prod(map(int, dataset.shape)) * dataset.dtype.itemsize
        chunk = math.prod(map(int, dataset.chunks or ())) * dataset.dtype.itemsize
        self.bytes_left -= max(size, chunk)
        if self.bytes_left < 0:
            raise _RefusedError(f"it claims to hold far more than its {self.size:,} bytes can")
        if dataset.chunks:
            self._check_chunks(dataset, chunk)
        elif dataset.id.get_storage_size() < size:
            raise _RefusedError("an array in it lacks a part")
        return np.asarray(dataset[()])

    def _check_chunks(self, dataset: Any, size: int) -> None:
        """Unpack each chunk once within bounds: the HDF5 library itself goes on until the packed data end."""
        import h5py

        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
        if filters not in ([], [h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]):
            raise _RefusedError("an array in it is packed in a way that MATLAB does not use")
        wanted = math.prod(-(-side // step) for side, step in zip(dataset.shape, dataset.chunks, strict=True))
        if dataset.id.get_num_chunks() != wanted:
            raise _RefusedError("an array in it lacks a part")
        for index in range(wanted):
            chunk = dataset.id.get_chunk_info(index)
            if chunk.size > self.size or chunk.filter_mask:
                raise _RefusedError("an array in it is damaged")
            if filters:
                packed = dataset.id.read_direct_chunk(chunk.chunk_offset)[1]
                if len(zlib.decompressobj().decompress(packed, size + 1)) != size:
                    raise _RefusedError("an array in it does not unpack to its size")


def _network(reader: _Reader) -> dict[str, Tensor]:
    # save(…, '-struct', 'net') leaves out the name of the variable.
    root = reader.member(reader.file, "net") or reader.file
    params = reader.member(root, "params")
    layers = reader.member(root, "layers")
    if params is not None:
        return _dagnn(reader, params)
    if layers is not None:
        return _simplenn(reader, layers)
    raise _RefusedError("it has neither net.layers (SimpleNN) nor net.params (DagNN)")


def _simplenn(reader: _Reader, layers: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    count = 0
    for number, layer in enumerate(reader.references(layers), start=1):
        weights = _layer_weights(reader, layer)
        if not weights:
            continue
        kind = reader.text(reader.member(layer, "type"))
        if kind != "conv" or len(weights) > 2:
            raise UsageError(
                f"Layer {number} of this MatConvNet network is of type {kind!r} and has weights, but only "
                "convolutions can be loaded: merge batch norm into them first."
            )
        tensors[f"{count}.weight"] = _kernels(weights[0])
        if len(weights) == 2:
            tensors[f"{count}.bias"] = weights[1].reshape(-1)
        count += 1
    if not tensors:
        raise _RefusedError("it has no convolution with weights")
    return tensors


def _layer_weights(reader: _Reader, layer: Any) -> list[Tensor]:
    """A layer's arrays that are not empty: in ``weights``, or before 2015 in ``filters`` and ``biases``."""
    cell = reader.member(layer, "weights")
    if cell is None:
        arrays = [reader.member(layer, name) for name in ("filters", "biases")]
    else:
        arrays = [] if "MATLAB_empty" in cell.attrs else reader.references(cell)
    found = (reader.numbers(array) for array in arrays if array is not None)
    return [tensor for tensor in found if tensor is not None]


def _dagnn(reader: _Reader, params: Any) -> dict[str, Tensor]:
    names, values = reader.member(params, "name"), reader.member(params, "value")
    if names is None or values is None:
        raise _RefusedError("net.params has no names or no values")
    import h5py

    if h5py.check_ref_dtype(names.dtype) is None:  # a struct array of one element holds it as it is
        pairs = [(names, values)]
    else:
        pairs = list(zip(reader.references(names), reader.references(values), strict=True))
    tensors: dict[str, Tensor] = {}
    for name_array, value_array in pairs:
        name, value = reader.text(name_array), reader.numbers(value_array)
        if name in tensors:
            raise _RefusedError(f"two parameters are called {name!r}")
        if value is not None:
            tensors[name] = _parameter(value)
    if not tensors:
        raise _RefusedError("its parameters have no values")
    return tensors


def _parameter(value: Tensor) -> Tensor:
    if value.dim() > 2:
        return _kernels(value)
    return value.T if value.dim() == 2 and 1 not in value.shape else value.reshape(-1)


def _kernels(value: Tensor) -> Tensor:
    """(out, in, w, h), of which leading ones may be missing, → (out, in, h, w)."""
    while value.dim() < 4:
        value = value[None]
    return value.transpose(-1, -2)


def matconvnet_layout(content: Content) -> Converted | None:
    """SimpleNN networks: names ``0.weight``, ``0.bias``, ``1.weight``, … by position.

    They say the order only: the tensors with number n are those of the network's n-th ``Conv2d``, in the order of
    ``named_modules()``; whoever loads them puts the network's names in place. DagNN networks keep names of their own
    and are of no layout known here.
    """
    if content.format != "MatConvNet" or not content.tensors:
        return None
    if not all(re.fullmatch(r"\d+\.(weight|bias)", name) for name in content.tensors):
        return None
    return Converted("MatConvNet SimpleNN", dict(content.tensors))

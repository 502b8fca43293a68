"""The index of a set of shards: which images there are, where each lies, and what makes sure that it is whole.

A shard is a tar in the WebDataset format: a sample is a run of files with one key, ``000123.jpg`` and ``000123.cls``.
The index is one safetensors file beside the shards: numbers as arrays, names as one block, and a checksum over all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excite.data.draws import Indices
from excite.data.images import BrokenImageError
from excite.data.names import Names
from excite.errors import ExciteError
from excite.files import write_atomically

INDEX = "index.safetensors"
MAX_SAMPLE = 1 << 28  # bytes: no image file is larger
_FORMAT = "excite shards 1"
_DTYPES = {"offset": np.int64, "size": np.int32, "label": np.int32, "crc": np.uint32}

Array = npt.NDArray[Any]


class BrokenShardError(BrokenImageError):
    """A shard that cannot be read, and with it none of its images.

    Args:
        shard: the name by which it is told.
        reason: why, in a few words.
    """

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(reason)
        self.container = shard


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        name: of the file.
        size: of the file, in bytes.
        sha256: of the file, in hexadecimal; empty where it has not been computed.
        samples: how many it holds.
    """

    name: str
    size: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of all shards, in the order of the shards and within them of their places.

    Attributes:
        shards: the tars.
        classes: names of the classes.
        offset: where each image file begins in its shard, int64 (N,).
        size: its bytes, int32 (N,).
        label: class of each, int32 (N,).
        crc: CRC-32 of each image file, uint32 (N,); (0,) where they have not been computed.
        names: one name per sample.
        notes: what whoever made the index wants to remember, as JSON has it.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    offset: Array
    size: Array
    label: Array
    crc: Array
    names: Names
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offset)

    def shard(self) -> Indices:
        """The number of each sample's shard, int64 (N,)."""
        return np.repeat(np.arange(len(self.shards)), [shard.samples for shard in self.shards])

    @property
    def bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.size for shard in self.shards)

    def write(self, path: Path) -> None:
        """Write it, atomically; the same index always gives the same bytes.

        Raises:
            ExciteError: the disk is full, or the folder cannot be written.
        """
        from safetensors.numpy import save

        arrays = {key: np.ascontiguousarray(getattr(self, key), dtype) for key, dtype in _DTYPES.items()}
        text, lengths = self.names.packed()
        arrays |= {"names": text, "name_length": lengths}
        content = json.dumps(
            {
                "format": _FORMAT,
                "classes": self.classes,
                "shards": [dataclasses.astuple(shard) for shard in self.shards],
                "notes": self.notes,
            },
            sort_keys=True,
        )
        # One entry: safetensors writes several in any order.
        head = json.dumps({"checksum": _checksum(content, arrays), "content": content}, sort_keys=True)
        write_atomically(path, save(arrays, {"excite": head}))


def read_index(content: bytes, where: str) -> ShardIndex:
    """An index from the bytes of its file.

    Args:
        content: the file, which may come from anywhere.
        where: what to call it in a message.

    Raises:
        ExciteError: it is not an index, damaged, or says what cannot be.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(content)
        head = json.loads(_metadata(content)["excite"])
        if head["checksum"] != _checksum(head["content"], arrays):
            raise ValueError("its checksum does not fit")
        index = _from_parts(json.loads(head["content"]), arrays)
        _check(index)
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "it is no index of shards"
        raise ExciteError(
            f"{where} is damaged ({reason}): make it anew from the shards with excite data index, or copy it again."
        ) from error
    return index


def joined(parts: Sequence[ShardIndex], notes: dict[str, Any]) -> ShardIndex:
    """One index of what several hold, in their order; all have the same classes."""
    whole = {key: np.concatenate([getattr(part, key) for part in parts]) for key in _DTYPES}
    return ShardIndex(
        tuple(shard for part in parts for shard in part.shards),
        parts[0].classes,
        **whole,
        names=Names.joined([part.names for part in parts]),
        notes=notes,
    )


def _from_parts(said: dict[str, Any], arrays: dict[str, Array]) -> ShardIndex:
    if said["format"] != _FORMAT:
        raise ValueError(f"its format is {said['format']!r}, and this version reads {_FORMAT!r}")
    if arrays["names"].dtype != np.uint8 or any(array.ndim != 1 for array in arrays.values()):
        raise ValueError("its columns are of another kind")
    lengths = arrays["name_length"].astype(np.int64)
    if (lengths < 0).any() or lengths.sum() != len(arrays["names"]):
        raise ValueError("its names do not fit together")
    return ShardIndex(
        tuple(
            Shard(str(name), int(size), str(sha256), int(samples)) for name, size, sha256, samples in said["shards"]
        ),
        tuple(str(name) for name in said["classes"]),
        **{key: arrays[key].astype(dtype, casting="safe") for key, dtype in _DTYPES.items()},
        names=Names(arrays["names"], np.cumsum(lengths)),
        notes=dict(said["notes"]),
    )


def _check(index: ShardIndex) -> None:
    """Raise ValueError where a number leads out of a shard, or a name out of the folder."""
    for shard in index.shards:
        if not is_shard_name(shard.name) or min(shard.size, shard.samples) < 0:
            raise ValueError(f"there can be no shard {shard.name!r}")
    if len({shard.name for shard in index.shards}) != len(index.shards):
        raise ValueError("it names a shard twice")
    count = sum(shard.samples for shard in index.shards)
    lengths = {len(index.offset), len(index.size), len(index.label), len(index.names)}
    if lengths != {count} or len(index.crc) not in (0, count):
        raise ValueError("its columns are not of one length")
    ends = np.repeat(np.array([shard.size for shard in index.shards], np.int64), [s.samples for s in index.shards])
    outside = (index.offset < 0) | (index.size < 0) | (index.size > MAX_SAMPLE) | (index.offset > ends - index.size)
    if outside.any():
        raise ValueError("an image lies outside of its shard")
    if count and not 0 <= index.label.min() <= index.label.max() < len(index.classes):
        raise ValueError("a label is of no class")


def its_images(shard: Shard) -> str:
    """What is lost with a shard, in words."""
    return f"it holds {shard.samples:,} images"


def is_shard_name(name: str) -> bool:
    """Whether a name is that of a tar in the folder itself."""
    return name.endswith(".tar") and name == Path(name).name and not name.startswith(".") and "\\" not in name


def _metadata(content: bytes) -> dict[str, str]:
    """What a safetensors file says beside its arrays; they have been loaded, so its head is whole."""
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def _checksum(content: str, arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256(content.encode())
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype.str} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    return digest.hexdigest()

"""Shards as tars: the headers of those that are written, and the index of those that somebody else has written."""

from __future__ import annotations

import contextlib
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from excite.data.images import SUFFIXES
from excite.data.layout import SPLITS
from excite.data.names import Names
from excite.data.shards_index import INDEX, MAX_SAMPLE, Shard, ShardIndex
from excite.errors import ExciteError, UsageError
from excite.files import sha256

logger = logging.getLogger("excite.data")

BLOCK = 512
END = bytes(2 * BLOCK)
_MAX_LABEL = 1 << 16  # bytes: what says a label is no longer


def member(name: str, content: bytes) -> bytes:
    """A file as it lies in a tar: its header, which says nothing of when and by whom, its content, and zeros.

    Args:
        name: at most 100 ASCII characters.
        content: less than 8 GiB.
    """
    # POSIX.1-1988 ustar: name, mode, uid, gid, size, mtime, checksum, type, link name, magic, the rest empty. The
    # checksum is the sum of the header's bytes, with spaces in its own place. tarfile takes ten times as long.
    head = bytearray(BLOCK)
    head[: len(name)] = name.encode("ascii")
    head[100:156] = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % len(content) + b"%011o\0" % 0 + b" " * 8
    head[156:157] = tarfile.REGTYPE
    head[257:265] = tarfile.POSIX_MAGIC
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + content + bytes(-len(content) % BLOCK)


def index_shards(
    folder: str | Path, *, classes: Sequence[str] | None = None, checksums: bool = False
) -> dict[str, ShardIndex]:
    """Make the index of WebDataset shards that are there already, and write it beside them.

    A sample is a run of files with one key, the name up to its first dot: an image (``.jpg``, ``.png`` …), and what
    says its class: ``.cls`` with a number or a name, or ``.json`` with the key ``label``. Only the tars' headers and
    the labels are read.

    Args:
        folder: the shards, or folders ``train``, ``val`` and ``test`` with them.
        classes: the classes' names, in the order of the numbers; by default the numbers themselves, or the names
            that the shards give, sorted.
        checksums: read everything, so that it can be checked later whether the shards are what they are now.

    Returns:
        The index of each split, under ``""`` where there are no splits.

    Raises:
        UsageError: no tars are there, or their labels do not fit ``classes``.
        ExciteError: a tar cannot be read, holds no samples with a label, or the index cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    places = {"": folder} | {name: folder / name for name in SPLITS}
    tars = {name: sorted(place.glob("*.tar")) for name, place in places.items()}
    tars = {name: found for name, found in tars.items() if found}
    if not tars:
        raise UsageError(
            f"{folder} holds no shards: expected are files like shard-000000.tar, or train/shard-000000.tar."
        )
    found = {name: [_read_tar(path, checksums) for path in paths] for name, paths in tars.items()}
    labels = {label for parts in found.values() for part in parts for label in part.labels}
    names, number = _classes(labels, classes)
    indexes = {}
    for name, parts in found.items():
        indexes[name] = _index(parts, names, number)
        indexes[name].write(places[name] / INDEX)
    return indexes


def check_shards(folder: str | Path) -> list[dict[str, str]]:
    """Hold the shards in a folder, or in its ``train``, ``val`` and ``test``, against their index, byte for byte.

    Returns:
        ``file`` and ``error`` of each shard that is missing, cut off, or changed.

    Raises:
        UsageError: no index is there.
        ExciteError: an index is damaged.
    """
    from excite.data.shards import open_shards

    broken = []
    for files in open_shards(str(folder), 1.0).values():
        for shard in files.index.shards:
            path = Path(files.place.name) / shard.name
            with contextlib.suppress(OSError):
                if shard.sha256 and path.stat().st_size == shard.size and sha256(path) != shard.sha256:
                    broken.append({"file": str(path), "error": "its checksum does not fit: its content has changed"})
        broken += [{"file": name, "error": reason} for name, reason in files.missing.items()]
    return broken


@dataclass
class _Tar:
    """What was found in one tar."""

    shard: Shard
    offsets: list[int]
    sizes: list[int]
    labels: list[int | str]
    names: list[str]


def _read_tar(path: Path, checksums: bool) -> _Tar:
    found = _Tar(Shard(path.name, path.stat().st_size, sha256(path) if checksums else "", 0), [], [], [], [])
    left_out: Counter[str] = Counter()
    try:
        with tarfile.open(path, "r:") as archive, open(path, "rb") as file:
            for key, members in _samples(archive):
                image = next((one for suffix, one in members.items() if f".{suffix}" in SUFFIXES), None)
                label = _label(file, members)
                if image is None or label is None or image.size > MAX_SAMPLE:
                    left_out["no image" if image is None else "no label" if label is None else "too large"] += 1
                    continue
                found.offsets.append(image.offset_data)
                found.sizes.append(image.size)
                found.labels.append(label)
                found.names.append(f"{path.stem}/{image.name}" if key else image.name)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ExciteError(f"Cannot read the tar {path}: {error}; is it whole, and is it a tar?") from error
    if left_out:
        reasons = ", ".join(f"{count:,} ({reason})" for reason, count in left_out.items())
        logger.warning("%s: samples left out: %s", path, reasons)
    if not found.offsets:
        raise ExciteError(
            f"{path} holds no samples with an image and a label: expected are files like 000123.jpg and 000123.cls, "
            'or 000123.json with the key "label".'
        )
    shard = found.shard
    found.shard = Shard(shard.name, shard.size, shard.sha256, len(found.offsets))
    return found


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key and files by suffix of each sample; links, and whatever is no regular file, are left out."""
    current, members = None, dict[str, tarfile.TarInfo]()
    for one in archive:
        if not one.isreg() or one.issparse():
            continue
        head, _, base = one.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = f"{head}/{stem}"
        if key != current and current is not None:
            yield current, members
            members = {}
        current = key
        members[suffix.lower()] = one
    if current is not None:
        yield current, members


def _label(file: Any, members: dict[str, tarfile.TarInfo]) -> int | str | None:
    for suffix in ("cls", "json"):
        one = members.get(suffix)
        if one is None or one.size > _MAX_LABEL:
            continue
        file.seek(one.offset_data)
        text = file.read(one.size).decode("utf-8", "replace").strip()
        if suffix == "cls":
            return int(text) if text.isdecimal() else text or None
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(text)
            label = said.get("label") if isinstance(said, dict) else None
            if isinstance(label, str | int) and not isinstance(label, bool):
                return label
    return None


def _classes(labels: set[int | str], given: Sequence[str] | None) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Names of the classes, and the number of each label."""
    numbers = [label for label in labels if isinstance(label, int)]
    texts = [label for label in labels if isinstance(label, str)]
    if numbers and texts:
        raise UsageError(f"Some labels of the shards are numbers ({numbers[0]}), and some are names ({texts[0]!r}).")
    if texts:
        names = tuple(sorted(texts) if given is None else given)
        if unknown := sorted(set(texts) - set(names)):
            raise UsageError(f"The shards have the class {unknown[0]!r}, which is not among those given.")
        return names, {name: i for i, name in enumerate(names)}
    top = max(numbers)
    if given is None:
        if min(numbers) < 0 or top >= 1_000_000:
            raise UsageError(f"The shards have labels from {min(numbers)} to {top}: they are to count from 0.")
        # With leading zeros they are sorted as the numbers are.
        names = tuple(f"{i:0{len(str(top))}d}" for i in range(top + 1))
    else:
        names = tuple(given)
    if min(numbers) < 0 or top >= len(names):
        raise UsageError(f"The shards have labels from {min(numbers)} to {top}, but {len(names)} classes are given.")
    return names, {i: i for i in range(len(names))}


def _index(parts: Sequence[_Tar], names: tuple[str, ...], number: dict[int | str, int]) -> ShardIndex:
    return ShardIndex(
        tuple(part.shard for part in parts),
        names,
        offset=np.array([offset for part in parts for offset in part.offsets], dtype=np.int64),
        size=np.array([size for part in parts for size in part.sizes], dtype=np.int32),
        label=np.array([number[label] for part in parts for label in part.labels], dtype=np.int32),
        crc=np.empty(0, dtype=np.uint32),
        names=Names.of(name for part in parts for name in part.names),
    )

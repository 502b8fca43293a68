"""``data pack``: a folder or tar of class folders as shards, which large sets are read from."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from excite.data.draws import Indices, permutation
from excite.data.encoded import FileSource
from excite.data.folder import FolderFiles
from excite.data.images import BrokenImageError, decode
from excite.data.layout import Part
from excite.data.listed import ListedPart, list_file, parts_of
from excite.data.names import Names
from excite.data.shards_index import INDEX, MAX_SAMPLE, Shard, ShardIndex, joined, read_index
from excite.data.shards_tar import END, member
from excite.data.tar import TarFiles
from excite.errors import ExciteError, UsageError
from excite.files import check_writable, sha256, write_atomically
from excite.training.bars import Step, bar

SHARD_SIZE = "256MB"
QUALITY = 90

_SEED = 0  # of the order of the images in the shards
_JOURNAL = ".packing"
_CHUNK = 32  # images that a thread prepares at once
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def pack(
    source: str | Path,
    out: str | Path,
    *,
    shard_size: str | int = SHARD_SIZE,
    resize: int | None = None,
    quality: int | None = None,
    refuse_broken: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Pack the images of class folders into tars in the WebDataset format, with an index of all that is in them.

    Each split becomes a folder: ``out/train``, ``out/val``, ``out/test``; without splits ``out`` holds the shards.
    The images lie in a shuffled order, always the same, so that any shard shows all classes. Every image is decoded
    once, so that what cannot be read is found now. If the process is killed the same call goes on: finished shards
    are checked and kept, and what comes out is the same to the byte.

    Args:
        source: a folder or tar of class folders, with or without splits, or with ImageNet's or Places365's lists; or
            ``list:FILE``.
        out: the folder of the shards, made if missing.
        shard_size: the most bytes of a shard, as a number or like ``256MB``, ``1GiB``; a larger image has its own.
        resize: bring the shorter side of larger images to so many pixels (bicubic, antialiased) and save them as
            JPEG; without it the files are packed as they are.
        quality: of these JPEGs, 1 … 100; 90 by default.
        refuse_broken: end at the first image that cannot be read; by default they are named and left out.
        progress: show a bar on stderr.

    Returns:
        ``out``, ``splits`` (``images``, ``shards``, ``bytes`` and ``classes`` of each, ``""`` without splits),
        ``kept`` (shards that were there already), ``broken`` (``file`` and ``error`` of each image left out) and
        ``seconds``.

    Raises:
        UsageError: no images in class folders are there, a value is out of range, ``out`` holds something else, or
            another process is packing into it.
        ExciteError: the disk is full, a file cannot be read or written, or an image is broken and ``refuse_broken``.
    """
    begin = time.perf_counter()
    if quality is not None and resize is None:
        raise UsageError("quality is for images that are resized: give resize too, or leave it out.")
    work = _Work(parse_size(shard_size), _within("resize", resize, 1, 1 << 16), _within("quality", quality, 1, 100))
    out = Path(out)
    files, parts = _found(str(source), refuse_broken)
    classes = _classes(parts)
    total, kept = sum(len(part.files) for part in parts.values()), 0
    indexes: dict[str, ShardIndex] = {}
    with bar("packing", progress) as step, _alone(out):
        for name, part in parts.items():
            done = sum(len(parts[other].files) for other in indexes)
            packing = _Packing(work, files, part, classes, out / name)
            indexes[name] = packing.run(refuse_broken, step and _from(step, done, total))
            kept += packing.kept
    return {
        "out": str(out),
        "splits": {name: _summary(index) for name, index in indexes.items()},
        "kept": kept,
        "broken": [
            {"file": file, "error": error} for index in indexes.values() for file, error in index.notes["broken"]
        ],
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _found(source: str, refuse: bool) -> tuple[FileSource, dict[str, Part]]:
    """The files, and which of them are images of which split and class."""
    if source.startswith("list:"):
        listed, part = list_file(Path(source.removeprefix("list:")), refuse)
        return listed, {"": part}
    path = Path(source)
    if not path.exists():
        raise UsageError(f"There is no folder or tar {path}.")
    files: FileSource = FolderFiles(path) if path.is_dir() else TarFiles(path)
    return files, {name: part for name, part in parts_of(files, path, refuse).items() if part.files}


def _classes(parts: Mapping[str, Part]) -> tuple[str, ...]:
    """The classes of all splits: in the order of the list that numbers them, where there is one; else sorted."""
    there = {name for part in parts.values() for name in part.classes}
    orders = [part.order for part in parts.values() if isinstance(part, ListedPart) and there <= set(part.order)]
    return tuple(name for name in orders[0] if name in there) if orders else tuple(sorted(there))


def parse_size(text: str | int) -> int:
    """``256MB`` as bytes.

    Raises:
        UsageError: it is no size, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmg]i?)?b)?", str(text).strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if size < 1:
        raise UsageError(f"A shard's size is {text!r}: expected is one like 256MB or 1GiB.")
    return size


@dataclass(frozen=True)
class _Work:
    """What is done to the images."""

    shard_size: int
    resize: int | None
    quality: int | None

    def prepare(self, content: bytes, suffix: str) -> tuple[bytes, str]:
        """The file that is packed, and its suffix.

        Raises:
            BrokenImageError: it cannot be decoded.
        """
        if len(content) > MAX_SAMPLE:
            raise BrokenImageError(f"the file has more than the {MAX_SAMPLE:,} bytes allowed")
        pixels = decode(content)
        height, width = pixels.shape[-2:]
        short = min(height, width)
        if self.resize is None or short <= self.resize:
            return content, suffix
        from PIL import Image

        size = [max(1, round(side * self.resize / short)) for side in (width, height)]
        image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        out = io.BytesIO()
        image.resize((size[0], size[1]), Image.Resampling.BICUBIC).save(out, "JPEG", quality=self.quality or QUALITY)
        return out.getvalue(), "jpg"


@dataclass
class _Ready:
    """An image that is ready to be packed, or why it cannot be."""

    place: int
    content: bytes = b""
    suffix: str = ""
    broken: str = ""


@dataclass
class _Filled:
    """What has gone into a shard so far."""

    size: int = 0
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class _Packing:
    """One split on its way into its folder.

    While it goes on a folder beside the shards holds an index of each finished one; at the end they become one.
    """

    def __init__(self, work: _Work, files: FileSource, part: Part, classes: tuple[str, ...], folder: Path) -> None:
        self.work = work
        self.files = files
        self.folder = folder
        self.classes = classes
        self.kept = 0
        order = permutation(_SEED, 0, len(part.files))
        number = {name: i for i, name in enumerate(classes)}
        self.positions: Indices = np.array(part.files, dtype=np.int64)[order]
        self.labels = np.array([number[name] for name in part.classes], dtype=np.int32)[order]
        self.names = [files.names[position] for position in self.positions]
        self.digits = max(6, len(str(len(order) - 1)))
        self.plan = self._plan()
        self.journal = folder / _JOURNAL

    def run(self, refuse: bool, step: Callable[[int], object] | None) -> ShardIndex:
        """Make the shards that are not there yet, and the index."""
        if (self.folder / INDEX).is_file():
            index = self._finished()
            shutil.rmtree(self.journal, ignore_errors=True)
            self.kept = len(index.shards)
            return index
        self._begin()
        parts = self._kept()
        self.kept = len(parts)
        start = parts[-1].notes["next"] if parts else 0
        images = _Ahead(self._ready(start))
        try:
            while images.peek() is not None:
                parts.append(self._shard(len(parts), images, refuse))
                if step is not None:
                    step(parts[-1].notes["next"])
        finally:
            images.close()
        if not any(part.shards for part in parts):
            raise ExciteError(f"None of the images for {self.folder} can be read.")
        broken = [one for part in parts for one in part.notes["broken"]]
        index = joined(parts, {"plan": self.plan, "broken": broken})
        index.write(self.folder / INDEX)
        shutil.rmtree(self.journal, ignore_errors=True)
        return index

    def _plan(self) -> str:
        """A checksum of what is packed and how: what goes on must be what was begun."""
        settings = [self.work.shard_size, self.work.resize, self.work.quality, self.classes]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self.labels.tobytes())
        for array in Names.of(self.names).packed():
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _begin(self) -> None:
        """Note the plan, or see that it is the one that was begun."""
        plan = self.journal / "plan"
        if plan.is_file():
            if plan.read_text(errors="replace") != self.plan:
                raise UsageError(
                    f"{self.folder} holds the beginning of another packing: give the same data and settings to go on "
                    "with it, or remove the folder."
                )
        elif any(self.folder.glob("*.tar")):
            raise UsageError(f"{self.folder} holds tars that are not from here: choose an empty folder.")
        else:
            write_atomically(plan, self.plan)
        for left in (*self.folder.glob(".*.tmp"), *self.journal.glob(".*.tmp")):  # by a process that was killed
            left.unlink(missing_ok=True)

    def _finished(self) -> ShardIndex:
        """The index that is there already, if it is of the same packing."""
        index = read_index((self.folder / INDEX).read_bytes(), str(self.folder / INDEX))
        if index.notes.get("plan") != self.plan:
            raise UsageError(f"{self.folder} holds shards of other data or settings: choose an empty folder.")
        return index

    def _kept(self) -> list[ShardIndex]:
        """The finished shards, as far as they are whole; what comes after is removed."""
        parts: list[ShardIndex] = []
        with contextlib.suppress(ExciteError, OSError):
            while (note := self._note(len(parts))).is_file():
                part = read_index(note.read_bytes(), str(note))
                for shard in part.shards:
                    if sha256(self.folder / shard.name) != shard.sha256:
                        raise ExciteError(f"{shard.name} has changed.")
                parts.append(part)
        for number in range(len(parts), len(self.names)):
            if not self._note(number).is_file():
                break
            self._note(number).unlink()
        return parts

    def _note(self, number: int) -> Path:
        return self.journal / f"{number:06d}.safetensors"

    def _shard(self, number: int, images: _Ahead, refuse: bool) -> ShardIndex:
        """Write the next shard and its note."""
        broken: list[tuple[str, str]] = []
        filled, digest = _Filled(), hashlib.sha256()

        def write(file: IO[bytes]) -> None:
            def put(content: bytes) -> None:
                file.write(content)
                digest.update(content)
                filled.size += len(content)

            while (one := images.peek()) is not None:
                if one.broken:
                    if refuse:
                        raise ExciteError(
                            f"1 image is broken: {self.names[one.place]} ({one.broken}). Mend or remove it, or let "
                            "broken images be skipped."
                        )
                    broken.append((self.names[one.place], one.broken))
                    images.take()
                    continue
                key = f"{one.place:0{self.digits}d}"
                files = member(f"{key}.{one.suffix}", one.content)
                label = member(f"{key}.cls", str(self.labels[one.place]).encode())
                if filled.places and filled.size + len(files) + len(label) + len(END) > self.work.shard_size:
                    break
                images.take()
                filled.offsets.append(filled.size + _HEAD)
                filled.sizes.append(len(one.content))
                filled.crcs.append(zlib.crc32(one.content))
                filled.places.append(one.place)
                put(files)
                put(label)
            put(END)

        name = f"shard-{number:06d}.tar"
        write_atomically(self.folder / name, write)
        shards = [Shard(name, filled.size, digest.hexdigest(), len(filled.places))]
        if not filled.places:  # the last images are all broken
            (self.folder / name).unlink()
            shards.clear()
        upcoming = images.peek()
        note = ShardIndex(
            tuple(shards),
            self.classes,
            offset=np.array(filled.offsets, dtype=np.int64),
            size=np.array(filled.sizes, dtype=np.int32),
            label=self.labels[filled.places],
            crc=np.array(filled.crcs, dtype=np.uint32),
            names=Names.of(self.names[place] for place in filled.places),
            notes={"next": len(self.names) if upcoming is None else upcoming.place, "broken": broken},
        )
        note.write(self._note(number))
        return note

    def _ready(self, start: int) -> Iterator[_Ready]:
        """The images from a place on, in order, prepared by threads a little ahead."""
        starts = range(start, len(self.names), _CHUNK)
        threads = min(8, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(max_workers=threads)
        ahead: deque[Future[list[_Ready]]] = deque()
        try:
            for begin in starts:
                ahead.append(pool.submit(self._prepare, begin))
                if len(ahead) > 2 * threads:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, begin: int) -> list[_Ready]:
        return [self._one(place) for place in range(begin, min(begin + _CHUNK, len(self.names)))]

    def _one(self, place: int) -> _Ready:
        suffix = Path(self.names[place]).suffix[1:].lower()
        try:
            content = self.files.read(int(self.positions[place]))
            return _Ready(place, *self.work.prepare(content, suffix))
        except BrokenImageError as error:
            return _Ready(place, broken=str(error))
        except OSError as error:
            return _Ready(place, broken=error.strerror or str(error))


class _Ahead:
    """An iterator whose next item can be looked at before it is taken."""

    def __init__(self, items: Iterator[_Ready]) -> None:
        self._items = items
        self._next = next(items, None)

    def peek(self) -> _Ready | None:
        """The next item; None at the end."""
        return self._next

    def take(self) -> None:
        """Go on to the one after it."""
        self._next = next(self._items, None)

    def close(self) -> None:
        """Let go of what is being prepared."""
        self._items.close()  # type: ignore[attr-defined]


_HEAD = 512  # bytes of a file's header in a tar


def _within(name: str, value: int | None, low: int, high: int) -> int | None:
    if value is not None and not low <= value <= high:
        raise UsageError(f"{name} is {value}: it lies in {low} … {high:,}.")
    return value


def _from(step: Step, before: int, total: int) -> Callable[[int], object]:
    return lambda done: step(before + done, total)


def _summary(index: ShardIndex) -> dict[str, Any]:
    return {
        "images": len(index),
        "shards": len(index.shards),
        "bytes": index.bytes,
        "classes": len(np.unique(index.label)),
    }


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from packing into the same folder, which is made if missing."""
    lock = out / ".lock"
    check_writable(lock)
    with open(lock, "wb") as file:
        try:
            import fcntl

            # It goes with the process, however that ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no such locks: there, two at once are the user's to avoid
            pass
        except BlockingIOError:
            raise UsageError(f"Another process is packing into {out}: wait until it is done.") from None
        yield

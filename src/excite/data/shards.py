"""Images in shards, read by their index: by offset, from any thread or process, and nothing is unpacked."""

from __future__ import annotations

import os
import threading
import zlib
from pathlib import Path
from typing import Any, Protocol

from excite.data.draws import Indices
from excite.data.encoded import Listing, tell_broken
from excite.data.images import BrokenImageError
from excite.data.layout import SPLITS
from excite.data.names import Names
from excite.data.remote import RemoteShards, find_indexes, is_address
from excite.data.shards_index import INDEX, BrokenShardError, Shard, ShardIndex, its_images, read_index
from excite.errors import ExciteError, UsageError

_OPEN = 256  # shards that a process keeps open; what systems allow is 1,024 files and more


def is_shards(spec: str) -> bool:
    """Whether a data spec names shards."""
    return spec.startswith("shards:")


class ShardPlace(Protocol):
    """Where the shards of an index are."""

    name: str

    def open(self, shard: Shard) -> int:
        """A shard as the descriptor of an open file.

        Raises:
            BrokenShardError: it is not there, or not what the index says.
            OSError: it cannot be opened.
        """
        ...

    def together(self, index: ShardIndex) -> int:
        """How many of the shards are at hand at once."""
        ...

    def missing(self, index: ShardIndex) -> dict[str, str]:
        """The shards that are known to be missing or cut off, and why."""
        ...


class LocalShards:
    """Shards in a folder of this machine.

    Attributes:
        name: the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        self._folder = Path(folder)

    def open(self, shard: Shard) -> int:
        """The file, opened."""
        return os.open(self._folder / shard.name, os.O_RDONLY)

    def together(self, index: ShardIndex) -> int:
        """All of them."""
        return len(index.shards)

    def missing(self, index: ShardIndex) -> dict[str, str]:
        """Those that are not there, or not of the size that the index has."""
        found = {}
        for shard in index.shards:
            try:
                if reason := _wrong_size((self._folder / shard.name).stat().st_size, shard):
                    found[shard_name(self, shard)] = reason
            except OSError as error:
                found[shard_name(self, shard)] = _unreadable(error, shard)
        return found


class ShardFiles:
    """The images of a set of shards, by their position in the index.

    A shard is opened when one of its images is first asked for, and stays open, so that it may be evicted from a
    cache or renamed meanwhile. What its index says of an image's content is checked each time.

    Args:
        place: where the shards are.
        index: their index.

    Attributes:
        names: of the images.
        folders: none.
        together: how many shards are at hand at once; images of more should not be asked for in turn.
        missing: the shards that are known to be missing or cut off, and why.
    """

    def __init__(self, place: ShardPlace, index: ShardIndex) -> None:
        self.place = place
        self.index = index
        self.names: Names = index.names
        self.folders: list[str] = []
        self.together = place.together(index)
        self.missing = place.missing(index)
        self._shard = index.shard().astype("int32")
        self._keep = min(self.together, _OPEN)
        self._forget()

    def read(self, position: int) -> bytes:
        """The content of an image file.

        Raises:
            BrokenShardError: its shard is missing, cut off, or not what it was when the index was made.
            BrokenImageError: its content is not what it was.
        """
        index = self.index
        shard = index.shards[self._shard[position]]
        size = int(index.size[position])
        handle = self._opened(shard)  # held until it has been read: another thread may take it out of the list
        content = os.pread(handle.descriptor, size, int(index.offset[position]))
        if len(content) < size:
            # What lies before the cut can still be read, whichever process has found it.
            raise BrokenShardError(shard_name(self.place, shard), f"it has been cut off; {its_images(shard)}")
        if len(index.crc) and zlib.crc32(content) != index.crc[position]:
            raise BrokenImageError(f"its bytes in {shard.name} have changed: the checksum does not fit")
        return content

    def shard_of(self, positions: Indices) -> Indices:
        """The number of each one's shard."""
        return self._shard[positions].astype("int64")

    def _opened(self, shard: Shard) -> _Handle:
        if self._process != os.getpid():
            self._forget()  # forked: the lock may have been held by a thread that is not here
        handle = self._handles.get(shard.name)
        if handle is not None:
            return handle
        with self._lock:
            if shard.name in self._handles:
                return self._handles[shard.name]
            if (reason := self._failed.get(shard.name)) is not None:
                raise BrokenShardError(shard_name(self.place, shard), reason)
            try:
                handle = _Handle(self.place.open(shard))
            except OSError as error:
                raise self._broken(shard, _unreadable(error, shard)) from error
            except BrokenShardError as error:
                raise self._broken(shard, str(error)) from error
            if reason := _wrong_size(os.fstat(handle.descriptor).st_size, shard):
                raise self._broken(shard, reason)
            while len(self._handles) >= self._keep:
                # Whoever is reading from it still holds it: it is closed after that.
                del self._handles[next(iter(self._handles))]
            self._handles[shard.name] = handle
            return handle

    def _broken(self, shard: Shard, reason: str) -> BrokenShardError:
        self._failed[shard.name] = reason  # not to be fetched again for each of its images
        return BrokenShardError(shard_name(self.place, shard), reason)

    def _forget(self) -> None:
        self._process = os.getpid()
        self._handles: dict[str, _Handle] = {}
        self._failed: dict[str, str] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs, which opens its own files."""
        own = ("_handles", "_failed", "_lock", "_process")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class _Handle:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def open_shards(path: str, cache_gb: float) -> dict[str, ShardFiles]:
    """The shards in a folder or below an address: by split, or under ``""`` where there are no splits.

    Args:
        path: a folder, or an address that fsspec knows, such as ``s3://bucket/prefix``.
        cache_gb: how many gigabytes of shards from an address are kept on this machine.

    Raises:
        UsageError: no shards with an index are there, a package that takes to the address is missing, or the cache is
            too small for any of the shards.
        ExciteError: an index is damaged, or the address does not answer.
    """
    indexes = find_indexes(path) if is_address(path) else _local_indexes(Path(path))
    if not indexes:
        raise UsageError(
            f"{path} holds no shards with an index: excite data pack makes them from a folder or tar of class "
            "folders, and excite data index makes the index of shards that are there already."
        )
    files = {}
    for key, content in indexes.items():
        place: ShardPlace = LocalShards(Path(path) / key)
        if is_address(path):
            place = RemoteShards(f"{path.rstrip('/')}/{key}".rstrip("/"), cache_gb)
        index = read_index(content, f"{place.name.rstrip('/')}/{INDEX}")
        if not len(index):
            raise ExciteError(f"The shards in {place.name} hold no images.")
        files[SPLITS.get(key, "")] = ShardFiles(place, index)
    return files


def tell_missing(files: ShardFiles, refuse: bool) -> None:
    """Say once which shards are missing or cut off.

    Raises:
        ExciteError: ``refuse`` is set.
    """
    if files.missing:
        tell_broken(list(files.missing), list(files.missing.values()), refuse, "shard")


def one_shard(listing: Listing) -> Listing:
    """The images of one shard, where looking into all of them would fetch them all."""
    source = listing.source
    if not (isinstance(source, ShardFiles) and isinstance(source.place, RemoteShards) and len(listing)):
        return listing
    shards = source.shard_of(listing.files)
    return listing.only(shards == shards[0])


def shard_name(place: ShardPlace, shard: Shard) -> str:
    """What a shard is called in a message."""
    return f"{place.name.rstrip('/')}/{shard.name}"


def _local_indexes(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    names = [""] if (folder / INDEX).is_file() else [name for name in SPLITS if (folder / name / INDEX).is_file()]
    try:
        return {name: (folder / name / INDEX).read_bytes() for name in names}
    except OSError as error:
        raise ExciteError(f"Cannot read the index in {folder}: {error.strerror}.") from error


def _wrong_size(size: int, shard: Shard) -> str:
    if size == shard.size:
        return ""
    what = "it has been cut off" if size < shard.size else "it has been changed"
    return f"{what}: {size:,} bytes instead of {shard.size:,}; {its_images(shard)}"


def _unreadable(error: OSError, shard: Shard) -> str:
    return f"{(error.strerror or str(error)).lower()}; {its_images(shard)}"

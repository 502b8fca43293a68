"""Shards in object storage: fetched whole into a bounded folder of this machine, through fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from excite.data.cifar import default_root
from excite.data.layout import SPLITS
from excite.data.shards_index import INDEX, BrokenShardError, Shard, ShardIndex, its_images
from excite.errors import ExciteError, UsageError

logger = logging.getLogger("excite.data")

CACHE_GB = 10.0
_BLOCK = 1 << 22
_TRIES = 3  # storage far away refuses now and then
_ABANDONED = 3600.0  # seconds after which a fetch that no longer writes has been given up


def is_address(path: str) -> bool:
    """Whether a path is one that fsspec is to open, such as ``s3://bucket/prefix``."""
    return "://" in path


def find_indexes(address: str) -> dict[str, bytes]:
    """The indexes at an address: by the names of the splits' folders, or under ``""`` where there are none.

    Raises:
        UsageError: nothing on this machine knows such addresses.
        ExciteError: the address does not answer.
    """
    files, base = _open(address)
    with _plain_errors(address):
        if files.exists(f"{base}/{INDEX}"):
            return {"": files.cat_file(f"{base}/{INDEX}")}
        there = [name for name in SPLITS if files.exists(f"{base}/{name}/{INDEX}")]
        return {name: files.cat_file(f"{base}/{name}/{INDEX}") for name in there}


class RemoteShards:
    """Shards at an address, and those of them that are on this machine.

    The folder is shared by all processes and sets of this user; what was not used for longest makes room. What has
    been fetched is held against the index's checksum before it is used.

    Args:
        address: where they are.
        cache_gb: what the folder may hold, in gigabytes (10⁹ bytes).
        root: the folder; by default ``shards`` beside the downloaded sets.

    Attributes:
        name: the address.
    """

    def __init__(self, address: str, cache_gb: float, root: Path | None = None) -> None:
        self.name = address
        self.limit = int(cache_gb * 1e9)
        self.root = root or default_root() / "shards"
        self._folder = self.root / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]

    def together(self, index: ShardIndex) -> int:
        """How many are at hand at once: half the cache, so that those of before and those of now fit side by side.

        Raises:
            UsageError: the cache does not hold two of the largest.
        """
        largest = max(shard.size for shard in index.shards)
        if 2 * largest > self.limit and len(index.shards) > 1:
            raise UsageError(
                f"data.cache_gb is {self.limit / 1e9:g}, but the largest shard of {self.name} takes "
                f"{largest / 1e9:.3g} GB: at least two of them must fit."
            )
        if index.bytes <= self.limit:
            return len(index.shards)
        return max(1, self.limit // (2 * largest))

    def missing(self, index: ShardIndex) -> dict[str, str]:
        """Nothing: it shows when a shard is fetched."""
        return {}

    def open(self, shard: Shard) -> int:
        """The shard on this machine as an open file, fetched if it is not there.

        Raises:
            BrokenShardError: it is not at the address, cannot be fetched, or is not what the index says.
            ExciteError: the disk is full, or the folder cannot be written.
        """
        # A set that is packed anew under the same address has other checksums.
        target = self._folder / f"{shard.name.removesuffix('.tar')}-{shard.sha256[:12] or shard.size}.tar"
        if (descriptor := _used(target, shard)) is not None:
            return descriptor
        with _local_errors(self.root):
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_suffix(".lock")):
                descriptor = _used(target, shard)  # another process may have fetched it meanwhile
                return self._fetch(shard, target) if descriptor is None else descriptor

    def _fetch(self, shard: Shard, target: Path) -> int:
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with _locked(self.root / ".lock"):
                self._make_room(shard.size)
                with open(temporary, "wb") as file:
                    file.truncate(shard.size)  # so that others count it
            for attempt in range(_TRIES):
                try:
                    self._copy(shard, temporary)
                    break
                except BrokenShardError:
                    if attempt == _TRIES - 1:
                        raise
                    time.sleep(2**attempt * 0.2)
            # Opened before it has the name by which another process may remove it again.
            descriptor = os.open(temporary, os.O_RDONLY)
            with _locked(self.root / ".lock"):  # who counts what there is must not miss it between two names
                os.replace(temporary, target)
            return descriptor
        finally:
            temporary.unlink(missing_ok=True)

    def _copy(self, shard: Shard, temporary: Path) -> None:
        digest, size = hashlib.sha256(), 0
        name = f"{self.name.rstrip('/')}/{shard.name}"
        with open(temporary, "r+b") as file:
            for block in _blocks(name):
                size += len(block)
                if size > shard.size:
                    break
                digest.update(block)
                file.write(block)
        if size != shard.size or (shard.sha256 and digest.hexdigest() != shard.sha256):
            what = "it is not of the size" if size != shard.size else "its checksum is not the one"
            raise BrokenShardError(name, f"{what} that the index has; {its_images(shard)}")

    def _make_room(self, size: int) -> None:
        """Remove what was not used for longest until ``size`` more bytes fit."""
        held = []
        for path in self.root.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                if path.suffix in (".tar", ".tmp"):
                    held.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(taken for _, taken, _ in held)
        for used, taken, path in sorted(held):
            if total + size <= self.limit:
                return
            if path.suffix == ".tar" or time.time() - used > _ABANDONED:
                path.unlink(missing_ok=True)
                total -= taken


def _blocks(address: str) -> Iterator[bytes]:
    files, path = _open(address)
    try:
        with files.open(path, "rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except FileNotFoundError as error:
        raise BrokenShardError(address, "it is not there") from error
    except Exception as error:  # each kind of storage raises its own
        raise BrokenShardError(address, f"it cannot be fetched: {error or type(error).__name__}") from error


def _used(path: Path, shard: Shard) -> int | None:
    """The descriptor of a shard that is there already, and counts as used now; None where it is not."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != shard.size:
        os.close(descriptor)
        return None
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
    return descriptor


def _open(address: str) -> tuple[Any, str]:
    """fsspec's file system, made anew in each process: its connections do not outlive a fork."""
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(address)
        return files, path.rstrip("/")
    except ImportError as error:
        hint = "pip install 'excite[shards]' brings those for s3://" if address.startswith("s3:") else str(error)
        raise UsageError(f"{address} takes packages that are not installed: {hint}.") from error
    except ValueError as error:
        raise UsageError(f"{address} is no address that fsspec knows: {error}.") from error


@contextlib.contextmanager
def _plain_errors(address: str) -> Iterator[None]:
    try:
        yield
    except ExciteError:
        raise
    except Exception as error:  # each kind of storage raises its own
        raise ExciteError(f"Cannot read {address}: {error or type(error).__name__}.") from error


@contextlib.contextmanager
def _local_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExciteError(
            f"Cannot keep shards in {folder}: {error.strerror or error}; make room, or set data.cache_gb lower."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds this lock; the system frees it when a process ends, however it ends."""
    import fcntl

    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

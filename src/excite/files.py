"""Writing files so that a power cut, a full disk or ``kill -9`` never leaves half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from excite.errors import ExciteError


def write_atomically(path: str | Path, write: bytes | str | Callable[[IO[bytes]], object]) -> Path:
    """Put a whole file in place, or leave what was there.

    The content goes to a temporary name beside the target, is flushed to the disk (fsync), and is then
    renamed over the target, which POSIX makes atomic.

    Args:
        path: the file to write; its folder is made if missing.
        write: the content, or a function that writes it to an open binary file.

    Raises:
        ExciteError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    with _plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                if callable(write):
                    write(file)
                else:
                    file.write(write.encode() if isinstance(write, str) else write)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    return path


def check_writable(path: str | Path) -> None:
    """Find out before long work whether a file can be written after it.

    Args:
        path: the file; its folder is made if missing, and an empty file is tried beside it and removed.

    Raises:
        ExciteError: the folder cannot be made or written, or the path is itself a folder.
    """
    path = Path(path)
    with _plain_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.touch()
        temporary.unlink()


def write_json(path: str | Path, content: Any) -> Path:
    """Write ``content`` as indented JSON, atomically. NaN and infinities are refused: JSON has neither."""
    return write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only when the folder has reached the disk too.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExciteError(f"The disk is full: {path} was not written; what was there is untouched.") from error
        raise ExciteError(f"Cannot write {path}: {error.strerror or error}.") from error

"""Fetching published weights: from the Hugging Face hub, from an address, or from where the user has put them.

What has been fetched once is used without any network. Every file is checked against the SHA-256 that its publisher
gives: the hub's own for a file on the hub, and for an address the digits in the file's name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import logging
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from excite import files
from excite.errors import ExciteError, UsageError
from excite.spec import Spec
from excite.weights.published import HASH_IN_NAME, ByHand, Hub, Published, Url, require

log = logging.getLogger("excite.weights")

TIMEOUT = 20.0  # seconds without a byte
LARGEST = 8 << 30  # bytes; many times the largest file of weights that is published for excite's networks

_BLOCK = 1 << 20
_ABANDONED = 3600.0  # seconds: a download that nothing was added to for so long was killed
_FULL_HASH = re.compile(r"[0-9a-f]{64}")


def resolve(spec: Spec | str, weights: str | Path, progress: bool = True) -> tuple[Path, Published | None]:
    """The file that ``weights`` means: a path, or the tag of weights published for the spec, which are then fetched.

    Returns:
        The file, and the record of it if it was named by a tag.

    Raises:
        UsageError: there is neither such a file nor such a tag.
        ExciteError: as for :func:`fetch`.
    """
    path = Path(weights)
    if path.is_file():
        return path, None
    if isinstance(weights, Path) or path.suffix or len(path.parts) > 1:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"The weights file {path} {what}; expected a file, or a tag such as imagenet.")
    published = require(spec, str(weights))
    return fetch(published, progress), published


def fetch(published: Published, progress: bool = True) -> Path:
    """The local file of published weights, fetched if it is not there yet.

    Args:
        published: what to fetch.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        ExciteError: it is not there and cannot be fetched, or what came is not what was published. The message says
            where to get the file and where to put it.
    """
    where = published.where
    own = place(published)
    if own.is_file():
        if isinstance(where, Url) and not _has_hash(own, _digits(own.name)):
            raise ExciteError(
                f"{own} is not the published file: its SHA-256 does not begin with {_digits(own.name)}. Remove it."
            )
        return own
    if isinstance(where, Hub):
        return _from_hub(where, published, progress)
    if isinstance(where, ByHand):
        raise ExciteError(
            f"The weights {published.tag!r} of {published.network} cannot be fetched by a program: follow their link "
            f"on {where.page}, and put the file at {own}, or pass its path as the weights."
        )
    return _from_address(where.url, own, published, progress)


def cache_folder() -> Path:
    """Where files are kept: ``$EXCITE_CACHE``, else ``~/.cache/excite/weights``; the hub has a cache of its own."""
    return Path(os.environ.get("EXCITE_CACHE") or Path.home() / ".cache" / "excite" / "weights")


def place(published: Published) -> Path:
    """Where a file that the user has brought by hand is looked for first."""
    where = published.where
    return cache_folder() / (f"{where.repo}/{where.file}" if isinstance(where, Hub) else where.file)


# --- the hub -------------------------------------------------------------------------------------------------------


def _from_hub(where: Hub, published: Published, progress: bool) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(where.repo, where.file)
    if isinstance(cached, str):
        path = Path(cached)
        if _has_hash(path, _name_of_blob(path)):
            return path
        _remove_from_hub_cache(path)  # a damaged disk, or a download that nobody could check any more
    address = hf_hub_url(where.repo, where.file)
    try:
        with _hub_bars(progress):
            # Asked first, and once: hf_hub_download by itself tries for half a minute where there is no network.
            about = get_hf_file_metadata(address)
            path = Path(hf_hub_download(where.repo, where.file))
    except Exception as error:  # the hub's client lets through all that its HTTP library and the disk may raise
        raise _could_not(published, address, error) from error
    expected = _name_of_blob(path) or _full_hash(about.etag)
    if expected is None:
        log.warning("%s: the hub gives no SHA-256, so that the file is taken as it came", address)
    elif not _has_hash(path, expected):
        _remove_from_hub_cache(path)
        raise ExciteError(
            f"What came from {address} is not what the hub says it holds: its SHA-256 is not {expected}. It was not "
            "kept; try again."
        )
    # What the repository says of the preprocessing; beside the weights, where known_preprocessing looks for it.
    with contextlib.suppress(Exception), _hub_bars(False):
        hf_hub_download(where.repo, "config.json", revision=about.commit_hash)
    return path


def _name_of_blob(path: Path) -> str | None:
    """The SHA-256 that the hub gave for a file in its cache: the name of the file that the entry links to."""
    try:
        return _full_hash(Path(os.readlink(path)).name)
    except OSError:  # no link: a file system without them
        return None


def _full_hash(text: str | None) -> str | None:
    return text if text and _FULL_HASH.fullmatch(text) else None


def _remove_from_hub_cache(path: Path) -> None:
    with contextlib.suppress(OSError):
        blob = path.parent / os.readlink(path)
        blob.unlink()
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def _hub_bars(shown: bool) -> Iterator[None]:
    import huggingface_hub.utils

    hub: Any = huggingface_hub.utils
    if hub.are_progress_bars_disabled() or (shown and sys.stderr.isatty()):
        yield
        return
    hub.disable_progress_bars()
    try:
        yield
    finally:
        hub.enable_progress_bars()


# --- an address ----------------------------------------------------------------------------------------------------


def _from_address(url: str, target: Path, published: Published, progress: bool) -> Path:
    _clear_abandoned(target)
    expected = _digits(target.name)
    if expected is None:
        log.warning("%s: its name holds no checksum, so that the file is taken as it comes", url)

    def save(file: IO[bytes]) -> None:
        digest = hashlib.sha256()
        for block in _blocks(url, published, progress):
            digest.update(block)
            file.write(block)
        if expected and not digest.hexdigest().startswith(expected):
            raise ExciteError(
                f"What came from {url} is not the published file: its SHA-256 begins with "
                f"{digest.hexdigest()[: len(expected)]} instead of {expected}. It was not kept; try again."
            )

    return files.write_atomically(target, save)


def _blocks(url: str, published: Published, progress: bool) -> Iterator[bytes]:
    """The content of an address.

    Raises:
        ExciteError: it cannot be had, or not all of it.
    """
    if not url.startswith(("http://", "https://")):
        raise ExciteError(f"The address {url} is not one of http or https.")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "excite"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            announced = response.headers.get("Content-Length")
            size = int(announced) if announced else None
            if (size or 0) > LARGEST:
                raise ConnectionError(f"it would have {size} bytes")
            with _bar(url.rpartition("/")[2], size, progress) as advance:
                done = 0
                while block := response.read(_BLOCK):
                    done += len(block)
                    if done > LARGEST:
                        raise ConnectionError(f"it has more than {LARGEST} bytes")
                    # A full disk is the caller's to tell, as is whatever else happens while the block is used.
                    yield block
                    advance(done)
            if size is not None and done != size:
                raise ConnectionError(f"the connection broke off after {done} of {size} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _could_not(published, url, error) from error


@contextlib.contextmanager
def _bar(title: str, total: int | None, shown: bool) -> Iterator[Callable[[int], object]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


def _clear_abandoned(target: Path) -> None:
    """Remove what downloads of the same file have left that were killed; one that goes on is younger."""
    for left in target.parent.glob(f".{target.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()


def _digits(name: str) -> str | None:
    """The first digits of a file's SHA-256, by its name."""
    match = HASH_IN_NAME.search(name)
    return match[1] if match else None


# --- both ----------------------------------------------------------------------------------------------------------


def _has_hash(path: Path, expected: str | None) -> bool:
    """Whether a file's SHA-256 begins as expected; True where nothing is known to expect."""
    if expected is None:
        return True
    about = path.stat()
    return _sha256(path.resolve(), about.st_size, about.st_mtime_ns).startswith(expected)


@lru_cache(maxsize=16)
def _sha256(path: Path, _size: int, _modified: int) -> str:
    # Kept for as long as the file is the same, as one command may ask for it several times.
    return files.sha256(path)


def _could_not(published: Published, address: str, error: Exception) -> ExciteError:
    what = f"the weights {published.tag!r} of {published.network}"
    if isinstance(error, OSError) and error.errno in _DISK:
        problem = f"Could not keep {what}: {error.strerror}: {error.filename or 'the cache'}"
    else:
        problem = f"Could not fetch {what}: {_reason(error)}"
    return ExciteError(
        f"{problem}. Download {address} where that can be done, and put it at {place(published)}, or pass its path "
        "as the weights."
    )


_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code} {getattr(response, 'reason_phrase', '')}".rstrip()
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

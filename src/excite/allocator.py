"""What glibc does with large buffers that are freed: a setting of the whole process, and so only ever of our own.

An activation is as large as a few mebibytes and lives for milliseconds. By default glibc returns every one to the
kernel, which then has to fault in and clear the pages of the next.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from typing import Any

log = logging.getLogger("excite")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_buffers() -> None:
    """Tell glibc to keep large freed buffers, and say so in the log.

    ``EXCITE_KEEP_BUFFERS=0`` turns this off; on systems without glibc it does nothing.
    """
    if os.environ.get("EXCITE_KEEP_BUFFERS") != "0" and keep_buffers():
        log.info("Allocator: freed buffers are kept for the next step (EXCITE_KEEP_BUFFERS=0 turns this off)")


def keep_buffers() -> bool:
    """The setting itself, for good, whatever the environment says: whether this system has it."""
    mallopt = _glibc("mallopt")
    return bool(mallopt is not None and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def can_keep_buffers() -> bool:
    """Whether this system has the setting; nothing is changed."""
    return _glibc("mallopt") is not None


def give_back() -> None:
    """Return to the system, once, what is free at this moment; without glibc, nothing."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """A function of the C library's; None where it is another library."""
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None

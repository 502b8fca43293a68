"""Settings of our own process that make training on a CPU faster; the library never touches them."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

log = logging.getLogger("excite")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_buffers() -> None:
    """Tell glibc to keep large freed buffers instead of giving each back to the system.

    An activation is as large as a few mebibytes and lives for milliseconds. By default glibc returns every one to the
    kernel, which then has to fault in and clear the pages of the next. ``EXCITE_KEEP_BUFFERS=0`` turns this off; on
    systems without glibc it does nothing.
    """
    if sys.platform != "linux" or os.environ.get("EXCITE_KEEP_BUFFERS") == "0":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    if mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1):
        log.info("Allocator: freed buffers are kept for the next step (EXCITE_KEEP_BUFFERS=0 turns this off)")

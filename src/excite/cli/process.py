"""Settings of our own process that make training on a CPU faster; the library never touches them."""

from __future__ import annotations

from excite.allocator import keep_freed_buffers

__all__ = ["keep_freed_buffers"]

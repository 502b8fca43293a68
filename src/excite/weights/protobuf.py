"""The wire format of Protocol Buffers, as much of it as a file of weights needs.

Google's own library would hold every number of the file a second time, as a Python list or an array of its own. This
walk hands out where each value lies; the numbers stay where they are, in a file mapped into memory.

Format: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # the wire types; 3 and 4 are groups, which Caffe never had

_WIDTHS = {FIXED32: 4, FIXED64: 8}
# The largest published Caffe networks have some 50,000 fields. Without a limit, a small file of the smallest fields
# would become a large heap of Python objects.
_MOST_FIELDS = 300_000


class WireError(ValueError):
    """The bytes are not the message they should be; says why, without a full stop."""


class Field(NamedTuple):
    """One field of a message, or, of numbers of fixed width, all that follow one another under the same key.

    Attributes:
        number: the field's number in its message.
        wire_type: ``VARINT``, ``LENGTH``, ``FIXED32`` or ``FIXED64``.
        value: of a ``VARINT``, the number.
        start: where the value begins: of ``LENGTH`` what the length counts, of fixed width the first number.
        stop: where the value, of several numbers the last one, ends.
    """

    number: int
    wire_type: int
    value: int
    start: int
    stop: int


class Wire:
    """Messages in a buffer.

    Args:
        data: the file.
    """

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self._fields_left = _MOST_FIELDS

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """The fields of the message between two positions, in order.

        Raises:
            WireError: on reaching one that is cut off, reaches over the message's end, or cannot be in such a file.
        """
        at = start
        while at < stop:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise WireError(f"it has more than {_MOST_FIELDS:,} fields, far more than any network")
            key, after = self._varint(at, stop)
            number, wire_type = key >> 3, key & 7
            value = 0
            if number == 0:
                raise WireError(f"there is no field at byte {at:,}")
            if wire_type == VARINT:
                first = after
                value, last = self._varint(after, stop)
            elif wire_type == LENGTH:
                length, first = self._varint(after, stop)
                last = first + length
            elif wire_type in _WIDTHS:
                first = after
                last = self._last_of_run(at, after, stop, _WIDTHS[wire_type])
            else:
                raise WireError(f"the field at byte {at:,} is of no kind that such a file has")
            if last > stop:
                raise WireError(f"the field at byte {at:,} runs past the end of what holds it")
            yield Field(number, wire_type, value, first, last)
            at = last

    def varints(self, field: Field) -> Iterator[int]:
        """The whole numbers in a field, packed or single.

        Raises:
            WireError: the field holds something else.
        """
        if field.wire_type == VARINT:
            yield field.value
            return
        if field.wire_type != LENGTH:
            raise WireError(f"field {field.number} at byte {field.start:,} should hold whole numbers")
        at = field.start
        while at < field.stop:
            value, at = self._varint(at, field.stop)
            yield value

    def floats(self, field: Field, width: int) -> NDArray[np.float32] | NDArray[np.float64]:
        """The floating-point numbers of ``width`` bytes in a field, packed or not.

        Packed ones are a view of the file; their address need not be a multiple of their width.

        Raises:
            WireError: the field holds something else.
        """
        number = np.dtype(f"<f{width}")
        size = field.stop - field.start
        if field.wire_type == LENGTH and size % width == 0:
            return np.frombuffer(self.data, number, size // width, field.start) if size else np.empty(0, number)
        if _WIDTHS.get(field.wire_type) == width:
            gap = 1 if size > width else 0  # the key in front of each; that of the first is not in the field
            record = np.dtype([("key", "u1"), ("number", number)]) if gap else np.dtype([("number", number)])
            count = (size + gap) // record.itemsize
            # torch wants steps of whole numbers, and here they are one byte more
            return np.ascontiguousarray(np.frombuffer(self.data, record, count, field.start - gap)["number"])
        raise WireError(f"field {field.number} at byte {field.start:,} should hold numbers of {width} bytes")

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        """A whole number of up to 64 bits and the position after it."""
        value = 0
        for position in range(at, min(at + 10, stop)):
            byte = self.data[position]
            value |= (byte & 0x7F) << 7 * (position - at)
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, position + 1
        if stop - at < 10:
            raise WireError(f"it is cut off at byte {stop:,}")
        raise WireError(f"the number at byte {at:,} is longer than 10 bytes")

    def _last_of_run(self, at: int, first: int, stop: int, width: int) -> int:
        """Where the last number ends of a run of numbers that each have the key at ``at``.

        A network written without packing has millions of them, too many to step over one by one.
        """
        last = first + width
        if first - at > 1:
            return last
        record = np.dtype([("key", "u1"), ("number", f"V{width}")])
        key, left, look = self.data[at], (stop - last) // record.itemsize, 64
        while left > 0:
            keys = np.frombuffer(self.data, record, min(look, left), last)["key"]
            same = keys == key
            if not same.all():
                return last + int(same.argmin()) * record.itemsize
            last += len(keys) * record.itemsize
            left -= len(keys)
            look = min(2 * look, 1 << 20)
        return last

"""PNG files chunk by chunk: all that they hold beside the pixels is carried over as it is, at every bit depth.

PNG (Portable Network Graphics) Specification, Third Edition, W3C.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[Any]
Chunk = tuple[bytes, bytes]
"""Type and content."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, COLOUR, PALETTE, ALPHA = 0, 2, 3, 4
_COLOUR_TYPES = {1: GREY, 2: GREY | ALPHA, 3: COLOUR, 4: COLOUR | ALPHA}
_BLOCK = 1 << 22  # bytes of pixels that are compressed at a time

# What says how the pixels are to be seen, and stays true of other pixels (Sect. 11.3); bKGD only of the same type.
_SEEN = {b"cHRM", b"gAMA", b"iCCP", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"bKGD", b"pHYs"}


@dataclass(frozen=True)
class Header:
    """What the first chunk says.

    Attributes:
        width: in pixels.
        height: in pixels.
        depth: bits of a sample: 1, 2, 4, 8 or 16.
        colour_type: 0 grey, 2 colour, 3 palette, 4 grey with alpha, 6 colour with alpha.
    """

    width: int
    height: int
    depth: int
    colour_type: int


def read_chunks(path: str | Path) -> tuple[Header, list[Chunk]]:
    """The header, and all chunks but those of pixels and palette.

    Raises:
        ValueError: the file is cut off or no PNG.
    """
    kept = []
    with open(path, "rb") as file:
        if file.read(8) != SIGNATURE:
            raise ValueError("not a PNG file")
        for kind, length in _headers(file):
            if kind in (b"IDAT", b"PLTE", b"IEND"):
                file.seek(length + 4, 1)
                continue
            content = file.read(length + 4)[:-4]
            if len(content) < length:
                raise ValueError("the file is cut off")
            kept.append((kind, content))
    if not kept or kept[0][0] != b"IHDR" or len(kept[0][1]) != 13:
        raise ValueError("the file has no header")
    return Header(*struct.unpack(">IIBB", kept[0][1][:10])), kept[1:]


def _headers(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        if kind == b"IEND":
            return


def carried(header: Header, chunks: list[Chunk], channels: int, alpha: bool) -> list[Chunk]:
    """The chunks that hold for a file of other pixels, of this many channels (1 or 3), with alpha or without."""
    same_type = header.colour_type | ALPHA == _COLOUR_TYPES[channels + alpha] | ALPHA
    kept = []
    for kind, content in chunks:
        # A lower-case letter at the end: safe to copy (Sect. 5.4), as text and EXIF are. The others are known ones.
        if (kind in _SEEN or kind[3:].islower()) and (kind != b"bKGD" or same_type):
            kept.append((kind, content))
    return kept


def colour_key(header: Header, chunks: list[Chunk]) -> tuple[int, ...] | None:
    """The one grey value or colour that is see-through, by the file's bit depth; None where there is none."""
    if header.colour_type not in (GREY, COLOUR):
        return None
    for kind, content in chunks:
        if kind == b"tRNS":
            return struct.unpack(f">{len(content) // 2}H", content)
    return None


def read_deep(path: str | Path) -> Pixels:
    """The pixels of a file of 16 bits a sample, with alpha as the last channel: uint16 (H, W, 1 … 4).

    Raises:
        ValueError: the file is cut off, damaged, or interlaced.
    """
    inflate, parts = zlib.decompressobj(), []
    with open(path, "rb") as file:
        file.seek(len(SIGNATURE))
        for kind, length in _headers(file):
            content = file.read(length + 4)[:-4]
            if kind == b"IHDR":
                width, height, _, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", content)
                channels = {made: channels for channels, made in _COLOUR_TYPES.items()}[colour_type]
                across = 2 * width * channels
                missing = height * (1 + across)
                if interlaced:
                    raise ValueError("an interlaced PNG of 16 bits is not read: save it without interlacing")
            elif kind == b"IDAT" and missing:
                parts.append(inflate.decompress(content, missing))  # no more than belongs to the picture
                missing -= len(parts[-1])
    if missing:
        raise ValueError("the file is cut off")
    filtered = np.frombuffer(b"".join(parts), np.uint8).reshape(height, 1 + across)
    rows = _unfiltered(filtered[:, 0], filtered[:, 1:].reshape(height, width, 2 * channels))
    return rows.reshape(height, across).view(">u2").astype(np.uint16).reshape(height, width, channels)


def _unfiltered(filters: npt.NDArray[np.uint8], rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The bytes of the pixels from their differences (Sect. 9.2).

    A pixel needs its neighbours to the left and above, so that all pixels of an oblique line, one of each row, can be
    found at once.

    Args:
        filters: of each row, (H,).
        rows: (H, W, bytes of a pixel).
    """
    height, width, step = rows.shape
    if filters.max() > 4:
        raise ValueError("the file is damaged: it names a filter that there is not")
    # Above the first row and left of the first column lie zeros.
    whole = np.zeros((height + 1, width + 1, step), np.uint8)
    whole[1:, 1:] = rows
    flat = whole.reshape(-1, step)
    oblique = width  # from a pixel to the one below it and to the left
    which = [filters == number for number in range(5)]
    for line in range(height + width - 1):
        first, last = max(line - width + 1, 0), min(line, height - 1)
        start = (first + 1) * (width + 1) + line - first + 1
        here = slice(start, start + (last - first) * oblique + 1, oblique)

        def shifted(back: int, here: slice = here) -> npt.NDArray[np.uint8]:
            return flat[here.start - back : here.stop - back : here.step]

        left, up, corner = shifted(1), shifted(width + 1), shifted(width + 2)
        _, subs, ups, halves, paeths = (chosen[first : last + 1] for chosen in which)
        flat[here][subs] += left[subs]
        flat[here][ups] += up[ups]
        if halves.any():
            flat[here][halves] += _halfway(left[halves], up[halves])
        if paeths.any():
            flat[here][paeths] += _paeth(left[paeths], up[paeths], corner[paeths])
    return np.ascontiguousarray(whole[1:, 1:])


def write(file: IO[bytes], pixels: Pixels, chunks: list[Chunk]) -> None:
    """Write a PNG file.

    Args:
        file: open for writing.
        pixels: uint8 or uint16 (H, W, C), C = 1 (grey), 2 (grey and alpha), 3 or 4.
        chunks: what else goes into it, as :func:`carried` gives it.
    """
    height, width, channels = pixels.shape
    depth = 8 * pixels.dtype.itemsize
    file.write(SIGNATURE)
    _put(file, b"IHDR", struct.pack(">IIBBBBB", width, height, depth, _COLOUR_TYPES[channels], 0, 0, 0))
    for kind, content in chunks:
        _put(file, kind, content)
    deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED)
    step = max(1, _BLOCK // (width * channels * pixels.dtype.itemsize))
    above = np.zeros((1, width * channels * pixels.dtype.itemsize), np.uint8)
    for top in range(0, height, step):
        block = np.ascontiguousarray(pixels[top : top + step], dtype=pixels.dtype.newbyteorder(">"))
        rows = block.view(np.uint8).reshape(len(block), -1)
        _put(file, b"IDAT", deflate.compress(_filtered(rows, above, channels * depth // 8)))
        above = rows[-1:]
    _put(file, b"IDAT", deflate.flush())
    _put(file, b"IEND", b"")


def _put(file: IO[bytes], kind: bytes, content: bytes) -> None:
    if content or kind == b"IEND":
        file.write(struct.pack(">I", len(content)) + kind + content)
        file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))))


def _filtered(rows: npt.NDArray[np.uint8], above: npt.NDArray[np.uint8], step: int) -> bytes:
    """Each row as its differences to its neighbours by that filter which makes them smallest (Sect. 9.2, 12.7).

    Args:
        rows: (rows, bytes).
        above: the row before them, (1, bytes).
        step: bytes of a pixel.
    """
    up = np.concatenate((above, rows[:-1]))
    left, corner = np.zeros_like(rows), np.zeros_like(rows)
    left[:, step:], corner[:, step:] = rows[:, :-step], up[:, :-step]
    filters = (rows, rows - left, rows - up, rows - _halfway(left, up), rows - _paeth(left, up, corner))
    cost = np.stack([np.abs(found.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64) for found in filters])
    best = cost.argmin(0)
    answer = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    answer[:, 0] = best
    for number, found in enumerate(filters):
        answer[best == number, 1:] = found[best == number]
    return answer.tobytes()


def _halfway(left: npt.NDArray[np.uint8], up: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return ((left.astype(np.uint16) + up) // 2).astype(np.uint8)


def _paeth(
    left: npt.NDArray[np.uint8], up: npt.NDArray[np.uint8], corner: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Whichever of the three is nearest to left + up − corner."""
    to_left = np.abs(up.astype(np.int16) - corner)
    to_up = np.abs(left.astype(np.int16) - corner)
    to_corner = np.abs(left.astype(np.int16) + up - 2 * corner.astype(np.int16))
    nearer = np.where(to_up <= to_corner, up, corner)
    return np.where((to_left <= to_up) & (to_left <= to_corner), left, nearer)

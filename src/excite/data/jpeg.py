"""What a JPEG file's header says, and how to decode no more of the file than a window needs.

The rows of a JPEG file's pixels are coded from the top to the bottom (ITU-T T.81, Annex A.2). So a file whose frame
header (B.2.2) is made to claim fewer rows than there are is a smaller picture with the same first rows, and a decoder
is done with it sooner; what follows is skipped without being decoded, up to the end-of-image marker.
"""

from __future__ import annotations

from dataclasses import dataclass

_START, _END, _SCAN, _HUFFMAN_TABLES, _APP1 = 0xD8, 0xD9, 0xDA, 0xC4, 0xE1
_SEQUENTIAL = (0xC0, 0xC1)  # Huffman-coded frames whose rows come in order; in progressive ones all come many times
_FRAMES = range(0xC0, 0xD0)
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Frame:
    """An upright picture of one scan, 8 bits deep, grey or of three colours.

    Attributes:
        height: in pixels.
        width: in pixels.
        step: how many rows of pixels are coded together.
        height_at: where in the file the height stands, as two bytes.
    """

    height: int
    width: int
    step: int
    height_at: int


def plain_frame(content: bytes) -> Frame | None:
    """The frame of a usual JPEG file; None for anything out of the ordinary, which is to be decoded as a whole.

    Out of the ordinary are progressive, arithmetic-coded and lossless files, several scans, other depths, print
    colours, an orientation that is not stated to be upright where a camera left notes, and a file without an end.
    """
    try:
        return _read(content)
    except (IndexError, ValueError):
        return None


def _read(content: bytes) -> Frame | None:
    if content[:2] != bytes((0xFF, _START)):
        return None
    frame, components, noted = None, 0, False
    at = 2
    while content[at] == 0xFF:
        marker, size = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == _SCAN:
            whole = content[at + 4] == components and content.rfind(bytes((0xFF, _END)), at) > 0
            return frame if whole else None
        if marker in _FRAMES and marker != _HUFFMAN_TABLES:
            if marker not in _SEQUENTIAL or frame is not None:
                return None
            components = content[at + 9]
            frame = _frame(content, at, components)
            if frame is None:
                return None
        elif marker == _APP1 and content[at + 4 : at + 8] == b"Exif":
            if noted or not _upright(content[at + 4 : at + 2 + size]):
                return None
            noted = True
        if size < 2:
            return None
        at += 2 + size
    return None


def _frame(content: bytes, at: int, components: int) -> Frame | None:
    height, width = (int.from_bytes(content[place : place + 2], "big") for place in (at + 5, at + 7))
    if content[at + 4] != 8 or components not in (1, 3) or not (height and width):
        return None
    sampling = max(content[at + 11 + 3 * n] & 15 for n in range(components))
    return Frame(height, width, 8 * sampling, at + 5) if sampling else None


def _upright(notes: bytes) -> bool:
    from PIL import Image

    exif = Image.Exif()
    try:
        exif.load(notes)
        return exif.get(_ORIENTATION) == 1
    except Exception:  # Pillow's parsers raise nearly anything on bad input
        return False


def first_rows(content: bytes, frame: Frame, rows: int) -> bytes:
    """The file made to end a little below its first ``rows`` rows; those are decoded to the same pixels as before."""
    # Colours are coded at half the height, and stretched with a look at the row below: so one step more is kept.
    kept = (-(-rows // frame.step) + 1) * frame.step
    if kept >= frame.height:
        return content
    return b"".join((content[: frame.height_at], kept.to_bytes(2, "big"), content[frame.height_at + 2 :]))

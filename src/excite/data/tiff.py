"""TIFF files: 8 bits, 16 bits and floats, grey and colour, with the tags around the pixels.

Pillow reads and writes most of them. It knows no colour of 16 bits and no colour of floats: those go through the
package tifffile (``pip install 'excite[denoising]'``).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from excite.data.images import BrokenImageError

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[Any]

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Tags that say how the pixels lie in the file, which the writer decides: all others are carried over.
_LAYOUT = {
    254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293, 301,
    317, 318, 320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 338, 339, 340, 341, 347, *range(512, 522), 529,
    530, 531, 532, 50838, 50839,
}  # fmt: skip
_BITS, _PHOTOMETRIC, _SAMPLES, _FORMAT = 258, 262, 277, 339
_ICC, _EXIF, _GPS = 34675, 34665, 34853
ORIENTATION = 274
_INVERSE = {6: 8, 8: 6}  # a quarter turn; every other orientation undoes itself
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_PLANES = 2  # of the planar configuration: one channel after the other
_UNSIGNED, _FLOAT = 1, 3
# Compressions as Pillow names them, of those that lose nothing.
_LOSSLESS = {"raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "zstd", "lzma"}


def read(path: str | Path, image: Image.Image | None) -> tuple[Pixels, dict[str, Any]]:
    """The pixels, and what :func:`write` carries over.

    Args:
        path: the file.
        image: the same, opened by Pillow from an open file; None where Pillow cannot.

    Returns:
        uint8, uint16 or float32 (H, W, 1 … 4), alpha as the last channel; and the tags.

    Raises:
        BrokenImageError: it cannot be read, has several pages, or numbers without a known white.
    """
    if image is None:
        return _read_by_tifffile(path)
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, form = set(tags.get(_BITS, (1,))), set(tags.get(_FORMAT, (_UNSIGNED,)))
    dtype = _dtype(bits, form)
    samples = int(tags.get(_SAMPLES, 1))
    if dtype != np.uint8 and samples > 1:
        return _read_by_tifffile(path)
    if dtype != np.uint8 and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise BrokenImageError("a TIFF of 16 bits or floats whose zero is white is not read: invert it")
    kept = kept_of(image)
    pixels = unturned(image)
    return np.ascontiguousarray(pixels[..., None] if pixels.ndim == 2 else pixels, dtype=dtype), kept


def _dtype(bits: set[int], form: set[int]) -> np.dtype[Any]:
    """The type of the pixels as they lie in the file."""
    for dtype, known in ((np.uint8, (8, _UNSIGNED)), (np.uint16, (16, _UNSIGNED)), (np.float32, (32, _FLOAT))):
        if (bits, form) == ({known[0]}, {known[1]}):
            return np.dtype(dtype)
    what = {_UNSIGNED: "whole numbers", 2: "signed numbers", _FLOAT: "floats"}.get(min(form), "values")
    raise BrokenImageError(
        f"a TIFF of {'/'.join(map(str, sorted(bits)))} bits ({what}) has no known white: save 8 or 16 bits, or "
        "32-bit floats"
    )


def _read_by_tifffile(path: str | Path) -> tuple[Pixels, dict[str, Any]]:
    tifffile = _tifffile()
    try:
        with tifffile.TiffFile(path) as file:
            if len(file.pages) > 1:
                raise BrokenImageError(
                    f"it has {len(file.pages)} pages, and only single pictures are read: save each by itself"
                )
            page = file.pages[0]
            dtype = _dtype({page.bitspersample}, {int(page.sampleformat)})
            if page.photometric not in (_BLACK_IS_ZERO, _RGB):
                raise BrokenImageError(f"its colours are {page.photometric.name}: expected grey or RGB")
            pixels = page.asarray()
            if page.planarconfig == _PLANES and pixels.ndim == 3:
                pixels = np.moveaxis(pixels, 0, 2)
            tags = {tag.code: tag.value for tag in page.tags if tag.code not in (*_LAYOUT, _EXIF, _GPS)}
            kept: dict[str, Any] = {
                "tags": {code: value for code, value in tags.items() if code != _ICC},
                "types": {tag.code: int(tag.dtype) for tag in page.tags},
                "groups": {tag.code: {} for tag in page.tags if tag.code in (_EXIF, _GPS)},
                "icc_profile": tags.get(_ICC),
                "compression": "raw" if page.compression == 1 else "tiff_adobe_deflate",
            }
    except BrokenImageError:
        raise
    except Exception as error:  # it raises nearly anything on bad input
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BrokenImageError(f"the file is cut off or damaged ({reason})") from error
    return np.ascontiguousarray(pixels[..., None] if pixels.ndim == 2 else pixels, dtype=dtype), kept


def array_of(image: Image.Image) -> Pixels:
    """An image's pixels, copied in parts: Pillow's own conversion holds a large one three times over."""
    image.load()
    height, step = image.height, 256
    first = np.asarray(image.crop((0, 0, image.width, min(step, height))))
    pixels = np.empty((height, *first.shape[1:]), first.dtype)
    pixels[:step] = first
    for top in range(step, height, step):
        pixels[top : top + step] = np.asarray(image.crop((0, top, image.width, min(top + step, height))))
    return pixels


def unturned(image: Image.Image) -> Pixels:
    """The pixels of a TIFF that Pillow opened, as they lie in the file: Pillow applies the orientation tag."""
    turn = image.tag_v2.get(ORIENTATION, 1)  # type: ignore[attr-defined]
    pixels = array_of(image)
    if ORIENTATION in image.getexif():  # it was not applied
        return pixels
    turn = _INVERSE.get(turn, turn)
    if turn in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    # What is left of the turn: mirrored upside down, left to right, or both.
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def kept_of(image: Image.Image) -> dict[str, Any]:
    """What :func:`write` carries over: the tags, and how the pixels are compressed."""
    exif = image.getexif()
    groups = {tag: dict(exif.get_ifd(tag)) for tag in (_EXIF, _GPS)}
    tags = image.tag_v2  # type: ignore[attr-defined]
    return {
        "tags": {tag: tags[tag] for tag in tags if tag not in _LAYOUT and tag not in (_ICC, _EXIF, _GPS)},
        "types": dict(tags.tagtype),
        "groups": {tag: group for tag, group in groups.items() if group},
        "icc_profile": image.info.get("icc_profile"),
        "compression": image.info.get("compression", "raw"),
    }


def write(file: IO[bytes], pixels: Pixels, kept: dict[str, Any]) -> None:
    """Write a TIFF file, compressed as the original was (without loss where the original lost something).

    Args:
        file: open for writing.
        pixels: uint8, uint16 or float32 (H, W, C), alpha as the last of 2 or 4 channels.
        kept: of :func:`kept_of`.
    """
    if pixels.dtype == np.uint8 or pixels.shape[2] == 1:
        _by_pillow(file, pixels, kept)
    else:
        _by_tifffile(file, pixels, kept)


def _by_pillow(file: IO[bytes], pixels: Pixels, kept: dict[str, Any]) -> None:
    from PIL import Image, TiffImagePlugin

    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in kept["tags"].items():
        tags.tagtype[tag] = kept["types"][tag]
        tags[tag] = value
    for tag, group in kept["groups"].items():
        tags[tag] = group
    compression = kept["compression"]
    if compression not in _LOSSLESS:
        compression = "tiff_adobe_deflate"
    options: dict[str, Any] = {"icc_profile": kept["icc_profile"]} if kept["icc_profile"] else {}
    if compression != "raw":
        options["compression"] = compression
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    # libtiff writes to a file of its own making: Pillow hands it a descriptor, which must not be the caller's.
    content = io.BytesIO()
    image.save(content, "TIFF", tiffinfo=tags, **options)
    file.write(content.getbuffer())


def _by_tifffile(file: IO[bytes], pixels: Pixels, kept: dict[str, Any]) -> None:
    extra = [
        (tag, kept["types"][tag], _count(value), value, True)
        for tag, value in kept["tags"].items()
        if tag not in (282, 283, 296, 305)
    ]
    tags = kept["tags"]
    options: dict[str, Any] = {}
    if 282 in tags and 283 in tags:
        options["resolution"] = tuple(numerator / denominator for numerator, denominator in (tags[282], tags[283]))
        options["resolutionunit"] = int(tags.get(296, 2))
    if pixels.shape[2] in (2, 4):
        options["extrasamples"] = ["unassalpha"]
    _tifffile().imwrite(
        file,
        pixels,
        photometric="rgb" if pixels.shape[2] > 2 else "minisblack",
        planarconfig="contig",
        compression=None if kept["compression"] == "raw" else "zlib",
        predictor=kept["compression"] != "raw" and pixels.dtype == np.uint16,
        metadata=None,
        software=tags.get(305, False),
        iccprofile=kept["icc_profile"],
        extratags=extra,
        **options,
    )


def _count(value: Any) -> int:
    if isinstance(value, str):
        return 0  # tifffile counts it
    return len(value) if isinstance(value, tuple | bytes) else 1


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise BrokenImageError(
            "a TIFF of colours in 16 bits or floats needs the package tifffile: pip install 'excite[denoising]'"
        ) from None
    return tifffile

"""Clean images for denoising, decoded at the depth that their files have, held in memory or decoded when needed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from excite.data.base import GREY_WEIGHTS
from excite.data.encoded import FileSource
from excite.data.images import MAX_PIXELS, BrokenImageError, decode
from excite.errors import ExciteError

if TYPE_CHECKING:
    from PIL import Image

Stored = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

WHITE = {1: np.float32(255), 2: np.float32(65535)}
"""The largest value of a pixel, by its bytes."""

_BITS_PER_SAMPLE, _ORIENTATION = 258, 274  # TIFF's tags
_UPPER = np.uint16(256)
_RGB, _GREY_WITH_ALPHA = 2, 4  # PNG's colour types


class CleanImages(Protocol):
    """Images of various sizes, by position.

    Attributes:
        sizes: height and width of each.
        item_sizes: bytes per value of each, 1 or 2.
        refuse: whether an image that turns out broken ends the work; else it is skipped.
    """

    sizes: Sequence[tuple[int, int]]
    item_sizes: Sequence[int]
    refuse: bool

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Stored:
        """Image ``i`` as it is stored, (C, H, W).

        Raises:
            BrokenImageError: it cannot be decoded.
        """
        ...


class HeldImages:
    """Images that are held decoded in memory, at their files' depth.

    Args:
        pixels: uint8 or uint16, (C, H, W) each.
    """

    refuse = False

    def __init__(self, pixels: Sequence[Stored]) -> None:
        self.pixels = pixels
        self.sizes: Sequence[tuple[int, int]] = [(image.shape[1], image.shape[2]) for image in pixels]
        self.item_sizes: Sequence[int] = [image.itemsize for image in pixels]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Stored:
        return self.pixels[i]


class FileImages:
    """Images that are decoded each time they are asked for, because all of them would not fit in memory.

    Args:
        source: where the files are.
        files: position of each image in the source.
        sizes: height and width of each, by its header.
        item_sizes: bytes per value of each.
        channels: 3 for colour, 1 for grey.
        refuse: whether an image that turns out broken ends the work; else it is skipped.
    """

    def __init__(
        self,
        source: FileSource,
        files: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        item_sizes: Sequence[int],
        channels: int,
        refuse: bool,
    ) -> None:
        self.source = source
        self.files = files
        self.sizes = sizes
        self.item_sizes = item_sizes
        self.channels = channels
        self.refuse = refuse

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Stored:
        image = decode_deep(content_of(self.source, self.files[i]), self.channels)
        if image.shape[1:] != self.sizes[i]:
            raise BrokenImageError(f"it is no longer of {self.sizes[i][0]}×{self.sizes[i][1]} pixels")
        return image


def unit(image: Stored) -> npt.NDArray[np.float32]:
    """Stored pixels as float32 in 0 … 1, of the same shape."""
    return np.divide(image, WHITE[image.itemsize], dtype=np.float32)


def content_of(source: FileSource, position: int) -> bytes:
    """The bytes of a file.

    Raises:
        BrokenImageError: it cannot be read.
    """
    try:
        return source.read(position)
    except OSError as error:
        raise BrokenImageError(error.strerror or str(error)) from error


def measure(content: bytes) -> tuple[int, int, int]:
    """Height, width and bytes per value of an image, by its header alone, orientation applied.

    Raises:
        BrokenImageError: the file is empty, no image, too large, or has several frames.
    """
    with _opened(content) as image:
        # To look for more would be to decode the image, which Pillow does without being asked.
        told = "exif" in image.info or image.format == "TIFF"
        turned = told and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        size = (image.width, image.height) if turned else (image.height, image.width)
        return *size, 2 if _is_deep(image, content) else 1


def decode_deep(content: bytes, channels: int) -> Stored:
    """Decode an image file at its own depth.

    Orientation, palettes, print colours and transparency are dealt with as :func:`excite.data.images.decode` does.
    Colour becomes grey by the luma of ITU-R BT.601, rounded, as in MATLAB's rgb2gray; grey becomes colour by
    repeating.

    Args:
        content: the file's bytes.
        channels: 3 for colour, 1 for grey.

    Returns:
        (channels, H, W), uint8, or uint16 where the file has 16 bits: white is 65535 then.

    Raises:
        BrokenImageError: the file is empty, cut off, no image, too large, or has several frames.
    """
    with _opened(content) as image:
        if not _is_deep(image, content):
            return decode(content, channels).numpy()
        deep = _sixteen_bit(image, content)
    deep = _on_white(deep)
    if len(deep) == channels:
        return np.ascontiguousarray(deep)
    if channels == 3:
        return np.repeat(deep, 3, axis=0)
    return np.rint(np.tensordot(np.array(GREY_WEIGHTS), deep, axes=1)).astype(np.uint16)[None]


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """A still image, not decoded yet; whatever goes wrong with it is a broken image."""
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise BrokenImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImageError(f"{image.width} × {image.height} pixels are more than {MAX_PIXELS:,} allowed")
            # Some cameras put a preview behind the photograph (MPO), which is a still all the same.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise BrokenImageError(f"it has {frames} frames, and a single image is wanted")
            yield image
    except BrokenImageError:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError("not an image that can be read") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on bad input
        raise BrokenImageError(str(error).strip().partition("\n")[0] or type(error).__name__) from error


def _is_deep(image: Image.Image, content: bytes) -> bool:
    """Whether a file has 16 bits per value."""
    if image.format == "PNG":
        return content[24] == 16  # of the header, which is always the first chunk
    if image.format == "TIFF":
        depths: Any = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
        return max(depths) == 16 and image.mode != "F"
    return image.format == "PPM" and image.mode == "I"


def _sixteen_bit(image: Image.Image, content: bytes) -> npt.NDArray[np.uint16]:
    """(C, H, W) with as many channels as the file has."""
    from PIL import ImageOps

    if image.mode.startswith("I"):
        return np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)[None]
    return _colour_png(content) if image.format == "PNG" else _colour_tiff(image, content)


def _colour_png(content: bytes) -> npt.NDArray[np.uint16]:
    """A PNG of 16 bits with more than one channel, of which Pillow keeps the upper 8 bits only."""
    if content[25] == _GREY_WITH_ALPHA:
        # Four bytes a pixel, as RGBA of 8 bits has them.
        four = _pixels_as(content, "RGBA")
        return four[::2] * _UPPER + four[1::2]
    mode = "RGB" if content[25] == _RGB else "RGBA"
    # Of little-endian values the second byte is the upper one: here, where they are big-endian, the lower one.
    return _pixels_as(content, f"{mode};16B") * _UPPER + _pixels_as(content, f"{mode};16L")


def _pixels_as(content: bytes, layout: str) -> npt.NDArray[np.uint16]:
    """The 8-bit pixels (C, H, W) that Pillow reads where it takes a file's bytes to lie in another layout."""
    from PIL import Image, ImageFile, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        assert isinstance(image, ImageFile.ImageFile)
        image.tile = [type(tile)(*tile[:3], layout) for tile in image.tile]
        return np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16).transpose(2, 0, 1)


def _colour_tiff(image: Image.Image, content: bytes) -> npt.NDArray[np.uint16]:
    try:
        import tifffile
    except ImportError as error:
        raise BrokenImageError("16-bit colour TIFF takes tifffile: pip install 'excite[denoising]'") from error
    if image.mode not in ("RGB", "RGBA"):
        raise BrokenImageError(f"16-bit TIFF of mode {image.mode!r} is not known")
    values: npt.NDArray[Any] = tifffile.imread(io.BytesIO(content))
    if values.ndim == 3 and values.shape[-1] in (3, 4):
        values = values.transpose(2, 0, 1)  # else its colours lie apart, as ours do
    if values.ndim != 3 or values.shape[0] not in (3, 4) or image.getexif().get(_ORIENTATION, 1) != 1:
        raise BrokenImageError("16-bit colour TIFF is read with 3 or 4 channels, upright")
    return values.astype(np.uint16)


def _on_white(image: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Without the channel of transparency, if there is one."""
    if len(image) not in (2, 4):
        return image
    alpha = image[-1] / 65535
    return np.rint(image[:-1] * alpha + 65535 * (1 - alpha)).astype(np.uint16)


def as_error(name: str, error: BrokenImageError) -> ExciteError:
    """The error for a broken image that cannot be left out."""
    return ExciteError(f"The image {name} cannot be read: {error}. Mend or remove it.")

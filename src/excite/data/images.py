"""Decoding image files, and bringing images to a network's size.

A file from somewhere else may be anything: cut off, empty, enormous, turned, in print colours, 16 bits deep,
with a palette or see-through. What can be shown on a screen is decoded to uint8; all else is a broken image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from excite.data.jpeg import first_rows, plain_frame
from excite.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
MAX_PIXELS = 89_478_485  # Pillow's own bound: a quarter of a GiB of colour pixels
_IN_CACHE = 1 << 17  # values that are worked on at once: half a MiB of float32
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")

Window = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""
Choice = Callable[[int, int], Window]
"""Chooses a window of an image of this height and width."""


class BrokenImageError(Exception):
    """A file that cannot be decoded; the message says why in a few words.

    Attributes:
        container: the name of the archive that it lies in, where all of that is broken.
    """

    container: str = ""


def is_image_name(name: str) -> bool:
    """Whether a file's suffix is that of an image, in capitals or not."""
    return Path(name).suffix.lower() in SUFFIXES


def decode(content: bytes, channels: int = 3) -> torch.Tensor:
    """Decode an image file.

    The orientation noted by the camera is applied, print colours (CMYK) become RGB, 16 bits become 8 by
    division (not by clipping), a transparent image is laid on white, and of several frames the first is taken.

    Args:
        content: the file's bytes.
        channels: 3 for colour (grey is repeated), 1 for grey.

    Returns:
        uint8 (channels, H, W), channels-last in memory.

    Raises:
        BrokenImageError: the file is empty, cut off, no image, or larger than ``MAX_PIXELS``.
    """
    from PIL import ImageOps

    with _opened(content) as file:
        turned = "exif" in file.info or file.format == "TIFF"
        image = ImageOps.exif_transpose(file) if turned else file
        return _tensor(_eight_bit(image, file.format, _mode(channels)))


def decode_window(content: bytes, channels: int, choose: Choice) -> torch.Tensor:
    """Decode a window of an image file: the same pixels that :func:`decode` gives, cut out.

    Of a usual JPEG file what lies below the window is not decoded.

    Args:
        content: the file's bytes.
        channels: 3 for colour (grey is repeated), 1 for grey.
        choose: is told height and width, and answers with the window.

    Returns:
        uint8 (channels, height, width) of the window, channels-last in memory.

    Raises:
        BrokenImageError: as :func:`decode`.
    """
    frame = plain_frame(content)
    if frame is None or frame.height * frame.width > MAX_PIXELS:
        image = decode(content, channels)
        return cut(image, choose(*image.shape[-2:]))
    top, left, height, width = choose(frame.height, frame.width)
    with _opened(first_rows(content, frame, top + height)) as file:
        window = file.crop((left, top, left + width, top + height))
        return _tensor(_eight_bit(window, file.format, _mode(channels)))


def cut(image: torch.Tensor, window: Window) -> torch.Tensor:
    """A window of an image (C, H, W)."""
    top, left, height, width = window
    return image[:, top : top + height, left : left + width]


def header_size(content: bytes) -> tuple[int, int]:
    """Height and width by the file's header alone, orientation applied.

    Raises:
        BrokenImageError: the file is empty, no image, or larger than ``MAX_PIXELS``.
    """
    with _opened(content) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def fit(image: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Resize the shorter side and crop the centre, as ``preprocessing`` says.

    Args:
        image: (C, H, W).

    Returns:
        (C, size, size), of the same dtype.
    """
    size = preprocessing.size
    if preprocessing.resize is None and image.shape[-2:] == (size, size):
        return image
    image = _resize_shorter(image, preprocessing.resize or size, preprocessing.interpolation)
    # Rounded to even, as torchvision does: published networks were scored on these very pixels.
    top, left = (round((side - size) / 2) for side in image.shape[-2:])
    return image[:, top : top + size, left : left + size]


def normalise(
    images: torch.Tensor, preprocessing: Preprocessing, fresh: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Pixels to the network's input, (x / 255 − mean) / std.

    Args:
        images: uint8, (N, C, H, W), on any device.
        fresh: makes the float32 tensor that takes the result, of the shape and layout of the one it is given; None
            for ordinary memory.

    Returns:
        float32, of the same shape and layout in memory.
    """
    images = dense(images)
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    # One multiplication and one addition per value.
    scale, shift = (by_channel(images, values).to(images.device) for values in (1 / (255 * std), -mean / std))
    done = fresh(images) if fresh else torch.empty_like(images, dtype=torch.float32)
    # A few images at a time: the second and the third pass then find them in the cache.
    few = max(1, _IN_CACHE // max(1, images[:1].numel())) if images.device.type == "cpu" else max(1, len(images))
    rows, values = as_rows(images), as_rows(done)
    for start in range(0, len(images), few):
        values[start : start + few].copy_(rows[start : start + few]).mul_(scale).add_(shift)
    return done


def as_input(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Images (N, C, H, W) as the network takes them: pixels (uint8) normalised, floats, which are input already, as
    they are."""
    return normalise(images, preprocessing) if images.dtype == torch.uint8 else images


def dense(images: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) without gaps in memory, channels-last if they lie so with gaps: themselves, or a copy."""
    if images.is_contiguous() or _lies_channels_last(images):
        return images
    lie = torch.channels_last if images.stride(1) == 1 else torch.contiguous_format
    return images.contiguous(memory_format=lie)


def as_rows(images: torch.Tensor) -> torch.Tensor:
    """A view of dense images (N, C, H, W) for arithmetic with :func:`by_channel`.

    Channels-last images are seen as (N, H, W·C), since an operation on rows of three values would be slow; others as
    they are.
    """
    return images.permute(0, 2, 3, 1).flatten(2) if _lies_channels_last(images) else images


def by_channel(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One value per channel, (…, C), in the shape that suits :func:`as_rows` of the images."""
    if _lies_channels_last(images):
        return values.repeat(*[1] * (values.ndim - 1), images.shape[-1]).unsqueeze(-2)
    return values[..., None, None]


def _lies_channels_last(images: torch.Tensor) -> bool:
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resize (C, H, W) to (C, *size), with antialiasing."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    return F.resize(image, list(size), interpolation=InterpolationMode(interpolation), antialias=True)


def _resize_shorter(image: torch.Tensor, target: int, interpolation: str) -> torch.Tensor:
    height, width = image.shape[-2:]
    if min(height, width) == target:
        return image
    if height <= width:
        return resize(image, (target, max(target, int(target * width / height))), interpolation)
    return resize(image, (max(target, int(target * height / width)), target), interpolation)


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """The file, whose pixels are still to be read; whatever goes wrong then, too, is a broken image."""
    if not content:
        raise BrokenImageError("the file is empty")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as file:
            _check_size(file)
            yield file
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on bad input
        raise BrokenImageError(_reason(error)) from error


def _mode(channels: int) -> str:
    return "RGB" if channels == 3 else "L"


def _tensor(image: Image.Image) -> torch.Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1)


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BrokenImageError(f"{image.width} × {image.height} pixels are more than the {MAX_PIXELS:,} allowed")


def _eight_bit(image: Image.Image, file_format: str | None, mode: str) -> Image.Image:
    from PIL import Image

    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and file_format == "PNG"):
        # Pillow's own conversion clips at 255; white is 65535.
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BrokenImageError(f"{file_format} pixels of mode {image.mode!r} have no known white: save 8 bits")
    if image.mode in ("PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels than the {MAX_PIXELS:,} allowed"
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__

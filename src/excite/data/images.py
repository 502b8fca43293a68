"""Decoding image files, and bringing images to a network's size.

A file from somewhere else may be anything: cut off, empty, enormous, turned, in print colours, 16 bits deep,
with a palette or see-through. What can be shown on a screen is decoded to uint8; all else is a broken image.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from excite.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
MAX_PIXELS = 89_478_485  # Pillow's own bound: a quarter of a GiB of colour pixels
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


class BrokenImageError(Exception):
    """A file that cannot be decoded; the message says why in a few words."""


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
        uint8 (channels, H, W).

    Raises:
        BrokenImageError: the file is empty, cut off, no image, or larger than ``MAX_PIXELS``.
    """
    if not content:
        raise BrokenImageError("the file is empty")
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as file:
            _check_size(file)
            turned = "exif" in file.info or file.format == "TIFF"
            image = ImageOps.exif_transpose(file) if turned else file
            pixels = np.array(_eight_bit(image, file.format, "RGB" if channels == 3 else "L"))
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on bad input
        raise BrokenImageError(_reason(error)) from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def header_size(content: bytes) -> tuple[int, int]:
    """Height and width by the file's header alone, orientation applied.

    Raises:
        BrokenImageError: the file is empty, no image, or larger than ``MAX_PIXELS``.
    """
    if not content:
        raise BrokenImageError("the file is empty")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_size(image)
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except BrokenImageError:
        raise
    except Exception as error:
        raise BrokenImageError(_reason(error)) from error


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


def normalise(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Pixels to the network's input, (x / 255 − mean) / std.

    Args:
        images: uint8, (N, C, H, W).

    Returns:
        float32, of the same shape.
    """
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    # One multiplication and one addition per value.
    return images.to(torch.float32).mul_(1 / (255 * std)).add_(-mean / std)


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

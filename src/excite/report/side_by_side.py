"""A picture before, after, and what was taken from it, side by side."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[Any]

WIDEST = 2400
_GAP, _CAPTION = 8, 26
_SMALLEST = 240  # a panel narrower than that is enlarged
_GAINS = (1, 2, 3, 4, 5, 8, 10, 15, 20)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def side_by_side(before: Pixels, after: Pixels, white: float, orientation: int = 1) -> Image.Image:
    """Before, after, and their difference amplified around grey.

    Where the picture has to be made smaller to fit, which hides its noise, its middle follows below at full size.

    Args:
        before: (H, W, C), C = 1 or 3.
        after: of the same shape.
        white: the value of white in both.
        orientation: how the picture is to be turned, as EXIF has it, 1 … 8.

    Returns:
        At most ``WIDEST`` pixels wide.
    """
    gain = _gain(before, after, white)
    height, width = before.shape[:2]
    panel = (WIDEST - 2 * _GAP) // 3
    upright = orientation < 5
    across, down = (width, height) if upright else (height, width)
    # Thinned out before anything is computed in floats: a picture may be as large as memory allows.
    step = max(1, min(across // (2 * panel), down // (2 * panel)))
    rows = [_row(before[::step, ::step], after[::step, ::step], white, gain, orientation, panel)]
    if across > panel:
        side = min(panel, height, width)
        top, left = (height - side) // 2, (width - side) // 2
        middle = (slice(top, top + side), slice(left, left + side))
        rows.append(_row(before[middle], after[middle], white, gain, orientation, panel))
    names = ("before", "after", "difference" if gain == 1 else f"difference x {gain}")
    return _compose(rows, names)


def _gain(before: Pixels, after: Pixels, white: float) -> int:
    """By how much the difference is amplified: as much as leaves three standard deviations within the range."""
    step = max(1, math.isqrt(before.shape[0] * before.shape[1] // 1_000_000))
    difference = (before[::step, ::step].astype(np.float32) - after[::step, ::step]) / white
    spread = float(np.sqrt(np.mean(np.square(difference)))) or 1.0
    return max(gain for gain in _GAINS if gain == 1 or gain * 3 * spread <= 0.7)


def _row(
    before: Pixels, after: Pixels, white: float, gain: int, orientation: int, panel: int
) -> tuple[Image.Image, ...]:
    before, after = (image.astype(np.float32) / white for image in (before, after))
    difference = 0.5 + gain * (before - after)
    return tuple(_panel(image, orientation, panel) for image in (before, after, difference))


def _panel(values: Pixels, orientation: int, panel: int) -> Image.Image:
    shown = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown).convert("RGB")
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    if image.width > panel:
        return image.resize((panel, max(1, round(image.height * panel / image.width))), Image.Resampling.BOX)
    times = -(-_SMALLEST // image.width)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _compose(rows: list[tuple[Image.Image, ...]], names: tuple[str, ...]) -> Image.Image:
    width = max(sum(image.width for image in row) for row in rows) + _GAP * (len(names) - 1)
    height = _CAPTION + sum(row[0].height for row in rows) + _GAP * (len(rows) - 1)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15)
    top = _CAPTION
    for number, row in enumerate(rows):
        left = 0
        for image, name in zip(row, names, strict=True):
            if number == 0:
                draw.text((left + 2, 4), name, fill="black", font=font)
            canvas.paste(image, (left, top))
            left += image.width + _GAP
        top += row[0].height + _GAP
    return canvas

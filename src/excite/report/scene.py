"""Pictures of a scene: the map of its classes, the map of uncertainty, the confusion matrix.

Drawn with Pillow and its built-in font, which has the letters of English only; others are drawn without their marks.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from excite.report.palette import UNLABELLED, class_colours, heat, rgb

Labels = npt.NDArray[np.integer[Any]]
Bytes = npt.NDArray[np.uint8]

SIDE = 560
"""The longer side of a map in a picture, in pixels; a small scene is enlarged by whole numbers up to about this."""

LARGEST = 1400
"""What a large scene is shrunk to."""

_INK, _SOFT, _LINE, _PAPER = "#1c1e21", "#5f6670", "#d5d8dc", "#ffffff"
_MARGIN, _GAP = 24, 20


def scene_picture(
    labels: Labels,
    classes: Sequence[str],
    false_colour: Bytes | None = None,
    truth: Labels | None = None,
    title: str | None = None,
    note: str | None = None,
    entropy: npt.NDArray[np.floating[Any]] | None = None,
) -> Image.Image:
    """The map of a scene beside what is known of it, over a legend.

    A scene of more than 1,400 pixels is thinned out to that.

    Args:
        labels: a class for each pixel, counted from 0, or −1 for none; (rows, cols).
        classes: their names.
        false_colour: three bands as red, green and blue, uint8 (rows, cols, 3), or a thinned-out version of them.
        truth: what is known, as ``labels``.
        title: a line above.
        note: a smaller line below it.
        entropy: of each pixel's class, 0 … 1, for one more map; its colours end at what one pixel in 200 exceeds.
    """
    step = thinning(labels.shape)
    labels, truth = labels[::step, ::step], None if truth is None else truth[::step, ::step]
    colours = np.concatenate((class_colours(len(classes)), [rgb(UNLABELLED)])).astype(np.uint8)
    panels = [] if false_colour is None else [_Panel("False colour", false_colour)]
    if truth is not None:
        panels.append(_Panel("Ground truth", colours[truth]))
    panels.append(_Panel("Map (its shares below)", colours[labels]))
    if entropy is not None:
        values = entropy[::step, ::step]
        most = _round_up(float(np.quantile(values, 0.995)))
        panels.append(_Panel(f"Uncertainty, black 0 to pale {most:g}", heat(values / most)))
    counts = [
        np.bincount(part[part >= 0].ravel(), minlength=len(classes)) for part in (labels, truth) if part is not None
    ]
    shown = [i for i in range(len(classes)) if any(count[i] for count in counts)] or list(range(len(classes)))
    legend = [(tuple(colours[i].tolist()), classes[i], _share(counts[0][i] / max(labels.size, 1))) for i in shown]
    if (truth is not None and (truth < 0).any()) or (labels < 0).any():
        legend.append((rgb(UNLABELLED), "unlabelled", ""))
    return _compose(panels, legend, title, note)


def uncertainty_picture(
    entropy: npt.NDArray[np.floating[Any]], title: str | None = "Uncertainty", note: str | None = None
) -> Image.Image:
    """A map of uncertainty with its colour bar.

    Args:
        entropy: 0 (sure) … 1 (all classes alike), (rows, cols); the colours end at what one pixel in 200 exceeds.
        title: a line above.
        note: a smaller line below it.
    """
    step = thinning(entropy.shape)
    values = np.asarray(entropy[::step, ::step], np.float32)
    most = _round_up(float(np.quantile(values, 0.995)))
    scaled = _enlarged(heat(values / most))
    left, top = _MARGIN, _heading(title, note)
    height, width = scaled.shape[:2]
    canvas = Image.new("RGB", (max(left + width + _GAP + 80, _width(title, note)), top + height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_heading(draw, title, note)
    canvas.paste(Image.fromarray(scaled), (left, top))
    bar = heat(np.linspace(1, 0, height, dtype=np.float32))[:, None].repeat(18, 1)
    x = left + width + _GAP
    canvas.paste(Image.fromarray(bar), (x, top))
    draw.rectangle((x, top, x + 17, top + height - 1), outline=_LINE)
    for i in range(6):
        y = top + round((height - 1) * (1 - i / 5))
        draw.line((x + 18, y, x + 23, y), fill=_SOFT)
        draw.text((x + 29, y), f"{most * i / 5:.3g}", fill=_INK, font=_font(14), anchor="lm")
    return canvas


def confusion_picture(
    confusion: Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]],
    classes: Sequence[str],
    title: str | None = "Confusion matrix",
    note: str | None = None,
) -> Image.Image:
    """A confusion matrix: true classes in rows, with the share of each that was found.

    Args:
        confusion: counts, (classes, classes), true classes in rows.
        classes: their names.
        title: a line above.
        note: a smaller line below it.
    """
    counts = np.asarray(confusion, np.int64)
    count = len(classes)
    names = [f"{i + 1}  {_plain(name)}" for i, name in enumerate(classes)]
    font, small = _font(15), _font(13 if count <= 24 else 11)
    widest = max((len(str(value)) for value in counts.ravel()), default=1)
    cell = max(30, round(small.getlength("0" * widest)) + 14)
    label = round(max(font.getlength(name) for name in names)) + 14
    left, top = _MARGIN + label, _heading(title, note) + 50
    size = cell * count
    canvas = Image.new("RGB", (max(left + size + 96, _width(title, note)), top + size + _MARGIN + 4), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_heading(draw, title, note)
    draw.text((left + size / 2, top - 30), "said by the network", fill=_SOFT, font=font, anchor="mb")
    draw.text((left - 14, top - 6), "truth", fill=_SOFT, font=font, anchor="rb")
    draw.text((left + size + 76, top - 6), "found", fill=_SOFT, font=font, anchor="rb")
    totals = counts.sum(1)
    for i in range(count):
        middle = top + cell * i + cell / 2
        draw.text((left - 14, middle), names[i], fill=_INK, font=font, anchor="rm")
        draw.text((left + cell * i + cell / 2, top - 6), str(i + 1), fill=_SOFT, font=small, anchor="mb")
        if totals[i]:
            found = _percent(counts[i, i] / totals[i])
            draw.text((left + size + 76, middle), found, fill=_INK, font=font, anchor="rm")
        for j in range(count):
            share = counts[i, j] / totals[i] if totals[i] else 0.0
            box = (left + cell * j, top + cell * i, left + cell * (j + 1), top + cell * (i + 1))
            colour = _cell_colour(share, i == j)
            draw.rectangle(box, fill=colour, outline="#e8eaec")
            if counts[i, j]:
                ink = "#ffffff" if sum(colour) < 330 else _INK
                place = (left + cell * j + cell / 2, middle)
                draw.text(place, str(counts[i, j]), fill=ink, font=small, anchor="mm")
    return canvas


def false_colour(bands: npt.NDArray[np.floating[Any]]) -> Bytes:
    """Three bands as red, green and blue, each stretched between its 2nd and 98th percentile.

    Args:
        bands: (3, rows, cols).

    Returns:
        uint8 (rows, cols, 3).
    """
    finite = np.where(np.isfinite(bands), bands, np.nan).reshape(3, -1)
    low, high = np.nan_to_num(np.nanpercentile(finite, (2, 98), axis=1))
    span = np.where(high > low, high - low, 1)
    scaled = (np.nan_to_num(bands) - low[:, None, None]) / span[:, None, None]
    return np.moveaxis((255 * np.clip(scaled, 0, 1)).round().astype(np.uint8), 0, -1)


def thinning(shape: tuple[int, ...]) -> int:
    """Every how many-th row and column of a scene a picture shows."""
    return max(math.ceil(max(shape[:2]) / LARGEST), 1)


@dataclass(frozen=True)
class _Panel:
    caption: str
    pixels: Bytes


def _compose(
    panels: Sequence[_Panel],
    legend: Sequence[tuple[tuple[int, ...], str, str]],
    title: str | None,
    note: str | None,
) -> Image.Image:
    rows, cols = panels[-1].pixels.shape[:2]
    scale = max(SIDE // max(rows, cols), 1)
    high, wide = rows * scale, cols * scale
    top = _heading(title, note) + 26
    beneath = wide > 2 * high and len(panels) * wide > LARGEST  # side by side they would be a ribbon
    right, down = (0, high + _GAP + 26) if beneath else (wide + _GAP, 0)
    width = max(2 * _MARGIN + wide + (len(panels) - 1) * right, _width(title, note), 420)
    bottom = top + high + (len(panels) - 1) * down + 22
    font = _font(15)
    entry = max(round(font.getlength(_plain(name)) + font.getlength(share)) for _, name, share in legend) + 56
    columns = max(min((width - 2 * _MARGIN) // entry, len(legend)), 1)
    deep = -(-len(legend) // columns)
    canvas = Image.new("RGB", (width, bottom + deep * 26 + _MARGIN - 8), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_heading(draw, title, note)
    for i, panel in enumerate(panels):
        left, upper = _MARGIN + i * right, top + i * down
        draw.text((left, upper - 8), panel.caption, fill=_SOFT, font=font, anchor="ls")
        smooth = panel.pixels.shape[:2] != (rows, cols)
        image = Image.fromarray(panel.pixels)
        canvas.paste(
            image.resize((wide, high), Image.Resampling.BOX if smooth else Image.Resampling.NEAREST), (left, upper)
        )
    across = (width - 2 * _MARGIN) // columns
    for i, (colour, name, share) in enumerate(legend):
        x, y = _MARGIN + i // deep * across, bottom + i % deep * 26
        draw.rectangle((x, y, x + 17, y + 17), fill=colour, outline="#8a9099")
        draw.text((x + 26, y + 9), _plain(name), fill=_INK, font=font, anchor="lm")
        draw.text((x + 34 + font.getlength(_plain(name)), y + 9), share, fill=_SOFT, font=font, anchor="lm")
    return canvas


def _enlarged(pixels: Bytes) -> Bytes:
    scale = max(SIDE // max(pixels.shape[:2]), 1)
    return pixels.repeat(scale, 0).repeat(scale, 1)


def _heading(title: str | None, note: str | None) -> int:
    """Where what comes below the heading begins."""
    return _MARGIN + (34 if title else 0) + (24 if note else 0)


def _width(title: str | None, note: str | None) -> int:
    lengths = [_font(22).getlength(_plain(title or "")), _font(15).getlength(_plain(note or ""))]
    return 2 * _MARGIN + round(max(lengths))


def _draw_heading(draw: ImageDraw.ImageDraw, title: str | None, note: str | None) -> None:
    y = _MARGIN - 4
    if title:
        draw.text((_MARGIN, y), _plain(title), fill=_INK, font=_font(22))
        y += 34
    if note:
        draw.text((_MARGIN, y), _plain(note), fill=_SOFT, font=_font(15))


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _plain(text: str) -> str:
    """The text in the letters that the built-in font has."""
    replaced = text.translate(
        {ord("×"): "x", ord("–"): "-", ord("—"): "-", ord("−"): "-", ord("ß"): "ss", ord("’"): "'"}
    )
    parts = unicodedata.normalize("NFKD", replaced)
    return "".join(c if c.isascii() else "" if unicodedata.combining(c) else "?" for c in parts)


def _share(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 or share == 0 else "< 0.1 %"


def _percent(share: float) -> str:
    """Rounded down, so that only a class that is found entirely has 100 %."""
    return f"{math.floor(1000 * share) / 10:.1f} %"


def _cell_colour(share: float, diagonal: bool) -> tuple[int, int, int]:
    """From white to blue for what is right, to red for what is wrong; small shares are made visible."""
    depth = share**0.5 if share else 0.0
    end = (28, 92, 168) if diagonal else (190, 30, 45)
    return tuple(round(255 + (to - 255) * depth) for to in end)  # type: ignore[return-value]


def _round_up(value: float) -> float:
    """The next of 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1."""
    return next((step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if value <= step), 1.0)

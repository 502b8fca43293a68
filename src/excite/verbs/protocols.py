"""Named ways to show an image to a network that is to be scored: ``center-crop(224,256)``, ``ten-crop``, …

Where there are several views of an image, the network's probabilities are averaged over them, as the papers do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from excite.arguments import known
from excite.data import Preprocessing
from excite.data.load import SMALL
from excite.data.views import CENTRE, CORNERS_AND_CENTRE, Views, grid
from excite.errors import UsageError

NAMES = ("center-crop", "ten-crop", "multi-crop")
EXAMPLES = "center-crop(224,256), ten-crop(224,256) or multi-crop(224,scales=224/256/288,grid=3,flip)"
CROP = 0.875  # 224 of 256: what is cropped of the shorter side where nothing is said of it
GRID = 3
MOST_PIXELS = 4096
MOST_VIEWS = 1024

_FORM = re.compile(r"([^(:]*)(?:\((.*)\)|:(.*))?", re.DOTALL)
_OPTIONS = ("flip", "scales", "grid")


@dataclass(frozen=True)
class Protocol:
    """A protocol as it was asked for; what was left open follows from the network (:meth:`views`).

    Attributes:
        name: one of ``NAMES``.
        size: side of the views in pixels; None for the network's own.
        scales: what the shorter side is resized to, in pixels; empty for the usual.
        grid: of ``multi-crop``: crops in a row and in a column of the grid.
        flip: whether mirror images are asked about, too; ``ten-crop`` always does.
    """

    name: str
    size: int | None = None
    scales: tuple[int, ...] = ()
    grid: int = GRID
    flip: bool = False

    def views(self, preprocessing: Preprocessing) -> Views:
        """The views that this comes to for a network that is usually fed as ``preprocessing`` says.

        Raises:
            UsageError: a scale is smaller than the views, there are too many, or all would be the same.
        """
        size = self.size or preprocessing.size
        scales = self.scales or (self._usual_scale(size, preprocessing),)
        if min(scales) < size:
            raise UsageError(
                f"The protocol {self.name} crops {size} pixels, but resizes the shorter side to only {min(scales)}: "
                "resize to at least as much."
            )
        if self.name == "ten-crop" and scales == (size,):
            raise UsageError(
                f"The protocol ten-crop({size},{size}) would crop all of a square image five times: give a larger "
                f"second number, such as ten-crop({size},{round(size / CROP)})."
            )
        places = {"center-crop": CENTRE, "ten-crop": CORNERS_AND_CENTRE}.get(self.name) or grid(self.grid)
        views = Views(size, scales, places, self.flip or self.name == "ten-crop")
        if len(views) > MOST_VIEWS:
            raise UsageError(
                f"The protocol {self.name} asks for {len(views)} views of each image: {MOST_VIEWS} at most."
            )
        return views

    def _usual_scale(self, size: int, preprocessing: Preprocessing) -> int:
        if self.size is None and preprocessing.resize and preprocessing.resize > size:
            return preprocessing.resize
        # Small images are shown whole: there is nothing around their object that could be cropped away.
        if self.name != "ten-crop" and (size <= SMALL or self.size is None):
            return size
        return round(size / CROP)

    def named(self, views: Views) -> str:
        """The protocol's full name, with every number that ``views`` settled."""
        parts = [str(views.size)]
        if self.name == "multi-crop":
            parts += [f"scales={'/'.join(map(str, views.scales))}", f"grid={self.grid}"]
        else:
            parts += map(str, views.scales)
        if views.flip and self.name != "ten-crop":
            parts.append("flip")
        return f"{self.name}({','.join(parts)})"


def parse_protocol(text: str) -> Protocol:
    """A protocol by its name.

    ``center-crop(SIZE,RESIZE)``: the shorter side is resized to RESIZE pixels and the central SIZE × SIZE are shown.
    ``ten-crop(SIZE,RESIZE)``: the four corners, the centre, and the mirror images of all (Krizhevsky et al. 2012,
    Sect. 4.1). ``multi-crop(SIZE,scales=A/B/…,grid=N)``: of each scale N × N crops, evenly from border to border.
    ``flip`` adds the mirror images. SIZE may be left out for the network's own, and RESIZE for SIZE / 0.875 (for SIZE
    itself where that is at most 64 pixels). ``center-crop:224,256`` is the same as ``center-crop(224,256)``.

    Raises:
        UsageError: it is none of these.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise _wrong(text, "its parentheses do not match")
    name, inside, after = (part and part.strip() for part in match.groups())
    known(name, list(NAMES), "protocol")
    listed = inside or after
    words = [word.strip() for word in listed.split(",")] if listed else []
    numbers = [word for word in words if re.fullmatch(r"[0-9]+", word)]
    if words[: len(numbers)] != numbers or len(numbers) > (1 if name == "multi-crop" else 2):
        raise _wrong(text, _order(name))
    asked = _options(text, name, words[len(numbers) :])
    sides = [_pixels(text, number) for number in numbers]
    protocol = Protocol(
        name,
        sides[0] if sides else None,
        tuple(sides[1:]) or tuple(_pixels(text, scale) for scale in asked.get("scales", "").split("/") if scale),
        int(asked.get("grid", GRID)),
        "flip" in asked,
    )
    if protocol.size and protocol.scales and min(protocol.scales) < protocol.size:
        raise _wrong(text, f"it crops {protocol.size} pixels of only {min(protocol.scales)}")
    return protocol


def _order(name: str) -> str:
    if name == "multi-crop":
        return "one number comes first, the size of the crops, and the rest is scales=A/B/…, grid=N or flip"
    return "first come the size of the crops and what the shorter side is resized to, and the rest is flip"


def _options(text: str, name: str, words: list[str]) -> dict[str, str]:
    """What comes after the numbers, by its key."""
    asked: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or re.fullmatch(r"[-+.0-9]+", key):
            raise _wrong(text, _order(name))
        known(key, list(_OPTIONS), f"part of the protocol {name}")
        if key in asked:
            raise _wrong(text, f"{key} comes twice")
        if key != "flip" and name != "multi-crop":
            raise _wrong(text, f"{key} is for multi-crop")
        if bool(equals) == (key == "flip"):
            raise _wrong(text, "flip takes no value" if key == "flip" else f"{key} needs a value, as in {key}=3")
        if key == "scales" and not re.fullmatch(r"[0-9]+(/[0-9]+)*", value):
            raise _wrong(text, "scales are whole numbers with / between them, as in scales=224/256/288")
        if key == "grid" and not re.fullmatch(r"[1-9][0-9]?", value):
            raise _wrong(text, "grid is a whole number from 1 to 99")
        asked[key] = value
    return asked


def _pixels(text: str, number: str) -> int:
    if not 1 <= (pixels := int(number[:9])) <= MOST_PIXELS:
        raise _wrong(text, f"{number} is not a number of pixels from 1 to {MOST_PIXELS}")
    return pixels


def _wrong(text: str, why: str) -> UsageError:
    return UsageError(f"In the protocol {text!r}, {why}: write it like {EXAMPLES}.")

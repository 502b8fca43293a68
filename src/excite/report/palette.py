"""Colours of maps."""

from __future__ import annotations

import colorsys

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# The first sixteen were searched for so that the least distance of any two in OKLab (Ottosson 2020) is large, as
# people with full colour vision see them, and as those without red or green cones do (the simulation of Machado,
# Oliveira & Fernandes 2009). The next eight are told apart by full colour vision only.
CLASSES = (
    "#5270ff", "#f5ff00", "#eb1f00", "#e0c2eb", "#7a0070", "#b8ad00", "#00adc2", "#3d1fb8",
    "#ad47c2", "#00eb7a", "#852900", "#00853d", "#ff7aff", "#adffe0", "#526685", "#c28585",
    "#ffcc7a", "#996600", "#f54799", "#a399ff", "#3d520a", "#00b800", "#00e0ff", "#b81f66",
)  # fmt: skip
UNLABELLED = "#2a2b2e"

# Nine points of matplotlib's magma (van der Walt & Smith 2015), whose lightness rises evenly.
_MAGMA = ("#000004", "#1d1147", "#51127c", "#832681", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf")


def class_colours(count: int) -> Bytes:
    """One colour for each class: uint8 (count, 3). Beyond 24 they are told apart by nobody, only drawn."""
    named = [rgb(colour) for colour in CLASSES[:count]]
    for i in range(len(named), count):
        turn = 0.618034 * (i - len(CLASSES))  # the golden ratio: no two hues come close for long
        red, green, blue = colorsys.hls_to_rgb(turn % 1, 0.35 + 0.1 * (i % 4), 0.6)
        named.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(named, np.uint8).reshape(-1, 3)


def heat(values: npt.NDArray[np.floating]) -> Bytes:
    """Values in 0 … 1 as colours from black over red to pale yellow: uint8 (…, 3)."""
    points = np.array([rgb(colour) for colour in _MAGMA], np.float32)
    places = np.linspace(0, 1, len(points))
    parts = [np.interp(np.clip(values, 0, 1), places, points[:, part]) for part in range(3)]
    return np.stack(parts, -1).round().astype(np.uint8)


def rgb(colour: str) -> tuple[int, int, int]:
    """``#ff8000`` as (255, 128, 0)."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)

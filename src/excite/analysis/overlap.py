"""How much the test pixels of a scene are given away by where they lie.

Drawn at random, training pixels lie all over a scene, and the window of nearly every test pixel holds some of them.
What a network then gets right may be remembered rather than understood (Nalepa, Myller & Kawulok 2019, "Validating
Hyperspectral Image Segmentation", IEEE GRSL 16(8)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """What test pixels share with training pixels, in percent.

    Attributes:
        windows: test pixels whose window holds at least one training pixel.
        nearest: accuracy of guessing each test pixel's class from the nearest training pixel, by its place alone and
            without looking at a single spectrum.
    """

    windows: float
    nearest: float


STEPS = (1, 2, 3, 6, 12)
"""Ends of the ranges of distances, in pixels, that accuracies are given for; beyond the last there is one more."""


@dataclass(frozen=True)
class Range:
    """The test pixels at a distance from training pixels of their own class.

    Attributes:
        nearest: least distance, in pixels, the larger of that in rows and that in columns.
        farthest: largest distance; None for no end.
        pixels: how many there are.
        accuracy: in percent.
    """

    nearest: int
    farthest: int | None
    pixels: int
    accuracy: float


def accuracy_by_distance(
    train: Places, train_labels: Places, test: Places, test_labels: Places, right: NDArray[np.bool_]
) -> list[Range]:
    """How accurate a network is near training pixels of a test pixel's own class, and far from them.

    Args:
        train: row and column of each training pixel, (n, 2).
        train_labels: their classes, (n,).
        test: row and column of each test pixel, (m, 2).
        test_labels: their classes, (m,).
        right: whether the network was right, (m,).

    Returns:
        One for each range of distances that holds test pixels; those of classes without training pixels lie in the
        last, which has no end.
    """
    distance = np.full(len(test), np.inf)
    for label in np.unique(train_labels):
        own = test_labels == label
        if own.any():
            distance[own], _ = cKDTree(train[train_labels == label]).query(test[own], p=np.inf)
    ranges = []
    nearest = 1
    for farthest in (*STEPS, None):
        here = (distance >= nearest) & (distance <= (np.inf if farthest is None else farthest))
        if here.any():
            ranges.append(Range(nearest, farthest, int(here.sum()), 100 * float(right[here].mean())))
        nearest = (farthest or 0) + 1
    return ranges


def overlap(train: Places, train_labels: Places, test: Places, test_labels: Places, window: int) -> Overlap:
    """Measure the overlap of a split.

    Args:
        train: row and column of each training pixel, (n, 2).
        train_labels: their classes, (n,).
        test: row and column of each test pixel, (m, 2).
        test_labels: their classes, (m,).
        window: side of the window around a pixel.
    """
    tree = cKDTree(train)
    # A window holds what lies at most half of it away in rows and in columns.
    distance, _ = tree.query(test, p=np.inf)
    _, nearest = tree.query(test)
    return Overlap(
        windows=100 * float((distance <= window // 2).mean()),
        nearest=100 * float((train_labels[nearest] == test_labels).mean()),
    )

"""Which labelled pixels of a scene are for training, for validation and for test.

``random`` is the literature's protocol: pixels of each class are drawn from the whole scene. Neighbours are alike,
and nearly every window of a test pixel then holds training pixels, so that the score tells how well a network fills
in gaps. ``disjoint`` keeps them apart: no window of a test pixel holds a training or validation pixel (for why, see
Nalepa, Myller & Kawulok 2019, "Validating hyperspectral image segmentation", arXiv 1811.03707).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from excite.data.draws import Indices, bits, uniform

Labels = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

ENOUGH = 10  # pixels of a class that a disjoint split needs on each side
BLOCK_SIDES = (0.4, 0.6, 1.0)  # of the blocks that it tries, as a share of the window's
SMALLEST_BLOCK = 4  # pixels
_WORK, _MOST_TRIALS, _LEAST_TRIALS = 2 * 10**8, 4000, 300  # pixels looked at in all, and trials
_AT_RANDOM = 0.1  # of the trials; the others improve the best of these
_CLIMBS = 2  # for each side of the blocks


@dataclass(frozen=True, eq=False)
class ScenePixels:
    """The pixels of each split.

    Attributes:
        train: row and column of each pixel, row after row, int64 (n, 2).
        val: likewise.
        test: likewise.
        blocks: number of the patch of ground, as large as a window, that each pixel of the scene lies in, int64
            (rows, cols): the windows of one patch's pixels overlap, and what they show is much the same.
        excluded: numbers of the classes that cannot be split, of which no pixel is used.
        note: how the scene was split, for people.
    """

    train: Indices
    val: Indices
    test: Indices
    blocks: Labels
    excluded: tuple[int, ...]
    note: str


def random_split(
    labels: Labels, *, ratio: float | None, per_class: int | None, val_fraction: float, seed: int, window: int
) -> ScenePixels:
    """Draw training pixels of each class from the whole scene; all others are for test.

    Every class keeps at least one pixel for training and one for test; with ``per_class`` it gives at most half.

    Args:
        labels: int64 (rows, cols), 0 is unlabelled; every class has at least two pixels.
        ratio: share of each class's pixels that is drawn.
        per_class: how many are drawn of each class, instead.
        val_fraction: share of the drawn pixels that is set aside for validation.
        seed: of the draw.
        window: side of a window, in pixels.
    """
    order = _Order(labels, seed)
    drawn = order.first(np.ones(len(order.places), dtype=bool), _quota(order.sizes, ratio, per_class))
    overlap = 1 - _far(labels.shape, order.places, drawn, window)[~drawn].mean()
    note = f"drawn at random: {overlap:.0%} of the test pixels have a training pixel in their window"
    return _pixels(labels.shape, order, drawn, ~drawn, val_fraction, window, (), note)


def disjoint_split(
    labels: Labels, *, ratio: float | None, per_class: int | None, val_fraction: float, seed: int, window: int
) -> ScenePixels:
    """Cut the scene into blocks, some of them for training, so that no test pixel's window holds a training pixel.

    Training pixels are drawn inside the training blocks: as many of each class as :func:`random_split` would draw, or
    as many as there are. Test pixels are those of the other blocks that are more than ``window // 2`` rows or columns
    away from all training pixels. A class is kept where it has 10 pixels in training blocks and 10 test pixels.

    The blocks are found by a search of bounded work, which the seed determines: squares of several sizes in shifted
    grids, taken for training at random, and the best of these improved block by block. The better is what keeps more
    classes; and among equals that of the larger sum, over the classes, of the square root of the share of its pixels
    that is tested, and of the share of its training pixels that was found. (The root has small classes count.)

    Args:
        As for :func:`random_split`; a class may have any number of pixels.
    """
    order = _Order(labels, seed)
    search = _Search(labels.shape, order, _quota(order.sizes, ratio, per_class), window)
    best = search.best(seed)
    kept, drawn, test = search.outcome(best)
    excluded = tuple(int(value) for value in order.classes[~kept])
    note = (
        f"{np.count_nonzero(best.chosen)} blocks of {best.side}×{best.side} pixels are for training: no window of a "
        "test pixel holds a training pixel"
    )
    return _pixels(labels.shape, order, drawn, test, val_fraction, window, excluded, note)


def patches(shape: tuple[int, ...], side: int) -> Labels:
    """Squares of ``side`` pixels, numbered row after row: int64 (rows, cols)."""
    row, col = (np.arange(length) // side for length in shape)
    return row[:, None] * (col[-1] + 1) + col


class _Order:
    """The labelled pixels of a scene, class by class, each class in an order that the seed draws.

    Attributes:
        places: their flat positions, (n,).
        classes: the numbers of the classes, (c,).
        sizes: how many pixels each has, (c,).
        group: each pixel's class, as an index into ``classes``, (n,).
    """

    def __init__(self, labels: Labels, seed: int) -> None:
        places = np.flatnonzero(labels)
        own = labels.ravel()[places]
        order = np.lexsort((bits(seed, 0, places, "scene-pixels")[:, 0], own))
        self.places = places[order]
        self.classes, self._starts, self.sizes = np.unique(own[order], return_index=True, return_counts=True)
        self.group = np.repeat(np.arange(len(self.classes)), self.sizes)

    def first(self, allowed: Mask, count: Indices) -> Mask:
        """Of the allowed pixels the first ``count[c]`` of each class c; masks over the pixels, (n,)."""
        running = np.cumsum(allowed)
        before = np.concatenate([[0], running])[self._starts]
        return allowed & (running - before[self.group] <= count[self.group])

    def count(self, chosen: Mask) -> Indices:
        """How many pixels of each class are chosen, (c,)."""
        return np.bincount(self.group[chosen], minlength=len(self.classes))


@dataclass(frozen=True, eq=False)
class _Assignment:
    grid: npt.NDArray[np.int64]  # the block of each labelled pixel, (n,)
    chosen: Mask  # which blocks are for training
    side: int


class _Search:
    def __init__(self, shape: tuple[int, ...], order: _Order, quota: Indices, window: int) -> None:
        self.shape, self.order, self.quota, self.window = shape, order, quota, window
        pixels = int(np.prod(shape))
        self.trials = min(max(_WORK // pixels, _LEAST_TRIALS), _MOST_TRIALS)

    def outcome(self, assignment: _Assignment) -> tuple[Mask, Mask, Mask]:
        """Which classes are kept (c,), and which pixels are drawn for training and are for test (n,)."""
        order = self.order
        inside = assignment.chosen[assignment.grid]
        kept = order.count(inside) >= ENOUGH
        drawn = order.first(inside, self.quota) & kept[order.group]
        test = ~inside & _far(self.shape, order.places, drawn, self.window)
        enough = kept & (order.count(test) >= ENOUGH)
        if (enough == kept).all():
            return kept, drawn, test & kept[order.group]
        # The pixels of a class that falls out stand in nobody's way.
        drawn &= enough[order.group]
        test = ~inside & _far(self.shape, order.places, drawn, self.window)
        return enough, drawn, test & enough[order.group]

    def score(self, assignment: _Assignment) -> tuple[int, float]:
        """What the best assignment has most of; see :func:`disjoint_split`."""
        kept, drawn, test = self.outcome(assignment)
        tested = np.sqrt(self.order.count(test) / self.order.sizes)
        found = self.order.count(drawn) / self.quota
        return int(np.count_nonzero(kept)), round(float((tested + found)[kept].sum()), 6)

    def best(self, seed: int) -> _Assignment:
        sides = sorted({max(round(factor * self.window), SMALLEST_BLOCK) for factor in BLOCK_SIDES})
        starts = max(round(_AT_RANDOM * self.trials / len(sides)), _CLIMBS)
        steps = round((1 - _AT_RANDOM) * self.trials / (len(sides) * _CLIMBS))
        found: list[tuple[tuple[int, float], _Assignment]] = []
        for side in sides:
            tried = [(self.score(one), one) for one in self._at_random(seed, side, starts)]
            tried.sort(key=lambda pair: pair[0], reverse=True)
            for number, (score, one) in enumerate(tried[:_CLIMBS]):
                found.append(self._climb(seed, f"{side}/{number}", steps, score, one))
        return max(found, key=lambda pair: pair[0])[1]

    def _at_random(self, seed: int, side: int, count: int) -> Iterator[_Assignment]:
        rows, cols = np.unravel_index(self.order.places, self.shape)
        for i, (down, right, share) in enumerate(uniform(seed, 0, np.arange(count), f"scene-grid/{side}", 3)):
            row, col = (rows + int(down * side)) // side, (cols + int(right * side)) // side
            # Only blocks with labelled pixels are numbered.
            blocks, grid = np.unique(row * (self.shape[1] // side + 2) + col, return_inverse=True)
            draw = uniform(seed, 0, np.arange(len(blocks)), f"scene-blocks/{side}/{i}")[:, 0]
            yield _Assignment(grid, draw < 0.1 + 0.4 * share, side)

    def _climb(
        self, seed: int, stream: str, steps: int, score: tuple[int, float], start: _Assignment
    ) -> tuple[tuple[int, float], _Assignment]:
        """Turn one block or two from training to test or back, and keep what is no worse."""
        now = start
        for first, second, two in uniform(seed, 0, np.arange(steps), f"scene-climb/{stream}", 3):
            chosen = now.chosen.copy()
            chosen[int(first * len(chosen))] ^= True
            if two < 0.5:
                chosen[int(second * len(chosen))] ^= True
            trial = _Assignment(now.grid, chosen, now.side)
            if (reached := self.score(trial)) >= score:
                score, now = reached, trial
        return score, now


def _far(shape: tuple[int, ...], places: Indices, drawn: Mask, window: int) -> Mask:
    """Which of the places have no drawn one in their window, (n,)."""
    half = window // 2
    mask = np.zeros(shape, dtype=np.int32)
    mask.ravel()[places[drawn]] = 1
    # Sums over windows as differences of running sums.
    total = np.pad(mask, ((half + 1, half), (half + 1, half))).cumsum(axis=0).cumsum(axis=1)
    down = total[window:] - total[:-window]
    inside: Indices = (down[:, window:] - down[:, :-window]).ravel()[places]
    return inside == 0


def _quota(sizes: Indices, ratio: float | None, per_class: int | None) -> Indices:
    """How many pixels of each class are for training: so many, or without a number a share of them."""
    if per_class is not None:
        wanted = np.minimum(per_class, sizes // 2)
    else:
        assert ratio is not None
        wanted = np.rint(ratio * sizes).astype(np.int64)
    return np.clip(wanted, 1, np.maximum(sizes - 1, 1))


def _pixels(
    shape: tuple[int, ...],
    order: _Order,
    drawn: Mask,
    test: Mask,
    val_fraction: float,
    window: int,
    excluded: tuple[int, ...],
    note: str,
) -> ScenePixels:
    # A class with two drawn pixels or more has at least one of them for training and one for validation.
    have = order.count(drawn)
    held = np.clip(np.rint(val_fraction * have).astype(np.int64), 1, np.maximum(have - 1, 1))
    val = drawn & ~order.first(drawn, have - np.where((have > 1) & (val_fraction > 0), held, 0))

    def places(chosen: Mask) -> Indices:
        return np.stack(np.unravel_index(np.sort(order.places[chosen]), shape), axis=1).astype(np.int64)

    return ScenePixels(places(drawn & ~val), places(val), places(test), patches(shape, window), excluded, note)

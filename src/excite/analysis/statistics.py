"""How far a mean score, or a difference between two networks, can be trusted.

A network is trained from S seeds and every one of the S trained networks is scored on the same n test images: a
table of shape (S, n). Two things were drawn by chance, the seeds (initialisation, data order, augmentation) and the
test images, and a claim about the *networks* must hold for other seeds and other images (Dietterich 1998; Bouthillier
et al. 2021, arXiv:2103.03098). Every seed meets every image: the two are crossed, not nested, and S·n scores are
far fewer than S·n independent ones.

**Model.** Score, or paired difference, of seed s on image i: ``x[s, i] = mu + a[s] + b[i] + e[s, i]`` with
independent effects of mean zero. With the mean squares of the two-way analysis of variance without replication
(Searle, Casella & McCulloch 1992, *Variance Components*, chapter 4)::

    variance of the mean = A + B,   A = MS_seed / (S n),   B = max(MS_image - MS_error, 0) / (S n)
    interval             = mean ± t(df) · sqrt(A + B)
    1 / df               = (A / (A + B)) / (S - 1)  +  (B / (A + B)) / (n - 1)

A is what re-drawing the seeds would move, B what re-drawing the images would. Without an effect of the images this
is the t interval over the S seed means, without an effect of the seeds the t interval over the n image means.
The degrees of freedom weigh each part by its *share* of the variance. Satterthwaite's (1946) weigh by the square
of the share, which grants too many when A happens to come out small: with 3 seeds their 95 % interval covers down
to 92.2 %, this one 94.2 to 96.3 %, whatever the mixture of seed and image variance (5 seeds: 95.0 to 96.0 %).

**Two corrections for counts.** (1) Seed means that agree exactly, which happens to scores of 0 and 1, do not mean
that seeds have no effect: MS_error, the least that MS_seed can be expected to be, then stands in for MS_seed.
(2) A proportion (all scores 0 or 1) is skewed near 1: its interval is Wilson's (1927) with the variance above in
place of the binomial one (Dean & Pagano 2015 on clustered samples), so that it stays within [0, 1] and 450 right
answers of 450 do not read "100 % ± 0".

**Blocks.** Images that come from one patch of ground, one patient or one film are not independent draws: neighbours
are right or wrong together. Where a block is named for every image, it is blocks that were drawn, and the mean is a
ratio of two sums over them, of scores and of images. The table is replaced by the linearised one (Cochran 1977,
*Sampling Techniques*, chapter 6), of shape (S, B) for B blocks with n_b images, and analysed as above::

    e[s, b] = mean + (B / n) · (sum of x[s, i] over the block's images - n_b · mean)

Its mean over the blocks is the seed's mean. Two things are other than with B images. The deviations are from a mean
that large blocks have pulled to themselves: for effects of equal variance the squares fall short by a factor that
follows from the shares w_b = n_b / n alone, which is made good. And what unequal blocks are worth is not their
number but 1 / sum of w_b² (Kish 1965), which takes the place of B in the degrees of freedom. Equal blocks need
neither, and blocks of one image each give the interval without blocks.

**Limits.** One seed or one image: no interval. Two seeds: one degree of freedom; the interval is very wide and
covers 90.6 to 96.3 %. Fewer than about 10 images: 86 to 99 %. Counts are coarse where the two networks are expected
to disagree on few test images: on about 5 (99 % accuracy on 450 images) 3 seeds cover up to 97.6 %; on 1 to 3, two
equally good networks are told apart too seldom (97 to 100 %), while the interval of a true difference covers 88 to
96 %. The interval of a proportion needs some errors to count too: with 10 seeds and 450 images it covers 92.7 % at
99 % accuracy and about 91 % at 99.5 %. Blocks: with 27 to 150 of them, equal or very unequal (coefficient of
variation up to 1.5), and 3 or 5 seeds, intervals of differences cover 94.3 to 98.5 %, of proportions 92.4 to 96.9 %,
where those without blocks cover 46 to 91 %; with 12 blocks 92 to 99 %. Blocks are taken for independent: what is
alike across their edges is not seen, ``docs/statistics.md`` says what that does. Where one of them holds more than
about four fifths of the images there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from excite.errors import UsageError


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval, in the unit of the scores.

    Attributes:
        value: the mean over all seeds and images.
        low: lower end of the interval; None where there is none (fewer than two seeds or images).
        high: upper end of the interval; None where there is none.
        p: two-sided p-value of "the true mean is zero", for differences; below 1 - level exactly when zero lies
            outside the interval. None for plain means and where there is no interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def mean_interval(scores: ArrayLike, level: float = 0.95, blocks: ArrayLike | None = None) -> Estimate:
    """The mean score of one network over seeds and test images, with its confidence interval.

    Args:
        scores: shape (S, n), one score per seed and image, finite. Correctness as 0 and 1 (not 0 and 100) gets
            the interval of a proportion; anything else the interval of a mean.
        level: the confidence level, between 0 and 1.
        blocks: shape (n,), for each image the number of its block: images of one block are not independent of each
            other. None: every image is. Where one block holds nearly all images there is no interval.

    Raises:
        UsageError: the scores are no (S, n) table of finite numbers, the level is not between 0 and 1, or the blocks
            are not n whole numbers.
    """
    table = _table(scores, "scores")
    _check_level(level)
    value = float(table.mean())
    drawn = _drawn(table, blocks)
    if drawn is None:
        return Estimate(value)
    variance, df = _variance_of_mean(drawn)
    half = float(special.stdtrit(df, 0.5 + level / 2)) * math.sqrt(variance)
    if not np.isin(table, (0.0, 1.0)).all():
        return Estimate(value, value - half, value + half)
    if 0.0 < value < 1.0:
        ratio = half**2 / (value * (1 - value))
    else:  # No spread to measure. Seeds that err on the same images are the worst case: n images and no more.
        ratio = float(special.ndtri(0.5 + level / 2)) ** 2 / drawn.worth
    return Estimate(value, *_wilson(value, ratio))


def paired_difference(
    scores: ArrayLike, baseline: ArrayLike, level: float = 0.95, blocks: ArrayLike | None = None
) -> Estimate:
    """The mean difference ``scores - baseline`` of two networks, with its confidence interval and p-value.

    Args:
        scores: shape (S, n), one finite score per seed and image.
        baseline: the other network's scores on the same seeds (rows) and images (columns), in the same order.
        level: the confidence level, between 0 and 1.
        blocks: shape (n,), for each image the number of its block, see :func:`mean_interval`.

    Raises:
        UsageError: the tables are no (S, n) tables of finite numbers or differ in shape, the level is not between 0
            and 1, or the blocks are not n whole numbers.
    """
    table, other = _table(scores, "scores"), _table(baseline, "baseline's scores")
    if table.shape != other.shape:
        raise UsageError(
            f"The scores have shape {table.shape} and the baseline's {other.shape}: a paired difference needs "
            "the same seeds and the same test images on both sides."
        )
    _check_level(level)
    difference = table - other
    value = float(difference.mean())
    drawn = _drawn(difference, blocks)
    if drawn is None:
        return Estimate(value)
    variance, df = _variance_of_mean(drawn)
    if variance == 0.0:
        return Estimate(value, value, value, 1.0 if value == 0.0 else 0.0)
    error = math.sqrt(variance)
    half = float(special.stdtrit(df, 0.5 + level / 2)) * error
    return Estimate(value, value - half, value + half, float(2 * special.stdtr(df, -abs(value) / error)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: those below alpha are significant together at alpha.

    Args:
        p_values: one per comparison, each between 0 and 1. May be empty.

    Raises:
        UsageError: a p-value is not between 0 and 1.
    """
    for p in p_values:
        if not 0.0 <= p <= 1.0:
            raise UsageError(f"A p-value is {p}; it must lie between 0 and 1.")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class _Drawn:
    """What was drawn by chance: seeds, and images or blocks of them.

    Attributes:
        table: shape (S, n), or (S, B) of blocks; both at least 2.
        worth: as how many equal images, or blocks, they count.
        shortfall: what the squares of the deviations from the mean over images, or blocks, are to be multiplied by.
    """

    table: NDArray[np.float64]
    worth: float
    shortfall: float = 1.0


LEAST_WORTH = 1.5  # of blocks: below, one of them is more than four fifths of the images


def _drawn(table: NDArray[np.float64], blocks: ArrayLike | None) -> _Drawn | None:
    """The table to analyse, by blocks if they are given; None where there are not two seeds, images and blocks."""
    numbers = None if blocks is None else _block_numbers(blocks, table.shape[1])
    if min(table.shape) < 2:
        return None
    if numbers is None:
        return _Drawn(table, table.shape[1])
    count = int(numbers.max()) + 1
    sizes = np.bincount(numbers, minlength=count).astype(np.float64)
    share = sizes / sizes.sum()
    squares = float(np.sum(share**2))
    if 1.0 / squares < LEAST_WORTH:
        return None
    mean = float(table.mean())
    deviations = np.stack([np.bincount(numbers, weights=row - mean, minlength=count) for row in table])
    # Of independent effects u[b] of variance 1 the mean, sum of w[b] u[b], has the variance ``squares``. The squares
    # that we sum, of w[b] (u[b] - mean), are expected to be ``found``.
    found = squares - 2.0 * float(np.sum(share**3)) + squares**2
    shortfall = squares / found * (count - 1) / count
    return _Drawn(mean + count / table.shape[1] * deviations, 1.0 / squares, shortfall)


def _variance_of_mean(drawn: _Drawn) -> tuple[float, float]:
    """The variance of the mean, and its degrees of freedom."""
    table = drawn.table
    seeds, images = table.shape
    mean, by_seed, by_image = table.mean(), table.mean(axis=1), table.mean(axis=0)
    residual = table - by_seed[:, None] - by_image + mean
    ms_seed = images * float(np.sum((by_seed - mean) ** 2)) / (seeds - 1)
    ms_image = seeds * float(np.sum((by_image - mean) ** 2)) / (images - 1)
    ms_error = float(np.sum(residual**2)) / ((seeds - 1) * (images - 1))
    if ms_seed <= 1e-12 * ms_error:  # equal but for rounding
        ms_seed = ms_error
    seed_part = ms_seed / (seeds * images)
    image_part = drawn.shortfall * max(ms_image - ms_error, 0.0) / (seeds * images)
    variance = seed_part + image_part
    share = seed_part / variance if variance > 0.0 else 1.0
    return variance, 1.0 / (share / (seeds - 1) + (1.0 - share) / max(drawn.worth - 1.0, 1.0))


def _wilson(p: float, ratio: float) -> tuple[float, float]:
    """The q with ``(p - q)^2 <= ratio * q * (1 - q)``; ratio is (quantile)² / effective number of draws."""
    centre = (p + ratio / 2) / (1 + ratio)
    half = math.sqrt(ratio * p * (1 - p) + ratio**2 / 4) / (1 + ratio)
    return max(0.0, centre - half), min(1.0, centre + half)


def _table(scores: ArrayLike, name: str) -> NDArray[np.float64]:
    try:
        table = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The {name} are no table of numbers ({error}); give one row per seed.") from error
    if table.ndim != 2 or table.size == 0:
        raise UsageError(f"The {name} have shape {table.shape}; they must be a table of (seeds, test images).")
    if not np.isfinite(table).all():
        raise UsageError(f"The {name} hold NaN or infinity: score every seed on every image, or leave the image out.")
    return table


def _block_numbers(blocks: ArrayLike, images: int) -> NDArray[np.int64]:
    """The blocks as numbers 0 … B - 1."""
    try:
        given = np.asarray(blocks)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The blocks are no list of numbers ({error}); give one for each test image.") from error
    if given.shape != (images,) or given.dtype.kind not in "iu":
        raise UsageError(
            f"The blocks have shape {given.shape} and type {given.dtype}; they must be {images} whole numbers, one "
            "for each test image."
        )
    return np.unique(given, return_inverse=True)[1].astype(np.int64)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise UsageError(f"The confidence level is {level}; it must lie between 0 and 1, for example 0.95.")

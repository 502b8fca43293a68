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

**Limits.** One seed or one image: no interval. Two seeds: one degree of freedom; the interval is very wide and
covers 90.6 to 96.3 %. Fewer than about 10 images: 86 to 99 %. Counts are coarse where the two networks are expected
to disagree on few test images: on about 5 (99 % accuracy on 450 images) 3 seeds cover up to 97.6 %; on 1 to 3, two
equally good networks are told apart too seldom (97 to 100 %), while the interval of a true difference covers 88 to
96 %. The interval of a proportion needs some errors to count too: with 10 seeds and 450 images it covers 92.7 % at
99 % accuracy and about 91 % at 99.5 %.
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


def mean_interval(scores: ArrayLike, level: float = 0.95) -> Estimate:
    """The mean score of one network over seeds and test images, with its confidence interval.

    Args:
        scores: shape (S, n), one score per seed and image, finite. Correctness as 0 and 1 (not 0 and 100) gets
            the interval of a proportion; anything else the interval of a mean.
        level: the confidence level, between 0 and 1.

    Raises:
        UsageError: the scores are no (S, n) table of finite numbers, or the level is not between 0 and 1.
    """
    table = _table(scores, "scores")
    _check_level(level)
    value = float(table.mean())
    if min(table.shape) < 2:
        return Estimate(value)
    variance, df = _variance_of_mean(table)
    half = float(special.stdtrit(df, 0.5 + level / 2)) * math.sqrt(variance)
    if not np.isin(table, (0.0, 1.0)).all():
        return Estimate(value, value - half, value + half)
    if 0.0 < value < 1.0:
        ratio = half**2 / (value * (1 - value))
    else:  # No spread to measure. Seeds that err on the same images are the worst case: n images and no more.
        ratio = float(special.ndtri(0.5 + level / 2)) ** 2 / table.shape[1]
    return Estimate(value, *_wilson(value, ratio))


def paired_difference(scores: ArrayLike, baseline: ArrayLike, level: float = 0.95) -> Estimate:
    """The mean difference ``scores - baseline`` of two networks, with its confidence interval and p-value.

    Args:
        scores: shape (S, n), one finite score per seed and image.
        baseline: the other network's scores on the same seeds (rows) and images (columns), in the same order.
        level: the confidence level, between 0 and 1.

    Raises:
        UsageError: the tables are no (S, n) tables of finite numbers or differ in shape, or the level is not
            between 0 and 1.
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
    if min(difference.shape) < 2:
        return Estimate(value)
    variance, df = _variance_of_mean(difference)
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


def _variance_of_mean(table: NDArray[np.float64]) -> tuple[float, float]:
    """The variance of the mean of a table (S, n), S and n at least 2, and its degrees of freedom."""
    seeds, images = table.shape
    mean, by_seed, by_image = table.mean(), table.mean(axis=1), table.mean(axis=0)
    residual = table - by_seed[:, None] - by_image + mean
    ms_seed = images * float(np.sum((by_seed - mean) ** 2)) / (seeds - 1)
    ms_image = seeds * float(np.sum((by_image - mean) ** 2)) / (images - 1)
    ms_error = float(np.sum(residual**2)) / ((seeds - 1) * (images - 1))
    if ms_seed <= 1e-12 * ms_error:  # equal but for rounding
        ms_seed = ms_error
    seed_part = ms_seed / (seeds * images)
    image_part = max(ms_image - ms_error, 0.0) / (seeds * images)
    variance = seed_part + image_part
    share = seed_part / variance if variance > 0.0 else 1.0
    return variance, 1.0 / (share / (seeds - 1) + (1.0 - share) / (images - 1))


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


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise UsageError(f"The confidence level is {level}; it must lie between 0 and 1, for example 0.95.")

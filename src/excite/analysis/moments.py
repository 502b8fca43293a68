"""Means and variances per class that are gathered batch by batch, in one pass and in memory that does not grow.

Sources: Welford 1962 for one value after another; Chan, Golub and LeVeque 1979 for joining what was gathered apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Overall(NamedTuple):
    """Over all classes: how many samples there are, the mean (width,) and the standard deviation (width,)."""

    samples: int
    mean: Array
    deviation: Array


class Moments:
    """Count, mean and sum of squared deviations of ``width`` numbers in each of ``classes`` classes, in float64.

    Args:
        classes: how many there are.
        width: numbers per sample.
    """

    def __init__(self, classes: int, width: int) -> None:
        self._count = torch.zeros(classes, dtype=torch.float64)
        self._mean = torch.zeros(classes, width, dtype=torch.float64)
        self._squares = torch.zeros(classes, width, dtype=torch.float64)

    def update(self, values: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            values: (N, …), ``width`` finite numbers each.
            labels: (N,), from 0 to ``classes`` − 1.
        """
        if not len(labels):
            return
        values = values.detach().flatten(1).to("cpu", torch.float64)
        # Only the classes of the batch are touched: of a thousand there are a few in it.
        present, place = torch.unique(labels.to("cpu"), return_inverse=True)
        count = torch.bincount(place, minlength=len(present)).double()
        empty = torch.zeros(len(present), values.shape[1], dtype=torch.float64)
        mean = empty.index_add(0, place, values) / count[:, None]
        squares = empty.index_add(0, place, (values - mean[place]).square_())
        self._join(present, count, mean, squares)

    def merge(self, other: Moments) -> None:
        """Add what was gathered apart, of as many classes and numbers; it is left as it was."""
        present = torch.nonzero(other._count)[:, 0]
        self._join(present, other._count[present], other._mean[present], other._squares[present])

    def _join(self, present: Tensor, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        before = self._count[present]
        total = before + count
        away = mean - self._mean[present]
        self._mean[present] += away * (count / total)[:, None]
        self._squares[present] += squares + away.square() * (before * count / total)[:, None]
        self._count[present] = total

    @property
    def count(self) -> NDArray[np.int64]:
        """Samples of each class, (classes,)."""
        return self._count.to(torch.int64).numpy()

    @property
    def mean(self) -> Array:
        """Of each class, (classes, width); NaN for a class without samples."""
        return np.where(self.count[:, None] > 0, self._mean.numpy(), np.nan)

    @property
    def variance(self) -> Array:
        """Within each class, (classes, width), divided by the count; NaN for a class without samples."""
        count = self.count[:, None]
        return np.where(count > 0, self._squares.numpy() / np.maximum(count, 1), np.nan)

    def overall(self) -> Overall:
        """Over all classes together; NaN without samples."""
        count = self._count.sum()
        mean = (self._count @ self._mean) / count
        squares = self._squares.sum(0) + self._count @ (self._mean - mean).square()
        return Overall(int(count), mean.numpy(), (squares / count).sqrt().numpy())

"""Selection against object scale: how much of the attention goes to the large kernel as objects grow.

Source: Li et al., arXiv 1903.06586, Sect. 4.4, Fig. 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from excite.analysis.excitation import gathered, parts, rounded
from excite.analysis.gates import Gate
from excite.analysis.moments import Moments
from excite.errors import UsageError

LEVEL = 0.95


class Selection:
    """Gathers the attention of all selective kernels at several scales, batch by batch.

    Args:
        gates: the units.
        classes: how many there are.
        scales: how many there are.
    """

    def __init__(self, gates: Sequence[Gate], classes: int, scales: int) -> None:
        self.gates = list(gates)
        self.classes, self.scales = classes, scales
        width = sum(gate.channels for gate in self.gates)
        # Class and scale of an image make one class of the moments.
        self._difference = Moments(scales * classes, width)
        self._by_image = Moments(scales, len(self.gates))
        self._rise = Moments(1, len(self.gates))
        self._attention = Moments(scales, sum(len(gate.kernels) * gate.channels for gate in self.gates))

    def update(self, values: Mapping[str, Tensor], labels: Tensor, scales: Tensor) -> Tensor:
        """Add a batch.

        Args:
            values: by a unit's name its attention, (N, M, C).
            labels: (N,).
            scales: which scale each image has, (N,).

        Returns:
            (N, units), the mean over the channels of attention(large) − attention(small), for :meth:`update_rise`.

        Raises:
            ExciteError: the attention is not finite.
        """
        self._attention.update(gathered(self.gates, values), scales)
        differences = []
        for gate in self.gates:
            small, large = gate.branches
            attention = values[gate.name].to("cpu", torch.float64)
            differences.append(attention[:, large] - attention[:, small])
        self._difference.update(torch.cat(differences, 1), scales.cpu() * self.classes + labels.cpu())
        by_image = torch.stack([difference.mean(1) for difference in differences], 1)
        self._by_image.update(by_image, scales)
        return by_image

    def update_rise(self, first: Tensor, last: Tensor) -> None:
        """Pair the same images at the first and the last scale; both are what :meth:`update` returned."""
        self._rise.update(last - first, torch.zeros(len(first), dtype=torch.int64))

    def merge(self, other: Selection) -> None:
        """Add what was gathered apart, of the same units, classes and scales."""
        self._difference.merge(other._difference)
        self._by_image.merge(other._by_image)
        self._rise.merge(other._rise)
        self._attention.merge(other._attention)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images at each scale, (scales,)."""
        return self._by_image.count

    def arrays(self) -> dict[str, NDArray[Any]]:
        """``selection/NAME/…`` for each unit.

        ``difference`` is (scales, classes, C), the mean of attention(large) − attention(small), NaN where there were
        no images; ``attention`` is (scales, M, C), its mean.
        """
        difference = self._difference.mean.reshape(self.scales, self.classes, -1)
        attention = self._attention.mean
        found: dict[str, NDArray[Any]] = {}
        start = 0
        for gate, part in zip(self.gates, parts(self.gates), strict=True):
            found[f"selection/{gate.name}/difference"] = difference[..., part]
            end = start + len(gate.kernels) * gate.channels
            shape = (self.scales, len(gate.kernels), gate.channels)
            found[f"selection/{gate.name}/attention"] = attention[:, start:end].reshape(shape)
            start = end
        return found

    def figures(self) -> list[dict[str, Any]]:
        """For each unit what is said and drawn of it, without its place among all units."""
        arrays = self.arrays()
        mean, deviation = self._by_image.mean, np.sqrt(self._by_image.variance)
        intervals = self._intervals()
        found = []
        for number, gate in enumerate(self.gates):
            small, large = gate.branches
            by_class = arrays[f"selection/{gate.name}/difference"].mean(2)
            found.append(
                {
                    "small": gate.kernels[small].name,
                    "large": gate.kernels[large].name,
                    "overall": mean[:, number].tolist(),
                    "deviation": deviation[:, number].tolist(),
                    "by_class": [rounded(row) for row in by_class.T],
                    "rise": float(mean[-1, number] - mean[0, number]),
                    "rise_ci95": intervals[number],
                }
            )
        return found

    def _intervals(self) -> list[list[float]]:
        """Of each unit's rise: by Student's t of the paired images, else by Welch's of images that are not paired."""
        if len(self.gates) and self._rise.count[0]:
            count = self._rise.count[0]
            rise, squared = self._rise.mean[0], self._rise.variance[0] / max(count - 1, 1)
            df = np.full_like(rise, max(count - 1, 1))
        else:
            count = np.maximum(self.counts, 2)[[0, -1], None]
            rise = self._by_image.mean[-1] - self._by_image.mean[0]
            each = self._by_image.variance[[0, -1]] / (count - 1)
            squared = each.sum(0)
            weight = np.square(each / np.where(squared > 0, squared, 1)) / (count - 1)
            df = 1 / np.where(squared > 0, weight.sum(0), 1)
        half = special.stdtrit(df, 0.5 + LEVEL / 2) * np.sqrt(squared)
        return np.stack([rise - half, rise + half], 1).tolist()


def enlarged(images: Tensor, factor: float) -> Tensor:
    """The centre of each image, enlarged to the size of the whole: cropped and resized, bilinear.

    Args:
        images: (N, C, H, W), uint8 or floating point, normalised or not.
        factor: 1 and more; what is cropped has the sides ⌊H / factor⌉ and ⌊W / factor⌉, at least 1.

    Raises:
        UsageError: a factor below 1, which would need what is outside of the image.
    """
    if not 1 <= factor < float("inf"):
        raise UsageError(f"An image's centre is enlarged by 1 or more, not by {factor:g}.")
    size = images.shape[-2:]
    height, width = (max(1, round(side / factor)) for side in size)
    if (height, width) == tuple(size):
        return images
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    crop = images[..., top : top + height, left : left + width]
    floats = crop if crop.is_floating_point() else crop.float()
    resized = F.interpolate(floats, size=tuple(size), mode="bilinear", antialias=True)
    return resized if crop.is_floating_point() else resized.round_().clamp_(0, 255).to(images.dtype)


def scale_bins(scales: Tensor, bins: int) -> tuple[Tensor, list[float]]:
    """Images in bins of equal counts by the size of their object.

    Args:
        scales: the object's size in each image, (N,).
        bins: how many, at most N.

    Returns:
        The bin of each image (N,), the smallest objects in bin 0; and each bin's median size.
    """
    order = scales.argsort(stable=True)
    place = torch.empty(len(scales), dtype=torch.int64)
    place[order] = torch.arange(len(scales)) * bins // len(scales)
    return place, [float(scales[place == one].double().quantile(0.5)) for one in range(bins)]

"""Augmentation: what is drawn for each image of a training batch, and how it is applied to the batch.

Every draw is made once per image and depends only on (seed, epoch, index) of that image, so that the batch it
happens to sit in, the number of workers and an interruption change nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from excite.data.draws import Indices, bits, uniform
from excite.errors import UsageError, nearest

CROPS = ("none", "pad", "resized")
_ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """The choice of augmentation, in plain values.

    Attributes:
        crop: ``"none"``; ``"pad"``: the image is framed with ``padding`` black pixels and a window of its own
            size is cut out at random (He et al. 2016, section 4.2); ``"resized"``: a window of random area and
            aspect ratio is resized to the input's size (Szegedy et al. 2015, section 6).
        padding: width of the frame, in pixels, for ``"pad"``.
        min_area: smallest window for ``"resized"``, as a share of the image; the aspect ratio lies in 3/4 … 4/3.
        flip: probability of a mirror image (left–right).
        quarter_turns: probability of a turn by 0, 1, 2 or 3 right angles, each as likely; with ``flip`` 1/2 all eight
            ways to lay a square are. For images without an upside, seen from above.
        randaugment: number of RandAugment operations (Cubuk et al. 2020), 0 for none.
        magnitude: strength of these operations, 0 … 30.
        erasing: probability of random erasing (Zhong et al. 2020); what is erased becomes the mean colour.
        mixup: α of mixup (Zhang et al. 2018), 0 for none.
        cutmix: α of CutMix (Yun et al. 2019), 0 for none. With both, each image gets one of them, by a coin.
    """

    crop: str = "none"
    padding: int = 4
    min_area: float = 0.08
    flip: float = 0.0
    quarter_turns: float = 0.0
    randaugment: int = 0
    magnitude: int = 9
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            hint = nearest(str(self.crop), list(CROPS))
            raise UsageError(f"augmentation.crop is {self.crop!r}: choose one of {', '.join(CROPS)}. {hint}".strip())
        for name in ("flip", "quarter_turns", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"augmentation.{name} is {getattr(self, name)}: a probability lies in 0 … 1.")
        for name in ("padding", "randaugment", "mixup", "cutmix"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"augmentation.{name} is {value}: it must be 0 (off) or more.")
        if not 0 < self.min_area <= 1:
            raise UsageError(f"augmentation.min_area is {self.min_area}: a share lies above 0 and up to 1.")
        if not 0 <= self.magnitude <= 30:
            raise UsageError(f"augmentation.magnitude is {self.magnitude}: RandAugment's lies in 0 … 30.")

    @property
    def mixes(self) -> bool:
        """Whether two images are blended, which makes the targets soft."""
        return self.mixup > 0 or self.cutmix > 0


SMALL_IMAGES = Augmentation(crop="pad", flip=0.5)
PHOTOS = Augmentation(crop="resized", flip=0.5)


def crop_and_flip(
    images: torch.Tensor, augmentation: Augmentation, seed: int, epoch: int, index: Indices
) -> torch.Tensor:
    """Cut the padded window, mirror and turn, for a whole batch of equally sized images at once.

    Args:
        images: (N, C, H, W), any dtype.
        index: the images' indices, (N,).

    Returns:
        (N, C, H, W); the input itself when there is nothing to do.
    """
    pixels = images.numpy()
    if augmentation.crop == "pad" and augmentation.padding:
        padding = augmentation.padding
        draw = uniform(seed, epoch, index, "crop", 2)
        top, left = np.floor(draw * (2 * padding + 1)).astype(np.int64).T
        height, width = pixels.shape[-2:]
        padded = np.pad(pixels, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
        pixels = windows[np.arange(len(pixels)), :, top, left]
    if augmentation.flip:
        flipped = uniform(seed, epoch, index, "flip")[:, 0] < augmentation.flip
        pixels = np.where(flipped[:, None, None, None], pixels[..., ::-1], pixels)
    if augmentation.quarter_turns:
        pixels = _turned(pixels, augmentation.quarter_turns, seed, epoch, index)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _turned(pixels: npt.NDArray[Any], chance: float, seed: int, epoch: int, index: Indices) -> npt.NDArray[Any]:
    if pixels.shape[-1] != pixels.shape[-2]:
        raise UsageError(
            f"augmentation.quarter_turns turns square images, and these are {pixels.shape[-2]}×{pixels.shape[-1]}."
        )
    draw = uniform(seed, epoch, index, "quarter-turns", 2)
    turns = np.where(draw[:, 0] < chance, np.floor(4 * draw[:, 1]), 0).astype(np.int64)
    turned = np.empty_like(pixels)
    for quarters in range(4):
        turned[turns == quarters] = np.rot90(pixels[turns == quarters], quarters, axes=(2, 3))
    return turned


def resized_windows(
    sizes: npt.NDArray[np.int64], augmentation: Augmentation, seed: int, epoch: int, index: Indices
) -> npt.NDArray[np.int64]:
    """Draw the windows of ``crop="resized"``: uniform area, log-uniform aspect ratio, uniform place.

    A window that does not fit is drawn again, up to ten times; then the largest central window of an allowed
    aspect ratio is taken.

    Args:
        sizes: height and width of each image, (N, 2).

    Returns:
        (N, 4): top, left, height, width.
    """
    heights, widths = (sizes[:, i, None].astype(np.float64) for i in (0, 1))
    draw = uniform(seed, epoch, index, "resized-crop", 4 * _ATTEMPTS).reshape(len(index), _ATTEMPTS, 4)
    area = heights * widths * (augmentation.min_area + draw[..., 0] * (1 - augmentation.min_area))
    ratio = np.exp((2 * draw[..., 1] - 1) * math.log(4 / 3))
    width = np.rint(np.sqrt(area * ratio))
    height = np.rint(np.sqrt(area / ratio))
    fits = (width >= 1) & (width <= widths) & (height >= 1) & (height <= heights)
    chosen = (np.arange(len(index)), fits.argmax(axis=1))

    height, width = height[chosen], width[chosen]
    top = np.floor(draw[..., 2][chosen] * (heights[:, 0] - height + 1))
    left = np.floor(draw[..., 3][chosen] * (widths[:, 0] - width + 1))

    # argmax of an all-False row is 0, a window that does not fit: take the central one there.
    none = ~fits.any(axis=1)
    central_width = np.minimum(widths[:, 0], np.rint(heights[:, 0] * 4 / 3))
    central_height = np.minimum(heights[:, 0], np.rint(widths[:, 0] * 4 / 3))
    width, height = np.where(none, central_width, width), np.where(none, central_height, height)
    top = np.where(none, (heights[:, 0] - height) // 2, top)
    left = np.where(none, (widths[:, 0] - width) // 2, left)
    return np.stack([top, left, height, width], axis=1).astype(np.int64)


def randaugment(
    images: torch.Tensor, augmentation: Augmentation, seed: int, epoch: int, index: Indices
) -> torch.Tensor:
    """RandAugment of torchvision on each image of a uint8 batch (N, C, H, W)."""
    from torchvision.transforms import v2

    transform = v2.RandAugment(augmentation.randaugment, augmentation.magnitude)
    return _one_by_one(transform, images, bits(seed, epoch, index, "randaugment")[:, 0])


def erase(images: torch.Tensor, augmentation: Augmentation, seed: int, epoch: int, index: Indices) -> torch.Tensor:
    """Random erasing of torchvision on each image of a normalised float batch (N, C, H, W)."""
    from torchvision.transforms import v2

    transform = v2.RandomErasing(p=augmentation.erasing)
    return _one_by_one(transform, images, bits(seed, epoch, index, "erasing")[:, 0])


def _one_by_one(transform: torch.nn.Module, images: torch.Tensor, keys: npt.NDArray[np.uint64]) -> torch.Tensor:
    # torchvision draws from torch's global generator: seed it per image, and leave it as it was found.
    state = torch.get_rng_state()
    try:
        done = []
        for image, key in zip(images, keys, strict=True):
            torch.default_generator.manual_seed(int(key >> np.uint64(1)))
            done.append(transform(image))
    finally:
        torch.set_rng_state(state)
    return torch.stack(done) if done else images


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    partners: torch.Tensor,
    partner_labels: torch.Tensor,
    num_classes: int,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    index: Indices,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend each image with its partner by mixup or CutMix, each with its own λ.

    Args:
        images: normalised, (N, C, H, W).
        labels: (N,).
        partners: the image that each is blended with, (N, C, H, W).
        partner_labels: (N,).
        index: the indices of ``images``; the draws are theirs.

    Returns:
        Images (N, C, H, W) and soft targets (N, ``num_classes``), each row of which sums to 1.
    """
    size, (height, width) = len(images), images.shape[-2:]
    draw = uniform(seed, epoch, index, "mix", 4)
    cut = draw[:, 0] < _cut_share(augmentation)
    alpha = np.where(cut, augmentation.cutmix, augmentation.mixup)
    share = _beta(alpha, draw[:, 1])  # λ: what is kept of the image itself

    # CutMix: a box of area 1 − λ, centred anywhere, cut off at the border; λ is then what is really left.
    half = np.sqrt(1 - share) / 2
    center_y, center_x = draw[:, 2] * height, draw[:, 3] * width
    top, bottom = (np.clip(np.rint(center_y + side * half * height), 0, height) for side in (-1, 1))
    left, right = (np.clip(np.rint(center_x + side * half * width), 0, width) for side in (-1, 1))
    rows, columns = np.arange(height), np.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    kept_by_cut = 1 - (bottom - top) * (right - left) / (height * width)

    # One weight per pixel serves both: 0 or 1 inside and outside the box, or λ everywhere.
    weight = np.where(
        cut[:, None, None], ~(in_rows[:, :, None] & in_columns[:, None, :]), share[:, None, None]
    ).astype(np.float32)
    mixed = torch.lerp(partners, images, torch.from_numpy(weight)[:, None].to(images.dtype))

    kept = torch.from_numpy(np.where(cut, kept_by_cut, share).astype(np.float32))
    targets = torch.zeros(size, num_classes)
    targets.scatter_add_(1, labels[:, None], kept[:, None])
    targets.scatter_add_(1, partner_labels[:, None], 1 - kept[:, None])
    return mixed, targets


def _cut_share(augmentation: Augmentation) -> float:
    if augmentation.mixup > 0 and augmentation.cutmix > 0:
        return 0.5
    return 1.0 if augmentation.cutmix > 0 else 0.0


def _beta(alpha: npt.NDArray[np.float64], draw: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Beta(α, α) by the inverse of its distribution function, so that one uniform draw gives one λ.
    from scipy.special import betaincinv

    return np.asarray(betaincinv(alpha, alpha, draw))

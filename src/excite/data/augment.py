"""Augmentation: what is drawn for each image of a training batch, and how it is applied to the batch.

Every draw is made once per image and depends only on (seed, epoch, index) of that image, so that the batch it
happens to sit in, the number of workers and an interruption change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from excite.data.draws import Indices, bits, uniform
from excite.data.images import Window, as_rows, by_channel, dense
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
        rotate: the largest angle of a turn about the centre, in degrees; the angle is uniform in −rotate … rotate.
            Corners that come to lie bare get the mean colour, which is 0 once it is normalised: what convolutions
            see beyond the border, too.
        jitter: the most that is added to or taken from all pixels of a colour, in steps of 1/255: a whole number
            uniform in −jitter … jitter for each channel of each image; what leaves 0 … 255 is clipped. With 20, and
            ``rotate`` 10, the squeeze-and-excitation authors' augmentation (github.com/hujie-frank/SENet).
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
    rotate: float = 0.0
    jitter: int = 0
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
        if not 0 <= self.rotate <= 180:
            raise UsageError(f"augmentation.rotate is {self.rotate}: an angle lies in 0 … 180 degrees.")
        if not (0 <= self.jitter <= 255 and self.jitter == int(self.jitter)):
            raise UsageError(f"augmentation.jitter is {self.jitter}: it is a whole number in 0 … 255.")
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
    if augmentation.crop == "pad" and augmentation.padding:
        pixels = images.numpy()
        padding = augmentation.padding
        draw = uniform(seed, epoch, index, "crop", 2)
        top, left = np.floor(draw * (2 * padding + 1)).astype(np.int64).T
        height, width = pixels.shape[-2:]
        padded = np.pad(pixels, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
        images = torch.from_numpy(np.ascontiguousarray(windows[np.arange(len(pixels)), :, top, left]))
    if augmentation.flip:
        flipped = uniform(seed, epoch, index, "flip")[:, 0] < augmentation.flip
        images = _mirrored(images, flipped)
    if augmentation.quarter_turns:
        turned = _turned(images.numpy(), augmentation.quarter_turns, seed, epoch, index)
        images = torch.from_numpy(np.ascontiguousarray(turned))
    return images


def _mirrored(images: torch.Tensor, chosen: npt.NDArray[np.bool_]) -> torch.Tensor:
    # One by one: torch mirrors an image in either layout far quicker than it gathers the chosen ones.
    mirrored = images.clone()
    for i in np.flatnonzero(chosen).tolist():
        mirrored[i] = images[i].flip(-1)
    return mirrored


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


def rotate(
    images: torch.Tensor,
    augmentation: Augmentation,
    mean: Sequence[float],
    seed: int,
    epoch: int,
    index: Indices,
) -> torch.Tensor:
    """Turn each image about its centre by an angle of its own, with bilinear interpolation.

    Args:
        images: uint8, (N, C, H, W); float32 where they are normalised already.
        mean: the colour of the bare corners of uint8 images, per channel, in [0, 1].

    Returns:
        (N, C, H, W), of the same dtype and layout in memory.
    """
    angles = np.radians((2 * uniform(seed, epoch, index, "rotate")[:, 0] - 1) * augmentation.rotate)
    height, width = images.shape[-2:]
    rows = (torch.arange(height, dtype=torch.float32) - (height - 1) / 2)[:, None]
    columns = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    whole = images.dtype == torch.uint8
    bare = torch.tensor(mean)[:, None, None] * 255 if whole else torch.zeros(())
    turned = torch.empty_like(images)
    # One by one, an image and the places that it is read from stay in the cache: three times as quick as a batch.
    for image, done, angle in zip(images, turned, angles.tolist(), strict=True):
        sine, cosine = math.sin(angle), math.cos(angle)
        from_columns = (columns * cosine - rows * sine) / (width / 2)
        from_rows = (columns * sine + rows * cosine) / (height / 2)
        places = torch.stack([from_columns, from_rows], dim=-1)[None]
        # Beyond the border grid_sample reads zeros, so the bare colour is made zero meanwhile.
        above = (image.contiguous() - bare)[None]
        read = torch.nn.functional.grid_sample(above, places, align_corners=False)[0] + bare
        done.copy_(read.round_().to(torch.uint8) if whole else read)
    return turned


def jitter(images: torch.Tensor, augmentation: Augmentation, seed: int, epoch: int, index: Indices) -> torch.Tensor:
    """Add a number to each channel of each image, and clip to 0 … 255.

    Args:
        images: uint8, (N, C, H, W).

    Returns:
        uint8, (N, C, H, W), of the same layout in memory.

    Raises:
        UsageError: images of another dtype, which a transform of the user's own has normalised.
    """
    if images.dtype != torch.uint8:
        raise UsageError("augmentation.jitter is for pixels in 0 … 255, and these are normalised: leave it out.")
    images = dense(images)
    draw = uniform(seed, epoch, index, "jitter", images.shape[1])
    added = np.floor(draw * (2 * augmentation.jitter + 1)).astype(np.int64) - augmentation.jitter

    def each(values: npt.NDArray[np.int64]) -> torch.Tensor:
        return by_channel(images, torch.from_numpy(values.astype(np.uint8)))

    # Clipped beforehand nothing overflows, and taking something away is adding its complement modulo 256.
    done = torch.empty_like(images)
    low, high = each(np.maximum(-added, 0)), each(255 - np.maximum(added, 0))
    torch.clamp(as_rows(images), low, high, out=as_rows(done)).add_(each(added % 256))
    return done


class ResizedWindows:
    """The windows of ``crop="resized"``: uniform area, log-uniform aspect ratio, uniform place.

    A window that does not fit is drawn again, up to ten times; then the largest central window of an allowed
    aspect ratio is taken. All is drawn beforehand, since an image's size is known only once its file has been opened.

    Args:
        index: the images' indices, (N,).
    """

    def __init__(self, augmentation: Augmentation, seed: int, epoch: int, index: Indices) -> None:
        draw = uniform(seed, epoch, index, "resized-crop", 4 * _ATTEMPTS).reshape(len(index), _ATTEMPTS, 4)
        share = augmentation.min_area + draw[..., 0] * (1 - augmentation.min_area)
        ratio = np.exp((2 * draw[..., 1] - 1) * math.log(4 / 3))
        self._drawn = np.stack([share, ratio, draw[..., 2], draw[..., 3]], axis=-1).tolist()

    def window(self, number: int, height: int, width: int) -> Window:
        """The window of the ``number``-th image, which has this size."""
        for share, ratio, down, right in self._drawn[number]:
            area = height * width * share
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 1 <= wide <= width and 1 <= high <= height:
                return int(down * (height - high + 1)), int(right * (width - wide + 1)), high, wide
        wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        return (height - high) // 2, (width - wide) // 2, high, wide


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

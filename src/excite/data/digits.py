"""Handwritten digits at random sizes and places on a noisy canvas: a small real task that needs no download.

The 1,797 digits of 8×8 pixels come with scikit-learn (Alpaydin & Kaynak 1998, UCI "Optical recognition of
handwritten digits"). Each is drawn 8 to 32 pixels high, which is 0.5 to 2 times 16, somewhere on a canvas of
32×32, in a random grey on a random darker grey, under noise. So the object's scale is known for each sample,
and a network has to cope with a range of sizes that no single kernel fits best.

A training digit is drawn anew in each epoch; test and validation digits are drawn once and for all.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from excite.data.augment import Augmentation
from excite.data.base import ImageData, Split, StackedImages
from excite.data.draws import Indices, bits, hold_out, uniform
from excite.preprocessing import Preprocessing

CANVAS = 32  # pixels
USUAL_SIZE = 16  # height in pixels of a digit of scale 1
SCALES = (0.5, 2.0)
TEST_FRACTION = 0.25
PAPER = (0.1, 0.3)  # grey of the background, 0 black, 1 white
CONTRAST = (0.4, 0.7)  # how much lighter the ink is
NOISE = 0.05  # standard deviation, of pixels in [0, 1]
MEAN, STD = (0.256,) * 3, (0.150,) * 3

_FIXED_SEED = -1  # of what is drawn once and for all: no run has it
_BLOCK = 512


class DigitImages:
    """Digits that are drawn on a canvas when they are asked for.

    Args:
        digits: float32 in [0, 1], (N, 8, 8).
        labels: int64, (N,).
        channels: 3 (all equal) or 1.
    """

    def __init__(self, digits: npt.NDArray[np.float32], labels: torch.Tensor, channels: int = 3) -> None:
        self.digits = digits
        self.labels = labels
        self.channels = channels

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        """Digit ``i`` as an example: how it would be drawn once and for all."""
        return self.batch(np.array([i]), _FIXED_SEED, 0)[0], int(self.labels[i])

    def scales(self, indices: Indices, seed: int, epoch: int) -> npt.NDArray[np.float32]:
        """The scale at which each digit is drawn, log-uniform in 0.5 … 2: (N,)."""
        low, high = (math.log(scale) for scale in SCALES)
        return np.exp(low + (high - low) * uniform(seed, epoch, indices, "scale")[:, 0]).astype(np.float32)

    def batch(self, indices: Indices, seed: int, epoch: int) -> torch.Tensor:
        """The digits as drawn in an epoch: uint8 (N, channels, 32, 32)."""
        size = USUAL_SIZE * self.scales(indices, seed, epoch)
        draw = uniform(seed, epoch, indices, "place-and-grey", 4).astype(np.float32)
        rows = _interpolation(draw[:, 0] * (CANVAS - size), size)
        columns = _interpolation(draw[:, 1] * (CANVAS - size), size)
        ink = np.clip(rows @ self.digits[indices % len(self.digits)] @ columns.transpose(0, 2, 1), 0, 1)

        paper = _between(PAPER, draw[:, 2, None, None])
        contrast = _between(CONTRAST, draw[:, 3, None, None])
        canvas = paper + contrast * ink + NOISE * _noise(seed, epoch, indices)
        pixels = torch.from_numpy((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8))
        return pixels[:, None].repeat(1, self.channels, 1, 1)


def load_digits(val_fraction: float, preprocessing: Preprocessing, seed: int) -> ImageData:
    """The digits: 1,348 for training, 449 for test, in ten classes.

    Args:
        val_fraction: share of the training digits that is set aside for validation.
        preprocessing: says the number of channels.
        seed: of the validation split; the test split is always the same.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    digits = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    names = [f"digit-{i:04d}" for i in range(len(labels))]

    test = hold_out(labels, names, TEST_FRACTION, _FIXED_SEED)
    val = np.zeros_like(test)
    if val_fraction:
        train = np.flatnonzero(~test)
        val[train[hold_out(labels[train], [names[i] for i in train], val_fraction, seed)]] = True

    def split(chosen: npt.NDArray[np.bool_], fixed: bool) -> Split:
        own = torch.from_numpy(labels[chosen])
        images = DigitImages(digits[chosen], own, preprocessing.channels)
        own_names = [name for name, one in zip(names, chosen, strict=True) if one]
        if not fixed:
            return Split(images, own, own_names, 10)
        # The draws hang on the position in the whole set: no two splits share them.
        places = np.flatnonzero(chosen)
        everything = DigitImages(digits, torch.from_numpy(labels), preprocessing.channels)
        blocks = np.array_split(places, math.ceil(len(places) / _BLOCK))
        pixels = torch.cat([everything.batch(block, _FIXED_SEED, 0) for block in blocks])
        scales = torch.from_numpy(everything.scales(places, _FIXED_SEED, 0))
        return Split(StackedImages(pixels, own), own, own_names, 10, scales=scales)

    return ImageData(
        name="digits",
        classes=tuple("0123456789"),
        preprocessing=preprocessing,
        train=split(~test & ~val, fixed=False),
        val=split(val, fixed=True) if val.any() else None,
        test=split(test, fixed=True),
        augmentation=Augmentation(),  # drawn anew in each epoch already; a mirrored digit is no digit
    )


def _between(bounds: tuple[float, float], draw: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    low, high = bounds
    return low + (high - low) * draw


def _interpolation(start: npt.NDArray[np.float32], size: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Matrices (N, 32, 8) that stretch 8 pixels to ``size`` canvas pixels from ``start`` on, linearly."""
    canvas = np.arange(CANVAS, dtype=np.float32) + 0.5
    place = (canvas - start[:, None]) * (8 / size[:, None]) - 0.5
    return np.maximum(0, 1 - np.abs(place[:, :, None] - np.arange(8, dtype=np.float32)))


def _noise(seed: int, epoch: int, indices: Indices) -> npt.NDArray[np.float32]:
    """Noise of mean 0 and variance 1, (N, 32, 32): the sum of four uniform draws of a byte, nearly Gaussian."""
    draws = bits(seed, epoch, indices, "noise", CANVAS * CANVAS // 2).view(np.uint8)
    four = draws.reshape(len(indices), CANVAS, CANVAS, 4).astype(np.uint16)
    total = (four[..., 0] + four[..., 1] + four[..., 2] + four[..., 3]).astype(np.float32)
    return (total - 4 * 127.5) * np.float32(math.sqrt(3 / (256**2 - 1)))

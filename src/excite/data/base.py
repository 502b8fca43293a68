"""What every kind of image data comes down to: splits of images, their classes, and how a network wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from excite.data.augment import Augmentation
from excite.data.draws import Indices
from excite.errors import UsageError

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow's conversion to grey


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input when nothing is drawn at random.

    Attributes:
        size: height and width of the input, in pixels.
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, of pixels scaled to [0, 1].
        resize: the shorter side is first resized to this many pixels, then the centre is cropped; None means
            ``size``, and an image that already is ``size`` × ``size`` is then left as it is.
        interpolation: ``"bilinear"`` or ``"bicubic"``, with antialiasing.
        channels: 3 (red, green, blue) or 1 (grey).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.channels not in (1, 3):
            raise UsageError(f"channels is {self.channels}: an image has 3 (red, green, blue) or 1 (grey).")
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise UsageError(
                f"size is {self.size} and resize {self.resize}: the size must be at least 1 pixel, and what is "
                "cropped to it must first be resized to at least as much."
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise UsageError(f"{name} has {len(values)} values, but an image here has {self.channels} channels.")
        if min(self.std) <= 0:
            raise UsageError(f"std is {self.std}: every value must be above 0.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UsageError(f"interpolation is {self.interpolation!r}: choose 'bilinear' or 'bicubic'.")


@runtime_checkable
class BatchedImages(Protocol):
    """Images that hand out a whole batch at once, which is many times quicker than one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Any, int]: ...

    def batch(self, indices: Indices, seed: int, epoch: int) -> torch.Tensor:
        """The images of ``indices``, uint8 (N, C, H, W); a fresh tensor that the caller may change."""
        ...


@runtime_checkable
class DrawnImages(Protocol):
    """Images that hold random draws of their own."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Any, int]: ...

    def drawn(self, i: int, seed: int, epoch: int) -> torch.Tensor:
        """Image ``i`` as it is drawn in an epoch, (C, H, W)."""
        ...


class StackedImages:
    """Images of one size that are held decoded in memory.

    Args:
        pixels: uint8, (N, C, H, W).
        labels: int64, (N,).
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.pixels[i], int(self.labels[i])

    def batch(self, indices: Indices, seed: int, epoch: int) -> torch.Tensor:
        """The images of ``indices``; they are the same in every epoch."""
        return self.pixels.index_select(0, torch.from_numpy(indices))


class Images(Protocol):
    """A map-style dataset: ``images[i]`` is (uint8 tensor (C, H, W), int label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Any, int]: ...


@dataclass(frozen=True, eq=False)
class Split:
    """The training, validation or test part of a set.

    Attributes:
        images: map-style: ``images[i]`` is (uint8 tensor (C, H, W), int label).
        labels: class index of each image, int64 (N,).
        names: one name per image, for messages and predictions.
        num_classes: number of classes of the whole set.
        scales: size of the object in each image, relative to the set's usual size, float32 (N,); None where
            it is not known or is drawn anew in each epoch.
        broken: names of the images that were skipped because they cannot be read.
    """

    images: Images
    labels: torch.Tensor
    names: Sequence[str]
    num_classes: int
    scales: torch.Tensor | None = None
    broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A set of labelled images, ready for a network.

    Attributes:
        name: the data spec that it came from.
        classes: class names, in the order of the labels.
        preprocessing: what a network is to be fed.
        train: None where the set is for testing only.
        val: taken from the training images, or None.
        test: None where the set is for training only.
        augmentation: what is usual for images of this kind in training.
    """

    task: ClassVar[str] = "classification"

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split | None
    val: Split | None
    test: Split | None
    augmentation: Augmentation = field(default_factory=Augmentation)

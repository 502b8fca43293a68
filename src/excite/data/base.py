"""What every kind of image data comes down to: splits of images, their classes, and how a network wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from excite.data.augment import Augmentation
from excite.data.draws import Indices
from excite.data.images import Choice
from excite.preprocessing import Preprocessing

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow's conversion to grey


@runtime_checkable
class BatchedImages(Protocol):
    """Images that hand out a whole batch at once, which is many times quicker than one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Any, int]: ...

    def batch(self, indices: Indices, seed: int, epoch: int) -> torch.Tensor:
        """The images of ``indices``, uint8 (N, C, H, W); a fresh tensor that the caller may change.

        Index ``i + k * len(images)`` is image ``i`` as it is drawn for the (k + 1)-th time in the epoch.
        """
        ...


@runtime_checkable
class DrawnImages(Protocol):
    """Images that hold random draws of their own."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Any, int]: ...

    def drawn(self, i: int, seed: int, epoch: int) -> torch.Tensor:
        """Image ``i`` as it is drawn in an epoch, (C, H, W); beyond the last as :class:`BatchedImages` has it."""
        ...


@runtime_checkable
class CutImages(Protocol):
    """Images of which a window can be had without the rest."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Any, int]: ...

    def window(self, i: int, choose: Choice) -> torch.Tensor:
        """The window of image ``i`` that ``choose`` answers with when told height and width, (C, h, w)."""
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
        return self.pixels.index_select(0, torch.from_numpy(indices % len(self.pixels)))


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
        blocks: which patch of ground each image comes from, int64 (N,): images of one block look alike, and the
            intervals of a comparison count the blocks; None where the images are independent of each other.
    """

    images: Images
    labels: torch.Tensor
    names: Sequence[str]
    num_classes: int
    scales: torch.Tensor | None = None
    broken: tuple[str, ...] = ()
    blocks: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def key(self) -> bytes:
        """What scores on these images hang on, beside the network: which they are, and their labels."""
        return self.labels.numpy().tobytes() + "\n".join(self.names).encode()


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

"""Datasets that the user wrote: any map-style ``torch.utils.data.Dataset`` of (image, label)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from excite.data.augment import Augmentation
from excite.data.base import ImageData, Split
from excite.data.draws import bits
from excite.errors import UsageError
from excite.preprocessing import Preprocessing


class MapStyle(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


class OwnImages:
    """A user's dataset, with its random transforms tied to (seed, epoch, index).

    Args:
        dataset: ``dataset[i]`` is (image, label); the image is a uint8 tensor (C, H, W), a PIL image, or a
            float tensor (C, H, W), which is taken as preprocessed already.
        labels: int64, (N,).
    """

    def __init__(self, dataset: MapStyle, labels: torch.Tensor) -> None:
        self.dataset = dataset
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return _tensor(self.dataset[i][0]), int(self.labels[i])

    def drawn(self, i: int, seed: int, epoch: int) -> torch.Tensor:
        """Image ``i`` as its transforms draw it in an epoch."""
        with _seeded(int(bits(seed, epoch, np.array([i]), "own-transform")[0, 0])):
            return _tensor(self.dataset[i % len(self.labels)][0])


def from_datasets(
    train: MapStyle | None,
    test: MapStyle | None,
    *,
    val: MapStyle | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    augmentation: Augmentation | None = None,
    name: str = "dataset",
) -> ImageData:
    """Use the user's own datasets.

    ``dataset[i]`` is (image, label). Labels are taken from the attribute ``targets`` or ``labels`` where there
    is one, else by going through the dataset once. Float images are fed to the network as they are; uint8
    tensors and PIL images are preprocessed.

    Args:
        train: the training images, or None.
        test: the test images, or None; not both None.
        val: the validation images.
        classes: class names; by default the attribute ``classes``, else the labels' numbers.
        preprocessing: required for uint8 and PIL images; not used for float images.
        augmentation: what is drawn in training on top of the datasets' own transforms; none by default.
        name: for messages and reports.

    Raises:
        UsageError: a dataset is empty, an image is of no known type, or a label is not among the classes.
    """
    given = {key: part for key, part in (("train", train), ("val", val), ("test", test)) if part is not None}
    if not given:
        raise UsageError("Neither training nor test data are given.")
    for key, part in given.items():
        if not len(part):
            raise UsageError(f"The {key} dataset is empty.")
    first = next(iter(given.values()))
    example = _tensor(first[0][0])
    if example.is_floating_point():
        channels, size = example.shape[0], min(example.shape[-2:])
        preprocessing = preprocessing or _as_it_is(channels, size)
    elif preprocessing is None:
        raise UsageError("The images are not float tensors: say by a Preprocessing how they become input.")

    labels = {key: _labels(part) for key, part in given.items()}
    if classes is None:
        top = 1 + max(int(part.max()) for part in labels.values())
        classes = tuple(getattr(first, "classes", None) or (str(i) for i in range(top)))
    splits = {}
    for key, part in given.items():
        outside = (labels[key] < 0) | (labels[key] >= len(classes))
        if outside.any():
            at = int(outside.nonzero()[0])
            raise UsageError(
                f"Image {at} of the {key} dataset has the label {int(labels[key][at])}, but there are "
                f"{len(classes)} classes: labels are 0 … {len(classes) - 1}."
            )
        names = [f"{key}-{i}" for i in range(len(part))]
        splits[key] = Split(OwnImages(part, labels[key]), labels[key], names, len(classes))
    return ImageData(
        name,
        tuple(classes),
        preprocessing,
        splits.get("train"),
        splits.get("val"),
        splits.get("test"),
        augmentation or Augmentation(),
    )


def _as_it_is(channels: int, size: int) -> Preprocessing:
    if channels not in (1, 3):
        raise UsageError(f"The images have {channels} channels: excite takes 3 (red, green, blue) or 1 (grey).")
    return Preprocessing(size, (0.0,) * channels, (1.0,) * channels, channels=channels)


def _tensor(image: Any) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        if image.ndim == 3 and (image.dtype == torch.uint8 or image.is_floating_point()):
            return image
        raise UsageError(
            f"An image of the dataset is a tensor of {image.dtype} and shape {tuple(image.shape)}: expected is uint8 "
            "or float, of shape (channels, height, width)."
        )
    from PIL import Image

    if isinstance(image, Image.Image):
        pixels = np.array(image if image.mode in ("RGB", "L") else image.convert("RGB"))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())
    raise UsageError(f"An image of the dataset is a {type(image).__name__}: expected is a tensor or a PIL image.")


def _labels(dataset: MapStyle) -> torch.Tensor:
    for attribute in ("targets", "labels"):
        values = getattr(dataset, attribute, None)
        if values is not None and not callable(values) and len(values) == len(dataset):
            return torch.as_tensor(np.asarray(values).astype(np.int64))
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))], dtype=torch.int64)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all three generators that a transform may draw from, and leave them as they were found."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(seed >> 1)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])

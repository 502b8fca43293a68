"""Images to denoise: a folder or tar of clean ones, which are degraded when they are asked for.

Held-out images are always degraded in the same way: their noise hangs on the image's name and a seed alone. What
a network is trained on is cut by :class:`excite.data.patches.PatchLoader`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from excite.data.clean import CleanImages, as_error, unit
from excite.data.degrade import Degradation, named, quantise
from excite.data.denoising_files import (
    KIND,
    PHOTOGRAPHS,
    decoded,
    find_splits,
    measured,
    without_small,
)
from excite.data.encoded import Progress
from excite.data.images import BrokenImageError
from excite.errors import UsageError
from excite.preprocessing import Preprocessing

SCALES = (1.0, 0.9, 0.8, 0.7)  # Zhang et al. 2017, in the authors' code
LEAST_PATCHES = 128


@dataclass(frozen=True, eq=False)
class DenoisingSplit:
    """The training, validation or test part of a set of clean images, and how they are degraded.

    Attributes:
        names: of the images, relative to the split's folder.
        images: their pixels as they are stored.
        channels: 3 for colour, 1 for grey.
        degradation: what they are degraded by.
        noise_seed: another one degrades them in another way.
        quantised: whether a degraded image is rounded to 8 bits and clipped.
        broken: names of the images that were skipped because they cannot be read.
        memory_limit: bytes that decoded and resized images may take.
    """

    names: tuple[str, ...]
    images: CleanImages
    channels: int
    degradation: Degradation
    noise_seed: int = 0
    quantised: bool = False
    broken: tuple[str, ...] = ()
    memory_limit: int = 1 << 30

    def __len__(self) -> int:
        return len(self.names)

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image ``i``."""
        return self.images.sizes[i]

    def clean(self, i: int) -> torch.Tensor:
        """Image ``i``, float32 (C, H, W) in 0 … 1.

        Raises:
            ExciteError: it cannot be decoded, which was not seen before because it did not fit in memory.
        """
        try:
            return torch.from_numpy(unit(self.images[i]))
        except BrokenImageError as error:
            raise as_error(self.names[i], error) from error

    def pair(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image ``i`` degraded, and clean: float32 (C, H, W) each; always the same."""
        clean = self.clean(i)
        degraded = self.degradation.apply(clean, named(self.names[i], self.noise_seed))
        return quantise(degraded) if self.quantised else degraded, clean

    def key(self) -> bytes:
        """A checksum of what scores hang on: the images' names and sizes, and how they are degraded."""
        digest = hashlib.sha256()
        for what in (self.names, tuple(self.images.sizes), self.channels, self.noise_seed, self.quantised):
            digest.update(repr(what).encode("utf-8", "surrogateescape"))
        digest.update(str(self.degradation).encode())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class DenoisingData:
    """A set of clean images, ready for a network that denoises.

    Attributes:
        name: the data spec that it came from.
        channels: 3 for colour, 1 for grey.
        train: None where the set is for testing only.
        val: taken from the training images, or None.
        test: None where the set is for training only.
        patch: side of a training patch in pixels.
        patches: how many of them make an epoch.
        scales: the sizes, relative to the images' own, at which patches are cut.
        options: what :func:`load_denoising` was asked for, with its defaults, in plain values.
    """

    task: ClassVar[str] = "denoising"

    name: str
    channels: int
    train: DenoisingSplit | None
    val: DenoisingSplit | None
    test: DenoisingSplit | None
    patch: int
    patches: int
    scales: tuple[float, ...]
    options: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """None: nothing is told apart."""
        return ()

    @property
    def preprocessing(self) -> Preprocessing:
        """Patches as a network is fed them: values in 0 … 1, as they are."""
        return Preprocessing(self.patch, (0.0,) * self.channels, (1.0,) * self.channels, channels=self.channels)


def is_denoising(spec: str) -> bool:
    """Whether a data spec names images to denoise: ``denoising:PATH`` or ``photographs``."""
    return spec == PHOTOGRAPHS or spec.startswith(f"{KIND}:")


def load_denoising(
    spec: str,
    *,
    test: str | None = None,
    val_fraction: float = 0.0,
    channels: int = 1,
    degradation: str | Degradation = "gaussian:25",
    patch: int = 40,
    patches: int | None = None,
    scales: Sequence[float] = SCALES,
    noise_seed: int = 0,
    quantised: bool = False,
    broken: str = "skip",
    all_for_test: bool = False,
    memory_limit: int = 1 << 30,
    progress: Progress | None = None,
) -> DenoisingData:
    """Find clean images, divide them, and decode them.

    ``denoising:PATH`` is a folder or tar of images, at any depth; ``denoising:images.tar/Set12`` is a folder inside a
    tar. With ``train/`` and ``test/`` inside, and perhaps ``val/``, these are the splits, and ``val/`` is the test
    split where there is no ``test/``. Else a fifth of the images is held out for test, chosen by their names, and a
    log line says so. ``photographs`` are those that come with scikit-image.

    Images keep the depth of their files, 8 or 16 bits. A set that takes at most ``memory_limit`` bytes so is decoded
    once. Of a larger one each image is decoded when it is needed, and training goes through groups of images that
    fit, as :class:`excite.data.patches.PatchLoader` says.

    Args:
        spec: the data spec.
        test: the path of the test images, if they are not within ``spec``.
        val_fraction: share of the training images that is set aside for validation, in [0, 1).
        channels: 1 for grey (colour becomes grey by its luma), 3 for colour (grey is repeated; of ``photographs``
            only those in colour are taken).
        degradation: as :meth:`Degradation.parse` takes it.
        patch: side of a training patch in pixels.
        patches: patches per epoch; by default as many as cover each image once at each scale, and at least 128.
        scales: sizes relative to the images' own, above 0 and up to 1, at which patches are cut.
        noise_seed: of the held-out images' degradation.
        quantised: whether degraded images are rounded to 8 bits and clipped to the image's range.
        broken: ``"skip"`` or ``"refuse"`` images that cannot be decoded, have several frames, or, in training, are
            smaller than a patch.
        all_for_test: take all of a set without splits for test, and nothing to train on.
        memory_limit: bytes that decoded images may take.
        progress: called with (images done, images in all) while images are decoded.

    Raises:
        UsageError: a path is missing or holds no images, or a value is out of range.
        ExciteError: no image of a split can be read; one is broken and ``broken`` is ``"refuse"``.
    """
    _check(val_fraction, channels, patch, patches, scales, broken)
    kind = degradation if isinstance(degradation, Degradation) else Degradation.parse(degradation)
    found = find_splits(spec, test, val_fraction, channels, all_for_test, memory_limit)

    parts = {name: measured(part) for name, part in found.items()}
    if "train" in parts:
        parts["train"] = without_small(parts["train"], patch, broken)
    hold = channels * sum(part.bytes_per_channel() for part in parts.values()) <= memory_limit
    count = sum(len(part.files) for part in parts.values())
    splits, done = {}, 0
    for name, part in parts.items():

        def step(images: int, before: int = done) -> None:
            if progress is not None:
                progress(before + images, count)

        names, images, skipped = decoded(part, channels, name, broken, hold, step)
        done += len(part.files)
        splits[name] = DenoisingSplit(names, images, channels, kind, noise_seed, quantised, skipped, memory_limit)

    train = splits.get("train")
    scales = tuple(float(scale) for scale in scales)
    if patches is None:
        patches = max(LEAST_PATCHES, _covering(train, patch, scales) if train else 0)
    options = {
        "test": test,
        "val_fraction": val_fraction,
        "channels": channels,
        "degradation": str(kind),
        "patch": patch,
        "patches": patches,
        "scales": list(scales),
        "noise_seed": noise_seed,
        "quantised": quantised,
        "broken": broken,
    }
    return DenoisingData(
        spec, channels, train, splits.get("val"), splits.get("test"), patch, patches, scales, options
    )


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width at a scale, rounded up as MATLAB's imresize does."""
    # A hair less: 0.7 · 10 is a little more than 7 in binary.
    height, width = (max(math.ceil(side * scale - 1e-9), 1) for side in size)
    return height, width


def _covering(split: DenoisingSplit, patch: int, scales: Sequence[float]) -> int:
    sizes = [scaled_size(split.size(i), scale) for i in range(len(split)) for scale in scales]
    return sum(height * width for height, width in sizes if min(height, width) >= patch) // patch**2


def _check(
    val_fraction: float, channels: int, patch: int, patches: int | None, scales: Sequence[float], broken: str
) -> None:
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction is {val_fraction}: a share of the training images lies in 0 … 1.")
    if channels not in (1, 3):
        raise UsageError(f"channels is {channels}: choose 1 for grey images or 3 for colour.")
    if patch < 1:
        raise UsageError(f"patch is {patch}: a patch has at least 1 pixel on each side.")
    if patches is not None and patches < 2:
        raise UsageError(f"patches is {patches}: an epoch has at least 2.")
    if not scales or not all(0 < scale <= 1 for scale in scales):
        shown = ", ".join(f"{scale:g}" for scale in scales) or "empty"
        raise UsageError(f"scales is {shown}: give sizes relative to the images' own, above 0 and up to 1.")
    if broken not in ("skip", "refuse"):
        raise UsageError(f"broken is {broken!r}: choose 'skip' or 'refuse'.")

"""Batches for training and evaluation, the same whatever the workers, the ranks, and wherever a run was cut."""

from __future__ import annotations

from typing import Any

import torch

from excite.data.augment import Augmentation
from excite.data.base import Split
from excite.data.batches import BatchMaker
from excite.data.draws import Indices, balanced, windowed
from excite.data.encoded import EncodedImages
from excite.data.epoch import EpochLoader
from excite.data.images import as_input
from excite.data.shards import ShardFiles
from excite.errors import UsageError
from excite.preprocessing import Preprocessing


def stay_bytes(device: torch.device | str) -> bool:
    """Whether images have a way to go to the device, and so are brought there before they are normalised."""
    return torch.device(device).type != "cpu"


class Loader(EpochLoader):
    """Iterates over a split in batches ``(x, y, index)``.

    * ``x``: float32 (N, C, H, W), normalised; with ``pixels`` uint8, which :meth:`ready` normalises;
    * ``y``: int64 (N,), or float32 (N, classes) where the augmentation mixes images;
    * ``index``: int64 (N,), each image's position in the split.

    Order and augmentation depend only on (seed, epoch, index). The epoch is set by :meth:`set_epoch`; Lightning
    does so by itself. :meth:`state_dict` holds the exact place inside an epoch. Of shards that do not all fit into
    the local cache so many as fit are taken at a time, in a random order, and their images shuffled among each other.

    A shuffled loader is one for training: all ranks make the same number of steps (the remainder of the images
    is left out, other ones in each epoch), and a batch of one image is never made: it is merged into the
    batch before. A loader that is not shuffled hands out every image exactly once over all ranks.

    Args:
        split: the images.
        preprocessing: how they become input.
        batch_size: images per batch and rank.
        seed: of order and augmentation.
        augment: None for the plain preprocessing.
        shuffle: whether to go through the images in a new order in each epoch.
        workers: processes that prepare batches ahead; 0 prepares them in this process.
        rank: this process's number among ``world_size`` that share an epoch.
        world_size: the number of processes that share an epoch.
        balanced: in training, see every class equally often (:func:`excite.data.draws.balanced`). Where an image
            comes several times in an epoch it is augmented in another way each time.
        pixels: hand images out as bytes, a quarter of the size, for a device that they first have to be brought to;
            where the augmentation works on normalised images (erasing, mixing) they come normalised all the same.

    Raises:
        UsageError: the batch size, the ranks, or the number of images do not allow a batch.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        seed: int,
        augment: Augmentation | None = None,
        shuffle: bool = False,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        balanced: bool = False,
        pixels: bool = False,
    ) -> None:
        super().__init__(
            len(split),
            BatchMaker(split, preprocessing, augment or Augmentation(), seed, pixels),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            refuse=isinstance(split.images, EncodedImages) and split.images.refuse,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )
        self.split = split
        self.preprocessing = preprocessing
        self.balanced = balanced and shuffle
        self._shards = _apart(split) if shuffle else None
        if self._shards is not None and self.balanced:
            raise UsageError(
                "data.balanced takes images from all shards by turns, so that the local cache must hold all of them: "
                "raise data.cache_gb to their size, or copy them into a folder."
            )
        self._broken |= set(_missing(split))  # of which the user was told when the set was opened

    def ready(self, inputs: torch.Tensor) -> torch.Tensor:
        """Images of a batch, on whatever device they are by now, normalised."""
        return as_input(inputs, self.preprocessing)

    def identity(self) -> dict[str, Any]:
        """What the batches depend on besides the epoch, in plain values."""
        return {
            "images": len(self.split),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "world_size": self.world_size,
            **({"balanced": True} if self.balanced else {}),
            **({} if self._shards is None else {"shards together": self._shards[1]}),
        }

    def order(self) -> Indices:
        """The drawings in the order in which this epoch sees them, (images,)."""
        if self.balanced:
            return balanced(self.seed, self.epoch, self.split.labels.numpy())
        if self._shards is not None:
            return windowed(self.seed, self.epoch, *self._shards)
        return super().order()


def _files(split: Split) -> ShardFiles | None:
    """The shards that a split's images are read from as they are needed."""
    source = split.images.listing.source if isinstance(split.images, EncodedImages) else None
    return source if isinstance(source, ShardFiles) else None


def _apart(split: Split) -> tuple[Indices, int] | None:
    """Which shard each image lies in, and how many shards are at hand at once; None where all of them are."""
    files = _files(split)
    if files is None or files.together >= len(files.index.shards):
        return None
    assert isinstance(split.images, EncodedImages)
    return files.shard_of(split.images.listing.files), files.together


def _missing(split: Split) -> dict[str, str]:
    files = _files(split)
    return {} if files is None else files.missing

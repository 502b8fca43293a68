"""Batches for training and evaluation, the same whatever the workers, the ranks, and wherever a run was cut."""

from __future__ import annotations

from typing import Any

from excite.data.augment import Augmentation
from excite.data.base import Split
from excite.data.batches import BatchMaker
from excite.data.encoded import EncodedImages
from excite.data.epoch import EpochLoader
from excite.preprocessing import Preprocessing


class Loader(EpochLoader):
    """Iterates over a split in batches ``(x, y, index)``.

    * ``x``: float32 (N, C, H, W), normalised;
    * ``y``: int64 (N,), or float32 (N, classes) where the augmentation mixes images;
    * ``index``: int64 (N,), each image's position in the split.

    Order and augmentation depend only on (seed, epoch, index). The epoch is set by :meth:`set_epoch`; Lightning
    does so by itself. :meth:`state_dict` holds the exact place inside an epoch.

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
    ) -> None:
        super().__init__(
            len(split),
            BatchMaker(split, preprocessing, augment or Augmentation(), seed),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            refuse=isinstance(split.images, EncodedImages) and split.images.refuse,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )
        self.split = split

    def identity(self) -> dict[str, Any]:
        """What the batches depend on besides the epoch, in plain values."""
        return {
            "images": len(self.split),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "world_size": self.world_size,
        }

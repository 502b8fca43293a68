"""Batches of pairs of images and texts, the same whatever the workers, the ranks, and wherever a run was cut."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from excite.data.crossmodal import CrossmodalSplit
from excite.data.crossmodal_pictures import Pictures
from excite.data.epoch import EpochLoader, Job, Made

PairBatch = tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]


class PairLoader(EpochLoader):
    """Iterates over a split in batches ``((images, texts), labels, index)``.

    * ``images``: float32 (N, d) or (N, C, H, W);
    * ``texts``: float32 (N, t);
    * ``labels``: float32 (N, classes), 1 for each class that a pair has;
    * ``index``: int64 (N,), each pair's position in the split.

    Order, ranks and resuming are as those of :class:`excite.data.loader.Loader`. A pair whose picture turns out
    broken is left out, or ends the work where the data were loaded to refuse it.

    Args:
        split: the pairs.
        batch_size: pairs per batch and rank.
        seed: of the order.
        shuffle: whether to go through the pairs in a new order in each epoch.
        refuse: whether a picture that turns out broken ends the work; by default as the data were loaded.
        workers: processes that prepare batches ahead; 0 prepares them in this process.
        rank: this process's number among ``world_size`` that share an epoch.
        world_size: the number of processes that share an epoch.

    Raises:
        UsageError: the batch size, the ranks, or the number of pairs do not allow a batch.
    """

    samples_are = "pairs"

    def __init__(
        self,
        split: CrossmodalSplit,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        refuse: bool | None = None,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if refuse is None:
            refuse = isinstance(split.images, Pictures) and split.images.refuse
        super().__init__(
            len(split),
            _PairMaker(split),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            refuse=refuse,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )
        self.split = split

    def identity(self) -> dict[str, Any]:
        """What the batches depend on besides the epoch, in plain values."""
        return {
            "pairs": len(self.split),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "world_size": self.world_size,
        }


class _PairMaker(Dataset[Made]):
    """Makes a batch from its job alone, so that it does not matter which process does it, and when."""

    def __init__(self, split: CrossmodalSplit) -> None:
        self.split = split

    def __getitem__(self, job: Job) -> Made:
        pairs, labels, kept, broken = self.split.read(job.index)
        batch: Any = (pairs, labels, torch.from_numpy(kept))
        return Made(batch, broken)

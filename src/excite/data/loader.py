"""Batches for training and evaluation, the same whatever the workers, the ranks, and wherever a run was cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from excite.data.augment import Augmentation, crop_and_flip, erase, mix, randaugment, resized_windows
from excite.data.base import BatchedImages, DrawnImages, Split
from excite.data.draws import Indices, permutation
from excite.data.encoded import EncodedImages, tell_broken
from excite.data.images import BrokenImageError, fit, normalise, resize
from excite.errors import ExciteError, UsageError
from excite.preprocessing import Preprocessing

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Loader:
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

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

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
        if batch_size < 1 or (shuffle and batch_size < 2):
            raise UsageError(f"The batch size is {batch_size}: training needs at least 2 images, evaluation 1.")
        if not 0 <= rank < world_size:
            raise UsageError(f"Rank {rank} of {world_size} does not exist: ranks count from 0.")
        if shuffle and len(split) // world_size < 2:
            raise UsageError(
                f"{len(split)} images on {world_size} processes: training needs at least 2 images per process."
            )
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._next = 0  # the batch that is handed out next
        self._resumed = False  # whether _next was loaded rather than counted
        self._broken: set[str] = set()
        self._refuse = isinstance(split.images, EncodedImages) and split.images.refuse
        self._maker = _BatchMaker(split, preprocessing, augment or Augmentation(), seed)
        self._ahead: DataLoader[_Made] | None = None
        if workers:
            self._ahead = DataLoader(
                self._maker,
                batch_size=None,
                sampler=_Jobs(self),
                num_workers=workers,
                persistent_workers=True,
                # A generator of its own: else starting the workers would draw from torch's global one.
                generator=torch.Generator(),
            )

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return len(self._bounds(self._share())) - 1

    @property
    def sampler(self) -> Loader:
        """The object whose ``set_epoch`` Lightning calls before each epoch: this one."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. A new one starts at its first batch; the current one keeps a resumed place."""
        if epoch != self.epoch:
            self.epoch, self._next, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, with what it depends on, in plain values."""
        return {"epoch": self.epoch, "batch": self._next, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken: the next iteration begins with the batch that would have come next.

        Raises:
            UsageError: the state was taken from other data, or with another batch size, seed or number of ranks.
        """
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                raise UsageError(
                    f"The saved place in the data has {key} {state.get(key)}, but here it is {mine}: resume with "
                    "the same data, batch size, seed and number of processes."
                )
        self.epoch, self._next, self._resumed = int(state["epoch"]), int(state["batch"]), True

    def __iter__(self) -> Iterator[Batch]:
        # The place is read at the first batch, not here: Lightning makes the iterator before it sets the epoch.
        if not self._resumed:
            self._next = 0
        self._resumed = False
        for number, made in enumerate(self._made(), start=self._next):
            self._note_broken(made.broken)
            self._next = number + 1
            if len(made.index) < 2 and self.shuffle:
                raise ExciteError("Fewer than two images of a training batch can be read: mend or remove the others.")
            if len(made.index):
                yield made.images, made.targets, made.index

    def _made(self) -> Iterator[_Made]:
        if self._ahead is not None:
            yield from self._ahead
        else:
            for job in _Jobs(self):
                yield self._maker[job]

    def _identity(self) -> dict[str, Any]:
        return {
            "images": len(self.split),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "world_size": self.world_size,
        }

    def _share(self) -> int:
        """How many images of an epoch this rank sees."""
        share, rest = divmod(len(self.split), self.world_size)
        return share if self.shuffle else share + (self.rank < rest)

    def _bounds(self, share: int) -> list[int]:
        """Where the batches of this rank's images begin, and the end of the last."""
        bounds = [*range(0, share, self.batch_size), share]
        if self.shuffle and len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
            del bounds[-2]
        return bounds

    def _jobs(self) -> Iterator[_Job]:
        """The batches that are still to be made in this epoch."""
        size = len(self.split)
        order = permutation(self.seed, self.epoch, size) if self.shuffle else np.arange(size)
        # Each step of all ranks together sees the images that one process with a batch as large as all theirs
        # would see, and each rank sees neighbours, as mixing wants.
        mine = self._positions(self._share())
        bounds = self._bounds(len(mine))
        for start, stop in zip(bounds[self._next : -1], bounds[self._next + 1 :], strict=True):
            place = mine[start:stop]
            yield _Job(self.epoch, order[place], order[(place + 1) % size])

    def _positions(self, share: int) -> Indices:
        """This rank's places in the epoch's order."""
        if not self.shuffle:
            return np.arange(self.rank, len(self.split), self.world_size)
        step = np.arange(share) // self.batch_size
        # The last step may be short: all ranks have the same number of images in it.
        width = np.where((step + 1) * self.batch_size <= share, self.batch_size, share % self.batch_size)
        return step * self.batch_size * self.world_size + self.rank * width + np.arange(share) % self.batch_size

    def _note_broken(self, found: dict[str, str]) -> None:
        fresh = {name: reason for name, reason in found.items() if name not in self._broken}
        if fresh:
            self._broken.update(fresh)
            tell_broken(list(fresh), list(fresh.values()), self._refuse)


@dataclass(frozen=True)
class _Job:
    epoch: int
    index: Indices
    partners: Indices  # what each is mixed with: its successor in the epoch's order


@dataclass(frozen=True)
class _Made:
    images: torch.Tensor
    targets: torch.Tensor
    index: torch.Tensor
    broken: dict[str, str]


class _Jobs:
    """The jobs of the loader's current epoch, from its current place on; made anew at each iteration."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[_Job]:
        return self.loader._jobs()

    def __len__(self) -> int:
        return len(self.loader)


class _BatchMaker(Dataset["_Made"]):
    """Makes a batch from its job alone, so that it does not matter which process does it, and when."""

    def __init__(self, split: Split, preprocessing: Preprocessing, augment: Augmentation, seed: int) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.augment = augment
        self.seed = seed

    def __getitem__(self, job: _Job) -> _Made:
        # Successors in the order are mostly in the batch already: only the last one's has to be fetched.
        wanted = np.union1d(job.index, job.partners) if self.augment.mixes else job.index
        images, kept, broken = self._images(wanted, job.epoch)
        if broken:
            job = _Job(job.epoch, *self._without_broken(job, kept))
        images = self._augmented(images, kept, job.epoch)
        index = torch.from_numpy(job.index)
        targets = self.split.labels[index]
        if self.augment.mixes and len(job.index):
            place = {int(i): n for n, i in enumerate(kept)}
            own = images[[place[int(i)] for i in job.index]]
            partners = images[[place[int(i)] for i in job.partners]]
            images, targets = mix(
                own,
                targets,
                partners,
                self.split.labels[torch.from_numpy(job.partners)],
                self.split.num_classes,
                self.augment,
                self.seed,
                job.epoch,
                job.index,
            )
        return _Made(images, targets, index, broken)

    def _without_broken(self, job: _Job, kept: Indices) -> tuple[Indices, Indices]:
        index = job.index[np.isin(job.index, kept)]
        partners = job.partners[np.isin(job.index, kept)]
        # An image whose partner is broken is mixed with itself, that is, not at all.
        return index, np.where(np.isin(partners, kept), partners, index)

    def _images(self, index: Indices, epoch: int) -> tuple[torch.Tensor, Indices, dict[str, str]]:
        """The images at the network's size, which of them there are, and why the others are not."""
        images = self.split.images
        size = self.preprocessing.size
        if isinstance(images, BatchedImages) and self.augment.crop != "resized":
            batch = images.batch(index, self.seed, epoch)
            if batch.shape[-2:] != (size, size):
                batch = torch.stack([fit(image, self.preprocessing) for image in batch])
            return batch, index, {}
        decoded, kept, broken = [], [], {}
        for i in index:
            try:
                decoded.append(self._sized(self._one(int(i), epoch), int(i), epoch))
                kept.append(i)
            except BrokenImageError as error:
                broken[self.split.names[int(i)]] = str(error)
        empty = torch.empty(0, self.preprocessing.channels, size, size, dtype=torch.uint8)
        return torch.stack(decoded) if decoded else empty, np.array(kept, dtype=np.int64), broken

    def _one(self, i: int, epoch: int) -> torch.Tensor:
        images = self.split.images
        if isinstance(images, DrawnImages):
            return images.drawn(i, self.seed, epoch)
        image: torch.Tensor = images[i][0]
        return image

    def _sized(self, image: torch.Tensor, i: int, epoch: int) -> torch.Tensor:
        if image.is_floating_point():
            return image  # a user's own transform has made it what the network is fed
        if self.augment.crop != "resized":
            return fit(image, self.preprocessing)
        sizes = np.array([image.shape[-2:]])
        window = resized_windows(sizes, self.augment, self.seed, epoch, np.array([i]))
        top, left, height, width = (int(value) for value in window[0])
        size = self.preprocessing.size
        cut = image[:, top : top + height, left : left + width]
        return resize(cut, (size, size), self.preprocessing.interpolation)

    def _augmented(self, images: torch.Tensor, index: Indices, epoch: int) -> torch.Tensor:
        """Augment at pixel values, normalise, erase."""
        if not len(images):
            return images.float()
        images = crop_and_flip(images, self.augment, self.seed, epoch, index)
        if self.augment.randaugment:
            images = randaugment(images, self.augment, self.seed, epoch, index)
        if images.dtype == torch.uint8:  # float images come from a user's own transform, which has normalised them
            images = normalise(images, self.preprocessing)
        if self.augment.erasing:
            images = erase(images, self.augment, self.seed, epoch, index)
        return images.contiguous()

"""A batch of images from its job: read, decoded, augmented, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from excite.data.augment import Augmentation, ResizedWindows, crop_and_flip, erase, jitter, mix, randaugment, rotate
from excite.data.base import BatchedImages, CutImages, DrawnImages, Split
from excite.data.draws import Indices
from excite.data.epoch import Job, Made
from excite.data.images import BrokenImageError, Choice, cut, fit, normalise, resize
from excite.preprocessing import Preprocessing


class BatchMaker(Dataset[Made]):
    """Makes a batch from its job alone, so that it does not matter which process does it, and when.

    All random draws hang on the drawing's number (see :class:`Job`), which says also which image it is. Images that
    are decoded or resized one by one make a batch that lies channels-last in memory, as decoders leave them and as
    convolutions are quickest; images that come stacked stay channels-first.
    """

    def __init__(
        self, split: Split, preprocessing: Preprocessing, augment: Augmentation, seed: int, pixels: bool = False
    ) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.augment = augment
        # Asked once: Python goes through all names of a protocol each time.
        self._cut = split.images.window if isinstance(split.images, CutImages) else None
        self._drawn = split.images.drawn if isinstance(split.images, DrawnImages) else None
        self.seed = seed
        self.pixels = pixels and not (augment.erasing or augment.mixes)

    def __getitem__(self, job: Job) -> Made:
        # Successors in the order are mostly in the batch already: only the last one's has to be fetched.
        wanted = np.union1d(job.index, job.successors) if self.augment.mixes else job.index
        images, kept, broken = self._images(wanted, job.epoch)
        if broken:
            job = Job(job.epoch, *self._without_broken(job, kept))
        images = self._augmented(images, kept, job.epoch)
        index = torch.from_numpy(job.index)
        index = index % len(self.split)
        targets = self.split.labels[index]
        if self.augment.mixes and len(job.index):
            place = {int(i): n for n, i in enumerate(kept)}
            own = images[[place[int(i)] for i in job.index]]
            partners = images[[place[int(i)] for i in job.successors]]
            images, targets = mix(
                own,
                targets,
                partners,
                self.split.labels[torch.from_numpy(job.successors % len(self.split))],
                self.split.num_classes,
                self.augment,
                self.seed,
                job.epoch,
                job.index,
            )
        return Made((images, targets, index), broken)

    def _without_broken(self, job: Job, kept: Indices) -> tuple[Indices, Indices]:
        index = job.index[np.isin(job.index, kept)]
        partners = job.successors[np.isin(job.index, kept)]
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
        windows = ResizedWindows(self.augment, self.seed, epoch, index) if self.augment.crop == "resized" else None
        decoded, kept, broken = [], [], {}
        for number, i in enumerate(index):
            choose = partial(windows.window, number) if windows else None
            try:
                decoded.append(self._one(int(i), epoch, choose))
                kept.append(i)
            except BrokenImageError as error:
                broken[error.container or self.split.names[int(i) % len(self.split)]] = str(error)
        empty = torch.empty(0, self.preprocessing.channels, size, size, dtype=torch.uint8)
        return _laid_together(decoded) if decoded else empty, np.array(kept, dtype=np.int64), broken

    def _one(self, i: int, epoch: int, choose: Choice | None) -> torch.Tensor:
        """Image ``i``, or the window of it that is chosen, at the network's size."""
        images = self.split.images
        if choose and self._cut:
            return self._resized(self._cut(i % len(images), choose))
        image: torch.Tensor = self._drawn(i, self.seed, epoch) if self._drawn else images[i % len(images)][0]
        if image.is_floating_point():
            return image  # a user's own transform has made it what the network is fed
        if not choose:
            return fit(image, self.preprocessing)
        return self._resized(cut(image, choose(*image.shape[-2:])))

    def _resized(self, image: torch.Tensor) -> torch.Tensor:
        size = self.preprocessing.size
        return resize(image, (size, size), self.preprocessing.interpolation)

    def _augmented(self, images: torch.Tensor, index: Indices, epoch: int) -> torch.Tensor:
        """Augment at pixel values, normalise, erase."""
        if not len(images):
            return images if self.pixels else images.float()
        images = crop_and_flip(images, self.augment, self.seed, epoch, index)
        if self.augment.rotate:
            images = rotate(images, self.augment, self.preprocessing.mean, self.seed, epoch, index)
        if self.augment.randaugment:
            images = randaugment(images, self.augment, self.seed, epoch, index)
        if self.augment.jitter:
            images = jitter(images, self.augment, self.seed, epoch, index)
        # Float images come from a user's own transform, which has normalised them.
        if images.dtype == torch.uint8 and not self.pixels:
            last = not (self.augment.erasing or self.augment.mixes)
            fresh = _shared if last and get_worker_info() else None
            images = normalise(images, self.preprocessing, fresh)
        if self.augment.erasing:
            images = erase(images, self.augment, self.seed, epoch, index)
        return images


def _shared(images: torch.Tensor) -> torch.Tensor:
    """Memory for the batch that a worker hands over to the main process: elsewhere it would be copied there."""
    # As torch's own default_collate does.
    storage = torch.UntypedStorage._new_shared(4 * images.numel())  # type: ignore[no-untyped-call]
    return torch.empty(0).set_(storage, 0, images.shape, images.stride())


def _laid_together(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """A batch, channels-last in memory where the first image is."""
    if images[0].stride(0) == 1:
        return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return torch.stack(list(images))

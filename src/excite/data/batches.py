"""A batch of images from its job: read, decoded, augmented, normalised."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from excite.data.augment import Augmentation, crop_and_flip, erase, mix, randaugment, resized_windows
from excite.data.base import BatchedImages, DrawnImages, Split
from excite.data.draws import Indices
from excite.data.epoch import Job, Made
from excite.data.images import BrokenImageError, fit, normalise, resize
from excite.preprocessing import Preprocessing


class BatchMaker(Dataset[Made]):
    """Makes a batch from its job alone, so that it does not matter which process does it, and when."""

    def __init__(self, split: Split, preprocessing: Preprocessing, augment: Augmentation, seed: int) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.augment = augment
        self.seed = seed

    def __getitem__(self, job: Job) -> Made:
        # Successors in the order are mostly in the batch already: only the last one's has to be fetched.
        wanted = np.union1d(job.index, job.successors) if self.augment.mixes else job.index
        images, kept, broken = self._images(wanted, job.epoch)
        if broken:
            job = Job(job.epoch, *self._without_broken(job, kept))
        images = self._augmented(images, kept, job.epoch)
        index = torch.from_numpy(job.index)
        targets = self.split.labels[index]
        if self.augment.mixes and len(job.index):
            place = {int(i): n for n, i in enumerate(kept)}
            own = images[[place[int(i)] for i in job.index]]
            partners = images[[place[int(i)] for i in job.successors]]
            images, targets = mix(
                own,
                targets,
                partners,
                self.split.labels[torch.from_numpy(job.successors)],
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

"""Training patches for denoising, cut and degraded when they are asked for.

Nothing is stored but the images at their scales, as 8- or 16-bit pixels. All there is to a patch depends only on
(seed, epoch, patch number).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from excite.data.clean import WHITE, HeldImages, Stored, unit
from excite.data.degrade import Change, Keyed, quantise
from excite.data.denoising import SCALES, DenoisingSplit, scaled_size
from excite.data.draws import Indices, bits, permutation, uniform
from excite.data.epoch import EpochLoader, Job, Made
from excite.data.images import BrokenImageError
from excite.errors import UsageError

_Floats = npt.NDArray[np.float64]


class PatchLoader(EpochLoader):
    """Iterates over an epoch of patches in batches ``(noisy, clean, index)``.

    * ``noisy`` and ``clean``: float32 (N, C, patch, patch), clean in 0 … 1;
    * ``index``: int64 (N,), each patch's number in the epoch.

    A patch is cut at a uniform place from an image at one of the scales, images being drawn in proportion to their
    area at that scale (a larger one resized by bicubic interpolation with antialiasing, rounded to its file's depth),
    laid in one of the eight ways in which a square lies, and degraded with a strength and noise of its own. What JPEG
    and loss of resolution do is done to a larger window, so that a patch does not tell where their grid begins.

    The images at all scales are kept as soon as they are needed, if that takes no more than the split's memory limit.
    Else an epoch goes through groups of images that fit, in another order and grouping in each epoch; each group has
    patches in proportion to its area, and each worker keeps a group of its own.

    Order, ranks and resuming are as those of :class:`excite.data.loader.Loader` when it shuffles.

    Args:
        split: the images.
        patch: side of a patch in pixels.
        patches: how many make an epoch, of all ranks together.
        batch_size: patches per batch and rank.
        seed: of everything drawn.
        scales: sizes relative to the images' own; an image is left out at those where it is smaller than a patch.
        workers: processes that prepare batches ahead; 0 prepares them in this process.
        rank: this process's number among ``world_size`` that share an epoch.
        world_size: the number of processes that share an epoch.

    Raises:
        UsageError: the batch size, the ranks, or the number of patches do not allow a batch, or every image is
            smaller than a patch.
    """

    samples_are = "patches"

    def __init__(
        self,
        split: DenoisingSplit,
        patch: int,
        patches: int,
        batch_size: int,
        *,
        seed: int,
        scales: Sequence[float] = SCALES,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._cutter = _Cutter(split, patch, patches, seed, tuple(scales))
        super().__init__(
            patches,
            self._cutter,
            batch_size,
            seed=seed,
            shuffle=True,
            refuse=split.images.refuse,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )
        self.split = split
        self.patch = patch
        self.patches = patches
        self.scales = tuple(scales)
        if workers:
            self._cutter.prepare()

    def identity(self) -> dict[str, Any]:
        """What the batches depend on besides the epoch, in plain values."""
        return {
            "images": len(self.split),
            "channels": self.split.channels,
            "degradation": str(self.split.degradation),
            "quantised": self.split.quantised,
            "patch": self.patch,
            "patches": self.patches,
            "scales": ",".join(f"{scale:g}" for scale in self.scales),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "world_size": self.world_size,
            # Where groups have to be made, they hang on it.
            "memory_limit": 0 if self._cutter.views.together else self.split.memory_limit,
        }

    def order(self) -> Indices:
        """The patches by number: they are drawn, and need no shuffling."""
        return np.arange(self.patches)


class _Views:
    """The images at those scales where they are no smaller than a patch.

    Attributes:
        image: which image each is of, (V,), in ascending order.
        size: height and width of each, (V, 2).
        scale: of each, (V,).
        first: where each image's views begin, and the end of the last, (images + 1,).
        together: whether all of them are kept at once.
    """

    def __init__(self, split: DenoisingSplit, patch: int, scales: Sequence[float]) -> None:
        rows = [
            (i, *size, scale)
            for i in range(len(split))
            for scale in scales
            if min(size := scaled_size(split.size(i), scale)) >= patch
        ]
        if not rows:
            raise UsageError(f"No training image is as large as a patch of {patch} pixels: choose a smaller patch.")
        table = np.array(rows)
        self.image = table[:, 0].astype(np.int64)
        self.size = table[:, 1:3].astype(np.int64)
        self.scale = table[:, 3]
        self.first = np.searchsorted(self.image, np.arange(len(split) + 1))
        self.area = self.size.prod(axis=1).astype(np.float64)

        held = isinstance(split.images, HeldImages)
        item = np.array(split.images.item_sizes)[self.image]
        taken = self.area * split.channels * item * ~(held & (self.scale == 1))
        self.bytes = np.bincount(self.image, taken, len(split))
        base = sum(image.nbytes for image in split.images.pixels) if isinstance(split.images, HeldImages) else 0
        # Groups must not become tiny where the images themselves only just fit.
        self.room = max(split.memory_limit - base, split.memory_limit / 4)
        self.together = bool(self.bytes.sum() <= self.room)


@dataclass(frozen=True)
class _Group:
    """Images that are in memory together, and the patches of an epoch that are cut from them.

    Attributes:
        views: (V,).
        reach: sum of the areas of the views up to each one, (V,).
        end: the number of the first patch that is no longer theirs.
    """

    views: Indices
    reach: _Floats
    end: int


class _Cutter(Dataset[Made]):
    """Makes a batch of patches from its job alone; what it keeps are images at their scales."""

    def __init__(self, split: DenoisingSplit, patch: int, patches: int, seed: int, scales: tuple[float, ...]) -> None:
        self.split = split
        self.patch = patch
        self.patches = patches
        self.seed = seed
        self.views = _Views(split, patch, scales)
        self._kept: dict[int, list[Stored]] = {}  # the views of an image
        self._groups: tuple[int, list[_Group]] | None = None
        self._broken: dict[int, str] = {}

    def prepare(self) -> None:
        """Bring all images to their scales, so that workers share them."""
        if self.views.together:
            for i in np.unique(self.views.image):
                self._views_of(int(i))

    def __getitem__(self, job: Job) -> Made:
        side, channels = self.patch, self.split.channels
        view = self._chosen(job)
        places = uniform(self.seed, job.epoch, job.index, "patch-place", 4)
        ways = bits(self.seed, job.epoch, job.index, "patch-way")[:, 0] >> np.uint64(61)
        keys = bits(self.seed, job.epoch, job.index, "patch-noise", 2)
        clean = np.empty((len(view), channels, side, side), dtype=np.float32)
        noisy = np.empty_like(clean)
        keyed = Keyed()
        good = np.ones(len(view), dtype=bool)
        broken: dict[str, str] = {}
        for n in range(len(view)):
            image = int(self.views.image[view[n]])
            try:
                pixels = self._views_of(image)[int(view[n] - self.views.first[image])]
            except BrokenImageError as error:
                good[n] = False
                broken[self.split.names[image]] = str(error)
                continue
            generator = keyed(keys[n])
            change = self.split.degradation.draw(generator)
            window = _turned(self._window(pixels, change, places[n]), int(ways[n]))
            if window.shape[1:] == (side, side):
                np.divide(window, WHITE[window.itemsize], out=clean[n])
                change.apply(clean[n], generator, noisy[n])
            else:
                whole = unit(window)
                top, left = self._offset(window.shape[1:], change, places[n])
                inside = (slice(None), slice(top, top + side), slice(left, left + side))
                clean[n] = whole[inside]
                noisy[n] = change.apply(whole, generator)[inside]
        self._forget(job)
        index = torch.from_numpy(job.index[good])
        pair = (torch.from_numpy(noisy if good.all() else noisy[good]), torch.from_numpy(clean[good]))
        return Made((quantise(pair[0]) if self.split.quantised else pair[0], pair[1], index), broken)

    def _window(self, pixels: Stored, change: Change, place: _Floats) -> Stored:
        """What has to be degraded to have a patch of it."""
        margin, period = change.surroundings(self.split.channels)
        side = math.ceil((self.patch + 2 * margin + period - 1) / period) * period
        height, width = (min(side, length) for length in pixels.shape[1:])
        top = int(place[0] * (pixels.shape[1] - height + 1))
        left = int(place[1] * (pixels.shape[2] - width + 1))
        return pixels[:, top : top + height, left : left + width]

    def _offset(self, shape: Sequence[int], change: Change, place: _Floats) -> tuple[int, int]:
        """Where the patch is in its window: far from the window's edges, and anywhere in the grid."""
        margin, period = change.surroundings(self.split.channels)
        top, left = (
            min(margin + int(draw * period), length - self.patch)
            for draw, length in zip(place[2:], shape, strict=True)
        )
        return top, left

    def _chosen(self, job: Job) -> Indices:
        """The view that each patch is cut from."""
        draw = uniform(self.seed, job.epoch, job.index, "patch-image")[:, 0]
        chosen = np.empty(len(draw), dtype=np.int64)
        start = 0
        for group in self._groups_of(job.epoch):
            mine = (job.index >= start) & (job.index < group.end)
            if mine.any():
                place = np.searchsorted(group.reach, draw[mine] * group.reach[-1], side="right")
                chosen[mine] = group.views[np.minimum(place, len(group.views) - 1)]
            start = group.end
        return chosen

    def _groups_of(self, epoch: int) -> list[_Group]:
        if self._groups is None or (self._groups[0] != epoch and not self.views.together):
            self._groups = epoch, self._grouped(epoch)
        return self._groups[1]

    def _grouped(self, epoch: int) -> list[_Group]:
        views = self.views
        if views.together:
            return [_Group(np.arange(len(views.image)), views.area.cumsum(), self.patches)]
        members: list[list[int]] = []
        room = 0.0
        for i in permutation(self.seed, epoch, len(views.first) - 1).tolist():
            if views.first[i] == views.first[i + 1]:
                continue
            if not members or views.bytes[i] > room:
                members.append([])
                room = views.room
            members[-1].append(i)
            room -= views.bytes[i]
        groups, reached, total = [], 0.0, views.area.sum()
        for images in members:
            own = np.concatenate([np.arange(views.first[i], views.first[i + 1]) for i in images])
            reach = views.area[own].cumsum()
            reached += reach[-1]
            groups.append(_Group(own, reach, round(self.patches * reached / total)))
        return groups

    def _views_of(self, image: int) -> list[Stored]:
        if image in self._broken:
            raise BrokenImageError(self._broken[image])
        if image not in self._kept:
            try:
                pixels = self.split.images[image]
            except BrokenImageError as error:
                self._broken[image] = str(error)
                raise
            own = slice(self.views.first[image], self.views.first[image + 1])
            self._kept[image] = [
                _resized(pixels, (int(height), int(width))) for height, width in self.views.size[own]
            ]
        return self._kept[image]

    def _forget(self, job: Job) -> None:
        """Let go of the images that are not in the group of the batch's last patch."""
        if self.views.together:
            return
        group = next(group for group in self._groups_of(job.epoch) if job.index[-1] < group.end)
        now = set(self.views.image[group.views].tolist())
        for image in [image for image in self._kept if image not in now]:
            del self._kept[image]


def _resized(image: Stored, size: tuple[int, int]) -> Stored:
    if image.shape[1:] == size:
        return image
    out = np.empty((len(image), *size), dtype=image.dtype)
    for channel, small in zip(image, out, strict=True):
        values = torch.from_numpy(channel.astype(np.float32))[None, None]
        resized = F.interpolate(values, size=size, mode="bicubic", antialias=True)[0, 0]
        small[...] = resized.round_().clamp_(0, float(WHITE[image.itemsize])).numpy()
    return out


def _turned(window: Stored, way: int) -> Stored:
    """One of the eight ways to lay a square, by three bits: transposed, upside down, mirrored."""
    if way & 1:
        window = window.transpose(0, 2, 1)
    if way & 2:
        window = window[:, ::-1]
    return window[:, :, ::-1] if way & 4 else window

"""Several views of each image, for networks that are asked about all of them: crops, scales, mirror images.

Nothing is drawn at random. An image is decoded once for all its views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from excite.data.base import DrawnImages, Split
from excite.data.encoded import EncodedImages
from excite.data.epoch import EpochLoader, Job, Made
from excite.data.images import BrokenImageError, resize

Place = tuple[float, float]
"""Where a crop lies, from (0, 0) at the top left to (1, 1) at the bottom right of the places that it can have."""

CENTRE: tuple[Place, ...] = ((0.5, 0.5),)
CORNERS_AND_CENTRE: tuple[Place, ...] = ((0, 0), (0, 1), (1, 0), (1, 1), *CENTRE)


def grid(side: int) -> tuple[Place, ...]:
    """``side`` × ``side`` places, evenly from border to border; the centre for one."""
    if side == 1:
        return CENTRE
    steps = [i / (side - 1) for i in range(side)]
    return tuple((row, column) for row in steps for column in steps)


@dataclass(frozen=True)
class Views:
    """Which views of an image there are.

    Attributes:
        size: height and width of a view, in pixels.
        scales: what the shorter side is resized to, in pixels, each at least ``size``.
        places: where the crops lie, in each scale.
        flip: whether the same is cropped from the mirror image.
    """

    size: int
    scales: tuple[int, ...]
    places: tuple[Place, ...] = CENTRE
    flip: bool = False

    def __len__(self) -> int:
        return len(self.scales) * len(self.places) * (2 if self.flip else 1)

    def of(self, image: torch.Tensor, interpolation: str = "bilinear") -> torch.Tensor:
        """All views of an image (C, H, W): (views, C, size, size), of the same dtype."""
        crops = []
        for scale in self.scales:
            sized = _with_shorter_side(image, scale, interpolation)
            # The mirror image is cropped, rather than the crop mirrored: at an odd margin the centre is another one.
            for picture in (sized, sized.flip(-1)) if self.flip else (sized,):
                crops += [self._crop(picture, place) for place in self.places]
        return torch.stack(crops)

    def _crop(self, image: torch.Tensor, place: Place) -> torch.Tensor:
        # Rounded to even, as torchvision does.
        margins = (side - self.size for side in image.shape[-2:])
        top, left = (round(share * margin) for share, margin in zip(place, margins, strict=True))
        return image[:, top : top + self.size, left : left + self.size]


def _with_shorter_side(image: torch.Tensor, target: int, interpolation: str) -> torch.Tensor:
    height, width = image.shape[-2:]
    shorter = min(height, width)
    if shorter == target:
        return image
    # Integers, rounded down: the longer side as torchvision has it.
    return resize(image, (target * height // shorter, target * width // shorter), interpolation)


class ViewLoader(EpochLoader):
    """Iterates over a split in its order in batches ``(x, y, index)``, every image once.

    * ``x``: (N, views, C, size, size), uint8 pixels, or float32 where the images come as floats;
    * ``y``: int64 (N,);
    * ``index``: int64 (N,), each image's position in the split.

    Args:
        split: the images.
        views: which views of each there are.
        interpolation: ``"bilinear"`` or ``"bicubic"``, with antialiasing.
        batch_size: images per batch.
        workers: processes that prepare batches ahead; 0 prepares them in this process.
    """

    def __init__(self, split: Split, views: Views, interpolation: str, batch_size: int, *, workers: int = 0) -> None:
        super().__init__(
            len(split),
            _ViewMaker(split, views, interpolation),
            batch_size,
            seed=0,
            shuffle=False,
            refuse=isinstance(split.images, EncodedImages) and split.images.refuse,
            workers=workers,
        )
        self.split = split

    def identity(self) -> dict[str, Any]:
        """What the batches depend on besides the epoch, in plain values."""
        return {"images": len(self.split), "batch_size": self.batch_size}


class _ViewMaker(Dataset[Made]):
    """Makes a batch of views from its job alone."""

    def __init__(self, split: Split, views: Views, interpolation: str) -> None:
        self.split = split
        self.views = views
        self.interpolation = interpolation

    def __getitem__(self, job: Job) -> Made:
        views, kept, broken = [], [], {}
        for i in job.index.tolist():
            try:
                views.append(self.views.of(self._image(i), self.interpolation))
                kept.append(i)
            except BrokenImageError as error:
                broken[error.container or self.split.names[i]] = str(error)
        index = torch.tensor(kept, dtype=torch.int64)
        return Made((torch.stack(views) if views else torch.empty(0), self.split.labels[index], index), broken)

    def _image(self, i: int) -> torch.Tensor:
        images = self.split.images
        if isinstance(images, DrawnImages):
            return images.drawn(i, 0, 0)  # as an evaluation without views draws it
        image: torch.Tensor = images[i][0]
        return image

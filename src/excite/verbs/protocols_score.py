"""What a network says of images that it sees in several views, and several networks together: mean probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from excite.data import Loader, Preprocessing, Split
from excite.data.images import as_input
from excite.data.load import SMALL
from excite.data.views import ViewLoader, Views
from excite.errors import ExciteError
from excite.tasks.classification import BATCH, BATCH_OF_PHOTOS, ImageBatch, outputs
from excite.training.bars import Step


@dataclass(frozen=True)
class Answers:
    """What was said of the images of a split that can be read.

    Attributes:
        logits: (N, classes); logits, or the logarithms of mean probabilities: their softmax is what counts.
        positions: which images of the split they are, (N,), in its order.
    """

    logits: Tensor
    positions: Tensor


class MeanOfViews(nn.Module):
    """Asks a network about every view of an image, and averages the probabilities, as the papers do.

    Args:
        network: maps images (N, C, H, W) to logits (N, classes).
        preprocessing: the mean and standard deviation of its input.
        at_once: views that it is shown at once.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, at_once: int) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.at_once = at_once
        self.train(network.training)

    def forward(self, views: Tensor) -> Tensor:
        """The logarithms of the mean probabilities, (N, classes), of views (N, views, C, H, W): pixels as uint8, or
        floats that are input already."""
        chunks = torch.split(views.flatten(0, 1), self.at_once)
        said = torch.cat([self.network(as_input(chunk, self.preprocessing)).float() for chunk in chunks])
        return log_mean_softmax(said.view(*views.shape[:2], -1), dim=1)


def log_mean_softmax(logits: Tensor, dim: int) -> Tensor:
    """The logarithm of the probabilities' mean over ``dim``; the classes are in the last dimension.

    Computed from logarithms throughout: a probability too small for a float is still told from another.
    """
    return logits.log_softmax(-1).logsumexp(dim) - math.log(logits.shape[dim])


def answers(
    network: nn.Module,
    split: Split,
    preprocessing: Preprocessing,
    views: Views | None,
    device: torch.device,
    *,
    workers: int = 0,
    step: Step | None = None,
) -> Answers:
    """Ask a network about every image of a split.

    Args:
        network: maps images (N, C, H, W) to logits (N, classes).
        split: the images.
        preprocessing: what it is fed.
        views: which views of each image; None for the one that the preprocessing makes.
        device: where to compute.
        workers: processes that read images ahead.
        step: called with (done, in all).

    Raises:
        ExciteError: no image can be read.
    """
    at_once = BATCH if (views or preprocessing).size <= SMALL else BATCH_OF_PHOTOS
    batches: Loader | ViewLoader
    if views is None:
        asked, batches = network, Loader(split, preprocessing, at_once, seed=0, workers=workers)
    else:
        asked = MeanOfViews(network, preprocessing, at_once)
        size = max(1, at_once // len(views))
        batches = ViewLoader(split, views, preprocessing.interpolation, size, workers=workers)

    def with_positions() -> Iterator[ImageBatch]:
        for done, (images, _, index) in enumerate(batches, start=1):
            yield images, index, index
            if step:
                step(done, len(batches))

    return Answers(*outputs(asked, with_positions(), device))


def together(members: Sequence[Answers]) -> Answers:
    """The mean of what several networks say, whose outputs have the same order.

    Raises:
        ExciteError: they were not asked about the same images.
    """
    first = members[0]
    if len(members) == 1:
        return first
    for other in members[1:]:
        if not torch.equal(other.positions, first.positions):
            raise ExciteError("The networks were not shown the same images: some could be read only at times.")
    said = torch.stack([member.logits.double() for member in members])
    return Answers(log_mean_softmax(said, dim=0).float(), first.positions)

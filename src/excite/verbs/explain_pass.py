"""The pass of ``explain`` over the data: gates and scores of every image, gathered while the network runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.analysis.excitation import Excitation
from excite.analysis.gates import Gate, reading
from excite.analysis.selection import Selection, enlarged
from excite.data import Loader, Preprocessing, Split
from excite.data.load import SMALL
from excite.errors import ExciteError
from excite.evaluation_mode import evaluation_mode
from excite.processes import Processes
from excite.tasks.classification import BATCH, BATCH_OF_PHOTOS, check_outputs
from excite.training.bars import Step


class Score:
    """The metrics of a classifier, gathered batch by batch; the same as of all its logits at once.

    Args:
        samples: what is scored, in the plural.
    """

    def __init__(self, samples: str) -> None:
        self.samples = samples
        self.count, self.top5, self.loss = 0, 0, 0.0
        self.confusion: Tensor | None = None

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: (N, classes) and (N,), both on the CPU.

        Raises:
            UsageError: a label outside the network's classes.
            ExciteError: logits that are not finite.
        """
        check_outputs(logits, labels, self.samples)
        classes = logits.shape[1]
        if self.confusion is None:
            self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        pairs = labels * classes + logits.argmax(1)
        self.confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        self.count += len(labels)
        self.loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        if classes > 5:
            self.top5 += int((logits.topk(5, dim=1).indices == labels[:, None]).sum())

    def merge(self, other: Score) -> None:
        """Add what was gathered apart."""
        if other.confusion is not None:
            own = torch.zeros_like(other.confusion) if self.confusion is None else self.confusion
            self.confusion = own + other.confusion
        self.count += other.count
        self.top5 += other.top5
        self.loss += other.loss

    def metrics(self, task: str) -> dict[str, float]:
        """Those of the task, as an evaluation says them.

        Raises:
            ExciteError: no images.
        """
        if self.confusion is None:
            raise ExciteError(f"There are no {self.samples} to explain the network on.")
        confusion = self.confusion.double()
        right, loss = float(confusion.diagonal().sum()) / self.count, self.loss / self.count
        if task != "hyperspectral":
            top5 = {"top5": 100 * self.top5 / self.count} if len(confusion) > 5 else {}
            return {"top1": 100 * right, **top5, "loss": loss}
        totals = confusion.sum(1)
        there = totals > 0
        average = float((confusion.diagonal()[there] / totals[there]).mean())
        by_chance = float(totals @ confusion.sum(0)) / self.count**2
        # One class, and every pixel right: there is no chance agreement to be better than.
        kappa = (right - by_chance) / (1 - by_chance) if by_chance < 1 else 1.0
        return {"oa": 100 * right, "aa": 100 * average, "kappa": 100 * kappa, "loss": loss}


@dataclass
class Gathered:
    """What a pass, or a process's part of it, came to."""

    score: Score
    excitation: Excitation | None
    selection: Selection | None

    def merge(self, other: Gathered) -> None:
        """Add what another process gathered of its images."""
        self.score.merge(other.score)
        if self.excitation and other.excitation:
            self.excitation.merge(other.excitation)
        if self.selection and other.selection:
            self.selection.merge(other.selection)


@dataclass(frozen=True)
class Enlargements:
    """Each image is seen at all scales: its centre is enlarged by these factors, in rising order."""

    scales: Sequence[float]
    scale_is: ClassVar[str] = "enlargement of the centre"


@dataclass(frozen=True)
class Bins:
    """Each image is seen as it is, and has a scale of its own: its bin's, whose number is in ``bins``, (N,)."""

    bins: Tensor
    scales: Sequence[float]
    scale_is: ClassVar[str] = "size of the object"


@torch.inference_mode()
def gather(
    network: nn.Module,
    gates: Sequence[Gate],
    split: Split,
    preprocessing: Preprocessing,
    scales: Enlargements | Bins,
    device: torch.device,
    classes: int,
    samples: str,
    *,
    workers: int = 0,
    processes: Processes | None = None,
    step: Step | None = None,
) -> Gathered:
    """Run the network over this process's share of the images, and gather its gates and scores.

    Args:
        network: it runs in evaluation mode; its mode is restored.
        gates: its units.
        split: the images, of which each process takes one in so many.
        preprocessing: how they become input.
        scales: at which the attention of selective kernels is gathered.
        device: where to compute.
        classes: of the network.
        samples: what the images are called.
        workers: processes that prepare batches ahead.
        processes: those that share the work.
        step: called with (batches done, in all).
    """
    here = processes or Processes()
    size = BATCH if preprocessing.size <= SMALL else BATCH_OF_PHOTOS
    loader = Loader(split, preprocessing, size, seed=0, workers=workers, rank=here.rank, world_size=here.count)
    excited = [gate for gate in gates if gate.kind == "se"]
    selecting = [gate for gate in gates if gate.kind == "sk"]
    found = Gathered(
        Score(samples),
        Excitation(excited, classes) if excited else None,
        Selection(selecting, classes, len(scales.scales)) if selecting else None,
    )
    with evaluation_mode(network, device), reading(network, list(gates)) as values:
        for done, (images, labels, index) in enumerate(loader, start=1):
            images = images.to(device)
            found.score.update(network(images).float().cpu(), labels)
            if found.excitation:
                found.excitation.update(values, labels)
            if found.selection and isinstance(scales, Bins):
                found.selection.update(values, labels, scales.bins[index])
            elif found.selection and isinstance(scales, Enlargements):
                _enlarge(network, images, labels, scales, found.selection, values)
            if step:
                step(done, len(loader))
    return found


def _enlarge(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    scales: Enlargements,
    selection: Selection,
    values: Mapping[str, Tensor],
) -> None:
    """Gather the attention at all scales; each run leaves its own in ``values``, as that of scale 1 just did."""
    seen = []
    for number, factor in enumerate(scales.scales):
        if factor != 1:
            network(enlarged(images, factor))
        seen.append(selection.update(values, labels, torch.full((len(labels),), number)))
    selection.update_rise(seen[0], seen[-1])

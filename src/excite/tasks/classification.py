"""Classification: one label an image, cross-entropy, top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from excite.data import ImageData, Loader, Preprocessing, Split
from excite.data.load import SMALL
from excite.data.loader import stay_bytes
from excite.errors import ExciteError, UsageError
from excite.evaluation_mode import evaluation_mode
from excite.processes import Processes
from excite.tasks.base import ALONE, Evaluation, Metric, Optimize, Scoring, Step, Task, TaskModule

ImageBatch = tuple[Tensor, Tensor, Tensor]
"""Images, labels ``(N,)``, and each image's index."""

BATCH = 256
BATCH_OF_PHOTOS = 32  # the first feature map of 256 images of 224×224 takes 0.8 GB


class ClassificationTask(TaskModule):
    """Trains and scores a network that gives one logit for each class.

    Args:
        network: maps images ``(N, C, H, W)`` to logits ``(N, classes)``.
        optimize: builds the optimiser from the network.
        label_smoothing: share of each target that is spread over all classes.
        class_weights: ``(classes,)`` weights of the loss, or None for equal ones.
    """

    def __init__(
        self,
        network: nn.Module,
        optimize: Optimize | None = None,
        *,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__(network, optimize)
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy; ``output`` is ``(N, classes)`` logits, ``target`` ``(N,)`` classes or ``(N, classes)``
        probabilities."""
        weights = self.class_weights
        # Half-precision logits lose digits in the exponentials of the softmax.
        return F.cross_entropy(
            output.float() if output.dtype in (torch.bfloat16, torch.float16) else output,
            target,
            weight=weights if isinstance(weights, Tensor) else None,
            label_smoothing=self.label_smoothing,
        )

    def weight(self, target: Tensor) -> float:
        """Cross-entropy with weights for classes divides by the sum of the weights; of mixed classes, by how many."""
        weights = self.class_weights
        return float(weights[target].sum()) if isinstance(weights, Tensor) and target.ndim == 1 else len(target)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """How many of the batch are right; of mixed images, how often the class with the largest share is found."""
        hard = target if target.ndim == 1 else target.argmax(1)
        return (output.argmax(1) == hard).sum()


def options(settings: Mapping[str, Any], data: ImageData) -> dict[str, Any]:
    """What the ``task`` section of a recipe comes to for these classes.

    Raises:
        UsageError: weights for another number of classes.
    """
    wanted = settings["class_weights"]
    weights = None
    if wanted == "balanced":
        assert data.train is not None
        counts = torch.bincount(data.train.labels, minlength=len(data.classes)).float()
        weights = counts.sum() / (len(counts) * counts)
    elif wanted is not None:
        if len(wanted) != len(data.classes):
            raise UsageError(f"key 'task.class_weights': {len(wanted)} weights for {len(data.classes)} classes")
        weights = torch.tensor(wanted)
    return {"label_smoothing": settings["label_smoothing"], "class_weights": weights}


def expect(data: ImageData, inputs: Tensor, output: Tensor) -> None:
    """Refuse a network whose output is not one row of logits an image.

    Raises:
        UsageError: another shape.
    """
    wanted = (len(inputs), len(data.classes))
    if tuple(output.shape) != wanted:
        raise UsageError(
            f"the network's output has shape {tuple(output.shape)}, but the data has {len(data.classes)} classes: "
            f"expected {wanted}"
        )


@torch.inference_mode()
def outputs(
    network: nn.Module,
    batches: Iterable[ImageBatch],
    device: torch.device | str = "cpu",
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor]:
    """What a network in evaluation mode says of all images; its mode is restored afterwards.

    Args:
        network: maps images ``(N, C, H, W)`` to logits ``(N, classes)``.
        batches: images, labels ``(N,)``, and each image's index.
        device: where to compute.
        processes: those that have the other images, if these are a share of them.

    Returns:
        Logits ``(N, classes)`` and labels ``(N,)`` on the CPU, in the order of the indices.

    Raises:
        ExciteError: no images.
    """
    gathered: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluation_mode(network, device):
        for images, labels, index in batches:
            gathered.append((network(images.to(device)).float().cpu(), labels, index))
    own = [torch.cat(part) for part in zip(*gathered, strict=True)] if gathered else []
    shares = [share for share in processes.everyones(own) if share]
    if not shares:
        raise ExciteError("There are no images to evaluate on.")
    logits, labels, index = (torch.cat(part) for part in zip(*shares, strict=True))
    order = index.argsort()
    return logits[order], labels[order]


def check_outputs(logits: Tensor, labels: Tensor, samples: str) -> None:
    """Refuse what cannot be scored.

    Raises:
        UsageError: a label outside the network's classes.
        ExciteError: logits that are not finite.
    """
    if not logits.isfinite().all():
        broken = int((~logits.isfinite().all(1)).sum())
        raise ExciteError(f"The network's output is not finite for {broken} of {len(logits)} {samples}.")
    if labels.max() >= logits.shape[1]:
        raise UsageError(
            f"the network knows {logits.shape[1]} classes, but there are {samples} of class {int(labels.max()) + 1}"
        )


def evaluation(logits: Tensor, labels: Tensor) -> Evaluation:
    """Score what a network said of images.

    Args:
        logits: ``(N, classes)``.
        labels: ``(N,)``.

    Returns:
        ``top1`` and ``top5`` in percent (``top5`` for more than five classes), ``loss`` in nats; the confusion matrix
        ``(classes, classes)`` with true classes in rows and the ``predictions (N,)`` under ``details``.

    Raises:
        UsageError: a label outside the network's classes.
        ExciteError: logits that are not finite.
    """
    check_outputs(logits, labels, TASK.samples)
    classes = logits.shape[1]
    right = logits.argmax(1) == labels
    metrics = {"top1": 100 * right.double().mean().item()}
    if classes > 5:
        top5 = logits.topk(5, dim=1).indices == labels[:, None]
        metrics["top5"] = 100 * top5.any(1).double().mean().item()
    metrics["loss"] = F.cross_entropy(logits.double(), labels).item()
    confusion = MulticlassConfusionMatrix(classes)(logits.argmax(1), labels)
    return Evaluation(
        metrics=metrics,
        scores=right.float().numpy(),
        details={"confusion": confusion.numpy(), "predictions": logits.argmax(1).numpy()},
    )


def scoring(evaluation: Callable[[Tensor, Tensor], Evaluation]) -> Scoring:
    """Scores a network batch by batch, and all its logits by ``evaluation`` (logits, labels)."""

    def score(
        network: nn.Module,
        split: Split,
        preprocessing: Preprocessing,
        device: torch.device | str = "cpu",
        *,
        workers: int = 0,
        step: Step | None = None,
        processes: Processes = ALONE,
    ) -> Evaluation:
        size = BATCH if preprocessing.size <= SMALL else BATCH_OF_PHOTOS
        rank, count = processes.rank, processes.count
        batches = Loader(
            split,
            preprocessing,
            size,
            seed=0,
            workers=workers,
            rank=rank,
            world_size=count,
            pixels=stay_bytes(device),
        )

        def counted() -> Iterator[ImageBatch]:
            for done, (images, labels, index) in enumerate(batches, start=1):
                yield batches.ready(images.to(device)), labels, index
                if step:
                    step(done, len(batches))

        return evaluation(*outputs(network, counted(), device, processes))

    return score


TASK = Task(
    "classification",
    Metric("top1", "%", higher_is_better=True),
    "images",
    ClassificationTask,
    options,
    expect,
    scoring(evaluation),
)

"""Hyperspectral scenes: one class a pixel, scored as the field does: overall and average accuracy, Cohen's kappa."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassCohenKappa, MulticlassConfusionMatrix

from excite.tasks.base import Evaluation, Metric, Task
from excite.tasks.classification import ClassificationTask, check_outputs, expect, options, scoring


def evaluation(logits: Tensor, labels: Tensor) -> Evaluation:
    """Score what a network said of a scene's pixels.

    Args:
        logits: ``(N, classes)``.
        labels: ``(N,)``.

    Returns:
        ``oa``, overall accuracy, the share of the pixels that are right; ``aa``, average accuracy, the mean over the
        classes present of each one's accuracy; ``kappa``, agreement beyond what the classes' sizes alone would give
        (Cohen 1960). All three are in percent, as the field reports them (kappa × 100). ``loss`` is in nats. Under
        ``details`` the confusion matrix ``(classes, classes)`` with true classes in rows, and the ``predictions
        (N,)``.

    Raises:
        UsageError: a label outside the network's classes.
        ExciteError: logits that are not finite.
    """
    check_outputs(logits, labels, TASK.samples)
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    right = predicted == labels
    confusion = MulticlassConfusionMatrix(classes)(predicted, labels)
    present = confusion.sum(1) > 0
    kappa = MulticlassCohenKappa(classes)(predicted, labels).double()
    metrics = {
        "oa": 100 * right.double().mean().item(),
        "aa": 100 * (confusion.diagonal()[present].double() / confusion.sum(1)[present]).mean().item(),
        # One class, and every pixel right: there is no chance agreement to be better than.
        "kappa": 100 * kappa.item() if kappa.isfinite() else 100.0,
        "loss": F.cross_entropy(logits.double(), labels).item(),
    }
    return Evaluation(
        metrics=metrics,
        scores=right.float().numpy(),
        details={"confusion": confusion.numpy(), "predictions": predicted.numpy()},
    )


TASK = Task(
    "hyperspectral",
    Metric("oa", "%", higher_is_better=True),
    "pixels",
    ClassificationTask,
    options,
    expect,
    scoring(evaluation),
)

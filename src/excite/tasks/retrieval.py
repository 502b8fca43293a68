"""Cross-modal retrieval: three losses that put images and texts into one space, and how well each finds the other.

Zhen, Hu, Wang, Peng, "Deep Supervised Cross-Modal Retrieval", CVPR 2019 (Eq. 5–9).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.analysis.retrieval import Retrieval, mean_average_precision
from excite.data.crossmodal import CrossmodalData, CrossmodalSplit
from excite.data.pairs import PairLoader
from excite.errors import ExciteError, UsageError
from excite.evaluation_mode import evaluation_mode
from excite.processes import Processes
from excite.tasks.base import ALONE, Evaluation, Metric, Optimize, Step, Task, TaskModule

BATCH = 256
BATCH_OF_PICTURES = 32
TOP = (1, 5, 10, 50)
"""The k of mAP@k, precision and recall in an evaluation's details."""

Points = tuple[Tensor, Tensor, Tensor, Tensor]


class RetrievalTask(TaskModule):
    """Trains a network that gives each pair two points of a common space, and the classes that it sees in each.

    Args:
        network: maps (images, texts) to u and v, the points (N, dim), and Pᵀu and Pᵀv, (N, classes).
        optimize: builds the optimiser from the network.
        label: weight of the loss in the label space, 1 in the paper; 0 leaves it out, as with the other two.
        alpha: α, weight of the loss in the common space.
        beta: β, weight of the loss between the modalities.

    Raises:
        UsageError: a weight below 0, or all of them 0.
    """

    def __init__(
        self,
        network: nn.Module,
        optimize: Optimize | None = None,
        *,
        label: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.1,
    ) -> None:
        super().__init__(network, optimize)
        if min(label, alpha, beta) < 0 or not label + alpha + beta:
            raise UsageError(
                "task.label, task.alpha and task.beta weigh the three losses, at least 0 and not all 0: not "
                f"{label}, {alpha} and {beta}."
            )
        self.label, self.alpha, self.beta = label, alpha, beta

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """J = J₁ + α J₂ + β J₃ (Eq. 9), J₁ weighted by ``label``.

        Args:
            output: u, v, Pᵀu and Pᵀv.
            target: (N, classes), 1 for each class that a pair has, else 0.
        """
        u, v, pu, pv = (part.float() for part in output)
        total = torch.zeros((), device=u.device)
        if self.label:
            total = total + self.label * label_space(pu, pv, target)
        if self.alpha:
            total = total + self.alpha * common_space(u, v, target)
        if self.beta:
            total = total + self.beta * between_modalities(u, v)
        return total

    def score(self, output: Any, target: Tensor) -> None:
        """A batch has none: a ranking is of all pairs."""


def label_space(pu: Tensor, pv: Tensor, labels: Tensor) -> Tensor:
    """J₁ = 1/n ‖PᵀU − Y‖ + 1/n ‖PᵀV − Y‖, Frobenius norms (Eq. 5).

    Args:
        pu, pv: what the classifier makes of the images' and the texts' points, (n, classes).
        labels: Y, (n, classes).
    """
    return (torch.linalg.vector_norm(pu - labels) + torch.linalg.vector_norm(pv - labels)) / len(labels)


def common_space(u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """J₂, the negative log-likelihood of which points are of one class, by half the cosine of each two (Eq. 6–7).

    J₂ = 1/n² Σᵢⱼ (log(1 + e^Γ) − S Γ) + 1/n² Σᵢⱼ (log(1 + e^Φ) − S Φ) + 1/n² Σᵢⱼ (log(1 + e^Θ) − S Θ), where
    Γᵢⱼ = ½ cos(uᵢ, vⱼ), Φᵢⱼ = ½ cos(uᵢ, uⱼ), Θᵢⱼ = ½ cos(vᵢ, vⱼ), and Sᵢⱼ is 1 where i and j share a class, else 0.

    Args:
        u, v: the images' and the texts' points, (n, dim).
        labels: (n, classes).
    """
    shared = ((labels @ labels.T) > 0).to(u.dtype)
    images, texts = F.normalize(u), F.normalize(v)
    total = torch.zeros((), device=u.device)
    for one, other in ((images, texts), (images, images), (texts, texts)):
        half_cosine = 0.5 * one @ other.T
        total = total + (F.softplus(half_cosine) - shared * half_cosine).mean()
    return total


def between_modalities(u: Tensor, v: Tensor) -> Tensor:
    """J₃ = 1/n ‖U − V‖, a Frobenius norm (Eq. 8)."""
    return torch.linalg.vector_norm(u - v) / len(u)


def evaluation(u: Tensor, v: Tensor, labels: Tensor) -> Evaluation:
    """Score the points of pairs.

    Args:
        u, v: of images and texts, (N, dim).
        labels: (N, classes), 1 for each class that a pair has, else 0.

    Returns:
        Mean average precision in percent: ``image_to_text`` (each image ranks all texts), ``text_to_image``, and of
        both ``map``, their mean. A sample is a pair, and its score the mean of its two average precisions; pairs
        without a class have none. Under ``details``, by direction, the
        :class:`~excite.analysis.retrieval.Retrieval`, with k of 1, 5, 10 and 50.

    Raises:
        ExciteError: no pairs, points that are not finite, or none of the pairs has a class.
    """
    if not len(labels):
        raise ExciteError("There are no pairs to evaluate on.")
    if not (u.isfinite().all() and v.isfinite().all()):
        raise ExciteError("The network's points are not finite.")
    found: dict[str, Retrieval] = {
        "image_to_text": mean_average_precision(u, v, labels, labels, top=TOP),
        "text_to_image": mean_average_precision(v, u, labels, labels, top=TOP),
    }
    scores = np.mean([one.per_query for one in found.values()], axis=0)
    scores = scores[np.isfinite(scores)]
    directions = {name: 100 * one.map for name, one in found.items()}
    return Evaluation(
        metrics={"map": 100 * float(scores.mean()), **directions},
        scores=scores.astype(np.float32),
        details=dict(found),
    )


@torch.inference_mode()
def points(
    network: nn.Module,
    split: CrossmodalSplit,
    device: torch.device | str = "cpu",
    *,
    workers: int = 0,
    step: Step | None = None,
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a network in evaluation mode makes of all pairs; its mode is restored afterwards.

    Args:
        network: maps (images, texts) to u and v, and more that does not count here.
        split: the pairs.
        device: where the network works.
        workers: processes that prepare batches ahead; 0 prepares them in this process.
        step: is called with (pairs done, in all).
        processes: those that share the pairs.

    Returns:
        u and v (N, dim), float32 on the CPU, and the labels (N, classes).

    Raises:
        ExciteError: no pairs, or a picture that cannot be read.
    """
    if not len(split):
        raise ExciteError("There are no pairs to evaluate on.")
    rows = []
    size = BATCH if isinstance(split.images, Tensor) else BATCH_OF_PICTURES
    # A pair that is left out would be missing in one score, and not in another that it is held against.
    rank, count = processes.rank, processes.count
    batches = PairLoader(
        split, size, seed=0, shuffle=False, refuse=True, workers=workers, rank=rank, world_size=count
    )
    done = 0
    with evaluation_mode(network, device):
        for (images, texts), labels, index in batches:
            u, v, *_ = network((images.to(device), texts.to(device)))
            rows.append((u.float().cpu(), v.float().cpu(), labels, index))
            done += len(labels)
            if step:
                step(done, len(split))
    every = [row for share in processes.everyones(rows) for row in share]
    us, vs, labels_of_all, index = (torch.cat(column) for column in zip(*every, strict=True))
    order = index.argsort()
    return us[order], vs[order], labels_of_all[order]


def score(
    network: nn.Module,
    split: CrossmodalSplit,
    preprocessing: Any = None,
    device: torch.device | str = "cpu",
    *,
    workers: int = 0,
    step: Step | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Score a network on pairs, see :func:`evaluation`; its mode is restored afterwards."""
    return evaluation(*points(network, split, device, workers=workers, step=step, processes=processes))


def options(settings: Mapping[str, Any], data: CrossmodalData) -> dict[str, Any]:
    """The weights of the losses that the ``task`` section of a recipe gives.

    Raises:
        UsageError: a setting of classification.
    """
    if given := [key for key in ("label_smoothing", "class_weights") if settings.get(key)]:
        raise UsageError(
            f"key 'task.{given[0]}' is for classification, and {data.name!r} is for retrieval: leave it out"
        )
    return {key: settings[key] for key in ("label", "alpha", "beta") if settings.get(key) is not None}


def expect(data: CrossmodalData, inputs: Any, output: Any) -> None:
    """Refuse a network that does not give two points and their classes for each pair.

    Raises:
        UsageError: another output.
    """
    count, classes = len(inputs[0]), len(data.classes)
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in _parts(output)]
    fits = len(shapes) == 4 and shapes[0] == shapes[1] and len(shapes[0]) == 2
    if not fits or shapes[0][0] != count or shapes[2:] != [(count, classes)] * 2:
        raise UsageError(
            f"the network makes of {count} pairs {', '.join(map(str, shapes))}, but for retrieval it is to give two "
            f"points ({count}, dim) and the scores of the {classes} classes for each, ({count}, {classes}) twice: "
            "take dscmr, or a network of your own that does"
        )


def _parts(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


TASK = Task("retrieval", Metric("map", "%", higher_is_better=True), "pairs", RetrievalTask, options, expect, score)

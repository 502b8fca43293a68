"""What every task says of itself: its headline metric, how it learns, and what an evaluation gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """The score by which networks are compared."""

    name: str
    unit: str
    higher_is_better: bool

    @property
    def factor(self) -> float:
        """What turns the mean of the samples' scores into the metric in its unit."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class Evaluation:
    """What a network scored on a set of images, or of other samples.

    Attributes:
        metrics: every metric by name, in the task's units (percentages as 0–100).
        scores: ``(N,)``, each sample's own score, whose mean is the headline metric; where that is a percentage the
            scores are fractions (0 and 1 for wrong and right).
        details: arrays that are too long for a table, such as the confusion matrix.
    """

    metrics: dict[str, float]
    scores: NDArray[np.float32]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many samples were scored."""
        return len(self.scores)


class TaskModule(pl.LightningModule):
    """What trains a network: made as ``module(network, optimize, label_smoothing=…, class_weights=…)``."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """What is to become small."""
        raise NotImplementedError


@dataclass(frozen=True)
class Task:
    """What is learned, and how it is scored.

    Attributes:
        name: as run cards say it.
        metric: the headline.
        samples: what is scored, in the plural: ``images``, ``pixels``.
        module: what trains a network for it.
        evaluation: from the outputs for all samples and their targets to the scores.
    """

    name: str
    metric: Metric
    samples: str
    module: Callable[..., TaskModule]
    evaluation: Callable[[Tensor, Tensor], Evaluation]

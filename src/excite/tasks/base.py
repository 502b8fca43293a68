"""What every task says of itself: its headline metric, how it learns, and what an evaluation gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excite.errors import ExciteError

Inputs = Tensor | tuple[Tensor, ...]
"""What a network is given at once: one tensor, or one for each kind of thing that it is shown. The samples are along
the first dimension of each."""

Batch = tuple[Inputs, Tensor, Tensor]
"""Inputs, what is wanted of them, and each sample's index."""

Optimize = Callable[[nn.Module], torch.optim.Optimizer]
"""Builds the optimiser of a network."""

Step = Callable[[int, int], object]
"""Called with (done, in all)."""


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with every tensor of theirs changed."""
    return change(inputs) if isinstance(inputs, Tensor) else tuple(change(part) for part in inputs)


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
    """What trains a network for a task.

    Args:
        network: what learns.
        optimize: builds its optimiser; None for a module that only evaluates.
    """

    def __init__(self, network: nn.Module, optimize: Optimize | None = None) -> None:
        super().__init__()
        self.network = network
        self.optimize = optimize

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """What is to become small."""
        raise NotImplementedError

    def score(self, output: Any, target: Tensor) -> Tensor | None:
        """The sum of the samples' scores in a batch, each as an evaluation would count it; None where a sample has
        none by itself."""
        raise NotImplementedError

    def training_step(self, batch: Batch, _index: int) -> dict[str, Tensor]:
        """The loss of one batch, and the sum of its samples' scores."""
        inputs, target, _ = batch
        output = self.network(inputs)
        with torch.no_grad():
            score = self.score(output, target)
        loss = {"loss": self.loss(output, target)}
        return loss if score is None else loss | {"score": score}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser that was passed in, over this network."""
        if self.optimize is None:
            raise ExciteError("This task was built to evaluate: it has no optimiser.")
        return self.optimize(self.network)


class Scoring(Protocol):
    """Scores a network on one split of a task's data, in the split's order."""

    def __call__(
        self,
        network: nn.Module,
        split: Any,
        preprocessing: Any,
        device: torch.device | str = "cpu",
        *,
        workers: int = 0,
        step: Step | None = None,
    ) -> Evaluation:
        """The network's mode is restored afterwards; ``step`` is called with (done, in all)."""
        ...


@dataclass(frozen=True)
class Task:
    """What is learned, and how it is scored.

    Attributes:
        name: as run cards say it.
        metric: the headline.
        samples: what is scored, in the plural: ``images``, ``pixels``.
        module: what trains a network for it, made as ``module(network, optimize, **options)``.
        options: from the ``task`` section of a recipe, as a mapping, and the data to the options of ``module``;
            refuses what is not of this task.
        expect: given the data, one input batch and what the network makes of it, refuses a network whose output is
            not of the shape that the task learns.
        score: see :class:`Scoring`.
    """

    name: str
    metric: Metric
    samples: str
    module: Callable[..., TaskModule]
    options: Callable[[Mapping[str, Any], Any], dict[str, Any]]
    expect: Callable[[Any, Any, Any], None]
    score: Scoring

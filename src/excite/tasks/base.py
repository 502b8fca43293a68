"""What every task says of itself: its headline metric, how it learns, and what an evaluation gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from excite.errors import ExciteError
from excite.processes import Processes

Inputs = Tensor | tuple[Tensor, ...]
"""What a network is given at once: one tensor, or one for each kind of thing that it is shown. The samples are along
the first dimension of each."""

Batch = tuple[Inputs, Tensor, Tensor]
"""Inputs, what is wanted of them, and each sample's index."""

StepBatch = tuple[list[Batch], int]
"""What this process has to do in one step of the optimiser, and how many samples the step has in all processes. The
parts are worked on one after another; all processes have as many. One whose index is empty counts for nothing: it is
there for the others' sake, and its one sample for the shape."""

Optimize = Callable[[nn.Module], torch.optim.Optimizer]
"""Builds the optimiser of a network."""

Step = Callable[[int, int], object]
"""Called with (done, in all)."""


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with every tensor of theirs changed."""
    return change(inputs) if isinstance(inputs, Tensor) else tuple(change(part) for part in inputs)


ALONE = Processes()


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

    A step of the optimiser takes the gradient of the mean loss over all its samples, however they are divided among
    processes and into parts. (Batch norm sees those that are in work at once, and no more; so does a loss that
    compares samples with one another.)

    Args:
        network: what learns.
        optimize: builds its optimiser; None for a module that only evaluates.

    Attributes:
        processes: those that share a step.
        shared_norm: whether their batch norms share their statistics.
        clip: the largest norm of the gradient, or None.
        ready: makes of a batch's inputs, once they are on the device, what the network takes.
        wishes: numbers whose sums over the processes a step is to tell them, beside its loss.
        divide: leaves with each process a share of the network's parameters, given the network and the processes as
            a mesh; or None.
    """

    def __init__(self, network: nn.Module, optimize: Optimize | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.optimize = optimize
        self.processes = Processes()
        self.shared_norm = False
        self.clip: float | None = None
        self.ready: Callable[[Tensor], Tensor] = _as_it_is
        self.wishes: Callable[[], Sequence[float]] = tuple
        self.divide: Callable[[nn.Module, Any], None] | None = None

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """What is to become small, the mean over a batch."""
        raise NotImplementedError

    def weight(self, target: Tensor) -> float:
        """What the loss of a batch weighs in the mean over several."""
        return len(target)

    def score(self, output: Any, target: Tensor) -> Tensor | None:
        """The sum of the samples' scores in a batch, each as an evaluation would count it; None where a sample has
        none by itself."""
        raise NotImplementedError

    def one_batch(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of one batch, and the sum of its samples' scores."""
        inputs, target, _ = batch
        output = self.network(each(inputs, self.ready))
        with torch.no_grad():
            score = self.score(output, target)
        loss = {"loss": self.loss(output, target)}
        return loss if score is None else loss | {"score": score}

    def training_step(self, step: StepBatch, _index: int) -> dict[str, Any]:
        """One step of the optimiser.

        Returns:
            The mean ``loss``, the sum of the ``score`` where samples have one, their ``count``, and the sums of the
            ``wishes``, all of them over all processes.

        Raises:
            ExciteError: fewer than two samples are left, the others' files being broken.
        """
        parts, planned = step
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        self._check_count(sum(len(part[2]) for part in parts), known=self.processes.count == 1)
        if self.processes.count == 1 and len(parts) == 1:
            said: dict[str, Any] = self.one_batch(parts[0])
            self._backward(said["loss"])
            said |= {"loss": said["loss"].detach(), "count": len(parts[0][2]), "wishes": list(self.wishes())}
        else:
            said = self._mean([self._learned(part, planned, part is parts[-1]) for part in parts], planned)
        self._check_count(said["count"])
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        optimizer.step()
        return said

    def _check_count(self, count: int, known: bool = True) -> None:
        if known and count < 2:
            raise ExciteError("Fewer than two samples of a step can be read: mend or remove the broken files.")

    def _learned(self, part: Batch, planned: int, last: bool) -> dict[str, Any]:
        """The gradient of a part, added to that of those before; only with the last one processes exchange theirs."""
        with contextlib.nullcontext() if last else self._gathering():
            count = len(part[2])
            if not count:
                self._backward(self._nothing(part))
                return {"count": 0}
            said = self.one_batch(part)
            weight = self.weight(part[1])
            # Gradients are added up over parts, and averaged over processes.
            self._backward(said["loss"] * (weight * self.processes.count / planned))
        return said | {"loss": said["loss"].detach() * weight, "weight": weight, "count": count}

    def _backward(self, loss: Tensor) -> None:
        # A gradient is computed in the types of the forward pass; autocast would change those of our own functions.
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    def _mean(self, parts: list[dict[str, Any]], planned: int) -> dict[str, Any]:
        """What the parts of all processes come to; the gradients become those of the mean over what there was."""
        own = [float(sum(part.get(key, 0.0) for part in parts)) for key in ("loss", "weight", "score", "count")]
        scored = float(any("score" in part for part in parts))
        loss, weight, score, count, seen, *wishes = self.processes.sums([*own, scored, *self.wishes()])
        if weight and weight != planned:  # weights of classes, or broken files
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(planned / weight)
        said = {"loss": torch.tensor(loss / max(weight, 1e-30)), "count": int(count), "wishes": wishes}
        return said | {"score": torch.tensor(score)} if seen else said

    @contextlib.contextmanager
    def _gathering(self) -> Iterator[None]:
        """A backward pass within it adds to this process's gradients, and leaves the exchange to a later one."""
        wrapper = self.trainer.strategy.model if self.processes.count > 1 else None
        with wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) else contextlib.nullcontext():
            yield

    def _nothing(self, part: Batch) -> Tensor:
        """A loss of 0, on which this process meets the others in everything that they do together."""
        inputs = each(part[0], self.ready)
        if self.shared_norm:
            # Batch norm knows how many samples each process has: none here.
            return _total(self.network(each(inputs, lambda one: one[:0])))
        with norms_held(self.network):
            return 0.0 * _total(self.network(inputs))

    def configure_model(self) -> None:
        """Divide the network's parameters, once."""
        if self.divide is not None:
            assert self.device_mesh is not None
            self.divide(self.network, self.device_mesh["data_parallel"])
            self.divide = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser that was passed in, over this network."""
        if self.optimize is None:
            raise ExciteError("This task was built to evaluate: it has no optimiser.")
        return self.optimize(self.network)


def _as_it_is(inputs: Tensor) -> Tensor:
    return inputs


@contextlib.contextmanager
def norms_held(network: nn.Module) -> Iterator[None]:
    """Within it batch norm uses its running statistics, and leaves them alone."""
    learning = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    for module in learning:
        module.eval()
    try:
        yield
    finally:
        for module in learning:
            module.train()


def _total(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.float().sum()
    return torch.stack([_total(part) for part in output]).sum()


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
        processes: Processes = ALONE,
    ) -> Evaluation:
        """The network's mode is restored afterwards; ``step`` is called with (done, in all). Of several ``processes``
        that have the same network each looks at its share, and all are told the whole score."""
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

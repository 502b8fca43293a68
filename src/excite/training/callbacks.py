"""What happens around a training step: the rate, the average, the record, the checkpoints, the bar."""

from __future__ import annotations

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from excite.errors import ExciteError
from excite.files import write_atomically
from excite.processes import Processes
from excite.tasks.base import ALONE, Metric
from excite.training import checkpoint
from excite.training.bars import make_bar
from excite.training.sync_batch_norm import batch_norms

Row = dict[str, float]


@dataclass
class Position:
    """Where a run stands, in steps from its very beginning, and what must be carried over a break."""

    step: int
    total_steps: int
    steps_per_epoch: int
    seconds: float = 0.0
    loss_sum: float = 0.0
    score_sum: float = 0.0
    scored: bool = False
    images: int = 0
    rows: list[Row] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step closed an epoch."""
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    def is_done(self, best: Best | None) -> bool:
        """Whether there is nothing more to train: all steps done, or the patience of ``best`` at its end."""
        stale = best is not None and self.at_epoch_end and best.is_stale(self.epoch)
        return self.step >= self.total_steps or stale


class InterruptedRunError(ExciteError):
    """The run was stopped from outside, at a checkpoint."""


class Rate(pl.Callback):
    """Sets the learning rate of each step, and reseeds what draws inside the network (dropout).

    What is drawn there depends on how many processes share the step: each draws for its own samples.
    """

    def __init__(self, position: Position, factor: Callable[[int], float], seed: int, rank: int = 0) -> None:
        self.position, self.factor, self.seed = position, factor, seed
        self.rank = rank
        self.peaks: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the peak rates before any is changed."""
        self.peaks = [group.setdefault("peak_lr", group["lr"]) for group in trainer.optimizers[0].param_groups]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Set the rate for the step that begins."""
        for group, peak in zip(trainer.optimizers[0].param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(self.position.step)
        torch.manual_seed((self.seed * 1_000_003 + self.position.step + (self.rank << 53)) % 2**63)


class Freeze(pl.Callback):
    """Holds still what came from weights while only what is new beside it is to learn.

    It is set anew at every step, for a run may be resumed at any of them, and scoring in between changes the mode.

    Args:
        position: of the run.
        network: what is trained.
        fresh: the names of its new parameters.
        frozen: whether the rest is to be held in a step.
    """

    def __init__(
        self, position: Position, network: nn.Module, fresh: Collection[str], frozen: Callable[[int], bool]
    ) -> None:
        self.position, self.network, self.frozen = position, network, frozen
        self.host = [p for name, p in network.named_parameters() if name not in fresh and p.requires_grad]
        # Dropout within a new unit has no parameters: a module is new when all parameters in it, at any depth, are.
        self.new: list[nn.Module] = []
        for prefix, module in network.named_modules():
            names = [name for name, _ in module.named_parameters(prefix)]
            if names and all(name in fresh for name in names):
                self.new.append(module)

    def on_train_batch_start(self, *_: Any) -> None:
        """Without a gradient a parameter keeps its value, and the optimiser what it knows of it."""
        frozen = self.frozen(self.position.step)
        for parameter in self.host:
            parameter.requires_grad_(not frozen)
        # Batch norm in evaluation mode leaves its statistics alone.
        self.network.train(not frozen)
        for module in self.new:
            module.train()


class FreezeNorms(pl.Callback):
    """Has batch norm use its running statistics, and keep them, from some step on.

    SENet-154 was trained so at its end (Hu et al., the repository of the papers' models). Weights and shifts go on
    learning.

    Args:
        position: of the run.
        network: what is trained.
        begin: the first step.
        processes: those that share the step, which go on with the statistics of rank 0.
    """

    def __init__(self, position: Position, network: nn.Module, begin: float, processes: Processes) -> None:
        self.position, self.network, self.begin, self.processes = position, network, begin, processes
        self.begun = False

    def on_train_batch_start(self, *_: Any) -> None:
        """Scoring in between changes the mode: it is set anew at every step."""
        if self.position.step < self.begin:
            return
        norms = batch_norms(self.network)
        if not self.begun:
            self.processes.spread(self.network.buffers())
            self.begun = True
        for norm in norms:
            norm.eval()


class WeightAverage(pl.Callback):
    """An exponential moving average of weights and batch-norm statistics.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        def average(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
            count = float(updates)
            keep = min(decay, (1 + count) / (10 + count))
            for target, source in zip(averaged, current, strict=True):
                if target.is_floating_point():
                    target.lerp_(source, 1 - keep)
                else:
                    target.copy_(source)

        self.model = AveragedModel(network, multi_avg_fn=average, use_buffers=True)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Take the new weights into the average."""
        network = pl_module.network
        assert isinstance(network, nn.Module)
        self.model.to(pl_module.device)
        self.model.update_parameters(network)


class Best:
    """The weights with the best validation score so far, and when to give up hope of better ones.

    Args:
        network: whose weights they are.
        metric: what they are judged by.
        patience: epochs without a better score after which the run ends.
    """

    def __init__(self, network: nn.Module, metric: Metric, patience: int) -> None:
        self.network, self.metric, self.patience = network, metric, patience
        self.value: float | None = None
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}

    def see(self, epoch: int, scores: Mapping[str, float]) -> None:
        """Take the weights where this epoch's validation scores are better than all before."""
        value = scores[self.metric.name]
        sign = 1 if self.metric.higher_is_better else -1
        if self.value is None or sign * value > sign * self.value:
            self.value, self.epoch = value, epoch
            self.weights = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def is_stale(self, epoch: int) -> bool:
        """Whether the patience is at its end after so many epochs."""
        return self.value is not None and epoch - self.epoch >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"value": self.value, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.value, self.epoch, self.weights = state["value"], state["epoch"], state["weights"]


class Record(pl.Callback):
    """Counts, stops at a loss that is not a number, writes ``metrics.csv`` and the checkpoints.

    Args:
        position: moved on by one at every step.
        folder: the run's folder.
        state: gives what a checkpoint holds beside the position.
        metric: the headline metric, whose value in training is the mean over the samples as they were learned from.
        validate: scores the network on the validation images, or None.
        best: is shown every validation score, and may end the run; or None.
        every: steps between checkpoints; None for the end of each epoch and every so many ``minutes``.
        minutes: see there.
        keep: how many checkpoints stay.
        waited: seconds that the run has waited for data so far.
        processes: those that share the run, of which the first one writes.
    """

    def __init__(
        self,
        position: Position,
        folder: Path,
        state: Callable[[], dict[str, Any]],
        metric: Metric,
        validate: Callable[[], dict[str, float]] | None,
        best: Best | None,
        every: int | None,
        minutes: float,
        keep: int,
        waited: Callable[[], float],
        processes: Processes = ALONE,
    ) -> None:
        self.position, self.folder, self.state, self.validate = position, folder, state, validate
        self.metric, self.best = metric, best
        self.every, self.minutes, self.keep, self.waited = every, minutes, keep, waited
        self.processes = processes
        self.clock = self.saved_at = time.monotonic()
        self.epoch_seconds, self.epoch_waited, self.epoch_images = 0.0, 0.0, 0
        self.seconds = 0.0  # of this process's own steps
        self.stop = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and cut ``metrics.csv`` back to where the run goes on."""
        self.clock = self.saved_at = time.monotonic()
        self._write_rows()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; at the end of an epoch write its row; save when it is time."""
        here = self.position
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            raise ExciteError(
                f"The loss became {loss} at step {here.step} (epoch {here.epoch + 1}); the last good checkpoint is "
                f"kept in {self.folder / 'checkpoints'}. A lower optimizer.lr, a warm-up, or trainer.clip=1 helps."
            )
        now = time.monotonic()
        here.seconds += now - self.clock
        self.epoch_seconds += now - self.clock
        self.seconds += now - self.clock
        self.clock = now
        count = outputs["count"]
        here.step += 1
        here.loss_sum += loss * count
        if "score" in outputs:
            here.score_sum += float(outputs["score"])
            here.scored = True
        here.images += count
        self.epoch_images += count
        if here.at_epoch_end:
            self._end_epoch(trainer)
        # What one process wants, all do.
        stop, late = (wanted > 0 for wanted in outputs["wishes"])
        due = here.step % self.every == 0 if self.every else here.at_epoch_end or late
        done = here.is_done(self.best)
        if due or stop or done:
            self.save()
        self.clock = time.monotonic()
        trainer.should_stop = done
        if stop and not done:
            self.processes.wait()  # that the first one has saved: the end of one is the end of all
            raise InterruptedRunError(
                f"Stopped at step {here.step} of {here.total_steps}; {self.folder} holds everything so far."
            )

    def wishes(self) -> tuple[float, float]:
        """Whether this process is to stop, and whether by its clock a checkpoint is due."""
        late = self.processes.writes and time.monotonic() - self.saved_at > 60 * self.minutes
        return float(self.stop), float(late)

    def data_share(self) -> float:
        """The share of its steps' time that this process has waited for data, in percent."""
        return 100 * self.waited() / self.seconds if self.seconds else 0.0

    def save(self) -> None:
        """Write a checkpoint, unless the weights have gone bad."""
        here, state = self.position, self.state()
        self.saved_at = time.monotonic()
        if not self.processes.writes:
            return
        if not all(value.isfinite().all() for value in state["network"].values() if value.is_floating_point()):
            raise ExciteError(
                f"The weights are no longer finite after step {here.step}; the last good checkpoint is kept in "
                f"{self.folder / 'checkpoints'}. A lower optimizer.lr, a warm-up, or trainer.clip=1 helps."
            )
        state["position"] = {
            "step": here.step,
            "seconds": here.seconds,
            "loss_sum": here.loss_sum,
            "score_sum": here.score_sum,
            "scored": here.scored,
            "images": here.images,
            "rows": here.rows,
        }
        checkpoint.save(self.folder / "checkpoints", here.step, state, self.keep)
        self.saved_at = time.monotonic()  # a slow disk is not to be written to all the time

    def _end_epoch(self, trainer: pl.Trainer) -> None:
        here = self.position
        waited = self.waited()
        row: Row = {
            "epoch": here.epoch,
            "step": here.step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": here.loss_sum / here.images,
            **(
                {f"train_{self.metric.name}": self.metric.factor * here.score_sum / here.images}
                if here.scored
                else {}
            ),
            "seconds": here.seconds,
            # Of this process's own part of the epoch: a resumed one did not see the rest.
            "images_per_second": self.epoch_images / self.epoch_seconds,
            "data_share": 100 * (waited - self.epoch_waited) / self.epoch_seconds,
        }
        if self.validate is not None:
            scores = self.validate()
            row |= {f"val_{name}": value for name, value in scores.items()}
            if self.best is not None:
                self.best.see(here.epoch, scores)
        here.rows.append(row)
        here.loss_sum, here.score_sum, here.images = 0.0, 0.0, 0
        self.epoch_seconds, self.epoch_waited, self.epoch_images = 0.0, waited, 0
        self._write_rows()
        for logger in trainer.loggers:
            logger.log_metrics(row, step=here.step)

    def _write_rows(self) -> None:
        if not self.processes.writes:
            return
        # The whole file each time: it is small, and so it can never hold more than the position knows.
        text = io.StringIO()
        if self.position.rows:
            writer = csv.DictWriter(text, list(self.position.rows[-1]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.position.rows)
        write_atomically(self.folder / "metrics.csv", text.getvalue())


class StopOnSignal(pl.Callback):
    """Ctrl-C, or the signal of a machine that is about to be taken away, ends the run after the step at hand, with a
    checkpoint; a second Ctrl-C ends it at once.

    Clusters send SIGTERM; Slurm can be asked for SIGUSR1 some time before (``sbatch --signal=USR1@300``).
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, where Python lets us: only the main thread receives signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self.before[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.record.stop = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back when the run fails, too."""
        self.teardown(trainer, pl_module, "fit")


class Bar(pl.Callback):
    """A progress bar on stderr."""

    def __init__(self, position: Position, title: str) -> None:
        self.position = position
        self.progress = make_bar()
        self.task = self.progress.add_task(title, total=position.total_steps, completed=position.step, status="")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar."""
        self.progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        here = self.position
        epoch = min(here.epoch + 1, here.total_steps // here.steps_per_epoch)
        status = f"epoch {epoch}  loss {float(outputs['loss']):.3f}"
        self.progress.update(self.task, completed=here.step, status=status)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the bar away."""
        self.progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the bar away when the run fails, too."""
        self.progress.stop()

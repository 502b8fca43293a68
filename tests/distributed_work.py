"""What each of several processes does in the tests of distributed training; they are started by ``spawned``."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from excite.data.epoch import EpochLoader, Job, Made
from excite.processes import processes
from excite.tasks.classification import ClassificationTask
from excite.training.distributed import trainer_options
from excite.training.distributed_parts import Shares
from excite.training.distributed_shares import shard, whole
from excite.training.fit import Stream
from excite.training.sync_batch_norm import synchronised

CLASSES = 4
LR, MOMENTUM = 0.05, 0.9


def spawned(work: Callable[..., None], count: int, folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` gives in each of ``count`` processes of one gloo group."""
    start = multiprocessing.get_context("spawn")
    folder.mkdir(parents=True)
    running = [start.Process(target=_joined, args=(work, rank, count, folder, arguments)) for rank in range(count)]
    for one in running:
        one.start()
    for one in running:
        one.join(1200)
        assert one.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _joined(work: Callable[..., Any], rank: int, count: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    torch.save(work(*arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()


class Tiny(nn.Module):
    """A convolution, a norm or none, squeeze and excitation, a classifier."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.gate = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid())
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(self.convolution(x)).relu()
        out: Tensor = self.classifier((u * self.gate(u.mean((2, 3)))[..., None, None]).mean((2, 3)))
        return out


def tiny(norm: bool) -> Tiny:
    """The same one every time, in double precision."""
    torch.manual_seed(3)
    return Tiny(norm).double()


class Samples(Dataset[Made]):
    """Random maps of 3×6×6 numbers with random classes."""

    def __init__(self, count: int) -> None:
        draw = np.random.default_rng(1)
        self.x = torch.from_numpy(draw.normal(size=(count, 3, 6, 6)))
        self.y = torch.from_numpy(draw.integers(0, CLASSES, count))

    def __getitem__(self, job: Job) -> Made:
        index = torch.from_numpy(job.index)
        return Made((self.x[index], self.y[index], index), {})


class TinyLoader(EpochLoader):
    """Batches of them."""

    def identity(self) -> dict[str, Any]:
        return {}


def trained(
    samples: int,
    batch: int,
    steps: int,
    *,
    norm: bool = True,
    most: int | None = None,
    weights: tuple[float, ...] | None = None,
    clip: float | None = None,
    divided: bool = False,
) -> dict[str, Any]:
    """Train a tiny network by SGD for some steps, as ``fit`` does it, in this process or its group.

    Returns:
        The ``weights``, each step's ``loss``, and the ``index`` of this process's samples in each step.
    """
    with processes() as group:
        network = tiny(norm)
        batches: Any = TinyLoader(samples, Samples(samples), batch, seed=5, shuffle=True)
        batches.divide(lambda maker: Shares(maker, group.count, group.rank, most))
        class_weights = torch.tensor(weights).double() if weights else None
        task = ClassificationTask(network, _sgd, class_weights=class_weights)
        task.processes, task.clip = group, clip
        task.shared_norm = norm and group.count > 1
        task.divide = shard if divided else None
        note = _Note()
        trainer = pl.Trainer(
            accelerator="cpu",
            precision="32-true",  # that is: as they are
            max_steps=steps,
            callbacks=[note],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **trainer_options(group, "fsdp" if divided else "ddp", torch.device("cpu"), False),
        )
        if task.shared_norm:
            with synchronised(network):
                trainer.fit(task, Stream(batches, 0, steps, False))
        else:
            trainer.fit(task, Stream(batches, 0, steps, False))
        return {"weights": whole(network.state_dict()), "loss": note.losses, "index": note.index}


def _sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)


class _Note(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.index: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.index.append([int(i) for part in batch[0] for i in part[2]])

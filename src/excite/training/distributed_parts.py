"""A step's samples, divided among processes and into parts that are worked on one after another."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from excite.data.epoch import Job, Made
from excite.errors import UsageError
from excite.tasks.base import Batch


def check_divides(batch_size: int, processes: int) -> None:
    """Refuse a batch of which the processes cannot all have as much.

    Raises:
        UsageError: says which sizes would do.
    """
    if batch_size % processes or batch_size < 2 * processes:
        below = batch_size // processes * processes
        fitting = [str(size) for size in (below, below + processes) if size >= 2 * processes]
        fitting = fitting or [str(2 * processes)]
        raise UsageError(
            f"key 'trainer.batch_size': {batch_size} images a step do not divide among {processes} processes; take "
            f"{' or '.join(fitting)}"
        )


def bounds(samples: int, processes: int, rank: int, most: int | None) -> list[int]:
    """Where the parts of one process begin among the samples of a step, and the end of the last.

    Shares differ by one sample at most, as do a process's parts, and all processes have as many parts. A part of one
    sample is never made (batch norm on a 1×1 map fails): of too few samples for all, some processes have none, and
    where ``most`` is 2 or 3 a part may have one or two more.

    Args:
        samples: in the step.
        processes: that share it.
        rank: which of them.
        most: samples in a part, at least 2, or None for any number.
    """
    busy = min(processes, max(1, samples // 2))
    if rank >= busy:
        start, own = samples, 0
    else:
        share, rest = divmod(samples, busy)
        start, own = rank * share + min(rank, rest), share + (rank < rest)
    parts = 1 if most is None else max(1, min(-(-samples // (busy * most)), samples // busy // 2))
    size, larger = divmod(own, parts)
    return [start + part * size + min(part, larger) for part in range(parts + 1)]


class Shares(Dataset[Made]):
    """Makes of a job what one process has to do of it: as batch ``(parts, samples of the whole step, index)``.

    Args:
        maker: makes a batch.
        processes: that share a step.
        rank: which of them this one is.
        most: samples in a part, or None for any number.
    """

    def __init__(self, maker: Dataset[Made], processes: int, rank: int, most: int | None) -> None:
        self.maker, self.processes, self.rank, self.most = maker, processes, rank, most

    def __getitem__(self, job: Job) -> Made:
        samples = len(job.index)
        ends = bounds(samples, self.processes, self.rank, self.most)
        parts: list[Batch] = []
        broken: dict[str, str] = {}
        for start, stop in itertools.pairwise(ends):
            part, missing = self._made(job, start, stop)
            parts.append(part)
            broken |= missing
        index = np.concatenate([part[2].numpy() for part in parts])
        batch: Any = (parts, samples, index)
        return Made(batch, broken)

    def _made(self, job: Job, start: int, stop: int) -> tuple[Batch, dict[str, str]]:
        broken: dict[str, str] = {}
        if stop > start:
            made = self.maker[_piece(job, start, stop)]
            if len(made.batch[2]):
                return made.batch, made.broken
            broken = made.broken
        # Nothing for this process: one sample, the first that can be read, shows the shape of the others'.
        for other in range(len(job.index)):
            made = self.maker[_piece(job, other, other + 1)]
            if len(made.batch[2]):
                break
        inputs, target, index = made.batch
        return (inputs, target, index[:0]), broken


def _piece(job: Job, start: int, stop: int) -> Job:
    """A job for some of a job's samples."""
    return dataclasses.replace(job, index=job.index[start:stop], successors=job.successors[start:stop])

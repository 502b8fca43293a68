"""The place in an epoch: which batches there are, whose they are, and where a run that was cut off goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from excite.data.draws import Indices, permutation
from excite.data.encoded import tell_broken
from excite.errors import ExciteError, UsageError

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """A batch that is to be made.

    An epoch may show a sample several times, each time with other random draws. So a batch holds drawings: drawing
    ``i`` is sample ``i`` as it comes the first time, ``i + samples`` the second time, and so on.

    Attributes:
        epoch: counted from 0.
        index: which drawings it holds, (N,).
        successors: which drawing comes after each in the epoch's order, (N,).
    """

    epoch: int
    index: Indices
    successors: Indices


@dataclass(frozen=True)
class Made:
    """A batch, and why some of its samples are missing, by the names of their files."""

    batch: Batch
    broken: dict[str, str]


class EpochLoader:
    """Iterates over an epoch's samples in batches of three tensors, the last of which is the samples' index.

    A subclass says what a batch is (``maker``) and in which order samples are seen (:meth:`order`). What
    :meth:`state_dict` holds, how ranks share an epoch and how the last batch comes about is the same for all.

    Args:
        samples: how many there are in an epoch.
        maker: ``maker[job]`` is the batch of a :class:`Job`, and depends on nothing else, so that it does not matter
            which process makes it, and when.
        batch_size: samples per batch and rank.
        seed: of order and augmentation.
        shuffle: whether this is for training: all ranks make the same number of steps, and no batch has one sample.
        refuse: whether a sample that turns out broken ends the work.
        workers: processes that prepare batches ahead; 0 prepares them in this process.
        rank: this process's number among ``world_size`` that share an epoch.
        world_size: the number of processes that share an epoch.

    Raises:
        UsageError: the batch size, the ranks, or the number of samples do not allow a batch.
    """

    batch_sampler = None  # Lightning asks for it wherever there is a sampler
    samples_are = "images"

    def __init__(
        self,
        samples: int,
        maker: Dataset[Made],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        refuse: bool = False,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or (shuffle and batch_size < 2):
            raise UsageError(
                f"The batch size is {batch_size}: training needs at least 2 {self.samples_are}, evaluation 1."
            )
        if not 0 <= rank < world_size:
            raise UsageError(f"Rank {rank} of {world_size} does not exist: ranks count from 0.")
        if shuffle and samples // world_size < 2:
            raise UsageError(
                f"{samples} {self.samples_are} on {world_size} processes: training needs at least 2 "
                f"{self.samples_are} per process."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._samples = samples
        self._next = 0  # the batch that is handed out next
        self._resumed = False  # whether _next was loaded rather than counted
        self._broken: set[str] = set()
        self._refuse = refuse
        self._maker = maker
        self._workers = workers
        self._divided = False
        self._start()

    def divide(self, change: Callable[[Dataset[Made]], Dataset[Made]]) -> None:
        """Have batches made in another way, such as a process's share of them alone, before any was asked for.

        A batch that comes out so may have any number of samples, and none: ``Made.batch`` still ends in their index.
        """
        self._maker, self._divided = change(self._maker), True
        self._start()

    def _start(self) -> None:
        self._ahead: DataLoader[Made] | None = None
        if self._workers:
            self._ahead = DataLoader(
                self._maker,
                batch_size=None,
                sampler=_Jobs(self),
                num_workers=self._workers,
                persistent_workers=True,
                # A generator of its own: else starting the workers would draw from torch's global one.
                generator=torch.Generator(),
            )

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return len(self._bounds(self._share())) - 1

    @property
    def sampler(self) -> Self:
        """The object whose ``set_epoch`` Lightning calls before each epoch: this one."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. A new one starts at its first batch; the current one keeps a resumed place."""
        if epoch != self.epoch:
            self.epoch, self._next, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, with what it depends on, in plain values."""
        return {"epoch": self.epoch, "batch": self._next, **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken: the next iteration begins with the batch that would have come next.

        Raises:
            UsageError: the state was taken from other data, or with another batch size, seed or number of ranks.
        """
        mine = self.identity()
        for key in [*mine, *sorted(state.keys() - mine.keys() - {"epoch", "batch"})]:
            if state.get(key) != mine.get(key):
                raise UsageError(
                    f"The saved place in the data has {key} {state.get(key)}, but here it is {mine.get(key)}: resume "
                    "with the same data, batch size, seed and number of processes."
                )
        self.epoch, self._next, self._resumed = int(state["epoch"]), int(state["batch"]), True

    def __iter__(self) -> Iterator[Batch]:
        # The place is read at the first batch, not here: Lightning makes the iterator before it sets the epoch.
        if not self._resumed:
            self._next = 0
        self._resumed = False
        for number, made in enumerate(self._made(), start=self._next):
            self._note_broken(made.broken)
            self._next = number + 1
            count = len(made.batch[2])
            if count < 2 and self.shuffle and not self._divided:
                raise ExciteError(
                    f"Fewer than two {self.samples_are} of a training batch can be read: mend or remove the broken "
                    "files."
                )
            if count or self._divided:
                yield made.batch

    def ready(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs of a batch, on whatever device they are by now, as the network takes them."""
        return inputs

    def identity(self) -> dict[str, Any]:
        """What the batches depend on besides the epoch, in plain values."""
        raise NotImplementedError

    def order(self) -> Indices:
        """The drawings (see :class:`Job`) in the order in which this epoch sees them, (samples,)."""
        return permutation(self.seed, self.epoch, self._samples) if self.shuffle else np.arange(self._samples)

    def jobs(self) -> Iterator[Job]:
        """The batches that are still to be made in this epoch."""
        order = self.order()
        # Each step of all ranks together sees the samples that one process with a batch as large as all theirs
        # would see, and each rank sees neighbours, as mixing wants.
        mine = self._positions(self._share())
        bounds = self._bounds(len(mine))
        for start, stop in zip(bounds[self._next : -1], bounds[self._next + 1 :], strict=True):
            place = mine[start:stop]
            yield Job(self.epoch, order[place], order[(place + 1) % self._samples])

    def _made(self) -> Iterator[Made]:
        if self._ahead is not None:
            yield from self._ahead
        else:
            for job in self.jobs():
                yield self._maker[job]

    def _share(self) -> int:
        """How many samples of an epoch this rank sees."""
        share, rest = divmod(self._samples, self.world_size)
        return share if self.shuffle else share + (self.rank < rest)

    def _bounds(self, share: int) -> list[int]:
        """Where the batches of this rank's samples begin, and the end of the last."""
        bounds = [*range(0, share, self.batch_size), share]
        if self.shuffle and len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
            del bounds[-2]
        return bounds

    def _positions(self, share: int) -> Indices:
        """This rank's places in the epoch's order."""
        if not self.shuffle:
            return np.arange(self.rank, self._samples, self.world_size)
        step = np.arange(share) // self.batch_size
        # The last step may be short: all ranks have the same number of samples in it.
        width = np.where((step + 1) * self.batch_size <= share, self.batch_size, share % self.batch_size)
        return step * self.batch_size * self.world_size + self.rank * width + np.arange(share) % self.batch_size

    def _note_broken(self, found: dict[str, str]) -> None:
        fresh = {name: reason for name, reason in found.items() if name not in self._broken}
        if fresh:
            self._broken.update(fresh)
            # A broken shard goes by its own name, once for all its images.
            shards = {name: reason for name, reason in fresh.items() if name.endswith(".tar")}
            images = {name: reason for name, reason in fresh.items() if name not in shards}
            for found, what in ((shards, "shard"), (images, "image")):
                if found:
                    tell_broken(list(found), list(found.values()), self._refuse, what)


class _Jobs:
    """The jobs of the loader's current epoch, from its current place on; made anew at each iteration."""

    def __init__(self, loader: EpochLoader) -> None:
        # A loader that held itself would be freed by the garbage collector, which closes the workers' queues before
        # it tells them to end: each then waits for five seconds.
        self._loader = weakref.ref(loader)

    def __iter__(self) -> Iterator[Job]:
        loader = self._loader()
        assert loader is not None  # it is what iterates over its own workers
        return loader.jobs()

    def __len__(self) -> int:
        loader = self._loader()
        assert loader is not None
        return len(loader)

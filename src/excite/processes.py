"""Several processes that share a piece of work, as ``torchrun``, Slurm or ``excite train --devices`` start them."""

from __future__ import annotations

import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from excite.errors import ExciteError, UsageError

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long processes wait for one another: one may measure for all, or score a network."""


class PeerError(ExciteError):
    """Another of the processes failed, and says why; this one has nothing to add.

    Args:
        message: what is known of it.
        exit_code: with which this process is to end.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Every method has to be called by all of them, and gives all of them the same. What is exchanged lies on the CPU.

    Attributes:
        rank: its number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether it is the one that writes files and prints."""
        return self.rank == 0

    def everyones(self, part: Any) -> list[Any]:
        """What each process gives, in the order of the ranks."""
        if self.count == 1:
            return [part]
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, part)
        return parts

    def wait(self) -> None:
        """Go on when all have come here."""
        self.everyones(None)

    def firsts(self, value: T) -> T:
        """What rank 0 gives."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over the processes of each number, in double precision."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work in which one process's refusal is the refusal of all.

        Raises:
            PeerError: another process failed. Where several did, the first of them says why.
        """
        failure: ExciteError | None = None
        try:
            yield
        except ExciteError as error:
            failure = error
        codes = self.everyones(failure.exit_code if failure is not None else 0)
        first = next((rank for rank, code in enumerate(codes) if code), None)
        if failure is not None and first == self.rank:
            raise failure
        if first is not None:
            raise PeerError(f"Process {first} of {self.count} failed.", codes[first])

    @torch.no_grad()
    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all processes rank 0's values of tensors that each of them has, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes of ``torch.distributed``, which is started where ``torchrun`` says so; else this one alone."""
    if not dist.is_available():
        yield Processes()
    elif dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
    elif started_together():
        _join()
        try:
            yield Processes(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Processes()


def _join() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        # Else every process would exchange tensors on the first GPU.
        torch.cuda.set_device(own_device(torch.device("cuda")))
    try:
        store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
        store = _of_this_start(store, rank, count)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    except (RuntimeError, dist.DistError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).partition("\n")[0]
        raise ExciteError(f"The processes did not find each other at {where}: {reason}") from error


def _of_this_start(store: Store, rank: int, count: int) -> Store:
    """The part of a store in which nothing is left of processes that were there before a restart.

    ``torchrun`` goes on with the same store, in which the addresses of lost processes still stand. So every process
    says that it has come under a name that nobody else has had, and rank 0 tells each under that name where to meet.
    """
    place = f"excite/{uuid.uuid4()}"
    if rank > 0:
        store.set(f"excite/come/{rank}", place)
        place = store.get(f"excite/meet/{place}").decode()
        store.set(f"{place}/{rank}", "here")
        return PrefixStore(place, store)
    missing, begin = set(range(1, count)), time.monotonic()
    while missing:
        for other in sorted(missing):
            if store.check([f"excite/come/{other}"]):
                store.set(f"excite/meet/{store.get(f'excite/come/{other}').decode()}", place)
            if store.check([f"{place}/{other}"]):
                missing.remove(other)
        if time.monotonic() - begin > PATIENCE.total_seconds():
            raise ExciteError(f"Of {count} processes {len(missing)} have not come.")
        time.sleep(0.01)
    return PrefixStore(place, store)


def started_together() -> bool:
    """Whether ``torchrun`` started this process beside others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_of_all() -> bool:
    """Whether this process is the one that prints."""
    return not started_together() or os.environ["RANK"] == "0"


def own_device(device: torch.device) -> torch.device:
    """Of several accelerators, the one of this process where several share the work."""
    if device.type == "cpu" or str(device) != device.type or not started_together():
        return device
    number = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.accelerator.device_count())
    return torch.device(device.type, number)


def check_apart(group: Processes, device: torch.device) -> None:
    """Refuse processes that would work on one GPU together: NCCL, which joins them, does not have it.

    Raises:
        UsageError: in all of them.
    """
    if device.type != "cuda" or group.count == 1:
        return
    known = torch.cuda.get_device_properties(device)
    gpus = len(set(group.everyones((platform.node(), str(known.uuid)))))
    if gpus < group.count:
        said = f"{group.count} processes on {gpus} GPU{'s' if gpus > 1 else ''}"
        raise UsageError(f"{said}: start one for each GPU, or take --device cpu")


def join_slurm() -> None:
    """Where ``srun`` started this process beside others, say so in the environment as ``torchrun`` would.

    Raises:
        UsageError: the processes are not spread evenly over the machines.
    """
    known = os.environ
    count = int(known.get("SLURM_STEP_NUM_TASKS", "1"))
    if started_together() or count == 1:
        return
    nodes = int(known.get("SLURM_STEP_NUM_NODES", "1"))
    if count % nodes:
        raise UsageError(f"srun started {count} processes on {nodes} machines: start as many on each")
    known.setdefault("MASTER_ADDR", _first_machine(known.get("SLURM_STEP_NODELIST", "localhost")))
    # Jobs that share a machine differ in their last digits.
    known.setdefault("MASTER_PORT", str(15000 + int(known.get("SLURM_JOB_ID", "0")) % 10000))
    known |= {
        "RANK": known["SLURM_PROCID"],
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": known["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(count // nodes),
    }


def _first_machine(names: str) -> str:
    """``gpu[017-019,023],cpu1`` → ``gpu017``: Slurm's short way of writing a list of names."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", names)
    if found is None:
        raise UsageError(f"SLURM_STEP_NODELIST={names} names no machine: set MASTER_ADDR to the first one's name")
    stem, first, rest = found.groups()
    return stem + (first or "") + (rest or "")

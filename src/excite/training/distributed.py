"""A run of several processes: what Lightning is told of them, and what is said when one of them fails."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from excite.errors import ExciteError, UsageError
from excite.processes import PeerError, Processes

_entered = itertools.count()  # all processes have been there as often


@contextlib.contextmanager
def one_sentence(processes: Processes) -> Iterator[None]:
    """Within it a failure, of all processes or of one that the others then miss, is told by one of them alone.

    Raises:
        ExciteError: in the process that is to tell.
        PeerError: in the others.
    """
    key = f"excite/told/{next(_entered)}"
    try:
        yield
    except PeerError:
        raise
    except ExciteError as error:
        if processes.count > 1 and not _tells(processes, key):
            raise PeerError(str(error), error.exit_code) from error
        raise
    except (RuntimeError, dist.DistError) as error:
        if processes.count == 1 or not _is_loss(error):
            raise
        if not processes.writes or not _tells(processes, key):
            raise PeerError("Another process of the run has ended.") from error
        raise ExciteError(
            "Another process of the run has ended; its folder holds everything up to the last checkpoint, and "
            "excite train --resume goes on from there."
        ) from error


def _tells(processes: Processes, key: str) -> bool:
    """Whether this process is the first to fail."""
    with contextlib.suppress(RuntimeError, dist.DistError):  # the store may have gone with its process
        store = dist.distributed_c10d._get_default_store()
        told: bytes = store.compare_set(key, "", str(processes.rank))
        return told.decode() == str(processes.rank)
    return processes.writes


def _is_loss(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in said for word in ("closed by peer", "reset by peer", "broken pipe", "gloo", "nccl")
    )


class Joined(ClusterEnvironment):
    """The processes of a group that there is already, as Lightning wants to know of them."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes
        self.local = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes.count)))
        if processes.count % self.local:
            raise UsageError(
                f"{processes.count} processes, {self.local} of them on this machine: start as many on each machine"
            )

    @property
    def creates_processes_externally(self) -> bool:
        """They run already."""
        return True

    @property
    def main_address(self) -> str:
        """Where rank 0 is."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Where rank 0 listens."""
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        """It is passed in, never guessed."""
        return False

    def world_size(self) -> int:
        """How many processes there are."""
        return self.processes.count

    def set_world_size(self, size: int) -> None:
        """It is known already."""

    def global_rank(self) -> int:
        """This process's number."""
        return self.processes.rank

    def set_global_rank(self, rank: int) -> None:
        """It is known already."""

    def local_rank(self) -> int:
        """This process's number on its machine."""
        return int(os.environ.get("LOCAL_RANK", str(self.processes.rank % self.local)))

    def node_rank(self) -> int:
        """This machine's number."""
        return self.processes.rank // self.local


def trainer_options(processes: Processes, strategy: str, device: torch.device, partly_frozen: bool) -> dict[str, Any]:
    """What Lightning's Trainer is told of the devices.

    Args:
        processes: that share the run.
        strategy: ``ddp`` or ``fsdp``.
        device: of this process.
        partly_frozen: whether in some steps some parameters get no gradient.
    """
    if processes.count == 1:
        # Else Lightning would look for Slurm's, or others', processes by itself.
        return {"devices": 1 if device.index is None else [device.index], "plugins": [LightningEnvironment()]}
    joined = Joined(processes)
    chosen: Strategy
    if strategy == "fsdp":
        chosen = ModelParallelStrategy(processes.count, 1)
    else:
        # Running statistics do not take part in training: they are made the same before they are used.
        chosen = DDPStrategy(broadcast_buffers=False, find_unused_parameters=partly_frozen)
    return {
        "devices": joined.local,
        "num_nodes": processes.count // joined.local,
        "strategy": chosen,
        "plugins": [joined],
    }

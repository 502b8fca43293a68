"""Starting the processes of a run, and knowing again the run that a process was started anew for."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from excite.errors import ExciteError
from excite.files import write_atomically

LAUNCH = "launch"
"""The file in a run's folder that says which launch the run is of, where it may be started again by itself."""


def can_restart() -> bool:
    """Whether ``torchrun`` starts this process again when it, or one beside it, is lost."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def launch_name() -> str | None:
    """What a launch and all its restarts have in common; None where nothing starts a process again."""
    known = os.environ
    if can_restart():
        name = known["TORCHELASTIC_RUN_ID"]
        # Without a name of its own the launch is known by the process that started this one.
        return f"torchrun {name if name != 'none' else f'{os.getppid()} {_started(os.getppid())}'}"
    if "SLURM_JOB_ID" in known:
        return f"slurm {known['SLURM_JOB_ID']}"
    return None


def is_restart() -> bool:
    """Whether this process stands in for one that was lost."""
    return any(int(os.environ.get(key, "0")) > 0 for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def claim(folder: Path) -> None:
    """Note in a new run's folder which launch it is of."""
    if (name := launch_name()) is not None:
        write_atomically(folder / LAUNCH, name + "\n")


def goes_on(folder: Path) -> bool:
    """Whether this process was started again for the run in this folder."""
    note = folder / LAUNCH
    return is_restart() and note.is_file() and note.read_text().strip() == launch_name()


def _started(process: int) -> str:
    """When a process was started, for its number may be another's later."""
    with contextlib.suppress(OSError, IndexError):
        # The name, in brackets, may hold anything; 20 fields after it comes the time (man 5 proc).
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def launch(
    command: Sequence[str], devices: int, nodes: int = 1, rendezvous: str | None = None, restarts: int = 0
) -> int:
    """Start processes on this machine that share a run, and wait for their end.

    Args:
        command: what each is to run.
        devices: how many on this machine.
        nodes: on how many machines this is done.
        rendezvous: HOST:PORT of one of the machines, the same on all, where they find each other.
        restarts: how often all are started again when one is lost.

    Returns:
        The exit code: that of the first process that failed.

    Raises:
        ExciteError: a process was killed, or the machines did not find each other.
    """
    # What went wrong is said by the process that failed, or here.
    for name in ("torch.distributed", *logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        run_id=f"excite-{rendezvous or uuid.uuid4()}",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        max_restarts=restarts,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise ExciteError(
                f"Process {rank} of the run was ended by {failure.signal_name()}; what was saved stays, and "
                "excite train --resume RUN goes on from there."
            ) from None
        return int(failure.exitcode)
    except SignalException:
        return 1  # the processes were told, and have said where they stopped
    except (RendezvousError, dist.DistError) as error:
        where = rendezvous or "this machine"
        raise ExciteError(f"The processes did not find each other at {where}: {_first_line(error)}.") from None
    return 0


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__

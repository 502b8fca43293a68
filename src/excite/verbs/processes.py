"""Several processes that share a verb's work, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

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
        """What each process gives, in the order of the ranks; all have to call it."""
        if self.count == 1:
            return [part]
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, part)
        return parts

    def wait(self) -> None:
        """Go on when all have come here."""
        self.everyones(None)


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes of ``torch.distributed``, which is started where ``torchrun`` says so; else this one alone."""
    if not dist.is_available():
        yield Processes()
    elif dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
    elif started_together():
        dist.init_process_group("gloo")
        try:
            yield Processes(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Processes()


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

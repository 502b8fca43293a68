"""One task per file: its loss, its metrics, what it predicts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from excite.tasks.base import Task

_TASKS = ("classification", "hyperspectral", "denoising", "retrieval")


def task_named(name: str) -> Task:
    """The task of that name, as data and run cards say it."""
    assert name in _TASKS, name
    task: Task = import_module(f"excite.tasks.{name}").TASK
    return task

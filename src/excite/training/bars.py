"""Progress bars on stderr, for work that takes more than a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Step = Callable[[int, int], object]
"""Called with (done, in all)."""


def make_bar() -> Progress:
    """A bar that goes away when the work is done, and leaves stdout alone."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def bar(title: str, shown: bool) -> Iterator[Step | None]:
    """Show a bar while the block runs; gives the function that moves it, or None where none is wanted."""
    if not shown:
        yield None
        return
    with make_bar() as progress:
        task = progress.add_task(title, total=None, status="")
        yield lambda done, total: progress.update(task, completed=done, total=total)

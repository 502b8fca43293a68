"""How many images at once and how many threads an engine is quickest with: tried, and remembered."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from excite.errors import ExciteError
from excite.files import write_json

log = logging.getLogger(__name__)

BATCHES = (1, 4, 16, 64)
_SECONDS = 0.25
"""So long each setting is tried, after one call that is not counted."""

Build = Callable[[int], Callable[[Tensor], Tensor]]
"""From a number of threads to an engine."""


@dataclass(frozen=True)
class Choice:
    """What was found.

    Attributes:
        batch: images at once.
        threads: of the processor.
        rates: images per second by ``"threads × batch"``, of all that was tried.
    """

    batch: int
    threads: int
    rates: dict[str, float]


def choose(
    build: Build,
    image: Tensor,
    images: int,
    *,
    batches: Sequence[int] = BATCHES,
    key: str = "",
    memory: Path | None = None,
) -> tuple[Choice, Callable[[Tensor], Tensor]]:
    """Try numbers of threads and of images at once, and say which were quickest.

    First the threads are tried, with the middle one of the batches; then, with the best of them, the batches.

    Args:
        build: makes the engine for a number of threads.
        image: one input, (1, C, H, W).
        images: how many are to come: no batch is tried that is larger.
        batches: what may be tried; one alone where the engine takes no other.
        key: what is chosen for: network, engine, precision.
        memory: a JSON file in which the choice is kept, so that a repeat makes the same without trying; None keeps
            nothing.

    Returns:
        The choice, and the engine with its number of threads.
    """
    possible = [batch for batch in batches if batch <= images] or [min(batches)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # With few images there is less to choose from: what was chosen for many does not hold then.
    place = f"{key}, {tuple(image.shape[1:])}, at most {max(possible)} at once, {cores} cores, {_processor()}"
    if (kept := _recall(memory, place)) is not None:
        log.info("Engine: %d at once, %d threads, as chosen before (%s)", kept.batch, kept.threads, memory)
        return kept, build(kept.threads)
    counts = sorted({1, (cores + 1) // 2, cores})
    middle = possible[len(possible) // 2]
    rates: dict[tuple[int, int], float] = {}
    for count in counts if images > 1 else [cores]:
        rates[count, middle] = _rate(build(count), image, middle)
    threads = max(rates, key=lambda setting: rates[setting])[0]
    engine = build(threads)
    for batch in possible:
        if (threads, batch) not in rates:
            rates[threads, batch] = _rate(engine, image, batch)
    batch = max((b for t, b in rates if t == threads), key=lambda b: rates[threads, b])
    said = {f"{count} × {size}": round(rate, 1) for (count, size), rate in rates.items()}
    choice = Choice(batch, threads, said)
    log.info(
        "Engine: %d at once, %d threads are quickest (%.0f images/s; threads × images tried: %s)",
        batch,
        threads,
        rates[threads, batch],
        ", ".join(f"{name}: {rate:.0f}/s" for name, rate in said.items()),
    )
    _remember(memory, place, choice)
    return choice, engine


def _rate(engine: Callable[[Tensor], Tensor], image: Tensor, batch: int) -> float:
    """Images per second."""
    images = image.repeat(batch, 1, 1, 1)
    engine(images)
    calls, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < _SECONDS or not calls:
        engine(images)
        calls += 1
    return calls * batch / max(spent, 1e-9)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _recall(memory: Path | None, place: str) -> Choice | None:
    try:
        kept = json.loads(memory.read_text())[place] if memory else None
        return Choice(**kept) if kept else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(memory: Path | None, place: str, choice: Choice) -> None:
    if memory is None:
        return
    try:
        kept = json.loads(memory.read_text())
    except (OSError, ValueError):
        kept = {}
    try:
        write_json(memory, (kept if isinstance(kept, dict) else {}) | {place: asdict(choice)})
    except ExciteError as error:  # a folder that may only be read: then it is tried again next time
        log.info("%s", error)

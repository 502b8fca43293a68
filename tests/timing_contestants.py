"""Contestants for test_timing.py, apart from it so that their processes start without its imports."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from excite.errors import UsageError


@dataclass(frozen=True)
class Logged:
    """Writes when each call began and ended, and in which process."""

    folder: Path
    name: str
    seconds: float = 0.002

    def __call__(self) -> Callable[[], None]:
        def call() -> None:
            begin = time.monotonic()
            time.sleep(self.seconds)
            with open(self.folder / f"{self.name}.log", "a") as file:
                file.write(json.dumps([begin, time.monotonic(), os.getpid()]) + "\n")

        return call


@dataclass(frozen=True)
class Restless:
    """Stamps the time from a thread that goes on between the calls, as an idle OpenMP thread spins."""

    folder: Path
    name: str

    def __call__(self) -> Callable[[], None]:
        stamps = open(self.folder / f"{self.name}.stamps", "a", buffering=1)  # noqa: SIM115

        def stamp() -> None:
            while True:
                stamps.write(f"{time.monotonic()}\n")
                time.sleep(0.0005)

        threading.Thread(target=stamp, daemon=True).start()
        return Logged(self.folder, self.name)()


@dataclass(frozen=True)
class Sleep:
    seconds: float = 0.001

    def __call__(self) -> Callable[[], None]:
        return lambda: time.sleep(self.seconds)


@dataclass(frozen=True)
class Broken:
    """Goes wrong in one of several ways."""

    how: str

    def __call__(self) -> Callable[[], object]:
        if self.how == "build":
            raise RuntimeError("no such engine")
        if self.how == "refused":
            raise UsageError("unknown network 'resent20'")
        if self.how == "build exits":
            os._exit(3)
        return {
            "call": lambda: 1 // 0,
            "call exits": lambda: os._exit(4),
            "system exit": lambda: sys.exit("enough"),
            "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        }[self.how]


@dataclass(frozen=True)
class Surroundings:
    """Tells what the process looks like from inside, in a file."""

    file: Path

    def __call__(self) -> Callable[[], None]:
        import torch

        def call() -> None:
            seen = {"threads": torch.get_num_threads(), "omp": os.environ["OMP_NUM_THREADS"]}
            if hasattr(os, "sched_getaffinity"):
                seen["cores"] = sorted(os.sched_getaffinity(0))
            self.file.write_text(json.dumps(seen))

        return call


@dataclass(frozen=True)
class Hoard:
    mebibytes: int

    def __call__(self) -> Callable[[], None]:
        def call() -> None:
            bytearray(self.mebibytes * 2**20)[:: 2**12] = bytes([1]) * (self.mebibytes * 2**8)

        return call


@dataclass(frozen=True)
class Employer:
    """Starts a process of its own, as a DataLoader does."""

    file: Path

    def __call__(self) -> Callable[[], None]:
        helper = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        helper.start()
        self.file.write_text(str(helper.pid))
        return lambda: time.sleep(0.001)


@dataclass(frozen=True)
class Talker:
    """Tells when it was built, and notes in a file what it is called under."""

    file: Path
    build_seconds: float = 0.0
    mebibytes_while_built: int = 0

    def __call__(self) -> Callable[[], None]:
        begin = time.monotonic()
        ballast = bytes([1]) * (self.mebibytes_while_built * 2**20)
        time.sleep(self.build_seconds)

        def call() -> None:
            with open(self.file, "a") as file:
                file.write(os.environ.get("EXCITE_TEST_SETTING", "as it was") + "\n")
            time.sleep(0.002)

        call.told = {"built": [begin, time.monotonic()], "ballast": len(ballast)}  # type: ignore[attr-defined]
        return call


def change() -> None:
    os.environ["EXCITE_TEST_SETTING"] = "changed"


def refuse() -> None:
    raise UsageError("no such setting")

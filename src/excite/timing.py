"""Fair timings: every contestant in a process of its own on the same cores, driven in turn (A B A B …).

What slows a machine down for a while (other programs, a falling clock) then slows all contestants alike, and falls
out of the ratio of two samples of the same round. Only one contestant runs at any moment: the others are
suspended, since a thread that is merely idle may still spin on a core for a while (OpenMP).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import pickle
import signal
import statistics
import sys
import time
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from excite.errors import ExciteError, UsageError, nearest

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
Call = Callable[[], object]
"""What is timed. An attribute ``told``, a dictionary, is handed to the driver as it is once the call is built."""
Build = Callable[[], Call]
"""Makes the call to be timed. It is pickled, and called in the contestant's process: heavy imports belong inside."""
Setting = Callable[[], object]
"""Changes the contestant's process before it is timed once more; pickled as a :data:`Build` is."""

FEWEST_ROUNDS = 6  # fewer samples give no 95 % interval of a median: 2 · (1/2)⁵ > 5 %
_WARM_UP_SECONDS = 0.2
_SHARE_OF_BUILDING = 0.7  # of the time there is; what is left goes to the rounds
_SECONDS_TO_END = 2.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Ratio:
    """How many times as long one call takes as another, with a 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """What :func:`time_in_turn` measured.

    Attributes:
        samples: name → seconds per call, one value for each round.
        peaks: name → the largest resident memory of the contestant's process, in bytes, without processes of its own.
        running_peaks: the same since it was built and warmed up; where the system does not tell, as ``peaks``.
        told: name → what the call told of itself.
        failures: name → why there is nothing of it above; only where failures are let pass.
    """

    samples: Mapping[str, tuple[float, ...]]
    peaks: Mapping[str, int]
    running_peaks: Mapping[str, int] = field(default_factory=dict)
    told: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Seconds per call."""
        return statistics.median(_measured(name, self.samples))

    def ratio(self, name: str, baseline: str) -> Ratio:
        """The median over the rounds of time(name) / time(baseline); above 1 means slower than the baseline."""
        pairs = zip(_measured(name, self.samples), _measured(baseline, self.samples), strict=True)
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        low, high = median_interval(ratios)
        return Ratio(statistics.median(ratios), low, high)

    def peak_bytes(self, name: str) -> int:
        """The largest resident memory of the process (Python, PyTorch and all), in bytes."""
        return _measured(name, self.peaks)


def _measured(name: str, values: Mapping[str, T]) -> T:
    if name not in values:
        raise UsageError(f"'{name}' was not timed; {nearest(name, list(values)) or 'there is: ' + ', '.join(values)}")
    return values[name]


@dataclass(frozen=True)
class InferenceCall:
    """A contestant: one forward pass in eval mode over a random batch, channels-last where it is two-dimensional.

    Args:
        network: a spec, or a module (its class must be importable: not defined in a notebook).
        input_shape: of one input without the batch, such as (3, 32, 32).
        batch: inputs per call: 1 for latency, 32 for throughput.
        num_classes: of the network that ``network`` names, where it is a spec.
    """

    network: str | nn.Module
    input_shape: tuple[int, ...]
    batch: int = 1
    num_classes: int = 1000

    def __call__(self) -> Call:
        """Build the network and its input."""
        import torch

        from excite.memory_format import to_channels_last

        network = self.network
        if isinstance(network, str):
            from excite.create import create

            network = create(network, self.num_classes, self.input_shape[0])
        images = torch.randn(self.batch, *self.input_shape, generator=torch.Generator().manual_seed(0))
        # 3-d convolutions have no channels-last that would pay: such a network stays as it is.
        if images.ndim == 4 and all(parameter.ndim < 5 for parameter in network.parameters()):
            to_channels_last(network)
            images = images.contiguous(memory_format=torch.channels_last)
        network.eval()

        def call() -> object:
            with torch.inference_mode():
                return network(images)

        return call


def time_in_turn(
    contestants: Mapping[str, Build],
    *,
    rounds: int = 15,
    threads: int | None = None,
    cores: Sequence[int] | None = None,
    min_seconds: float = 0.02,
    max_seconds: float = 30.0,
    progress: Callable[[int, int], object] | None = None,
) -> Timings:
    """Time contestants against each other.

    All processes start side by side; then each warms up alone; then in every round each gives one sample: as many
    calls as fill ``min_seconds``, after one that is not counted where a call is shorter than that.

    Args:
        contestants: name → how to build the call. One that is defined in the running script itself needs the
            script to be guarded by ``if __name__ == "__main__":``, as all of Python's multiprocessing does.
        rounds: samples of each contestant.
        threads: CPU threads of each contestant; by default one for each of the cores.
        cores: numbers of the cores that all of them share; by default as many as threads, else all this process may
            use. Ignored where the system cannot pin (macOS, Windows).
        min_seconds: the least length of one sample.
        max_seconds: once six rounds are done, no further one begins after measuring for so long.
        progress: called with (rounds done, ``rounds``) after each round.

    Raises:
        UsageError: a wrong argument, or a contestant that cannot be pickled.
        ExciteError: a contestant failed or its process died; names the contestant.
    """
    timings = time_under_settings(
        contestants,
        {"": None},
        rounds=rounds,
        threads=threads,
        cores=cores,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        progress=progress,
    )
    return timings[""]


def time_under_settings(
    contestants: Mapping[str, Build],
    settings: Mapping[str, Setting | None],
    *,
    rounds: int = 15,
    threads: int | None = None,
    cores: Sequence[int] | None = None,
    min_seconds: float = 0.02,
    max_seconds: float = 30.0,
    progress: Callable[[int, int], object] | None = None,
    one_by_one: bool = False,
    let_fail: bool = False,
    whole_seconds: float | None = None,
) -> dict[str, Timings]:
    """Time contestants against each other under one setting of their processes after the other.

    They are built once. Before the rounds under a setting, every process changes to it and warms up; a setting stays
    in force for those after it.

    Args:
        contestants: as :func:`time_in_turn` takes them, as are ``rounds``, ``threads``, ``cores`` and
            ``min_seconds``.
        settings: name → what changes a process; None leaves it as it is.
        max_seconds: under each setting.
        progress: called with (rounds done, rounds of all settings) after each round.
        one_by_one: build each contestant while the others are suspended or not there yet. It takes longer, and is
            right for those that measure while they are built.
        let_fail: leave out contestants that fail, and say why in ``failures``.
        whole_seconds: with ``let_fail``, what is not built after 70 % of this time counts as failed, and the rounds
            end with it (``max_seconds`` is then ignored); six rounds under each setting are made in any case.

    Returns:
        Name of the setting → what was measured under it. A contestant that failed is in no setting's samples.

    Raises:
        UsageError, ExciteError: as :func:`time_in_turn`; with ``let_fail`` no failure of a contestant.
    """
    if not contestants:
        raise UsageError("There is nothing to time: give at least one contestant.")
    if rounds < FEWEST_ROUNDS:
        raise UsageError(f"{rounds} rounds give no 95 % interval: take at least {FEWEST_ROUNDS}.")
    threads, cores = settle(threads, cores)
    begin = time.perf_counter()
    build_by = None if whole_seconds is None else begin + _SHARE_OF_BUILDING * whole_seconds
    taking_part = _Field(let_fail)
    try:
        for name, build in contestants.items():
            with taking_part.leaving_out(name):
                if build_by is not None and time.perf_counter() > build_by:
                    raise _ContestantError(name, NO_TIME)
                worker = taking_part.workers[name] = _Worker(name, build, threads, cores)
                if one_by_one:
                    worker.wait_until_built(build_by)
        if not one_by_one:
            for name, worker in list(taking_part.workers.items()):
                with taking_part.leaving_out(name):
                    worker.wait_until_built(build_by)
        found: dict[str, dict[str, list[float]]] = {}
        peaks: dict[str, dict[str, tuple[int, int]]] = {}
        for number, (setting, change) in enumerate(settings.items()):
            if whole_seconds is not None:
                left = begin + whole_seconds - time.perf_counter()
                max_seconds = left / (len(settings) - number)
            found[setting] = _rounds(
                taking_part, change, rounds, min_seconds, max_seconds, progress, (number, len(settings))
            )
            peaks[setting] = {name: (one.peak_bytes, one.running_peak) for name, one in taking_part.workers.items()}
        stayed = list(taking_part.workers)
        _dismiss(taking_part.workers.values())
        return {
            setting: Timings(
                {name: tuple(samples[name]) for name in stayed},
                {name: peaks[setting][name][0] for name in stayed},
                {name: peaks[setting][name][1] for name in stayed},
                {name: taking_part.workers[name].told for name in stayed},
                taking_part.failures,
            )
            for setting, samples in found.items()
        }
    finally:
        for worker in taking_part.workers.values():
            worker.kill()


NO_TIME = "no time was left"
"""The failure of a contestant that was not built in time."""


def _rounds(
    contestants: _Field,
    change: Setting | None,
    rounds: int,
    min_seconds: float,
    max_seconds: float,
    progress: Callable[[int, int], object] | None,
    place: tuple[int, int],
) -> dict[str, list[float]]:
    """The samples of all who stay, under one setting, the ``place[0]``-th of ``place[1]``."""
    calls: dict[str, int] = {}
    for name, worker in list(contestants.workers.items()):
        with contestants.leaving_out(name):
            if change is not None:
                worker.change(change)
            calls[name] = _calibrate(worker, min_seconds)
            worker.forget_peak()
    samples: dict[str, list[float]] = {name: [] for name in contestants.workers}
    begin = time.perf_counter()
    for done in range(1, rounds + 1):
        for name, worker in list(contestants.workers.items()):
            with contestants.leaving_out(name):
                samples[name].append(worker.seconds(calls[name]) / calls[name])
        if progress:
            progress(place[0] * rounds + done, place[1] * rounds)
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin > max_seconds:
            break
    return samples


def _dismiss(workers: Collection[_Worker]) -> None:
    """Let processes end by themselves, which tidies up after them; whoever takes its time is left to be killed."""
    for worker in workers:
        worker.let_go()
    until = time.perf_counter() + _SECONDS_TO_END
    for worker in workers:
        worker.process.join(max(0.0, until - time.perf_counter()))


class _ContestantError(ExciteError):
    """A contestant's failure, whose message names it."""

    def __init__(self, name: str, reason: str, when: str = "while it was being built") -> None:
        super().__init__(f"'{name}' failed {when}: {reason}")
        self.reason = reason


class _Field:
    """Those who take part, and those who no longer do."""

    def __init__(self, let_fail: bool) -> None:
        self.let_fail = let_fail
        self.workers: dict[str, _Worker] = {}
        self.failures: dict[str, str] = {}

    @contextlib.contextmanager
    def leaving_out(self, name: str) -> Iterator[None]:
        """Whoever fails within is left out from then on, where that is allowed."""
        try:
            yield
        except _ContestantError as failure:
            if not self.let_fail:
                raise
            self.failures[name] = failure.reason
            if name in self.workers:
                self.workers.pop(name).kill()


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median from the order of the values alone, whatever their distribution.

    The (k+1)-th smallest and largest values enclose the median unless k or fewer of the values fall on one
    side of it, each with probability 1/2: 1 − 2·P(Binomial(n, ½) ≤ k). The largest k that leaves 95 % is taken.

    Args:
        values: independent measurements, at least six; the coverage is then at least 95 %.
    """
    count, ordered = len(values), sorted(values)
    if count < FEWEST_ROUNDS:
        raise ValueError(f"{count} values give no 95 % interval of their median: at least {FEWEST_ROUNDS} do")
    outside, k = 0, -1
    while 2 * (outside + math.comb(count, k + 1)) <= 0.05 * 2**count:
        outside += math.comb(count, k + 1)
        k += 1
    return ordered[k], ordered[count - 1 - k]


class _Worker:
    """The process of one contestant, as its driver sees it: suspended except while it is asked for something."""

    def __init__(self, name: str, build: Build, threads: int, cores: Sequence[int] | None) -> None:
        self.name = name
        self.told: dict[str, Any] = {}
        self.peak_bytes = self.running_peak = 0
        try:
            pickled = pickle.dumps(build)
        except Exception as error:  # pickling runs code of the contestant's classes
            raise UsageError(
                f"'{name}' cannot be sent to a process of its own ({error}): define its classes and functions at the "
                "top level of a module."
            ) from error
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon: a contestant may have processes of its own, such as a DataLoader's.
        self.process = context.Process(target=_work, args=(theirs, pickled, threads, cores), name=f"timing {name}")
        # Python would run the main script again in the new process. Where nothing of it is needed that costs
        # time, and a script without a guard would begin the whole work anew.
        with _main_module_hidden(unless=b"__main__" in pickled or b"__mp_main__" in pickled):
            self.process.start()
        theirs.close()  # so that the death of the process is the end of the connection

    def wait_until_built(self, until: float | None = None) -> None:
        """Wait for the build, to this moment of the performance counter at the longest; then suspend the process."""
        if until is not None and not self.connection.poll(max(0.0, until - time.perf_counter())):
            raise _ContestantError(self.name, NO_TIME)
        self.told = self._answer("while it was being built")
        self._each(_suspend)

    def change(self, setting: Setting) -> None:
        """Have the process call this."""
        self._each(psutil.Process.resume)
        self._ask(pickle.dumps(setting), "when its setting was changed")
        self._each(_suspend)

    def forget_peak(self) -> None:
        """Let ``running_peak`` be that of the calls from now on; ``peak_bytes`` stays."""
        self._each(psutil.Process.resume)
        self.running_peak = int(self._ask(None, "when it was called"))
        self._each(_suspend)

    def seconds(self, calls: int) -> float:
        """The time of so many calls, with one before them if they are several: it warms up the caches."""
        self._each(psutil.Process.resume)
        if calls > 1:
            self._run(1)
        seconds = self._run(calls)
        self._each(_suspend)
        return seconds

    def let_go(self) -> None:
        """Tell the process that nobody will ask it any more."""
        self._each(psutil.Process.resume)
        self.connection.close()

    def kill(self) -> None:
        """End the process and those that it started."""
        self._each(psutil.Process.kill)
        self.process.join()
        self.connection.close()

    def _run(self, calls: int) -> float:
        seconds, peak = self._ask(calls, "when it was called")
        self.running_peak = max(self.running_peak, peak)
        self.peak_bytes = max(self.peak_bytes, peak)
        return float(seconds)

    def _ask(self, message: int | bytes | None, when: str) -> Any:
        with contextlib.suppress(OSError):  # a broken pipe: the answer says why
            self.connection.send(message)
        return self._answer(when)

    def _answer(self, when: str) -> Any:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise _ContestantError(self.name, f"its process {_ending(self.process.exitcode)}.", when) from None
        if isinstance(answer, _Failure):
            raise _ContestantError(self.name, answer.message, when) from RuntimeError(answer.traceback)
        return answer

    def _each(self, action: Callable[[psutil.Process], object]) -> None:
        """Do something to the process and to those that it started; one that has ended is left alone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    action(one)


def _suspend(process: psutil.Process) -> None:
    """Suspend a process, and wait until it stands still: the signal reaches its threads one after the other."""
    process.suspend()
    threads = Path(f"/proc/{process.pid}/task")
    for _ in range(200):
        if not threads.is_dir() or all(map(_stands_still, threads.glob("*/stat"))):
            return
        time.sleep(0.0005)


def _stands_still(stat: Path) -> bool:
    """Whether a thread is stopped (T), traced (t) or gone, by the state that follows its name in parentheses."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True


@dataclass(frozen=True)
class _Failure:
    message: str
    traceback: str


def _calibrate(worker: _Worker, min_seconds: float) -> int:
    """Warm up; then how many calls fill a sample."""
    calls, total = 1, worker.seconds(1)  # the first call may compile, allocate, load: it says little
    while True:
        seconds = worker.seconds(calls)
        total += seconds
        if seconds < min_seconds:
            wanted = math.ceil(1.1 * calls * min_seconds / seconds)
            calls = max(calls + 1, min(wanted, 10 * calls))
        elif total >= _WARM_UP_SECONDS:
            return calls


def _work(connection: Connection, pickled: bytes, threads: int, cores: Sequence[int] | None) -> None:
    """The contestant's process: build, then time as many calls as asked for, until the driver ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver sees to the rest
    try:
        _die_with_driver()
        if cores is not None:
            os.sched_setaffinity(0, cores)
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when PyTorch is imported
            os.environ[variable] = str(threads)
        call = pickle.loads(pickled)()
        if "torch" in sys.modules:  # which may have been imported too early, and takes no more than there are cores
            sys.modules["torch"].set_num_threads(threads)
        connection.send(dict(getattr(call, "told", {})))
        while True:
            message = connection.recv()
            if message is None:
                _forget_peak()
                connection.send(_peak_bytes())
            elif isinstance(message, bytes):
                pickle.loads(message)()
                connection.send(None)
            else:
                begin = time.perf_counter()
                for _ in range(message):
                    call()
                seconds = time.perf_counter() - begin
                connection.send((seconds, _peak_bytes()))
    except BaseException as error:  # a SystemExit of the contestant's is a failure like any other
        message = str(error) if isinstance(error, ExciteError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # the driver is gone: nobody is left to tell
            connection.send(_Failure(message, traceback.format_exc()))


def _die_with_driver() -> None:
    """Have the kernel end this process with the one that started it, however that ends (Linux)."""
    parent = multiprocessing.parent_process()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent.pid:  # it ended before the kernel knew
            sys.exit(1)


def _forget_peak() -> None:
    """Let the peak be what is resident now, where the system can (Linux: proc(5), clear_refs)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    if sys.platform == "linux":
        # Not getrusage: its maximum includes the process that started this one.
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def settle(threads: int | None, cores: Sequence[int] | None) -> tuple[int, list[int] | None]:
    """What :func:`time_in_turn` makes of its arguments: threads, and the cores to pin to (None: the system cannot).

    Raises:
        UsageError: no such number or cores.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}: it takes at least one.")
    if not hasattr(os, "sched_getaffinity"):
        return threads or psutil.cpu_count(logical=False) or 1, None
    usable = sorted(os.sched_getaffinity(0))
    if cores is None:
        cores = usable[:threads]
    elif not cores or not set(cores) <= set(usable):
        raise UsageError(f"cores are {list(cores)}: choose from those that this process may use, {usable}.")
    return threads or min(len(cores), psutil.cpu_count(logical=False) or len(cores)), list(cores)


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        hint = " (the system does so when memory runs out)" if exitcode == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-exitcode).name}{hint}"
    return f"ended by itself with exit code {exitcode}"


@contextlib.contextmanager
def _main_module_hidden(*, unless: bool) -> Iterator[None]:
    main = sys.modules["__main__"]
    if not unless:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main

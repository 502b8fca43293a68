from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from scipy import stats
from torch import nn

from excite.errors import ExciteError, UsageError
from excite.timing import NO_TIME, InferenceCall, Ratio, Timings, median_interval, time_in_turn, time_under_settings
from timing_contestants import Broken, Employer, Hoard, Logged, Restless, Sleep, Surroundings, Talker, change, refuse

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="pinning and parent-death signals are Linux's")


@pytest.fixture(autouse=True)
def _no_worker_stays():
    yield
    left = [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]
    assert left == []


def read(file: Path) -> list[tuple[float, float, int]]:
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()]


def test_contestants_work_in_turn_in_processes_of_their_own(tmp_path):
    timings = time_in_turn({name: Logged(tmp_path, name) for name in "ABC"}, rounds=7)
    logs = {name: read(tmp_path / f"{name}.log") for name in "ABC"}
    assert len({pid for log in logs.values() for *_, pid in log} | {os.getpid()}) == 4
    calls = sorted((begin, end, name) for name, log in logs.items() for begin, end, _ in log)
    assert all(end <= begin for (_, end, _), (begin, *_) in pairwise(calls))
    turns = "".join(name for name, _ in groupby(name for *_, name in calls))
    assert turns == "ABC" + 7 * "ABC"  # once to warm up, then the rounds
    assert all(len(samples) == 7 for samples in timings.samples.values())


def test_a_sample_is_seconds_per_call(tmp_path):
    timings = time_in_turn(
        {"short": Logged(tmp_path, "short", 0.004), "long": Logged(tmp_path, "long", 0.03)}, rounds=6
    )
    for name, seconds in (("short", 0.004), ("long", 0.03)):
        log = read(tmp_path / f"{name}.log")
        # Per call it cannot be less than it sleeps, nor more than from its first call to its last.
        assert seconds <= min(timings.samples[name])
        assert max(timings.samples[name]) < log[-1][1] - log[0][0]
    # 20 ms hold at least one call; those of the shorter contestant come in blocks of several, after an uncounted one.
    assert len(read(tmp_path / "long.log")) < 20 < len(read(tmp_path / "short.log"))
    assert timings.median("short") == np.median(timings.samples["short"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_who_is_not_asked_is_suspended_with_all_its_threads(tmp_path):
    time_in_turn({name: Restless(tmp_path, name) for name in "AB"}, rounds=6)
    for name, other in ("AB", "BA"):
        stamps = np.loadtxt(tmp_path / f"{name}.stamps")
        assert len(stamps) > 10
        for begin, end, _ in read(tmp_path / f"{other}.log"):
            assert not ((stamps > begin) & (stamps < end)).any()


def test_ratio_is_the_median_over_the_rounds():
    # The machine is ten times as slow in two of the seven rounds: medians of the times are torn, ratios are not.
    a = (1.0, 1.1, 10.0, 1.2, 12.0, 1.0, 11.0)
    b = tuple(t * r for t, r in zip(a, (2.0, 2.1, 1.9, 2.2, 2.0, 1.8, 2.3), strict=True))
    timings = Timings({"a": a, "b": b}, {"a": 1, "b": 2})
    ratio = timings.ratio("b", "a")
    assert ratio.value == pytest.approx(2.0)
    assert (ratio.low, ratio.high) == pytest.approx((1.8, 2.3))  # of seven values only the extremes leave 95 %
    assert timings.ratio("a", "b").value == pytest.approx(1 / 2.0)
    assert timings.ratio("a", "a") == Ratio(1.0, 1.0, 1.0)
    assert timings.median("a") == 1.2
    assert timings.peak_bytes("b") == 2
    with pytest.raises(UsageError, match="'c' was not timed"):
        timings.ratio("c", "a")


@pytest.mark.parametrize("count", [6, 7, 8, 9, 15, 16, 25, 51, 200])
def test_the_interval_of_the_median_is_the_narrowest_that_holds_95_percent(count):
    low, high = median_interval(list(range(count))[::-1])
    assert low + high == count - 1
    # The median lies outside when at most `low` values fall on one side of it: a binomial tail on each side.
    assert 1 - 2 * stats.binom.cdf(low, count, 0.5) >= 0.95
    assert 1 - 2 * stats.binom.cdf(low + 1, count, 0.5) < 0.95


def test_the_interval_of_the_median_covers_a_skewed_median():
    draws = np.random.default_rng(0).lognormal(0, 1, size=(4000, 15))  # median 1
    low, high = np.array([median_interval(list(row)) for row in draws]).T
    # Exact for any continuous distribution: 1 − 2·P(Bin(15, ½) ≤ 3) = 96.5 %, ± 0.9 % in 4000 trials.
    assert np.mean((low <= 1) & (high >= 1)) == pytest.approx(1 - 2 * stats.binom.cdf(3, 15, 0.5), abs=0.01)


def test_too_few_values_have_no_interval():
    with pytest.raises(ValueError, match="5 values"):
        median_interval([1.0] * 5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("build", "while it was being built: RuntimeError: no such engine"),
        ("refused", "while it was being built: unknown network 'resent20'"),
        ("build exits", "while it was being built: its process ended by itself with exit code 3"),
        ("call", "when it was called: ZeroDivisionError"),
        ("call exits", "when it was called: its process ended by itself with exit code 4"),
        ("system exit", "when it was called: SystemExit: enough"),
        ("killed", "when it was called: its process was ended by SIGKILL"),
    ],
)
def test_a_failure_names_the_contestant(how, message):
    with pytest.raises(ExciteError) as raised:
        time_in_turn({"good": Sleep(), "bad one": Broken(how)}, rounds=6)
    assert str(raised.value).startswith(f"'bad one' failed {message}")


def test_what_cannot_be_pickled_is_named():
    with pytest.raises(UsageError, match=r"'mine' cannot be sent .* top level of a module"):
        time_in_turn({"good": Sleep(), "mine": lambda: lambda: None})


def test_ctrl_c_leaves_no_process_behind():
    def interrupt(done: int, rounds: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_in_turn({"a": Sleep(), "b": Sleep()}, rounds=6, progress=interrupt)


def test_processes_of_a_contestant_end_with_it(tmp_path):
    time_in_turn({"a": Employer(tmp_path / "pid"), "b": Sleep()}, rounds=6)
    assert ended(int((tmp_path / "pid").read_text()))


def test_progress_and_limit(tmp_path):
    seen: list[tuple[int, int]] = []
    timings = time_in_turn({"a": Sleep()}, rounds=9, max_seconds=0, progress=lambda *args: seen.append(args))
    assert seen == [(i, 9) for i in range(1, 7)]
    assert len(timings.samples["a"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 5}, "5 rounds"),
        ({"threads": 0}, "threads is 0"),
        pytest.param({"cores": [10**6]}, "cores are", marks=linux_only),
        pytest.param({"cores": []}, "cores are", marks=linux_only),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        time_in_turn({"a": Sleep()}, **arguments)
    with pytest.raises(UsageError, match="nothing to time"):
        time_in_turn({})


@linux_only
def test_threads_and_cores(tmp_path):
    last = max(os.sched_getaffinity(0))
    time_in_turn({"a": Surroundings(tmp_path / "a")}, rounds=6, threads=3, cores=[last])
    assert json.loads((tmp_path / "a").read_text()) == {"threads": 3, "omp": "3", "cores": [last]}
    time_in_turn({"a": Surroundings(tmp_path / "a")}, rounds=6, threads=1)
    assert json.loads((tmp_path / "a").read_text()) == {
        "threads": 1,
        "omp": "1",
        "cores": [min(os.sched_getaffinity(0))],
    }


def test_peak_memory_is_the_contestants_own():
    ballast = np.ones(300 * 2**17)  # 300 MiB here, that must not be counted there
    timings = time_in_turn({"small": Sleep(), "large": Hoard(200)}, rounds=6)
    assert ballast.sum() == 300 * 2**17
    assert 5 * 2**20 < timings.peak_bytes("small") < 200 * 2**20
    assert 195 * 2**20 < timings.peak_bytes("large") - timings.peak_bytes("small") < 300 * 2**20


def test_settings_are_timed_one_after_the_other_in_the_same_processes(tmp_path):
    seen: list[tuple[int, int]] = []
    found = time_under_settings(
        {name: Talker(tmp_path / name, build_seconds=0.2) for name in "AB"},
        {"before": None, "after": change},
        rounds=6,
        one_by_one=True,
        progress=lambda *args: seen.append(args),
    )
    assert list(found) == ["before", "after"]
    for name in "AB":
        noted = [word for word, _ in groupby((tmp_path / name).read_text().splitlines())]
        assert noted == ["as it was", "changed"]
        assert [len(found[setting].samples[name]) for setting in found] == [6, 6]
    assert found["before"].samples != found["after"].samples
    assert seen == [(i, 12) for i in range(1, 13)]
    (_, built), (begun, _) = (found["after"].told[name]["built"] for name in "AB")
    assert built <= begun  # one by one


def test_who_fails_is_left_out_with_the_reason(tmp_path):
    contestants = {
        "bad": Broken("build"),
        "good": Sleep(),
        "worse": Broken("killed"),
        "slow": Talker(tmp_path / "x", 60),
    }
    begin = time.monotonic()
    found = time_under_settings(contestants, {"": None}, rounds=6, one_by_one=True, let_fail=True, whole_seconds=4)[
        ""
    ]
    assert time.monotonic() - begin < 30
    assert list(found.samples) == ["good"]
    assert found.failures["bad"] == "RuntimeError: no such engine"
    assert "SIGKILL" in found.failures["worse"]
    assert found.failures["slow"] == NO_TIME
    none_left = time_under_settings({"a": Sleep()}, {"odd": refuse}, rounds=6, let_fail=True)["odd"]
    assert none_left.samples == {}
    assert none_left.failures == {"a": "no such setting"}
    with pytest.raises(ExciteError, match="'a' failed when its setting was changed: no such setting"):
        time_under_settings({"a": Sleep()}, {"odd": refuse}, rounds=6)


@linux_only
def test_the_peak_while_it_runs_is_without_that_of_the_build(tmp_path):
    heavy = Talker(tmp_path / "heavy", mebibytes_while_built=200)
    timings = time_under_settings({"heavy": heavy, "light": Talker(tmp_path / "light")}, {"": None}, rounds=6)[""]
    assert timings.told["heavy"]["ballast"] == 200 * 2**20
    assert timings.peaks["heavy"] - timings.peaks["light"] > 195 * 2**20
    assert abs(timings.running_peaks["heavy"] - timings.running_peaks["light"]) < 30 * 2**20


class Probe(nn.Module):
    """Notes what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.layer(x)


def test_inference_call_is_eval_without_gradients_and_channels_last():
    probe = Probe(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9)))
    statistics = probe.layer[1].running_mean.clone()
    out = InferenceCall(probe, (3, 8, 8), batch=5)()()
    (images,) = probe.seen
    assert images.shape == (5, 3, 8, 8)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert probe.layer[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert 0.8 < images.std() < 1.2
    assert out.is_inference()
    assert torch.equal(probe.layer[1].running_mean, statistics)
    # Batch norm with its first statistics and dropout that is off: nothing but the convolution is left.
    reference = torch.nn.functional.conv2d(images, probe.layer[0].weight, probe.layer[0].bias) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(out, reference)


def test_inference_call_takes_sequences_and_volumes():
    assert InferenceCall(nn.Conv1d(2, 3, 3), (2, 10), batch=4)()().shape == (4, 3, 8)
    assert InferenceCall(nn.Conv3d(1, 3, 3), (1, 5, 6, 7))()().shape == (1, 3, 3, 4, 5)


def test_specs_and_modules_are_timed():
    calls = {
        "spec": InferenceCall("resnet20", (1, 16, 16), num_classes=7),
        "module": InferenceCall(nn.Conv2d(1, 2, 3), (1, 8, 8), batch=2),
    }
    timings = time_in_turn(calls, rounds=6, threads=1)
    assert 0 < timings.median("module") < timings.median("spec")  # 27 MMACs · ¼ against one convolution of 1 kMACs
    with pytest.raises(ExciteError, match=r"'wrong' failed while it was being built: .*resnet2O"):
        time_in_turn({"wrong": InferenceCall("resnet2O", (3, 32, 32))}, threads=1)


def ended(pid: int, patience: float = 10.0) -> bool:
    """Whether a process ends within a while (a zombie has ended; it only waits for init to look)."""
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


SCRIPT = """
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with Ctrl-C ignored
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from timing_contestants import Logged
    from excite.timing import time_in_turn
    print("the script runs", flush=True)
    folder = Path({folder!r})
    timings = time_in_turn({{name: Logged(folder, name) for name in "AB"}}, rounds={rounds})
    print(sorted(timings.samples), flush=True)
"""


def script(tmp_path: Path, rounds: int) -> Path:
    file = tmp_path / "script.py"
    text = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), rounds=rounds)
    file.write_text(textwrap.dedent(text))
    return file


def test_a_script_without_a_guard_runs_once(tmp_path):
    done = subprocess.run(
        [sys.executable, script(tmp_path, 6)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["the script runs", "['A', 'B']"]


@linux_only
@pytest.mark.parametrize("blow", ["kill -9", "Ctrl-C"])
def test_workers_never_outlive_the_driver(tmp_path, blow):
    driver = subprocess.Popen(
        [sys.executable, script(tmp_path, 10**6)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    limit = time.monotonic() + 60
    while not (tmp_path / "B.log").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    workers = {read(tmp_path / f"{name}.log")[0][2] for name in "AB"}
    if blow == "kill -9":
        driver.kill()
    else:
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    error = driver.communicate(timeout=120)[1]
    assert len(workers) == 2
    assert all(ended(pid) for pid in workers)
    if blow == "Ctrl-C":
        assert "in _work" not in error  # the driver has a traceback to tell, the workers have none
        assert error.rstrip().endswith("KeyboardInterrupt")

"""How processes know of each other, and of the run that they were started anew for."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from excite.errors import UsageError
from excite.processes import Processes, check_apart, join_slurm, started_together
from excite.training.distributed_launch import claim, goes_on, launch
from excite.training.fit import check_devices, fit
from excite.training.recipe import load

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[017,019]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        # Set before it is removed, so that what a test leaves behind goes, too.
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)


def _set(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for key, value in values.items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("gpu[017,019]", "gpu017"),
        ("gpu[017-019,23],cpu1", "gpu017"),
        ("node1,node2", "node1"),
        ("a-b[3-4]-ib", "a-b3-ib"),
    ],
)
def test_slurm_says_who_takes_part(monkeypatch: pytest.MonkeyPatch, names: str, first: str) -> None:
    import os

    _set(monkeypatch, **SRUN | {"SLURM_STEP_NODELIST": names})
    join_slurm()
    assert started_together()
    found = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert os.environ["MASTER_ADDR"] == first
    assert 15000 <= int(os.environ["MASTER_PORT"]) < 25000


def test_slurm_with_more_processes_on_some_machines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, **SRUN | {"SLURM_STEP_NUM_TASKS": "7"})
    with pytest.raises(UsageError, match="as many on each"):
        join_slurm()


def _torchrun(monkeypatch: pytest.MonkeyPatch, run: str, count: int) -> None:
    _set(monkeypatch, TORCHELASTIC_RUN_ID=run, TORCHELASTIC_MAX_RESTARTS="3", TORCHELASTIC_RESTART_COUNT=str(count))


def test_only_a_process_of_the_same_launch_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _torchrun(monkeypatch, "one", 0)
    claim(tmp_path)
    assert not goes_on(tmp_path), "a first start goes on with nothing"
    _torchrun(monkeypatch, "one", 1)
    assert goes_on(tmp_path)
    _torchrun(monkeypatch, "two", 1)
    assert not goes_on(tmp_path)
    # A launch without a name is known by the process that started this one.
    _torchrun(monkeypatch, "none", 0)
    claim(tmp_path)
    _torchrun(monkeypatch, "none", 2)
    assert goes_on(tmp_path)
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert not goes_on(tmp_path)


def test_a_requeued_job_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _set(monkeypatch, SLURM_JOB_ID="4711")
    claim(tmp_path)
    _set(monkeypatch, SLURM_RESTART_COUNT="1")
    assert goes_on(tmp_path)
    _set(monkeypatch, SLURM_JOB_ID="4712")
    assert not goes_on(tmp_path)


def test_where_processes_are_started_again_the_folder_has_to_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    _torchrun(monkeypatch, "one", 0)
    with pytest.raises(UsageError, match="--out"):
        fit(load("digits"))


def test_more_devices_than_there_are_are_refused() -> None:
    check_devices("cpu", 64)
    with pytest.raises(UsageError, match="name their type alone"):
        check_devices("cpu:0", 2)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--nodes", "2"], {}, "--rendezvous"),
        (["--devices", "3"], {"RANK": "0", "WORLD_SIZE": "2"}, "asks for 3 processes, but 2 run"),
    ],
)
def test_the_command_says_what_is_missing(arguments: list[str], environment: dict[str, str], said: str) -> None:
    import os

    done = subprocess.run(
        [sys.executable, "-m", "excite", "train", "digits", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("excite:") == 1


def test_a_launch_ends_as_its_processes_do(tmp_path: Path) -> None:
    program = "import os, sys; sys.exit(int(sys.argv[1]) if os.environ['RANK'] == '1' else 0)"
    command: list[Any] = [sys.executable, "-c", program]
    assert launch([*command, "0"], devices=2) == 0
    assert launch([*command, "2"], devices=2) == 2


@pytest.mark.parametrize(
    ("gpus", "said"), [(["a", "a"], "2 processes on 1 GPU:"), (["a", "b", "a"], "3 processes on 2 GPUs:")]
)
def test_processes_that_would_share_a_gpu_are_refused(monkeypatch, gpus, said) -> None:
    node = platform.node()
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=gpus[0]))
    group = Processes(0, len(gpus))
    monkeypatch.setattr(Processes, "everyones", lambda self, part: [part, *((node, gpu) for gpu in gpus[1:])])
    with pytest.raises(UsageError, match=said):
        check_apart(group, torch.device("cuda", 0))
    check_apart(group, torch.device("cpu"))
    # GPUs of the same number in two machines are two.
    monkeypatch.setattr(
        Processes, "everyones", lambda self, part: [part, *((f"{i}", part[1]) for i in range(len(gpus) - 1))]
    )
    check_apart(group, torch.device("cuda", 0))

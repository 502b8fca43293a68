"""Processes that are lost, machines that are taken away, disks that are full: what a run makes of them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from excite.errors import ExciteError
from excite.training import checkpoint
from excite.training.fit import fit
from excite.training.recipe import Recipe, load
from excite.training.recipe_data import load_recipe_data

EPOCH_STEPS = 8
"""Of three quarters of the images."""


def small(**changes: Any) -> Recipe:
    """1,348 images in batches of 128, the last of which has 68."""
    return load("digits").replace(
        {
            "network": "resnet20:width=0.25+se",
            "trainer.epochs": 2,
            "trainer.batch_size": 128,
            "trainer.threads": 1,
            "trainer.checkpoint_steps": 4,
            "trainer.device": "cpu",
        }
        | changes
    )


WORKER = """
import os, signal, sys
from excite.training.callbacks import Record
folder, killed_at, told_at, log = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
end = Record.on_train_batch_end
def counted(self, trainer, module, outputs, batch, number):
    step = self.position.step
    with open(f"{log}-{attempt}-{rank}", "a") as file:
        print(step, *[int(i) for part in batch[0] for i in part[2]], file=file)
    if rank == "1" and attempt == "0" and step == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "1" and step == told_at:
        os.kill(os.getpid(), signal.SIGTERM)
    end(self, trainer, module, outputs, batch, number)
Record.on_train_batch_end = counted
sys.argv = ["excite", "train", folder + ".yaml", "--out", folder]
from excite.cli import main
main()
"""


def torchrun(
    folder: Path, *, killed_at: int = -1, told_at: int = -1, restarts: int = 1
) -> subprocess.CompletedProcess[str]:
    """Two processes that train by ``folder.yaml``, of which one is killed or told to end at some step."""
    script = folder.parent / "worker.py"
    script.write_text(WORKER)
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={restarts}",
    ]
    told = [str(folder), str(killed_at), str(told_at), str(folder.parent / f"{folder.name}-log")]
    return subprocess.run([*start, str(script), *told], capture_output=True, text=True, timeout=1200, check=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def seen(folder: Path, attempt: int, rank: int) -> dict[int, list[int]]:
    """The samples of each step."""
    path = folder.parent / f"{folder.name}-log-{attempt}-{rank}"
    rows = [[int(word) for word in line.split()] for line in path.read_text().splitlines()] if path.exists() else []
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "run"
    small(**{"data.val_fraction": 0.25, "trainer.ema_decay": 0.9}).write(Path(f"{folder}.yaml"))
    done = torchrun(folder, killed_at=6)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_lost_process_is_started_again_from_the_checkpoint_and_nothing_is_seen_twice(killed: Path) -> None:
    first, second = ([seen(killed, attempt, rank) for rank in range(2)] for attempt in range(2))
    assert max(first[1]) == 6
    # From the checkpoint of step 4 on, and every sample of the epoch once in what counts.
    assert min(second[0]) == min(second[1]) == 4
    counted = [first if step < 4 else second for step in range(EPOCH_STEPS)]
    epoch = [index for step, source in enumerate(counted) for one in source for index in one[step]]
    train = load_recipe_data(load(f"{killed}.yaml")).train
    assert train is not None
    assert sorted(epoch) == list(range(len(train)))
    for step in (4, 5):
        assert [one[step] for one in first] == [one[step] for one in second]


def test_a_lost_process_changes_nothing_in_the_result(killed: Path, tmp_path: Path) -> None:
    # One that was never disturbed, from the first step to the last, by the command that starts its own processes.
    folder = tmp_path / "run"
    done = command(f"{killed}.yaml", "--devices", "2", "--json", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["run"] == str(folder)
    assert result["count"] > 0
    assert done.stderr.count("waiting for data") == 1, done.stderr
    ours, theirs = weights(killed), weights(folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # And close to what one process makes of it, to which how sums are divided is all the difference.
    alone = fit(load(f"{killed}.yaml"), tmp_path / "alone")
    for name in ("train_loss", "val_loss"):
        assert alone.metrics()[name] == pytest.approx(_column(folder, name), rel=0.02), name
    assert alone.metrics()["step"] == _column(folder, "step")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``excite train``."""
    start = [sys.executable, "-m", "excite", "train", *arguments]
    return subprocess.run(start, capture_output=True, text=True, timeout=1200, check=False)


def _column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def test_a_machine_that_is_taken_away_leaves_a_run_that_one_process_goes_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    small(**{"trainer.checkpoint_steps": 100}).write(Path(f"{folder}.yaml"))
    done = torchrun(folder, told_at=5, restarts=0)
    assert done.returncode != 0
    # Of two processes only one was told to stop: both did, at the same step, and one of them says so.
    assert done.stderr.count("excite: Stopped at step") == 1
    assert not (folder / "model.json").exists()
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None
    step = saved["position"]["step"]
    assert 6 <= step <= 8
    run = fit(small(), folder, resume=True)
    assert run.finished
    assert run.metrics()["step"] == [11, 22]


@pytest.mark.slow
def test_a_taken_folder_is_refused_even_where_processes_are_started_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(small(**{"trainer.epochs": 1}), folder)
    (folder / "model.json").unlink()
    before = (folder / "metrics.csv").read_bytes()
    small().write(Path(f"{folder}.yaml"))
    done = torchrun(folder)
    assert done.returncode != 0
    assert "already holds a run" in done.stderr
    assert not (folder / "model.json").exists()
    assert (folder / "metrics.csv").read_bytes() == before


@pytest.mark.slow
def test_the_command_says_once_what_its_processes_refuse(tmp_path: Path) -> None:
    fit(small(**{"trainer.epochs": 1}), tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    done = command("digits", "--devices", "2", "--restarts", "1", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.count("already holds a run") == 1, "before anything is started"
    assert done.stderr.count("excite:") == 1, done.stderr
    # What only the processes find is told by one of them, each time that they are started.
    done = command("digits", "--devices", "2", "--restarts", "1", "--set", "trainer.batch_size=63")
    assert done.returncode == 2
    assert done.stderr.count("take 62 or 64") == 2, done.stderr
    assert done.stderr.count("excite:") == 2, done.stderr
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


START = """
import sys
from excite.training.callbacks import Record
end = Record.on_train_batch_end
def told(self, *rest):
    end(self, *rest)
    print(self.position.step, flush=True)
    import time
    time.sleep(0.05)
Record.on_train_batch_end = told
sys.argv = ["excite", "train", sys.argv[1] + ".yaml", "--out", sys.argv[1]]
from excite.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_one_process_that_is_told_to_end_saves_first(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    small(**{"trainer.checkpoint_steps": 100}).write(Path(f"{folder}.yaml"))
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 3:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert errors.count("Stopped at step") == 1
    assert "Traceback" not in errors
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None
    assert 3 <= saved["position"]["step"] <= 6


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    save = checkpoint.save

    def full(folder: Path, step: int, state: Any, keep: int) -> Path:
        if step < 8:
            return save(folder, step, state, keep)

        def refuse(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", refuse)
        try:
            return save(folder, step, state, keep)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(ExciteError, match=r"disk is full.*step-8"):
        fit(small(), tmp_path / "run")
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved["position"]["step"] == 4
    assert fit(small(), tmp_path / "run", resume=True).finished

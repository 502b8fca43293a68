from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from excite.errors import ExciteError, UsageError
from excite.training import checkpoint
from excite.training.fit import fit
from excite.training.recipe import Recipe, load
from excite.training.recipe_data import load_recipe_data
from excite.training.run import Run

SMALL = {
    "network": "resnet20:width=0.25+se",
    "trainer.epochs": 2,
    "trainer.batch_size": 128,
    "trainer.checkpoint_steps": 4,
    "trainer.threads": 1,
    "trainer.keep_checkpoints": 2,
}


def small(**changes) -> Recipe:
    return load("digits").replace(SMALL | changes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run.folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def repeatable_columns(run: Run) -> dict[str, list[float]]:
    """What metrics.csv says, less what a clock said."""
    clock = {"seconds", "images_per_second", "data_share"}
    return {name: column for name, column in run.metrics().items() if name not in clock}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Run:
    return fit(small(**{"trainer.ema_decay": 0.9}), tmp_path_factory.mktemp("reference") / "run")


def test_a_run_folder_holds_what_the_design_says(reference) -> None:
    recipe = reference.recipe
    assert recipe.trainer.threads == 1
    assert recipe.trainer.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert recipe.augment.crop is not None, "the data's augmentation is written in"
    steps = {path.name for path in (reference.folder / "checkpoints").iterdir()}
    assert len(steps) == 4, "two checkpoints with their checksums"
    card = reference.card
    assert card["spec"] == "resnet20:width=0.25+se"
    assert card["classes"] == list("0123456789")
    assert card["weights"] == "ema"
    assert {"excite", "torch"} <= card["versions"].keys()
    with (reference.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])


def test_the_same_seed_gives_the_same_weights_bit_for_bit(reference, tmp_path) -> None:
    again = fit(small(**{"trainer.ema_decay": 0.9}), tmp_path / "again")
    assert same(weights(again), weights(reference))
    assert repeatable_columns(again) == repeatable_columns(reference)
    other = fit(small(**{"trainer.ema_decay": 0.9, "seed": 1}), tmp_path / "other")
    assert not same(weights(other), weights(reference))


def test_the_trained_network_comes_back_as_it_was(reference) -> None:
    trained = reference.load()
    assert not trained.network.training
    state = trained.network.state_dict()
    assert same(dict(state), weights(reference))


START = """
import sys
from excite.training.fit import fit
from excite.training.recipe import load
from excite.training.callbacks import Record
folder, sleep = sys.argv[1], float(sys.argv[2])
if sleep:
    import time
    step = Record.on_train_batch_end
    def slow(self, *rest):
        step(self, *rest)
        print(self.position.step, flush=True)
        time.sleep(sleep)
    Record.on_train_batch_end = slow
fit(load(folder + ".yaml"), folder, resume=True)
"""


@pytest.mark.parametrize("kill_at", [1, 6, 11, 15])
def test_killed_at_any_moment_and_resumed_it_ends_in_the_same_weights(reference, tmp_path, kill_at) -> None:
    folder = tmp_path / "run"
    small(**{"trainer.ema_decay": 0.9}).write(Path(f"{folder}.yaml"))
    process = subprocess.Popen([sys.executable, "-c", START, str(folder), "0.03"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= kill_at:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    run = Run(folder)
    assert not run.finished
    # What a broken run leaves may also hold half a temporary file and rows that no checkpoint knows.
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / ".step-99.ckpt.1.tmp").write_bytes(b"half")
    with (folder / "metrics.csv").open("a") as file:
        file.write("3,99,0.1,0,0,0,0,0\n")
    fit(small(), folder, resume=True)
    assert same(weights(run), weights(reference))
    assert repeatable_columns(run) == repeatable_columns(reference)


def test_ctrl_c_stops_at_a_checkpoint_and_the_run_goes_on(reference, tmp_path) -> None:
    folder = tmp_path / "run"
    small(**{"trainer.ema_decay": 0.9}).write(Path(f"{folder}.yaml"))
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(folder), "0.03"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 6:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Stopped at step" in errors
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None
    assert 6 <= saved["position"]["step"] <= 9
    assert same(weights(fit(small(), folder, resume=True)), weights(reference))


def test_a_finished_run_is_given_back_and_a_taken_folder_is_refused(reference) -> None:
    before = (reference.folder / "model.json").stat().st_mtime_ns
    assert fit(small(), reference.folder, resume=True).finished
    assert (reference.folder / "model.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="already holds a run"):
        fit(small(), reference.folder)


def test_a_loss_that_is_not_a_number_ends_the_run_with_the_last_good_checkpoint(tmp_path) -> None:
    recipe = small(**{"optimizer.lr": 1e12, "trainer.checkpoint_steps": 1, "schedule.name": "constant"})
    with pytest.raises(ExciteError, match=r"(loss became|no longer finite).*last good checkpoint"):
        fit(recipe, tmp_path / "run")
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    if saved is not None:
        assert all(v.isfinite().all() for v in saved["network"].values() if v.is_floating_point())
    assert not Run(tmp_path / "run").finished


def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(reference, tmp_path, monkeypatch) -> None:
    synced = []
    real = os.fsync

    def full_after_ten(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_ten)
    with pytest.raises(ExciteError, match="disk is full"):
        fit(small(**{"trainer.ema_decay": 0.9}), tmp_path / "run")
    monkeypatch.undo()
    run = fit(small(), tmp_path / "run", resume=True)
    assert same(weights(run), weights(reference))


def test_a_head_of_another_size_is_refused_before_training(tmp_path) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))
    with pytest.raises(UsageError, match=r"\(1, 7\).*10 classes"):
        fit(small(), tmp_path / "run", network=network)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_module_of_ones_own_is_trained_and_loaded(tmp_path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )

    run = fit(small(**{"trainer.epochs": 1}), tmp_path / "run", network=build())
    assert run.card["spec"] is None
    with pytest.raises(UsageError, match="pass one"):
        run.load()
    assert same(dict(run.load(build()).network.state_dict()), weights(run))


def test_validation_scores_stand_in_the_metrics(tmp_path) -> None:
    run = fit(small(**{"trainer.epochs": 1, "data.val_fraction": 0.2}), tmp_path / "run")
    metrics = run.metrics()
    assert 0 <= metrics["val_top1"][0] <= 100
    assert metrics["val_loss"][0] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer.precision": "bf16"},
        {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "schedule.name": "cosine", "schedule.warmup_epochs": 0.5},
        {"augment.mixup": 0.2, "augment.cutmix": 1.0, "augment.randaugment": 2, "augment.erasing": 0.5},
        {"task.label_smoothing": 0.1, "task.class_weights": "balanced", "trainer.clip": 1.0},
        {"trainer.channels_last": False, "schedule.name": "step"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_trains(tmp_path, changes) -> None:
    run = fit(small(**{"trainer.epochs": 1} | changes), tmp_path / "run")
    assert run.finished
    assert run.metrics()["train_loss"][0] < 5


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    from excite.tasks.classification import options

    data = load_recipe_data(small())
    assert data.train is not None
    ours = options(small(**{"task.class_weights": "balanced"}).task.model_dump(), data)["class_weights"]
    labels = data.train.labels.numpy()
    assert ours is not None
    assert ours.tolist() == pytest.approx(compute_class_weight("balanced", classes=np.arange(10), y=labels).tolist())


def test_minutes_become_epochs_in_the_recipe(tmp_path) -> None:
    run = fit(small(**{"trainer.minutes": 0.02}), tmp_path / "run")
    assert run.recipe.trainer.minutes is None
    assert len(run.metrics()["epoch"]) == run.recipe.trainer.epochs


def test_an_unknown_device_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="'tpu9'"):
        fit(small(**{"trainer.device": "tpu9"}), tmp_path / "run")


def test_a_missing_logger_names_its_extra(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    if "wandb" in sys.modules:
        pytest.skip("wandb is installed")
    with pytest.raises(UsageError, match=r"excite\[wandb\]"):
        fit(small(**{"trainer.loggers": ["wandb"]}), tmp_path / "run")


def test_tensorboard_receives_the_metrics(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    run = fit(small(**{"trainer.epochs": 1, "trainer.loggers": ["tensorboard"]}), tmp_path / "run")
    assert list(run.folder.rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_compiled_training_gives_a_network_of_the_same_names(tmp_path) -> None:
    started = time.monotonic()
    run = fit(small(**{"trainer.epochs": 1, "trainer.compile": True}), tmp_path / "run")
    assert run.load().network is not None
    assert time.monotonic() > started


@pytest.mark.parametrize("changes", [{}, {"trainer.micro_batch": 50}, {"augment.mixup": 0.2}])
def test_images_that_stay_bytes_until_they_are_on_the_device_train_alike(tmp_path, monkeypatch, changes) -> None:
    """As for a GPU, with the processor as the device."""
    quick = {"trainer.epochs": 1, "data.val_fraction": 0.2, "trainer.compile": False}
    usual = fit(small(**quick, **changes), tmp_path / "usual")
    monkeypatch.setattr("excite.training.recipe_data.stay_bytes", lambda device: True)
    assert same(weights(fit(small(**quick, **changes), tmp_path / "late")), weights(usual))

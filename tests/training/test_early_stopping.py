from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from excite.data import Loader
from excite.errors import UsageError
from excite.tasks.classification import evaluation, outputs
from excite.training.fit import fit
from excite.training.recipe import Recipe, load
from excite.training.recipe_data import load_recipe_data
from excite.training.run import Run


def wild(**changes) -> Recipe:
    """A run whose validation score goes up and down, because its rate is too high."""
    settings = {
        "network": "resnet20:width=0.25",
        "data.val_fraction": 0.2,
        "optimizer.lr": 0.8,
        "schedule.name": "constant",
        "trainer.epochs": 12,
        "trainer.patience": 2,
        "trainer.batch_size": 128,
        "trainer.threads": 1,
    }
    return load("digits").replace(settings | changes)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Run:
    return fit(wild(), tmp_path_factory.mktemp("stopped") / "run")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run.folder / "model.safetensors")


def test_a_run_ends_when_its_patience_does_and_keeps_the_best_weights(stopped: Run) -> None:
    scores = stopped.metrics()["val_top1"]
    best = scores.index(max(scores))
    assert len(scores) < 12, "this run is to stop early"
    assert len(scores) == best + 1 + 2, "two epochs without a better score"
    assert stopped.card["weights"] == "best"
    assert stopped.card["epochs"] == len(scores)

    data = load_recipe_data(stopped.recipe)
    assert data.val is not None
    scored = evaluation(*outputs(stopped.load().network, Loader(data.val, data.preprocessing, 256, seed=0)))
    assert scored.metrics["top1"] == pytest.approx(scores[best])


def test_broken_off_and_resumed_it_ends_at_the_same_place(stopped: Run, tmp_path: Path, monkeypatch) -> None:
    from excite.training import callbacks

    count = 0
    see = callbacks.Best.see

    def interrupted(self, epoch, scores) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        see(self, epoch, scores)

    monkeypatch.setattr(callbacks.Best, "see", interrupted)
    recipe = wild(**{"trainer.checkpoint_steps": 3})
    with pytest.raises(BaseException):  # noqa: B017, PT011  # Lightning turns the interruption into an exit
        fit(recipe, tmp_path / "run")
    monkeypatch.setattr(callbacks.Best, "see", see)
    resumed = fit(recipe, tmp_path / "run", resume=True)
    assert resumed.metrics()["val_top1"] == stopped.metrics()["val_top1"]
    mine, theirs = weights(resumed), weights(stopped)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_stopped_but_not_written_it_is_not_trained_further(stopped: Run, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(stopped.folder, copy)
    for name in ("model.json", "model.safetensors"):
        (copy / name).unlink()
    again = fit(wild(), copy, resume=True)
    assert len(again.metrics()["val_top1"]) == len(stopped.metrics()["val_top1"])
    assert all(torch.equal(value, weights(stopped)[name]) for name, value in weights(again).items())


def test_patience_needs_a_validation_split(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trainer\.patience.* data\.val_fraction"):
        fit(wild(**{"data.val_fraction": 0.0}), tmp_path / "run")

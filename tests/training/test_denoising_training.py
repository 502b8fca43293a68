from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from excite.data.denoising import load_denoising
from excite.errors import UsageError
from excite.tasks.denoising import score
from excite.training.fit import fit
from excite.training.optimization import rate_factor
from excite.training.recipe import Recipe, Schedule, load
from excite.training.run import Run

TINY = "dncnn_s:depth=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve smooth pictures, of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        rows, cols = np.mgrid[: 48 + number, : 60 - number] / (5 + number)
        values = (127 + 120 * np.sin(rows + number) * np.cos(0.7 * cols)).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{number:02d}.png")
    return folder


def tiny(folder: Path, **changes) -> Recipe:
    settings = {
        "data": {"path": f"denoising:{folder}", "degradation": "gaussian:50", "patch": 24, "patches": 512},
        "network": TINY,
        "trainer.epochs": 8,
        "optimizer.lr": 3e-3,
        "trainer.batch_size": 16,
        "trainer.precision": "fp32",
        "trainer.threads": 1,
    }
    return load("dncnn-s-25").replace(settings | changes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run.folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Run:
    return fit(tiny(folder, **{"data.val_fraction": 0.2}), tmp_path_factory.mktemp("trained") / "run")


def test_a_small_network_learns_to_denoise(trained: Run, folder: Path) -> None:
    columns = trained.metrics()
    assert {"train_loss", "train_psnr", "val_psnr", "val_ssim"} <= set(columns)
    assert columns["train_loss"][-1] < 0.3 * columns["train_loss"][0]
    data = load_denoising(f"denoising:{folder}", degradation="gaussian:50", patch=24)
    assert data.test is not None
    scored = score(trained.load().network, data.test, None)
    print(scored.metrics, np.mean(scored.details["noisy_psnr"]))
    assert scored.metrics["psnr"] > np.mean(scored.details["noisy_psnr"]) + 5


def test_the_recipe_and_the_card_say_what_was_chosen(trained: Run, folder: Path) -> None:
    recipe, card = trained.recipe, trained.card
    assert (recipe.data.channels, recipe.data.scales, recipe.data.noise_seed) == (1, (1, 0.9, 0.8, 0.7), 0)
    assert (recipe.data.quantised, recipe.data.patches, recipe.data.patch) == (False, 512, 24)
    assert (card["task"], card["classes"], card["in_channels"]) == ("denoising", [], 1)
    assert card["degradation"] == "gaussian:50"


def test_broken_off_and_resumed_the_weights_are_the_same(trained: Run, folder: Path, tmp_path, monkeypatch) -> None:
    from excite.training import callbacks

    recipe = tiny(folder, **{"data.val_fraction": 0.2, "trainer.checkpoint_steps": 7})
    before = callbacks.Record.save
    count = 0

    def save(self) -> None:
        nonlocal count
        before(self)
        count += 1
        if count == 4:
            raise RuntimeError("cut off")

    monkeypatch.setattr(callbacks.Record, "save", save)
    with pytest.raises(RuntimeError, match="cut off"):
        fit(recipe, tmp_path / "run")
    monkeypatch.setattr(callbacks.Record, "save", before)
    run = fit(recipe, tmp_path / "run", resume=True)
    ours, theirs = weights(run), weights(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert run.metrics()["train_psnr"] == trained.metrics()["train_psnr"]


def test_minutes_become_ten_epochs_of_as_many_patches_as_there_is_time_for(folder: Path, tmp_path) -> None:
    run = fit(tiny(folder, **{"trainer.minutes": 0.02, "data.patches": 100_000}), tmp_path / "run")
    assert run.recipe.trainer.epochs >= 10
    assert run.recipe.data.patches < 100_000
    assert len(run.metrics()["epoch"]) == run.recipe.trainer.epochs


def test_what_is_not_of_denoising_is_refused(folder: Path, tmp_path) -> None:
    for changes, message in (
        ({"augment.flip": 0.5}, r"augment\.flip.*always turned and mirrored"),
        ({"task.label_smoothing": 0.1}, r"task\.label_smoothing"),
        ({"network": "resnet20"}, r"output \(1, 1000\).*same shape"),
        ({"data.mean": (0.5,)}, r"data\.mean.*has none"),
        ({"data.window": 9}, r"data\.window.*hyperspectral"),
    ):
        with pytest.raises(UsageError, match=message):
            fit(tiny(folder, **changes), tmp_path / "run")
    with pytest.raises(UsageError, match=r"data\.degradation.*for denoising, and 'digits' is not"):
        fit(load("digits").replace({"data.degradation": "gaussian:25"}), tmp_path / "run")


def test_the_rate_falls_exponentially_to_a_thousandth() -> None:
    schedule = Schedule(name="exponential", final=1e-3)
    assert rate_factor(schedule, 0, 100, 10) == 1
    assert rate_factor(schedule, 50, 100, 10) == pytest.approx(1e-3**0.5)
    assert rate_factor(schedule, 99, 100, 10) == pytest.approx(1e-3, rel=0.08)


@pytest.mark.parametrize("name", ["dncnn-s-25", "dncnn-b", "dncnn-color-b", "dncnn-3"])
def test_the_papers_recipes_train(name: str, folder: Path, tmp_path) -> None:
    changes = {"data.path": f"denoising:{folder}", "data.patch": 20, "data.patches": 8}
    changes |= {"trainer.epochs": 1, "trainer.batch_size": 4, "trainer.threads": 1, "trainer.precision": "fp32"}
    run = fit(load(name).replace(changes), tmp_path / "run")
    assert run.card["in_channels"] == (3 if "color" in name else 1)
    depths = {"dncnn_s": 17, "dncnn_b": 20, "dncnn_color": 20, "dncnn_3": 20}
    assert run.load().network.depth == depths[run.card["spec"]]

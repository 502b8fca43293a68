from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from excite.training import checkpoint
from excite.training.fit import fit
from excite.training.recipe import load


@pytest.mark.parametrize("frozen", [0, 1])
def test_in_the_last_epochs_batch_norm_keeps_its_statistics_and_learns_on(tmp_path: Path, frozen: int) -> None:
    changes = {
        "network": "resnet20:width=0.25",
        "data.val_fraction": 0.25,  # scoring in between changes the mode
        "trainer.epochs": 2,
        "trainer.threads": 1,
        "trainer.device": "cpu",
        "trainer.frozen_norm_epochs": frozen,
        "trainer.keep_checkpoints": 9,
    }
    run = fit(load("digits").replace(changes), tmp_path / "run")
    steps = int(run.metrics()["step"][0])
    for path in (run.folder / "checkpoints").glob("step-*"):
        if not path.name.startswith(f"step-{steps}."):
            path.unlink()
    state = checkpoint.load_newest(run.folder / "checkpoints")
    assert state is not None
    before, after = state["network"], safetensors.torch.load_file(run.folder / "model.safetensors")
    statistics = [name for name in before if "running" in name or "num_batches" in name]
    learned = [name for name in before if name not in statistics]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics) == bool(frozen)
    assert not any(torch.equal(before[name], after[name]) for name in learned)
    # With these statistics, and no others, the weights that come out of the last steps are good ones.
    assert run.metrics()["val_loss"][1] < run.metrics()["val_loss"][0]

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from excite.create import create
from excite.data import load_data
from excite.errors import ExciteError, UsageError
from excite.verbs.evaluate import evaluate
from excite.verbs.scores import scores_on_test


def test_the_published_resnet20_scores_what_it_must(shared_data) -> None:
    command = [sys.executable, "-m", "excite", "evaluate", "resnet20", "--json"]
    command += ["--weights", str(shared_data / "resnet20-cifar10-published.th")]
    command += ["--data", str(shared_data / "cifar10-jpeg-test.tar")]
    command += ["--mean", ".485,.456,.406", "--std", ".229,.224,.225"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["count"] == 10_000
    assert result["metrics"]["top1"] == pytest.approx(81.03, abs=0.05)
    assert set(result["metrics"]) == {"top1", "top5", "loss"}


def test_a_run_is_scored_as_the_comparison_scores_it(run) -> None:
    data = load_data("digits")
    scores = scores_on_test(run, data, None)
    result = evaluate(run.folder, "digits", per_class=True)
    assert result["count"] == len(scores)
    assert result["metrics"]["top1"] == pytest.approx(100 * scores.mean())
    confusion = np.array(result["confusion"])
    assert data.test is not None
    assert confusion.sum(1).tolist() == torch.bincount(data.test.labels, minlength=10).tolist()
    assert result["per_class"] == pytest.approx((100 * confusion.diagonal() / confusion.sum(1)).tolist())
    assert run.test_metrics()["top1"] == pytest.approx(result["metrics"]["top1"])


def test_scores_are_computed_anew_for_other_images_and_weights(run) -> None:
    first = scores_on_test(run, load_data("digits"), None)
    kept = (run.folder / "test.safetensors").stat().st_mtime_ns
    assert np.array_equal(scores_on_test(run, load_data("digits"), None), first)
    assert (run.folder / "test.safetensors").stat().st_mtime_ns == kept
    fewer = load_data("digits", val_fraction=0.1)
    assert len(scores_on_test(run, fewer, None)) == len(first), (
        "the test digits do not depend on the validation split"
    )


def test_a_module_of_ones_own_is_scored() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    assert 0 <= evaluate(network, "digits")["metrics"]["top1"] <= 40


def test_more_classes_than_the_network_knows_are_refused() -> None:
    with pytest.raises(UsageError, match="knows 4 classes"):
        evaluate(create("resnet20:width=0.25", 4), "digits")


def test_a_damaged_model_is_told(run, tmp_path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ExciteError, match="damaged"):
        evaluate(copy, "digits")
    (copy / "model.json").unlink()
    with pytest.raises(UsageError, match="not finished"):
        evaluate(copy, "digits")

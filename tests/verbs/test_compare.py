from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from quick import quick
from torch import nn
from torch.utils.data import TensorDataset

from excite.data import Loader, from_datasets, load_data
from excite.errors import ExciteError, UsageError
from excite.training.fit import fit
from excite.training.run import Run
from excite.verbs.compare import compare, verdict

SPECS = ["resnet20:width=0.25", "resnet20:width=0.25+se"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("compare") / "out"
    return folder, compare(SPECS, seeds=3, recipe=quick(), out=folder)


def test_the_result_keeps_its_contract(finished) -> None:
    folder, result = finished
    written = json.loads((folder / "compare.json").read_text())
    assert written == {key: value for key, value in result.items() if key != "folder"}
    assert written["data"] == "digits"
    assert written["seeds"] == [0, 1, 2]
    assert written["metric"] == {"name": "top1", "unit": "%", "higher_is_better": True}
    assert written["baseline"] == SPECS[0]
    assert isinstance(written["verdict"], str)
    keys = {"spec", "score", "score_ci95", "difference", "difference_ci95", "parameters", "macs", "latency_ms"}
    keys |= {"throughput", "train_seconds", "runs"}
    for entry in written["results"]:
        assert keys <= entry.keys()
        assert all((folder / path / "model.json").is_file() for path in entry["runs"])
        assert entry["latency_ms"] > 0
        assert entry["throughput"] > 0
    first, second = written["results"]
    assert first["difference"] is None
    assert second["parameters"] > first["parameters"]
    low, high = second["difference_ci95"]
    assert low < second["difference"] < high
    assert second["latency_ratio"] > 0


def test_scores_are_the_share_of_right_images(finished) -> None:
    folder, result = finished
    means = []
    for entry in result["results"]:
        tables = [safetensors.numpy.load_file(folder / path / "test.safetensors")["scores"] for path in entry["runs"]]
        assert set(np.unique(tables)) <= {0.0, 1.0}
        assert entry["scores"] == pytest.approx([100 * float(np.mean(table)) for table in tables])
        means.append(100 * float(np.mean(tables, dtype=np.float64)))
        assert entry["score"] == pytest.approx(means[-1])
    assert result["results"][1]["difference"] == pytest.approx(means[1] - means[0])


def test_the_gates_of_the_attended_network_differ_between_images(finished) -> None:
    folder, _ = finished
    network = Run(folder / "runs" / SPECS[1] / "0").load().network
    split = load_data("digits").test
    assert split is not None
    images, _, _ = next(iter(Loader(split, Run(folder / "runs" / SPECS[1] / "0").load().preprocessing, 64, seed=0)))
    gates = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: gates.append(output))
        for name, module in network.named_modules()
        if name.endswith(".gate")
    ]
    with torch.inference_mode():
        network(images)
    for hook in hooks:
        hook.remove()
    assert [values.shape[0] for values in gates] == [64] * 9
    # In so narrow a network a bottleneck may have died in training; that is not the rule.
    assert sum(values.std(dim=0).max() > 1e-3 for values in gates) >= 6


def test_the_page_is_written(finished) -> None:
    folder, _ = finished
    page = (folder / "reports" / "compare.html").read_text()
    assert all(spec in page for spec in SPECS)


def test_called_again_nothing_is_trained_and_a_seed_can_be_added(finished, no_timing) -> None:
    folder, result = finished
    models = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/model.json")}
    assert len(models) == 6
    assert compare(SPECS, seeds=3, recipe=quick(), out=folder) == result
    more = compare(SPECS, seeds=4, recipe=quick(), out=folder)
    assert more["results"][0]["scores"][:3] == result["results"][0]["scores"]
    assert {path: path.stat().st_mtime_ns for path in models} == models
    compare(SPECS, seeds=3, recipe=quick(), out=folder)  # as the other tests expect it


def test_another_recipe_in_the_same_folder_is_refused(finished) -> None:
    folder, _ = finished
    with pytest.raises(UsageError, match="another recipe"):
        compare(SPECS, seeds=3, recipe=quick(**{"optimizer.lr": 0.01}), out=folder)


def test_finished_runs_are_compared_as_they_are(finished, tmp_path, no_timing) -> None:
    folder, result = finished
    runs = [folder / path for entry in result["results"] for path in entry["runs"]]
    again = compare(runs, out=tmp_path / "again")
    for one, other in zip(again["results"], result["results"], strict=True):
        assert one["spec"] == other["spec"]
        assert one["scores"] == other["scores"]
        assert one["difference_ci95"] == other["difference_ci95"]
    with pytest.raises(UsageError, match="no seed in common"):
        compare([runs[0], runs[4]], out=tmp_path / "none")
    with pytest.raises(UsageError, match="not both"):
        compare([runs[0], "resnet20"], out=tmp_path / "mixed")


def test_there_is_no_verdict_below_three_seeds(tmp_path, no_timing) -> None:
    result = compare(SPECS[:1], seeds=2, recipe=quick(), out=tmp_path / "out")
    assert result["verdict"] is None


def test_the_control_is_as_slow_as_the_slowest(tmp_path, no_timing) -> None:
    recipe = quick(**{"trainer.batch_size": 256})
    result = compare(["resnet20", "resnet20+sk"], seeds=1, recipe=recipe, control=True, out=tmp_path / "out")
    _, slowest, control = result["results"]
    assert control["role"] == "control"
    assert control["spec"].startswith("resnet20:width=1.")
    # Here latency is made to follow the parameters.
    assert control["latency_ms"] == pytest.approx(slowest["latency_ms"], rel=0.05)
    again = compare(["resnet20", "resnet20+sk"], seeds=1, recipe=recipe, control=True, out=tmp_path / "out")
    assert again == result
    with pytest.raises(UsageError, match="--control needs"):
        compare(SPECS, seeds=1, recipe=quick(), control=True, out=tmp_path / "no")
    assert not (tmp_path / "no" / "runs").exists()


def own_network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2)
    )


def test_modules_and_datasets_of_ones_own(tmp_path, no_timing) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = torch.randn(40, 1, 8, 8, generator=generator) * (1 + labels.view(-1, 1, 1, 1))
    data = from_datasets(TensorDataset(images[:32], labels[:32]), TensorDataset(images[32:], labels[32:]))
    networks = {"narrow": lambda: own_network(2), "wide": lambda: own_network(8)}
    recipe = quick(**{"trainer.batch_size": 8})
    result = compare(networks, data, seeds=2, recipe=recipe, out=tmp_path / "out")
    assert [entry["spec"] for entry in result["results"]] == ["narrow", "wide"]
    assert compare(networks, data, seeds=2, recipe=recipe, out=tmp_path / "out") == result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contestants": ["resnet20", "resnet20"]}, "twice"),
        ({"contestants": ["resnet20", "resnet21"]}, "resnet20"),
        ({"contestants": []}, "at least one"),
        ({"seeds": 0}, "seeds"),
        ({"data": "digit"}, "digits"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_trained(tmp_path, arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        compare(**{"contestants": SPECS, "recipe": quick(), "out": tmp_path / "out"} | arguments)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExciteError, match="Cannot write"):
        compare(SPECS, recipe=quick(), out=tmp_path / "file" / "out")


def test_killed_and_called_again_the_comparison_ends_the_same(finished, tmp_path, no_timing) -> None:
    _, result = finished
    folder = tmp_path / "out"
    quick().write(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "excite", "compare", *SPECS, "--seeds", "3", "--recipe"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "recipe.yaml"), "--set", "trainer.threads=1", "--out", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while len(list(folder.glob("runs/*/*/model.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "compare.json").exists()
    again = compare(SPECS, seeds=3, recipe=quick(), out=folder)
    assert [entry["scores"] for entry in again["results"]] == [entry["scores"] for entry in result["results"]]


def _comparison(*rivals: tuple, seeds: int = 3, higher_is_better: bool = True) -> dict:
    results = [{"spec": "a", "difference": None, "difference_ci95": None, "p_holm": None, "latency_ratio": None}]
    for spec, difference, interval, p, ratio in rivals:
        found = {"difference": difference, "difference_ci95": interval, "p_holm": p, "latency_ratio": ratio}
        results.append({"spec": spec, **found})
    metric = {"name": "top1", "unit": "%", "higher_is_better": higher_is_better}
    return {"seeds": list(range(seeds)), "metric": metric, "baseline": "a", "results": results}


def test_the_verdict_says_what_the_intervals_say() -> None:
    better = ("b", 1.0, [0.4, 1.6], 0.01, 1.25)
    worse = ("b", -1.0, [-1.6, -0.4], 0.01, None)
    open_ = ("c", 1.0, [-0.1, 2.1], 0.07, 1.1)
    not_after_holm = ("d", 0.5, [0.1, 0.9], 0.06, 1.1)
    sentence = "b is better than a by 1.00 points (95 % interval 0.40 to 1.60) at 1.25× its latency"
    assert verdict(_comparison(better)) == f"{sentence}."
    assert verdict(_comparison(worse)) == "b is worse than a by 1.00 points (95 % interval 0.40 to 1.60)."
    assert "b is better than a" in str(verdict(_comparison(worse, higher_is_better=False)))
    assert verdict(_comparison(open_, not_after_holm)) == "No difference shown for c and d against a."
    assert verdict(_comparison(better, open_)) == f"{sentence}; no difference shown for c against a."
    assert verdict(_comparison(better, seeds=2)) is None
    assert "nothing to compare" in str(verdict(_comparison()))


def test_a_comparison_can_be_repeated_bit_for_bit(finished, tmp_path) -> None:
    folder, _ = finished
    again = fit(quick(**{"network.spec": SPECS[0], "seed": 1}), tmp_path / "run")
    before = json.loads((folder / "runs" / SPECS[0] / "1" / "model.json").read_text())
    assert again.card["sha256"] == before["sha256"]

import json

import pytest
import torch

from excite.cost import cost
from excite.data import ImageData, Preprocessing, Split
from excite.data.base import StackedImages
from excite.deploy.constant_gates import ConstantScale
from excite.errors import ExciteError, UsageError
from excite.training.fit import fit
from excite.training.recipe import Recipe
from excite.training.run import Run
from excite.units.squeeze_excite import SqueezeExcite
from excite.verbs import prune as module
from excite.verbs.compare import compare
from excite.verbs.evaluate import evaluate
from excite.verbs.prune import prune

pytest.importorskip("torch_pruning")

QUICK = {"epochs": 1, "latency": False, "images": 32, "device": "cpu"}


def split(count, seed):
    """Bright and dark images, in colours."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 128, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    for label in range(3):
        pixels[labels == label, label] += 100
    return Split(StackedImages(pixels, labels), labels, [f"{seed}-{i}" for i in range(count)], 3)


@pytest.fixture(scope="module")
def data():
    preprocessing = Preprocessing(16, (0.3,) * 3, (0.2,) * 3)
    return ImageData("colours", ("red", "green", "blue"), preprocessing, split(48, 0), split(24, 1), split(24, 2))


def trained(folder, data, spec):
    recipe = Recipe.model_validate({"network": spec, "trainer": {"epochs": 2, "batch_size": 16, "device": "cpu"}})
    return fit(recipe, folder, data=data).folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    return trained(tmp_path_factory.mktemp("runs") / "se", data, "resnet20:width=0.5+se")


@pytest.mark.parametrize("method", ["excitation", "l1", "random"])
def test_a_pruned_run_is_a_run_as_any_other(run, data, tmp_path, method):
    said = prune(run, data, target_macs=0.6, method=method, out=tmp_path / "out", **QUICK)
    assert said["macs"]["after"] <= 0.6 * said["macs"]["before"]
    network = Run.open(tmp_path / "out").load().network
    assert cost(network, (3, 16, 16)).macs == said["macs"]["after"]
    assert cost(network, (3, 16, 16)).parameters == said["parameters"]["after"]
    scored = evaluate(tmp_path / "out", data, device="cpu")
    assert scored["metrics"]["top1"] == said["metrics"]["tuned"]["top1"]
    assert evaluate(run, data, device="cpu")["metrics"]["top1"] == said["metrics"]["before"]["top1"]
    assert json.loads((tmp_path / "out" / "reports" / "prune.json").read_text()) == said
    # The same again is read, and anything else refused.
    assert prune(run, data, target_macs=0.6, method=method, out=tmp_path / "out", **QUICK) == said
    with pytest.raises(UsageError, match="other settings"):
        prune(run, data, target_macs=0.5, method=method, out=tmp_path / "out", **QUICK)


def test_a_run_is_compared_with_what_was_pruned_from_it(run, data, tmp_path):
    said = prune(run, data, target_macs=0.6, out=tmp_path / "smaller", **QUICK)
    result = compare([run, tmp_path / "smaller"], data, out=tmp_path / "compared")
    plain, pruned = result["results"]
    assert pruned["spec"] == f"{plain['spec']} (smaller)"
    assert (plain["macs"], pruned["macs"]) == (said["macs"]["before"], said["macs"]["after"])
    assert (plain["parameters"], pruned["parameters"]) == (said["parameters"]["before"], said["parameters"]["after"])
    assert pruned["score"] == said["metrics"]["tuned"]["top1"]


def test_methods_are_compared_at_the_same_cost(run, data, tmp_path):
    said = [
        prune(run, data, target_macs=0.7, method=method, out=tmp_path / method, **QUICK)
        for method in ("excitation", "random")
    ]
    assert said[0]["macs"] == said[1]["macs"]
    assert said[0]["widths"] == said[1]["widths"]
    kept = [
        json.loads((tmp_path / name / "pruned.json").read_text())["steps"][0]["kept"]
        for name in ("excitation", "random")
    ]
    assert kept[0] != kept[1]


def test_constant_units_are_folded(run, data, tmp_path):
    said = prune(run, data, target_macs=1.0, constant=10, out=tmp_path / "out", **QUICK)
    network = Run.open(tmp_path / "out").load().network
    assert len(said["constant"]) == 9
    assert {unit["how"] for unit in said["constant"]} == {"folded"}
    assert not any(isinstance(part, (SqueezeExcite, ConstantScale)) for part in network.modules())
    assert said["metrics"]["constant"] is not None


def test_units_stay_where_none_are_to_be_replaced(run, data, tmp_path):
    said = prune(run, data, target_macs=0.8, constant=-1, out=tmp_path / "out", **QUICK)
    assert said["constant"] == []
    network = Run.open(tmp_path / "out").load().network
    assert sum(isinstance(part, SqueezeExcite) for part in network.modules()) == 9


def test_a_pruned_run_can_be_pruned_again(run, data, tmp_path):
    prune(run, data, target_macs=0.8, out=tmp_path / "once", **QUICK)
    said = prune(tmp_path / "once", data, target_macs=0.8, out=tmp_path / "twice", **QUICK)
    network = Run.open(tmp_path / "twice").load().network
    assert cost(network, (3, 16, 16)).macs == said["macs"]["after"] <= 0.8 * said["macs"]["before"]


def test_selective_kernels_are_pruned(data, tmp_path):
    run = trained(tmp_path / "sk", data, "resnet20:width=0.5+sk")
    said = prune(run, data, target_macs=0.6, out=tmp_path / "out", **QUICK)
    network = Run.open(tmp_path / "out").load().network
    assert cost(network, (3, 16, 16)).macs == said["macs"]["after"] <= 0.6 * said["macs"]["before"]


def test_the_search_takes_the_smallest_that_keeps_within(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TARGETS", (0.9, 0.7, 0.5))
    drops = {0.9: 0.0, 0.7: 1.0, 0.5: 9.0}
    original = module._Work.result

    def result(self, folder, target, latency, *, split="test"):
        assert split == "val"
        said = original(self, folder, target, latency, split=split)
        said["metrics"]["tuned"]["top1"] = said["metrics"]["before"]["top1"] - drops[target]
        return said

    monkeypatch.setattr(module._Work, "result", result)
    said = prune(run, data, max_drop=2.0, out=tmp_path / "out", **QUICK)
    assert said["target_macs"] == 0.7
    assert said["search"] == [{"target_macs": 0.7, "drop": 1.0}, {"target_macs": 0.5, "drop": 9.0}]
    assert said["split"] == "test"
    assert evaluate(tmp_path / "out", data, device="cpu")["metrics"]["top1"] == said["metrics"]["tuned"]["top1"]
    drops[0.9] = drops[0.7] = 3.0
    with pytest.raises(ExciteError, match="more than 2"):
        prune(run, data, max_drop=2.0, out=tmp_path / "other", **QUICK)


def test_a_damaged_record_is_found(run, data, tmp_path):
    prune(run, data, target_macs=0.8, out=tmp_path / "out", **QUICK)
    path = tmp_path / "out" / "pruned.json"
    path.write_text(path.read_text().replace("conv1", "conv2"))
    with pytest.raises(ExciteError, match=r"pruned\.json is missing or damaged"):
        Run.open(tmp_path / "out").load()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"target_macs": 0.5, "max_drop": 1}, "give one"),
        ({"target_macs": 70}, "in 0…1"),
        ({"max_drop": -1}, "points of accuracy"),
        ({"method": "size"}, "unknown method"),
        ({"target_macs": 0.001}, "larger target"),
    ],
)
def test_wrong_usage_is_said_in_a_sentence(run, data, tmp_path, wrong, match):
    with pytest.raises(UsageError, match=match):
        prune(run, data, out=tmp_path / "out", **QUICK, **wrong)
    assert not (tmp_path / "out" / "model.json").exists()


def test_a_folder_that_is_taken_is_left_alone(run, data):
    with pytest.raises(UsageError, match="already holds a run"):
        prune(run, data, target_macs=0.8, out=run, **QUICK)


def test_a_network_without_gates_is_pruned_by_its_filters(data, tmp_path):
    run = trained(tmp_path / "plain", data, "resnet20:width=0.5")
    with pytest.raises(UsageError, match="no gates"):
        prune(run, data, target_macs=0.8, out=tmp_path / "out", **QUICK)
    said = prune(run, data, target_macs=0.8, method="l1", out=tmp_path / "out", **QUICK)
    assert said["macs"]["after"] <= 0.8 * said["macs"]["before"]

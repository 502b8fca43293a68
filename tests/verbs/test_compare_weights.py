"""Comparisons of networks that start from weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import quick
from torch import nn

import excite.cli.compare
import excite.cli.train
from excite.create import create
from excite.data import ImageData, Split, load_data
from excite.data.base import StackedImages
from excite.errors import UsageError
from excite.training.recipe import Recipe, load
from excite.training.run import Run
from excite.verbs.compare import compare, default_recipe
from excite.verbs.evaluate import evaluate
from excite.weights.base import Origin

SPEC = "resnet20:width=0.25"


@pytest.fixture(scope="module")
def weights(run: Run) -> Path:
    """What a run on the digits learned."""
    return run.folder / "model.safetensors"


def digits(name: str, classes: tuple[str, ...]) -> ImageData:
    """Every fifth of the digits, in so many classes."""
    whole = load_data("digits")

    def some(split: Split | None) -> Split:
        assert split is not None
        labels = split.labels[::5] % len(classes)
        pixels = torch.stack([split.images[i][0] for i in range(0, len(split), 5)])
        return Split(StackedImages(pixels, labels), labels, split.names[::5], len(classes))

    return replace(whole, name=name, classes=classes, train=some(whole.train), test=some(whole.test), val=None)


@pytest.fixture(scope="module")
def few() -> ImageData:
    """Images of the classes that the weights know."""
    return digits("few", tuple("0123456789"))


@pytest.fixture(scope="module")
def even_or_odd() -> ImageData:
    """Images of two classes: the classifier of the weights does not fit."""
    return digits("even or odd", ("even", "odd"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, weights, even_or_odd) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compare") / "out"
    timing = pytest.MonkeyPatch()
    timing.setattr("excite.verbs.compare.speeds", no_speeds)
    try:
        return folder, compare([SPEC], even_or_odd, seeds=2, recipe=quick(), weights=weights, out=folder)
    finally:
        timing.undo()


def no_speeds(networks: dict[str, Any], _progress: bool) -> dict[str, dict[str, Any]]:
    keys = ("latency_ms", "latency_ratio", "latency_ratio_ci95", "throughput")
    return {name: dict.fromkeys(keys) for name in networks}


@pytest.fixture
def quiet(monkeypatch) -> None:
    monkeypatch.setattr("excite.verbs.compare.speeds", no_speeds)


def test_the_score_at_the_start_is_that_of_the_weights_with_the_seeds_classifier(
    finished, weights, even_or_odd
) -> None:
    folder, result = finished
    expected = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = create(SPEC, 2, 3, weights=weights)
        expected.append(evaluate(network, even_or_odd)["metrics"]["top1"])
    (entry,) = result["results"]
    assert entry["start_scores"] == pytest.approx(expected)
    assert entry["start_score"] == pytest.approx(sum(expected) / 2)
    assert result["weights"] == str(weights)
    assert json.loads((folder / "compare.json").read_text())["results"][0]["start_scores"] == entry["start_scores"]
    assert "At the start" in (folder / "reports" / "compare.html").read_text()


def test_every_run_starts_from_the_weights_and_learns_them_slower(finished, weights) -> None:
    folder, result = finished
    assert load(folder / "recipe.yaml").optimizer.host_factor == 0.1, "the classifier is new"
    for path in result["results"][0]["runs"]:
        recipe = Run(folder / path).recipe
        assert recipe.network.weights == str(weights)
        assert recipe.optimizer.host_factor == 0.1


def test_called_again_the_start_is_not_scored_again(finished, weights, even_or_odd, quiet, monkeypatch) -> None:
    folder, result = finished
    kept = folder / result["results"][0]["runs"][0] / "start.json"
    content = kept.read_bytes()
    monkeypatch.setattr("excite.verbs.compare.score", None)
    again = compare([SPEC], even_or_odd, seeds=2, recipe=quick(), weights=weights, out=folder)
    assert again["results"] == result["results"]
    monkeypatch.undo()
    kept.write_bytes(content[:30])
    monkeypatch.setattr("excite.verbs.compare.speeds", no_speeds)
    assert compare([SPEC], even_or_odd, seeds=2, recipe=quick(), weights=weights, out=folder) == again
    assert kept.read_bytes() == content


def test_finished_runs_bring_their_start_where_the_images_are_the_same(
    finished, even_or_odd, tmp_path, quiet
) -> None:
    folder, result = finished
    runs = [folder / path for path in result["results"][0]["runs"]]
    again = compare(runs, even_or_odd, out=tmp_path / "again")
    assert again["results"][0]["start_scores"] == result["results"][0]["start_scores"]
    fewer = even_or_odd.test
    assert fewer is not None
    labels = fewer.labels[:40]
    pixels = torch.stack([fewer.images[i][0] for i in range(40)])
    other = replace(even_or_odd, test=Split(StackedImages(pixels, labels), labels, fewer.names[:40], 2))
    assert compare(runs, other, out=tmp_path / "other")["results"][0]["start_score"] is None


def test_all_contestants_learn_what_they_share_at_the_same_rate(run, weights, few, tmp_path, quiet) -> None:
    specs = [SPEC, f"{SPEC}+se"]
    result = compare(specs, few, seeds=1, recipe=quick(), weights=weights, out=tmp_path / "out")
    assert [entry["spec"] for entry in result["results"]] == specs, "as they were written"
    before = evaluate(run.folder, few)["metrics"]["top1"]
    assert [entry["start_score"] for entry in result["results"]] == pytest.approx([before] * 2)
    for entry in result["results"]:
        trained = Run(tmp_path / "out" / entry["runs"][0])
        assert trained.recipe.optimizer.host_factor == 0.1
        assert trained.recipe.network.spec == trained.card["spec"]
        network = trained.load().network
        assert entry["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    alone = compare([SPEC], few, seeds=1, recipe=quick(), weights=weights, out=tmp_path / "alone")
    assert alone["recipe"]["optimizer"]["host_factor"] == 1.0, "nothing is new"


def test_modules_that_say_what_is_new_in_them_learn_at_one_rate(even_or_odd, weights, tmp_path, quiet) -> None:
    def network(fresh: str) -> nn.Module:
        module = create(SPEC, 2)
        module.origin = Origin("nowhere.pth", "by hand", fresh=frozenset([fresh] if fresh else []))
        return module

    networks = {"all loaded": lambda: network(""), "new head": lambda: network("fc.weight")}
    result = compare(networks, even_or_odd, seeds=1, recipe=quick(), out=tmp_path / "out")
    for entry in result["results"]:
        assert Run(tmp_path / "out" / entry["runs"][0]).recipe.optimizer.host_factor == 0.1
        assert entry["start_score"] is None


def test_runs_from_before_the_factor_was_there_are_compared_without_a_note(even_or_odd, tmp_path, quiet) -> None:
    for name in ("one", "two"):
        compare([SPEC], even_or_odd, seeds=1, recipe=quick(), out=tmp_path / name)
    runs = [tmp_path / name / "runs" / SPEC / "0" for name in ("one", "two")]
    path = runs[1] / "recipe.yaml"
    text = path.read_text()
    assert text.count("  host_factor: 1.0\n") == 1
    card = json.loads((runs[1] / "model.json").read_text())
    (runs[1] / "model.json").write_text(json.dumps(card | {"spec": "resnet20:width=0.250"}))
    path.write_text(text.replace("  host_factor: 1.0\n", ""))
    assert compare(runs, even_or_odd, out=tmp_path / "both")["notes"] == []
    path.write_text(text.replace("  weights: null", "  weights: imagenet"))
    (note,) = compare(runs, even_or_odd, out=tmp_path / "differ")["notes"]
    assert "different recipes" in note


def test_without_weights_there_is_no_start(tmp_path, even_or_odd, quiet) -> None:
    result = compare([SPEC], even_or_odd, seeds=1, recipe=quick(), out=tmp_path / "out")
    (entry,) = result["results"]
    assert (entry["start_score"], entry["start_scores"], result["weights"]) == (None, None, None)
    assert not list((tmp_path / "out").rglob("start.json"))
    assert "t the start" not in (tmp_path / "out" / "reports" / "compare.html").read_text().partition("<script")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control": True}, "no weights are of its shape"),
        ({"contestants": {"own": nn.Identity}}, "of your own"),
        ({"contestants": [SPEC, "resnet32"]}, "do not fit"),
        ({"recipe": quick(**{"schedule.host_frozen_epochs": 1})}, "host_frozen_epochs.*nothing in resnet20"),
        ({"weights": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_what_does_not_go_with_weights_is_told_before_anything_is_trained(
    weights, tmp_path, arguments, message
) -> None:
    usual = {"contestants": [SPEC], "data": "digits", "recipe": quick(), "weights": weights, "out": tmp_path / "out"}
    with pytest.raises(UsageError, match=message):
        compare(**usual | arguments)
    assert not (tmp_path / "out" / "runs").exists()


def test_finished_runs_take_no_weights(run, weights, tmp_path) -> None:
    with pytest.raises(UsageError, match="weights of their own"):
        compare([run.folder], "digits", weights=weights, out=tmp_path / "out")


def test_with_weights_the_usual_recipe_is_the_one_for_fine_tuning() -> None:
    assert default_recipe("digits") == load("digits")
    assert default_recipe("some/folder") == load("default")
    for data in ("digits", "cifar10", "some/folder"):
        assert default_recipe(data, "imagenet") == load("finetune").replace({"data.path": data})
    assert default_recipe(None, "imagenet") == load("finetune")


class Asked(Exception):
    """Stops a verb before it works."""


@pytest.mark.parametrize(
    ("verb", "arguments", "expected"),
    [
        ("compare", {"weights": "imagenet"}, "finetune"),
        ("compare", {"settings": ["network.weights=imagenet"]}, "finetune"),
        ("compare", {"weights": "imagenet", "recipe": "cifar10"}, "cifar10"),
        ("compare", {}, "digits"),
        ("train", {"weights": "imagenet"}, "finetune"),
        ("train", {"settings": ["network.weights=imagenet"]}, "finetune"),
        ("train", {"weights": "imagenet", "recipe": "cifar10"}, "cifar10"),
        ("train", {}, "digits"),
    ],
)
def test_the_command_line_picks_the_recipe_by_the_weights(monkeypatch, verb, arguments, expected) -> None:
    asked: dict[str, Any] = {}

    def instead(*given: Any, **named: Any) -> None:
        asked.update(named, given=given)
        raise Asked

    monkeypatch.setattr(f"excite.verbs.{verb}.{verb}", instead)
    monkeypatch.setattr(f"excite.cli.{verb}.keep_freed_buffers", lambda: None)
    with pytest.raises(Asked):
        getattr(excite.cli, verb).run(data="digits", **arguments)
    recipe: Recipe = asked["recipe"] if verb == "compare" else asked["given"][0]
    assert recipe.optimizer == load(expected).optimizer
    assert recipe.trainer == load(expected).trainer
    if verb == "compare":
        assert asked["weights"] == ("imagenet" if arguments.keys() & {"weights", "settings"} else None)
    else:
        assert recipe.data.path == "digits"
        assert recipe.network.weights == ("imagenet" if arguments.keys() & {"weights", "settings"} else None)

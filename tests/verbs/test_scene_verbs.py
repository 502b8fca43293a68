"""Training, scoring and comparing on a hyperspectral scene, end to end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from test_predict_scene import COLS, ROWS, WINDOW, write_scene

from excite.data.hyperspectral import SceneData, load_scene
from excite.errors import UsageError
from excite.training.fit import fit
from excite.training.recipe import Recipe, load
from excite.training.recipe_data import load_recipe_data
from excite.training.run import Run
from excite.verbs.compare import compare
from excite.verbs.evaluate import evaluate
from excite.verbs.predict_scene import predict_scene
from excite.verbs.train import train

SETTINGS = {
    "data.window": WINDOW,
    "data.components": 4,
    "data.train_ratio": 0.3,
    "network.spec": "hybridsn:width=0.25",
    "trainer.epochs": 2,
    "trainer.batch_size": 16,
    "trainer.threads": 1,
    "trainer.precision": "fp32",
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> str:
    return str(write_scene(tmp_path_factory.mktemp("scene"))[0])


@pytest.fixture(scope="module")
def recipe(scene) -> Recipe:
    return load("hybridsn-indian-pines").replace(SETTINGS | {"data.path": scene})


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory) -> dict:
    return train(recipe, out=tmp_path_factory.mktemp("trained") / "run")


def loaded(run: Run) -> SceneData:
    data = load_recipe_data(run.recipe)
    assert isinstance(data, SceneData)
    return data


def window_by_window(run: Run) -> torch.Tensor:
    """The logits of the test pixels, each from its own window."""
    windows = loaded(run).test.images
    with torch.no_grad():
        return torch.cat([run.load().network(windows[i][0][None]) for i in range(len(windows))])


def test_training_says_what_it_trained_on(trained) -> None:
    run = Run(trained["run"])
    assert trained["samples"] == "pixels"
    assert set(trained["metrics"]) == {"oa", "aa", "kappa", "loss"}
    assert run.card["task"] == "hyperspectral"
    assert run.card["classes"] == ["corn", "wheat", "oats"]
    assert run.card["scene"]["numbers"] == [2, 3, 7]
    data = loaded(run)
    assert trained["count"] == len(data.test)
    assert run.card["scene"]["train_pixels"] == len(data.train)
    assert run.recipe.network.spec == f"hybridsn:width=0.25,window={WINDOW}", "the window is the data's"
    chosen = run.recipe.data
    assert (chosen.split, chosen.split_seed, chosen.pca, chosen.whiten) == ("random", 0, "scene", True)
    assert "train_oa" in run.metrics()


def test_scores_are_those_of_scikit_learn_on_the_test_windows(trained, scene) -> None:
    run = Run(trained["run"])
    data = loaded(run)
    labels, predicted = data.test.labels.numpy(), window_by_window(run).argmax(1).numpy()
    result = evaluate(run.folder, scene, per_class=True)
    assert result["metrics"] == trained["metrics"]
    assert result["metrics"]["oa"] == pytest.approx(100 * sklearn.metrics.accuracy_score(labels, predicted))
    recalls = sklearn.metrics.recall_score(labels, predicted, average=None)
    assert result["metrics"]["aa"] == pytest.approx(100 * recalls.mean())
    assert result["per_class"] == pytest.approx(100 * recalls)
    kappa = sklearn.metrics.cohen_kappa_score(labels, predicted)
    assert result["metrics"]["kappa"] == pytest.approx(100 * kappa, abs=1e-3)
    assert result["confusion"] == sklearn.metrics.confusion_matrix(labels, predicted).tolist()
    assert (run.folder / "reports" / "confusion.png").stat().st_size > 1000
    json.dumps(result, allow_nan=False)


def test_a_network_in_evaluation_mode_gives_the_same_scores_again(trained, scene) -> None:
    assert evaluate(trained["run"], scene)["metrics"] == evaluate(trained["run"], scene)["metrics"]


def test_overlap_is_what_the_nearest_training_pixel_tells(trained, scene) -> None:
    data = loaded(Run(trained["run"]))
    train, test = (split.images.positions.numpy() for split in (data.train, data.test))
    said = evaluate(trained["run"], scene)["overlap"]
    is_train = np.zeros((ROWS, COLS), dtype=bool)
    is_train[tuple(train.T)] = True
    framed = np.pad(is_train, WINDOW // 2)
    holds = [framed[row : row + WINDOW, column : column + WINDOW].any() for row, column in test]
    assert said["windows"] == pytest.approx(100 * np.mean(holds))

    # Of training pixels that are as near as each other either may be taken: between all and none of those is right.
    squared = ((test[:, None] - train[None]) ** 2).sum(2)
    nearest = squared == squared.min(1, keepdims=True)
    same = data.train.labels.numpy()[None] == data.test.labels.numpy()[:, None]
    surely, perhaps = (nearest <= same).all(1).mean(), (nearest & same).any(1).mean()
    assert 100 * surely <= said["nearest"] <= 100 * perhaps
    assert perhaps - surely < 0.2


def test_dropout_left_on_gives_a_map_of_doubt(trained, scene, tmp_path) -> None:
    result = evaluate(trained["run"], scene, mc_dropout=8, out=tmp_path / "doubt.npy")
    doubts = result["uncertainty"]
    entropy = np.load(tmp_path / "doubt.npy")
    assert entropy.shape == (ROWS, COLS)
    assert entropy.min() >= 0
    assert entropy.max() <= 1
    assert doubts["passes"] == 8
    assert doubts["map"] == str(tmp_path / "doubt.npy")

    predict_scene(trained["run"], scene, tmp_path / "labels.npy", passes=8)
    data = loaded(Run(trained["run"]))
    rows, columns = data.test.images.positions.numpy().T
    wrong = np.load(tmp_path / "labels.npy")[rows, columns] != data.truth.labels[rows, columns]
    assert doubts["metrics"]["oa"] == pytest.approx(100 * (~wrong).mean())
    assert doubts["entropy_right"] == pytest.approx(entropy[rows, columns][~wrong].mean(), rel=1e-5)
    assert doubts["entropy_wrong"] == pytest.approx(entropy[rows, columns][wrong].mean(), rel=1e-5)
    theirs = sklearn.metrics.roc_auc_score(wrong, entropy[rows, columns])
    assert doubts["auroc"] == pytest.approx(theirs)
    assert abs(doubts["single"]["mean"] - doubts["metrics"]["oa"]) < 20

    again = evaluate(trained["run"], scene, mc_dropout=8)
    assert again["uncertainty"] | {"map": None} == doubts | {"map": None}
    assert again["uncertainty"]["map"].endswith("uncertainty.png")


def test_on_another_scene_all_labelled_pixels_are_scored(trained, tmp_path, caplog) -> None:
    other, truth = write_scene(tmp_path, "elsewhere")
    with caplog.at_level(logging.WARNING, logger="excite"):
        result = evaluate(trained["run"], str(other))
    assert result["count"] == (truth > 0).sum()
    assert result["overlap"] is None
    assert "is not the scene of the run" in caplog.text


def test_a_comparison_counts_blocks_and_says_what_is_shared(recipe, scene, tmp_path) -> None:
    specs = ["hybridsn:width=0.25", "hybridsn:width=0.25+se:reduction=2", "resnet20:width=0.25"]
    quick = recipe.replace({"trainer.epochs": 1})
    result = compare(specs, scene, seeds=3, recipe=quick, out=tmp_path / "out")
    assert [entry["spec"] for entry in result["results"]] == [
        f"hybridsn:width=0.25,window={WINDOW}",
        f"hybridsn:width=0.25,window={WINDOW}+se:reduction=2",
        "resnet20:width=0.25",
    ]
    assert result["metric"]["name"] == "oa"
    assert result["samples"] == "pixels"
    data = load_recipe_data(quick)
    assert result["count"] == len(data.test)
    assert result["blocks"] == len(data.test.blocks.unique()) < len(data.test)
    for entry in result["results"]:
        runs = [Run(tmp_path / "out" / folder) for folder in entry["runs"]]
        for name in ("oa", "aa", "kappa", "loss"):
            values = [run.test_metrics()[name] for run in runs]
            assert entry["metrics"][name]["mean"] == pytest.approx(np.mean(values))
            assert entry["metrics"][name]["std"] == pytest.approx(np.std(values, ddof=1))
        assert entry["score"] == pytest.approx(entry["metrics"]["oa"]["mean"], abs=1e-4)
    assert "have training pixels in their windows" in result["notes"][0]
    page = (tmp_path / "out" / "reports" / "compare.html").read_text()
    assert "Overall accuracy" in page
    assert f"{result['blocks']} blocks of" in page
    assert "test images" not in page
    again = compare(specs, scene, seeds=3, recipe=quick, out=tmp_path / "out")
    assert again == result


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data.path": "digits"}, r"data\.train_ratio' is for hyperspectral scenes, and 'digits' is none"),
        ({"data.image_size": 32}, r"data\.image_size' is for images, and .*field\.npy' is none"),
    ],
)
def test_keys_of_the_other_kind_of_data_are_refused(recipe, tmp_path, keys, message) -> None:
    with pytest.raises(UsageError, match=message):
        train(recipe.replace(SETTINGS | keys), out=tmp_path / "run")


def test_images_and_scenes_are_not_mixed_up(trained, scene) -> None:
    with pytest.raises(UsageError, match="mean is an option for images"):
        evaluate(trained["run"], scene, mean=(0.5,))
    with pytest.raises(UsageError, match="was trained on a hyperspectral scene, not on images"):
        evaluate(trained["run"], "digits")
    with pytest.raises(UsageError, match="is an option for hyperspectral scenes"):
        evaluate(trained["run"], "digits", mc_dropout=3)


def test_runs_that_were_trained_on_other_pixels_are_not_compared(trained, recipe, scene, tmp_path) -> None:
    other = train(recipe.replace({"data.split_seed": 1, "seed": 1}), out=tmp_path / "other")
    with pytest.raises(UsageError, match=r"data\.split_seed=0 and .*other with 1"):
        compare([trained["run"], other["run"]], out=tmp_path / "out")
    with pytest.raises(UsageError, match="on the scene that they were trained on"):
        compare([trained["run"]], str(tmp_path / "else.npy"), out=tmp_path / "out")
    alone = compare([trained["run"]], scene, out=tmp_path / "out")
    assert alone["results"][0]["metrics"]["oa"]["mean"] == trained["metrics"]["oa"]


# --- what a network was trained on is never its test ---------------------------------------------------------------


def test_the_same_scene_by_another_path_keeps_its_test_pixels(trained, scene, monkeypatch) -> None:
    monkeypatch.chdir(Path(scene).parent)
    for spelling in ("./field.npy", "hyperspectral:field.npy", "../" + Path(scene).parent.name + "/field.npy"):
        assert evaluate(trained["run"], spelling)["count"] == trained["count"]


def test_a_scene_that_was_loaded_otherwise_than_by_the_recipe_is_found_again(recipe, scene, tmp_path) -> None:
    data = load_scene(scene, window=WINDOW, components=3, train_ratio=0.2, split_seed=3)
    run = fit(recipe.replace({"trainer.epochs": 1}), tmp_path / "run", data=data)
    again = load_recipe_data(run.recipe)
    assert np.array_equal(again.pixels.train, data.pixels.train)
    assert evaluate(run.folder, scene)["count"] == len(data.test)


def test_pixels_that_were_trained_on_are_noticed(trained, recipe, scene, tmp_path) -> None:
    other = load_scene(scene, window=WINDOW, components=4, train_ratio=0.3, split_seed=1)
    with pytest.raises(UsageError, match="trained on other pixels"):
        evaluate(trained["run"], other)
    other = load_scene(scene, window=WINDOW, components=4, train_ratio=0.3, whiten=False)
    with pytest.raises(UsageError, match="other components"):
        evaluate(trained["run"], other)
    other = load_scene(scene, window=7, components=4, train_ratio=0.3)
    with pytest.raises(UsageError, match="windows of 5 pixels, not 7"):
        evaluate(trained["run"], other)

    path, truth = write_scene(tmp_path, "changing")
    run = fit(recipe.replace({"trainer.epochs": 1, "data.path": str(path)}), tmp_path / "run")
    truth[:3] = 0
    np.save(tmp_path / "changing_gt.npy", truth.astype(np.uint8))
    with pytest.raises(UsageError, match="the ground truth has changed since"):
        evaluate(run.folder, str(path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"out": "doubt.npy"}, "which mc_dropout asks for"),
        ({"out": "doubt.tif", "mc_dropout": 2}, r"written as \.png or \.npy"),
        ({"broken": "refuse"}, "broken is an option for images"),
    ],
)
def test_options_that_would_be_of_no_use_are_refused(trained, scene, given, message) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(trained["run"], scene, **given)


@pytest.mark.parametrize(
    "keys", [{"augment.crop": "pad"}, {"augment.randaugment": 2}, {"augment.rotate": 10}, {"augment.jitter": 20}]
)
def test_augmentation_that_loses_the_pixel_is_refused(recipe, tmp_path, keys) -> None:
    with pytest.raises(UsageError, match=r"is for images: the windows of a scene"):
        train(recipe.replace(keys), out=tmp_path / "run")


def test_so_many_pixels_of_each_class(scene) -> None:
    shipped = load("hybridsn-indian-pines").replace({"data.path": scene, "data.train_per_class": 4, "data.window": 5})
    data = load_recipe_data(shipped.replace({"data.components": 4, "data.bands": "1-5"}))
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4]
    assert shipped.replace({"data.bands": 5}).data.bands == "5"

"""Networks with weights from elsewhere, fed as torchvision and timm themselves would feed them.

The truth is computed with torchvision's and timm's own transforms, on Pillow's images, and torchvision's own network.
Resizing a tensor instead of a Pillow image differs by one grey level in at most one pixel of a hundred, which moves
the logits (of standard deviation 1) by less than 0.001.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from quick import quick
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import functional as F

from excite.create import create
from excite.data import Loader, Split, load_data
from excite.data.base import StackedImages
from excite.data.encoded import DecodedImages
from excite.data.images import fit as fit_image
from excite.data.images import normalise
from excite.errors import UsageError
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from excite.training.fit import fit
from excite.verbs.evaluate import evaluate
from excite.verbs.predict import predict
from excite.weights.published import find, imagenet_classes, imagenet_synsets

Transform = Callable[[Image.Image], Tensor]
SIZES = [(300, 401), (257, 333), (150, 219), (601, 480), (224, 224), (40, 61)]
TIMM_CONFIG = {
    "input_size": [3, 128, 128],
    "test_input_size": [3, 160, 160],
    "crop_pct": 0.875,
    "test_crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.3, 0.2, 0.25],
}


def _picture(height: int, width: int, seed: int) -> Image.Image:
    """Something with large and small structures, as a photograph has."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse, dtype=float) + rng.normal(0, 15, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, (height, width) in enumerate(SIZES):
        _picture(height, width, i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return models.resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def files(network, tmp_path_factory) -> Path:
    """One network under names that say differently what it is to be fed."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("resnet18-f37072fd.pth", "resnet50-11ad3fa6.pth"):
        torch.save(network.state_dict(), folder / name)
    (folder / "timm").mkdir()
    safetensors.torch.save_file(network.state_dict(), folder / "timm" / "model.safetensors")
    card = {"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": TIMM_CONFIG}
    (folder / "timm" / "config.json").write_text(json.dumps(card))
    return folder


def _timm_transform() -> Transform:
    timm_data = pytest.importorskip("timm.data")
    config = timm_data.resolve_data_config(pretrained_cfg=TIMM_CONFIG, use_test_size=True)
    transform: Transform = timm_data.create_transform(**config, is_training=False)
    return transform


WAYS = pytest.mark.parametrize(
    ("file", "transform"),
    [
        ("resnet18-f37072fd.pth", models.ResNet18_Weights.IMAGENET1K_V1.transforms),
        ("resnet50-11ad3fa6.pth", models.ResNet50_Weights.IMAGENET1K_V2.transforms),
        ("timm/model.safetensors", _timm_transform),
    ],
    ids=["torchvision", "torchvision-2", "timm"],
)


def _logits(network: nn.Module, transform: Transform, paths: list[Path]) -> Tensor:
    with torch.inference_mode():
        return torch.stack([network(transform(Image.open(path).convert("RGB"))[None])[0] for path in paths])


def _probabilities(rows: list[dict], names: tuple[str, ...]) -> Tensor:
    table = [{guess["class"]: guess["probability"] for guess in row["predictions"]} for row in rows]
    return torch.tensor([[row[name] for name in names] for row in table])


# --- predict -------------------------------------------------------------------------------------------------------


@WAYS
def test_predictions_are_those_of_the_publishers_own_transforms(files, network, photos, file, transform) -> None:
    paths = sorted(photos.iterdir())
    expected = _logits(network, transform(), paths).softmax(1)
    found = _probabilities(list(predict("resnet18", [photos], files / file, top=1000)), imagenet_classes())
    assert (found - expected).abs().max() < 1e-4
    assert (found.log() - expected.log()).abs().max() < 2e-3
    # Any other way of feeding it would be seen.
    plain = models.ResNet18_Weights.DEFAULT.transforms(crop_size=200)
    assert (found.log() - _logits(network, plain, paths).log_softmax(1)).abs().max() > 0.05


def test_what_is_asked_for_goes_before_what_the_weights_say(files, network, photos) -> None:
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "interpolation": "bicubic"}

    def transform(image: Image.Image) -> Tensor:
        resized = F.resize(image, 180, F.InterpolationMode.BICUBIC)
        return F.normalize(F.to_tensor(F.center_crop(resized, 96)), given["mean"], given["std"])

    expected = _logits(network, transform, sorted(photos.iterdir())).softmax(1)
    rows = predict(
        "resnet18", [photos], files / "resnet18-f37072fd.pth", top=1000, image_size=96, resize=180, **given
    )
    assert (_probabilities(list(rows), imagenet_classes()).log() - expected.log()).abs().max() < 2e-3


def test_another_size_keeps_the_share_of_the_image(files, network, photos) -> None:
    transform = models.ResNet18_Weights.DEFAULT.transforms(crop_size=112, resize_size=128)
    expected = _logits(network, transform, sorted(photos.iterdir())).softmax(1)
    rows = list(predict("resnet18", [photos], files / "resnet18-f37072fd.pth", top=1000, image_size=112))
    assert (_probabilities(rows, imagenet_classes()).log() - expected.log()).abs().max() < 2e-3


def test_published_weights_by_their_tag(files, network, photos, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EXCITE_CACHE", str(tmp_path))
    record = find("resnet18", "imagenet")
    assert record is not None
    place = tmp_path / record.where.repo / record.where.file
    place.parent.mkdir(parents=True)
    place.symlink_to(files / "timm" / "model.safetensors")
    rows = list(predict("resnet18", [photos], "imagenet", top=1000))
    expected = _logits(network, models.ResNet18_Weights.IMAGENET1K_V1.transforms(), sorted(photos.iterdir()))
    assert (_probabilities(rows, imagenet_classes()).log() - expected.log_softmax(1)).abs().max() < 2e-3


def test_the_command_line_says_the_same_for_torchvisions_own_network(files, photos, network) -> None:
    command = [sys.executable, "-m", "excite", "predict", "torchvision:resnet18", str(photos / "0.png"), "--json"]
    command += ["--weights", str(files / "resnet18-f37072fd.pth"), "--top", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)["predictions"]
    logits = _logits(network, models.ResNet18_Weights.DEFAULT.transforms(), [photos / "0.png"])
    best = logits.softmax(1)[0].topk(3)
    assert [guess["class"] for guess in row["predictions"]] == [imagenet_classes()[i] for i in best.indices]
    assert [guess["probability"] for guess in row["predictions"]] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_outputs_without_names_are_numbered(photos, tmp_path, caplog) -> None:
    torch.save(create("resnet20:width=0.25", 7).state_dict(), tmp_path / "mine.pth")
    (row,) = predict("resnet20:width=0.25", [photos / "0.png"], tmp_path / "mine.pth", top=9)
    assert {guess["class"] for guess in row["predictions"]} == {f"class {i}" for i in range(7)}
    assert "32×32" in caplog.text


def test_a_run_has_its_own_weights_and_a_spec_needs_some(run, photos, files) -> None:
    with pytest.raises(UsageError, match="weights of its own"):
        list(predict(run.folder, [photos], files / "resnet18-f37072fd.pth"))
    with pytest.raises(UsageError, match="random weights"):
        list(predict("resnet18", [photos]))
    with pytest.raises(UsageError, match="random weights"):
        evaluate("resnet18", "digits")


# --- evaluate ------------------------------------------------------------------------------------------------------


def _set(folder: Path, names: list[str], sizes: list[tuple[int, int]]) -> list[tuple[Path, str]]:
    """Two images in each class folder, in the order in which a set is read."""
    listed = []
    for i, name in enumerate(sorted(names)):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            path = folder / name / f"{k}.png"
            _picture(*sizes[(2 * i + k) % len(sizes)], seed=2 * i + k).save(path)
            listed.append((path, name))
    return listed


def _expected(network: nn.Module, transform: Transform, listed: list[tuple[Path, str]], index: dict) -> dict:
    logits = _logits(network, transform, [path for path, _ in listed]).double()
    labels = torch.tensor([index[name] for _, name in listed])
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    return {
        "top1": 100 * (ranks < 1).double().mean().item(),
        "top5": 100 * (ranks < 5).double().mean().item(),
        "loss": nn.functional.cross_entropy(logits, labels).item(),
    }


def _favourites(network: nn.Module, transform: Transform) -> list[int]:
    """Classes that the network, which has learned nothing, says to such pictures, so that some scores are not 0."""
    logits = torch.stack([network(transform(_picture(200, 300, seed))[None])[0] for seed in range(3)])
    return logits.mean(0).topk(5).indices.tolist()


@WAYS
def test_scores_are_those_of_the_publishers_own_transforms(files, network, tmp_path, file, transform) -> None:
    names, ids = imagenet_classes(), imagenet_synsets()
    if ids is None:
        pytest.skip("needs timm's WordNet ids")
    with torch.inference_mode():
        numbers = [*_favourites(network, transform()), 7, 285]
    # By name, by name written otherwise, by WordNet id, and by number.
    folders = [names[numbers[0]], names[numbers[1]].upper().replace(" ", "_"), *(ids[n] for n in numbers[2:6]), "285"]
    index = dict(zip(folders, numbers, strict=True))
    listed = _set(tmp_path, folders, SIZES)
    expected = _expected(network, transform(), listed, index)
    result = evaluate("resnet18", str(tmp_path), weights=files / file, per_class=True)
    assert result["count"] == len(listed), "all of them: nothing was trained on a part"
    assert result["metrics"] == pytest.approx(expected, abs=1e-3)
    assert result["metrics"]["top5"] > 0
    assert result["classes"] == list(names)
    assert [i for i, share in enumerate(result["per_class"]) if share is not None] == sorted(numbers)


def test_small_images_are_fed_at_the_networks_size_and_kept_at_their_own(files, network, tmp_path) -> None:
    listed = _set(tmp_path, ["tench", "goldfish"], [(40, 40), (32, 48), (48, 32)])
    transform = models.ResNet18_Weights.DEFAULT.transforms()
    expected = _expected(network, transform, listed, {"tench": 0, "goldfish": 1})
    result = evaluate("resnet18", str(tmp_path), weights=files / "resnet18-f37072fd.pth")
    assert result["metrics"] == pytest.approx(expected, abs=1e-3)
    preprocessing = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, 256)
    images = load_data(tmp_path, preprocessing=preprocessing, all_for_test=True)
    assert images.train is None
    assert images.test is not None
    assert isinstance(images.test.images, DecodedImages)
    assert {tuple(image.shape[-2:]) for image, _ in images.test.images} == {(40, 40), (32, 48), (48, 32)}


def test_as_many_classes_as_outputs_are_taken_in_sorted_order(tmp_path) -> None:
    torch.manual_seed(0)
    torch.save(create("resnet20:width=0.25", 3).state_dict(), tmp_path / "mine.pth")
    (tmp_path / "data").mkdir()
    _set(tmp_path / "data", ["ant", "bee", "cat"], [(32, 32)])
    result = evaluate("resnet20:width=0.25", str(tmp_path / "data"), weights=tmp_path / "mine.pth", per_class=True)
    assert result["classes"] == ["ant", "bee", "cat"]
    assert np.array(result["confusion"]).sum(1).tolist() == [2, 2, 2]
    (tmp_path / "data" / "dog").mkdir()
    _picture(32, 32, 0).save(tmp_path / "data" / "dog" / "0.png")
    with pytest.raises(UsageError, match=r"3 outputs and .* 4 classes"):
        evaluate("resnet20:width=0.25", str(tmp_path / "data"), weights=tmp_path / "mine.pth")


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (["tench", "goldfishes"], "'goldfishes' .* none of the 1000 .* did you mean 'goldfish'"),
        (["tench", "CARDIGAN"], "'CARDIGAN' .* may be .*'Cardigan' .* or 'cardigan'"),
        (["tench", "n01440764"], "are the same class"),
        (["tench", "1000"], "'1000' .* none of the 1000"),
        (["0", "1", "2"], "only numbers, 3 of them, and the network has 1000"),
    ],
)
def test_classes_that_cannot_be_told_are_named(files, tmp_path, folders, sentence) -> None:
    if imagenet_synsets() is None:
        pytest.skip("needs timm's WordNet ids")
    _set(tmp_path, folders, [(32, 32)])
    with pytest.raises(UsageError, match=sentence):
        evaluate("resnet18", str(tmp_path), weights=files / "resnet18-f37072fd.pth", image_size=32)


def test_names_that_differ_in_capitals_alone_are_told_apart(files, tmp_path) -> None:
    _set(tmp_path, ["Cardigan", "cardigan"], [(32, 32)])
    result = evaluate(
        "resnet18", str(tmp_path), weights=files / "resnet18-f37072fd.pth", image_size=32, per_class=True
    )
    assert [i for i, share in enumerate(result["per_class"]) if share is not None] == [
        i for i, name in enumerate(imagenet_classes()) if name.lower() == "cardigan"
    ]


def test_a_network_with_loaded_weights_is_scored_as_its_spec(files, tmp_path) -> None:
    _set(tmp_path, ["tench", "goldfish"], [(100, 120)])
    path = files / "timm" / "model.safetensors"
    expected = evaluate("resnet18", str(tmp_path), weights=path)
    module = create("resnet18", weights=path)
    assert evaluate(module, str(tmp_path), test=str(tmp_path))["metrics"] == expected["metrics"]


def test_the_file_of_a_run_is_fed_as_the_run(run) -> None:
    own = evaluate(run.folder, "digits")
    again = evaluate(run.card["spec"], "digits", weights=run.folder / "model.safetensors")
    assert again == own
    images = load_data("digits")
    other = replace(images, preprocessing=replace(images.preprocessing, mean=(0.9, 0.9, 0.9)))
    given = evaluate(run.folder, other, mean=run.load().preprocessing.mean)
    assert given == own
    assert evaluate(run.folder, "digits", mean=(0.9, 0.9, 0.9)) == evaluate(run.folder, other) != own


def test_every_kind_of_data_takes_a_preprocessing(monkeypatch) -> None:
    given = Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 40, "bicubic")
    digits = load_data("digits", preprocessing=given)
    assert digits.preprocessing == replace(given, resize=None, interpolation="bicubic"), "they keep their canvas"
    with pytest.raises(UsageError, match="leave image_size and resize out"):
        load_data("digits", resize=40)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    split = Split(StackedImages(pixels, labels), labels, list("abcd"), 2)
    monkeypatch.setattr("excite.data.load.load_cifar", lambda kind, root: (("a", "b"), split, split))
    for preprocessing in (given, replace(given, size=24), replace(given, resize=None)):
        images = load_data("cifar10", preprocessing=preprocessing)
        assert images.preprocessing == preprocessing
        assert images.test is not None
        (fed, _, _), *_ = Loader(images.test, images.preprocessing, 4, seed=0)
        expected = torch.stack([fit_image(image, preprocessing) for image in pixels])
        assert torch.equal(fed, normalise(expected, preprocessing))
    assert load_data("cifar10", mean=(0.5, 0.5, 0.5), preprocessing=given).preprocessing.mean == (0.5, 0.5, 0.5)


# --- training ------------------------------------------------------------------------------------------------------


def test_training_goes_on_with_the_mean_of_the_weights(tmp_path) -> None:
    torch.manual_seed(0)
    spec = "resnet20:width=0.25"
    safetensors.torch.save_file(create(spec, 10).state_dict(), tmp_path / "model.safetensors")
    config = {**TIMM_CONFIG, "mean": [0.1, 0.2, 0.3]}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    start = {"network.spec": spec, "network.weights": str(tmp_path / "model.safetensors")}
    run = fit(quick(**start), tmp_path / "run")
    assert run.recipe.data.mean == (0.1, 0.2, 0.3)
    assert run.recipe.data.std == (0.3, 0.2, 0.25)
    fed = run.load().preprocessing
    assert (fed.mean, fed.std) == ((0.1, 0.2, 0.3), (0.3, 0.2, 0.25))
    assert (fed.size, fed.resize) == (32, None), "size and crop are the data's"
    # What is asked for goes first; and the data may have been read before, as the verbs do it.
    asked = fit(quick(**start, **{"data.mean": [0.5, 0.5, 0.5]}), tmp_path / "asked", data=load_data("digits"))
    assert asked.recipe.data.mean == (0.5, 0.5, 0.5)
    assert asked.load().preprocessing.std == (0.3, 0.2, 0.25)
    assert math.isfinite(evaluate(asked.folder, "digits")["metrics"]["loss"])

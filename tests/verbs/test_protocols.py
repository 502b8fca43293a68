"""Protocols, ensembles and their probabilities, held against torchvision's crops and sums done by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick import quick
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from typer.testing import CliRunner

from excite.cli import app
from excite.create import create
from excite.data import ImageData, Split, from_datasets, load_data
from excite.data.encoded import DecodedImages
from excite.errors import UsageError
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from excite.training.fit import fit
from excite.training.run import Run
from excite.verbs.evaluate import evaluate
from excite.verbs.protocols import parse_protocol
from excite.verbs.protocols_score import Answers, together

PREPROCESSING = Preprocessing(24, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 28)
CLASSES = 8


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    sides = torch.randint(26, 50, (20, 2), generator=draw).tolist()
    return [torch.randint(0, 256, (3, *side), dtype=torch.uint8, generator=draw) for side in sides]


@pytest.fixture(scope="module")
def data(images: list[Tensor]) -> ImageData:
    labels = torch.arange(len(images)) * 3 % CLASSES
    split = Split(DecodedImages(images, labels), labels, [f"{i}.png" for i in range(len(images))], CLASSES)
    names = tuple(f"class {chr(97 + i)}" for i in range(CLASSES))
    return ImageData("images", names, PREPROCESSING, None, None, split)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create("resnet20:width=0.25", CLASSES).eval()


def chances(net: nn.Module, views: Tensor) -> np.ndarray:
    """The mean of the probabilities over uint8 views."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    with torch.inference_mode():
        return net((views / 255 - mean) / std).double().softmax(1).mean(0).numpy()


def expected(probabilities: list[np.ndarray], data: ImageData) -> dict[str, float]:
    """The metrics of probabilities, by scikit-learn and by their definition."""
    assert data.test is not None
    table, labels = np.stack(probabilities), data.test.labels.numpy()
    scores = {f"top{k}": 100 * top_k_accuracy_score(labels, table, k=k, labels=range(CLASSES)) for k in (1, 5)}
    return scores | {"loss": float(-np.log(table[np.arange(len(labels)), labels]).mean())}


def shorter(image: Tensor, side: int) -> Tensor:
    return F.resize(image, [side], antialias=True)


def center(image: Tensor, size: int, side: int) -> Tensor:
    return F.center_crop(shorter(image, side), [size])[None]


def ten(image: Tensor, size: int, side: int) -> Tensor:
    return torch.stack(F.ten_crop(shorter(image, side), [size]))


def flipped(image: Tensor, size: int, side: int) -> Tensor:
    both = image, F.horizontal_flip(image)
    return torch.cat([center(one, size, side) for one in both])


def several(image: Tensor) -> Tensor:
    views = []
    for side in (26, 32):
        sized = shorter(image, side)
        height, width = sized.shape[-2:]
        for top in (0, round((height - 24) / 2), height - 24):
            for left in (0, round((width - 24) / 2), width - 24):
                views.append(sized[:, top : top + 24, left : left + 24])
    return torch.stack(views)


@pytest.mark.parametrize(
    ("protocol", "name", "views"),
    [
        ("center-crop", "center-crop(24,28)", lambda image: center(image, 24, 28)),
        ("center-crop(28, 32)", "center-crop(28,32)", lambda image: center(image, 28, 32)),
        ("center-crop:32", "center-crop(32,32)", lambda image: center(image, 32, 32)),
        ("center-crop(72)", "center-crop(72,82)", lambda image: center(image, 72, 82)),
        ("center-crop:24,32,flip", "center-crop(24,32,flip)", lambda image: flipped(image, 24, 32)),
        ("ten-crop", "ten-crop(24,28)", lambda image: ten(image, 24, 28)),
        ("ten-crop(28,33)", "ten-crop(28,33)", lambda image: ten(image, 28, 33)),
        ("multi-crop(scales=26/32)", "multi-crop(24,scales=26/32,grid=3)", several),
    ],
)
def test_probabilities_are_averaged_over_the_views(images, data, protocol, name, views) -> None:
    net = network(0)
    said = evaluate(net, data, protocol=protocol)
    wanted = expected([chances(net, views(image)) for image in images], data)
    assert said["metrics"] == pytest.approx(wanted, rel=1e-4)
    assert said["errors"] == pytest.approx({key: 100 - wanted[key] for key in ("top1", "top5")})
    assert said["protocol"] == {"name": name, "views": len(views(images[0]))}
    assert said["count"] == len(images)


def test_the_networks_own_crop_is_what_no_protocol_shows(data) -> None:
    plain, named = evaluate(network(0), data), evaluate(network(0), data, protocol="center-crop")
    assert named["metrics"] == pytest.approx(plain["metrics"], rel=1e-5)
    assert "protocol" not in plain


def test_it_does_not_matter_how_many_views_are_in_work_at_once(data, monkeypatch) -> None:
    whole = evaluate(network(0), data, protocol="ten-crop")
    monkeypatch.setattr("excite.verbs.protocols_score.BATCH", 7)
    assert evaluate(network(0), data, protocol="ten-crop")["metrics"] == pytest.approx(whole["metrics"], rel=1e-4)
    assert evaluate(network(0), data, protocol="ten-crop", workers=2)["metrics"] == pytest.approx(
        whole["metrics"], rel=1e-4
    )


def test_the_module_is_left_as_it_was(data) -> None:
    net = network(0).train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    evaluate(net, data, protocol="ten-crop")
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_a_users_float_images_are_input_already(images, data) -> None:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    square = [F.center_crop(image, [26]) for image in images]
    as_input = [
        ((image / 255 - mean) / std, int(label)) for image, label in zip(square, data.test.labels, strict=True)
    ]
    own = from_datasets(None, as_input, classes=data.classes)  # type: ignore[arg-type]
    net = network(0)
    tables = []
    for image, _ in as_input:
        with torch.inference_mode():
            tables.append(net(torch.stack(F.ten_crop(image, [20]))).double().softmax(1).mean(0).numpy())
    assert evaluate(net, own, protocol="ten-crop(20,26)")["metrics"] == pytest.approx(
        expected(tables, data), rel=1e-4
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("centre-crop(224)", "did you mean 'center-crop'"),
        ("ten-crop(224", "parentheses"),
        ("center-crop(256,224)", "crops 256 pixels of only 224"),
        ("center-crop(0)", "not a number of pixels"),
        ("center-crop(9999999999999)", "not a number of pixels"),
        ("center-crop(-1)", "first come"),
        ("center-crop(flip,224)", "first come"),
        ("center-crop(224,,)", "first come"),
        ("multi-crop(224,256)", "one number comes first"),
        ("multi-crop(scale=3)", "did you mean 'scales'"),
        ("multi-crop(scales=a/b)", "whole numbers with /"),
        ("multi-crop(grid=0)", "from 1 to 99"),
        ("center-crop(grid=3)", "grid is for multi-crop"),
        ("center-crop(flip,flip)", "comes twice"),
        ("center-crop(flip=yes)", "takes no value"),
        ("multi-crop(grid)", "needs a value"),
        ("", "there are center-crop"),
    ],
)
def test_what_is_no_protocol_is_refused(text, said) -> None:
    with pytest.raises(UsageError, match=said):
        parse_protocol(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ten-crop(224,224)", r"such as ten-crop\(224,256\)"),
        ("multi-crop(scales=200)", "crops 224 pixels"),
        ("multi-crop(grid=40,scales=256)", "1600 views"),
    ],
)
def test_what_does_not_suit_the_network_is_refused(text, said) -> None:
    with pytest.raises(UsageError, match=said):
        parse_protocol(text).views(Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, 256))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("center-crop", "center-crop(224,256)"),
        ("center-crop(320)", "center-crop(320,366)"),
        ("center-crop(299,352)", "center-crop(299,352)"),
        ("center-crop(32)", "center-crop(32,32)"),
        ("ten-crop(32)", "ten-crop(32,37)"),
        ("center-crop()", "center-crop(224,256)"),
        (" ten-crop : 224 , 256 ", "ten-crop(224,256)"),
        ("multi-crop", "multi-crop(224,scales=256,grid=3)"),
        ("multi-crop:224,scales=224/256/288/320,grid=5,flip", "multi-crop(224,scales=224/256/288/320,grid=5,flip)"),
    ],
)
def test_what_is_left_open_follows(text, name) -> None:
    protocol = parse_protocol(text)
    views = protocol.views(Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, 256))
    assert protocol.named(views) == name
    assert parse_protocol(name).views(Preprocessing(1, (0,), (1,), channels=1)) == views, "the full name says it all"


# --- several networks -----------------------------------------------------------------------------------------------


def test_an_ensemble_by_hand(images, data) -> None:
    nets = [network(seed) for seed in range(3)]
    tables = [[chances(net, center(image, 24, 28)) for image in images] for net in nets]
    said = evaluate(nets, data)
    assert said["metrics"] == pytest.approx(expected(list(np.mean(tables, axis=0)), data), rel=1e-4)
    for member, table in zip(said["members"], tables, strict=True):
        assert member["source"] == "ResNet"
        assert member["metrics"] == pytest.approx(expected(table, data), rel=1e-4)
    alone = evaluate(nets[0], data)
    assert "members" not in alone
    assert evaluate([nets[0], nets[0]], data)["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
    views = evaluate(nets, data, protocol="ten-crop")
    tables = [[chances(net, ten(image, 24, 28)) for image in images] for net in nets]
    assert views["metrics"] == pytest.approx(expected(list(np.mean(tables, axis=0)), data), rel=1e-4)


def test_probabilities_too_small_for_a_float_are_still_told_apart() -> None:
    logits = torch.tensor([[0.0, -2000.0, -1000.0]])
    said = together([Answers(logits, torch.tensor([0]))] * 2).logits
    assert said.isfinite().all()
    assert said[0, 2] > said[0, 1]


def write_squares(root: Path, order: tuple[str, ...]) -> Path:
    """Class folders of coloured squares; a network's outputs are in the folders' order."""
    colours = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
    draw = np.random.default_rng(0)
    for place, name in enumerate(order):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(8):
            noise = draw.integers(-40, 40, (16, 16, 3))
            pixels = np.clip(np.array(colours[name.strip("-0123456789")]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{place}-{i}.png")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[list[Run], Path]:
    """Two runs on the same squares, the second with its classes in another order."""
    root = tmp_path_factory.mktemp("squares")
    squares = write_squares(root / "set", ("blue", "green", "red"))
    folders = []
    for seed in (0, 1):
        recipe = quick(**{"network.spec": "resnet20:width=0.25", "data.path": str(squares), "seed": seed})
        recipe = recipe.replace({"trainer.batch_size": 8, "data.val_fraction": 0.2})
        folders.append(fit(recipe, root / f"run{seed}"))
    card = json.loads((folders[1].folder / "model.json").read_text())
    network = folders[1].load().network
    shuffled = [2, 0, 1]
    with torch.no_grad():
        for tensor in _last(network):
            tensor.copy_(tensor[shuffled].clone())
    folders[1].write_model(
        network,
        replace(load_data(squares), classes=tuple(card["classes"][i] for i in shuffled)),
        spec=card["spec"],
    )
    return folders, squares


def _last(network: nn.Module) -> list[Tensor]:
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    return [linear.weight, linear.bias]


def test_members_are_brought_to_one_order_by_their_classes_names(runs, tmp_path) -> None:
    (first, second), squares = runs
    assert first.card["classes"] != second.card["classes"]
    said = evaluate([first.folder, second.folder], str(squares), per_class=True)
    assert said["classes"] == first.card["classes"]
    # By hand, image by image.
    data = load_data(squares)
    total = []
    for run in (first, second):
        trained = run.load()
        columns = [trained.classes.index(name) for name in data.classes]
        mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (trained.preprocessing.mean, trained.preprocessing.std)
        )
        assert data.test is not None
        pixels = torch.stack([data.test.images[i][0] for i in range(len(data.test))])
        with torch.inference_mode():
            total.append(trained.network((pixels / 255 - mean) / std).double().softmax(1)[:, columns])
    wanted = (total[0] + total[1]) / 2
    loss = -wanted[torch.arange(len(wanted)), data.test.labels].log().mean().item()
    assert said["metrics"]["loss"] == pytest.approx(loss, rel=1e-4)
    for run, member in zip((first, second), said["members"], strict=True):
        assert member["metrics"] == pytest.approx(evaluate(run.folder, str(squares))["metrics"], rel=1e-5)


def test_other_classes_are_refused(runs, run, tmp_path) -> None:
    (first, _), squares = runs
    with pytest.raises(UsageError, match="is none of"):
        evaluate([first.folder, run.folder], str(squares))


def test_weights_go_to_the_specs_in_turn(runs, tmp_path) -> None:
    (first, second), squares = runs
    files = [str(run.folder / "model.safetensors") for run in (first, second)]
    specs = ["resnet20:width=0.25"] * 2
    both = evaluate(specs, str(squares), weights=files)
    assert both["count"] == 24, "weights from elsewhere have learned from none of them"
    for file, member in zip(files, both["members"], strict=True):
        assert member["metrics"] == pytest.approx(evaluate(specs[0], str(squares), weights=file)["metrics"], rel=1e-5)
    mixed = evaluate([first.folder, *specs], str(squares), weights=files)
    assert mixed["count"] == evaluate(first.folder, str(squares))["count"] < 24
    with pytest.raises(UsageError, match="3 weights for 2 specs"):
        evaluate(specs, str(squares), weights=[*files, files[0]])
    with pytest.raises(UsageError, match="1 weights for 0 specs"):
        evaluate([first.folder, second.folder], str(squares), weights=files[0])
    with pytest.raises(UsageError, match="random weights"):
        evaluate(specs, str(squares))


def test_other_kinds_of_data_take_one_network_and_no_protocol(run) -> None:
    with pytest.raises(UsageError, match="one network at a time"):
        evaluate([run.folder, run.folder], "digits-words")
    with pytest.raises(UsageError, match="protocol is an option for images with classes"):
        evaluate(run.folder, "digits-words", protocol="ten-crop")
    with pytest.raises(UsageError, match="says the sizes"):
        evaluate(run.folder, "digits", protocol="ten-crop", image_size=32)


# --- temperature ----------------------------------------------------------------------------------------------------


def test_a_temperature_is_fitted_on_the_runs_validation_images(runs, monkeypatch) -> None:
    (first, _), squares = runs
    seen = []
    monkeypatch.setattr(
        "excite.verbs.evaluate_images.fit_temperature", lambda logits, labels: seen.append(labels) or 2.0
    )
    said = evaluate(first.folder, str(squares), temperature=True, calibration=True)["temperature"]
    data = load_data(squares, val_fraction=0.2)
    assert data.val is not None
    assert seen[0].tolist() == data.val.labels.tolist()
    assert said["fitted_on"] == len(data.val)
    assert said["temperature"] == 2.0
    trained = first.load()
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (trained.preprocessing.mean, trained.preprocessing.std)
    )
    assert data.test is not None
    pixels = torch.stack([data.test.images[i][0] for i in range(len(data.test))])
    with torch.inference_mode():
        logits = trained.network((pixels / 255 - mean) / std)
    for when, factor in (("before", 1), ("after", 2)):
        loss = nn.functional.cross_entropy(logits / factor, data.test.labels).item()
        assert said[when]["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_temperature_is_never_fitted_on_test_images(runs, run, tmp_path) -> None:
    (first, _), squares = runs
    with pytest.raises(UsageError, match="images of the test"):
        evaluate(first.folder, str(squares), temperature=True, calibration_data=str(squares))
    copy = tmp_path / "elsewhere"
    shutil.copytree(squares, copy)
    with pytest.raises(UsageError, match="images of the test"):
        evaluate(first.folder, str(squares), temperature=True, calibration_data=str(copy))
    with pytest.raises(UsageError, match="no validation images"):
        evaluate(run.folder, "digits", temperature=True)
    with pytest.raises(UsageError, match="only a run knows"):
        evaluate(
            "resnet20:width=0.25",
            str(squares),
            weights=first.folder / "model.safetensors",
            temperature=True,
        )
    with pytest.raises(UsageError, match="ask for temperature"):
        evaluate(first.folder, str(squares), calibration_data=str(squares))
    with pytest.raises(UsageError, match="each other's validation images"):
        evaluate([first.folder, run.folder], str(squares), temperature=True)


def test_the_command_shows_it_all(run, tmp_path) -> None:
    command = ["evaluate", str(run.folder), str(run.folder), "--data", "digits", "--protocol", "ten-crop:28,32"]
    done = CliRunner().invoke(app, [*command, "--calibration"])
    assert done.exit_code == 0, done.output
    for words in (
        "ten-crop(28,32): the mean probabilities of 10 views",
        "error",
        "Expected calibration error",
        "alone",
    ):
        assert words in done.output
    said = json.loads(CliRunner().invoke(app, [*command, "--calibration", "--json"]).stdout)
    assert said["protocol"] == {"name": "ten-crop(28,32)", "views": 10}
    assert len(said["members"]) == 2
    assert set(said["calibration"]) == {"ece", "mce", "bins"}
    assert sum(one["count"] for one in said["calibration"]["bins"]) == said["count"]

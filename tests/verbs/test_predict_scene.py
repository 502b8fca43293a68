"""The map of a scene by a run that was trained on one: its files, its figures, and what is refused."""

import json
import sys

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from sklearn.metrics import accuracy_score

from excite.cli import main
from excite.data.hyperspectral import load_scene
from excite.errors import ExciteError, UsageError
from excite.training.fit import fit
from excite.training.recipe import load
from excite.training.run import Run
from excite.verbs.predict_scene import predict_scene

ROWS, COLS, BANDS, WINDOW = 26, 31, 8, 5
NUMBERS = (2, 3, 7)


def write_scene(folder, name="field", bands=BANDS):
    """A scene of three crops in stripes, with numbers that leave some out, half of it labelled."""
    draw = np.random.default_rng(0)
    truth = np.array(NUMBERS)[np.arange(COLS) // 11][None].repeat(ROWS, 0)
    spectra = draw.normal(100, 20, (8, bands))
    cube = spectra[truth] + draw.normal(0, 5, (ROWS, COLS, bands))
    truth = np.where(draw.random(truth.shape) < 0.5, truth, 0)
    np.save(folder / f"{name}.npy", cube.astype(np.float32))
    np.save(folder / f"{name}_gt.npy", truth.astype(np.uint8))
    (folder / f"{name}_classes.txt").write_text("water\ncorn\nwheat\nrye\nhops\nbeet\noats\n")
    return folder / f"{name}.npy", truth


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def field(scene, tmp_path_factory):
    """A finished run on the scene."""
    settings = {
        "data.path": str(scene[0]), "data.window": WINDOW, "data.components": 4, "data.train_ratio": 0.3,
        "network.spec": "hybridsn:width=0.5,dropout=0.4", "trainer.epochs": 3, "trainer.batch_size": 16,
        "trainer.threads": 1, "trainer.precision": "fp32",
    }  # fmt: skip
    return fit(load("hybridsn-indian-pines").replace(settings), tmp_path_factory.mktemp("runs") / "field")


def expected_numbers(run, path):
    """The class number of every pixel, each from its own window."""
    trained = Run(run.folder).load()
    data = load_scene(str(path), window=WINDOW, spectra=trained.spectra, classes=trained.classes, all_for_test=True)
    windows = data.padded.unfold(1, WINDOW, 1).unfold(2, WINDOW, 1).permute(1, 2, 0, 3, 4)
    with torch.no_grad():
        labels = trained.network(windows.reshape(-1, *windows.shape[2:])).argmax(1)
    return np.array(NUMBERS)[labels.numpy()].reshape(ROWS, COLS)


def test_numbers_are_those_of_the_ground_truth(field, scene, tmp_path) -> None:
    path, truth = scene
    result = predict_scene(field.folder, str(path), tmp_path / "map.npy")
    numbers = np.load(tmp_path / "map.npy")
    np.testing.assert_array_equal(numbers, expected_numbers(field, path))
    assert numbers.dtype == np.uint8
    assert (result["rows"], result["cols"], result["dense"], result["trained_here"]) == (ROWS, COLS, True, True)
    assert [entry["number"] for entry in result["classes"]] == list(NUMBERS)
    for entry in result["classes"]:
        assert entry["pixels"] == (numbers == entry["number"]).sum()
        assert entry["share"] == pytest.approx(entry["pixels"] / (ROWS * COLS))
    known = truth > 0
    assert result["labelled"] == known.sum()
    assert result["agreement"] == pytest.approx(100 * accuracy_score(truth[known], numbers[known]))
    json.dumps(result, allow_nan=False)


def test_nothing_is_written_where_nothing_is_asked_for(field, scene) -> None:
    assert predict_scene(field.folder, str(scene[0]))["out"] is None


@pytest.mark.parametrize("passes", [0, 3])
def test_a_picture(field, scene, tmp_path, passes) -> None:
    result = predict_scene(field.folder, str(scene[0]), tmp_path / "map.png", passes=passes)
    with Image.open(result["out"]) as picture:
        assert picture.format == "PNG"
        scale = 560 // COLS
        assert picture.width > (4 if passes else 3) * COLS * scale


def test_another_scene_with_its_place_on_the_earth(field, scene, tmp_path) -> None:
    cube = np.moveaxis(np.load(scene[0]), 2, 0)
    profile = {"driver": "GTiff", "width": COLS, "height": ROWS, "count": BANDS, "dtype": "float32"}
    transform = rasterio.Affine(20, 0, 500_000, 0, -20, 4_000_000)
    with rasterio.open(tmp_path / "other.tif", "w", **profile, crs="EPSG:32616", transform=transform) as file:
        file.write(cube)
    result = predict_scene(field.folder, str(tmp_path / "other.tif"), tmp_path / "map.tif")
    assert (result["agreement"], result["labelled"], result["trained_here"]) == (None, 0, False)
    with rasterio.open(tmp_path / "map.tif") as back:
        np.testing.assert_array_equal(back.read(1), expected_numbers(field, scene[0]))
        assert (back.transform, back.crs.to_epsg()) == (transform, 32616)
        assert back.tags(1) == {"CLASS_0": "unlabelled", "CLASS_2": "corn", "CLASS_3": "wheat", "CLASS_7": "oats"}


def test_a_ground_truth_of_other_classes_is_not_compared(field, scene, tmp_path, caplog) -> None:
    path, _ = write_scene(tmp_path, "other")
    (tmp_path / "other_classes.txt").write_text("a\nb\nc\nd\ne\nf\ng\n")
    result = predict_scene(field.folder, str(path), tmp_path / "map.png")
    assert result["agreement"] is None
    assert "none of the network's classes" in caplog.text


def test_a_class_that_the_network_does_not_know_is_left_out(field, scene, tmp_path) -> None:
    path, truth = write_scene(tmp_path, "other")
    (tmp_path / "other_classes.txt").write_text("water\ncorn\nrice\nrye\nhops\nbeet\noats\n")
    assert predict_scene(field.folder, str(path))["labelled"] == (truth[truth > 0] != 3).sum()


def test_where_nothing_can_be_written_nothing_is_mapped(field, scene, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("excite.verbs.predict_scene.map_scene", lambda *_, **__: pytest.fail("it was mapped"))
    with pytest.raises(ExciteError, match="Cannot write"):
        predict_scene(field.folder, str(scene[0]), tmp_path / "file" / "map.npy")


def test_what_is_refused(field, run, scene, tmp_path) -> None:
    path = str(scene[0])
    with pytest.raises(UsageError, match=r"map\.jpg: a map is written as \.png"):
        predict_scene(field.folder, path, tmp_path / "map.jpg")
    with pytest.raises(UsageError, match="was trained on images"):
        predict_scene(run.folder, path)
    wide, _ = write_scene(tmp_path, "wide", bands=9)
    with pytest.raises(UsageError, match=r"wide\.npy has 9 bands.*spectra of 8"):
        predict_scene(field.folder, str(wide))
    np.save(tmp_path / "thin.npy", np.zeros((3, 40, BANDS), np.float32))
    with pytest.raises(UsageError, match=r"window of 5 pixels is larger than .*thin\.npy, which is 3×40"):
        predict_scene(field.folder, str(tmp_path / "thin.npy"))
    assert not list(tmp_path.glob("map*"))


# --- the command line ------------------------------------------------------------------------------------------


@pytest.fixture
def excite(monkeypatch, capsys):
    """The command line without a process of its own: its exit code and what it printed."""

    monkeypatch.setenv("EXCITE_KEEP_BUFFERS", "0")  # this process is not ours alone

    def call(*arguments, verb="predict"):
        monkeypatch.setattr(sys, "argv", ["excite", verb, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return call


def test_from_the_command_line(excite, field, scene, tmp_path) -> None:
    out = tmp_path / "map.png"
    code, printed, _ = excite(field.folder, scene[0], "--out", out, "--mc-dropout", 2, "--json")
    assert code == 0
    assert json.loads(printed)["out"] == str(out)
    assert out.is_file()
    code, printed, _ = excite(field.folder, scene[0])
    assert code == 0
    assert "wheat" in printed
    assert "the whole scene at once" in printed
    assert "those trained on included: no test" in printed


def test_brackets_in_names_are_no_markup(excite, field, scene, tmp_path, monkeypatch) -> None:
    odd = [{"class": "[/x]", "number": 2, "pixels": 9, "share": 1.0}]
    mapped = predict_scene(field.folder, str(scene[0])) | {"classes": odd, "out": "[/x].png"}
    monkeypatch.setattr("excite.verbs.predict_scene.predict_scene", lambda *_, **__: mapped)
    code, printed, _ = excite(field.folder, scene[0])
    assert (code, printed.count("[/x]")) == (0, 2)

    named = [{"file": "[/a].png", "predictions": [{"class": "[/b]", "probability": 0.5}]}]
    named.append({"file": "[c].png", "error": "[/d] is no picture"})
    monkeypatch.setattr("excite.verbs.predict.predict", lambda *_, **__: named)
    code, printed, _ = excite("resnet20", "x.png", "--weights", "w.pt")
    assert code == 1
    for text in ("[/a].png", "[/b] 50.0 %", "[c].png", "[/d] is no picture"):
        assert text in printed

    scored = {"metrics": {"top1": 50.0}, "count": 2, "samples": "images", "classes": ["[/e]", "[/f]"]}
    scored |= {"per_class": [0.0, 100.0], "confusion": [[0, 1], [0, 1]]}
    monkeypatch.setattr("excite.verbs.evaluate.evaluate", lambda *_, **__: scored)
    code, printed, _ = excite("resnet20", "--data", "digits", "--per-class", verb="evaluate")
    assert code == 0
    assert "[/e]" in printed
    assert "[/f] (1)" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("FIELD", "SCENE", "--top", "3"), "--top is an option for images"),
        (("FIELD", "SCENE", "--format", "csv"), "--format is an option for images"),
        (("FIELD", "SCENE", "SCENE"), "give it one scene, not 2"),
        (("FIELD", "photo.png"), "photo.png is no hyperspectral scene"),
        (("DIGITS", "SCENE", "--out", "map.png"), "--out is an option for hyperspectral scenes"),
        (("DIGITS", "SCENE", "--mc-dropout", "3"), "--mc-dropout is an option for hyperspectral scenes"),
    ],
)
def test_options_of_the_other_kind(excite, field, run, scene, arguments, sentence) -> None:
    places = {"FIELD": field.folder, "DIGITS": run.folder, "SCENE": scene[0]}
    code, _, told = excite(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert told.startswith("excite: ")
    assert sentence in told
    assert told.count("\n") == 1

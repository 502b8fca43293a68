"""Exported networks: the file alone against the original, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from excite.data import load_data
from excite.deploy import engines_choice
from excite.deploy import export as files
from excite.deploy.quantize import LayerError
from excite.errors import ExciteError, UsageError
from excite.verbs.export import export
from excite.verbs.predict import predict

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_exported.py"

# Runs the example as on a machine where excite is not installed.
WITHOUT_EXCITE = """
import runpy, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "excite":
            raise ImportError("excite is hidden")
sys.meta_path.insert(0, Hidden())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Test digits of the input's size, and one larger that has to be resized."""
    folder = tmp_path_factory.mktemp("pictures")
    split = load_data("digits").test
    assert split is not None
    for i in range(5):
        image = Image.fromarray(split.images[i][0].permute(1, 2, 0).numpy())
        image.save(folder / f"{i}.png")
    image.resize((90, 60), Image.Resampling.BICUBIC).save(folder / "large.png")
    return folder


@pytest.fixture(scope="module")
def packages() -> list[files.Package]:
    """What was converted for ``in_onnx``, to be written again."""
    return []


@pytest.fixture(scope="module")
def in_onnx(run, packages, tmp_path_factory) -> dict:
    convert = files.package

    def kept(*given, **options) -> files.Package:
        packages.append(convert(*given, **options))
        return packages[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "package", kept)
        return export(run.folder, "onnx", out=tmp_path_factory.mktemp("exports") / "onnx", images=100)


@pytest.fixture(scope="module")
def baked(run, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("exports") / "openvino"
    return export(run.folder, "openvino", out=out, images=100, bake_preprocessing=True, dynamic_batch=True)


def by_example(folder: str, pictures: Path) -> list[dict[str, float]]:
    names = sorted(map(str, pictures.iterdir()))
    command = [sys.executable, "-I", "-c", WITHOUT_EXCITE, str(EXAMPLE), folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line)["predictions"] for line in done.stdout.splitlines()]


def by_predict(source: str | Path, pictures: Path) -> list[dict[str, float]]:
    rows = predict(source, [pictures], top=10)
    return [{guess["class"]: guess["probability"] for guess in row["predictions"]} for row in rows]


def check_same(found: list[dict[str, float]], wanted: list[dict[str, float]], within: float) -> None:
    """Of images of the input's size nearly to the last digit; Pillow resizes a little otherwise than torchvision."""
    assert len(found) == len(wanted) == 6
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for name, probability in one.items():
            assert probability == pytest.approx(other[name], abs=within if i < 5 else 0.02)


def test_the_file_alone_says_what_the_run_says(run, in_onnx, baked, pictures) -> None:
    wanted = by_predict(run.folder, pictures)
    for card in (in_onnx, baked):
        check_same(by_example(card["out"], pictures), wanted, 1e-4)
        check_same(by_predict(card["out"], pictures), wanted, 1e-4)


def test_the_card_says_what_was_verified_and_how_the_file_is_used(run, in_onnx, baked) -> None:
    for card in (in_onnx, baked):
        written = json.loads((Path(card["out"]) / "model.json").read_text())
        assert written == {key: value for key, value in card.items() if key != "out"}
        assert card["verification"]["images"] == "test images"
        assert card["verification"]["count"] == 100
        assert card["verification"]["top1_agreement"] == 100
        assert 0 < card["verification"]["max_relative"] < 1e-4
        accuracy = card["verification"]["accuracy"]
        assert accuracy["before"] == accuracy["after"]
        assert card["classes"] == list(run.load().classes)
        folder = Path(card["out"])
        assert {path.name for path in folder.iterdir()} - {"engines.json"} == {"model.json", *card["files"]}
        for name in card["files"]:
            assert str(EXAMPLE.parents[1]).encode() not in (folder / name).read_bytes()
    size = in_onnx["preprocessing"]["size"]
    assert in_onnx["input"] == {"name": "images", "dtype": "float32", "shape": [1, 3, size, size]}
    assert baked["input"] == {"name": "images", "dtype": "uint8", "shape": ["N", 3, size, size]}


def test_the_accuracy_is_that_of_the_original_on_these_images(run, in_onnx) -> None:
    trained, split = run.load(), load_data("digits").test
    assert split is not None
    pixels = torch.stack([split.images[i][0] for i in range(100)]) / 255
    mean, std = torch.tensor([trained.preprocessing.mean, trained.preprocessing.std])[..., None, None]
    images = (pixels - mean) / std
    with torch.inference_mode():
        right = (trained.network(images).argmax(1) == split.labels[:100]).sum()
    assert in_onnx["verification"]["accuracy"] == {"count": 100, "before": float(right), "after": float(right)}


def test_predict_by_an_engine_remembers_how_it_was_quickest(run, baked, pictures, caplog, monkeypatch) -> None:
    monkeypatch.setattr(engines_choice, "_SECONDS", 0.01)
    wanted = by_predict(run.folder, pictures)
    with caplog.at_level("INFO", "excite"):
        check_same(by_predict(baked["out"], pictures), wanted, 1e-4)
        check_same(by_predict(baked["out"], pictures), wanted, 1e-4)
    assert "as chosen before" in caplog.text
    kept = json.loads((Path(baked["out"]) / "engines.json").read_text())
    assert len(kept) == 1
    (choice,) = kept.values()
    assert choice["batch"] in (1, 4)
    assert choice["rates"]
    rows = list(predict(run.folder, [pictures], top=10, engine="torch"))
    found = [{guess["class"]: guess["probability"] for guess in row["predictions"]} for row in rows]
    check_same(found, wanted, 1e-4)


def test_a_damaged_file_is_refused(in_onnx, pictures, tmp_path) -> None:
    for path in Path(in_onnx["out"]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[:-1])
    with pytest.raises(ExciteError, match=r"model\.onnx is missing or damaged"):
        list(predict(tmp_path, [pictures]))


def test_eight_bits(run, tmp_path) -> None:
    card = export(run.folder, "onnx", precision="int8", out=tmp_path, images=200, calibration=50, max_drop=5)
    accuracy = card["verification"]["accuracy"]
    assert accuracy["after"] >= accuracy["before"] - 5
    assert card["verification"]["max_relative"] > 1e-3, "it is in 8 bits"
    assert card["int8"]["calibration"] == "training images of digits"
    assert len(card["int8"]["worst_layers"]) == 5


def test_eight_bits_that_cost_too_much_leave_nothing_and_name_layers(
    run, in_onnx, packages, tmp_path, monkeypatch
) -> None:
    made = files.engine
    lost = dataclasses.replace(packages[0], blame=lambda images: [LayerError("layer1.0.conv1", 7.4)])
    monkeypatch.setattr(files, "package", lambda *_, **__: lost)
    monkeypatch.setattr(files, "engine", lambda *given: lambda images: -made(*given)(images))
    with pytest.raises(ExciteError, match=r"8 bits cost .* points .*layer1\.0\.conv1 \(7 dB\).*--max-drop"):
        export(run.folder, "onnx", precision="int8", out=tmp_path / "out", images=50)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_answers_otherwise_is_not_put_in_place(run, in_onnx, packages, tmp_path, monkeypatch) -> None:
    made = files.engine
    monkeypatch.setattr(files, "package", lambda *_, **__: packages[0])
    monkeypatch.setattr(files, "engine", lambda *given: lambda images: 1.01 * made(*given)(images))
    with pytest.raises(ExciteError, match="does not answer as the network does"):
        export(run.folder, "onnx", out=tmp_path / "out", images=2)
    assert list((tmp_path / "out").iterdir()) == []


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "excite", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_wrong_requests_are_one_sentence(run, in_onnx, pictures, tmp_path) -> None:
    with pytest.raises(UsageError, match="onnx"):
        export(run.folder, "onxx")
    with pytest.raises(UsageError, match="8 bits are made for openvino and onnx"):
        export(run.folder, "torch", precision="int8")
    with pytest.raises(UsageError, match="no bf16"):
        export(run.folder, "onnx", precision="bf16")
    with pytest.raises(UsageError, match="not a run"):
        export(tmp_path, "onnx")
    with pytest.raises(UsageError, match="is a run: choose another folder"):
        export(run.folder, "onnx", out=run.folder)
    with pytest.raises(UsageError, match="was exported to onnx"):
        list(predict(in_onnx["out"], [pictures], engine="openvino"))
    with pytest.raises(UsageError, match="settled"):
        list(predict(in_onnx["out"], [pictures], image_size=16))
    with pytest.raises(UsageError, match="unknown engine"):
        list(predict(run.folder, [pictures], engine="tensorrt"))
    done = command("export", str(tmp_path), "--to", "openvino")
    assert done.returncode == 2
    assert done.stderr.startswith("excite: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_program_of_torch_export_and_its_machine_code(run, pictures, tmp_path, precision) -> None:
    card = export(run.folder, "torch", precision=precision, out=tmp_path, images=100, dynamic_batch=True)
    assert card["notes"]
    within = 1e-4 if precision == "fp32" else 0.05
    wanted = by_predict(run.folder, pictures)
    check_same(by_example(card["out"], pictures), wanted, within)
    check_same(by_predict(card["out"], pictures), wanted, within)

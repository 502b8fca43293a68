"""One image through a trained network, from its file to what can be written as JSON."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from attentive import CLASSES, SPEC, attentive_run, write_image, write_statistics
from PIL import Image
from torch import nn

from excite.data.images import decode, fit, normalise
from excite.errors import ExciteError, UsageError
from excite.verbs.explain_image import explain_image


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return attentive_run(tmp_path_factory.mktemp("runs") / "attentive")


@pytest.fixture
def file(tmp_path):
    return write_image(tmp_path / "picture.png")


def test_it_says_what_the_network_says(run, file) -> None:
    found = explain_image(run.folder, file)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["network"], found["classes"], found["image"]) == (SPEC, list(CLASSES), str(file))
    trained = run.load()
    seen = fit(decode(file.read_bytes()), trained.preprocessing)
    gates = []
    for name, module in trained.network.named_modules():
        if name.endswith(".se.gate"):
            module.register_forward_hook(lambda module, given, answer: gates.append(answer[0].tolist()))
    with torch.inference_mode():
        likely = trained.network(normalise(seen[None], trained.preprocessing)).softmax(1)[0]
    look = found["looks"][0]
    for row in look["predictions"]:
        assert row["probability"] == pytest.approx(float(likely[row["index"]]), abs=1e-3)
        assert row["class"] == CLASSES[row["index"]]
    assert [row["index"] for row in look["predictions"]] == likely.argsort(descending=True).tolist()
    assert len(look["excitation"]) == len(gates) == 9
    for unit, expected in zip(look["excitation"], gates, strict=True):
        np.testing.assert_allclose(unit["gates"], expected, atol=1e-4)
    given = Image.open(io.BytesIO(base64.b64decode(look["seen"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(given), seen.permute(1, 2, 0).numpy())
    assert len(look["selection"]) == 9
    for unit in look["selection"]:
        assert sum(unit["attention"]) == pytest.approx(1, abs=1e-3)
        assert sum(unit["chosen"]) == pytest.approx(1, abs=1e-3)
    for part, name in (("receptive_field", "field"), ("activation", "map")):
        values = np.array(look[part][name])
        assert values.shape == (24, 24)
        assert values.min() >= 0
        assert values.max() == 1


def test_scales_are_of_one_class(run, file) -> None:
    looks = explain_image(run.folder, file, scales=(1.0, 1.5, 2.0))["looks"]
    assert [look["scale"] for look in looks] == [1.0, 1.5, 2.0]
    assert len({look["target"] for look in looks}) == 1
    assert looks[0]["target"] == looks[0]["predictions"][0]["index"]
    assert len({look["seen"] for look in looks}) == 3


def test_gates_are_held_against_the_statistics_of_the_run(tmp_path, file) -> None:
    run = attentive_run(tmp_path / "run")
    assert explain_image(run.folder, file)["statistics"] is None
    path = write_statistics(run)
    found = explain_image(run.folder, file)
    assert found["statistics"] == str(path)
    look = found["looks"][0]
    for unit in look["excitation"]:
        assert unit["against"] == "class"
        assert set(unit["reference"]) == {(look["target"] + 1) / 4}
    moved = path.rename(tmp_path / "elsewhere.npz")
    assert explain_image(run.folder, file, statistics=moved)["looks"] == found["looks"]
    write_statistics(run, counts=np.zeros(3))
    assert {unit["against"] for unit in explain_image(run.folder, file)["looks"][0]["excitation"]} == {"unit"}


def test_what_cannot_be_done_is_refused(tmp_path, run, file) -> None:
    with pytest.raises(UsageError, match=r"nothing.jpg is not a file"):
        explain_image(run.folder, tmp_path / "nothing.jpg")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ExciteError, match=r"text.png cannot be read as an image"):
        explain_image(run.folder, tmp_path / "text.png")
    with pytest.raises(UsageError, match="no statistics"):
        explain_image(run.folder, file, statistics=tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ExciteError, match=r"cut.npz is damaged"):
        explain_image(run.folder, file, statistics=tmp_path / "cut.npz")
    np.save(tmp_path / "pickled.npy", np.array([{}], object))
    with pytest.raises(ExciteError, match="is damaged"):
        explain_image(run.folder, file, statistics=tmp_path / "pickled.npy")
    np.savez(tmp_path / "other.npz", counts=np.ones(3))
    with pytest.raises(UsageError, match="statistics are of another network"):
        explain_image(run.folder, file, statistics=tmp_path / "other.npz")
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(UsageError, match="no attention unit"):
        explain_image(bare, file)


def test_a_network_with_weights_of_its_own_is_taken(file) -> None:
    from excite.create import create

    torch.manual_seed(0)
    network = create("resnet20:width=0.25+se", 4)
    look = explain_image(network, file, scales=[1.0])["looks"][0]
    assert look["selection"] == []
    assert look["class"] in {f"class {i}" for i in range(4)}

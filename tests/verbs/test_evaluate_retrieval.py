from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.metrics import average_precision_score
from typer.testing import CliRunner

import excite
from excite.cli import app
from excite.data.crossmodal import load_crossmodal
from excite.errors import ExciteError, UsageError
from excite.training.fit import fit
from excite.training.recipe import Recipe, load
from excite.training.run import Run
from excite.verbs.embedder import RunEmbedder
from excite.verbs.evaluate import evaluate
from excite.verbs.train import train


def small(**changes) -> Recipe:
    settings = {
        "data": {"path": "digits-words", "val_fraction": 0.2},
        "network": "dscmr:hidden=64,dim=16",
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "trainer": {"epochs": 12, "batch_size": 100, "threads": 1},
    }
    return load("default").replace(settings | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return fit(small(), tmp_path_factory.mktemp("run") / "run")


def by_hand(run: Run) -> dict[str, float]:
    """scikit-learn's average precision of every query, by the cosine of the points."""
    data = load_crossmodal("digits-words", val_fraction=0.2)
    assert data.test is not None
    (images, texts), labels = data.test.batch(range(len(data.test)))
    network = run.load().network
    with torch.inference_mode():
        u, v = network.embed_images(images).double(), network.embed_texts(texts).double()
    u, v = (side / side.norm(dim=1, keepdim=True) for side in (u, v))
    same = (labels @ labels.T > 0).numpy()
    similar = (u @ v.T).numpy()
    ways = {"image_to_text": similar, "text_to_image": similar.T}
    return {
        name: 100 * np.mean([average_precision_score(same[i], row) for i, row in enumerate(values)])
        for name, values in ways.items()
    }


def test_a_run_learns_and_is_scored_as_scikit_learn_would(run: Run) -> None:
    result = evaluate(run.folder, "digits-words")
    expected = by_hand(run)
    for name, value in expected.items():
        assert result["metrics"][name] == pytest.approx(value, abs=0.02)
    assert result["metrics"]["map"] == pytest.approx(np.mean(list(expected.values())), abs=0.02)
    assert result["metrics"]["map"] > 50, "chance is 10"
    assert (result["samples"], result["count"]) == ("pairs", 450)
    curve = result["directions"]["image_to_text"]
    assert curve["precisions"][0] >= curve["precisions"][-1]
    assert result == evaluate(run.folder, "digits-words")


def test_the_folder_holds_what_is_needed_to_use_it(run: Run) -> None:
    card = run.card
    assert card["task"] == "retrieval"
    assert card["spec"].startswith("dscmr:hidden=64,dim=16,text_dim=")
    assert run.inputs is not None
    assert run.recipe.data.val_fraction == 0.2
    assert {"val_map", "val_image_to_text", "train_loss"} <= set(run.metrics())
    assert "train_map" not in run.metrics()


def test_the_epoch_is_chosen_on_validation_pairs(tmp_path: Path) -> None:
    wild = {"optimizer.lr": 0.02, "schedule.name": "constant", "trainer.epochs": 40, "trainer.patience": 2}
    run = fit(small(**wild), tmp_path / "run")
    scores = run.metrics()["val_map"]
    assert len(scores) < 40
    assert len(scores) == np.argmax(scores) + 1 + 2
    data = load_crossmodal("digits-words", val_fraction=0.2)
    from excite.tasks.retrieval import score

    assert score(run.load().network, data.val).metrics["map"] == pytest.approx(max(scores))


def test_cut_off_and_resumed_the_weights_are_the_same(run: Run, tmp_path: Path, monkeypatch) -> None:
    from excite.training import callbacks

    before, count = callbacks.Record.save, 0

    def save(self) -> None:
        nonlocal count
        before(self)
        count += 1
        if count == 3:
            raise RuntimeError("cut off")

    monkeypatch.setattr(callbacks.Record, "save", save)
    recipe = small(**{"trainer.checkpoint_steps": 5})
    with pytest.raises(RuntimeError, match="cut off"):
        fit(recipe, tmp_path / "run")
    monkeypatch.setattr(callbacks.Record, "save", before)
    again = fit(recipe, tmp_path / "run", resume=True)
    ours, theirs = (safetensors.torch.load_file(one.folder / "model.safetensors") for one in (again, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_network_with_pictures_in_front(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "set"
    folder.mkdir()
    rows = ["file,text,labels"]
    generator = np.random.default_rng(0)
    for i in range(24):
        colour = ("red", "blue")[i % 2]
        pixels = generator.integers(0, 60, (20, 20, 3), dtype=np.uint8)
        pixels[..., 0 if colour == "red" else 2] += 150
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a {colour} picture with the number {i},{colour}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    recipe = small(
        **{
            "data": {"path": f"crossmodal:{folder}", "val_fraction": 0.0, "image_size": 16},
            "network": {"spec": "dscmr:hidden=32,dim=8,image_dim=16", "image": "resnet20:width=0.25+se"},
            "trainer.batch_size": 8,
            "trainer.epochs": 10,
        }
    )
    result = train(recipe, out=tmp_path / "run")
    assert result["metrics"]["map"] > 90
    embedder = RunEmbedder(tmp_path / "run", "cpu")
    texts = embedder.embed_texts(["a red picture", "a blue picture"])
    image = embedder.embed_image_file(folder / "0.png")
    assert texts.shape == (2, 8)
    assert image.shape == (8,)
    assert embedder.checksum == Run(tmp_path / "run").card["sha256"]
    cosines = texts @ image / np.linalg.norm(texts, axis=1) / np.linalg.norm(image)
    assert cosines[0] > cosines[1], "a red picture is nearer to the word for red"
    with pytest.raises(UsageError, match=r"No word of the text 'xylophone'"):
        embedder.embed_texts(["xylophone"])


def test_networks_are_compared_by_their_rankings(tmp_path: Path, no_timing) -> None:
    recipe = small(**{"trainer.epochs": 1, "data.val_fraction": 0.0})
    specs = ["dscmr:hidden=16,dim=8", "dscmr:hidden=64,dim=8"]
    result = excite.compare(specs, "digits-words", recipe=recipe, out=tmp_path / "compared")
    assert result["metric"]["name"] == "map"
    assert (result["samples"], result["count"]) == ("pairs", 450)
    first = result["results"][0]
    data = load_crossmodal("digits-words", val_fraction=0.0)
    images, texts = data.image_shape[0], data.text_dim
    assert first["macs"] == 16 * (images + texts) + 2 * 16 * 8 + 2 * 8 * 10
    assert set(first["metrics"]) == {"map", "image_to_text", "text_to_image"}


def test_wrong_use_is_one_sentence(run: Run, tmp_path: Path) -> None:
    for arguments, options, message in (
        (("dscmr", "digits-words"), {}, "'dscmr' is not a run"),
        ((run.folder, "digits"), {}, "was trained on pairs: name the data crossmodal:PATH"),
        ((run.folder, "digits-words"), {"mean": (0.5,)}, "mean is an option for images with classes"),
        ((run.folder, "digits-words"), {"degradation": "gaussian:25"}, "degradation is an option for denoising"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(*arguments, **options)
    for changes, message in (
        ({"augment.flip": 0.5}, r"augment\.flip.*pairs stay as they are"),
        ({"task.label_smoothing": 0.1}, r"task\.label_smoothing"),
        ({"network": "resnet20"}, "cannot take a pair of an image and a text"),
        ({"network": "dscmr:text_dim=7"}, "takes text_dim=7, but in digits-words it is"),
        ({"data.degradation": "gaussian:25"}, r"data\.degradation.*for denoising"),
    ):
        with pytest.raises((UsageError, ValueError), match=message):
            fit(small(**changes), tmp_path / "refused")
    with pytest.raises(UsageError, match=r"data\.text.*pairs of images and texts, and 'digits' has none"):
        fit(load("digits").replace({"data.text": "tfidf"}), tmp_path / "refused")
    damaged = tmp_path / "damaged"
    import shutil

    shutil.copytree(run.folder, damaged)
    (damaged / "inputs.safetensors").write_bytes(b"nothing")
    with pytest.raises(ExciteError, match=r"inputs\.safetensors is missing or damaged"):
        evaluate(damaged, "digits-words")


def test_a_network_of_pairs_names_nothing(run: Run, tmp_path: Path) -> None:
    from excite.verbs.predict import predict

    for source, more in (
        (run.folder, {}),
        ("dscmr", {}),
        ("dscmr:dim=8", {"weights": run.folder / "model.safetensors"}),
    ):
        with pytest.raises(UsageError, match=f"{source} puts images and texts into one space .* excite search"):
            list(predict(source, [tmp_path], **more))
    said = CliRunner().invoke(app, ["predict", "dscmr", str(tmp_path)])
    assert isinstance(said.exception, UsageError)


def test_a_device_that_is_not_there_is_told(run: Run) -> None:
    for device in ("gpu", "cuda:99", "", "cpu:x"):
        with pytest.raises(UsageError, match=f"device '{device}' is not available here"):
            RunEmbedder(run.folder, device)


def test_a_network_of_another_kind_is_no_embedder(run: Run, monkeypatch) -> None:
    other = dataclasses.replace(run.load(), network=torch.nn.Linear(1, 1))
    monkeypatch.setattr(Run, "load", lambda self: other)
    with pytest.raises(UsageError, match="cannot embed an image or a text alone"):
        RunEmbedder(run.folder, "cpu")


def test_the_command_prints_both_directions(run: Run) -> None:
    said = CliRunner().invoke(app, ["evaluate", str(run.folder), "--data", "digits-words"])
    assert said.exit_code == 0, said.output
    assert "image_to_text" in said.stdout
    assert "450 pairs" in said.stdout
    result = json.loads(
        CliRunner().invoke(app, ["evaluate", str(run.folder), "--data", "digits-words", "--json"]).stdout
    )
    assert set(result["metrics"]) == {"map", "image_to_text", "text_to_image"}

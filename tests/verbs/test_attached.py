"""Networks with attached units in every verb: trained from the host's weights, scored, applied, costed, compared."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import excite
from excite.cli import main as command_line
from excite.surgery.hooks import attached_units
from excite.training.run import Run


def main(arguments):
    """The exit code of one command, run in this process: PyTorch takes seconds to import."""
    before, sys.argv = sys.argv, ["excite", *arguments]
    try:
        command_line()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes that differ in brightness."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, light in (("dark", 40), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.normal(light, 20, (32, 32, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Weights of a torchvision network of 1000 classes, as from a hub."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(excite.create("torchvision:resnet18").state_dict(), file)
    return file


@pytest.fixture(scope="module")
def run(photos, host, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tuned"
    arguments = ["train", "--network", "torchvision:resnet18+se:stages=1-2", "--weights", str(host)]
    arguments += ["--data", str(photos), "--epochs", "2", "--out", str(out), "--set", "trainer.threads=1"]
    arguments += ["--set", "schedule.host_frozen_epochs=1", "--set", "trainer.batch_size=8"]
    assert main(arguments) == 0
    return Run.open(out)


def test_fine_tuning_says_what_it_did(run):
    assert run.recipe.network.spec == "torchvision:resnet18+se:stages=1-2,init=identity"
    assert run.recipe.optimizer.host_factor == 0.1
    assert run.card["spec"] == run.recipe.network.spec


def test_the_trained_network_comes_back_with_its_units(run):
    trained = run.load()
    units = dict(attached_units(trained.network))
    assert list(units) == [f"layer{stage}.{block}.bn2.se" for stage in (1, 2) for block in (0, 1)]
    assert all(unit.gate.factor == 2 for unit in units.values())
    assert all(unit.expand.weight.abs().max() > 0 for unit in units.values())


def test_the_host_learned_less_than_the_units(run, host):
    before, after = torch.load(host), run.load().network.state_dict()
    moved = (after["conv1.weight"] - before["conv1.weight"]).norm() / before["conv1.weight"].norm()
    assert 0 < moved < 0.1


def test_evaluate_and_predict(run, photos, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), "--data", str(photos), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["metrics"]["top1"] == run.test_metrics()["top1"]
    assert main(["predict", str(run.folder), str(photos / "test" / "dark" / "0.png"), "--json"]) == 0
    assert "dark" in capsys.readouterr().out


def test_a_spec_with_units_and_the_hosts_weights_predicts_as_the_host(host, photos, capsys):
    answers = []
    for spec in ("torchvision:resnet18", "torchvision:resnet18+se", "torchvision:resnet18+sk"):
        assert main(["predict", spec, "--weights", str(host), str(photos / "test" / "dark" / "0.png"), "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] == answers[2]


def test_cost_counts_the_units(capsys):
    assert main(["cost", "torchvision:resnet50", "torchvision:resnet50+se", "--no-latency", "--json"]) == 0
    bare, attached = json.loads(capsys.readouterr().out)["results"]
    # Hu et al., Sect. 4: 2/r Σ N_s C_s² more weights, about 2.5 million at r = 16; here with biases.
    added = sum(
        blocks * (2 * c * (c // 16) + c + c // 16) for blocks, c in ((3, 256), (4, 512), (6, 1024), (3, 2048))
    )
    assert attached["parameters"] - bare["parameters"] == added
    assert added == pytest.approx(2.5e6, rel=0.02)
    (table,) = attached["attached"]
    assert sum(unit["parameters"] for unit in table["units"]) == added
    assert bare["attached"] == []
    assert main(["cost", "torchvision:resnet18+se", "--no-latency", "--units"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.split() == ["8", "in", "all", "89,080", "87,040"]


def test_wrong_specs_are_refused_in_one_sentence(host, photos, capsys):
    spec = "torchvision:resnet18+se:where=nowhere"
    assert main(["train", "--network", spec, "--weights", str(host), "--data", str(photos)]) == 2
    message = capsys.readouterr().err.strip()
    assert "modules whose name ends in 'nowhere'" in message
    assert "Traceback" not in message

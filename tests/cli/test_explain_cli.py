"""``excite explain``: its options, what it prints, its exit codes."""

import json
import sys

import numpy as np
import pytest

from excite.cli import main
from excite.verbs import explain as module
from excite.verbs import explain_image as module_of_image


@pytest.fixture
def excite(monkeypatch, capsys):
    """The command line without a process of its own: its exit code and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["excite", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def asked(monkeypatch):
    """What the verb was asked for; it answers with little."""
    calls = []

    def explain(source, data, **options):
        calls.append((source, data, options))
        observation = {"question": "Is [it] so?", "answer": "yes", "sentence": "Yes: it [b]is[/b].", "figures": {}}
        return {
            "excitation": {"units": [{}, {}], "observations": [observation]},
            "selection": None,
            "metrics": {"top1": 91.234, "loss": 0.3},
            "count": 10_000,
            "seconds": 12.34,
            "folder": "a[1]/reports",
        }

    monkeypatch.setattr(module, "explain", explain)
    return calls


def test_the_options_reach_the_verb(excite, asked) -> None:
    code, printed, _ = excite(
        "explain", "run", "--data", "cifar10", "--classes", "cat, dog", "--scales", "1,2.5", "--images", 100,
        "--channels", 7, "--out", "there", "--workers", 2, "--device", "cpu", "--test-data", "t", "--weights", "w",
    )  # fmt: skip
    assert code == 0
    ((source, data, options),) = asked
    assert (source, data) == ("run", "cifar10")
    assert str(options.pop("out")) == "there"
    assert options == {
        "test": "t", "weights": "w", "classes": ["cat", "dog"], "images": 100, "channels": 7, "scales": (1.0, 2.5),
        "device": "cpu", "workers": 2, "progress": True,
    }  # fmt: skip
    assert "Squeeze-and-excitation, 2 units" in printed
    assert "Is [it] so?\n    Yes: it [b]is[/b]." in printed
    assert "10,000 images in 12.3 s; top1 91.23" in printed
    assert "a[1]/reports/explain.html" in printed


def test_json_is_all_that_is_printed(excite, asked) -> None:
    code, printed, _ = excite("explain", "run", "--data", "digits", "--json")
    assert code == 0
    assert json.loads(printed)["count"] == 10_000
    assert asked[0][2]["scales"] == (1.0, 1.5, 2.0)
    assert asked[0][2]["classes"] is None


def test_of_several_processes_one_prints(excite, asked, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        code, printed, _ = excite("explain", "run", "--data", "digits", "--json")
        assert code == 0
        assert bool(printed) == prints


def test_one_image_is_explained(excite, asked, monkeypatch, tmp_path) -> None:
    calls = []
    look = {
        "scale": 1.0,
        "predictions": [{"class": "[cat]", "index": 3, "probability": 0.912}],
        "excitation": [{"unit": "layer1.0.se", "up": [{"channel": 4}, {"channel": 1}], "down": [{"channel": 9}]}],
        "selection": [{"unit": "layer1.0.conv2", "kernels": ["3×3", "5×5"], "chosen": [0.25, 0.75]}],
    }

    def explain_image(source, image, **options):
        calls.append((source, image.name, options))
        return {"looks": [look]}

    monkeypatch.setattr(module_of_image, "explain_image", explain_image)
    code, printed, _ = excite("explain", "run", "--image", tmp_path / "cat.jpg", "--statistics", "e.npz")
    assert code == 0
    ((source, image, options),) = calls
    assert (source, image, str(options.pop("statistics"))) == ("run", "cat.jpg", "e.npz")
    assert options == {"weights": None, "device": "auto"}
    assert "At scale 1: [cat] 91.2 %" in printed
    assert "layer1.0.se: channels up 4 1, down 9" in printed
    assert "layer1.0.conv2: 3×3 by 25 % of the channels, 5×5 by 75 % of the channels" in printed
    code, printed, _ = excite("explain", "run", "--image", "cat.jpg", "--json")
    assert json.loads(printed) == {"looks": [look]}
    assert not asked


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run"], "Give the images to look at with --data"),
        (["run", "--image", "x.png", "--data", "digits"], "--data is for a set of images"),
        (["run", "--image", "x.png", "--out", "there"], "--out is for a set of images"),
        (["run", "--data", "digits", "--statistics", "x.npz"], "give it with --image"),
        (["run", "--data", "digits", "--scales", "1,large"], "expected numbers"),
        (["nowhere", "--data", "digits"], "'nowhere' is not a run"),
        (["nowhere", "--data", "denoising:x"], "is for denoising"),
        (["nowhere", "--data", "digits", "--scales", "0.5,1"], "from 1 on"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_two(excite, arguments, sentence) -> None:
    code, printed, told = excite("explain", *arguments)
    assert code == 2
    assert sentence in told
    assert "Traceback" not in told
    assert printed == ""


def test_from_the_command_line_to_the_files(excite, tmp_path, monkeypatch) -> None:
    import safetensors.torch
    import torch

    from excite.create import create

    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(create("resnet20:width=0.25+se", 10).state_dict(), weights)
    monkeypatch.chdir(tmp_path)
    code, printed, told = excite(
        "explain", "resnet20:width=0.25+se", "--weights", weights, "--data", "digits", "--images", 20, "--json"
    )
    assert code == 0, told
    result = json.loads(printed)
    assert result["count"] == 20
    folder = tmp_path / "excite-runs" / "explain-resnet20-width-0.25+se-digits"
    assert (tmp_path / result["folder"]) == folder
    assert "resnet20:width=0.25+se" in (folder / "explain.html").read_text()
    with np.load(folder / "explain.npz") as arrays:
        assert arrays["excitation/layer1.0.se/mean"].shape == (10, 4)

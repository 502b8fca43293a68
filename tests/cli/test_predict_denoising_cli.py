"""``excite predict`` of denoising networks: its options, its formats, its exit codes."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from excite.cli import main
from excite.create import create

SPEC = "dncnn_s:depth=3,channels=4"


@pytest.fixture
def excite(monkeypatch, capsys):
    """The command line without a process of its own: its exit code and what it printed."""

    monkeypatch.setenv("EXCITE_KEEP_BUFFERS", "0")  # this process is not ours alone
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["excite", "predict", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def place(tmp_path):
    """Two pictures, one of them broken, and weights."""
    torch.manual_seed(0)
    torch.save(create(SPEC).state_dict(), tmp_path / "sigma25.pt")
    (tmp_path / "in").mkdir()
    draw = np.random.default_rng(0)
    Image.fromarray(draw.normal(128, 25, (60, 70)).clip(0, 255).astype(np.uint8)).save(tmp_path / "in" / "[a].png")
    (tmp_path / "in" / "b.png").write_bytes(b"")
    return tmp_path


def test_every_format_says_the_same_and_a_broken_file_makes_the_exit_code_one(excite, place) -> None:
    command = (SPEC, place / "in", "--weights", place / "sigma25.pt", "--out", place / "out")
    code, printed, told = excite(*command, "--json", "--estimate", "--side-by-side", "--precision", "bf16")
    assert code == 1
    assert "1 of 2 files could not be denoised" in told
    good, broken = json.loads(printed)["files"]
    assert broken == {"file": str(place / "in" / "b.png"), "error": "the file is empty"}
    assert good["out"] == str(place / "out" / "[a].png")
    assert good["sigma_estimated"] == pytest.approx(25, rel=0.2)
    assert (place / "out" / "[a].png").is_file()
    assert (place / "out" / "[a].png.side.png").is_file()

    code, printed, _ = excite(*command, "--format", "jsonl", "--sigma", "25", "--by-channel")
    assert code == 1
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["file"] for row in rows] == [good["file"], broken["file"]]
    assert "sigma_estimated" not in rows[0]

    code, printed, _ = excite(*command)
    assert code == 1
    for text in ("[a].png", "70 × 60", "the file is empty", str(place / "out")):
        assert text in printed
    (place / "in" / "b.png").unlink()
    code, printed, told = excite(*command, "--estimate")
    assert (code, told) == (0, "")
    assert "σ" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "say with --out FOLDER"),
        (("--out", "OUT", "--top", "3"), "--top is an option for images with classes"),
        (("--out", "OUT", "--mean", ".5"), "--mean is an option for images with classes"),
        (("--out", "OUT", "--format", "csv"), "--format is an option for images with classes"),
        (("--out", "OUT", "--mc-dropout", "3"), "--mc-dropout is an option for hyperspectral scenes"),
        (("--out", "OUT", "--sigma", "50"), "trained for noise of σ = 50: there is sigma25.pt (σ = 25)"),
        (("--out", "IN"), "would be overwritten"),
        (("--out", "OUT", "--sigma", "25", "--estimate"), "leave one out"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_two(excite, place, arguments, sentence) -> None:
    places = {"OUT": place / "out", "IN": place / "in"}
    given = [places.get(argument, argument) for argument in arguments]
    code, printed, told = excite(SPEC, place / "in", "--weights", place / "sigma25.pt", *given)
    assert (code, printed) == (2, "")
    assert told.startswith("excite: ")
    assert sentence in told
    assert told.count("\n") == 1
    assert not (place / "out").exists()


@pytest.mark.parametrize("option", [("--sigma", "25"), ("--estimate",), ("--side-by-side",), ("--precision", "bf16")])
def test_options_of_denoising_are_refused_for_other_networks(excite, place, option) -> None:
    code, _, told = excite("resnet20", place / "in", "--weights", place / "sigma25.pt", *option)
    assert code == 2
    assert f"{option[0]} is an option for denoising" in told

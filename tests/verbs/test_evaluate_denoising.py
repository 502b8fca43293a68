from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import excite
from excite.cli import app
from excite.data.denoising import load_denoising
from excite.errors import UsageError
from excite.training.fit import fit
from excite.training.recipe import load
from excite.training.run import Run
from excite.verbs.evaluate import evaluate


def unpack(shared_data: Path, folder: Path, name: str, most: int = 100) -> Path:
    with tarfile.open(shared_data / "denoising-images.tar") as tar:
        members = sorted((m for m in tar if m.isfile() and f"{name}/" in m.name), key=lambda m: m.name)[:most]
        for member in members:
            content = tar.extractfile(member)
            assert content is not None
            path = folder / name / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        rows, cols = np.mgrid[: 40 + number, :44] / (5 + number)
        values = (127 + 120 * np.sin(rows + number) * np.cos(0.7 * cols)).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Run:
    settings = {
        "data": {"path": f"denoising:{folder}", "degradation": "gaussian:30", "patch": 16, "patches": 64},
        "network": "dncnn_s:depth=3",
        "trainer": {"epochs": 1, "batch_size": 16, "threads": 1},
    }
    return fit(load("dncnn-s-25").replace(settings), tmp_path_factory.mktemp("run") / "run")


def test_published_weights_on_two_pictures_are_as_by_hand(shared_data: Path, tmp_path: Path) -> None:
    """Against the network as third parties run it: layers in a row, batch norm unmerged, the noise subtracted."""
    weights = shared_data / "dncnn-weights" / "pytorch-dncnn-s-sigma25.pth"
    pictures = unpack(shared_data, tmp_path, "Set12", most=2)
    result = evaluate("dncnn_s", f"denoising:{pictures}", weights=weights, degradation="gaussian:25")

    layers: list[torch.nn.Module] = [torch.nn.Conv2d(1, 64, 3, padding=1, bias=False), torch.nn.ReLU()]
    for _ in range(15):
        layers += [torch.nn.Conv2d(64, 64, 3, padding=1, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(64, 1, 3, padding=1, bias=False)]
    theirs = torch.nn.Sequential(*layers).eval()
    state = torch.load(weights, weights_only=True, map_location="cpu")
    theirs.load_state_dict({name.removeprefix("module.dncnn."): value for name, value in state.items()})
    data = load_denoising(f"denoising:{pictures}", degradation="gaussian:25", all_for_test=True)
    assert data.test is not None
    expected = []
    with torch.inference_mode():
        for i in range(2):
            noisy, clean = data.test.pair(i)
            error = (noisy - theirs(noisy[None])[0]).clamp(0, 1) - clean
            expected.append(-10 * np.log10(float((error.double() ** 2).mean())))
    assert [row["psnr"] for row in result["per_image"]] == pytest.approx(expected, abs=1e-3)
    assert result["metrics"]["psnr"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert result["noisy"]["psnr"] == pytest.approx(20.2, abs=0.2)  # 10 · log10(255² / 25²) = 20.17
    assert (result["images"], result["count"], result["samples"]) == (2, 2, "images")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "file", "sigma", "name", "published"),
    [
        *(("dncnn_s", f"matconvnet-sigma{s}.mat", s, "BSD68", p) for s, p in ((15, 31.73), (25, 29.23), (50, 26.23))),
        *(
            ("dncnn_s", f"matconvnet-sigma{s}.mat", s, "Set12", p)
            for s, p in ((15, 32.859), (25, 30.436), (50, 27.178))
        ),
        *(
            ("dncnn_b", "matconvnet-gray-blind.mat", s, "BSD68", p)
            for s, p in ((15, 31.61), (25, 29.16), (50, 26.23))
        ),
        ("dncnn_s", "pytorch-dncnn-s-sigma25.pth", 25, "BSD68", 29.21),
        ("dncnn_s", "pytorch-dncnn-s-sigma25.pth", 25, "Set12", 30.404),
    ],
)
def test_the_published_figures(shared_data: Path, tmp_path: Path, spec, file, sigma, name, published) -> None:
    pictures = unpack(shared_data, tmp_path, name)
    weights = shared_data / "dncnn-weights" / file
    result = evaluate(spec, f"denoising:{pictures}", weights=weights, degradation=f"gaussian:{sigma}")
    assert result["metrics"]["psnr"] == pytest.approx(published, abs=0.03)


def test_a_run_is_scored_on_what_it_held_out_with_the_noise_it_learned(run: Run, folder: Path) -> None:
    result = evaluate(run.folder, f"denoising:{folder}")
    assert result["degradation"] == "gaussian:30"
    data = load_denoising(f"denoising:{folder}", degradation="gaussian:30", patch=16)
    assert data.test is not None
    assert data.train is not None
    assert [row["file"] for row in result["per_image"]] == list(data.test.names)
    assert not set(data.test.names) & set(data.train.names)
    assert result == evaluate(run.folder, f"denoising:{folder}")


def test_other_noise_is_another_score_and_warned_of(run: Run, folder: Path, caplog) -> None:
    usual = evaluate(run.folder, f"denoising:{folder}")
    assert "trained for" not in caplog.text
    other = evaluate(run.folder, f"denoising:{folder}", degradation="gaussian:10")
    assert other["noisy"]["psnr"] > usual["noisy"]["psnr"] + 5
    assert "trained for gaussian:30, and is scored on gaussian:10" in caplog.text
    seed = evaluate(run.folder, f"denoising:{folder}", noise_seed=1)
    assert seed["noisy"]["psnr"] != usual["noisy"]["psnr"]
    rounded = evaluate(run.folder, f"denoising:{folder}", quantised=True)
    # What is scored is clipped in either case, and rounding adds noise of 1/√12 of a level.
    assert rounded["noisy"]["psnr"] != usual["noisy"]["psnr"]
    assert rounded["noisy"]["psnr"] == pytest.approx(usual["noisy"]["psnr"], abs=0.01)


def test_wrong_use_is_one_sentence(run: Run, folder: Path, shared_data: Path) -> None:
    weights = shared_data / "dncnn-weights" / "matconvnet-sigma25.mat"
    for arguments, options, message in (
        (("dncnn_s", f"denoising:{folder}"), {}, "random weights: add --weights"),
        (("dncnn_s", f"denoising:{folder}"), {"weights": weights}, "nothing says what spoils.*--sigma 25"),
        ((run.folder, str(folder)), {}, "trained to denoise: name the data denoising:FOLDER"),
        ((run.folder, "digits"), {"degradation": "gaussian:25"}, "degradation is an option for denoising"),
        ((run.folder, f"denoising:{folder}"), {"mean": (0.5,)}, "mean is an option for images with classes"),
        ((run.folder, f"denoising:{folder}"), {"mc_dropout": 5}, "mc_dropout is an option for hyperspectral scenes"),
        ((run.folder, f"denoising:{folder}"), {"weights": weights}, "has weights of its own"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(*arguments, **options)


def test_the_command_prints_the_figures(run: Run, folder: Path) -> None:
    said = CliRunner().invoke(app, ["evaluate", str(run.folder), "--data", f"denoising:{folder}", "--sigma", "20"])
    assert said.exit_code == 0, said.output
    assert " dB" in said.stdout
    assert "gaussian:20: the noisy images have" in said.stdout
    command = ["evaluate", str(run.folder), "--data", f"denoising:{folder}", "--sigma", "20", "--json"]
    result = json.loads(CliRunner().invoke(app, command).stdout)
    assert set(result["metrics"]) == {"psnr", "ssim"}
    assert result["images"] == len(result["per_image"]) == 2


def test_networks_are_compared_in_decibels(folder: Path, tmp_path: Path, no_timing) -> None:
    recipe = load("dncnn-s-25").replace(
        {
            "data": {"degradation": "gaussian:40", "patch": 16, "patches": 64},
            "trainer": {"epochs": 2, "batch_size": 16, "threads": 1},
        }
    )
    specs = ["dncnn_s:depth=3", "dncnn_s:depth=3+se"]
    result = excite.compare(specs, f"denoising:{folder}", recipe=recipe, out=tmp_path / "compared")
    assert result["metric"] == {"name": "psnr", "unit": "dB", "higher_is_better": True}
    assert (result["samples"], result["count"]) == ("images", 2)
    first, second = result["results"]
    assert first["score"] == pytest.approx(np.mean(first["scores"]))
    assert second["difference"] == pytest.approx(second["score"] - first["score"], abs=1e-4)
    assert first["macs"] == 256 * 256 * 9 * (64 + 64 * 64 + 64)
    assert "psnr" in first["metrics"]
    assert "ssim" in first["metrics"]
    assert result["verdict"]
    page = (tmp_path / "compared" / "reports" / "compare.html").read_text()
    assert "PSNR" in page
    again = excite.compare(
        [run for entry in result["results"] for run in map(tmp_path.joinpath("compared").joinpath, entry["runs"])],
        out=tmp_path / "again",
    )
    assert [entry["score"] for entry in again["results"]] == [entry["score"] for entry in result["results"]]

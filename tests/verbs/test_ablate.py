from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from quick import quick
from torch.utils.data import TensorDataset

from excite.analysis.statistics import paired_difference
from excite.create import create
from excite.data import ImageData, from_datasets
from excite.errors import UsageError
from excite.training.recipe import load
from excite.training.run import Run
from excite.verbs.ablate import ablate
from excite.verbs.ablate_grid import parse_grid, points
from excite.verbs.ablate_rows import summary
from excite.verbs.ablate_same import same_networks

HOST = "resnet20:width=0.5"
RECIPE = quick(**{"trainer.batch_size": 16, "optimizer.lr": 0.02})


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of small noise, one of them louder: learned in part in one epoch. The last 48 are for testing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(112) % 2
    return torch.randn(112, 3, 8, 8, generator=generator) * (1 + 0.7 * labels.view(-1, 1, 1, 1)), labels


@pytest.fixture(scope="module")
def images() -> ImageData:
    noise, labels = drawn()
    return from_datasets(TensorDataset(noise[:64], labels[:64]), TensorDataset(noise[64:], labels[64:]))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("ablate") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("excite.verbs.compare.speeds", speeds)
        return folder, ablate({"reduction": [4, 16, 32]}, f"{HOST}+se", images, recipe=RECIPE, out=folder)


def speeds(networks, _progress=False) -> dict:
    figures = {"latency_ms": 1.0, "latency_ratio": None, "latency_ratio_ci95": None, "throughput": 1000.0}
    return {name: dict(figures) for name in networks}


@pytest.fixture
def untimed(monkeypatch) -> None:
    monkeypatch.setattr("excite.verbs.compare.speeds", speeds)


def right(folder: Path, run: str) -> np.ndarray:
    """Which test images a run's network is right on, image by image."""
    network = Run(folder / run).load().network
    noise, labels = drawn()
    with torch.inference_mode():
        found = [int(network(image[None]).argmax()) for image in noise[64:]]
    return np.array(found) == labels[64:].numpy()


# --- the table -----------------------------------------------------------------------------------------------------


def test_rows_are_the_host_and_then_every_point_of_the_grid(finished) -> None:
    folder, result = finished
    assert json.loads((folder / "ablate.json").read_text()) == {k: v for k, v in result.items() if k != "folder"}
    assert [row["label"] for row in result["rows"]] == ["original", "reduction=4", "reduction=16", "reduction=32"]
    assert [row["original"] for row in result["rows"]] == [True, False, False, False]
    assert [row["spec"] for row in result["rows"]] == [
        HOST, f"{HOST}+se:reduction=4", f"{HOST}+se:reduction=16", f"{HOST}+se:reduction=32",
    ]  # fmt: skip
    assert result["grid"] == {"reduction": ["4", "16", "32"]}
    assert result["metric"] == {"name": "top-1 error", "unit": "%", "higher_is_better": False}
    page = (folder / "reports" / "ablate.html").read_text()
    assert result["summary"].partition(",")[0] in page


def test_parameters_are_those_of_the_papers_formula(finished) -> None:
    _, result = finished
    host, four, sixteen, _ = (row["parameters"] for row in result["rows"])
    assert host == sum(parameter.numel() for parameter in create(HOST, 2, 3).parameters())
    for found, reduction in ((four, 4), (sixteen, 16)):
        widths = {channels: max(4, channels // reduction) for channels in (8, 16, 32)}
        # Three blocks a stage, each with two fully connected layers (Hu et al., Eq. 5) and their biases.
        added = sum(3 * (2 * c * w + w + c) for c, w in widths.items())
        assert found - host == added
    assert result["rows"][1]["mebibytes"] == pytest.approx(four * 4 / 1024 / 1024)


def test_errors_are_the_share_of_wrong_images(finished) -> None:
    folder, result = finished
    for row in (result["rows"][0], result["rows"][1]):
        tables = np.stack([right(folder, run) for run in row["runs"]])
        assert row["scores"] == pytest.approx(list(100 * (1 - tables.mean(axis=1))))
        assert row["score"] == pytest.approx(100 * (1 - tables.mean()))
        assert row["score_ci95"][0] <= row["score"] <= row["score_ci95"][1]
        assert row["metrics"]["top-1 error"]["mean"] == pytest.approx(row["score"])
    assert len({row["score"] for row in result["rows"]}) > 1
    host, four = (row["score"] for row in result["rows"][:2])
    assert result["rows"][0]["difference"] is None
    assert result["rows"][1]["difference"] == pytest.approx(four - host)
    low, high = result["rows"][1]["difference_ci95"]
    assert low <= four - host <= high


def test_settings_are_held_against_each_other(finished) -> None:
    folder, result = finished
    (pair,) = result["between"]
    assert (pair["one"], pair["other"]) == ("reduction=4", "reduction=16")
    four, sixteen = (np.stack([right(folder, run) for run in row["runs"]]) for row in result["rows"][1:3])
    truth = paired_difference(~four * 1.0, ~sixteen * 1.0)
    assert truth.low is not None
    assert truth.high is not None
    assert pair["difference"] == pytest.approx(100 * truth.value)
    assert pair["difference_ci95"] == pytest.approx([100 * truth.low, 100 * truth.high])
    assert pair["p_holm"] == pytest.approx(truth.p)


def test_settings_that_build_the_same_network_are_trained_once(finished) -> None:
    folder, result = finished
    sixteen, more = result["rows"][2:]
    assert sixteen["same_as"] is None
    assert more["same_as"] == "reduction=16"
    assert {key: more[key] for key in ("score", "parameters", "runs")} == {
        key: sixteen[key] for key in ("score", "parameters", "runs")
    }
    assert len(list(folder.glob("runs/*"))) == 3
    assert any("reduction=32 builds the same network as reduction=16" in note for note in result["notes"])


def test_values_are_added_to_a_finished_ablation(finished, images, tmp_path, untimed) -> None:
    source, before = finished
    folder = tmp_path / "out"
    shutil.copytree(source, folder)
    models = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/model.json")}
    assert len(models) == 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("excite.training.fit._train", None)  # whatever is trained again fails
        grid = {"reduction": "4,16,32"}
        again = ablate(grid, f"{HOST}+se", images, recipe=RECIPE, out=folder)
    assert again == before | {"folder": str(folder)}
    after = ablate({"reduction": "2,4,16,32"}, f"{HOST}+se", images, recipe=RECIPE, out=folder)
    assert [row["label"] for row in after["rows"]][1:3] == ["reduction=2", "reduction=4"]
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert len(after["between"]) == 3


def test_a_recipe_key_trains_host_and_network_under_each_value(images, tmp_path, untimed) -> None:
    grid = {"optimizer.lr": ["0.02", "0.001"], "gate": ["tanh"]}
    result = ablate(grid, f"{HOST}+se", images, seeds=2, recipe=RECIPE, out=tmp_path)
    assert [row["label"] for row in result["rows"]] == [
        "optimizer.lr=0.02, original", "optimizer.lr=0.02, gate=tanh",
        "optimizer.lr=0.001, original", "optimizer.lr=0.001, gate=tanh",
    ]  # fmt: skip
    assert [row["group"] for row in result["rows"]] == [0, 0, 1, 1]
    for row in result["rows"]:
        for run in row["runs"]:
            recipe = load(tmp_path / run)
            assert recipe.optimizer.lr == float(row["setting"]["optimizer.lr"])
            assert recipe.network.spec == row["spec"]
    first, second = result["rows"][2:]
    assert second["difference"] == pytest.approx(second["score"] - first["score"])
    # The p-values of both comparisons are corrected together: Holm's least is twice the smaller raw one.
    raw = []
    for host, row in (result["rows"][:2], result["rows"][2:]):
        tables = [
            np.stack(
                [safetensors.numpy.load_file(tmp_path / run / "test.safetensors")["scores"] for run in r["runs"]]
            )
            for r in (host, row)
        ]
        raw.append(paired_difference(tables[1], tables[0]).p)
    assert sorted([result["rows"][1]["p_holm"], result["rows"][3]["p_holm"]]) == pytest.approx(
        sorted([min(1, 2 * min(raw)), max(max(raw), min(1, 2 * min(raw)))])
    )
    assert result["comparisons"] == ["recipes/optimizer.lr=0.02", "recipes/optimizer.lr=0.001"]
    assert all((tmp_path / place / "reports" / "compare.html").is_file() for place in result["comparisons"])
    # A network without units has no host beside itself.
    alone = ablate({"optimizer.lr": "0.02,0.001"}, HOST, images, seeds=1, recipe=RECIPE, out=tmp_path / "alone")
    assert [row["label"] for row in alone["rows"]] == ["optimizer.lr=0.02", "optimizer.lr=0.001"]
    assert not any(row["original"] for row in alone["rows"])


def test_minutes_give_every_recipe_the_same_epochs(images, tmp_path, untimed) -> None:
    grid = {"optimizer.lr": ["0.02", "0.01"]}
    result = ablate(grid, HOST, images, seeds=1, recipe=RECIPE, minutes=0.02, out=tmp_path)
    epochs = {load(tmp_path / run).trainer.epochs for row in result["rows"] for run in row["runs"]}
    assert epochs == {result["epochs"]}
    again = ablate(grid, HOST, images, seeds=1, recipe=RECIPE, minutes=0.02, out=tmp_path)
    assert again == result


# --- the grid ------------------------------------------------------------------------------------------------------


def test_the_grid_is_a_product_and_its_points_are_specs() -> None:
    found = points({"reduction": "4,8", "squeeze": ["mean", "max"]}, "resnet20+se:reduction=16,stages=1-2")
    assert [point.spec for point in found] == [
        f"resnet20+se:reduction={r},stages=1-2,squeeze={s}" for r in (4, 8) for s in ("mean", "max")
    ]
    assert found[1].label == "reduction=4, squeeze=max"
    (point,) = points({"branches": ["3-5-7"]}, "resnet20+sk")
    assert point.spec == "resnet20+sk:branches=3-5-7"
    (point,) = points({"width": [0.5]}, "resnet20+se")
    assert point.spec == "resnet20:width=0.5+se"
    found = points({"sk.reduction": "4,8"}, "resnet20+se:reduction=2+sk")
    assert [point.spec for point in found] == [f"resnet20+se:reduction=2+sk:reduction={r}" for r in (4, 8)]
    (point,) = points({"trainer.batch_size": "64", "optimizer.betas": ["[0.9,0.95]"]}, "timm:resnet18+eca")
    assert point.recipe == {"trainer.batch_size": 64, "optimizer.betas": [0.9, 0.95]}
    assert point.spec == "timm:resnet18+eca"
    (point,) = points({"drop_rate": "0.1"}, "timm:resnet18+eca")
    assert point.spec == "timm:resnet18:drop_rate=0.1+eca"


def test_commas_part_values_but_not_within_brackets() -> None:
    assert parse_grid(["branches=3-3d2,3-5", "stages=1-2,3", "optimizer.betas=[0.9,0.99],[0.8,0.9]"]) == {
        "branches": ["3-3d2", "3-5"], "stages": ["1-2", "3"], "optimizer.betas": ["[0.9,0.99]", "[0.8,0.9]"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "network", "message"),
    [
        ({}, "resnet20+se", "at least one key"),
        ({"reducton": "2,4"}, "resnet20+se", "did you mean 'reduction'"),
        ({"se.reducton": "2,4"}, "resnet20+se", "did you mean 'reduction'"),
        ({"optimiser.lr": "2,4"}, "resnet20+se", "did you mean 'optimizer.lr'"),
        ({"reduction": "2,4"}, "resnet20", "neither an argument of resnet20 nor a recipe key"),
        ({"reduction": "2,4"}, "resnet20+se+sk", "write se.reduction or sk.reduction"),
        ({"reduction": "2,2"}, "resnet20+se", "2 is given twice"),
        ({"reduction": "2,,4"}, "resnet20+se", "values with commas"),
        ({"reduction": "2 4"}, "resnet20+se", "key=value"),
        ({"reduction": []}, "resnet20+se", "values with commas"),
        ({"reduction": "2,zwei"}, "resnet20+se", "a whole number"),
        ({"seed": "0,1"}, "resnet20+se", "--seeds"),
        ({"data.path": "digits,cifar10"}, "resnet20+se", "holds the data fixed"),
        ({"data.image_size": "8,16"}, "resnet20+se", "images of your own"),
        ({"network.spec": "a,b"}, "resnet20+se", "--network"),
        ({"optimizer.lr": "0.1,fast"}, "resnet20+se", "optimizer.lr"),
        ({"trainer.epochs": "1,2"}, "resnet20+se", "leave out --epochs"),
    ],
)
def test_a_wrong_grid_is_told_before_anything_is_trained(images, tmp_path, grid, network, message) -> None:
    with pytest.raises(UsageError, match=message):
        ablate(grid, network, images, seeds=1, recipe=RECIPE, epochs=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_argument_on_the_command_line() -> None:
    for text in ("reduction", "=2,4"):
        with pytest.raises(UsageError, match="KEY=VALUE"):
            parse_grid([text])
    with pytest.raises(UsageError, match="given before"):
        parse_grid(["reduction=2", "reduction=4"])


# --- settings that make no difference ------------------------------------------------------------------------------


def test_networks_that_compute_something_else_are_never_taken_for_the_same(images) -> None:
    se = f"{HOST}+se"
    others = [
        HOST, se, f"{se}:gate=tanh", f"{se}:gate=hard_sigmoid", f"{se}:squeeze=max", f"{se}:stages=1-2",
        f"{se}:where=before", f"{se}:where=after", f"{se}:where=conv3x3", f"{se}:init=identity",
        f"{se}:init=identity,gate=hard_sigmoid", f"{se}:init=identity,activation=gelu", f"{HOST}+sk",
        f"{HOST}+sk:branches=3-5", f"{HOST}+sk:branches=3-3d3", f"{HOST}+sk:init=identity",
        f"{HOST}+sk:init=identity,branches=3-3d3",
    ]  # fmt: skip
    assert same_networks(others, images, None) == {}
    twins = [se, f"{se}:reduction=16", f"{se}:squeeze=mean", f"{se}:stages=1-3", f"{se}:reduction=64"]
    assert same_networks(twins, images, None) == dict.fromkeys(twins[1:], se)


# --- the summary ---------------------------------------------------------------------------------------------------


def _row(label: str, score: float, difference: float | None = None, p: float | None = None, **more) -> dict:
    bounds = None if difference is None else [difference - 0.3, difference + 0.3]
    row = {"label": label, "score": score, "difference": difference, "difference_ci95": bounds, "p_holm": p}
    return row | {"original": difference is None, "group": 0} | more


def _pair(one: str, other: str, difference: float, p: float) -> dict:
    bounds = [difference - 0.3, difference + 0.3]
    return {"one": one, "other": other, "difference": difference, "difference_ci95": bounds, "p_holm": p}


def test_the_summary_says_what_the_intervals_say() -> None:
    result = {
        "metric": {"name": "top-1 error", "unit": "%", "higher_is_better": False}, "seeds": [0, 1, 2],
        "host": "net", "between": [_pair("r=2", "r=4", 0.5, 0.01), _pair("r=2", "r=8", -0.2, 0.3)],
        "rows": [
            _row("original", 5.0), _row("r=2", 4.5, -0.5, 0.02), _row("r=4", 4.0, -1, 0.01),
            _row("r=8", 5.5, 0.5, 0.01),
        ],
    }  # fmt: skip
    assert summary(result) == (
        "r=4 has the lowest top-1 error, 4.00 %, against 5.00 % of the original, net. "
        "Shown to be better than net: r=2; r=4. Shown to be worse than net: r=8. "
        "Among the settings themselves 1 of 2 differences are shown, the largest that of r=4 over r=2, 0.50 points."
    )
    result["between"] = []
    result["rows"][1:] = [_row("r=2", 5.2, 0.2, 0.3)]
    assert summary(result) == (
        "r=2 has the lowest top-1 error, 5.20 %, against 5.00 % of the original, net. "
        "No difference to net is shown for any setting."
    )
    assert "at least three seeds" in summary(result | {"seeds": [0, 1]})
    higher = {"name": "psnr", "unit": "dB", "higher_is_better": True}
    text = summary(result | {"metric": higher, "rows": [_row("a", 30.0, 0.5, 0.01), _row("b", 31.0, 0.9, 0.01)]})
    assert text == "b has the highest PSNR, 31.00 dB. Shown to be better than net: a; b."

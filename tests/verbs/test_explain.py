"""``explain``: its contract, against evaluations and loops; several processes; what is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explain_ranks import BOTH as SPEC
from explain_ranks import InDouble, network, random_images
from quick import quick
from test_predict_scene import WINDOW, write_scene

from excite.analysis.selection import enlarged
from excite.data import load_data
from excite.errors import ExciteError, UsageError
from excite.tasks import hyperspectral
from excite.training.fit import fit
from excite.training.recipe import load
from excite.training.run import Run
from excite.verbs.evaluate import evaluate
from excite.verbs.explain import explain
from excite.verbs.explain_data import at_most
from excite.verbs.explain_pass import Score


@pytest.fixture(scope="module")
def attentive(tmp_path_factory) -> Run:
    """A run on the digits with units of both kinds."""
    recipe = quick(**{"network.spec": SPEC})
    return fit(recipe, tmp_path_factory.mktemp("explained") / "run")


@pytest.fixture(scope="module")
def explained(attentive) -> dict[str, Any]:
    """What is said of it."""
    return explain(attentive.folder, "digits", classes=["7", "1"], channels=3)


def arrays_of(result: dict[str, Any]) -> dict[str, np.ndarray]:
    with np.load(Path(result["folder"]) / "explain.npz") as file:
        return dict(file)


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_result_is_as_agreed(attentive, explained) -> None:
    result = explained
    data = load_data("digits")
    assert result["network"] == SPEC
    assert result["run"] == str(attentive.folder)
    assert (result["data"], result["split"], result["processes"]) == ("digits", "test", 1)
    assert result["classes"] == list("0123456789")
    assert result["counts"] == torch.bincount(data.test.labels, minlength=10).tolist()
    assert result["count"] == sum(result["counts"])
    assert result["recipe"]["network"]["spec"] == SPEC
    assert {"excite", "torch"} <= result["versions"].keys()
    assert result["seconds"] > 0
    assert [unit["depth"] for unit in result["units"]] == list(range(18))
    assert [unit["kind"] for unit in result["units"]] == ["sk", "se"] * 9
    assert result["units"][1] == {
        "name": "layer1.0.se", "kind": "se", "depth": 1, "stage": 1, "size": [32, 32], "channels": 4, "kernels": [],
    }  # fmt: skip
    kernels = [{"name": "3×3", "span": 3}, {"name": "3×3, dilation 2", "span": 5}]
    assert result["units"][-2]["kernels"] == kernels
    assert [one["unit"] for one in result["excitation"]["units"]] == list(range(1, 18, 2))
    assert [one["unit"] for one in result["selection"]["units"]] == list(range(0, 18, 2))
    assert result["excitation"]["shown_classes"] == [7, 1]
    assert all(len(one["channels"]) == 3 for one in result["excitation"]["units"])
    assert [len(result[part]["observations"]) for part in ("excitation", "selection")] == [3, 2]
    assert result["folder"] == str(attentive.folder / "reports")


def test_the_files_are_written_whole(explained) -> None:
    folder = Path(explained["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["explain.html", "explain.json", "explain.npz"]
    kept = json.loads((folder / "explain.json").read_text())
    assert kept == {key: value for key, value in explained.items() if key != "folder"}
    page = (folder / "explain.html").read_text()
    assert SPEC in page
    assert len(page) < 10_000_000
    arrays = arrays_of(explained)
    assert arrays["counts"].tolist() == explained["counts"]
    assert arrays["excitation/layer1.0.se/mean"].shape == (10, 4)
    assert arrays["excitation/layer3.2.se/overall_deviation"].shape == (16,)
    assert arrays["selection/layer2.0.conv2/difference"].shape == (3, 10, 8)
    assert arrays["selection/layer2.0.conv2/attention"].shape == (3, 2, 8)


def test_one_pass_gives_the_metrics_of_an_evaluation_too(attentive, explained) -> None:
    assert explained["metrics"] == pytest.approx(evaluate(attentive.folder, "digits")["metrics"], rel=1e-9)


def test_the_gates_are_those_of_a_loop_over_images(explained, attentive) -> None:
    trained, data = attentive.load(), load_data("digits")
    pixels = data.test.images.pixels.float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.preprocessing.mean, data.preprocessing.std))
    arrays = arrays_of(explained)
    seen: dict[str, list[torch.Tensor]] = {"layer2.1.se": [], "layer2.1.conv2": []}
    for name, values in seen.items():
        gate = trained.network.get_submodule(f"{name}.gate")
        gate.register_forward_hook(lambda _, __, answer, values=values: values.append(answer[0].double()))
    with torch.no_grad():
        for image in pixels:
            trained.network(((image - mean) / std)[None])
    labels = data.test.labels
    gates, attention = (torch.stack(values) for values in seen.values())
    for number in range(10):
        own = gates[labels == number]
        np.testing.assert_allclose(arrays["excitation/layer2.1.se/mean"][number], own.mean(0), atol=1e-5)
        np.testing.assert_allclose(arrays["excitation/layer2.1.se/deviation"][number], own.std(0, False), atol=1e-5)

    # The digits know how large they are: three bins of equal counts, and no image is enlarged.
    order = data.test.scales.argsort(stable=True)
    selection = explained["selection"]
    assert selection["scale_is"] == "size of the object"
    assert selection["counts"] == [150, 150, 150]
    figure = next(one for one in selection["units"] if one["unit"] == 8)
    for number, part in enumerate(order.chunk(3)):
        difference = attention[part, 1] - attention[part, 0]
        assert figure["overall"][number] == pytest.approx(difference.mean().item(), abs=1e-6)
        assert selection["scales"][number] == pytest.approx(data.test.scales[part].quantile(0.5).item(), rel=1e-6)


def test_centres_are_enlarged_where_the_size_of_objects_is_not_known(tmp_path) -> None:
    data, attention = random_images(), []
    module = network("resnet20:width=0.25+sk")
    result = explain(module, data, scales=(1, 2), out=tmp_path)
    selection = result["selection"]
    assert (selection["scales"], selection["scale_is"]) == ([1.0, 2.0], "enlargement of the centre")
    assert selection["counts"] == [40, 40]
    assert result["excitation"] is None
    assert result["run"] is None
    assert result["recipe"] is None
    assert result["network"] == "resnet20:width=0.25+sk"
    inputs = (data.test.images.pixels.float() / 255 - 0.5) / 0.25
    module.layer3[1].conv2.gate.register_forward_hook(lambda _, __, answer: attention.append(answer))
    with torch.no_grad():
        module(inputs)
        module(enlarged(inputs, 2))
    by_image = [(answer[:, 1] - answer[:, 0]).double().mean(1) for answer in attention]
    (figure,) = [one for one in selection["units"] if result["units"][one["unit"]]["name"] == "layer3.1.conv2"]
    assert figure["overall"] == pytest.approx([one.mean().item() for one in by_image], abs=1e-6)
    assert figure["deviation"] == pytest.approx([one.std(correction=0).item() for one in by_image], abs=1e-6)
    rise = by_image[1] - by_image[0]
    assert figure["rise"] == pytest.approx(rise.mean().item(), abs=1e-6)
    half = 2.0227 * rise.std().item() / 40**0.5  # Student's t, 39 degrees of freedom
    assert figure["rise_ci95"] == pytest.approx([rise.mean().item() - half, rise.mean().item() + half], abs=1e-6)


def test_other_peoples_networks_are_explained(tmp_path) -> None:
    result = explain(network("torchvision:mobilenet_v3_small"), random_images(8, 64), out=tmp_path)
    assert len(result["excitation"]["units"]) == 9
    assert result["selection"] is None
    assert {unit["stage"] for unit in result["units"]} == {None}


def test_classes_without_images_leave_holes_and_nothing_breaks(tmp_path) -> None:
    data = random_images(classes=2)
    data = replace(data, classes=("a", "b", "c"))
    result = explain(network(classes=3), data, out=tmp_path)
    assert result["counts"] == [20, 20, 0]
    assert result["excitation"]["shown_classes"] == [0, 1]
    assert set(result["excitation"]["units"][0]["by_class"]["2"]) == {None}
    assert np.isnan(arrays_of(result)["excitation/layer1.0.se/mean"][2]).all()
    with pytest.raises(UsageError, match="no images of the class 'c'"):
        explain(network(classes=3), data, classes=["c"], out=tmp_path)


def test_fewer_images_are_spread_over_all_classes(tmp_path) -> None:
    data = random_images(40)
    result = explain(network(), data, images=8, out=tmp_path)
    assert result["counts"] == [2, 2, 2, 2]
    # By hand: of ten images of each class these two.
    some = at_most(data.test, 8)
    assert [int(name) for name in some.names] == [2, 7, 12, 17, 22, 27, 32, 37]
    assert torch.equal(some.images.batch(np.array([1, 3]), 0, 0), data.test.images.pixels[[7, 17]])
    assert at_most(data.test, 40) is data.test
    assert len(at_most(data.test, 1)) == 1


def test_the_gates_do_not_hang_on_the_mode_and_it_is_kept(tmp_path) -> None:
    module = network().train()
    result = explain(module, random_images(), out=tmp_path)
    assert module.training
    again = explain(module.eval(), random_images(), out=tmp_path)
    assert again["excitation"] == result["excitation"]


def test_scores_of_pixels_are_those_of_the_task() -> None:
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 7, generator=random), torch.randint(0, 6, (60,), generator=random)
    score = Score("pixels")
    for part, own in zip(logits.split(17), labels.split(17), strict=True):
        score.update(part, own)
    wanted = hyperspectral.evaluation(logits, labels).metrics
    assert score.metrics("hyperspectral") == pytest.approx(wanted, rel=1e-6)


# --- several processes ---------------------------------------------------------------------------------------------


def together(out: Path) -> list[tuple[int | None, str, str]]:
    """Exit code, stdout and stderr of two processes that share the work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("explain_ranks.py")), str(out)],
            env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *one) for process, one in zip(processes, said, strict=True)]


def test_two_processes_give_the_figures_of_one_and_fail_together(tmp_path) -> None:
    for code, said, error in together(tmp_path / "two"):
        assert code == 0, error
        assert "knows 4 classes" in said, "where one process fails, the other does not wait for it"
    assert not (tmp_path / "two-spoiled" / "explain.json").exists()
    alone = explain(InDouble(), random_images(41), out=tmp_path / "one")
    both = json.loads((tmp_path / "two" / "explain.json").read_text())
    assert (both["processes"], alone["processes"]) == (2, 1)
    with np.load(tmp_path / "two" / "explain.npz") as file:
        for name, array in arrays_of(alone).items():
            np.testing.assert_allclose(file[name], array, rtol=1e-9, atol=1e-9, err_msg=name)
    for key in ("count", "counts", "classes", "units", "metrics"):
        assert both[key] == (pytest.approx(alone[key], rel=1e-9) if key == "metrics" else alone[key])
    for part in ("excitation", "selection"):
        for one, other in zip(both[part]["units"], alone[part]["units"], strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                if isinstance(value, str):
                    assert value == other[key]
                else:
                    np.testing.assert_allclose(flat(value), flat(other[key]), rtol=1e-9, atol=2e-6, err_msg=key)
            exact = ("between", "within", "class_share", "mean", "low", "high", "rise", "rise_ci95", "deviation")
            for key in one.keys() & set(exact):
                np.testing.assert_allclose(flat(one[key]), flat(other[key]), rtol=1e-9, atol=1e-9, err_msg=key)
        assert [o["answer"] for o in both[part]["observations"]] == [o["answer"] for o in alone[part]["observations"]]


def flat(value: Any) -> list[float]:
    """All numbers of nested lists and dictionaries, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    return [number for one in value for number in flat(one)] if isinstance(value, list) else [float(value)]


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_network_without_gates_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="no attention unit"):
        explain(network("resnet20:width=0.25"), random_images(), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"classes": ["z"]}, "'z' is none of 'a', 'b'"),
        ({"classes": []}, "give a list of names"),
        ({"images": 0}, "images is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"scales": ()}, "scales are none"),
        ({"scales": (0.5, 1)}, "from 1 on"),
        ({"scales": (1, float("nan"))}, "from 1 on"),
        ({"scales": (2, 1)}, "rising order"),
        ({"scales": (1, 1)}, "each once"),
    ],
)
def test_wrong_options_are_refused(options, sentence, tmp_path) -> None:
    with pytest.raises(UsageError, match=sentence):
        explain(network(), random_images(), out=tmp_path, **options)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [("denoising:photos", "is for denoising"), ("digits-words", "pairs of images and texts")],
)
def test_data_without_classes_is_refused(data, sentence, tmp_path) -> None:
    with pytest.raises(UsageError, match=sentence):
        explain(network(), data, out=tmp_path)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExciteError, match="Cannot write"):
        explain(network(), random_images(), out=tmp_path / "file" / "reports")


def test_gates_that_are_no_numbers_are_told(tmp_path) -> None:
    module = network()
    with torch.no_grad():
        module.layer2[1].se.expand.bias[3] = torch.nan
    # The scores are no numbers either, so the network must not look at them.
    module.layer2[1].se.register_forward_hook(lambda _, __, answer: torch.nan_to_num(answer))
    with pytest.raises(ExciteError, match=r"layer2\.1\.se are not finite"):
        explain(module, random_images(), out=tmp_path)
    assert not (tmp_path / "explain.json").exists()


def test_what_is_not_for_scenes_is_refused() -> None:
    from excite.verbs.explain_data import open_subject

    with pytest.raises(UsageError, match="scene that was loaded"):
        open_subject(network(), "indian-pines", None, None, "cpu", False)
    with pytest.raises(UsageError, match="weights is an option for images"):
        open_subject("run", "indian-pines", None, "file", "cpu", False)


def test_a_scene_is_explained_pixel_by_pixel(tmp_path) -> None:
    scene = str(write_scene(tmp_path)[0])
    settings = {"data.path": scene, "data.window": WINDOW, "data.components": 4, "data.train_ratio": 0.3}
    settings |= {"trainer.epochs": 1, "trainer.batch_size": 16, "trainer.threads": 1, "trainer.precision": "fp32"}
    recipe = load("hybridsn-indian-pines").replace(settings | {"network.spec": "hybridsn:width=0.25+se+sk"})
    run = fit(recipe, tmp_path / "run")
    result = explain(run.folder, scene)
    wanted = evaluate(run.folder, scene)
    assert result["metrics"] == pytest.approx(wanted["metrics"], abs=1e-4)
    assert (result["count"], result["split"]) == (wanted["count"], "test")
    assert result["classes"] == run.card["classes"]
    assert {unit["kind"] for unit in result["units"]} == {"se", "sk"}
    assert {len(unit["size"]) for unit in result["units"]} == {2, 3}

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from excite import timing
from excite.errors import ExciteError, UsageError
from excite.verbs import bench as verb
from excite.verbs.bench import bench
from excite.verbs.bench_answers import same_network
from excite.verbs.bench_contestants import INFERENCE_MODES, TRAINING_MODES, Contestant, refusal
from excite.verbs.bench_plan import DEFAULT, Question, groups_of

TINY = ("resnet20:width=0.25", "resnet20:width=0.25+se")
FACTOR = {"eager": 8.0, "compiled": 4.0, "onnx": 3.0, "openvino": 2.5, "excite": 2.0, "excite-openvino": 1.5}


def contestant(mode: str, **more: Any) -> Contestant:
    given = {"precision": "fp32", "batch": 2, "what": "inference", "shape": (3, 16, 16), "classes": 10, "threads": 1}
    return Contestant(TINY[1], mode, **(given | more))


# --- the whole, for real -------------------------------------------------------------------------------------------


def test_networks_are_timed_and_told_of_and_not_timed_twice(tmp_path, monkeypatch) -> None:
    arguments: dict[str, Any] = {
        "batch": (2,), "precision": ("fp32", "int8"), "mode": ["eager"], "what": ("inference",), "size": 16,
        "rounds": 6, "threads": 1, "out": tmp_path, "min_seconds": 0.002,
    }  # fmt: skip
    result = bench(TINY, **arguments)
    assert json.loads((tmp_path / "bench.json").read_text()) | {"folder": str(tmp_path)} == result
    page = (tmp_path / "reports" / "bench.html").read_text()
    assert all(spec in page for spec in TINY)

    timed = [row for row in result["rows"] if row["status"] == "timed" and row["group"] == 0]
    assert {(row["spec"], row["what"], row["allocator"]) for row in timed} == set(
        itertools.product(TINY, ["inference"], ["system", "kept"])
    )
    for row in timed:
        assert len(row["samples"]) == 6
        assert row["seconds"] == statistics.median(row["samples"])
        assert row["seconds_ci95"] == [min(row["samples"]), max(row["samples"])]  # of six values the extremes
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["difference"] == 0
        assert 50 * 2**20 < row["imported_bytes"] <= row["running_peak_bytes"] <= row["peak_bytes"]
        assert row["eager_ratio"] is None
        host = next(other for other in timed if (other["spec"], other["allocator"]) == (TINY[0], row["allocator"]))
        if row is host:
            assert row["host_ratio"] is None
        else:
            ratios = sorted(ours / theirs for ours, theirs in zip(row["samples"], host["samples"], strict=True))
            assert row["host_ratio"]["to"] == f"{TINY[0]} eager fp32"
            assert row["host_ratio"]["value"] == pytest.approx((ratios[2] + ratios[3]) / 2)
            assert [row["host_ratio"]["low"], row["host_ratio"]["high"]] == pytest.approx([ratios[0], ratios[-1]])
    refused = [row for row in result["rows"] if row["status"] == "refused"]
    assert {(row["precision"], row["what"]) for row in refused} == {("int8", "inference")}
    assert result["settings"]["allocator"] == ["system", "kept"]
    assert result["environment"]["threads"] == 1
    assert result["networks"][TINY[0]]["macs"] < result["networks"][TINY[1]]["macs"]

    monkeypatch.setattr(timing, "time_under_settings", None)  # whoever times again finds nothing to call
    again = bench(TINY, **arguments)
    assert again["rows"] == result["rows"]
    with pytest.raises(TypeError):
        bench(TINY, **arguments | {"rounds": 7})


# --- with timings that cost nothing --------------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch) -> dict[str, Any]:
    """Timings as if taken: attention takes a tenth more, kept buffers a fifth less, and the clock wanders."""
    seen: dict[str, Any] = {"calls": [], "failures": {}, "rounds": None}
    # A group is not split because other programs have taken the memory.
    monkeypatch.setattr("excite.verbs.bench._workers_at_once", lambda contestants: 99)

    def instead(
        contestants: Mapping[str, Any], settings: Mapping[str, Any], **given: Any
    ) -> dict[str, timing.Timings]:
        seen["calls"].append((contestants, settings, given))
        failures = {name: why for name, why in seen["failures"].items() if name in contestants}
        rounds = seen["rounds"] or given["rounds"]
        found = {}
        for setting in settings:
            samples = {}
            for name in contestants:
                spec, mode, precision = name.split(" ")
                seconds = 1e-3 * FACTOR.get(mode, 1.0) * (1.1 if "se" in spec.partition("+")[2] else 1.0)
                seconds *= (0.8 if setting == "kept" else 1.0) * (0.5 if precision != "fp32" else 1.0)
                samples[name] = tuple(seconds * (1 + 0.5 * (i % 3)) for i in range(rounds))
            samples = {name: values for name, values in samples.items() if name not in failures}
            peaks = dict.fromkeys(samples, 900 * 2**20)
            told = {
                "imported_bytes": 500 * 2**20,
                "ready_seconds": 1.0,
                "difference": 1e-6,
                "report": {"nan": float("nan")},
            }
            found[setting] = timing.Timings(samples, peaks, peaks, dict.fromkeys(samples, told), failures)
        return found

    monkeypatch.setattr(timing, "time_under_settings", instead)
    return seen


def test_ratios_are_to_the_host_and_to_eager(tmp_path, made_up) -> None:
    result = bench(TINY, batch=(4,), precision=("fp32", "bf16"), what=("inference",), size=16, out=tmp_path)
    rows = {
        (row["spec"], row["mode"], row["precision"], row["allocator"], row["group"]): row
        for row in result["rows"] if row["status"] == "timed"
    }  # fmt: skip
    fp32, bf16 = 0, 1
    assert [group["title"] for group in result["groups"]] == [
        "Inference, fp32, 4 images",
        "Inference, bf16, 4 images",
    ]
    ours = rows[TINY[1], "excite-openvino", "fp32", "kept", fp32]
    assert ours["host_ratio"]["value"] == pytest.approx(1.1)
    assert ours["eager_ratio"]["value"] == pytest.approx(1.5 / 8)
    assert ours["report"] == {"nan": None}
    half = rows[TINY[1], "excite", "bf16", "kept", bf16]
    assert half["host_ratio"]["to"] == f"{TINY[0]} excite bf16"
    assert half["eager_ratio"]["to"] == f"{TINY[1]} eager fp32"  # in the same group, driven in turn with it
    assert half["eager_ratio"]["value"] == pytest.approx(0.5 * 2 / 8)
    assert rows[TINY[1], "eager", "fp32", "kept", bf16]["host_ratio"]["value"] == pytest.approx(1.1)
    assert {row["mode"] for row in result["rows"] if row["status"] == "refused"} == {"onnx", "excite-onnx"}  # in bf16
    first = result["summary"][0]
    assert first["allocator"] == "kept"
    assert "1.10× by excite (1.10–1.10)" in first["sentences"][0]
    # excite-onnx is the quickest of all here: factor 1 against 8 and, of the others, 2.5.
    assert "by excite-onnx takes 1.32 ms: 8.00× (8.00–8.00) as fast as" in first["sentences"][1]
    assert "2.50× (2.50–2.50) as fast as the fastest without excite" in first["sentences"][1]


def test_each_setting_of_the_allocator_and_what_is_built_under_it(tmp_path, made_up) -> None:
    for allocator, names in (("both", ["system", "kept"]), ("system", ["system"]), ("kept", ["kept"])):
        bench(TINY[:1], batch=(4,), mode=["eager"], what=["inference"], allocator=allocator, out=tmp_path / allocator)
        contestants, settings, given = made_up["calls"][-1]
        assert list(settings) == names
        assert given["one_by_one"]
        assert given["let_fail"]
        assert all((type(one).__name__ == "Kept") == (allocator == "kept") for one in contestants.values())
    with monkeypatch_no_setting():
        result = bench(TINY[:1], batch=(4,), mode=["eager"], what=["inference"], out=tmp_path / "none")
        assert result["settings"]["allocator"] == ["system"]
        with pytest.raises(UsageError, match="choose the allocator setting system"):
            bench(TINY[:1], allocator="kept", out=tmp_path / "none")


def monkeypatch_no_setting() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(verb, "can_keep_buffers", lambda: False)

    class Undone:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None:
            patch.undo()

    return Undone()


def test_failures_are_rows_with_their_reason(tmp_path, made_up) -> None:
    made_up["failures"] = {
        f"{TINY[0]} onnx fp32": "ONNX Runtime is not installed",
        f"{TINY[1]} excite fp32": timing.NO_TIME,
    }
    result = bench(TINY, batch=(4,), what=("inference",), out=tmp_path)
    lost = {(row["spec"], row["mode"]): row for row in result["rows"] if row["status"] in ("failed", "left out")}
    assert lost[TINY[0], "onnx"]["reason"] == "ONNX Runtime is not installed"
    assert lost[TINY[1], "excite"]["status"] == "left out"
    onnx = next(
        row for row in result["rows"] if (row["spec"], row["mode"], row["status"]) == (TINY[1], "onnx", "timed")
    )
    assert onnx["host_ratio"] is None  # there is nothing to hold it against
    assert not result["groups"][0]["complete"]
    calls = len(made_up["calls"])
    made_up["failures"] = {}
    assert bench(TINY, batch=(4,), what=("inference",), out=tmp_path)["groups"][0][
        "complete"
    ]  # what was cut is timed again
    assert len(made_up["calls"]) == calls + 1
    every = {f"{spec} {mode} fp32": "no such thing" for spec in TINY for mode in INFERENCE_MODES}
    made_up["failures"] = every
    with pytest.raises(ExciteError, match="Nothing could be timed: no such thing"):
        bench(TINY, batch=(4,), what=("inference",), out=tmp_path / "other")


def test_a_bound_leaves_out_the_last_and_says_so(tmp_path, made_up, monkeypatch) -> None:
    clock = itertools.count(0.0, 25.0)  # every look at the clock takes 25 s
    monkeypatch.setattr(verb, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    result = bench(TINY, batch=(1, 2, 4), what=("inference",), mode=["eager"], minutes=1.5, size=16, out=tmp_path)
    assert [group["seconds"] is not None for group in result["groups"]] == [True, False, False]
    assert result["groups"][0]["batch"] == 4
    assert 0 < made_up["calls"][0][2]["whole_seconds"] < 90
    (note,) = [note for note in result["notes"] if "Left out" in note]
    assert "within 1.5 minutes: Inference, fp32, 2 images" in note
    assert {row["status"] for row in result["rows"] if row["batch"] == 1} == {"left out"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"specs": ["resnet2O"]}, "resnet20"),
        ({"specs": ["timm:seresnet5O"]}, "seresnet50"),
        ({"mode": ["exite"]}, "did you mean 'excite'"),
        ({"precision": ["fp16"]}, "did you mean 'bf16'"),
        ({"what": ["train"]}, "did you mean 'training'"),
        ({"batch": [0]}, "batch is"),
        ({"batch": []}, "batch is"),
        ({"rounds": 5}, "at least 6"),
        ({"minutes": 0}, "minutes is 0"),
        ({"size": -1}, "size is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"allocator": "jemalloc"}, "unknown allocator setting"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_timed(tmp_path, made_up, arguments, sentence) -> None:
    with pytest.raises(UsageError, match=sentence):
        bench(**{"specs": TINY[:1], "size": 16, "out": tmp_path, **arguments})
    assert made_up["calls"] == []


# --- the plan ------------------------------------------------------------------------------------------------------


def plan(questions, what=("inference",), precision=("fp32",), batch=(8,), modes=None, at_once=99):
    return groups_of(questions, what, precision, batch, modes, lambda _: ((3, 16, 16), 10), 1, lambda _: at_once)


def test_the_most_telling_comes_first_and_training_never_has_one_image() -> None:
    groups = plan(DEFAULT, ("inference", "training"), ("fp32", "bf16"), (1, 8))
    said = [(group.specs[0], group.batch, group.what, group.precision) for group in groups]
    assert said[:6] == [
        ("resnet50", 8, "inference", "fp32"), ("resnet50", 8, "inference", "bf16"),
        ("resnet50", 8, "training", "fp32"), ("resnet50", 8, "training", "bf16"),
        ("resnet50", 1, "inference", "fp32"), ("resnet50", 1, "inference", "bf16"),
    ]  # fmt: skip
    assert [one[0] for one in said[6:]] == ["resnext50_32x4d"] * 6
    names = {contestant.name for contestant in groups[0].contestants}
    assert {"timm:seresnet50 compiled fp32", "resnet50+se excite-openvino fp32", "resnet50 openvino fp32"} <= names
    assert "timm:seresnet50 excite fp32" not in names
    (alone,) = plan([Question(TINY)], ("training",), batch=(1,))
    assert not alone.contestants
    assert {reason for _, reason in alone.refused} == {refusal("training", "eager", "fp32", 1)}


def test_a_group_that_memory_does_not_hold_is_split_around_those_it_is_held_against() -> None:
    (whole,) = plan([Question(TINY)])
    parts = plan([Question(TINY)], at_once=6)
    assert [len(part.contestants) for part in parts] == [6, 6, 6, 4] or len(parts) > 1
    for part in parts:
        assert [one.mode for one in part.contestants[:2]] == ["eager", "eager"]
        for _, members in itertools.groupby(part.contestants, key=lambda one: one.mode):
            assert len(list(members)) == 2  # a network is never without its host
    assert set(whole.contestants) == {one for part in parts for one in part.contestants}


def test_the_same_network_is_known_by_its_cost() -> None:
    networks = {
        "resnet50": {"parameters": 1, "macs": 5}, "resnet50+se": {"parameters": 2, "macs": 5},
        "timm:seresnet50": {"parameters": 2, "macs": 5}, "timm:gone": {"parameters": None, "macs": None},
        "timm:lost": {"parameters": None, "macs": None},
    }  # fmt: skip
    assert [same_network(spec, networks) for spec in networks] == [
        "resnet50", "resnet50+se", "resnet50+se", "timm:gone", "timm:lost"
    ]  # fmt: skip


# --- the contestants -----------------------------------------------------------------------------------------------


@pytest.fixture
def _settings_come_back(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr("excite.verbs.bench_contestants.give_back", lambda: None)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("_settings_come_back")
def test_inference_answers_as_the_plain_network() -> None:
    for mode, precision, most in (("eager", "fp32", 0.0), ("eager-cl", "fp32", 1e-5), ("eager", "bf16", 0.05)):
        call = contestant(mode, precision=precision)()
        assert call.told["difference"] <= most
        assert (call.told["difference"] > 0) == (precision == "bf16") or mode == "eager-cl"
        assert call().shape == (2, 10)
        assert call.told["ready_seconds"] > 0


@pytest.mark.usefixtures("_settings_come_back")
def test_an_optimised_network_answers_and_its_report_is_told(monkeypatch) -> None:
    def optimize(network: nn.Module, example: torch.Tensor, *, dtype: Any = None, engine: str = "torch") -> nn.Module:
        network.report = {"engine": engine, "dtype": str(dtype), "example": list(example.shape)}
        return network

    module = types.ModuleType("excite.deploy.optimize")
    module.optimize = optimize
    monkeypatch.setitem(sys.modules, "excite.deploy.optimize", module)
    told = contestant("excite", precision="bf16")().told
    assert told["report"] == {"engine": "torch", "dtype": "torch.bfloat16", "example": [2, 3, 16, 16]}


@pytest.mark.usefixtures("_settings_come_back")
@pytest.mark.parametrize("mode", ["eager", "excite"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_is_a_whole_step(mode, precision, monkeypatch) -> None:
    made: list[nn.Module] = []
    module = sys.modules["excite.create"]  # the package's name is the function's
    create = module.create
    monkeypatch.setattr(module, "create", lambda *given: made.append(create(*given)) or made[-1])
    step = contestant(mode, what="training", precision=precision)()
    (network,) = made
    assert network.training
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    before = [parameter.detach().clone() for parameter in network.parameters()], norm.num_batches_tracked.item()
    losses = [step() for _ in range(3)]
    assert norm.num_batches_tracked.item() == before[1] + 3
    assert all(
        (parameter != old).any() for parameter, old in zip(network.parameters(), before[0], strict=True)
        if parameter.grad is not None and parameter.grad.abs().max() > 0.1
    )  # fmt: skip
    assert losses[2] < losses[0]
    laid_out = (
        network.conv1
        if hasattr(network, "conv1")
        else next(
            module for module in network.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        )
    )
    assert laid_out.weight.is_contiguous(memory_format=torch.channels_last) == (mode != "eager")


def test_what_cannot_be_is_refused_with_a_reason() -> None:
    assert refusal("inference", "excite", "bf16", 1) is None
    assert refusal("training", "excite-compiled", "bf16", 2) is None
    for mode in INFERENCE_MODES:
        possible = mode in ("onnx", "openvino", "excite-onnx", "excite-openvino")
        assert (refusal("inference", mode, "int8", 1) is None) == possible
        assert (refusal("inference", mode, "bf16", 1) is not None) == mode.endswith("onnx")
    for mode in TRAINING_MODES:
        assert refusal("training", mode, "fp32", 1)
        assert refusal("training", mode, "int8", 2)
    assert refusal("training", "openvino", "fp32", 2)
    assert dataclasses.replace(contestant("eager"), batch=3).name == f"{TINY[1]} eager fp32"


def test_the_default_asks_for_no_package_that_is_missing(tmp_path, made_up, monkeypatch) -> None:
    monkeypatch.setattr(verb, "find_spec", lambda _: None)
    result = bench(batch=(2,), size=32, what=("inference",), out=tmp_path)
    assert list(result["networks"]) == ["resnet50", "resnet50+se", "resnext50_32x4d", "sknet50"]
    assert result["settings"]["minutes"] == verb.DEFAULT_MINUTES
    assert {row["status"] for row in result["rows"]} == {"timed"}
    assert Path(result["folder"]) == tmp_path

"""What `auto` comes to, from step times that are given, and from real ones."""

from __future__ import annotations

import logging

import pytest
import torch

from excite.tasks import task_named
from excite.training import fit as fitting
from excite.training.fit import fastest, fit
from excite.training.recipe import Recipe, load
from excite.training.recipe_data import load_recipe_data, training_loader


def recipe(**trainer) -> Recipe:
    keys = {"network": "resnet20:width=0.25+se", "trainer.batch_size": 128, "trainer.threads": 1}
    return load("digits").replace(keys | {f"trainer.{key}": value for key, value in trainer.items()})


def settled(monkeypatch, wanted: Recipe, seconds: dict[tuple[str, bool], float]) -> tuple[Recipe, list]:
    """The recipe as it comes out where a step takes so long, and what was measured for it."""
    measured = []

    def step_seconds(one, *_) -> float:
        measured.append((one.trainer.precision, one.trainer.compile))
        answer = seconds[one.trainer.precision, one.trainer.compile is True]
        if answer < 0:
            raise RuntimeError("no working C++ compiler\nand more")
        return answer

    monkeypatch.setattr(fitting, "step_seconds", step_seconds)
    monkeypatch.setattr(fitting, "_has_bf16", lambda device: True)
    data = load_recipe_data(wanted)
    loader = training_loader(fitting.resolved(wanted, data), data)
    return fastest(wanted, torch.nn.Identity(), task_named(data.task), loader, torch.device("cpu")), measured


def test_a_short_run_is_not_kept_waiting(monkeypatch) -> None:
    """Of few steps: nothing is measured. Of quick steps: nothing is compiled."""
    out, measured = settled(monkeypatch, recipe(epochs=2), {})
    assert (out.trainer.compile, measured) == (False, [])
    out, measured = settled(monkeypatch, recipe(epochs=100), {("fp32", False): 0.1})
    assert (out.trainer.compile, measured) == (False, [("fp32", False)])


@pytest.mark.parametrize(("compiled", "choice"), [(0.8, True), (0.98, False), (1.1, False), (-1.0, False)])
def test_a_long_run_is_compiled_where_that_pays(monkeypatch, caplog, compiled, choice) -> None:
    with caplog.at_level(logging.INFO, "excite"):
        wanted = recipe(epochs=200)
        out, measured = settled(monkeypatch, wanted, {("fp32", False): 1.0, ("fp32", True): compiled})
    assert out.trainer.compile is choice
    assert measured == [("fp32", False), ("fp32", True)]
    assert f"trainer.compile: {str(choice).lower()}" in caplog.text
    assert ("no working C++ compiler" in caplog.text) == (compiled < 0)
    assert "and more" not in caplog.text, "one line"
    assert out == wanted.replace({"trainer.compile": choice}), "nothing else changes"


def test_what_is_asked_for_is_done(monkeypatch) -> None:
    for compiled in (True, False):
        out, measured = settled(monkeypatch, recipe(epochs=200, compile=compiled, precision="bf16"), {})
        assert (out.trainer.compile, out.trainer.precision, measured) == (compiled, "bf16", [])


@pytest.mark.parametrize(("lowered", "choice"), [(0.06, "bf16"), (0.2, "fp32")])
def test_the_quicker_precision_is_taken(monkeypatch, lowered, choice) -> None:
    seconds = {("fp32", False): 0.1, ("bf16", False): lowered}
    out, _ = settled(monkeypatch, recipe(epochs=2, precision="auto", compile=False), seconds)
    assert out.trainer.precision == choice


def test_no_bfloat16_without_instructions_for_it(monkeypatch) -> None:
    monkeypatch.setattr(fitting, "step_seconds", lambda *_: pytest.fail("nothing to measure"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    wanted = recipe(epochs=2, precision="auto", compile=False)
    data = load_recipe_data(wanted)
    loader = training_loader(fitting.resolved(wanted, data), data)
    out = fastest(wanted, torch.nn.Identity(), task_named(data.task), loader, torch.device("cpu"))
    assert out.trainer.precision == "fp32"


def test_measuring_leaves_no_trace_in_the_run(monkeypatch, tmp_path) -> None:
    """A run that measured, and was to be compiled if that were quicker, gives the weights of one that did not."""
    plain = fit(recipe(epochs=1, compile=False, ema_decay=0.9), tmp_path / "plain").load().network.state_dict()
    monkeypatch.setattr(fitting, "FEWEST_STEPS", 1)
    monkeypatch.setattr(fitting, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(fitting, "SECONDS_TO_COMPILE_FOR", 0.0)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    run = fit(recipe(epochs=1, ema_decay=0.9), tmp_path / "measured")
    assert run.recipe.trainer.compile in (True, False), "the choice is written into the run's recipe"
    measured = run.load().network.state_dict()
    assert all(torch.equal(measured[name], value) for name, value in plain.items())


def test_the_log_says_what_share_waits_for_data(caplog, tmp_path) -> None:
    with caplog.at_level(logging.INFO, "excite"):
        fit(recipe(epochs=1), tmp_path / "run")
    assert "of the steps' time went into waiting for data" in caplog.text
    assert "data.workers=2" in fitting._about_waiting(35.0, 0)
    assert "data.workers=8" in fitting._about_waiting(35.0, 4)
    assert "data.workers" not in fitting._about_waiting(3.0, 0)

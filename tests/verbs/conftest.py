from __future__ import annotations

from collections.abc import Mapping

import pytest
from quick import quick

from excite import timing
from excite.training.fit import fit
from excite.training.run import Run


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """A finished run on the digits."""
    recipe = quick(**{"network.spec": "resnet20:width=0.25", "trainer.epochs": 2})
    return fit(recipe, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def no_timing(monkeypatch) -> None:
    """Timings that cost nothing: every network takes 1 ms for each 10,000 of its parameters."""

    def instead(contestants: Mapping[str, timing.InferenceCall], **_) -> timing.Timings:
        seconds = {}
        for name, call in contestants.items():
            assert not isinstance(call.network, str)
            count = sum(parameter.numel() for parameter in call.network.parameters())
            seconds[name] = tuple(count * 1e-7 * (1 + 0.01 * i) for i in range(15))
        return timing.Timings(seconds, dict.fromkeys(seconds, 1))

    monkeypatch.setattr(timing, "time_in_turn", instead)

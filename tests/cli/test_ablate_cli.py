from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from excite.cli import app
from excite.errors import UsageError

QUICK = ["--epochs", "1", "--set", "trainer.threads=1", "--set", "trainer.batch_size=256", "--seeds", "1"]


def test_a_grid_is_trained_and_printed(tmp_path, monkeypatch) -> None:
    figures = {"latency_ms": 1.0, "latency_ratio": None, "latency_ratio_ci95": None, "throughput": 1000.0}
    monkeypatch.setattr("excite.verbs.compare.speeds", lambda networks, _: {name: dict(figures) for name in networks})
    out = str(tmp_path / "out")
    line = ["ablate", "reduction=4,8", "--network", "resnet20:width=0.25+se", "--data", "digits", "--out", out]
    line += QUICK
    done = CliRunner().invoke(app, [*line, "--json"], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert [row["label"] for row in result["rows"]] == ["original", "reduction=4", "reduction=8"]
    assert [row["same_as"] for row in result["rows"]] == [None, None, "reduction=4"]  # of 16 channels at most
    assert result["data"] == "digits"
    assert result["epochs"] == 1
    shown = CliRunner().invoke(app, line, catch_exceptions=False).stdout
    assert f"{result['rows'][1]['score']:.2f}" in shown
    assert "three seeds" in shown
    assert "reports/ablate.html" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["reducton=2,4"], "did you mean 'reduction'"),
        (["reduction"], "KEY=VALUE"),
        (["reduction=2", "--network", "resnet21+se"], "resnet20"),
        (["reduction=2", "--data", "digit"], "digits"),
        (["reduction=0"], "reduction"),
    ],
)
def test_wrong_usage_is_one_sentence(tmp_path, arguments, sentence) -> None:
    with pytest.raises(UsageError, match=sentence):
        CliRunner().invoke(app, ["ablate", *arguments, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()

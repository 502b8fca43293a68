from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import excite
from excite.cli import app
from excite.errors import UsageError
from excite.verbs import bench as verb


def test_the_options_reach_the_verb_and_its_answer_is_printed(tmp_path, monkeypatch) -> None:
    seen = {}

    def instead(specs, **given):
        seen.update(given | {"specs": specs})
        return {"rows": [], "groups": [], "summary": [], "notes": ["a note"], "folder": str(tmp_path), "settings": {}}

    monkeypatch.setattr(verb, "bench", instead)
    line = [
        "bench",
        "resnet20",
        "resnet20+se",
        "--batch",
        "1, 4",
        "--precision",
        "fp32,int8",
        "--mode",
        "eager,excite",
    ]
    line += ["--what", "training", "--minutes", "2.5", "--allocator", "kept", "--out", str(tmp_path)]
    shown = CliRunner().invoke(app, line, catch_exceptions=False).stdout
    assert seen == {
        "specs": ["resnet20", "resnet20+se"], "batch": [1, 4], "precision": ["fp32", "int8"],
        "mode": ["eager", "excite"], "what": ["training"], "size": None, "rounds": 11, "minutes": 2.5,
        "allocator": "kept", "threads": None, "out": Path(tmp_path), "progress": True,
    }  # fmt: skip
    assert "a note" in shown
    assert "reports/bench.html" in shown
    printed = CliRunner().invoke(app, ["bench", "--json"], catch_exceptions=False).stdout
    assert json.loads(printed)["notes"] == ["a note"]
    assert seen["specs"] == ()
    assert seen["mode"] is None
    assert callable(excite.bench)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnet21"], "resnet20"),
        (["resnet20", "--batch", "1;8"], "--batch 1;8"),
        (["resnet20", "--batch", ""], "--batch"),
        (["resnet20", "--mode", "tensorrt"], "unknown mode"),
        (["resnet20", "--minutes", "0"], "minutes is 0"),
    ],
)
def test_wrong_usage_is_one_sentence(tmp_path, arguments, sentence) -> None:
    with pytest.raises(UsageError, match=sentence):
        CliRunner().invoke(app, ["bench", *arguments, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()

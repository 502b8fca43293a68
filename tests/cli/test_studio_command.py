from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request

import pytest
import torch

from excite import cli
from excite.create import create


def test_it_serves_until_it_is_interrupted(tmp_path) -> None:
    torch.manual_seed(0)
    network = create("resnet20:width=0.25+se", 10)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    command = [sys.executable, "-m", "excite", "studio", "resnet20:width=0.25+se", "--weights"]
    with subprocess.Popen(
        [*command, str(tmp_path / "weights.pt"), "--json", "--no-browser", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            told = "".join(process.stdout.readline() for _ in range(3))
            address = json.loads(told)["url"]
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert "resnet20:width=0.25+se" in answer.read().decode()
            process.send_signal(signal.SIGINT)
            said, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert said == ""
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnet20+se"], "is not a run, and as a network spec it has random weights"),
        (["resnet20+se", "--port", "70000"], "65535"),
        (["no/such/run"], "is not a run"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, sentence, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["excite", "studio", "--no-browser", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import excite

QUICK = ["--set", "trainer.batch_size=128", "--set", "trainer.threads=1", "--epochs", "1"]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "excite", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=300)


@pytest.mark.parametrize("line", ["--help", "networks", "networks --json", "recipes", "compare --help"])
def test_the_quick_answers_do_not_import_torch(line) -> None:
    script = (
        "import sys; sys.argv = ['excite', *sys.argv[1:]]\n"
        "from excite.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'numpy', 'pytorch_lightning'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *line.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_networks_lists_what_can_be_created() -> None:
    listed = json.loads(run("networks", "--json").stdout)["networks"]
    assert [entry["name"] for entry in listed] == excite.networks()


def test_networks_against_their_papers() -> None:
    counted = json.loads(run("networks", "senet154", "--paper", "--json").stdout)["networks"]
    assert [round(row["parameters"]) for row in counted] == [115, 115]
    assert [row["paper_macs"] for row in counted] == [20.7, None]
    assert run("networks", "resnet20", "--paper").stdout.startswith("| spec | input |")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cost", "resnet21"], "resnet20"),
        (["cost", "resnet20:depth=3"], "depth"),
        (["compare", "resnet20", "--data", "digit"], "digits"),
        (["compare", "resnet20", "--data", "digits", "--weights", "nowhere.pt"], "nowhere.pt"),
        (["compare", "resnet20", "--data", "digits", "--weights", "imagenet", "--control"], "leave control out"),
        (["compare", "--set", "trainer.epoch=3"], "trainer.epochs"),
        (["compare", "--set", "nonsense"], "KEY=VALUE"),
        (["train"], "needs a recipe"),
        (["train", "cifar"], "cifar10"),
        (["train", "--resume", "nowhere"], "not a run"),
        (["evaluate", "resnet20", "--data", "digits"], "random weights"),
        (["evaluate", "resnet20", "--weights", "nowhere.pt", "--data", "digits"], "nowhere.pt"),
        (["evaluate", "nowhere/run", "--data", "digits"], "nowhere"),
        (["predict", "nowhere", "x.png"], "not a run"),
        (["recipes", "digit"], "digits"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_two(arguments, sentence, tmp_path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("excite: ")
    assert done.stdout == ""


def test_an_unknown_verb_or_option_is_exit_code_two() -> None:
    assert run("compere").returncode == 2
    assert run("compare", "--sedes", "3").returncode == 2


def test_debug_shows_where_it_came_from() -> None:
    assert "Traceback" in run("--debug", "cost", "resnet21").stderr


def test_train_evaluate_and_resume(tmp_path) -> None:
    start = ["train", "--network", "resnet20:width=0.25", "--data", "digits", "--out", "run", *QUICK]
    done = run(*start, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = json.loads(done.stdout)
    assert trained["run"] == "run"
    assert trained["spec"] == "resnet20:width=0.25"
    scored = json.loads(run("evaluate", "run", "--data", "digits", "--json", cwd=tmp_path).stdout)
    assert scored["metrics"] == trained["metrics"]
    assert scored["count"] == trained["count"]
    again = run(*start, cwd=tmp_path)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    resumed = run("train", "--resume", "run", "--json", cwd=tmp_path)
    assert json.loads(resumed.stdout) == trained


def test_cost_counts_what_the_modules_have() -> None:
    rows = json.loads(run("cost", "resnet20", "resnet20+se", "--no-latency", "--json").stdout)["results"]
    for row in rows:
        network = excite.create(row["spec"], num_classes=10)
        assert row["parameters"] == sum(p.numel() for p in network.parameters())
    assert rows[0]["size"] == 32


def test_every_public_name_is_there_and_functions_win_over_modules() -> None:
    import excite.cost
    import excite.create
    import excite.networks.catalog

    for name in excite.__all__:
        assert getattr(excite, name) is not None
    assert callable(excite.create)
    assert callable(excite.cost)
    assert "resnet20" in excite.networks()
    assert isinstance(excite.create("resnet20", num_classes=10), torch.nn.Module)
    with pytest.raises(AttributeError):
        _ = excite.nonsense

"""A step gives the same gradient however it is divided; the truth is a plain loop over whole batches."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_work import LR, MOMENTUM, Samples, spawned, tiny, trained
from excite.create import create
from excite.data.draws import permutation
from excite.errors import ExciteError, UsageError
from excite.processes import processes
from excite.tasks.classification import TASK
from excite.training import checkpoint
from excite.training.distributed_parts import bounds, check_divides
from excite.training.fit import fit
from excite.training.recipe import Recipe, load
from excite.training.recipe_data import load_recipe_data
from excite.training.run import Run
from excite.training.sync_batch_norm import synchronised

STEPS = 20
PLAIN = {"samples": 195, "batch": 64, "steps": STEPS}
"""Every fourth step is an epoch's last one, and has three samples: too few for two processes."""

CASES: dict[str, dict[str, Any]] = {
    "sync": PLAIN,
    "sync, weighted": PLAIN | {"weights": (1.0, 0.2, 3.0, 0.5)},
    "parts": PLAIN | {"norm": False, "most": 7},
    "parts, weighted, clipped": PLAIN | {"norm": False, "most": 10, "weights": (1.0, 0.2, 3.0, 0.5), "clip": 0.05},
    "divided": PLAIN | {"divided": True},
}


def reference(
    samples: int,
    batch: int,
    steps: int,
    norm: bool = True,
    weights: tuple[float, ...] | None = None,
    clip: float | None = None,
    **_: Any,
) -> dict[str, Tensor]:
    """SGD with momentum over whole batches."""
    network, data = tiny(norm), Samples(samples)
    velocity = [torch.zeros_like(parameter) for parameter in network.parameters()]
    starts = itertools.chain.from_iterable(
        [(epoch, start) for start in range(0, samples, batch)] for epoch in itertools.count()
    )
    for epoch, start in itertools.islice(starts, steps):
        index = permutation(5, epoch, samples)[start : start + batch]
        weight = torch.tensor(weights).double() if weights else None
        loss = F.cross_entropy(network(data.x[index]), data.y[index], weight)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        length = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        factor = 1.0 if clip is None else min(1.0, clip / (float(length) + 1e-6))
        with torch.no_grad():
            for parameter, gradient, v in zip(network.parameters(), gradients, velocity, strict=True):
                v.mul_(MOMENTUM).add_(gradient * factor)
                parameter.sub_(LR * v)
    return network.state_dict()


COUNTS = [[4, 4], [5, 2], [3, 0], [1, 1]]
"""Samples of each process in a batch norm."""


def digits(**changes: Any) -> Recipe:
    """A short run on digits, the last of whose batches is short."""
    short = {
        "network": "resnet20:width=0.25+se",
        "data.val_fraction": 0.25,
        "trainer.epochs": 1,
        "trainer.batch_size": 128,
        "trainer.device": "cpu",
        "trainer.threads": 1,
        "trainer.checkpoint_steps": 3,
        "trainer.keep_checkpoints": 9,
    }
    return load("digits").replace(short | changes)


def work(folder: Path) -> dict[str, Any]:
    """All that two processes do in these tests; to start them takes longer."""
    fit(digits(**{"trainer.strategy": "fsdp"}), folder / "divided")
    fit(digits(**{"trainer.micro_batch": 20, "trainer.sync_batch_norm": False}), folder / "parts")
    refused = ""
    try:
        fit(digits(), folder / "divided")
    except ExciteError as error:
        refused = f"{type(error).__name__}: {error}"
    trainings = {name: trained(**case) for name, case in CASES.items()}
    return trainings | {"norm": norm_work(COUNTS), "refused": refused}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    return spawned(work, 2, folder / "group", folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_plain_loop_learns(two: list[Any], name: str) -> None:
    expected = reference(**CASES[name])
    for rank in range(2):
        found = two[rank][name]["weights"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).abs().max() < 1e-10, (rank, key)
    assert two[0][name]["loss"] == two[1][name]["loss"], "both are told the loss of all"


@pytest.mark.parametrize("name", ["sync", "parts, weighted, clipped"])
def test_one_process_learns_what_the_plain_loop_learns(name: str) -> None:
    expected, found = reference(**CASES[name]), trained(**CASES[name])["weights"]
    assert all((found[key] - value).abs().max() < 1e-10 for key, value in expected.items())


def test_each_sample_is_seen_once_in_an_epoch(two: list[Any]) -> None:
    for epoch in range(STEPS // 4):
        seen: list[int] = []
        for step in range(4 * epoch, 4 * epoch + 4):
            own = [rank["sync"]["index"][step] for rank in two]
            assert [len(part) for part in own] == ([32, 32] if step % 4 < 3 else [3, 0])
            seen += own[0] + own[1]
        assert seen == permutation(5, epoch, 195).tolist()


@pytest.mark.parametrize("samples", [2, 3, 7, 15, 16, 64, 101])
@pytest.mark.parametrize("most", [None, 4, 5, 16])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_have_no_gap_no_overlap_and_nobody_has_one(samples: int, most: int | None, processes: int) -> None:
    ends = [bounds(samples, processes, rank, most) for rank in range(processes)]
    assert len({len(one) for one in ends}) == 1, "all meet each other as often"
    parts = [range(*pair) for one in ends for pair in itertools.pairwise(one)]
    assert list(itertools.chain.from_iterable(parts)) == list(range(samples))
    assert all(len(part) != 1 for part in parts)
    assert most is None or max(map(len, parts)) <= most


def test_a_batch_that_does_not_divide_is_refused_with_those_that_do() -> None:
    check_divides(64, 4)
    with pytest.raises(UsageError, match=r"batch_size.*100 .* 3 processes; take 99 or 102"):
        check_divides(100, 3)
    with pytest.raises(UsageError, match="take 16"):
        check_divides(8, 8)


def norm_work(counts: list[list[int]]) -> dict[str, Any]:
    """Shared batch norm over maps of which each process has its own number of samples."""
    out = {}
    with processes() as group:
        for number, count in enumerate(counts):
            x, weight = norm_input(sum(count), number)
            own = slice(sum(count[: group.rank]), sum(count[: group.rank + 1]))
            norm = norm_module()
            with synchronised(nn.Sequential(norm)):
                part = x[own].clone().requires_grad_()
                y = norm(part)
                (y * weight[own]).sum().backward()
            gradients = [group.sums(p.grad.tolist()) for p in norm.parameters() if p.grad is not None]
            assert type(norm) is nn.BatchNorm2d
            out[str(number)] = {"y": y.detach(), "dx": part.grad, "state": norm.state_dict(), "dp": gradients}
    return out


def norm_input(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(samples, 5, 4, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    return 3 * x + 100, weight


def norm_module() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 5))
        norm.bias.copy_(torch.linspace(-1, 1, 5))
    return norm


def test_shared_batch_norm_is_batch_norm_over_all_samples(two: list[Any]) -> None:
    for number, count in enumerate(COUNTS):
        x, weight = norm_input(sum(count), number)
        norm = norm_module()
        x.requires_grad_()
        y = norm(x)
        (y * weight).sum().backward()
        ours = [one["norm"][str(number)] for one in two]
        assert torch.allclose(torch.cat([one["y"] for one in ours]), y, atol=1e-11)
        assert torch.allclose(torch.cat([one["dx"] for one in ours]), x.grad, atol=1e-11)
        for one in ours:
            assert one["state"].keys() == norm.state_dict().keys()
            assert all(torch.allclose(one["state"][key], value) for key, value in norm.state_dict().items())
            for own, parameter in zip(one["dp"], norm.parameters(), strict=True):
                assert parameter.grad is not None
                assert torch.allclose(torch.tensor(own).double(), parameter.grad, atol=1e-9)


def test_a_norm_that_does_more_is_refused_and_leaves_the_network_as_it_was() -> None:
    class Own(nn.BatchNorm2d):
        pass

    network = nn.Sequential(nn.BatchNorm2d(3), Own(3))
    with pytest.raises(UsageError, match=r"sync_batch_norm.*1 is a Own"), synchronised(network):
        pass
    assert [type(module) for module in network] == [nn.BatchNorm2d, Own]


def test_a_run_of_two_is_that_of_one(two: list[Any], folder: Path, tmp_path: Path) -> None:
    alone = fit(digits(), tmp_path / "alone").metrics()
    divided = Run(folder / "divided").metrics()
    assert divided["step"] == alone["step"] == [8.0]
    # Single precision, in which eight steps of a small network differ by little.
    assert divided["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-2)
    assert divided["val_loss"] == pytest.approx(alone["val_loss"], rel=5e-2)


def test_a_divided_run_is_scored_as_it_is_written(two: list[Any], folder: Path) -> None:
    for name in ("divided", "parts"):
        run = Run(folder / name)
        data = load_recipe_data(run.recipe)
        scored = TASK.score(run.load().network, data.val, data.preprocessing).metrics
        for metric, value in scored.items():
            assert run.metrics()[f"val_{metric}"] == pytest.approx([value], rel=1e-4), (name, metric)


def test_one_process_goes_on_where_two_with_divided_parameters_were(
    two: list[Any], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "divided", tmp_path / "run")
    run = Run(tmp_path / "run")
    whole = Run(folder / "divided").metrics()
    (run.folder / "model.json").unlink()
    for path in (run.folder / "checkpoints").glob("step-[!3]*"):
        path.unlink()
    state = checkpoint.load_newest(run.folder / "checkpoints")
    assert state is not None
    assert state["position"]["step"] == 3
    momenta = [values["momentum_buffer"] for values in state["optimizer"]["state"].values()]
    network = create(run.recipe.network.spec, 10)
    assert sorted(one.shape for one in momenta) == sorted(one.shape for one in network.parameters())
    fit(run.recipe, run.folder, resume=True)
    assert run.metrics()["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-2)


def test_a_taken_folder_is_refused_by_one_of_them(two: list[Any]) -> None:
    said = [one["refused"] for one in two]
    assert said[0].startswith("UsageError")
    assert "already holds a run" in said[0]
    assert said[1].startswith("PeerError")

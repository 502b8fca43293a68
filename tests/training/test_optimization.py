from __future__ import annotations

import pytest
import torch
from torch import nn

from excite.training.optimization import build_optimizer, rate_factor
from excite.training.recipe import Optimizer, Schedule


def _rates(scheduler_of, steps: int) -> list[float]:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = scheduler_of(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("steps", "peak_at"), [(100, 0.3), (37, 0.25), (1000, 0.5)])
def test_one_cycle_is_that_of_pytorch(steps, peak_at) -> None:
    theirs = _rates(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=1.0, total_steps=steps + 1, pct_start=peak_at, cycle_momentum=False
        ),
        steps,
    )
    # PyTorch counts one step more: its last rate would be that of a step after the end.
    schedule = Schedule(name="onecycle", peak_at=peak_at)
    ours = [rate_factor(schedule, step, steps + 1, 10) for step in range(steps)]
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_cosine_is_that_of_pytorch() -> None:
    theirs = _rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50), 50)
    ours = [rate_factor(Schedule(name="cosine"), step, 50, 10) for step in range(50)]
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_step_is_that_of_pytorch() -> None:
    theirs = _rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [20, 30], gamma=0.2), 40)
    schedule = Schedule(name="step", milestones=(0.5, 0.75), gamma=0.2)
    ours = [rate_factor(schedule, step, 40, 10) for step in range(40)]
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("name", ["cosine", "step", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_peak(name) -> None:
    schedule = Schedule(name=name, warmup_epochs=0.5)
    rates = [rate_factor(schedule, step, 100, 20) for step in range(11)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["onecycle", "cosine", "step", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_have_a_rate(name, total) -> None:
    for step in range(total):
        assert 0 < rate_factor(Schedule(name=name, warmup_epochs=5), step, total, 1) <= 1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_leaves_norms_and_biases_alone_unless_asked(name) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decays = {
        id(p): group["weight_decay"]
        for group in build_optimizer(network, Optimizer(name=name, weight_decay=0.1)).param_groups
        for p in group["params"]
    }
    assert decays == {id(p): 0.1 if p.ndim > 1 else 0.0 for p in network.parameters()}
    (group,) = build_optimizer(network, Optimizer(name=name, weight_decay=0.1, decay_norm_and_bias=True)).param_groups
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == len(list(network.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    network = nn.Linear(2, 2)
    network.weight.requires_grad_(False)
    (group,) = build_optimizer(network, Optimizer()).param_groups
    assert [id(p) for p in group["params"]] == [id(network.bias)]

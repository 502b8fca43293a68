from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from excite.training.optimization import build_optimizer, host_factor, host_is_frozen, rate_factor, scaled
from excite.training.recipe import Optimizer, Recipe, Schedule


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


NEW = {"1.weight", "2.bias"}  # the scale of the batch norm and the bias of the classifier


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("decay_all", [False, True])
def test_what_came_from_weights_has_a_rate_of_its_own(name, decay_all) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    settings = Optimizer(name=name, lr=0.5, host_factor=0.2, weight_decay=0.1, decay_norm_and_bias=decay_all)
    groups = build_optimizer(network, settings, NEW).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == 6
    assert found == {
        id(p): (0.5 if key in NEW else 0.1, 0.1 if decay_all or key in ("0.weight", "2.weight") else 0.0)
        for key, p in network.named_parameters()
    }
    assert groups[0]["lr"] == 0.5, "the rate that the record shows is that of what is new"


def test_the_groups_come_in_the_same_order_whatever_order_the_names_have() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    orders = [
        [[id(p) for p in group["params"]] for group in build_optimizer(network, Optimizer(), fresh).param_groups]
        for fresh in (sorted(NEW), sorted(NEW, reverse=True), frozenset(NEW))
    ]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize(
    ("given", "fresh", "expected"),
    [(None, None, 1.0), (None, (), 1.0), (None, {"fc.weight"}, 0.1), (0.3, (), 0.3), (0.3, {"fc.weight"}, 0.3)],
)
def test_the_host_learns_slower_where_something_is_new(given, fresh, expected) -> None:
    assert host_factor(Optimizer(host_factor=given), fresh) == expected


def test_without_weights_the_factor_plays_no_part() -> None:
    (group,) = build_optimizer(nn.Linear(2, 2, bias=False), Optimizer(lr=0.5, host_factor=0.2)).param_groups
    assert group["lr"] == 0.5


def test_the_host_is_frozen_for_so_many_epochs() -> None:
    half = Schedule(host_frozen_epochs=1.5)
    assert [host_is_frozen(half, step, steps_per_epoch=4) for step in range(8)] == [True] * 6 + [False] * 2
    assert not host_is_frozen(Schedule(), 0, steps_per_epoch=4)


def test_the_rate_is_scaled_with_the_batch_after_a_warm_up_from_the_small_one() -> None:
    # Goyal et al.: 0.1 for 256 images, 3.2 for 8192, from 0.1 up over five of 90 epochs.
    recipe = Recipe().replace(
        {
            "optimizer.lr": 0.1,
            "optimizer.lr_batch": 256,
            "trainer.batch_size": 8192,
            "trainer.epochs": 90,
            "schedule.name": "step",
            "schedule.milestones": (1 / 3, 2 / 3, 8 / 9),
        }
    )
    out = scaled(recipe)
    assert out.optimizer.lr == pytest.approx(3.2)
    rates = [out.optimizer.lr * rate_factor(out.schedule, step, 90 * 156, 156) for step in range(90 * 156)]
    assert rates[0] == pytest.approx(0.1, rel=0.05)
    steps = [b - a for a, b in itertools.pairwise(rates[: 5 * 156])]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert rates[5 * 156] == pytest.approx(3.2)
    assert rates[-1] == pytest.approx(0.0032)
    assert scaled(out) == out, "a run that goes on is not scaled twice"


@pytest.mark.parametrize(
    ("changes", "epochs", "start"),
    [
        ({"trainer.batch_size": 64}, 2.0, 0.25),  # a tenth of twenty epochs
        ({"schedule.warmup_epochs": 3}, 3.0, 0.0),
        ({"schedule.name": "onecycle"}, 0.0, 0.0),
        ({"optimizer.lr_batch": None}, 0.0, 0.0),
    ],
)
def test_a_warm_up_is_added_only_where_there_is_none(changes, epochs, start) -> None:
    base = {"optimizer.lr_batch": 256, "trainer.batch_size": 1024, "trainer.epochs": 20, "schedule.name": "cosine"}
    out = scaled(Recipe().replace(base | changes))
    assert (out.schedule.warmup_epochs, out.schedule.warmup_from) == (epochs, start)

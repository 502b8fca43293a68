"""Training that starts from weights: what came from them, and what is new beside it.

The networks here are loaded with nothing: an ``Origin`` says which of their parameters are new.
"""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from excite.create import create
from excite.data import ImageData, Loader, from_datasets
from excite.errors import UsageError
from excite.training import checkpoint
from excite.training.callbacks import Freeze, InterruptedRunError, Position, Record
from excite.training.fit import fit
from excite.training.recipe import Recipe, load
from excite.training.run import Run
from excite.weights.base import Origin

FRESH = frozenset(f"{name}.{kind}" for name in ("unit.0", "unit.2", "head") for kind in ("weight", "bias"))


class Host(nn.Module):
    """A convolution with batch norm and dropout that came from weights; a gate and a classifier that are new."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.unit = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.BatchNorm1d(4), nn.Sigmoid())
        self.head = nn.Linear(4, 2)
        self.origin = Origin("nowhere.pth", "by hand", fresh=FRESH)

    def forward(self, images: Tensor) -> Tensor:
        features = self.dropout(F.relu(self.norm(self.convolution(images))).mean((2, 3)))
        return self.head(features * self.unit(features))


def host(fresh: frozenset[str] = FRESH, dropout: float = 0.2) -> Host:
    torch.manual_seed(3)
    network = Host()
    network.origin = Origin("nowhere.pth", "by hand", fresh=fresh)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return network


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Two kinds of noise, 32 images to train on (4 batches of 8), 8 to validate and 8 to test."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 2
    images = torch.randn(48, 1, 8, 8, generator=generator) * (1 + labels.view(-1, 1, 1, 1))
    parts = [TensorDataset(images[part], labels[part]) for part in (slice(32), slice(32, 40), slice(40, 48))]
    return from_datasets(parts[0], parts[2], val=parts[1])


def recipe(**changes) -> Recipe:
    settings = {"trainer.epochs": 3, "trainer.batch_size": 8, "trainer.threads": 1, "trainer.channels_last": False}
    settings |= {"optimizer.weight_decay": 0.01, "trainer.checkpoint_steps": 1, "trainer.keep_checkpoints": 12}
    return load("finetune").replace(settings | changes)


def state_at(run: Run, step: int) -> dict[str, Tensor]:
    state = torch.load(run.folder / "checkpoints" / f"step-{step}.ckpt", "cpu", weights_only=True)["network"]
    assert isinstance(state, dict)
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def final(run: Run) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run.folder / "model.safetensors")


def test_frozen_for_an_epoch_is_as_a_loop_by_hand(tmp_path, data) -> None:
    settings = recipe(**{"schedule.host_frozen_epochs": 1.5, "optimizer.lr": 0.2, "schedule.warmup_epochs": 0})
    run = fit(settings, tmp_path / "run", network=host(dropout=0), data=data)

    network = host(dropout=0)
    named = dict(network.named_parameters())
    new = {name: p for name, p in named.items() if name in FRESH}
    loaded = {name: p for name, p in named.items() if name not in FRESH}
    velocity: dict[str, Tensor] = {}
    assert data.train is not None
    loader = Loader(data.train, data.preprocessing, 8, seed=0, augment=data.augmentation, shuffle=True)
    for step in range(12):
        if step % 4 == 0:
            loader.load_state_dict(loader.state_dict() | {"epoch": step // 4, "batch": 0})
            batches = iter(loader)
        frozen = step < 6
        network.train()
        if frozen:
            network.norm.eval()
        learning = new if frozen else named
        images, target, _ = next(batches)
        gradients = torch.autograd.grad(F.cross_entropy(network(images), target), list(learning.values()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        gradients = [gradient * min(1.0, 5.0 / (float(norm) + 1e-6)) for gradient in gradients]
        rate = 0.2 * 0.5 * (1 + math.cos(math.pi * step / 12))
        with torch.no_grad():
            for (name, parameter), gradient in zip(learning.items(), gradients, strict=True):
                if parameter.ndim > 1:
                    gradient = gradient + 0.01 * parameter
                velocity[name] = 0.9 * velocity[name] + gradient if name in velocity else gradient
                own = rate * (0.1 if name in loaded else 1.0)
                parameter -= own * (gradient + 0.9 * velocity[name])
        for name, value in state_at(run, step + 1).items():
            torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-4, atol=1e-6, msg=f"{step} {name}")
    assert run.recipe.optimizer.host_factor == 0.1


def test_what_came_from_weights_stays_bit_for_bit_until_its_time(tmp_path, data) -> None:
    run = fit(recipe(**{"schedule.host_frozen_epochs": 1}), tmp_path / "run", network=host(), data=data)
    start = host().state_dict()
    loaded = [name for name in start if not name.startswith(("unit", "head"))]
    assert {"convolution.weight", "norm.weight", "norm.running_mean", "norm.num_batches_tracked"} <= set(loaded)
    for step in range(1, 5):
        state = state_at(run, step)
        assert all(torch.equal(state[name], start[name]) for name in loaded)
        assert not torch.equal(state["head.weight"], start["head.weight"])
        assert state["unit.2.num_batches_tracked"] == step, "a new batch norm counts from the first step"
    after = state_at(run, 5)
    assert not any(torch.equal(after[name], start[name]) for name in loaded)


SETTINGS = {
    "sgd": {"optimizer.name": "sgd"},
    "adamw": {"optimizer.name": "adamw", "optimizer.lr": 0.01},
    "decay and average": {"optimizer.decay_norm_and_bias": True, "trainer.ema_decay": 0.9},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_broken_off_at_any_step_it_ends_in_the_same_weights(tmp_path, data, changes, monkeypatch) -> None:
    settings = recipe(**{"schedule.host_frozen_epochs": 1.25} | changes)
    whole = fit(settings, tmp_path / "whole", network=host(), data=data)
    assert "val_top1" in whole.metrics(), "scoring in between changes the mode of the modules"
    end = Record.on_train_batch_end

    def stopping(self: Record, *rest) -> None:
        # Wished for before the step that is to be the last: frozen, when it thaws, and later.
        self.stop = self.position.step + 2 in (2, 5, 7)
        end(self, *rest)

    monkeypatch.setattr(Record, "on_train_batch_end", stopping)
    for step in (2, 5, 7):
        with pytest.raises(InterruptedRunError):
            fit(settings, tmp_path / "broken", network=host(), data=data, resume=True)
        saved = checkpoint.load_newest(tmp_path / "broken" / "checkpoints")
        assert saved is not None
        assert saved["position"]["step"] == step
    broken = fit(settings, tmp_path / "broken", network=host(), data=data, resume=True)
    assert same(final(broken), final(whole))
    for step in range(8, 13):
        assert same(state_at(broken, step), state_at(whole, step))


def test_only_the_new_is_trained_where_it_is_never_thawed(tmp_path, data) -> None:
    run = fit(recipe(**{"schedule.host_frozen_epochs": 3}), tmp_path / "run", network=host(), data=data)
    start, end = host().state_dict(), final(run)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if name.startswith(("unit", "head"))}


def test_new_modules_learn_and_the_rest_rests() -> None:
    network = host()
    network.norm.weight.requires_grad_(False)  # the user's own wish
    position = Position(0, 12, 4)
    freeze = Freeze(position, network, FRESH, lambda step: step < 4)
    learning = {name for name, _ in network.named_parameters()} - {"norm.weight"}
    for step, frozen in ((0, True), (3, True), (4, False), (11, False), (2, True)):
        position.step = step
        network.eval()  # as an evaluation leaves it
        freeze.on_train_batch_start()
        modes = {name for name, module in network.named_modules() if module.training}
        grads = {name for name, p in network.named_parameters() if p.requires_grad}
        if frozen:
            assert modes == {"unit", "unit.0", "unit.1", "unit.2", "unit.3", "head"}
            assert grads == set(FRESH)
        else:
            assert modes == {name for name, _ in network.named_modules()}
            assert grads == learning


@pytest.mark.parametrize(
    ("fresh", "given", "expected"),
    [(FRESH, None, 0.1), (frozenset(), None, 1.0), (FRESH, 0.5, 0.5), (frozenset(), 0.5, 0.5)],
)
def test_the_factor_is_written_into_the_recipe(tmp_path, data, fresh, given, expected) -> None:
    settings = recipe(**{"optimizer.host_factor": given, "trainer.epochs": 1})
    run = fit(settings, tmp_path / "run", network=host(fresh), data=data)
    assert run.recipe.optimizer.host_factor == expected


def test_without_weights_the_factor_is_one(tmp_path, data) -> None:
    network = host()
    del network.origin
    settings = recipe(**{"optimizer.host_factor": None, "trainer.epochs": 1})
    run = fit(settings, tmp_path / "run", network=network, data=data)
    assert run.recipe.optimizer.host_factor == 1.0


def test_freezing_needs_weights_and_something_new(tmp_path, data) -> None:
    settings = recipe(**{"schedule.host_frozen_epochs": 1})
    with pytest.raises(UsageError, match=r"schedule\.host_frozen_epochs.*all its parameters came from the weights"):
        fit(settings, tmp_path / "run", network=host(frozenset()), data=data)
    network = host()
    del network.origin
    with pytest.raises(UsageError, match=r"schedule\.host_frozen_epochs.*nothing in Host was loaded from weights"):
        fit(settings, tmp_path / "run", network=network, data=data)
    assert not (tmp_path / "run").exists()


def test_the_spec_that_was_built_is_the_recipes(tmp_path, data, monkeypatch) -> None:
    def with_choices_made(spec: str, *rest, **more) -> nn.Module:
        network = create(spec, *rest, **more)
        network.spec = "resnet20:width=0.25+se:reduction=8"
        return network

    monkeypatch.setattr("excite.training.fit.create", with_choices_made)
    settings = recipe(**{"network.spec": "resnet20:width=0.25+se", "trainer.epochs": 1})
    run = fit(settings, tmp_path / "run", data=data)
    assert run.recipe.network.spec == run.card["spec"] == "resnet20:width=0.25+se:reduction=8"
    assert same(dict(run.load().network.state_dict()), final(run))

"""Settings of an ablation that make no difference: those that build one and the same network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from excite.create import create
from excite.training.recipe_data import AnyData
from excite.verbs.compare import example_shape


def same_networks(specs: Sequence[str], images: AnyData, weights: str | Path | None) -> dict[str, str]:
    """For a spec that builds what an earlier one builds, with the same start, that earlier one.

    A bottleneck has a least width, so that two reductions can come to the same; to train both would show two equal
    rows, and take a share of the correction for many comparisons.
    """
    classes, channels = len(images.classes) or None, images.preprocessing.channels
    kept: dict[str, nn.Module] = {}
    same: dict[str, str] = {}
    for spec in dict.fromkeys(specs):
        torch.manual_seed(0)
        network = create(spec, classes, channels, weights)
        twin = next((name for name, other in kept.items() if _alike(network, other, images)), None)
        if twin is None:
            kept[spec] = network
        else:
            same[spec] = twin
    return same


def _alike(one: nn.Module, other: nn.Module, images: AnyData) -> bool:
    """Whether two networks from the same seed start from the same numbers, and do the same with any others."""
    mine, theirs = one.state_dict(), other.state_dict()
    if list(mine) != list(theirs) or not all(torch.equal(mine[name], theirs[name]) for name in mine):
        return False
    channels, height, width = getattr(one, "input_shape", None) or example_shape(images)
    inputs = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    try:
        return torch.equal(_answer(one, inputs), _answer(other, inputs))
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False  # it takes something else than images: then every setting is trained


def _answer(network: nn.Module, inputs: Tensor) -> Tensor:
    """What a network in training mode says with every parameter moved a little, which is as it was afterwards."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    # Gates that start at 1 all look the same, whatever their form, as long as their last layer is zero.
    generator = torch.Generator().manual_seed(1)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
            torch.manual_seed(2)  # for dropout
            return network.train()(inputs)
    finally:
        network.load_state_dict(before)

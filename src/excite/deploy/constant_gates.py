"""Squeeze-and-excitation whose gates hardly vary, replaced by a constant scale.

A gate that is the same for every image multiplies each channel by a number. So does the batch norm in front of it
(its γ and β), or the convolution (its kernels and biases), which can take the number in: then nothing is left of the
unit. Where the gate is constant that changes nothing but rounding, and with powers of two not even that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from excite.analysis.gates import Gate
from excite.analysis.importance import what_feeds
from excite.evaluation_mode import evaluation_mode
from excite.networks.site import Add
from excite.surgery import hooks


class ConstantScale(nn.Module):
    """Multiplies each channel by a number: what a unit is whose gates are constant.

    Args:
        scale: (C,).
    """

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().clone())

    def forward(self, u: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """(N, C, *) → scale · u, or scale · u + shortcut."""
        scale = self.scale.to(u.dtype).view(1, -1, *[1] * (u.dim() - 2))
        return u * scale if shortcut is None else torch.addcmul(shortcut, u, scale)


def replace_constant_gates(
    network: nn.Module, gates: Sequence[Gate], constants: Mapping[str, Tensor], example: Tensor
) -> list[dict[str, Any]]:
    """Replace units by constant scales, in place, and fold these into the layers before them where that is possible.

    That it is possible, that is to say that nothing else reads what the layer puts out, is found out by running the
    network with the scale beside it and with the scale in it.

    Args:
        network: changed in place.
        gates: its units.
        constants: by a unit's name, what to put for its gates (C,): those units are replaced.
        example: what the network takes, (N, …), such as random numbers.

    Returns:
        For each unit that was replaced ``{"unit", "how": "folded" | "scaled", "into": a layer or None, "shortcut":
        whether the unit added one, "channels": C}``; :func:`place_constant_gates` does the same to a network of which
        the weights come later.
    """
    chosen = [gate for gate in gates if gate.kind == "se" and gate.name in constants and _is_a_module(gate)]
    fed = what_feeds(network, chosen, example)
    records: list[dict[str, Any]] = []
    for gate in chosen:
        unit = network.get_submodule(gate.name)
        like = next(unit.parameters(), torch.zeros(()))
        scale = constants[gate.name].to(like.device, like.dtype)
        given = fed[gate.name]
        record: dict[str, Any] = {"unit": gate.name, "how": "scaled", "into": None, "shortcut": given.shortcut}
        record["channels"] = gate.channels
        wanted = _with_constant(network, gate, scale, example)
        _put(network, record, scale)
        if not _near(_answer(network, example), wanted):  # the module does more than to scale its map
            _put_back(network, gate.name, unit)
            continue
        if given.layer is not None and _fold(network, gate.name, given.layer, example):
            record |= {"how": "folded", "into": given.layer}
            _put(network, record, scale)
        records.append(record)
    return records


def place_constant_gates(network: nn.Module, records: Sequence[Mapping[str, Any]]) -> None:
    """Replace units as :func:`replace_constant_gates` did, in place; what the scales are comes with the weights.

    Args:
        network: with all its units.
        records: what that function returned.
    """
    for record in records:
        _put(network, record, torch.ones(record["channels"]))


def _is_a_module(gate: Gate) -> bool:
    """Whether a module of its own puts out the gate, and another one is the unit."""
    return gate.tap is None and gate.name == gate.unit


def _with_constant(network: nn.Module, gate: Gate, scale: Tensor, example: Tensor) -> Tensor:
    """What the network says while a gate answers with its constants."""

    def constant(module: nn.Module, given: Any, answer: Tensor) -> Tensor:
        return scale.view(1, -1, *[1] * (answer.dim() - 2)).expand_as(answer)

    handle = network.get_submodule(gate.path).register_forward_hook(constant)
    try:
        return _answer(network, example)
    finally:
        handle.remove()


def _near(said: Tensor, wanted: Tensor) -> bool:
    return bool((said - wanted).abs().max() <= 1e-4 * wanted.abs().max())


def _put_back(network: nn.Module, name: str, unit: nn.Module) -> None:
    holder, _, child = name.rpartition(".")
    network.get_submodule(holder)._modules[child] = unit


def _put(network: nn.Module, record: Mapping[str, Any], scale: Tensor) -> None:
    """Put what the record says in the place of a unit, or of the scale that was put there."""
    holder, _, child = record["unit"].rpartition(".")
    parent = network.get_submodule(holder)
    attached = "_attached" in parent._modules[child].__dict__
    if record["how"] == "scaled":
        made: nn.Module = ConstantScale(scale)
        if attached:
            made.__dict__["_attached"] = True
        parent._modules[child] = made
    elif attached:
        hooks.remove(network, only={record["unit"]})
    else:
        parent._modules[child] = Add() if record["shortcut"] else nn.Identity()


@torch.no_grad()
def _fold(network: nn.Module, unit: str, layer: str, example: Tensor) -> bool:
    """Take the scale of a unit into a layer and leave ones; whether the network still says the same, else undone."""
    scaled, host = network.get_submodule(unit), network.get_submodule(layer)
    assert isinstance(scaled, ConstantScale)
    weight, bias = host.weight, host.bias
    if not isinstance(weight, nn.Parameter) or scaled.scale.shape != weight.shape[:1]:
        return False
    before = _answer(network, example)
    changed = [part for part in (weight, bias, scaled.scale) if isinstance(part, Tensor)]
    kept = [part.clone() for part in changed]
    weight.mul_(scaled.scale.view(-1, *[1] * (weight.dim() - 1)))
    if isinstance(bias, Tensor):
        bias.mul_(scaled.scale)
    scaled.scale.fill_(1)
    after = _answer(network, example)
    if _near(after, before):
        return True
    for part, old in zip(changed, kept, strict=True):
        part.copy_(old)
    return False


@torch.no_grad()
def _answer(network: nn.Module, example: Tensor) -> Tensor:
    with evaluation_mode(network):
        answer: Tensor = network(example)
        return answer.clone()

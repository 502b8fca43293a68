"""Batch norm merged into the convolutions in front of it, which in evaluation mode changes nothing but rounding.

There a batch norm is a factor and an addend for each channel (Ioffe & Szegedy 2015, arXiv 1502.03167, Sect. 3.1), and
so is a change of the convolution's kernels and biases.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from excite.networks.dncnn import DnCNN
from excite.networks.tables import DnCNNTable
from excite.spec import parse_spec


def merge_batch_norm(network: nn.Module) -> nn.Module:
    """A copy of a network for evaluation, its batch norms merged into the convolutions in front of them.

    Done for :class:`~excite.networks.dncnn.DnCNN`, whose ``norm{i}`` answers ``conv{i}`` and nothing else. A unit
    with a norm of its own, and a pair of which one has a unit attached, a hook or no running statistics, stays as it
    is, as does every other network.

    Args:
        network: it is read, not changed.

    Returns:
        The copy, in evaluation mode and on the same device. Merged norms are ``nn.Identity``; where none is left in
        the chain, ``spec`` and ``table`` of the copy say ``norm=none``, so that it can be saved and built again.
    """
    merged = copy.deepcopy(network).eval()
    if not isinstance(merged, DnCNN):
        return merged
    for i in range(2, merged.depth):
        convolution, norm = merged.get_submodule(f"conv{i}"), merged.get_submodule(f"norm{i}")
        if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d and _are_plain(convolution, norm):
            setattr(merged, f"conv{i}", fuse_conv_bn_eval(convolution, norm))
            setattr(merged, f"norm{i}", nn.Identity().eval())
    if not any(isinstance(child, nn.BatchNorm2d) for child in merged.children()):
        _say_so(merged)
    return merged


def _are_plain(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether both do what their classes do and nothing else: an attached unit, too, acts by a hook."""
    for module in (convolution, norm):
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return norm.running_mean is not None and norm.running_var is not None


def _say_so(network: DnCNN) -> None:
    """Write into the spec and the table that there is no norm, where they say that there is one."""
    table: DnCNNTable | None = getattr(network, "table", None)
    spec: str | None = getattr(network, "spec", None)
    if table is None or table.norm == "none":
        return
    network.table = replace(table, norm="none")  # type: ignore[assignment]
    if spec is not None:
        parsed = parse_spec(spec)
        arguments = dict(parsed.arguments) | {"norm": "none"}
        network.spec = str(replace(parsed, arguments=tuple(arguments.items())))  # type: ignore[assignment]

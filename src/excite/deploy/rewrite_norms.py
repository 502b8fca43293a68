"""Batch norms folded into the layers before them.

In evaluation a batch norm is a factor and an addend for each channel (Ioffe & Szegedy 2015, arXiv 1502.03167,
Sect. 3.1), and so is a change of the weights and biases of the convolution or linear layer whose output it takes.
"""

# What an argument of a node is, torch.fx does not say to a type checker.
# mypy: disable-error-code="union-attr,arg-type,index,misc,assignment,operator,attr-defined,return-value"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from excite.deploy.capture import Editor, aten, shape

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
LAYERS = (*CONVOLUTIONS, aten.linear.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)


def fold_batch_norms(editor: Editor) -> int:
    """Fold each batch norm into the layer before it, if that layer's output goes nowhere else."""
    count = 0
    for node in editor.calls(aten.batch_norm.default):
        layer = node.args[0]
        values = scale_and_shift(editor, node)
        if values is None or not is_own(editor, layer):
            continue
        scaled = rescale(editor, layer, *values)
        editor.replace(node, scaled)
        count += 1
    return count


def scale_and_shift(editor: Editor, norm: fx.Node) -> tuple[Tensor, Tensor] | None:
    """What a batch norm multiplies with and adds, (C,) each, in float64; None where the batch decides."""
    _, *given, _training, _, eps = norm.args[:8]
    weight, bias, mean, variance = (editor.constant(one) for one in given)
    if mean is None or variance is None or norm.args[5]:
        return None
    assert isinstance(eps, float)
    scale = (variance.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def is_own(editor: Editor, layer: Any) -> bool:
    """Whether a node is a layer with constant weights whose output has one user."""
    return (
        isinstance(layer, fx.Node)
        and layer.target in LAYERS
        and len(layer.users) == 1
        and editor.constant(layer.args[1]) is not None
        and (len(layer.args) < 3 or layer.args[2] is None or editor.constant(layer.args[2]) is not None)
    )


def rescale(editor: Editor, layer: fx.Node, scale: Tensor, shift: Tensor | None) -> fx.Node:
    """The same layer with outputs scale · y + shift, as a new node beside it; scale and shift are (C,), float64."""
    x, weight_at, *rest = layer.args
    weight = editor.constant(weight_at)
    assert weight is not None
    bias = editor.constant(rest[0]) if rest else None
    scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    moved = torch.zeros_like(scale) if bias is None else bias.double() * scale
    if shift is not None:
        moved = moved + shift
    name = str(weight_at.target).removesuffix("weight").replace(".", "_").strip("_")  # as the network calls the layer
    new_weight = editor.put(scaled.to(weight.dtype), f"{name}_weight")
    new_bias = editor.put(moved.to(weight.dtype), f"{name}_bias")
    return editor.call(layer.target, x, new_weight, new_bias, *rest[1:], before=layer)


def is_pointwise(editor: Editor, node: Any) -> bool:
    """Whether a node is a 1×1 convolution of stride 1, without groups and padding, with constant weights."""
    if not isinstance(node, fx.Node) or node.target is not aten.conv2d.default:
        return False
    weight = editor.constant(node.args[1])
    defaults = (None, 1, 0, 1, 1)
    _, stride, padding, _, groups = (*node.args[2:], *defaults[len(node.args) - 2 :])
    plain = groups == 1 and _every(stride, 1) and _every(padding, 0)
    return plain and weight is not None and tuple(weight.shape[2:]) == (1, 1) and len(shape(node.args[0])) == 4


def _every(value: Any, wanted: int) -> bool:
    return all(one == wanted for one in value) if isinstance(value, (list, tuple)) else value == wanted

"""Gates that are the same for every image: numbers, which the layer before the scale can take in."""

# What an argument of a node is, torch.fx does not say to a type checker.
# mypy: disable-error-code="union-attr,arg-type,index,misc,assignment,call-overload,operator,attr-defined"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from excite.deploy.capture import Editor, aten, shape
from excite.deploy.rewrite_norms import is_own, rescale
from excite.deploy.rewrite_squeeze import ELEMENTWISE

_FOLLOWS = (
    *ELEMENTWISE,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.unsqueeze.default,
    aten.select.int,
    aten.softmax.int,
    aten._softmax.default,
)


def fold_constant_gates(editor: Editor) -> int:
    """Fold scales that do not depend on the image into the layer before them.

    A gate is constant if its last layer has weights of 0: then it answers with its bias whatever it is given. So is
    what a pruned network has in place of a unit.
    """
    known: dict[fx.Node, Tensor] = {}
    for node in list(editor.graph.nodes):
        value = _value(editor, node, known)
        if value is not None:
            known[node] = value
    for node, value in known.items():
        if node.op == "call_function" and node.users:
            editor.replace(node, editor.put(value, "constant"))
    editor.graph.eliminate_dead_code()  # such as the squeeze of a unit that does not listen to it
    count = 0
    for node in editor.calls(aten.mul.Tensor, aten.addcmul.default):
        first, second = node.args[-2:]
        for layer, factor in ((first, second), (second, first)):
            scale = _per_channel(editor.constant(factor), shape(layer))
            if scale is None or not is_own(editor, layer) or node.kwargs:
                continue
            scaled = rescale(editor, layer, scale.double(), None)
            if node.target is aten.addcmul.default:
                scaled = editor.call(aten.add.Tensor, scaled, node.args[0], before=node)
            editor.replace(node, scaled)
            count += 1
            break
    return count


def _value(editor: Editor, node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor | None:
    """What a node answers for every image, one image's worth: the batch is broadcast."""
    if node.op == "get_attr":
        return editor.constant(node)
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default and len(shape(node)) == 2:
        weight, bias = editor.constant(node.args[1]), editor.constant(node.args[2]) if len(node.args) > 2 else None
        if weight is None or weight.any():
            return None
        return weight.new_zeros(1, len(weight)) if bias is None else bias[None]
    inputs = node.all_input_nodes
    if node.target not in _FOLLOWS or not inputs or not all(one in known for one in inputs):
        return None
    if node.target in (aten.softmax.int, aten._softmax.default) and node.args[1] == 0:
        return None  # over the batch
    arguments: Any = fx.map_arg(node.args, lambda one: known[one])
    with torch.no_grad():
        value = node.target(*arguments, **node.kwargs)
    return value if isinstance(value, Tensor) else None


def _per_channel(value: Tensor | None, sides: tuple[Any, ...]) -> Tensor | None:
    """(C,), where a constant multiplies each channel of an (N, C, …) by one number."""
    if value is None or len(sides) < 2:
        return None
    if value.numel() == 1:
        return value.reshape(1).expand(sides[1])
    at = value.dim() - len(sides) + 1
    if at < 0 or value.numel() != sides[1] or value.shape[at] != sides[1]:
        return None
    return value.reshape(-1)

"""The squeeze, and the small layers that follow it.

* Pooled maps (N, C, 1, 1) become vectors (N, C), and 1×1 convolutions on them linear layers: the same arithmetic
  without the work of laying out maps.
* The mean over positions commutes with a 1×1 convolution, mean(W·h + b) = W·mean(h) + b: at the end of a bottleneck
  the gate follows from the mean of the narrow map h, before the wide one exists.
* Two linear layers with nothing between them are one, W₂(W₁z + b₁) + b₂ = (W₂W₁)z + (W₂b₁ + b₂). After the step
  above this takes the wide vector out altogether: C/4 → C/16 in place of C/4 → C → C/16.
"""

# What an argument of a node is, torch.fx does not say to a type checker.
# mypy: disable-error-code="union-attr,arg-type,index,misc,assignment,call-overload,operator,attr-defined"

from __future__ import annotations

import math
from typing import Any

from torch import fx

from excite.deploy.capture import Editor, aten, is_map, is_pooled, shape
from excite.deploy.rewrite_norms import is_own, is_pointwise

ELEMENTWISE = (
    aten.relu.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.tanh.default,
    aten.silu.default,
    aten.gelu.default,
    aten.leaky_relu.default,
    aten.clamp.default,
    aten.relu6.default,
)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def pooled_as_vectors(editor: Editor) -> int:
    """Means over all positions as (N, C), and what is made of them as vectors for as long as that goes."""
    means = [mean for node in list(editor.graph.nodes) if (mean := _as_mean(editor, node)) is not None]
    maps = [user for mean in means for user in mean.users if user.target is aten.unsqueeze.default]
    waiting = [user for first in maps for user in first.users if user.target is aten.unsqueeze.default]
    while waiting:
        pooled = waiting.pop()
        vector = pooled.args[0].args[0]
        for user in list(pooled.users):
            made = _on_vector(editor, user, vector)
            if made is None:
                continue
            if len(shape(user)) == 2:
                editor.replace(user, made)
            else:
                again = _as_map(editor, made, user)
                editor.replace(user, again)
                waiting.append(again)
    for view in editor.calls(*_RESHAPES):  # a gate's own way to become a map
        if is_pooled(view) and len(shape(view.args[0])) == 2:
            editor.replace(view, _as_map(editor, view.args[0], view))
    editor.graph.eliminate_dead_code()
    return len(means)


def _as_map(editor: Editor, vector: fx.Node, before: fx.Node) -> fx.Node:
    """(N, C) → (N, C, 1, 1)."""
    return editor.call(
        aten.unsqueeze.default, editor.call(aten.unsqueeze.default, vector, 2, before=before), 3, before=before
    )


def _as_mean(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Where a node is the mean of a map over its positions, in whatever words, that mean in ours."""
    if node.op != "call_function" or node._erased or node.kwargs:
        return None
    given = node.args[0] if node.args else None
    if (node.target is aten.mean.dim and is_map(given) and _positions(node.args[1])) or (
        node.target is aten.adaptive_avg_pool2d.default and is_map(given) and [*node.args[1]] == [1, 1]
    ):
        u = given
    elif node.target is aten.avg_pool2d.default and is_map(given) and is_pooled(node) and len(node.args) < 4:
        sides = shape(given)[2:]
        if tuple(node.args[1]) != tuple(sides):
            return None
        u = given
    elif node.target is aten.div.Tensor and isinstance(given, fx.Node) and given.target is aten.sum.dim_IntList:
        u, count = given.args[0], node.args[1]
        if given.kwargs or not is_map(u) or not _positions(given.args[1]) or count != math.prod(shape(u)[2:]):
            return None
    else:
        return None
    mean = editor.call(aten.mean.dim, u, [2, 3], before=node)
    editor.replace(node, mean if len(shape(node)) == 2 else _as_map(editor, mean, node))
    return mean


def _positions(axes: Any) -> bool:
    return isinstance(axes, (list, tuple)) and sorted(axis % 4 for axis in axes) == [2, 3]


def _on_vector(editor: Editor, user: fx.Node, vector: fx.Node) -> fx.Node | None:
    """What a user of a pooled map makes of it, from the vector; None where it has to be the map."""
    if user.target in ELEMENTWISE:
        return editor.call(user.target, vector, *user.args[1:], before=user)
    if user.target is aten.conv2d.default and user.args[0] is not vector and is_pointwise(editor, user):
        weight = editor.constant(user.args[1])
        assert weight is not None
        bias = user.args[2] if len(user.args) > 2 else None
        return editor.call(aten.linear.default, vector, editor.put(weight.flatten(1), "weight"), bias, before=user)
    if user.target is aten.batch_norm.default:
        return editor.call(aten.batch_norm.default, vector, *user.args[1:], before=user)
    if user.target in (*_RESHAPES, *_SQUEEZES) and len(shape(user)) == 2:
        return vector
    return None


def squeeze_before_projection(editor: Editor) -> int:
    """Means of what 1×1 convolutions and additions make, from the means of what these take."""
    count, waiting = 0, list(editor.calls(aten.mean.dim))
    while waiting:
        mean = waiting.pop()
        u = mean.args[0]
        if mean._erased or not isinstance(u, fx.Node) or not is_map(u) or len(shape(mean)) != 2:
            continue
        if (
            u.target is aten.add.Tensor
            and len(u.users) == 1
            and not u.kwargs
            and shape(u.args[0]) == shape(u.args[1])
        ):
            parts = [editor.call(aten.mean.dim, part, [2, 3], before=mean) for part in u.args]
            editor.replace(mean, editor.call(aten.add.Tensor, *parts, before=mean))
            waiting += parts
        elif is_pointwise(editor, u):
            weight = editor.constant(u.args[1])
            assert weight is not None
            if weight.shape[1] > weight.shape[0]:
                continue  # the map before it is the wide one
            # At the place of the convolution: the gate need not wait for it.
            narrow = editor.call(aten.mean.dim, u.args[0], [2, 3], before=u)
            matrix = editor.put(weight.flatten(1), "weight")
            bias = u.args[2] if len(u.args) > 2 else None
            editor.replace(mean, editor.call(aten.linear.default, narrow, matrix, bias, before=mean))
            waiting.append(narrow)
        else:
            continue
        count += 1
    return count


def merge_linear_layers(editor: Editor) -> int:
    """Linear layers with nothing between them as one, where that is less work."""
    count = 0
    for outer in editor.calls(aten.linear.default):
        inner = outer.args[0]
        if not is_own(editor, inner) or inner.target is not aten.linear.default or len(shape(inner)) != 2:
            continue
        first, second = editor.constant(inner.args[1]), editor.constant(outer.args[1])
        if first is None or second is None:
            continue
        out, middle, given = len(second), len(first), first.shape[1]
        if out * given > middle * (out + given):
            continue
        biases = [editor.constant(one.args[2]) if len(one.args) > 2 else None for one in (inner, outer)]
        moved = second.new_zeros(out).double() if biases[1] is None else biases[1].double()
        if biases[0] is not None:
            moved = moved + second.double() @ biases[0].double()
        weight = editor.put((second.double() @ first.double()).to(first.dtype), "weight")
        bias = editor.put(moved.to(first.dtype), "bias")
        editor.replace(outer, editor.call(aten.linear.default, inner.args[0], weight, bias, before=outer))
        count += 1
    return count

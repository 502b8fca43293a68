"""Selective kernels: their branches, and how one is chosen.

* Branches that were stacked are taken apart again: stacking copies every map once, and their sum is never needed, for
  the mean of a sum is the sum of the means.
* A softmax over two is a sigmoid of the difference, a₁ = σ(l₁ − l₂), and a difference of two linear layers is one:
  l₁ − l₂ = (A₁ − A₂)z. Then the selection is one linear interpolation, U₂ + a₁·(U₁ − U₂).
* A map that is split only to be convolved in parts comes from a convolution that can answer in parts.
"""

# What an argument of a node is, torch.fx does not say to a type checker.
# mypy: disable-error-code="union-attr,arg-type,index,misc,assignment,operator,attr-defined,return-value"

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from excite.deploy.capture import Editor, aten, is_map, shape
from excite.deploy.rewrite_norms import CONVOLUTIONS, is_own
from excite.deploy.rewrite_squeeze import ELEMENTWISE

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int)


def branches_apart(editor: Editor) -> int:
    """Stacks of maps that are summed up, or weighted by a softmax and summed up, as sums of the maps."""
    count = 0
    for stack in editor.calls(aten.stack.default):
        maps = list(stack.args[0])
        axis = stack.args[1] if len(stack.args) > 1 else 0
        if axis != 1 or not all(is_map(one) for one in maps):
            continue
        ends = [_sum_of(user, maps) for user in stack.users]
        if any(end is None for end in ends):
            continue
        for total, weights in [end for end in ends if end is not None]:
            if weights is None:
                summed = maps[0]
                for one in maps[1:]:
                    summed = editor.call(aten.add.Tensor, summed, one, before=total)
            else:
                shares = [editor.call(aten.select.int, weights, 1, m, before=total) for m in range(len(maps))]
                summed = editor.call(aten.mul.Tensor, maps[0], shares[0], before=total)
                for one, share in zip(maps[1:], shares[1:], strict=True):
                    summed = editor.call(aten.addcmul.default, summed, one, share, before=total)
            editor.replace(total, summed)
        count += 1
    editor.graph.eliminate_dead_code()
    return count


def _sum_of(user: fx.Node, maps: list[Any]) -> tuple[fx.Node, fx.Node | None] | None:
    """The sum over the branches that a use of the stack ends in, and what they are multiplied with before."""
    if user.target is aten.sum.dim_IntList and _is_over_branches(user):
        return user, None
    if user.target is not aten.mul.Tensor or len(user.users) != 1:
        return None
    total = next(iter(user.users))
    weights = user.args[1] if is_stack(user.args[0]) else user.args[0]
    sides = shape(weights)
    shares = len(sides) == 5 and sides[1] == len(maps) and sides[3] == sides[4] == 1
    if total.target is aten.sum.dim_IntList and _is_over_branches(total) and shares:
        assert isinstance(weights, fx.Node)
        return total, weights
    return None


def is_stack(node: Any) -> bool:
    """Whether it stacks tensors."""
    return isinstance(node, fx.Node) and node.target is aten.stack.default


def _is_over_branches(node: fx.Node) -> bool:
    keeps = len(node.args) > 2 and bool(node.args[2])
    return [axis % 5 for axis in node.args[1]] == [1] and not keeps


def two_branches_by_one_gate(editor: Editor) -> int:
    """Softmaxes over two branches as one sigmoid each."""
    count = 0
    for softmax in editor.calls(*_SOFTMAX):
        logits, axis = softmax.args[0], softmax.args[1]
        sides = shape(logits)
        if len(sides) < 3 or axis not in (1, 1 - len(sides)) or sides[1] != 2:
            continue
        layer = logits.args[0] if isinstance(logits, fx.Node) and logits.target in _RESHAPES else None
        while isinstance(layer, fx.Node) and layer.target is aten.unsqueeze.default:
            layer = layer.args[0]
        if not _is_linear(editor, layer) or len(logits.users) != 1:
            continue
        shares = _shares(softmax)
        if shares is None or any(shape(one)[1] != sides[2] for both in shares for one in both):
            continue
        if not all(_select_pair(first, second) for first in shares[0] for second in shares[1]):
            continue
        _one_gate(editor, softmax, layer, shares)
        count += 1
    editor.graph.eliminate_dead_code()
    return count


def _is_linear(editor: Editor, layer: Any) -> bool:
    return is_own(editor, layer) and layer.target is aten.linear.default and len(shape(layer)) == 2


def _shares(softmax: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """The nodes that hold the first and the second share, (N, C, 1, 1); None where others read it."""
    found: tuple[list[fx.Node], list[fx.Node]] = ([], [])
    waiting = [softmax]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.target is aten.unsqueeze.default:
                waiting.append(user)
            elif user.target is aten.select.int and user.args[1] == 1 and user.args[2] in (0, 1):
                _ends(user, found[user.args[2]])
            elif user.target in (aten.unbind.int, aten.split.Tensor) and _axis_is_branches(user):
                for piece in user.users:
                    _ends(piece, found[piece.args[1]])
            else:
                return None
    return found if all(len(shape(one)) == 4 for both in found for one in both) else None


def _axis_is_branches(node: fx.Node) -> bool:
    axis = node.args[-1] if len(node.args) > (1 if node.target is aten.unbind.int else 2) else 0
    return axis == 1 and node.target is aten.unbind.int


def _ends(node: fx.Node, found: list[fx.Node]) -> None:
    """What a share is once it has its positions, (N, C, 1, 1)."""
    if len(shape(node)) < 4 and node.users and all(user.target is aten.unsqueeze.default for user in node.users):
        for user in node.users:
            _ends(user, found)
    else:
        found.append(node)


def _select_pair(first: fx.Node, second: fx.Node) -> bool:
    """Whether two shares are used for nothing but one weighted sum of two maps."""
    return _weighted(first, second) is not None


def _weighted(first: fx.Node, second: fx.Node) -> tuple[fx.Node, Any, Any] | None:
    """The node that is u₁·first + u₂·second, and both maps."""
    if len(first.users) != 1 or len(second.users) != 1:
        return None
    one, other = next(iter(first.users)), next(iter(second.users))
    if one.kwargs or other.kwargs:  # a factor on the product
        return None
    if one.target is aten.mul.Tensor and other.target is aten.addcmul.default and other.args[0] is one:
        # Both as our own selection writes them, in either order.
        return other, _other_factor(one.args, first), _other_factor(other.args[1:], second)
    if other.target is aten.mul.Tensor and one.target is aten.addcmul.default and one.args[0] is other:
        return one, _other_factor(one.args[1:], first), _other_factor(other.args, second)
    if one.target is other.target is aten.mul.Tensor and len(one.users) == len(other.users) == 1:
        total = next(iter(one.users))
        if total.target is aten.add.Tensor and set(total.args) == {one, other} and not total.kwargs:
            return total, _other_factor(one.args, first), _other_factor(other.args, second)
    return None


def _other_factor(factors: Any, known: fx.Node) -> Any:
    return factors[1] if factors[0] is known else factors[0]


def _one_gate(editor: Editor, softmax: fx.Node, layer: fx.Node, shares: tuple[list[fx.Node], list[fx.Node]]) -> None:
    weight = editor.constant(layer.args[1])
    assert weight is not None
    half = len(weight) // 2
    bias = editor.constant(layer.args[2]) if len(layer.args) > 2 else None
    difference = editor.put((weight[:half].double() - weight[half:].double()).to(weight.dtype), "weight")
    moved = None if bias is None else editor.put((bias[:half].double() - bias[half:].double()).to(bias.dtype), "bias")
    logits = editor.call(aten.linear.default, layer.args[0], difference, moved, before=softmax)
    vector = editor.call(aten.sigmoid.default, logits, before=softmax)
    for at in (2, 3):
        vector = editor.call(aten.unsqueeze.default, vector, at, before=softmax)
    if not shares[1]:  # a linear interpolation already
        for share in shares[0]:
            editor.replace(share, vector)
        return
    found = _weighted(shares[0][0], shares[1][0])
    assert found is not None
    total, first, second = found
    editor.replace(total, editor.call(aten.lerp.Tensor, second, first, vector, before=total))


def split_before_convolution(editor: Editor) -> int:
    """Maps that are split into channels and used in parts only: the convolution that makes them answers in parts."""
    count = 0
    for split in editor.calls(aten.split.Tensor, aten.split_with_sizes.default):
        chain: list[fx.Node] = []
        node = split.args[0]
        axis = split.args[2] if len(split.args) > 2 else 0
        while isinstance(node, fx.Node) and node.target in ELEMENTWISE and _only_splits(node):
            chain.insert(0, node)
            node = node.args[0]
        if axis != 1 or not isinstance(node, fx.Node) or node.target not in CONVOLUTIONS or not _only_splits(node):
            continue
        if not (not chain and _constant(editor, node)) and not (chain and is_own(editor, node)):
            continue
        if len(node.args) > 6 and node.args[6] != 1:  # groups
            continue
        _in_parts(editor, split, node, chain)
        count += 1
    editor.graph.eliminate_dead_code()
    return count


def _constant(editor: Editor, node: fx.Node) -> bool:
    return editor.constant(node.args[1]) is not None


def _only_splits(node: fx.Node) -> bool:
    splits = (aten.split.Tensor, aten.split_with_sizes.default)
    users = list(node.users)
    return bool(users) and (
        all(user.target in splits for user in users) or (len(users) == 1 and users[0].target in ELEMENTWISE)
    )


def _in_parts(editor: Editor, split: fx.Node, layer: fx.Node, chain: list[fx.Node]) -> None:
    x, weight_at, *rest = layer.args
    weight, bias = editor.constant(weight_at), editor.constant(rest[0]) if rest else None
    assert weight is not None
    start = 0
    sizes = [one.shape[1] for one in split.meta["val"]]
    pieces = {user.args[1]: user for user in split.users if user.target is operator.getitem}
    for number, size in enumerate(sizes):
        piece = pieces.get(number)
        part = slice(start, start + size)
        start += size
        if piece is None:
            continue
        made = editor.call(
            layer.target,
            x,
            editor.put(weight[part], "weight"),
            None if bias is None else editor.put(bias[part], "bias"),
            *rest[1:],
            before=split,
        )
        for step in chain:
            made = editor.call(step.target, made, *step.args[1:], before=split)
        editor.replace(piece, made)

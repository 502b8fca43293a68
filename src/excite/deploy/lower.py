"""A rewritten graph in the layers of :mod:`excite.deploy.lowered`: fewer passes over maps, on a CPU."""

# What an argument of a node is, torch.fx does not say to a type checker.
# mypy: disable-error-code="union-attr,arg-type,index,misc,assignment,operator,attr-defined,return-value"

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from excite.deploy.capture import Editor, aten, is_map, shape
from excite.deploy.lowered import (
    NOTHING,
    RELU,
    Activation,
    Convolution,
    ConvolutionAdd,
    Gates,
    GroupedConvolution,
    Scale,
    ScaledConvolutionAdd,
    SelectiveKernels,
    SelectTwo,
)
from excite.deploy.rewrite_norms import is_own
from excite.native import passes

_VECTOR_FUNCTIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.hardsigmoid.default: "hard_sigmoid",
    aten.tanh.default: "tanh",
    aten.silu.default: "silu",
    aten.hardswish.default: "hard_swish",
    aten.relu6.default: "relu6",
}
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


def lower(rewritten: fx.GraphModule, dtype: torch.dtype, batch: int) -> fx.GraphModule:
    """The graph with its convolutions, gates and scales as layers that do more in one pass.

    Args:
        rewritten: from :func:`excite.deploy.rewrite.rewrite`, on a CPU. It is read, not changed.
        dtype: float32 or bfloat16: of maps and of the weights of convolutions.
        batch: N, for which weights are laid out; other batches only take longer.

    Returns:
        A graph that takes and gives maps of that type, in channels-last order.
    """
    module = copy.deepcopy(rewritten)
    editor = Editor(module)
    lowering = _Lowering(editor, dtype, batch)
    lowering.gates()
    lowering.selections()
    lowering.scales()
    lowering.additions()
    lowering.convolutions()
    editor.tidy()
    if dtype != torch.float32:
        _to_type(module, dtype)
    return module


def _to_type(module: fx.GraphModule, dtype: torch.dtype) -> None:
    """What is left of constants in the graph itself; layers hold what they have to."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in used:
        holder, _, child = name.rpartition(".")
        owner = module.get_submodule(holder)
        value = getattr(owner, child)
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            setattr(
                owner,
                child,
                nn.Parameter(value.to(dtype), False) if isinstance(value, nn.Parameter) else value.to(dtype),
            )


class _Lowering:
    def __init__(self, editor: Editor, dtype: torch.dtype, batch: int) -> None:
        self.editor, self.dtype, self.batch = editor, dtype, batch
        self.native = passes.available(dtype)
        self.made = 0

    # --- gates -----------------------------------------------------------------------------------------------------

    def gates(self) -> None:
        """The chains from means of maps to gates."""
        if not self.native:
            return
        for end in self.editor.calls(*_VECTOR_FUNCTIONS, aten.mul.Tensor):
            found = self._chain(end)
            if found is not None:
                maps, layer = found
                self._put(end, layer, tuple(maps), "gates")

    def _chain(self, end: fx.Node) -> tuple[list[fx.Node], Gates] | None:
        factor, function = 1.0, end
        if end.target is aten.mul.Tensor:  # a gate that is scaled by a number
            number = self.editor.constant(end.args[1])
            if number is None or number.numel() != 1 or not isinstance(end.args[0], fx.Node):
                return None
            factor, function = float(number), end.args[0]
        elif any(self._scales(user) for user in end.users):
            return None  # the number belongs to it
        if function.target not in _VECTOR_FUNCTIONS or len(shape(function)) != 2:
            return None
        expand = function.args[0]
        if not self._is_linear(expand):
            return None
        middle = expand.args[0]
        if not isinstance(middle, fx.Node) or len(middle.users) != 1:
            return None
        activation = "identity"
        if middle.target in _VECTOR_FUNCTIONS:
            activation, middle = _VECTOR_FUNCTIONS[middle.target], middle.args[0]
        if not self._is_linear(middle):
            return None
        means = self._means(middle.args[0])
        if means is None:
            return None
        layer = Gates(
            self._weights(middle),
            activation,
            self._weights(expand),
            _VECTOR_FUNCTIONS[function.target],
            factor,
            self.dtype,
        )
        return means, layer

    def _scales(self, node: fx.Node) -> bool:
        number = self.editor.constant(node.args[1]) if node.target is aten.mul.Tensor else None
        return number is not None and number.numel() == 1

    def _is_linear(self, node: Any) -> bool:
        return is_own(self.editor, node) and node.target is aten.linear.default

    def _weights(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        weight = self.editor.constant(node.args[1])
        assert weight is not None
        return weight, self.editor.constant(node.args[2]) if len(node.args) > 2 else None

    def _means(self, node: Any) -> list[fx.Node] | None:
        """The one or two maps whose means add up to this."""
        if not isinstance(node, fx.Node):
            return None
        if node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2:
            parts = [self._means(part) for part in node.args]
            if any(part is None or len(part) != 1 for part in parts) or shape(parts[0][0]) != shape(parts[1][0]):
                return None
            return [part[0] for part in parts if part is not None]
        if node.target is not aten.mean.dim or len(shape(node)) != 2:
            return None
        u = node.args[0]
        if not isinstance(u, fx.Node) or not is_map(u) or shape(u)[1] % passes.LANES:
            return None
        return [u]

    # --- selections and scales -------------------------------------------------------------------------------------

    def selections(self) -> None:
        """Interpolations between two maps by a gate."""
        for node in self.editor.calls(aten.lerp.Tensor):
            second, first, weight = node.args
            gate = _vector(weight)
            if gate is None or not is_map(first) or not is_map(second):
                continue
            if self._is_selective(first, second, gate):
                layers = [
                    GroupedConvolution(*self._layer(u.args[0]), RELU, self._sides(u.args[0])) for u in (first, second)
                ]
                gates = self.editor.module.get_submodule(str(gate.target))
                unit = SelectiveKernels(layers[0], layers[1], gates)
                self._put(node, unit, (first.args[0].args[0],), "selective")
            elif self._dies(first, node):
                self._put(node, SelectTwo(), (first, second, gate), "select")

    def _is_selective(self, first: fx.Node, second: fx.Node, gate: fx.Node) -> bool:
        """Whether two maps are branches of one input, each a grouped convolution and ReLU, and the gate is theirs."""
        convolutions = []
        for u in (first, second):
            layer = u.args[0] if u.target is aten.relu.default else None
            if not self._fuses(layer) or not self._is_grouped(layer) or len(u.users) != 2:
                return False
            convolutions.append(layer)
        one, other = convolutions
        of_both = gate.op == "call_module" and len(gate.users) == 1 and set(gate.args) == {first, second}
        alike = one.args[0] is other.args[0] and _settings(one)[1] == _settings(other)[1]
        return of_both and alike and _settings(one)[4] == _settings(other)[4]

    def scales(self) -> None:
        """A map times a gate, with the shortcut and the ReLU that follow."""
        for node in self.editor.calls(aten.mul.Tensor, aten.addcmul.default):
            if not is_map(node) or node.kwargs:
                continue
            if node.target is aten.addcmul.default:
                shortcut, *factors = node.args
            else:
                shortcut, factors = None, list(node.args)
            pair = next(
                (
                    (u, gate)
                    for u, one in (factors, factors[::-1])
                    if is_map(u) and (gate := _vector(one)) is not None
                ),
                None,
            )
            if pair is None:
                continue
            end = node
            if shortcut is None and (added := self._only_user(end, aten.add.Tensor)) is not None and not added.kwargs:
                other = added.args[1] if added.args[0] is end else added.args[0]
                if shape(other) == shape(end) and other is not end:
                    shortcut, end = other, added
            if shortcut is not None and shape(shortcut) != shape(node):
                continue
            relu = self._only_user(end, aten.relu.default)
            end = relu or end
            u, gate = pair
            if shortcut is not None and self._fuses(u):
                layer = ScaledConvolutionAdd(
                    *self._layer(u), RELU if relu else NOTHING, self._sides(u), overwrites=self._dies(shortcut, end)
                )
                self._put(end, layer, (u.args[0], gate, shortcut), "scaled")
            else:
                arguments = (u, gate) if shortcut is None else (u, gate, shortcut)
                self._put(end, Scale(relu is not None, self._dies(u, end)), arguments, "scale")

    def _only_user(self, node: fx.Node, target: Any) -> fx.Node | None:
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user if user is not None and user.target is target else None

    # --- convolutions ----------------------------------------------------------------------------------------------

    def additions(self) -> None:
        """Convolutions with the addition of another map, and the ReLU, that follow."""
        for node in self.editor.calls(aten.add.Tensor):
            if node.kwargs or not is_map(node) or not all(shape(one) == shape(node) for one in node.args):
                continue
            pairs = [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
            # The later of two convolutions takes the earlier one's answer in.
            pairs.sort(key=lambda pair: -self._place(pair[0]))
            for u, other in pairs:
                if self._fuses(u) and other is not u and not self._is_grouped(u):
                    relu = self._only_user(node, aten.relu.default)
                    end = relu or node
                    layer = ConvolutionAdd(
                        *self._layer(u), RELU if relu else NOTHING, self._sides(u), overwrites=self._dies(other, end)
                    )
                    self._put(end, layer, (u.args[0], other), "convolution")
                    break

    def convolutions(self) -> None:
        """What convolutions are left, with their activations."""
        for node in self.editor.calls(aten.conv2d.default):
            weight = self.editor.constant(node.args[1])
            if weight is None or len(shape(node)) != 4 or not _bias_is_constant(self.editor, node):
                continue
            user = next(iter(node.users)) if len(node.users) == 1 else None
            activation = _activation(user) if user is not None else None
            end = user if activation is not None and user is not None else node
            arguments = (*self._layer(node), activation or NOTHING, self._sides(node))
            if self._is_grouped(node) and (activation or NOTHING) in (RELU, NOTHING):
                self._put(end, GroupedConvolution(*arguments), (node.args[0],), "grouped")
            else:
                self._put(end, Convolution(*arguments), (node.args[0],), "convolution")

    def _fuses(self, u: Any) -> bool:
        """Whether a node is a two-dimensional convolution whose answer has one user."""
        return isinstance(u, fx.Node) and u.target is aten.conv2d.default and is_own(self.editor, u) and is_map(u)

    def _is_grouped(self, node: fx.Node) -> bool:
        weight = self.editor.constant(node.args[1])
        assert weight is not None
        _, stride, _, dilation, groups = _settings(node)
        channels, per_group = weight.shape[:2]
        square = stride[0] == stride[1] and dilation[0] == dilation[1]
        return (
            passes.can_group(self.dtype)
            and groups > 1
            and (per_group in (4, 8) or per_group % passes.LANES == 0)
            and shape(node.args[0])[1] == channels
            and channels % passes.LANES == 0
            and square
        )

    def _layer(self, node: fx.Node) -> tuple[Any, ...]:
        weight = self.editor.constant(node.args[1])
        assert weight is not None
        bias, stride, padding, dilation, groups = _settings(node)
        constant = self.editor.constant(bias)
        # oneDNN takes the weights of convolutions as they are laid out for maps.
        own = weight.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return own, None if constant is None else constant.to(self.dtype), stride, padding, dilation, groups

    def _sides(self, node: fx.Node) -> tuple[int, ...]:
        return (self.batch, *shape(node.args[0])[1:])

    # --- the graph -------------------------------------------------------------------------------------------------

    def _call(self, layer: nn.Module, arguments: Any, name: str, before: fx.Node) -> fx.Node:
        label = f"{name}_{self.made}"
        self.made += 1
        self.editor.module.add_module(label, layer)
        with self.editor.graph.inserting_before(before):
            return self.editor.graph.call_module(label, arguments)

    def _put(self, end: fx.Node, layer: nn.Module, arguments: Any, name: str) -> None:
        """A layer in the place of all that ends in a node."""
        new = self._call(layer, arguments, name, end)
        new.meta["val"] = end.meta["val"]
        self.editor.replace(end, new)
        self.editor.graph.eliminate_dead_code()

    def _place(self, node: Any) -> int:
        return next((place for place, one in enumerate(self.editor.graph.nodes) if one is node), -1)

    def _dies(self, node: Any, at: fx.Node) -> bool:
        """Whether a map's memory is its own, and nothing reads it after this node."""
        if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_module"):
            return False
        if node.target in _VIEWS or (node.target is operator.getitem and node.args[0].target in _VIEWS):
            return False
        places = {one: place for place, one in enumerate(self.editor.graph.nodes)}
        chain = {at}
        return all(
            user in chain or (places[user] < places[at] and user.target not in _VIEWS) for user in node.users
        ) and self._is_fresh(node)

    def _is_fresh(self, node: fx.Node) -> bool:
        # A layer of ours that writes over one of its inputs answers with that memory, which is free then, too.
        return node.op == "call_module" or node.target is not operator.getitem or node.args[0].op == "call_module"


def _vector(gate: Any) -> fx.Node | None:
    """The vector (N, C) that a gate (N, C, 1, 1) is a view of."""
    node = gate
    for _ in range(2):
        if not isinstance(node, fx.Node) or node.target is not aten.unsqueeze.default:
            return None
        node = node.args[0]
    return node if len(shape(node)) == 2 else None


def _settings(node: fx.Node) -> tuple[Any, tuple[int, int], tuple[int, int], tuple[int, int], int]:
    defaults = (None, 1, 0, 1, 1)
    bias, stride, padding, dilation, groups = (*node.args[2:], *defaults[len(node.args) - 2 :])
    return bias, _pair(stride), _pair(padding), _pair(dilation), groups


def _pair(value: Any) -> tuple[int, int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers[0], numbers[-1]


def _bias_is_constant(editor: Editor, node: fx.Node) -> bool:
    return len(node.args) < 3 or node.args[2] is None or editor.constant(node.args[2]) is not None


def _activation(node: fx.Node) -> Activation | None:
    """What oneDNN calls an activation; None for what it does not know, or not to the last bit as PyTorch does."""
    if node.kwargs:
        return None
    numbers = tuple(node.args[1:])
    if not all(isinstance(one, (int, float)) for one in numbers):
        return None
    if node.target is aten.relu.default:
        return RELU
    if node.target is aten.hardtanh.default:
        return "hardtanh", tuple(float(one) for one in (numbers or (-1, 1))), ""
    if node.target is aten.clamp.default and len(numbers) == 2:
        return "hardtanh", tuple(float(one) for one in numbers), ""
    if node.target is aten.hardswish.default:
        return "hardswish", (), ""
    if node.target is aten.silu.default:
        return "swish", (), ""
    if node.target is aten.sigmoid.default:
        return "sigmoid", (), ""
    return None

"""A network as one graph of PyTorch operators: what the rewrites for inference work on.

``torch.export`` runs the network once with tensors that have shapes and no contents, so that hooks, attached units
and anybody's ``forward`` end up in the same few operators, whatever their modules are called.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export

from excite.deploy.quiet import loggers_at
from excite.errors import UsageError

aten = torch.ops.aten


class Editor:
    """A graph that is being rewritten.

    Args:
        module: changed in place. Its constants are attributes.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.fake = (
            next(
                (
                    value.fake_mode
                    for node in self.graph.nodes
                    if (value := node.meta.get("val")) is not None and hasattr(value, "fake_mode")
                ),
                None,
            )
            or FakeTensorMode()
        )

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """All calls of these operators, in the order in which they run; the graph may be changed meanwhile."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in targets and not node._erased:
                yield node

    def constant(self, node: Any) -> Tensor | None:
        """The tensor that a node stands for; None where it is not one of the network's own."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value.detach() if isinstance(value, Tensor) else None

    def put(self, value: Tensor, name: str) -> fx.Node:
        """A new constant, by this name or one that begins so."""
        label, number = name, 1
        while hasattr(self.module, label):
            number += 1
            label = f"{name}_{number}"
        self.module.register_buffer(label, value.detach().clone())
        # Before the first operator: what is inserted anywhere below may use it.
        first = next(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr"))
        with self.graph.inserting_before(first), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            node = self.graph.get_attr(label)
        node.meta["val"] = self.fake.from_tensor(value.detach().clone(), static_shapes=True)
        return node

    def call(self, target: Callable[..., Any], *args: Any, before: fx.Node) -> fx.Node:
        """A new call of an operator, in front of another."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        # The dispatcher in Python knows what to do with a size that stands for any number of images.
        with enable_python_dispatcher(), self.fake, torch.no_grad():
            node.meta["val"] = target(*fx.map_arg(args, lambda one: one.meta["val"]))
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Give all users of one node another, and take the first out."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.graph.erase_node(old)

    def tidy(self) -> fx.GraphModule:
        """Drop what nothing uses, constants too, and write the code anew."""
        self.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        layers = tuple(f"{node.target}." for node in self.graph.nodes if node.op == "call_module")
        for name in [name for name, _ in [*self.module.named_parameters(), *self.module.named_buffers()]]:
            if name not in used and not name.startswith(layers):
                holder, _, child = name.rpartition(".")
                delattr(self.module.get_submodule(holder), child)
        self.graph.lint()
        self.module.recompile()
        return self.module


def shape(node: Any) -> tuple[Any, ...]:
    """What a node's tensor measures; () where it is none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def is_map(node: Any) -> bool:
    """Whether it is a feature map (N, C, H, W) of more than one position."""
    sides = shape(node)
    return len(sides) == 4 and not (_is_one(sides[2]) and _is_one(sides[3]))


def is_pooled(node: Any) -> bool:
    """Whether it is one number for each image and channel, (N, C, 1, 1)."""
    sides = shape(node)
    return len(sides) == 4 and _is_one(sides[2]) and _is_one(sides[3])


def _is_one(side: Any) -> bool:
    return isinstance(side, int) and side == 1


def capture(network: nn.Module, example: Tensor) -> fx.GraphModule:
    """The network in evaluation mode as a graph.

    Args:
        network: it is read, not changed; the graph's constants are copies.
        example: (N, …), what the network takes. The graph takes batches of any size where the network's code does,
            and other sides than these where no code asked for them.

    Returns:
        The graph, without dropout, checks and copies. Nothing is overwritten in it: each operator makes a new tensor.

    Raises:
        UsageError: the network's way depends on the values that it computes, or it does not take the example.
    """
    device = next((parameter.device for parameter in network.parameters()), example.device)
    own = copy.deepcopy(network).eval().requires_grad_(False)
    # A batch of one would be taken for a constant.
    batch = (example if len(example) > 1 else torch.cat([example, example])).to(device)
    reason: Exception | None = None
    for dynamic in (({0: Dim.AUTO},), None):
        try:
            with torch.no_grad(), _quiet():
                program = export(
                    own, (batch if dynamic else example.to(device),), dynamic_shapes=dynamic, strict=False
                )
                return _cleaned(program)
        except Exception as error:  # whatever a foreign forward may raise; the last one is told
            reason = error
    told = (str(reason).strip().partition("\n")[0] or type(reason).__name__).rstrip(".")
    raise UsageError(
        f"{type(network).__name__} cannot be followed operator by operator on an input of shape "
        f"{tuple(example.shape)} ({told})."
    ) from reason


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    names = ("torch.fx.experimental.symbolic_shapes", "torch.export")
    with loggers_at(logging.CRITICAL, *names), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_SAME = (
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
)
_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)


def _cleaned(program: ExportedProgram) -> fx.GraphModule:
    module = program.module()
    if not _without_overwriting(module.graph):
        module = program.run_decompositions({}).module()  # slower, and for every case
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    # The checks of the shapes of inputs are replaced by ours.
    for node in list(graph.nodes):
        if (node.op == "call_module" and str(node.target).startswith("_guards")) or node.target in _CHECKS:
            graph.erase_node(node)
        elif node.op == "call_function" and (node.target in _SAME or _keeps_type(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # maps may come in another order of memory than they were traced in
    editor = Editor(module)
    _one_kind_of_norm(editor)
    return editor.tidy()


def _without_overwriting(graph: fx.Graph) -> bool:
    """Replace operators that write over what they are given, such as ``relu_``; False where that takes more thought.

    That is where what is written over, or a view of it, is known by another name, too.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable or node.target in _SAME:
            continue
        name = node.target._schema.name.removeprefix("aten::")
        packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
        given = node.args[0]
        if packet is None or node.target._overloadname not in packet.overloads() or not isinstance(given, fx.Node):
            return False
        if given.op != "call_function" or _is_view(given) or any(_is_view(user) for user in given.users):
            return False
        places = {one: place for place, one in enumerate(graph.nodes)}
        node.target = getattr(packet, node.target._overloadname)
        for user in list(given.users):
            if places[user] > places[node]:
                user.replace_input_with(given, node)
    return True


def _keeps_type(node: fx.Node) -> bool:
    """Whether a node turns a tensor into the type that it has."""
    if node.target not in (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device):
        return False
    given = node.args[0]
    assert isinstance(given, fx.Node)
    old, new = given.meta["val"], node.meta["val"]
    return bool(old.dtype == new.dtype and old.device == new.device)


def _is_view(node: fx.Node) -> bool:
    """Whether a node may share its memory with what it was made of."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"  # such as getitem
    aliases = any(one.alias_info is not None and not one.alias_info.is_write for one in node.target._schema.returns)
    return aliases or node.target in (*_SAME, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)


def _one_kind_of_norm(editor: Editor) -> None:
    """Batch norms as ``batch_norm(x, weight, bias, mean, variance, …)``, which answers with one tensor."""
    for node in editor.calls(aten._native_batch_norm_legit_no_training.default):
        for user in list(node.users):
            if user.target is operator.getitem and user.args[1] == 0:
                x, weight, bias, mean, variance, momentum, eps = node.args
                arguments = (x, weight, bias, mean, variance, False, momentum, eps, False)
                editor.replace(user, editor.call(aten.batch_norm.default, *arguments, before=user))

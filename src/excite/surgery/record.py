"""What a network does, as one recorded run: its operations, the tensors between them, its modules' calls.

Places for units are found by how tensors flow and never by what classes are called. The run is recorded below the
modules, at the level of PyTorch's operators, where ``out += x``, ``torch.add`` and a module that adds are the same.
It is made on a copy whose tensors have shapes and no contents; a network that cannot run so (its path depends on
values, as a detector's) is run once for real. Either way the run also knows every shape, which a symbolic trace would
not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from excite.cost import hollow_copy
from excite.errors import UsageError
from excite.surgery.hooks import attached_units, silenced

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(eq=False)
class Value:
    """A tensor between operations.

    Attributes:
        shape: its shape.
        channels_at: which dimension holds the channels; None where that was lost.
        pooled: whether all positions were merged on the way to it: the inside of an attention unit, or the head.
        producer: the operation that made it; None for an input.
        consumers: the operations that take it.
    """

    shape: tuple[int, ...]
    channels_at: int | None
    pooled: bool = False
    producer: Operation | None = None
    consumers: list[Operation] = field(default_factory=list)

    @property
    def is_map(self) -> bool:
        """Whether it is a feature map (N, C, *)."""
        return self.channels_at == 1 and not self.pooled and len(self.shape) >= 3

    @property
    def channels(self) -> int:
        """C of a feature map."""
        return self.shape[1]

    @property
    def size(self) -> tuple[int, ...]:
        """The positions of a feature map, (H, W) for images."""
        return self.shape[2:]


@dataclass(eq=False)
class Operation:
    """One operator call, such as ``convolution`` or ``add``; ``inputs`` are the values among its arguments."""

    name: str
    number: int
    inputs: list[Value]
    outputs: list[Value]
    call: Call | None
    transposed: bool = False
    overwrites: bool = False  # its first input

    @property
    def convolves(self) -> bool:
        """Whether it mixes channels by weights."""
        return "conv" in self.name or self.name in ("addmm", "mm", "bmm", "linear")

    @property
    def normalises(self) -> bool:
        """Whether it is a batch, group, instance or layer norm."""
        return "norm" in self.name and self.name != "linalg_vector_norm"

    @property
    def adds(self) -> bool:
        """Whether it is a sum of its first two inputs, the second perhaps multiplied by a third."""
        return (self.name, len(self.inputs)) in (("add", 2), ("addcmul", 3))

    @property
    def enlarges(self) -> bool:
        """Whether it makes a map of more positions: an interpolation, or a transposed convolution."""
        return self.name.startswith("upsample") or self.name == "grid_sampler_2d" or self.transposed

    @property
    def unary(self) -> bool:
        """Whether it turns one tensor into another of the same shape, position by position."""
        if len(self.inputs) != 1 or len(self.outputs) != 1 or self.inputs[0].shape != self.outputs[0].shape:
            return False
        return not (self.convolves or self.normalises or "pool" in self.name)


@dataclass(eq=False)
class Call:
    """One call of a module: what went in first, what came out, and the call that it was made in."""

    name: str
    module: nn.Module
    parent: Call | None
    input: Value | None
    output: Value | None = None

    def within(self, other: Call | None) -> bool:
        """Whether it was made in ``other``, or is it; every call is within None."""
        here: Call | None = self
        while here is not None and here is not other:
            here = here.parent
        return here is other


@dataclass(frozen=True)
class Record:
    """A recorded run; operations and calls in the order in which they began.

    ``barred`` are modules that cannot hold a unit, though the flow of tensors does not show it.
    """

    operations: list[Operation]
    calls: list[Call]
    inputs: list[Value]
    barred: frozenset[nn.Module] = frozenset()

    def calls_of(self, module: nn.Module) -> list[Call]:
        """Every call of one module."""
        return [call for call in self.calls if call.module is module]

    @property
    def values(self) -> Iterator[Value]:
        """Every value, in the order in which they were made."""
        yield from self.inputs
        for operation in self.operations:
            yield from operation.outputs


def record(module: nn.Module, example: Any = None, attached: bool = False) -> Record:
    """Run a network once in eval mode, and write down what it does.

    Args:
        module: any network. It is left as it was.
        example: what to call it with: a tensor, or a tuple of arguments; only the shapes matter to most networks. By
            default one image of zeros whose channels and size suit the network's first convolution.
        attached: with the units that were attached, whose calls are recorded and whose insides are not; by default
            they do not act, and only the host is seen.

    Raises:
        UsageError: the network does not run on the example, or on no guess.
    """
    if any(is_lazy(parameter) for parameter in module.parameters()):
        raise UsageError(
            f"{type(module).__name__} makes its parameters when it first runs: run it once, then attach."
        )
    guessed = example is None
    examples = list(_guesses(module)) if guessed else [example if isinstance(example, tuple) else (example,)]
    reason: Exception | None = None
    for attempt in (_without_contents, _for_real):
        for arguments in examples if attempt is _without_contents else examples[:1]:
            try:
                return attempt(module, arguments, attached)
            except Exception as error:  # whatever a foreign forward may raise; the last one is told
                reason = error
    shapes = [str(tuple(item.shape)) for item in tree_iter(examples[0]) if isinstance(item, Tensor)]
    kind = type(module).__name__
    told = (str(reason).partition("\n")[0] or type(reason).__name__).rstrip(".")
    given = f"an input of shape {', '.join(shapes)}" if shapes else "an example that holds no tensor"
    advice = "give what to call it with as example=" if guessed else "give another example"
    raise UsageError(f"{kind} does not run on {given}: {told}" + ("." if attached else f"; {advice}.")) from reason


def _guesses(module: nn.Module) -> Iterator[tuple[Tensor]]:
    first = next((child for child in module.modules() if isinstance(child, CONVOLUTIONS)), None)
    if first is None:
        kind = type(module).__name__
        raise UsageError(f"{kind} has no module that convolves: give what to call it with as example= if it does.")
    shape = getattr(module, "input_shape", None)
    if isinstance(shape, tuple):  # a network for windows of one size, whose bands are no channels to a convolution
        yield (torch.zeros(1, *shape, dtype=first.weight.dtype),)
        return
    dimensions = len(first.kernel_size)
    table, config = getattr(module, "table", None), getattr(module, "pretrained_cfg", None)
    known = [getattr(table, "input_size", None)]
    if isinstance(config, dict):
        known += list(config.get("input_size", ()))[-1:]
    usual = [224, 64, 32, 299, 512] if dimensions < 3 else [32, 64, 128]
    for size in [*filter(None, known), *usual]:
        yield (torch.zeros(1, first.in_channels, *[size] * dimensions, dtype=first.weight.dtype),)


def _without_contents(module: nn.Module, arguments: tuple[Any, ...], attached: bool) -> Record:
    hollow = hollow_copy(module).eval()
    originals = dict(module.named_modules(remove_duplicate=False))
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments)
    return _run(hollow, arguments, lambda name: originals[name], attached)


def _for_real(module: nn.Module, arguments: tuple[Any, ...], attached: bool) -> Record:
    first = next((tensor for tensor in module.parameters()), torch.zeros(()))
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to(first.device), arguments)
    modes = {child: child.training for child in module.modules()}
    originals = dict(module.named_modules())
    try:
        return _run(module.eval(), arguments, lambda name: originals[name], attached)
    finally:
        for child, training in modes.items():
            child.training = training


def _run(
    network: nn.Module, arguments: tuple[Any, ...], original: Callable[[str], nn.Module], attached: bool
) -> Record:
    recorder = _Recorder()
    handles = []
    units = {unit for _, unit in attached_units(network)}
    unseen = {part for unit in units for part in unit.modules()} - (units if attached else set())
    with nullcontext() if attached else silenced(network):
        for name, child in network.named_modules():
            if child not in unseen:
                handles.append(child.register_forward_pre_hook(recorder.enters(name, original(name)), prepend=True))
                handles.append(child.register_forward_hook(recorder.leaves))
        try:
            with torch.no_grad(), recorder:
                recorder.takes(arguments)
                recorder.gives(network(*arguments))
        finally:
            for handle in handles:
                handle.remove()
    return Record(recorder.operations, recorder.calls, recorder.given)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: Any = WeakTensorKeyDictionary()  # tensor → the value that it holds now
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.given: list[Value] = []
        self.stack: list[Call] = []

    def takes(self, arguments: Any) -> None:
        for tensor in tree_iter(arguments):
            if isinstance(tensor, Tensor):
                self.known[tensor] = Value(tuple(tensor.shape), 1 if tensor.ndim >= 3 else None)
                self.given.append(self.known[tensor])

    def gives(self, result: Any) -> None:
        """What the network returns is consumed by whoever called it."""
        values = [
            self.known[tensor] for tensor in tree_iter(result) if isinstance(tensor, Tensor) and tensor in self.known
        ]
        end = Operation("return", len(self.operations), values, [], None)
        for value in values:
            value.consumers.append(end)

    def enters(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: Any) -> None:
            first = arguments[0] if arguments else None
            here = self.known.get(first) if isinstance(first, Tensor) else None
            self.stack.append(Call(name, module, self.stack[-1] if self.stack else None, here))
            self.calls.append(self.stack[-1])

        return hook

    def leaves(self, _: nn.Module, arguments: Any, output: Any) -> Any:
        # What comes out unchanged is made another value, for nn.Identity too is a place: what follows it is not what
        # else is done with its input. The call is still open, so that the new value counts as made in it.
        call, changed = self.stack[-1], None
        if isinstance(output, Tensor) and output in self.known:
            if self.known[output] is call.input:
                output = changed = output.view_as(output)
            call.output = self.known[output]
        self.stack.pop()
        return changed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
        inputs = [self.known[tensor] for tensor in given if tensor in self.known]
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        made = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        if not inputs or not made:  # of parameters and constants alone: no part of the flow
            return result
        operation = Operation(name, len(self.operations), inputs, [], self.stack[-1] if self.stack else None)
        operation.transposed = name == "convolution" and bool(args[6])
        operation.overwrites = func._schema.name.endswith("_")
        for tensor in made:
            value = Value(tuple(tensor.shape), *_layout(operation, args, tuple(tensor.shape)), operation)
            operation.outputs.append(value)
            self.known[tensor] = value
        if operation.overwrites and isinstance(args[0], Tensor):
            self._overwritten(args[0]._base, args[0].shape, operation)
        for value in inputs:
            value.consumers.append(operation)
        self.operations.append(operation)
        return result

    def _overwritten(self, whole: Tensor | None, part: torch.Size, operation: Operation) -> None:
        """Of a tensor of which a part was written, all that follows is made from what was written."""
        if whole is None or whole.shape == part:
            return
        if whole in self.known:
            operation.inputs.append(self.known[whole])
        source = operation.inputs[0]
        at = source.channels_at if len(whole.shape) == len(source.shape) else None
        value = Value(tuple(whole.shape), at, source.pooled, operation)
        operation.outputs.append(value)
        self.known[whole] = value


# --- where the channels are ----------------------------------------------------------------------------------------


def _layout(operation: Operation, args: Any, shape: tuple[int, ...]) -> tuple[int | None, bool]:
    """``channels_at`` and ``pooled`` of what an operation makes."""
    name, source = operation.name, operation.inputs[0]
    if "conv" in name:
        return 1, source.pooled
    alike = [value for value in operation.inputs if value.shape == shape]
    if alike and name not in ("permute", "transpose", "t", "view", "_unsafe_view", "reshape", "as_strided", "expand"):
        # Of two maps that are added or multiplied, each knows for the other.
        known = [value.channels_at for value in alike if value.channels_at is not None]
        return (known[0] if known else None), all(value.pooled for value in alike)
    at = source.channels_at
    if at is None:
        return None, source.pooled
    if name == "permute":
        order = [int(position) % len(shape) for position in args[1]]
        return order.index(at), source.pooled
    if name in ("transpose", "t"):
        first, second = (int(p) % len(shape) for p in args[1:3]) if name == "transpose" else (0, 1)
        return {first: second, second: first}.get(at, at), source.pooled
    if name in ("view", "_unsafe_view", "reshape"):
        return _viewed(source.shape, at, shape), source.pooled
    if name in ("addmm", "mm", "linear"):
        return len(shape) - 1, source.pooled
    merged = math.prod(shape[2:]) == 1 and (math.prod(source.shape[2:]) > 1 or "pool" in name or name == "mean")
    if at == 1 and merged:
        return 1, True
    return (at if len(shape) == len(source.shape) else None), source.pooled


def _viewed(old: Sequence[int], at: int, new: Sequence[int]) -> int | None:
    if tuple(old) == tuple(new):
        return at
    if at == len(old) - 1 and new[-1] == old[-1]:
        return len(new) - 1  # (N, H, W, C) as (N·H·W, C), and back
    if len(new) >= 3 and new[0] == old[0]:
        positions = len(min(old, new, key=len)) - 2
        if positions and tuple(new[-positions:]) == tuple(old[-positions:]):
            return 1  # channels split into groups, or groups merged into channels
        if at == 1 and new[1] == old[1]:
            return 1  # positions put into one row
    return None

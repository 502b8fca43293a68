"""Where numbers of an image multiply the channels of its maps: one run of a network, watched operator by operator.

A gate is found by how tensors flow and never by what modules are called. A map (N, C, *) is multiplied by a tensor
that has one number for each image and channel and was made from maps whose positions were merged: that is
squeeze-and-excitation, whoever wrote it. Where that tensor comes from a softmax, each branch of a network is
multiplied by its share: that is a selective kernel, and the convolutions that made the branches are its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from excite.evaluation_mode import evaluation_mode

MULTIPLICATIONS = ("mul", "addcmul", "lerp")
SOFTMAX = ("_softmax",)

Range = tuple[float, float]


@dataclass(frozen=True)
class Convolved:
    """One convolution on the way to a map: its number in the run, kernel and dilation in each dimension."""

    number: int
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]


Chain = tuple[Convolved, ...]
"""The convolutions on the way from the input to a map, in order."""


@dataclass(frozen=True, eq=False)
class Softmax:
    """What a softmax answered.

    Attributes:
        answer: the tensor, of M shares along ``branches``.
        branches: the dimension that it sums over.
        where: the place in the run.
        values: that of its fact, see there.
    """

    answer: Tensor
    branches: int
    where: Where
    values: object


@dataclass(frozen=True, eq=False)
class Fact:
    """What is known of a tensor.

    Attributes:
        values: the same object for all tensors that hold the same numbers, in whatever shape.
        pooled: whether the positions of all maps that it was made from were merged.
        range: what a function such as a sigmoid leaves possible; None where nothing is known.
        softmax: what it is a view of, perhaps times a number.
        before: of such a view, how many numbers its dimensions before the branches count: so they are found again.
        branch: which branch it is, where it is one of them.
        chains: of a map, how it was convolved; of maps that were stacked, each one's.
    """

    values: object
    pooled: bool
    range: Range | None = None
    softmax: Softmax | None = None
    before: int = 0
    branch: int | None = None
    chains: tuple[Chain, ...] = ((),)


@dataclass(frozen=True)
class Where:
    """A place in a run.

    Attributes:
        module: the path of the innermost module that was running.
        numbers: of each module that was running, how many operators of the kind had run since it was called.
    """

    module: str
    numbers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Answer:
    """A module that answers with a gate's numbers: its path, and the shape of the answer."""

    module: str
    shape: tuple[int, ...]


@dataclass(eq=False)
class Product:
    """A map that was multiplied by a gate, or by the shares of a softmax.

    Attributes:
        where: of the first such multiplication.
        channels: C.
        size: the positions of the map.
        gate: what is known of the gate.
        operand: which of the two factors the gate was.
        axis: its dimension of the channels.
        chains: of a softmax, those of the maps by branch.
    """

    where: Where
    channels: int
    size: tuple[int, ...]
    gate: Fact
    operand: int = 0
    axis: int = 1
    chains: dict[int, Chain] = field(default_factory=dict)


@dataclass(eq=False)
class _Frame:
    """A module that is running, and how many operators of each kind it has called so far."""

    path: str
    module: nn.Module
    counts: dict[tuple[str, ...], int] = field(default_factory=dict)


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one run.

    Attributes:
        products: what was found, in order.
        answers: by a fact's ``values``, the innermost module that answered with them.
        calls: how often each module ran.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.images = len(images)
        self.facts: Any = WeakTensorKeyDictionary()
        self.facts[images] = Fact(object(), pooled=False)
        self.stack: list[_Frame] = []
        self.products: list[Product] = []
        self.answers: dict[object, Answer] = {}
        self.calls: dict[str, int] = {}
        self._convolutions = 0

    def entered(self, path: str) -> Callable[..., None]:
        """A forward pre-hook for the module at that path."""

        def hook(module: nn.Module, _: Any) -> None:
            self.stack.append(_Frame(path, module))
            self.calls[path] = self.calls.get(path, 0) + 1

        return hook

    def left(self, module: nn.Module, _: Any, answer: Any) -> None:
        """The forward hook that goes with it."""
        frame = self.stack.pop()
        fact = self.facts.get(answer) if isinstance(answer, Tensor) else None
        if fact is not None:
            self.answers.setdefault(fact.values, Answer(frame.path, tuple(answer.shape)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (parts := _in_parts(self, func, args, kwargs)) is not NotImplemented:
            return parts
        name = _name(func)
        given = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
        known = [(tensor, self.facts[tensor]) for tensor in given if tensor in self.facts]
        shapes = [tuple(tensor.shape) for tensor, _ in known]  # before: some operators change them in place
        if name in MULTIPLICATIONS:
            self._multiplied(name, args)
        where = self._where(SOFTMAX) if name in SOFTMAX else None
        result = func(*args, **kwargs)
        if known:
            made = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
            for number, tensor in enumerate(made):
                fact = self._fact(name, args, known, shapes, tensor)
                if where is not None and fact.pooled:
                    softmax = Softmax(tensor, args[1] % tensor.dim(), where, fact.values)
                    before = math.prod(tensor.shape[: softmax.branches])
                    fact = replace(fact, softmax=softmax, before=before, range=(0.0, 1.0))
                self.facts[tensor] = _viewed(name, args, fact, shapes[0], tensor, number)
        return result

    # --- what an operator makes ------------------------------------------------------------------------------------

    def _fact(self, name: str, args: Any, known: Any, shapes: list[tuple[int, ...]], made: Tensor) -> Fact:
        first, fact = known[0]
        if name in _VIEWS and first.dtype.is_floating_point:
            return fact
        facts = [one for _, one in known]
        pooled = all(one.pooled for one in facts) or _merges(name, args, shapes[0], tuple(made.shape))
        chains = _chains(name, facts)
        if made.numel() < math.prod(shapes[0]) or "conv" in name:  # stacked maps have become one
            chains = (max(chains, key=len),)
        if "conv" in name and not fact.pooled:
            self._convolutions += 1
            chains = ((*chains[0], self._convolved(args)),)
        made_of = Fact(object(), pooled, _range(name, args, facts), chains=chains)
        if name in ("mul", "div") and len(facts) == 1 and made.shape == first.shape:  # shares, times a number
            return replace(made_of, softmax=fact.softmax, before=fact.before, branch=fact.branch)
        return made_of

    def _convolved(self, args: Any) -> Convolved:
        # Some modules rearrange a dilated map and convolve it without: what they say of themselves goes first.
        module = self.stack[-1].module if self.stack else None
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return Convolved(self._convolutions, module.kernel_size, module.dilation)
        kernel = tuple(args[1].shape[2:])
        dilation = tuple(args[5]) if len(args) > 5 else (1,)
        return Convolved(self._convolutions, kernel, dilation * (len(kernel) if len(dilation) == 1 else 1))

    def _where(self, kinds: tuple[str, ...]) -> Where:
        """Where an operator of these kinds stands; all modules that are running count it."""
        numbers = []
        for frame in self.stack:
            numbers.append((frame.path, frame.counts.get(kinds, 0)))
            frame.counts[kinds] = numbers[-1][1] + 1
        return Where(self.stack[-1].path, tuple(numbers))

    # --- multiplications -------------------------------------------------------------------------------------------

    def _multiplied(self, name: str, args: Any) -> None:
        where = self._where(MULTIPLICATIONS)
        factors = factors_of(name, args)
        if not all(isinstance(factor, Tensor) for factor in factors):
            return
        for operand in (1, 0):
            gate, given = factors[operand], factors[1 - operand]
            fact, of_map = self.facts.get(gate), self.facts.get(given)
            if fact is None or of_map is None or not fact.pooled or of_map.pooled:
                continue
            if fact.softmax is not None:
                self._shared(where, name, args, given, fact, of_map)
            elif (axis := _channels(gate, given)) and len(gate) == self.images:
                size = tuple(side for at, side in enumerate(given.shape) if at not in (0, axis))
                if not any(_same_unit(other, where, fact) for other in self.products):
                    self.products.append(Product(where, given.shape[axis], size, fact, operand, axis))
            return

    def _shared(self, where: Where, name: str, args: Any, given: Tensor, fact: Fact, of_map: Fact) -> None:
        softmax = fact.softmax
        assert softmax is not None
        shape = softmax.answer.shape
        count, images = shape[softmax.branches], shape[1 if softmax.branches == 0 else 0]
        if count < 2 or images != self.images:
            return
        found = next((one for one in self.products if one.gate.softmax is softmax), None)
        if found is None:
            if any(one.gate.softmax and one.gate.softmax.where == softmax.where for one in self.products):
                return  # the same module, called once more
            size = tuple(given.shape[2 if fact.branch is not None else 3 :])
            found = Product(where, softmax.answer.numel() // (count * images), size, fact)
            self.products.append(found)
        if fact.branch is None:
            found.chains |= dict(enumerate(of_map.chains if len(of_map.chains) == count else ()))
            return
        found.chains[fact.branch] = of_map.chains[0]
        if name == "lerp" and count == 2:  # the other map has what is left of 1
            other = self.facts.get(args[0])
            if other is not None:
                found.chains[1 - fact.branch] = other.chains[0]


def factors_of(name: str, args: Any) -> tuple[Any, Any]:
    """The two factors, one of which may be a gate, of one of ``MULTIPLICATIONS``."""
    return (args[0], args[1]) if name == "mul" else (args[1], args[2])


def _same_unit(other: Product, where: Where, gate: Fact) -> bool:
    # A module that is called again; or one gate on two maps, as on a branch and on its shortcut.
    here = other.where.module == where.module
    return here and (other.gate.values is gate.values or other.where.numbers[-1] == where.numbers[-1])


def _channels(gate: Tensor, given: Tensor) -> int | None:
    """The dimension of the map along which each image has its own number in the gate; None where it is no gate."""
    if gate.dim() != given.dim() or gate.dim() < 3:
        return None
    # A dimension that was expanded has the same number all along.
    own = [axis for axis in range(1, gate.dim()) if gate.shape[axis] > 1 and gate.stride(axis) > 0]
    channels_last = own == [3] and gate.dim() == 4 and given.shape[1] > 1
    if (own == [1] or channels_last) and given.shape[own[0]] == gate.shape[own[0]]:
        return own[0]
    return None


# --- views, ranges, merged positions -------------------------------------------------------------------------------

_PIECES = ("unbind", "select", "slice", "split", "split_with_sizes")
_SHAPED = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t")
_VIEWS = frozenset((*_SHAPED, *_PIECES, "_to_copy", "clone", "contiguous", "alias", "detach"))
_FUNCTIONS: dict[str, Range] = {"sigmoid": (0.0, 1.0), "hardsigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}
_REDUCTIONS = ("mean", "sum", "amax", "max", "std", "var", "std_mean", "var_mean", "logsumexp", "linalg_vector_norm")


def _viewed(name: str, args: Any, fact: Fact, old: tuple[int, ...], made: Tensor, number: int) -> Fact:
    """What a view is a part of."""
    if name in ("stack", "cat") or name not in _VIEWS:
        return fact
    softmax = fact.softmax
    if name not in _PIECES:
        if softmax is None or name not in ("permute", "transpose", "t") or fact.branch is not None:
            return fact
        at = _branches_at(fact, old)
        if at is None:
            return replace(fact, before=-1)
        order = _order(name, args, len(old))
        return replace(fact, before=math.prod(made.shape[: order.index(at)]))
    whole = math.prod(old) == made.numel()
    if softmax is None or fact.branch is not None:
        return fact if whole else replace(fact, values=object(), chains=_chains_of_piece(name, args, fact, number))
    axis = _axis(name, args, len(old))
    at = _branches_at(fact, old)
    if axis != at or made.numel() * old[axis] != math.prod(old):
        return fact if whole else replace(fact, values=object(), softmax=None)
    start = number if name not in ("select", "slice") else args[2] if len(args) > 2 else 0
    return replace(fact, values=object(), branch=int(start or 0) % old[axis])


def _chains_of_piece(name: str, args: Any, fact: Fact, number: int) -> tuple[Chain, ...]:
    """Of maps that were stacked, that of the one which was taken out."""
    if len(fact.chains) == 1:
        return fact.chains
    at = {"unbind": number, "split": number, "select": args[2] if len(args) > 2 else 0}.get(name)
    return fact.chains if at is None or at >= len(fact.chains) else (fact.chains[at],)


def _branches_at(fact: Fact, shape: tuple[int, ...]) -> int | None:
    """The dimension of the branches in a view of a softmax's answer."""
    assert fact.softmax is not None
    count = fact.softmax.answer.shape[fact.softmax.branches]
    for axis, side in enumerate(shape):
        if side == count and math.prod(shape[:axis]) == fact.before:
            return axis
    return None


def _axis(name: str, args: Any, dimensions: int) -> int:
    at = 2 if name.startswith("split") else 1
    return int(args[at] if len(args) > at else 0) % dimensions


def _order(name: str, args: Any, dimensions: int) -> list[int]:
    if name == "permute":
        return [int(axis) % dimensions for axis in args[1]]
    order = list(range(dimensions))
    first, second = (0, 1) if name == "t" else (int(axis) % dimensions for axis in args[1:3])
    order[first], order[second] = order[second], order[first]
    return order


def _chains(name: str, facts: list[Fact]) -> tuple[Chain, ...]:
    if name in ("stack", "cat"):
        return tuple(chain for fact in facts for chain in fact.chains)
    return max((fact.chains for fact in facts), key=lambda chains: (len(chains), len(chains[0])))


def _range(name: str, args: Any, facts: list[Fact]) -> Range | None:
    """What values an operator leaves possible."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if name in ("clamp", "hardtanh"):
        ends = args[1:3] if len(args) > 2 else (-1.0, 1.0) if name == "hardtanh" else ()
        ends = tuple(ends)
        plain = len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)
        return (float(ends[0]), float(ends[1])) if plain else None
    old = facts[0].range
    if old is None or len(facts) > 1 or name not in _ARITHMETIC:
        return None
    own, other = args[0], (args[1] if len(args) > 1 else 0.0)
    if isinstance(own, Tensor) and isinstance(other, Tensor) and own.numel() == 1 < other.numel():
        own, other = other, own  # 2 · gate
    if isinstance(other, Tensor):
        if other.numel() != 1:
            return None
        other = other.item()
    if name == "div" and not other:
        return None
    found = [float(_ARITHMETIC[name](end, other)) for end in old]
    return min(found), max(found)


_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "mul": lambda gate, number: gate * number,
    "div": lambda gate, number: gate / number,
    "add": lambda gate, number: gate + number,
    "sub": lambda gate, number: gate - number,
    "rsub": lambda gate, number: number - gate,
    "neg": lambda gate, _: -gate,
}


def _merges(name: str, args: Any, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether an operator merges all positions of a map: what is left is one number for each image and channel."""
    if len(old) < 3 or len([side for side in new[1:] if side > 1]) > 1:
        return False
    if name == "bmm":
        return new[-1] == 1 < old[-1]
    if "pool" in name:
        # What goes on from one window to the next may leave one position of a small map, which is a map for all that.
        return math.prod(new[2:]) == 1 and ("adaptive" in name or _in_one_window(args, old))
    if name not in _REDUCTIONS:
        return False
    over = args[2 if name == "linalg_vector_norm" else 1 :][:1]
    axes = over[0] if over and isinstance(over[0], (list, tuple)) else [*over]
    if not axes or not all(isinstance(axis, int) for axis in axes):
        return False
    inside = {axis % len(old) for axis in axes}
    return inside.isdisjoint({0, 1}) or (len(old) == 4 and inside == {1, 2})


def _in_one_window(args: Any, old: tuple[int, ...]) -> bool:
    kernel = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    return all(side == own for side, own in zip(old[2:], [*kernel] * (len(old) - 2), strict=False))


class Grab(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, takes hold of one factor of a multiplication, or of what a softmax answers.

    Args:
        kinds: of operators that are counted: ``MULTIPLICATIONS`` or ``SOFTMAX``.
        number: which of them, from 0.
        operand: of a multiplication, which factor.
        keep: called with what it took hold of.
    """

    def __init__(self, kinds: tuple[str, ...], number: int, operand: int, keep: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds, self.number, self.operand, self.keep = kinds, number, operand, keep
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (parts := _in_parts(self, func, args, kwargs)) is not NotImplemented:
            return parts
        name = _name(func)
        wanted = name in self.kinds and self.seen == self.number
        self.seen += name in self.kinds
        if wanted and self.kinds is MULTIPLICATIONS:
            self.keep(factors_of(name, args)[self.operand])
        result = func(*args, **kwargs)
        if wanted and self.kinds is SOFTMAX:
            self.keep(result)
        return result


def _name(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::").rstrip("_")


def _in_parts(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """In inference mode operators arrive whole that are made of others: what they are made of is called."""
    if not torch.is_inference_mode_enabled():
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


@torch.no_grad()
def watch(network: nn.Module, images: Tensor) -> Flow:
    """Run a network once in evaluation mode, and write down what gates it has; it is left as it was."""
    flow = Flow(images)
    with evaluation_mode(network), ExitStack() as hooks:
        for path, module in network.named_modules():
            hooks.callback(module.register_forward_pre_hook(flow.entered(path), prepend=True).remove)
            hooks.callback(module.register_forward_hook(flow.left).remove)
        with flow:
            network(images)
    return flow

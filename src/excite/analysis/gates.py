"""The gates of any network: found by what they do, and read while it runs.

A gate of squeeze-and-excitation is one number per image and channel, made from what all positions of a map hold, that
multiplies a map. A gate of selective kernels is a share of each branch that adds up to 1 over the branches, per image
and channel. Both are found by running the network once and following its tensors (:mod:`excite.analysis.gate_flow`),
so that the units of timm, torchvision or a file that somebody copied are found like excite's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from excite.analysis.gate_flow import MULTIPLICATIONS, SOFTMAX, Chain, Flow, Grab, Product, watch
from excite.errors import UsageError

log = logging.getLogger(__name__)

Kind = Literal["se", "sk"]
Range = tuple[float, float]


@dataclass(frozen=True)
class Kernel:
    """One branch of a selective kernel.

    Attributes:
        name: ``3×3``, or ``3×3, dilation 2``.
        span: how many pixels it spans, dilation · (kernel − 1) + 1; the largest of its dimensions.
    """

    name: str
    span: int


@dataclass(frozen=True)
class Tap:
    """How a gate is read with which no module answers: from one operator in a call of a module.

    Attributes:
        number: which of the module's multiplications, or softmaxes, it is, counted from 0.
        operand: of a multiplication: which factor is the gate.
        axis: the gate's dimension of the channels, or the softmax's of the branches.
    """

    number: int
    operand: int
    axis: int


@dataclass(frozen=True)
class Gate:
    """One attention unit of a network.

    Attributes:
        name: of the unit: the path of the module in which the gate acts. Where one module has several, the second has
            `` (2)`` after it; where it is the network itself, its class is named.
        path: of the module whose answer is the gate; with ``tap``, of the module that has it somewhere inside.
        kind: ``se`` for gates (N, C), ``sk`` for attention (N, M, C).
        channels: C.
        size: the positions of the map that it acts on, (rows, columns), in the run that found it.
        range: what the gate's function can answer: (0, 1) for a sigmoid, (0, 2) for one that is scaled by 2; (0, 1),
            too, for a function that is not known.
        kernels: of selective kernels, the M branches in the order of the attention.
        tap: how it is read where no module answers with it, as with ``torch.sigmoid(…)`` in somebody's ``forward``.
        unit: the path of the module in which the gate acts.
    """

    name: str
    path: str
    kind: Kind
    channels: int
    size: tuple[int, ...]
    range: Range
    kernels: tuple[Kernel, ...] = ()
    tap: Tap | None = None
    unit: str = ""

    @property
    def branches(self) -> tuple[int, int]:
        """The branches of the smallest and of the largest span, as places in ``kernels``."""
        spans = [kernel.span for kernel in self.kernels]
        return spans.index(min(spans)), spans.index(max(spans))


def find_gates(network: nn.Module, example: Tensor) -> list[Gate]:
    """All units with a gate, in the order in which they run.

    A unit that runs several times is named once. A softmax over branches of one and the same convolution (ResNeSt) is
    no selective kernel and left out.

    Args:
        network: it is run once, in evaluation mode, and left as it was.
        example: what it takes, (N, …); which numbers it holds does not matter. It is taken to the network's device.
    """
    first = next(network.parameters(), None)
    flow = watch(network, example if first is None else example.to(first.device))
    gates: list[Gate] = []
    for product in flow.products:
        name = _fresh_name(product.where.module or type(network).__name__, gates)
        gate = _selection(name, product, flow) if product.gate.softmax else _excitation(name, product, flow)
        if gate is not None:
            gates.append(gate)
    return gates


@contextmanager
def reading(network: nn.Module, gates: list[Gate]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, every run of the network leaves its gates in the dictionary.

    Yields:
        By the unit's name: (N, C) or (N, M, C), float32 on the network's device, without gradients. Of a unit that
        runs several times, the last run's.
    """
    values: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for gate in gates:
            module = network.get_submodule(gate.path)
            if gate.tap is None:
                stack.callback(module.register_forward_hook(_answer(gate, values)).remove)
            else:
                enter, leave = _inside(gate, gate.tap, values)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield values


def require_gates(gates: list[Gate], kind: Kind | None = None) -> list[Gate]:
    """Those of a kind, or all.

    Raises:
        UsageError: there are none.
    """
    chosen = [gate for gate in gates if kind in (None, gate.kind)]
    if chosen:
        return chosen
    what = {"se": "squeeze-and-excitation", "sk": "selective kernel", None: "attention"}[kind]
    does = {
        "se": "multiplies the channels of a map by numbers that were made from the whole map",
        "sk": "chooses between kernels by a softmax",
    }
    raise UsageError(
        f"The network has no {what} unit that could be read: no module of it "
        f"{does[kind] if kind else ' or '.join(does.values())}."
    )


# --- what was found ------------------------------------------------------------------------------------------------


def _fresh_name(unit: str, gates: list[Gate]) -> str:
    taken = {gate.name for gate in gates}
    number = 1
    while (name := f"{unit} ({number})" if number > 1 else unit) in taken:
        number += 1
    return name


def _excitation(name: str, product: Product, flow: Flow) -> Gate | None:
    unit, tap = product.where.module, None
    path = _answering(product, flow, lambda shape: shape.count(1) >= len(shape) - 2 and product.channels in shape[1:])
    if path is None:
        if product.gate.range is None:  # a norm that somebody wrote out multiplies so, too
            log.info("%s multiplies channels by numbers that no function bounds: left out", name)
            return None
        path, tap = unit, Tap(product.where.numbers[-1][1], product.operand, product.axis)
    return Gate(
        name, path, "se", product.channels, product.size, product.gate.range or (0.0, 1.0), tap=tap, unit=unit
    )


def _selection(name: str, product: Product, flow: Flow) -> Gate | None:
    softmax = product.gate.softmax
    assert softmax is not None
    count = softmax.answer.shape[softmax.branches]
    kernels = _kernels([product.chains.get(branch, ()) for branch in range(count)])
    if kernels is None:
        log.info("%s chooses between branches in which no convolution of their own was found: left out", name)
        return None
    path, tap = _answering(product, flow, lambda shape: softmax.branches == 1 and shape[1] == count), None
    if path is None:
        # The softmax may stand in another module than the multiplication: the innermost that has both.
        unit, numbers = product.where.module, dict(softmax.where.numbers)
        path = max((module for module in numbers if _within(unit, module)), key=len)
        tap = Tap(numbers[path], 0, softmax.branches)
    return Gate(name, path, "sk", product.channels, product.size, (0.0, 1.0), kernels, tap, product.where.module)


def _answering(product: Product, flow: Flow, fits: Callable[[tuple[int, ...]], bool]) -> str | None:
    """The module of the unit whose answer is the gate, and nothing else; None where there is none."""
    softmax, unit = product.gate.softmax, product.where.module
    answer = flow.answers.get(softmax.values if softmax else product.gate.values)
    if answer is None or not _within(answer.module, unit) or not fits(answer.shape):
        return None
    # One that the unit calls more than once is not read when it is the gate, but when it is called last.
    return answer.module if flow.calls[answer.module] == flow.calls[unit] else None


def _within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")


def _kernels(chains: list[Chain]) -> tuple[Kernel, ...] | None:
    """The kernels of branches, by the convolutions that each has to itself; None where one has none."""
    shared = 0
    while all(len(chain) > shared and chain[shared] == chains[0][shared] for chain in chains):
        shared += 1
    own = [chain[shared:] for chain in chains]
    return tuple(_kernel(chain) for chain in own) if all(own) else None


def _kernel(chain: Chain) -> Kernel:
    # What a pointwise convolution adds to a kernel is nothing that it spans.
    spatial = [one for one in chain if max(one.kernel) > 1] or [*chain[:1]]
    span = 1 + sum(max(d * (k - 1) for k, d in zip(one.kernel, one.dilation, strict=True)) for one in spatial)
    return Kernel(" and ".join(_kernel_name(one.kernel, one.dilation) for one in spatial), span)


def _kernel_name(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> str:
    name = "×".join(map(str, kernel))
    if max(dilation) > 1:
        name += f", dilation {dilation[0] if len(set(dilation)) == 1 else '×'.join(map(str, dilation))}"
    return name


# --- reading -------------------------------------------------------------------------------------------------------


def _kept(values: Tensor) -> Tensor:
    # A copy: some networks go on to work on it in place.
    return values.detach().to(torch.float32, copy=True)


def _answer(gate: Gate, values: dict[str, Tensor]) -> Any:
    shape = (len(gate.kernels), gate.channels) if gate.kind == "sk" else (gate.channels,)

    def hook(module: nn.Module, arguments: Any, answer: Tensor) -> None:
        values[gate.name] = _kept(answer).reshape(-1, *shape)

    return hook


def _inside(gate: Gate, tap: Tap, values: dict[str, Tensor]) -> tuple[Any, Any]:
    """Hooks for the start and the end of the module's call, between which its operators are watched."""

    def keep(found: Tensor) -> None:
        if gate.kind == "sk":
            whole = found.movedim(tap.axis, 0).movedim(1, 0)  # images, branches, and the channels in their order
            values[gate.name] = _kept(whole.flatten(2))
        else:
            at = [0 if axis not in (0, tap.axis) else slice(None) for axis in range(found.dim())]
            values[gate.name] = _kept(found[tuple(at)])

    grabbing: list[Grab] = []

    def enter(module: nn.Module, arguments: Any) -> None:
        kinds = SOFTMAX if gate.kind == "sk" else MULTIPLICATIONS
        grabbing.append(Grab(kinds, tap.number, tap.operand, keep))
        grabbing[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, arguments: Any, answer: Any) -> None:
        grabbing.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return enter, leave

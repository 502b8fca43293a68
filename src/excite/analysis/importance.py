"""Which channels a network can best do without: by its gates, by the size of its filters, or by lot.

Sources: Hu et al., arXiv 1709.01507, who name pruning as a use of their gates; Li, Kadav, Durdanovic, Samet, Graf,
"Pruning Filters for Efficient ConvNets", arXiv 1608.08710, Sect. 3.1, for the L1 norm of filters; Liu et al.,
"Learning Efficient Convolutional Networks through Network Slimming", arXiv 1708.06519, Sect. 3, for batch norm's γ.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from excite.analysis.gates import Gate, reading
from excite.analysis.moments import Moments
from excite.errors import ExciteError, UsageError
from excite.evaluation_mode import evaluation_mode

Method = Literal["excitation", "l1", "random"]
METHODS: tuple[Method, ...] = ("excitation", "l1", "random")
Role = Literal["output", "norm", "input"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Part:
    """What a group of channels is of one layer.

    Attributes:
        layer: its path in the network.
        role: whether the channels are the ``output`` of a convolution or linear layer, its ``input``, or pass a
            ``norm``, of which nothing else is asked than one number for each channel.
        places: which of the layer's channels they are, (k,).
        channels: to which channel of the group each of them belongs, (k,).
        of_gate: whether the layer computes a gate, rather than the map that it acts on.
    """

    layer: str
    role: Role
    places: Tensor
    channels: Tensor
    of_gate: bool = False


@dataclass(frozen=True)
class Group:
    """Channels of several layers that come and go together, such as those of a stage, which its shortcuts tie.

    Attributes:
        name: the layer that it was found by.
        size: how many channels.
        parts: all that reads or writes them.
    """

    name: str
    size: int
    parts: tuple[Part, ...]


# --- the gates over many images ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateStatistics:
    """What the gates of one unit were over many images, float64: each (C,), or (M, C) for selective kernels."""

    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor

    @property
    def spread(self) -> float:
        """How much the gates vary over the images: the root mean square of their standard deviations."""
        return float(self.deviation.square().mean().sqrt())

    @property
    def constant(self) -> Tensor:
        """What stands for them where they hardly vary: the mean, and where all are equal exactly that."""
        return torch.where(self.low == self.high, self.low, self.mean)


@torch.inference_mode()
def gate_statistics(
    network: nn.Module, gates: Sequence[Gate], batches: Iterable[Tensor], device: torch.device | str = "cpu"
) -> dict[str, GateStatistics]:
    """Mean, deviation and range of every gate over all images, in one pass; by the unit's name.

    Args:
        network: it is run in evaluation mode, and left in the mode that it was in.
        gates: those to read.
        batches: images (N, C, H, W), as the network is to be fed.
        device: where the network is.

    Raises:
        ExciteError: no images, or a gate that is not a number.
    """
    sums: dict[str, _Sums] = {}
    with evaluation_mode(network), reading(network, list(gates)) as values:
        for images in batches:
            network(images.to(device))
            for gate in gates:
                read = values[gate.name]
                sums.setdefault(gate.name, _Sums(read.shape[1:])).add(read, gate.name)
    if gates and not sums:
        raise ExciteError("There are no images to read the gates on.")
    return {name: total.finish() for name, total in sums.items()}


class _Sums:
    """What is gathered of one unit, batch by batch."""

    def __init__(self, shape: torch.Size) -> None:
        self.moments = Moments(1, shape.numel())
        self.low, self.high = torch.full(shape, torch.inf).double(), torch.full(shape, -torch.inf).double()

    def add(self, values: Tensor, name: str) -> None:
        if not bool(values.isfinite().all()):
            raise ExciteError(f"The gates of {name} are not finite: the network's weights are broken.")
        values = values.double().cpu()
        self.moments.update(values, torch.zeros(len(values), dtype=torch.int64))
        self.low, self.high = torch.minimum(self.low, values.amin(0)), torch.maximum(self.high, values.amax(0))

    def finish(self) -> GateStatistics:
        _, mean, deviation = self.moments.overall()
        shape = self.low.shape
        return GateStatistics(
            torch.from_numpy(mean).view(shape), torch.from_numpy(deviation).view(shape), self.low, self.high
        )


# --- which layer makes the map that a gate acts on -----------------------------------------------------------------


@dataclass(frozen=True)
class Fed:
    """What a unit is given.

    Attributes:
        layer: the convolution or batch norm that made its map, with nothing in between; None where it was made
            otherwise.
        shortcut: whether it is given a second map, which it adds.
    """

    layer: str | None
    shortcut: bool


@torch.inference_mode()
def what_feeds(network: nn.Module, gates: Sequence[Gate], example: Tensor) -> dict[str, Fed]:
    """For each unit, the layer whose output it is given, by one run of the network in evaluation mode.

    For a unit that is attached to a batch norm or a convolution that is this one.
    """
    makers: dict[int, tuple[Tensor, str]] = {}
    found: dict[str, Fed] = {}
    named = {gate.name for gate in gates if gate.kind == "se"}

    def made(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, answer: Any) -> None:
            if not isinstance(answer, Tensor) or type(module) is nn.Identity:
                return
            if isinstance(module, (*CONVOLUTIONS, *NORMS)) or not any(module.children()):
                makers[id(answer)] = answer, path  # with the tensor itself, or its number might be given away again
            else:  # a block ends with what its last layer made
                makers.setdefault(id(answer), (answer, path))

        return hook

    def given(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            maps = [one for one in (*arguments, *named.values()) if isinstance(one, Tensor)]
            layer = makers.get(id(maps[0]), (None, None))[1] if maps else None
            kind = type(network.get_submodule(layer)) if layer is not None else None
            found[path] = Fed(layer if kind in (*CONVOLUTIONS, *NORMS) else None, len(maps) > 1)

        return hook

    with evaluation_mode(network), ExitStack() as stack:
        for path, module in network.named_modules():
            if path in named:
                stack.callback(module.register_forward_pre_hook(given(path), with_kwargs=True).remove)
            else:
                # First of all hooks: an attached unit is called by another one of the same module.
                stack.callback(module.register_forward_hook(made(path), prepend=True).remove)
        network(example)
    return found


# --- scores --------------------------------------------------------------------------------------------------------


def scores(
    method: Method,
    network: nn.Module,
    group: Group,
    *,
    gates: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    """How much each channel of a group counts, (size,) float64; those that count least are to go first.

    * ``excitation``: of channels that units gate, such as those of a stage, which its shortcuts tie: the mean gate,
      averaged over the units, times the L1 norms of all filters that write or read the channel, of each layer as a
      share of its mean. Of channels inside a block, which no unit gates, batch norm's γ; without one, the norms.
    * ``l1``: the L1 norms of the filters that write the channel, of each layer as a share of its mean.
    * ``random``: by lot.

    Args:
        method: one of these.
        network: what the group is of.
        group: the channels.
        gates: for ``excitation``: by a layer's path, the mean gates (C,) that its output is multiplied by.
        seed: of the lot.

    Raises:
        UsageError: an unknown method.
    """
    if method == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {group.name}".encode()))
        return torch.rand(group.size, generator=generator, dtype=torch.float64)
    if method == "l1":
        return _filters(network, group, ("output",))
    if method != "excitation":
        raise UsageError(f"A method is one of {', '.join(METHODS)}, not {method!r}.")
    gated = [part for part in group.parts if part.role != "input" and part.layer in (gates or {})]
    if gates and gated:
        mean = _summed(group, ((part, gates[part.layer].double()) for part in gated)) / len(gated)
        return mean.abs() * _filters(network, group, ("output", "input"))
    norms = [(part, network.get_submodule(part.layer).weight) for part in group.parts if part.role == "norm"]
    scales = [(part, scale.detach().double().abs().cpu()) for part, scale in norms if isinstance(scale, Tensor)]
    return _summed(group, scales) if scales else _filters(network, group, ("output", "input"))


def _filters(network: nn.Module, group: Group, roles: Sequence[Role]) -> Tensor:
    """The L1 norms of what writes and what reads each channel, of each layer as a share of its mean."""
    sizes = []
    for part in group.parts:
        if part.role not in roles or part.of_gate:
            continue
        layer: Any = network.get_submodule(part.layer)
        weight = layer.weight.detach().double().abs().cpu()
        along = 0 if part.role == "output" else 1
        size = weight.sum([axis for axis in range(weight.dim()) if axis != along])
        sizes.append((part, size / size.mean().clamp(min=1e-30)))
    return _summed(group, sizes)


def _summed(group: Group, sizes: Iterable[tuple[Part, Tensor]]) -> Tensor:
    """For each channel of a group, the sum of a number that layers have for each of theirs."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for part, size in sizes:
        total.index_add_(0, part.channels, size[part.places])
    return total


def mean_gates(
    gates: Sequence[Gate], statistics: Mapping[str, GateStatistics], fed: Mapping[str, Fed], network: nn.Module
) -> dict[str, Tensor]:
    """By a layer's path, the mean gates (C,) that its output is multiplied by.

    Of selective kernels the layers are the batch norms of the branches, and their gates the attention.
    """
    found: dict[str, Tensor] = {}
    for gate in gates:
        mean = statistics[gate.name].mean
        if gate.kind == "se":
            layer = fed[gate.name].layer
            if layer is not None:
                found[layer] = found.get(layer, torch.ones_like(mean)) * mean
            continue
        for path, module in network.get_submodule(gate.name).named_modules(prefix=gate.name):
            branch = path.removeprefix(f"{gate.name}.branches.").partition(".")[0]
            if isinstance(module, NORMS) and branch.isdecimal() and int(branch) < len(mean):
                found[path] = mean[int(branch)]
    return found

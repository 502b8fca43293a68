"""Channels taken out of a network for real: its layers become narrower.

Which layers have to lose the same channel, because of a shortcut, a gate or a batch norm, is found out by
Torch-Pruning from one run of the network (Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any Structural Pruning", arXiv
2301.12900).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.analysis.gates import Gate
from excite.analysis.importance import CONVOLUTIONS, NORMS, Group, Part, Role
from excite.deploy.routes import ChannelRoute, replace_zero_padding
from excite.errors import ExciteError, UsageError
from excite.surgery.hooks import Hook
from excite.units.added_kernels import AddedKernels
from excite.units.cbam import SpatialAttention
from excite.units.parts import MeanAndMax
from excite.units.selective_kernel import SelectiveKernel


class TooNarrowError(UsageError):
    """So few multiply–adds cannot be had."""


class Channels:
    """The channels of a network that can be taken out.

    What it finds: every output of a convolution or linear layer and all that hangs on it. What it leaves alone: the
    network's own outputs, the hidden layers of gates, and whatever passes through a grouped convolution that is not
    depthwise.

    Args:
        network: changed in place, in evaluation mode after that.
        example: what it takes, (N, …).
        gates: its units.

    Attributes:
        groups: the channels that come and go together.
        macs: multiply–adds of each convolution and linear layer for one image, by its path.
        routes: the shortcuts that were made ready to lose channels, see :mod:`excite.deploy.routes`.

    Raises:
        UsageError: Torch-Pruning is not installed.
        ExciteError: it cannot follow the network.
    """

    def __init__(self, network: nn.Module, example: Tensor, gates: Sequence[Gate]) -> None:
        pruning = _torch_pruning()
        self.network = network.eval()
        self.example = example
        self.routes = replace_zero_padding(network)
        self.macs = _layer_macs(network, example)
        self._names = {module: path for path, module in network.named_modules()}
        self._graph = pruning.DependencyGraph()
        self._graph.IGNORED_LAYERS_IN_TRACING = _Nothing()
        learning = {parameter: parameter.requires_grad for parameter in network.parameters()}
        try:
            network.requires_grad_(True)  # the graph is read off the one that gradients go along
            with _made_plain(network), torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._graph.build_dependency(
                    network,
                    example,
                    forward_fn=_run_with_units_last,
                    customized_pruners=_pruners(pruning),
                    verbose=False,
                )
                self._roots: dict[str, tuple[nn.Module, Any]] = {}
                self.groups = list(self._groups(gates))
        except Exception as error:  # whatever Torch-Pruning may raise on a network that it cannot read
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ExciteError(
                f"Torch-Pruning cannot follow how the channels of {type(network).__name__} hang together: {reason}."
            ) from error
        finally:
            for parameter, was in learning.items():
                parameter.requires_grad_(was)

    def keep(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Take out all channels of some groups but these.

        Args:
            kept: by the group's name, the channels that stay; of groups that are not named all do.

        Raises:
            ExciteError: the network no longer runs.
        """
        with _stacked(self.network):
            for group in self.groups:
                if group.name not in kept:
                    continue
                gone = sorted(set(range(group.size)) - set(kept[group.name]))
                if gone:
                    module, function = self._roots[group.name]
                    self._graph.get_pruning_group(module, function, gone).prune(record_history=False)
        try:
            with torch.inference_mode():
                self.network(self.example)
        except Exception as error:  # likewise of a foreign forward
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ExciteError(f"{type(self.network).__name__} does not run with fewer channels: {reason}.") from error

    def _groups(self, gates: Sequence[Gate]) -> Iterator[Group]:
        with _stacked(self.network):
            for found in self._graph.get_all_groups(root_module_types=(*CONVOLUTIONS, nn.Linear)):
                group = self._read(found, gates)
                if group is not None:
                    self._roots[group.name] = found[0].dep.target.module, found[0].dep.handler
                    yield group

    def _read(self, found: Any, gates: Sequence[Gate]) -> Group | None:
        """Torch-Pruning's group as one of ours; None for one that is to stay as it is."""
        parts = []
        size = len(found[0].idxs)
        for item in found:
            module, handler = item.dep.target.module, item.dep.handler
            if type(module).__name__ == "_OutputOp":
                return None
            if module not in self._names:
                continue
            path = self._names[module]
            outputs = self._graph.is_out_channel_pruning_fn(handler)
            if isinstance(module, CONVOLUTIONS):
                if 1 < module.groups < module.out_channels or 1 < module.groups != module.in_channels:
                    return None
                role: Role = "output" if outputs else "input"
            elif isinstance(module, nn.Linear):
                role = "output" if outputs else "input"
            elif isinstance(module, NORMS):
                role = "norm"
            else:
                continue
            of_gate = any(
                path.startswith(f"{gate.name}.") and (gate.kind == "se" or isinstance(module, nn.Linear))
                for gate in gates
            )
            places, channels = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            parts.append(Part(path, role, places, channels, of_gate))
        name = self._names[found[0].dep.target.module]
        hidden = all(part.of_gate for part in parts if part.role == "output")  # as between the layers of a gate
        return None if hidden else Group(name, size, tuple(parts))


# --- how many stay -------------------------------------------------------------------------------------------------


def widths(
    groups: Sequence[Group], macs: Mapping[str, int], most: float, *, multiple: int = 1, least: int = 4
) -> dict[str, int]:
    """How many channels of each group stay so that a network takes no more multiply–adds than a given number.

    All groups are narrowed alike: in every step the one that has the largest share of its channels left loses
    ``multiple``, so that it hangs on nothing but the network which widths there are, and methods that choose
    channels differently are compared at the same cost.

    Args:
        groups: the channels that come and go together.
        macs: multiply–adds by layer.
        most: how many there may be in all.
        multiple: widths are multiples of it, where they are less than all.
        least: no group becomes narrower.

    Raises:
        TooNarrowError: the network cannot be made so narrow.
    """
    left = {group.name: group.size for group in groups}
    shares: dict[str, dict[str, float]] = {}  # by layer, what is left of its inputs and outputs
    touched: dict[str, list[tuple[str, str]]] = {group.name: [] for group in groups}
    for group in groups:
        for part in group.parts:
            if part.layer in macs and part.role != "norm":
                shares.setdefault(part.layer, {}).setdefault(part.role, 1.0)
                touched[group.name].append((part.layer, part.role))

    def spent() -> float:
        return sum(count * _product(shares.get(layer, {})) for layer, count in macs.items())

    while spent() > most:
        able = [group for group in groups if _narrower(left[group.name], multiple) >= min(least, group.size)]
        if not able:
            raise TooNarrowError(
                f"The network cannot be brought down to {most / 1e6:.3g} million multiply–adds: with all layers at "
                f"their narrowest it takes {spent() / 1e6:.3g} million. Give a larger target."
            )
        group = max(able, key=lambda group: left[group.name] / group.size)
        left[group.name] = _narrower(left[group.name], multiple)
        for layer, role in touched[group.name]:
            shares[layer][role] = left[group.name] / group.size
    return left


def _narrower(width: int, multiple: int) -> int:
    return (width - 1) // multiple * multiple


def _product(shares: Mapping[str, float]) -> float:
    product = 1.0
    for share in shares.values():
        product *= share
    return product


def _layer_macs(network: nn.Module, example: Tensor) -> dict[str, int]:
    """Multiply–adds of each convolution and linear layer for one image."""
    found: dict[str, int] = {}

    def count(path: str) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, answer: Tensor) -> None:
            positions = answer[0].numel() // module.weight.shape[0]
            found[path] = found.get(path, 0) + positions * module.weight.numel()

        return hook

    with ExitStack() as stack, torch.inference_mode():
        for path, module in network.named_modules():
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
                stack.callback(module.register_forward_hook(count(path)).remove)
        network(example)
    return found


# --- what Torch-Pruning is shown -----------------------------------------------------------------------------------


def _torch_pruning() -> Any:
    try:
        import torch_pruning  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise UsageError("Channels are taken out by Torch-Pruning: pip install 'excite[prune]' brings it.") from error
    return torch_pruning


class _Stacked(nn.Linear):
    """The last layer of selective kernels: M outputs for each channel, the branches one below the other."""

    branches: int

    @property
    def channels(self) -> int:
        return self.out_features // self.branches


class _Opaque(torch.autograd.Function):
    """Answers what it is told, and shows to the graph of gradients nothing of how that was computed."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, answer: Tensor) -> Tensor:
        return answer.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def _pruners(pruning: Any) -> dict[type, Any]:
    """What Torch-Pruning is to do with the modules of ours that it cannot know."""
    base: Any = pruning.BasePruningFunc

    class Routes(base):  # type: ignore[misc]
        """Its inputs and its outputs can go without each other."""

        def prune_out_channels(self, layer: ChannelRoute, gone: Sequence[int]) -> nn.Module:
            return layer.without_outputs(gone)

        def prune_in_channels(self, layer: ChannelRoute, gone: Sequence[int]) -> nn.Module:
            return layer.without_inputs(gone)

        def get_out_channels(self, layer: ChannelRoute) -> int:
            return layer.out_channels

        def get_in_channels(self, layer: ChannelRoute) -> int:
            return layer.in_channels

    class Stacks(base):  # type: ignore[misc]
        """A channel has an output for every branch."""

        def prune_out_channels(self, layer: _Stacked, gone: Sequence[int]) -> nn.Module:
            kept = sorted(set(range(layer.channels)) - set(gone))
            rows = torch.cat([torch.tensor(kept) + branch * layer.channels for branch in range(layer.branches)])
            layer.weight = nn.Parameter(layer.weight.detach()[rows.to(layer.weight.device)])
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach()[rows.to(layer.bias.device)])
            layer.out_features = len(rows)
            return layer

        def prune_in_channels(self, layer: _Stacked, gone: Sequence[int]) -> nn.Module:
            kept = sorted(set(range(layer.in_features)) - set(gone))
            layer.weight = nn.Parameter(layer.weight.detach()[:, kept])
            layer.in_features = len(kept)
            return layer

        def get_out_channels(self, layer: _Stacked) -> int:
            return layer.channels

        def get_in_channels(self, layer: _Stacked) -> int:
            return layer.in_features

    return {ChannelRoute: Routes(), _Stacked: Stacks()}


class _Nothing(list[nn.Module]):
    """Stays empty: Torch-Pruning would look at none of the modules in a route, and so at no unit attached to one."""

    def append(self, module: nn.Module) -> None:
        """Keeps nothing."""


def _run_with_units_last(network: nn.Module, example: Tensor) -> Any:
    # A hook that notes what a layer puts out has to come before the one that has an attached unit change it.
    for module in network.modules():
        for number in [number for number, hook in module._forward_hooks.items() if isinstance(hook, Hook)]:
            module._forward_hooks[number] = module._forward_hooks.pop(number)
    return network(example) * 1  # a step after the last layer, so that this is not taken for what nothing hangs on


@contextmanager
def _stacked(network: nn.Module) -> Iterator[None]:
    """While it lasts, the last layers of selective kernels say that they are such."""
    layers = []
    for unit in network.modules():
        if isinstance(unit, (SelectiveKernel, AddedKernels)) and not isinstance(unit.expand, _Stacked):
            unit.expand.__class__ = _Stacked
            unit.expand.__dict__["branches"] = len(unit.branches) + isinstance(unit, AddedKernels)
            layers.append(unit.expand)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            del layer.__dict__["branches"]


@contextmanager
def _made_plain(network: nn.Module) -> Iterator[None]:
    """While it lasts, units compute something simpler in which the same channels hang together."""
    changed = []
    with _stacked(network):
        for module in network.modules():
            plain = next((made for kind, made in _PLAIN.items() if isinstance(module, kind)), None)
            if plain is not None:
                module.__dict__["forward"] = plain(module)
                changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                del module.__dict__["forward"]


def _plain_route(route: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: _Opaque.apply(x, ChannelRoute.forward(route, x))


def _plain_kernels(unit: Any) -> Callable[..., Tensor]:
    def forward(x: Tensor, u: Tensor | None = None) -> Tensor:
        total = sum((branch(x) for branch in unit.branches), start=torch.zeros(()) if u is None else u)
        hidden = unit.norm(unit.reduce(total.flatten(2).mean(2)))
        attention = unit.expand(hidden)
        return total * attention[(...,) + (None,) * (total.dim() - 2)]

    return forward


def _plain_stack(layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda hidden: F.linear(hidden, layer.weight.detach()[: layer.channels])


def _plain_squeeze(_: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda u: u.flatten(2).mean(2)


def _plain_spatial(_: nn.Module) -> Callable[..., Tensor]:
    return lambda u, shortcut=None: u * 1 if shortcut is None else u + shortcut


_PLAIN: dict[Any, Callable[[Any], Callable[..., Tensor]]] = {
    ChannelRoute: _plain_route,
    SelectiveKernel: _plain_kernels,
    AddedKernels: _plain_kernels,
    _Stacked: _plain_stack,
    MeanAndMax: _plain_squeeze,
    SpatialAttention: _plain_spatial,
}

"""Shortcuts without parameters between maps of different widths, when channels are taken out on either side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.networks.resnet import ZeroPadShortcut


class ChannelRoute(nn.Module):
    """Every output channel is one of the inputs, or zero; positions are left out by a stride.

    Args:
        sources: for each output channel the input that it is, counted from 1, or 0 for zeros: (C′,), int64.
        in_channels: C.
        stride: s.

    The buffer ``sources`` is stored with the network.
    """

    sources: Tensor

    def __init__(self, sources: Tensor, in_channels: int, stride: int) -> None:
        super().__init__()
        self.register_buffer("sources", sources.clone())
        self.in_channels, self.stride = in_channels, stride

    @property
    def out_channels(self) -> int:
        """C′."""
        return len(self.sources)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C′, ⌈H/s⌉, ⌈W/s⌉)."""
        with_zeros = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 1, 0))
        return with_zeros.index_select(1, self.sources)

    def without_outputs(self, gone: Sequence[int]) -> ChannelRoute:
        """Itself, without some of its outputs."""
        kept = sorted(set(range(self.out_channels)) - set(gone))
        self.sources = self.sources[kept]
        return self

    def without_inputs(self, gone: Sequence[int]) -> ChannelRoute:
        """Itself, where some of its inputs are no longer given: zeros take their place."""
        kept = sorted(set(range(self.in_channels)) - set(gone))
        places = torch.zeros(self.in_channels + 1, dtype=torch.int64, device=self.sources.device)
        places[torch.tensor(kept, device=places.device) + 1] = torch.arange(1, len(kept) + 1, device=places.device)
        self.sources = places[self.sources]
        self.in_channels = len(kept)
        return self

    def extra_repr(self) -> str:
        """The numbers that ``print(network)`` shows."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def replace_zero_padding(network: nn.Module) -> list[str]:
    """Replace shortcuts that pad with zero channels by routes that do the same, in place.

    Returns:
        Their paths.
    """
    found = []
    for path, module in list(network.named_modules()):
        if isinstance(module, ZeroPadShortcut):
            put_route(network, path)
            found.append(path)
    return found


def put_route(network: nn.Module, path: str) -> None:
    """Replace one such shortcut of a residual block, and keep what is attached to it."""
    holder, _, child = path.rpartition(".")
    block = network.get_submodule(holder)
    shortcut = block._modules[child]
    assert isinstance(shortcut, ZeroPadShortcut)
    # It takes what the block takes, and so does the block's first convolution.
    inputs = next(module for module in block.modules() if isinstance(module, nn.Conv2d)).in_channels
    before, after = (torch.zeros(count, dtype=torch.int64) for count in (shortcut.before, shortcut.after))
    sources = torch.cat((before, torch.arange(1, inputs + 1), after))
    route = ChannelRoute(sources.to(next(network.parameters()).device), inputs, shortcut.stride)
    for name, held in vars(shortcut).items():
        if name == "_modules" or "_hooks" in name:
            route.__dict__[name] = held
    block._modules[child] = route.train(shortcut.training)

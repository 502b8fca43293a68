"""Networks to rewrite, and how far what comes out is from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """With batch norms of which no statistic and no factor is 0, 1 or equal to another.

    The factors are below 1: above it, deep networks with gates magnify rounding until float32 and float64 have little
    in common.
    """
    draw = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.uniform_(-0.3, 0.3, generator=draw)
            module.running_var.uniform_(0.5, 2, generator=draw)
            module.weight.data.uniform_(0.3, 0.8, generator=draw)
            module.bias.data.uniform_(-0.3, 0.3, generator=draw)
    return network.eval()


def images(n: int = 2, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, given: Tensor) -> float:
    """Relative to the largest answer."""
    said, wanted = one(given), other(given)
    return float((said - wanted).abs().max() / wanted.abs().max())

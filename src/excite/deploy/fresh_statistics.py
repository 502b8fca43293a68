"""The means and variances that batch norms go by, taken anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def retake_statistics(network: nn.Module, batches: Iterable[Tensor], device: torch.device | str = "cpu") -> nn.Module:
    """Give the batch norms of a network the means and variances of these images, in place.

    A network that lost channels puts out other sums than those that its batch norms remember; what it is still worth
    shows only once they know. Its weights stay.

    Args:
        network: in evaluation mode after that.
        batches: images (N, C, H, W), as the network is to be fed, two or more in each.
        device: where the network is.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches, each counting alike
        norm.train()
    for images in batches:
        network(images.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return network

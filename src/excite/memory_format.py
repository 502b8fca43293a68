"""How the weights of a network lie in memory."""

from __future__ import annotations

import torch
from torch import nn


def to_channels_last(network: nn.Module) -> None:
    """Lay the kernels of 2-d convolutions out channels-last, in place; what has other dimensions stays as it is.

    ``Module.to(memory_format=torch.channels_last)`` would ask it of the kernels of 3-d convolutions, too, and fail.
    """
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

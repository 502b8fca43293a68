"""Asking somebody's network without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def evaluation_mode(network: nn.Module, device: torch.device | str | None = None) -> Iterator[None]:
    """Within it the network is in evaluation mode, on a device; then it is where and as it was.

    Every module gets its own mode back: one with frozen batch norms is neither all training nor all evaluation.

    Args:
        network: to be asked.
        device: where to compute; None leaves it where it is.
    """
    modes = [(module, module.training) for module in network.modules()]
    home = next((tensor.device for tensor in chain(network.parameters(), network.buffers())), None)
    network.eval()
    try:
        if device is not None:
            network.to(device)
        yield
    finally:
        for module, training in modes:
            module.training = training
        if device is not None and home is not None:
            network.to(home)

"""The parts that units share and that the papers vary: squeezes, gates, activations.

Every part may be given to a unit by its name or as an `nn.Module` of one's own.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mean_over_positions(u: Tensor) -> Tensor:
    """Mean of every channel of a feature map over all its positions, (N, C, *) -> (N, C).

    Written as a sum over the map and a division of the small result: the gradient of `Tensor.mean` fills a whole map,
    in NCHW order even for a channels-last map, while the gradient of a sum is a view.
    """
    positions = tuple(range(2, u.dim()))
    if u.dtype == torch.float16:  # a sum over a large map passes the 65504 where float16 ends
        return u.mean(positions)
    return u.sum(positions) / math.prod(u.shape[2:])


torch.fx.wrap("mean_over_positions")  # it looks at the shape: one node to a tracer


class Mean(nn.Module):
    """Squeezes each channel to its mean over all positions, (N, C, *) -> (N, C)."""

    def forward(self, u: Tensor) -> Tensor:
        """Returns z, one number per image and channel."""
        return mean_over_positions(u)


class Max(nn.Module):
    """Squeezes each channel to its maximum over all positions, (N, C, *) -> (N, C)."""

    def forward(self, u: Tensor) -> Tensor:
        """Returns z, one number per image and channel."""
        # `amax` is right as well, but on a channels-last map in CPU memory it is ten times slower.
        return F.adaptive_max_pool1d(u.flatten(2), 1).squeeze(2)


class MeanAndMax(nn.Module):
    """Squeezes each channel to two descriptors, its mean and its maximum, (N, C, *) -> (2, N, C).

    Source: CBAM (arXiv 1807.06521), Sect. 3.1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mean = Mean()
        self.max = Max()

    def forward(self, u: Tensor) -> Tensor:
        """Returns the mean descriptor and, after it, the max descriptor."""
        return torch.stack((self.mean(u), self.max(u)))


def _relu() -> nn.Module:
    # In place is safe: neither the linear layer nor the batch norm before it keeps its output for the backward pass.
    return nn.ReLU(inplace=True)


Parts = Mapping[str, Callable[[], nn.Module]]

SQUEEZES: Parts = {"mean": Mean, "max": Max, "both": MeanAndMax}
GATES: Parts = {"sigmoid": nn.Sigmoid, "hard_sigmoid": nn.Hardsigmoid, "tanh": nn.Tanh}
ACTIVATIONS: Parts = {
    "relu": _relu,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hard_swish": nn.Hardswish,
    "identity": nn.Identity,
}


def make_part(choice: str | nn.Module, known: Parts, what: str) -> nn.Module:
    """Returns the part that `choice` names in `known`, or `choice` itself if it is a module already."""
    if isinstance(choice, nn.Module):
        return choice
    if isinstance(choice, str) and choice in known:
        return known[choice]()
    raise ValueError(f"unknown {what} {choice!r}: give one of {', '.join(known)}, or an nn.Module instance")


def check_positive(**values: int) -> None:
    """Raises ValueError for the first value that is not a whole number of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

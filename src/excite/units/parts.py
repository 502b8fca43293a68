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
        if torch.compiler.is_exporting():  # not every exporter to ONNX knows the pooling
            return u.flatten(2).amax(2)
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


class Scaled(nn.Module):
    """A gate and a factor on it: factor · gate(logits).

    With the factor 1 it is the gate. With 1 / gate(0), which is 2 for a sigmoid, logits of 0 leave a map as it is
    and their gradients are not 0: so a unit can go into a network that works already and learn from there.

    Args:
        gate: "sigmoid", "hard_sigmoid" or "tanh", or a module that answers to each logit alone.

    The submodule is `function` (the gate). The buffer `factor`, a tensor without dimensions, is stored with the
    network.

    Raises:
        ValueError: an unknown name.
    """

    factor: Tensor

    def __init__(self, gate: str | nn.Module = "sigmoid") -> None:
        super().__init__()
        self.function = make_part(gate, GATES, "gate")
        self.register_buffer("factor", torch.tensor(1.0, dtype=torch.float32))

    def forward(self, logits: Tensor) -> Tensor:
        """Returns factor · gate(logits), of the shape of `logits`."""
        return self.function(logits) * self.factor

    @torch.no_grad()
    def start_at_one(self) -> None:
        """Sets the factor so that logits of 0 give 1.

        Raises:
            ValueError: the gate gives 0 there, as tanh does, or nothing finite.
        """
        if self.factor.is_meta:  # a network without contents has no number to set
            return
        at_zero = self.function(torch.zeros_like(self.factor).view(1, 1)).item()
        if at_zero == 0 or not math.isfinite(at_zero):
            raise ValueError(
                f"no factor makes this gate start at 1, for at 0 it is {at_zero}: choose one that is neither 0 nor "
                "infinite there, such as sigmoid or hard_sigmoid"
            )
        self.factor.fill_(1 / at_zero)


def start_at_one(gate: nn.Module) -> None:
    """Sets the factor of a unit's gate, for `start_as_identity`; raises ValueError if the gate has none."""
    if not isinstance(gate, Scaled):
        raise ValueError(
            f"only a unit with a Scaled gate can start as the identity, and this gate is {type(gate).__name__}: "
            'build the unit with gate=Scaled("sigmoid")'
        )
    gate.start_at_one()


# The two below look at shapes. A unit that uses them wraps them for `torch.fx`: each is one node to a tracer.


def check_map(u: Tensor, channels: int) -> None:
    """Raises ValueError unless `u` is a feature map (N, channels, *)."""
    if u.dim() < 3 or u.shape[1] != channels:
        raise ValueError(
            f"this unit takes feature maps of shape (N, {channels}, …), at least one dimension after the channels, "
            f"but got {tuple(u.shape)}: build it with the map's number of channels"
        )


def scale_channels(u: Tensor, s: Tensor, shortcut: Tensor | None) -> Tensor:
    """Returns s · u (+ shortcut) for a map u (N, C, *) and one number per channel, s (N, C)."""
    # Under autocast the layers before the gate may have answered in another precision than the map's.
    s = s.to(u.dtype).view(s.shape + (1,) * (u.dim() - 2))
    return u * s if shortcut is None else torch.addcmul(shortcut, u, s)


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


def check_odd(kernel: int) -> None:
    """Raises ValueError for an even kernel."""
    if kernel % 2 == 0:
        raise ValueError(f"the kernel must be odd, so that its window has a centre, got {kernel}")

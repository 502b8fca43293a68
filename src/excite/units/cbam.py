"""Convolutional block attention.

Paper: Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", arXiv 1807.06521.
"""

import copy

import torch
from torch import Tensor, nn

from .parts import GATES, check_odd, check_positive, make_part, start_at_one
from .squeeze_excite import SqueezeExcite


class ConvolutionalBlockAttention(nn.Module):
    """Scales first each channel, then each position of a feature map by what the map holds (Sect. 3).

    ::

        u′ = M_c(u) · u,     M_c = σ(MLP(mean over positions) + MLP(max over positions))      Eq. 1, 2
        u″ = M_s(u′) · u′,   M_s = σ(f([mean over channels; max over channels]))              Eq. 1, 3

    It takes feature maps (N, C, H, W). The MLP is that of :class:`SqueezeExcite`, with biases; f is a convolution
    without bias. Both keep PyTorch's default initialisation.

    Args:
        channels: C, the channels of the feature map.
        reduction: r; the MLP's hidden layer is `max(min_width, channels // reduction)` wide.
        kernel: side of f, odd; the paper's choice is 7.
        min_width: the least width of the hidden layer.
        gate: σ: "sigmoid" (the paper), "hard_sigmoid" or "tanh", or a module that takes logits (N, C) as well as
            (N, 1, H, W), of which each of the two gets its own copy.

    The submodules are `channel` (a :class:`SqueezeExcite`) and `spatial` (a :class:`SpatialAttention`). Forward
    hooks on `channel.gate` and `spatial.gate` read M_c and M_s; the unit itself stores nothing.

    Raises:
        ValueError: an unknown name, a number below 1, or an even kernel; in `forward`, a map that is not
            (N, channels, H, W).
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel: int = 7,
        *,
        min_width: int = 1,
        gate: str | nn.Module = "sigmoid",
    ) -> None:
        super().__init__()
        self.channel = SqueezeExcite(
            channels, reduction, min_width=min_width, squeeze="both", gate=copy.deepcopy(gate)
        )
        self.spatial = SpatialAttention(kernel, gate=copy.deepcopy(gate))

    def forward(self, u: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Returns u″, or u″ + shortcut in the same pass over the map.

        Args:
            u: the feature map, (N, C, H, W).
            shortcut: what a residual block adds, of the shape of `u`.
        """
        _check_image(u)
        return self.spatial(self.channel(u), shortcut)

    def start_as_identity(self) -> None:
        """Makes the unit one that leaves its map as it is and can learn: last layers all zero, M_c = M_s = 1.

        Raises:
            ValueError: the gate is not :class:`~excite.units.parts.Scaled`, or 0 at 0.
        """
        self.channel.start_as_identity()
        self.spatial.start_as_identity()


class SpatialAttention(nn.Module):
    """The second half of CBAM: M_s(u) · u, M_s = σ(f([mean over channels; max over channels])) (Eq. 3).

    It takes feature maps (N, C, H, W) of any number of channels.

    Args:
        kernel: side of f, odd.
        gate: σ: "sigmoid" (the paper), "hard_sigmoid" or "tanh", or a module, from logits (N, 1, H, W) to M_s.

    The submodules are `convolution` (f, without bias) and `gate` (σ).

    Raises:
        ValueError: an unknown name, or a kernel that is even or below 1; in `forward`, a map that is not
            (N, C, H, W).
    """

    def __init__(self, kernel: int = 7, *, gate: str | nn.Module = "sigmoid") -> None:
        super().__init__()
        check_positive(kernel=kernel)
        check_odd(kernel)
        self.convolution = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.gate = make_part(gate, GATES, "gate")

    def forward(self, u: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Returns M_s(u) · u, or M_s(u) · u + shortcut, for u of shape (N, C, H, W)."""
        _check_image(u)
        attention = self.gate(self.convolution(_mean_and_max_over_channels(u)))
        return _scale_positions(u, attention, shortcut)

    def start_as_identity(self) -> None:
        """Makes the unit one that leaves its map as it is and can learn: `convolution` all zero, M_s = 1.

        Raises:
            ValueError: the gate is not :class:`~excite.units.parts.Scaled`, or 0 at 0.
        """
        start_at_one(self.gate)
        nn.init.zeros_(self.convolution.weight)


def _check_image(u: Tensor) -> None:
    if u.dim() != 4:
        raise ValueError(
            f"this unit takes feature maps of images, (N, C, H, W), but got {tuple(u.shape)}: its spatial half is a "
            "convolution over height and width"
        )


def _mean_and_max_over_channels(u: Tensor) -> Tensor:
    # The gradient of a sum is a view, that of `mean` a map; that of `amax`, which shares it among equals, takes
    # twenty times as long as that of `max`.
    half = u.dtype == torch.float16  # a sum over many channels may pass the 65504 where float16 ends
    mean = u.mean(1, keepdim=True) if half else u.sum(1, keepdim=True) / u.shape[1]
    return torch.cat((mean, u.max(1, keepdim=True).values), 1)


def _scale_positions(u: Tensor, attention: Tensor, shortcut: Tensor | None) -> Tensor:
    # Under autocast the convolution may have answered in another precision than the map's.
    attention = attention.to(u.dtype)
    return u * attention if shortcut is None else torch.addcmul(shortcut, u, attention)


# They look at the map or at whether there is a shortcut: each is one node to a tracer.
torch.fx.wrap("_check_image")
torch.fx.wrap("_mean_and_max_over_channels")
torch.fx.wrap("_scale_positions")

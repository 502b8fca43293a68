"""Efficient channel attention.

Paper: Wang, Wu, Zhu, Li, Zuo, Hu, "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
arXiv 1910.03151.
"""

import math

import torch
from torch import Tensor, nn

from .parts import GATES, Mean, check_map, check_odd, check_positive, make_part, scale_channels, start_at_one


class EfficientChannelAttention(nn.Module):
    """Scales each channel of a feature map by what it and its neighbours among the channels hold (Sect. 3.2).

    ::

        z = mean of u over all positions                          squeeze
        s = σ(w ∗ z), w of k numbers, shared by all channels      Eq. 7, 8
        x̃ = s · u                                                 scale

    It takes feature maps of any number of dimensions: (N, C, L), (N, C, H, W), (N, C, D, H, W) and so on. Beyond the
    first and last channel z counts as 0. The convolution has no bias and keeps PyTorch's default initialisation.

    Args:
        channels: C, the channels of the feature map.
        kernel: k, odd; None takes it from C by Eq. 12: the odd number nearest to |log₂(C)/γ + b/γ|.
        gamma: γ of Eq. 12.
        beta: b of Eq. 12.
        gate: σ: "sigmoid" (the paper), "hard_sigmoid" or "tanh", or a module from logits (N, C) to s (N, C).

    The submodules are `squeeze`, `convolution` (w) and `gate` (σ). A forward hook on `gate` reads s; the unit itself
    stores nothing.

    Raises:
        ValueError: an unknown name, a number below 1, or an even kernel; in `forward`, a map that does not have
            `channels` channels.
    """

    def __init__(
        self,
        channels: int,
        kernel: int | None = None,
        *,
        gamma: int = 2,
        beta: int = 1,
        gate: str | nn.Module = "sigmoid",
    ) -> None:
        super().__init__()
        check_positive(channels=channels, gamma=gamma, beta=beta)
        if kernel is None:
            kernel = _nearest_odd((math.log2(channels) + beta) / gamma)
        check_positive(kernel=kernel)
        check_odd(kernel)
        self.channels = channels
        self.squeeze = Mean()
        self.convolution = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)
        self.gate = make_part(gate, GATES, "gate")

    def forward(self, u: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Returns s · u, or s · u + shortcut in the same pass over the map.

        Args:
            u: the feature map, (N, C, *), with at least one dimension after the channels.
            shortcut: what a residual block adds, of the shape of `u`.
        """
        check_map(u, self.channels)
        s = self.excitation(self.squeeze(u))
        return scale_channels(u, s, shortcut)

    def excitation(self, z: Tensor) -> Tensor:
        """Returns s (N, C) for the descriptors (N, C) that `squeeze` gives."""
        s: Tensor = self.gate(self.convolution(z.unsqueeze(1)).squeeze(1))
        return s

    def start_as_identity(self) -> None:
        """Makes the unit one that leaves its map as it is and can learn: `convolution` all zero, s = 1.

        Raises:
            ValueError: the gate is not :class:`~excite.units.parts.Scaled`, or 0 at 0.
        """
        start_at_one(self.gate)
        nn.init.zeros_(self.convolution.weight)


def _nearest_odd(t: float) -> int:
    # Between 2n and 2n + 2 that is 2n + 1. An even number is as near to the odd one below it: the authors' code takes
    # the one above.
    return 2 * math.floor(t / 2) + 1


torch.fx.wrap("check_map")
torch.fx.wrap("scale_channels")

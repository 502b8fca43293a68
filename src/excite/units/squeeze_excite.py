"""Squeeze-and-excitation.

Paper: Hu, Shen, Albanie, Sun, Wu, "Squeeze-and-Excitation Networks", arXiv 1709.01507.
"""

import torch
from torch import Tensor, nn

from .parts import ACTIVATIONS, GATES, SQUEEZES, check_map, check_positive, make_part, scale_channels, start_at_one


class SqueezeExcite(nn.Module):
    """Scales each channel of a feature map by what the whole map holds (Sect. 3).

    ::

        z = mean of u over all positions        squeeze       Eq. 2
        s = σ(W₂ δ(W₁ z))                       excitation    Eq. 3
        x̃ = s · u                               scale         Eq. 4

    It takes feature maps of any number of dimensions: (N, C, L), (N, C, H, W), (N, C, D, H, W) and so on. W₁ and W₂
    are linear layers with biases; they keep PyTorch's default initialisation, with which s starts near 1/2 under a
    sigmoid. A unit with the gate `Scaled("sigmoid")` can start as the identity instead: see `start_as_identity`.

    Args:
        channels: C, the channels of the feature map.
        reduction: r; the bottleneck is `max(min_width, channels // reduction)` wide.
        min_width: the least width of the bottleneck.
        squeeze: "mean" (the paper), "max" or "both", or a module from (N, C, *) to (N, C). "both" is the form of CBAM
            (arXiv 1807.06521, Sect. 3.1): the same two layers see the mean and the maximum, and their logits are
            added. A module may do likewise by returning its K descriptors as (K, N, C).
        gate: "sigmoid" (the paper), "hard_sigmoid" or "tanh" (negative gates too, as in the paper's ablation), or a
            module from logits (N, C) to s (N, C).
        activation: δ: "relu" (the paper), "silu", "gelu", "hard_swish" or "identity", or a module.

    The submodules are `squeeze`, `reduce` (W₁), `activation` (δ), `expand` (W₂) and `gate` (σ). A forward hook on
    `gate` reads s; the unit itself stores nothing.

    Raises:
        ValueError: an unknown name, or a number below 1; in `forward`, a map that does not have `channels` channels.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        min_width: int = 1,
        squeeze: str | nn.Module = "mean",
        gate: str | nn.Module = "sigmoid",
        activation: str | nn.Module = "relu",
    ) -> None:
        super().__init__()
        check_positive(channels=channels, reduction=reduction, min_width=min_width)
        width = max(min_width, channels // reduction)
        self.squeeze = make_part(squeeze, SQUEEZES, "squeeze")
        self.reduce = nn.Linear(channels, width)
        self.activation = make_part(activation, ACTIVATIONS, "activation")
        self.expand = nn.Linear(width, channels)
        self.gate = make_part(gate, GATES, "gate")

    def forward(self, u: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Returns s · u, or s · u + shortcut in the same pass over the map.

        Args:
            u: the feature map, (N, C, *), with at least one dimension after the channels.
            shortcut: what a residual block adds, of the shape of `u`.
        """
        check_map(u, self.reduce.in_features)
        s = self.excitation(self.squeeze(u))
        return scale_channels(u, s, shortcut)

    def excitation(self, z: Tensor) -> Tensor:
        """Returns s (N, C) for the descriptors that `squeeze` gives."""
        logits: Tensor = self.expand(self.activation(self.reduce(z)))
        s: Tensor = self.gate(_add_descriptors(logits))
        return s

    def start_as_identity(self) -> None:
        """Makes the unit one that leaves its map as it is and can learn: `expand` all zero, s = 1.

        Raises:
            ValueError: the gate is not :class:`~excite.units.parts.Scaled`, or 0 at 0.
        """
        start_at_one(self.gate)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)


def _add_descriptors(logits: Tensor) -> Tensor:
    return logits.sum(0) if logits.dim() == 3 else logits


# They look at shapes. Each is one node to a tracer, so that a network with this unit traces.
torch.fx.wrap("check_map")
torch.fx.wrap("_add_descriptors")
torch.fx.wrap("scale_channels")

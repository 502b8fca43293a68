"""Selective kernel convolution.

Paper: Li, Wang, Hu, Yang, "Selective Kernel Networks", arXiv 1903.06586.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .parts import ACTIVATIONS, check_positive, make_part, mean_over_positions

torch.fx.wrap("mean_over_positions")  # it looks at the shape: one node to a tracer


class SelectiveKernel(nn.Module):
    """A convolution that chooses, per image and channel, between kernels of several sizes (Sect. 3.1).

    ::

        U₁ … U_M = the input through M branches, each convolution–BN–activation    split
        s        = mean of U₁ + … + U_M over all positions                         fuse      Eq. 1–2
        z        = ReLU(BN(W s)), of width d = max(C/r, L)                         fuse      Eq. 3–4
        a₁ … a_M = softmax over the branches of A₁ z … A_M z, per channel          select    Eq. 5
        V        = a₁ · U₁ + … + a_M · U_M                                         select    Eq. 6

    It stands where a 3×3 convolution with its batch norm and ReLU stood: (N, in_channels, H, W) →
    (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉). W and the A are linear layers without bias, as in the authors' release.
    The convolutions are initialised after He et al. (fan-out, ReLU), the linear layers as is PyTorch's default.

    Args:
        in_channels: channels of the input.
        out_channels: C, channels of every branch and of the output.
        stride: stride of every branch.
        branches: M pairs (kernel, dilation), M ≥ 2, with odd kernels. The paper's 5×5 is 3×3 with dilation 2.
        groups: cardinality of every branch; divides `in_channels` and `out_channels`.
        reduction: r.
        min_width: L, the least width of z.
        activation: what ends each branch: "relu" (the paper), "silu", "gelu", "hard_swish", "identity", or a module,
            of which each branch gets its own copy. Where the output goes straight into an addition with a shortcut,
            "identity" lets it be negative. The ReLU of z does not change with it.

    The submodules are `branches` (each a Sequential of convolution, batch norm, activation), `reduce` (W), `norm` and
    `activation` (of z), `expand` (A₁ … A_M, one below the other: its first C rows are those of branch 0) and `gate`
    (the softmax, from logits (N, M, C) to attention (N, M, C)). A forward hook on `gate` reads the attention; the
    unit itself stores nothing. With two branches only the first one's is used, the second's being 1 minus it.

    A batch of one cannot be trained on: `norm` sees one value per channel then, and PyTorch raises ValueError.

    Raises:
        ValueError: an unknown name, a number below 1, fewer than two branches, an even kernel, or groups that do not
            divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        branches: Sequence[tuple[int, int]] = ((3, 1), (3, 2)),
        groups: int = 32,
        reduction: int = 16,
        min_width: int = 32,
        *,
        activation: str | nn.Module = "relu",
    ) -> None:
        super().__init__()
        check_positive(
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
            groups=groups,
            reduction=reduction,
            min_width=min_width,
        )
        _check_branches(branches)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide the channels, but {groups} does not divide both in_channels {in_channels} and "
                f"out_channels {out_channels}: choose groups that do, 1 always does"
            )
        width = max(min_width, out_channels // reduction)
        convolutions = [
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel,
                stride=stride,
                padding=dilation * (kernel // 2),
                dilation=dilation,
                groups=groups,
                bias=False,
            )
            for kernel, dilation in branches
        ]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.branches = nn.ModuleList(
            nn.Sequential(
                convolution,
                nn.BatchNorm2d(out_channels),
                make_part(copy.deepcopy(activation), ACTIVATIONS, "activation"),
            )
            for convolution in convolutions
        )
        self.reduce = nn.Linear(out_channels, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.activation = nn.ReLU(inplace=True)
        self.expand = nn.Linear(width, len(branches) * out_channels, bias=False)
        self.gate = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns V, (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉), for x of shape (N, in_channels, H, W)."""
        maps = [branch(x) for branch in self.branches]
        # The mean of the sum of the branches is the sum of their means: the sum is never held in memory.
        s = mean_over_positions(maps[0])
        for u in maps[1:]:
            s = s + mean_over_positions(u)
        z = self.activation(self.norm(self.reduce(s)))
        attention = self.gate(self.expand(z).unflatten(1, (len(maps), -1)))
        # Under autocast the softmax may have answered in another precision than the maps'.
        weights = attention.to(maps[0].dtype)[:, :, :, None, None].unbind(1)
        if len(maps) == 2:
            return torch.lerp(maps[1], maps[0], weights[0])
        v = maps[0] * weights[0]
        for m in range(1, len(maps)):
            v = torch.addcmul(v, maps[m], weights[m])
        return v


def _check_branches(branches: Sequence[tuple[int, int]]) -> None:
    for branch in branches:
        if not isinstance(branch, (tuple, list)) or len(branch) != 2:
            raise ValueError(f"every branch is a pair (kernel, dilation), got {branch!r}")
        kernel, dilation = branch
        check_positive(kernel=kernel, dilation=dilation)
        if kernel % 2 == 0:
            raise ValueError(f"kernels must be odd, so that all branches answer in the same size, got {kernel}")
    if len(branches) < 2:
        raise ValueError(f"a selective kernel chooses between two or more branches, got {len(branches)}")

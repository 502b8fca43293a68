"""Selective kernel convolution.

Paper: Li, Wang, Hu, Yang, "Selective Kernel Networks", arXiv 1903.06586.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import ACTIVATIONS, check_positive, make_part, mean_over_positions
from .split import split
from .training_forms import Branch, applies_to, can_come_apart, selected

torch.fx.wrap("mean_over_positions")  # it looks at the shape: one node to a tracer


Sizes = int | tuple[int, ...]
"""One number for each dimension of a map, or one for all."""


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

    With kernels of three numbers it goes over maps of three dimensions, (N, in_channels, D, H, W). With `valid` it
    stands where a convolution without padding stood, and its map is of the size that such a one gives.

    Args:
        in_channels: channels of the input.
        out_channels: C, channels of every branch and of the output.
        stride: stride of every branch.
        branches: M pairs (kernel, dilation), M ≥ 2, with odd kernels. The paper's 5×5 is 3×3 with dilation 2. Either
            may be a tuple, with a number for each dimension of the map: two or three. Numbers alone are for two.
        groups: cardinality of every branch; divides `in_channels` and `out_channels`.
        reduction: r.
        min_width: L, the least width of z.
        activation: what ends each branch: "relu" (the paper), "silu", "gelu", "hard_swish", "identity", or a module,
            of which each branch gets its own copy. Where the output goes straight into an addition with a shortcut,
            "identity" lets it be negative. The ReLU of z does not change with it.
        valid: the first branch is not padded, and the others just so much that they answer for the same positions.
            What a kernel spans, dilation · (kernel − 1) + 1, must be that of the first branch or more by an even
            number; so kernels may be even, too.

    The submodules are `branches` (each a Sequential of convolution, batch norm, activation), `reduce` (W), `norm` and
    `activation` (of z), `expand` (A₁ … A_M, one below the other: its first C rows are those of branch 0) and `gate`
    (the softmax, from logits (N, M, C) to attention (N, M, C)). A forward hook on `gate` reads the attention; the
    unit itself stores nothing. With two branches only the first one's is used, the second's being 1 minus it.

    A batch of one cannot be trained on: `norm` sees one value per channel then, and PyTorch raises ValueError.

    Raises:
        ValueError: an unknown name, a number below 1, fewer than two branches, kernels for maps of different
            dimensions, an even kernel, with `valid` one that no padding fits to the first branch, or groups that do
            not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        branches: Sequence[tuple[Sizes, Sizes]] = ((3, 1), (3, 2)),
        groups: int = 32,
        reduction: int = 16,
        min_width: int = 32,
        *,
        activation: str | nn.Module = "relu",
        valid: bool = False,
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
        kernels = _per_dimension(branches)
        paddings = _paddings(kernels, valid)
        dimensions = len(paddings[0])
        convolve: Any = {2: nn.Conv2d, 3: _Conv3d}[dimensions]
        normalise: Any = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide the channels, but {groups} does not divide both in_channels {in_channels} and "
                f"out_channels {out_channels}: choose groups that do, 1 always does"
            )
        width = max(min_width, out_channels // reduction)
        convolutions = [
            convolve(
                in_channels,
                out_channels,
                kernel,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                bias=False,
            )
            for (kernel, dilation), padding in zip(kernels, paddings, strict=True)
        ]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.branches = nn.ModuleList(
            nn.Sequential(
                convolution,
                normalise(out_channels),
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
        """Returns V, (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉), for x of shape (N, in_channels, H, W).

        With `valid` and stride 1, V is smaller than x by what the first branch's kernel spans less 1.
        """
        if can_come_apart(x, self.branches):
            steps: list[Any] = list(self.branches)
            convolved = split(x, [convolution for convolution, _, _ in steps])
            if all(applies_to(c, norm) for c, (_, norm, _) in zip(convolved, steps, strict=True)):
                pairs = zip(convolved, steps, strict=True)
                branches = [Branch(c, norm, type(activation) is nn.ReLU) for c, (_, norm, activation) in pairs]
                return selected(branches, self._attention([branch.z for branch in branches]))
            maps = [activation(norm(c)) for c, (_, norm, activation) in zip(convolved, steps, strict=True)]
        else:
            maps = [branch(x) for branch in self.branches]
        # The mean of the sum of the branches is the sum of their means: the sum is never held in memory.
        attention = self._attention([mean_over_positions(u) for u in maps])
        # Under autocast the softmax may have answered in another precision than the maps'.
        weights = _over_positions(attention.to(maps[0].dtype), maps[0].dim()).unbind(1)
        if len(maps) == 2:
            return torch.lerp(maps[1], maps[0], weights[0])
        v = maps[0] * weights[0]
        for m in range(1, len(maps)):
            v = torch.addcmul(v, maps[m], weights[m])
        return v

    def _attention(self, means: list[Tensor]) -> Tensor:
        """Fuse and select: the means of the branches' maps, M times (N, C) → attention (N, M, C)."""
        s = means[0]
        for mean in means[1:]:
            s = s + mean
        z = self.activation(self.norm(self.reduce(s)))
        attention: Tensor = self.gate(self.expand(z).unflatten(1, (len(means), -1)))
        return attention


class _Conv3d(nn.Conv3d):
    """A convolution that goes the quicker way to the same result where it is dilated along the first dimension.

    On a CPU the gradient of such a one's weights takes PyTorch three to five times as long as that of another, so
    every second slice of the map (every d-th, with dilation d) goes through a convolution that is not dilated there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, D, H, W) → (N, out_channels, D′, H′, W′)."""
        return _convolve(x, self.weight, self.stride, self.padding, self.dilation, self.groups)


def _convolve(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: Any, dilation: tuple[int, ...], groups: int
) -> Tensor:
    step = dilation[0]
    if step == 1 or weight.shape[2] == 1 or stride[0] != 1 or x.device.type != "cpu":
        return F.conv3d(x, weight, None, stride, padding, dilation, groups)
    depth = x.shape[2] + 2 * padding[0]
    x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0] + -depth % step))
    slices = x.reshape(*x.shape[:2], -1, step, *x.shape[3:]).movedim(3, 0).flatten(0, 1)
    u = F.conv3d(slices, weight, None, stride, (0, *padding[1:]), (1, *dilation[1:]), groups)
    u = u.reshape(step, -1, *u.shape[1:]).movedim(0, 3).flatten(2, 3)
    return u[:, :, : depth - step * (weight.shape[2] - 1)]


torch.fx.wrap("_convolve")  # it looks at the device and the shape: one node to a tracer


def _over_positions(attention: Tensor, dimensions: int) -> Tensor:
    """(N, M, C) → (N, M, C, 1, …, 1), to be multiplied with maps of so many dimensions."""
    return attention[(...,) + (None,) * (dimensions - 2)]


torch.fx.wrap("_over_positions")  # it counts dimensions: one node to a tracer


Kernels = list[tuple[tuple[int, ...], tuple[int, ...]]]


def _per_dimension(branches: Sequence[tuple[Sizes, Sizes]]) -> Kernels:
    """The branches with a number for each dimension of the map."""
    for branch in branches:
        if not isinstance(branch, (tuple, list)) or len(branch) != 2:
            raise ValueError(f"every branch is a pair (kernel, dilation), got {branch!r}")
    if len(branches) < 2:
        raise ValueError(f"a selective kernel chooses between two or more branches, got {len(branches)}")
    sizes = [size for branch in branches for size in branch if isinstance(size, (tuple, list))]
    dimensions = len(sizes[0]) if sizes else 2
    if dimensions not in (2, 3) or any(len(size) != dimensions for size in sizes):
        raise ValueError(f"kernels and dilations are for maps of two or of three dimensions, got {tuple(branches)!r}")
    kernels = []
    for branch in branches:
        kernel, dilation = (
            tuple(size) if isinstance(size, (tuple, list)) else (size,) * dimensions for size in branch
        )
        for own, spread in zip(kernel, dilation, strict=True):
            check_positive(kernel=own, dilation=spread)
        kernels.append((kernel, dilation))
    return kernels


def _paddings(kernels: Kernels, valid: bool) -> list[tuple[int, ...]]:
    """What each branch is padded with in each dimension."""
    if not valid:
        for kernel, _ in kernels:
            if not all(own % 2 for own in kernel):
                raise ValueError(
                    f"kernels must be odd, so that all branches answer in the same size, got {_text(kernel)}"
                )
        return [tuple(d * (k // 2) for k, d in zip(*branch, strict=True)) for branch in kernels]
    spans = [tuple(d * (k - 1) + 1 for k, d in zip(*branch, strict=True)) for branch in kernels]
    for span in spans:
        more = [own - first for own, first in zip(span, spans[0], strict=True)]
        if min(more) < 0 or any(number % 2 for number in more):
            raise ValueError(
                "a kernel must span as much as the first branch's or more by an even number, so that all answer for "
                f"the same positions, but one spans {_text(span)} and the first {_text(spans[0])}"
            )
    return [tuple((own - first) // 2 for own, first in zip(span, spans[0], strict=True)) for span in spans]


def _text(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "×".join(map(str, sizes))

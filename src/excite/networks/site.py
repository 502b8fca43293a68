"""The places where units go into a network, and the plain parts that stand there without one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """A place in a network where a unit can go, and what a unit has to fit.

    Args:
        stage: 1 for the first stage.
        in_channels, out_channels, stride, groups: of the convolution there; for the end of a residual branch
            both channel counts are the branch's.
        activation: what follows the convolution there: ``relu``, ``relu6``, or, where a block goes on without one,
            ``identity``.
        input_size: side of the images the network was drawn for, 32 for CIFAR.
        residual: whether a shortcut is added at the end of the branch.
        attached: whether the network was there before the unit.
        kernel: of the convolution there, one number for each dimension of the map: three for (bands, height, width).
        size: of the map that goes into the convolution, where the network is built for maps of one size only and
            its convolutions are not padded: the map loses an edge to the kernel. None: they keep its size.
        norm: whether a batch norm follows, or the convolution has a bias.
    """

    stage: int
    in_channels: int
    out_channels: int
    stride: int
    groups: int
    activation: str
    input_size: int
    residual: bool = True
    attached: bool = False
    kernel: tuple[int, ...] = (3, 3)
    size: tuple[int, ...] | None = None
    norm: bool = True


Convolution = Callable[[Site], tuple[nn.Module, nn.Module, nn.Module]]
"""Makes (convolution, batch norm, activation) for a convolution with a kernel; a unit that brings its own batch norm
and activation fills their places with ``nn.Identity``."""

Join = Callable[[Site], nn.Module]
"""Makes the module at the end of a branch: called with (branch, shortcut), or where ``site.residual`` is false with
(branch,) alone."""


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size (at stride 1), without bias: batch norm follows."""
    padding = (kernel // 2, kernel // 2)
    return he_conv(in_channels, out_channels, (kernel, kernel), stride, padding, groups)


class _Undrawn2d(nn.Conv2d):
    """A convolution whose weights are left to its maker: PyTorch would draw them, and at once they are drawn anew."""

    def reset_parameters(self) -> None:
        pass


class _Undrawn3d(nn.Conv3d):
    """The same over three dimensions."""

    def reset_parameters(self) -> None:
        pass


def he_conv(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    groups: int = 1,
    bias: bool = False,
    uniform: bool = False,
) -> nn.Conv2d:
    """A convolution that starts from a distribution of variance 2 / fan-out, and from no bias.

    The distribution is normal, as in its source (He et al. 2015, Sect. 2.2), or uniform, which is quicker to draw.
    """
    convolution: nn.Conv2d = _Undrawn2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=bias)
    convolution.__class__ = nn.Conv2d  # nothing looking at the network is to see another kind of convolution
    _draw(convolution, uniform)
    return convolution


def he_conv_3d(in_channels: int, out_channels: int, kernel: tuple[int, int, int], bias: bool = False) -> nn.Conv3d:
    """The same over three dimensions, (bands, height, width): stride 1, no padding, normal."""
    convolution: nn.Conv3d = _Undrawn3d(in_channels, out_channels, kernel, bias=bias)
    convolution.__class__ = nn.Conv3d
    _draw(convolution)
    return convolution


def _draw(convolution: nn.Conv2d | nn.Conv3d, uniform: bool = False) -> None:
    # PyTorch's kaiming_normal_ counts the outputs of all groups, which starves a depthwise convolution.
    fan_out = convolution.out_channels * math.prod(convolution.kernel_size) // convolution.groups
    std = math.sqrt(2) / math.sqrt(fan_out)
    if uniform:
        nn.init.uniform_(convolution.weight, -math.sqrt(3) * std, math.sqrt(3) * std)
    else:
        nn.init.normal_(convolution.weight, std=std)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "identity": nn.Identity,
}


def plain_convolution(site: Site) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The convolution of the plain network, its batch norm and its activation."""
    activation = ACTIVATIONS[site.activation]()
    if len(site.kernel) == 3:
        solid = he_conv_3d(site.in_channels, site.out_channels, site.kernel, bias=not site.norm)
        return solid, nn.BatchNorm3d(site.out_channels) if site.norm else nn.Identity(), activation
    height, width = site.kernel
    padding = (height // 2, width // 2) if site.size is None else (0, 0)
    convolution = he_conv(
        site.in_channels, site.out_channels, (height, width), site.stride, padding, site.groups, bias=not site.norm
    )
    return convolution, nn.BatchNorm2d(site.out_channels) if site.norm else nn.Identity(), activation


class Add(nn.Module):
    """The plain join: residual branch plus shortcut.

    Args:
        in_place: write the sum over the branch. Not where the branch ends in an activation: ReLU needs its output
            for the backward pass.
    """

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, u: Tensor, shortcut: Tensor) -> Tensor:
        """(N, C, H, W) twice → (N, C, H, W)."""
        return u.add_(shortcut) if self.in_place else u + shortcut


def plain_join(site: Site) -> nn.Module:
    """:class:`Add` where there is a shortcut, else nothing."""
    return Add(in_place=site.activation == "identity") if site.residual else nn.Identity()

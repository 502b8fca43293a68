"""BN-Inception: Inception with batch norm.

* Ioffe, Szegedy, "Batch Normalization", arXiv 1502.03167, 2015 (Fig. 5).
* Hu et al., "Squeeze-and-Excitation Networks", 2018 (SE on a module's output, Fig. 2; Table 2).

A unit at the end of a branch stands behind the concatenation of each module. A unit that replaces a convolution
replaces the 3×3 convolution of a module, and the second one of its double 3×3.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from excite.networks.site import Convolution, Join, Site, conv, plain_convolution, plain_join
from excite.networks.tables import BNInceptionTable, InceptionRow


class ConvBN(nn.Sequential):
    """Convolution, batch norm, activation: ``conv``, ``bn``, ``act``."""

    def __init__(self, conv: nn.Module, bn: nn.Module, act: nn.Module) -> None:
        super().__init__(OrderedDict(conv=conv, bn=bn, act=act))


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> ConvBN:
    """A convolution that no unit replaces."""
    convolution = conv(in_channels, out_channels, kernel, stride)
    return ConvBN(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


POOLS: dict[str, Callable[[], nn.Module]] = {
    "average": lambda: nn.AvgPool2d(3, stride=1, padding=1),
    "max": lambda: nn.MaxPool2d(3, stride=1, padding=1),
}


def halving_pool() -> nn.Module:
    """Caffe's 3×3 maximum pooling of stride 2, which has no frame and whose last window may hang over the edge.

    On a map of odd side Caffe's answer would be smaller than that of the strided convolutions beside it; one more row
    and column, which never hold the maximum, give the same answer on even sides and ⌈H/2⌉ on odd ones.
    """
    return nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), -math.inf), nn.MaxPool2d(3, stride=2, ceil_mode=True))


class InceptionModule(nn.Module):
    """1×1, 3×3, double 3×3 and pooling, side by side, concatenated; ``se`` rescales the whole."""

    def __init__(
        self, in_channels: int, row: InceptionRow, input_size: int, convolution: Convolution, join: Join
    ) -> None:
        super().__init__()
        stride = 1 if row.b1x1 else 2

        def site(in_channels: int, out_channels: int) -> Site:
            return Site(row.stage, in_channels, out_channels, stride, 1, "relu", input_size)

        self.b1x1 = conv_bn(in_channels, row.b1x1, 1) if row.b1x1 else None
        self.b3x3_reduce = conv_bn(in_channels, row.b3x3_reduce, 1)
        self.b3x3 = ConvBN(*convolution(site(row.b3x3_reduce, row.b3x3)))
        self.double3x3_reduce = conv_bn(in_channels, row.double3x3_reduce, 1)
        self.double3x3a = conv_bn(row.double3x3_reduce, row.double3x3, 3)
        self.double3x3b = ConvBN(*convolution(site(row.double3x3, row.double3x3)))
        self.pool = POOLS[row.pool]() if stride == 1 else halving_pool()
        self.pool_proj = conv_bn(in_channels, row.pool_proj, 1) if row.pool_proj else nn.Identity()
        self.out_channels = row.b1x1 + row.b3x3 + row.double3x3 + (row.pool_proj or in_channels)
        end = replace(site(self.out_channels, self.out_channels), stride=1, activation="identity", residual=False)
        self.se = join(end)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, out_channels, H, W), or half of the side."""
        branches = [] if self.b1x1 is None else [self.b1x1(x)]
        branches.append(self.b3x3(self.b3x3_reduce(x)))
        branches.append(self.double3x3b(self.double3x3a(self.double3x3_reduce(x))))
        branches.append(self.pool_proj(self.pool(x)))
        return self.se(torch.cat(branches, 1))


class BNInception(nn.Sequential):
    """Stem, modules ``inception_3a`` to ``inception_5b``, mean over all positions, classifier ``fc``.

    Made by :func:`bn_inception`. Images (N, in_channels, H, W), 32 pixels a side or more → logits (N, num_classes).
    """


def bn_inception(
    table: BNInceptionTable,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    convolution: Convolution = plain_convolution,
    join: Join = plain_join,
) -> BNInception:
    """Build BN-Inception from its table; arguments as for :func:`excite.networks.resnet.resnet`."""
    first, reduced, channels = table.stem
    parts: dict[str, nn.Module] = {
        "conv1": conv_bn(in_channels, first, 7, 2),
        "pool1": nn.MaxPool2d(3, stride=2, ceil_mode=True),
        "conv2_reduce": conv_bn(first, reduced, 1),
        "conv2": conv_bn(reduced, channels, 3),
        "pool2": nn.MaxPool2d(3, stride=2, ceil_mode=True),
    }
    for row in table.rows:
        module = InceptionModule(channels, row, table.input_size, convolution, join)
        parts[f"inception_{row.name}"] = module
        channels = module.out_channels
    parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten(1)
    parts["fc"] = nn.Linear(channels, num_classes)
    return BNInception(OrderedDict(parts))


# --- arguments of a spec ---------------------------------------------------------------------------------------


def adjusted(table: BNInceptionTable, *, width: float = 1.0) -> BNInceptionTable:
    """The table with every channel count times ``width``, rounded as :func:`scaled` does."""

    def row(row: InceptionRow) -> InceptionRow:
        widths = {key: scaled(value, width) for key, value in vars(row).items() if isinstance(value, int)}
        return replace(row, **cast(Any, widths))

    first, reduced, channels = (scaled(value, width) for value in table.stem)
    return replace(table, stem=(first, reduced, channels), rows=tuple(map(row, table.rows)))


def scaled(channels: int, width: float) -> int:
    """``channels`` × ``width``, to the nearest multiple of 4; none stays none.

    Raises:
        ValueError: ``width`` is not a number between 0.05 and 20.
    """
    if not 0.05 <= width <= 20:
        raise ValueError(f"width multiplies all channel counts and lies between 0.05 and 20, not {width}")
    return max(4, round(channels * width / 4) * 4) if channels else 0

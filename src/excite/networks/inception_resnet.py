"""Inception-ResNet-v2.

* Szegedy, Ioffe, Vanhoucke, Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual Connections on
  Learning", arXiv 1602.07261, 2017; widths, padding and scales as in the authors' release.
* Hu et al., "Squeeze-and-Excitation Networks", 2018 (SE before the addition, Fig. 3).

A unit at the end of a branch stands, in a residual module, between the scaled branch and the addition; in the three
plain modules it rescales the concatenation. A unit that replaces a convolution replaces, in each branch that has such,
the last square 3×3 convolution that keeps the map's size. So in the first stage every module has some (two in each
residual one); in the second and third stage, whose residual modules have no square kernels, the plain module has one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor, nn

from excite.networks.bn_inception import ConvBN, scaled
from excite.networks.site import Convolution, Join, Site, plain_convolution, plain_join
from excite.networks.tables import InceptionBranch, InceptionConv, InceptionResNetTable

POOLS = {
    "average": lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "max": lambda: nn.MaxPool2d(3, stride=2),
}


def rectangular(in_channels: int, step: InceptionConv, bias: bool = False) -> nn.Conv2d:
    """A convolution with a kernel of any shape, from He's normal distribution as :func:`~excite.networks.site.conv`."""
    kernel = (step.height, step.width)
    padding = (step.height // 2, step.width // 2) if step.padded else 0
    convolution = nn.Conv2d(in_channels, step.channels, kernel, step.stride, padding, bias=bias)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


class Builder:
    """Makes the parts of one stage."""

    def __init__(self, table: InceptionResNetTable, stage: int, convolution: Convolution, join: Join) -> None:
        self.table, self.stage, self.convolution, self.join = table, stage, convolution, join

    def site(self, in_channels: int, out_channels: int, activation: str = "relu", residual: bool = True) -> Site:
        """A place in this stage where a unit can go."""
        return Site(self.stage, in_channels, out_channels, 1, 1, activation, self.table.input_size, residual)

    def end(self, channels: int, residual: bool) -> nn.Module:
        """The end of a module."""
        return self.join(self.site(channels, channels, "identity", residual))

    def step(self, in_channels: int, step: InceptionConv, replaced: bool = False) -> ConvBN:
        """A convolution with batch norm and ReLU, or the unit in their place."""
        if replaced:
            conv, bn, act = self.convolution(self.site(in_channels, step.channels))
        else:
            conv, bn, act = rectangular(in_channels, step), nn.BatchNorm2d(step.channels), nn.ReLU(inplace=True)
        if isinstance(bn, nn.BatchNorm2d):  # a unit that brings its own keeps it as it is
            bn.eps = self.table.eps
        return ConvBN(conv, bn, act)

    def branches(self, in_channels: int, branches: tuple[InceptionBranch, ...]) -> tuple[dict[str, nn.Module], int]:
        """``branch0``, ``branch1``, … and the channels of their concatenation."""
        parts: dict[str, nn.Module] = {}
        total = 0
        for index, branch in enumerate(branches):
            channels, steps = in_channels, []
            places = [place for place, step in enumerate(branch) if replaceable(step)]
            for place, step in enumerate(branch):
                if isinstance(step, str):
                    steps.append(POOLS[step]())
                else:
                    steps.append(self.step(channels, step, replaced=place in places[-1:]))
                    channels = step.channels
            parts[f"branch{index}"] = steps[0] if len(steps) == 1 else nn.Sequential(*steps)
            total += channels
        return parts, total

"""Inception-ResNet-v2.

* Szegedy, Ioffe, Vanhoucke, Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual Connections on
  Learning", arXiv 1602.07261, 2017; widths, padding and scales are those of the authors' release.
* Hu et al., "Squeeze-and-Excitation Networks", 2018 (SE before the addition, Fig. 3).

A unit at the end of a branch stands, in a residual module, between the scaled branch and the addition; in the three
plain modules it rescales the concatenation. A unit that replaces a convolution replaces, in each branch that has
some, the last square 3×3 convolution that keeps the map's size: in the first stage two in each residual module and
one in the plain one; in the second and third, whose residual modules have no square kernels, one in the plain module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from excite.networks.bn_inception import ConvBN, scaled
from excite.networks.site import Convolution, Join, Site, he_conv, plain_convolution, plain_join
from excite.networks.tables import InceptionBranch, InceptionConv, InceptionResNetTable

# --- the parts -------------------------------------------------------------------------------------------------

POOLS: dict[str, Callable[[], nn.Module]] = {
    "average": lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "max": lambda: nn.MaxPool2d(3, stride=2),
}


def plain_conv(in_channels: int, step: InceptionConv, bias: bool = False) -> nn.Conv2d:
    """The convolution of a table."""
    padding = (step.height // 2, step.width // 2) if step.padded else (0, 0)
    kernel = (step.height, step.width)
    return he_conv(in_channels, step.channels, kernel, step.stride, padding, bias=bias, uniform=True)


def conv_bn(in_channels: int, step: InceptionConv, eps: float) -> ConvBN:
    """A convolution that no unit replaces, with batch norm and ReLU."""
    return ConvBN(plain_conv(in_channels, step), nn.BatchNorm2d(step.channels, eps), nn.ReLU(inplace=True))


def is_replaceable(step: InceptionConv | str) -> bool:
    """Whether it is a square 3×3 convolution that keeps the map's size."""
    return isinstance(step, InceptionConv) and step.padded and step.height == step.width == 3


@dataclass(frozen=True)
class Stage:
    """What the modules of one stage are made with."""

    number: int
    table: InceptionResNetTable
    convolution: Convolution
    join: Join

    def site(self, in_channels: int, out_channels: int, activation: str, residual: bool = True) -> Site:
        """A place in this stage where a unit can go."""
        return Site(self.number, in_channels, out_channels, 1, 1, activation, self.table.input_size, residual)

    def branch(self, in_channels: int, steps: InceptionBranch) -> nn.Module:
        """The steps of a branch, one after the other."""
        last_replaceable = max((index for index, step in enumerate(steps) if is_replaceable(step)), default=None)
        parts: list[nn.Module] = []
        for index, step in enumerate(steps):
            if not isinstance(step, InceptionConv):
                parts.append(POOLS[step]())
                continue
            if index == last_replaceable:
                parts.append(self.replaceable(in_channels, step))
            else:
                parts.append(conv_bn(in_channels, step, self.table.eps))
            in_channels = step.channels
        return parts[0] if len(parts) == 1 else nn.Sequential(*parts)

    def replaceable(self, in_channels: int, step: InceptionConv) -> ConvBN:
        """The 3×3 convolution with batch norm and ReLU, or the unit that stands for the three."""
        conv, bn, act = self.convolution(self.site(in_channels, step.channels, "relu"))
        if isinstance(bn, nn.BatchNorm2d):
            bn.eps = self.table.eps
        return ConvBN(conv, bn, act)


# --- the modules -----------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """``branch0``, ``branch1``, … side by side."""

    def __init__(self, in_channels: int, branches: tuple[InceptionBranch, ...], stage: Stage) -> None:
        super().__init__()
        self.names = [f"branch{index}" for index in range(len(branches))]
        self.channels = 0
        for name, steps in zip(self.names, branches, strict=True):
            self.add_module(name, stage.branch(in_channels, steps))
            self.channels += next(
                (step.channels for step in reversed(steps) if not isinstance(step, str)), in_channels
            )

    def concatenated(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, channels, H, W), or smaller where the branches stride."""
        return torch.cat([getattr(self, name)(x) for name in self.names], 1)


class InceptionModule(Branches):
    """A plain Inception module: the branches, concatenated; ``se`` rescales the whole."""

    def __init__(self, in_channels: int, branches: tuple[InceptionBranch, ...], stage: Stage) -> None:
        super().__init__(in_channels, branches, stage)
        self.se = stage.join(stage.site(self.channels, self.channels, "identity", residual=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, channels, H, W), or smaller where the branches stride."""
        return self.se(self.concatenated(x))


class ResidualModule(Branches):
    """The branches, a 1×1 convolution back to the channels of the input, times ``scale``, plus the input.

    ``se`` joins the scaled branch and the shortcut, as in a residual block.
    """

    def __init__(
        self, channels: int, branches: tuple[InceptionBranch, ...], stage: Stage, scale: float, act: nn.Module
    ) -> None:
        super().__init__(channels, branches, stage)
        self.conv2d = plain_conv(self.channels, InceptionConv(channels), bias=True)
        self.scale = scale
        self.se = stage.join(stage.site(channels, channels, "identity"))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) → the same shape."""
        u = self.conv2d(self.concatenated(x)) * self.scale
        return self.act(self.se(u, x))

    def extra_repr(self) -> str:
        """The number that ``print(network)`` shows."""
        return f"scale={self.scale}"


# --- the network -----------------------------------------------------------------------------------------------


class InceptionResNet(nn.Sequential):
    """Stem, stages, a last 1×1 convolution, mean over all positions, classifier ``fc``; layers named as in timm.

    Made by :func:`inception_resnet_v2`. Images (N, in_channels, H, W), 75 pixels a side or more → logits
    (N, num_classes).
    """


def inception_resnet_v2(
    table: InceptionResNetTable,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    convolution: Convolution = plain_convolution,
    join: Join = plain_join,
) -> InceptionResNet:
    """Build Inception-ResNet-v2 from its table; arguments as for :func:`excite.networks.resnet.resnet`."""
    parts: dict[str, nn.Module] = {}
    channels = in_channels
    for name, step in table.stem:
        if isinstance(step, InceptionConv):
            parts[name] = conv_bn(channels, step, table.eps)
            channels = step.channels
        else:
            parts[name] = POOLS[step]()
    for number, row in enumerate(table.rows, start=1):
        stage = Stage(number, table, convolution, join)
        parts[row.first] = first = InceptionModule(channels, row.branches, stage)
        channels = first.channels
        modules = [
            ResidualModule(channels, row.residual, stage, row.scale, nn.ReLU(inplace=True)) for _ in range(row.depth)
        ]
        parts[row.name] = nn.Sequential(*modules)
    parts["block8"] = ResidualModule(channels, row.residual, stage, 1.0, nn.Identity())
    parts["conv2d_7b"] = conv_bn(channels, InceptionConv(table.head), table.eps)
    parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten(1)
    parts["dropout"] = nn.Dropout(table.dropout)
    parts["fc"] = nn.Linear(table.head, num_classes)
    return InceptionResNet(OrderedDict(parts))


# --- arguments of a spec ---------------------------------------------------------------------------------------


def adjusted(table: InceptionResNetTable, *, width: float = 1.0) -> InceptionResNetTable:
    """The table with every channel count times ``width``, rounded as in BN-Inception."""

    def steps(given: InceptionBranch) -> InceptionBranch:
        return tuple(
            step if isinstance(step, str) else replace(step, channels=scaled(step.channels, width)) for step in given
        )

    rows = tuple(
        replace(row, branches=tuple(map(steps, row.branches)), residual=tuple(map(steps, row.residual)))
        for row in table.rows
    )
    names, stem = zip(*table.stem, strict=True)
    return replace(table, stem=tuple(zip(names, steps(stem), strict=True)), rows=rows, head=scaled(table.head, width))

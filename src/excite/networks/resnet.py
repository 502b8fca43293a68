"""The ResNet family: ResNet, ResNeXt, SE-ResNet, SKNet, for ImageNet and for CIFAR.

* He et al., "Deep Residual Learning for Image Recognition", 2016 (ResNet; CIFAR form: Sect. 4.2).
* Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2017 (ResNeXt).
* Hu et al., "Squeeze-and-Excitation Networks", 2018 (SE before the addition, Fig. 3).
* Li et al., "Selective Kernel Networks", 2019 (SK in place of the 3×3 convolution, Table 1).

:func:`resnet` reads a table (:class:`~excite.networks.catalog.ResNetTable`) and puts a network together from
small parts: the stem, the blocks, what stands for the 3×3 convolution inside a block, how a block joins its
residual branch and its shortcut, and the shortcut itself. Parameters are named as in torchvision's ResNet.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from excite.networks.site import Convolution, Join, Site, conv, plain_convolution, plain_join
from excite.networks.tables import ResNetTable
from excite.units.training_forms import ends_branch, excited

# --- the parts -------------------------------------------------------------------------------------------------


class ZeroPadShortcut(nn.Module):
    """Option A of He et al. 2016, Sect. 4.2: every second position, new channels zero; no parameters.

    The zeros go on both sides of the old channels, half on each, as in the published CIFAR weights.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        new = out_channels - in_channels
        self.before, self.after, self.stride = new // 2, new - new // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """The numbers that ``print(network)`` shows."""
        return f"zero channels before={self.before}, after={self.after}, stride={self.stride}"


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B of He et al. 2016: a 1×1 convolution and batch norm."""
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def projection_3x3_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B that looks at every position: where it strides, a 3×3 convolution (Hu et al. 2018, appendix A)."""
    kernel = 3 if stride > 1 else 1
    return nn.Sequential(conv(in_channels, out_channels, kernel, stride), nn.BatchNorm2d(out_channels))


def imagenet_stem(in_channels: int, channels: int) -> nn.Module:
    """A 7×7 convolution: half of the side."""
    return conv(in_channels, channels, 7, stride=2)


def deep_stem(in_channels: int, channels: int) -> nn.Module:
    """Three 3×3 convolutions instead (Hu et al. 2018, appendix A)."""
    half = channels // 2
    steps: list[nn.Module] = []
    for given, wanted, stride in ((in_channels, half, 2), (half, half, 1)):
        steps += [conv(given, wanted, 3, stride), nn.BatchNorm2d(wanted), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps, conv(half, channels, 3))


def cifar_stem(in_channels: int, channels: int) -> nn.Module:
    """One 3×3 convolution: images of 32×32 keep their size."""
    return conv(in_channels, channels, 3)


STEMS = {"imagenet": imagenet_stem, "deep": deep_stem, "cifar": cifar_stem}
POOLS = {
    "padded": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "ceil": lambda: nn.MaxPool2d(3, stride=2, ceil_mode=True),
}
SHORTCUTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "projection": projection_shortcut,
    "projection_3x3": projection_3x3_shortcut,
    "zero_pad": ZeroPadShortcut,
}


# --- the blocks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One residual block: a line of the paper's table."""

    stage: int
    in_channels: int
    reduce: int  # channels of the first 1×1 convolution
    inner: int  # channels of the 3×3 convolution
    out_channels: int
    stride: int
    table: ResNetTable

    def site(self, in_channels: int, out_channels: int, stride: int, activation: str) -> Site:
        """A place in this block where a unit can go."""
        groups, input_size = self.table.groups, self.table.input_size
        return Site(self.stage, in_channels, out_channels, stride, groups, activation, input_size)

    def branch_end(self) -> Site:
        """The end of the residual branch, where it joins the shortcut."""
        return self.site(self.out_channels, self.out_channels, 1, self.last_activation)

    @property
    def last_activation(self) -> str:
        """What ends the residual branch."""
        return "relu" if self.table.branch == "relu" else "identity"

    def shortcut(self) -> nn.Module:
        """The identity where the shape stays, else the table's kind of shortcut."""
        if self.stride == 1 and self.in_channels == self.out_channels:
            return nn.Identity()
        return SHORTCUTS[self.table.shortcut](self.in_channels, self.out_channels, self.stride)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions: the block of ResNet-18/34 and of the CIFAR ResNets.

    A unit that replaces a convolution replaces the second one, which has no activation of its own. ``se`` joins
    the residual branch and the shortcut: a :class:`~excite.units.squeeze_excite.SqueezeExcite`, or :class:`Add`.
    """

    def __init__(self, step: Step, convolution: Convolution, join: Join) -> None:
        super().__init__()
        first = step.site(step.in_channels, step.inner, step.stride, "relu")
        second = step.site(step.inner, step.out_channels, 1, step.last_activation)
        self.conv1, self.bn1, self.act1 = plain_convolution(first)
        self.conv2, self.bn2, self.act2 = convolution(second)
        self.se = join(step.branch_end())
        self.downsample = step.shortcut()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, out_channels, H/stride, W/stride)."""
        u = self.act1(self.bn1(self.conv1(x)))
        c = self.conv2(u)
        if type(self.act2) is nn.Identity and ends_branch(c, self.bn2, self.se, self.relu):
            return excited(c, self.bn2, self.se, self.downsample(x))
        u = self.act2(self.bn2(c))
        return self.relu(self.se(u, self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolution: the block of ResNet-50 and up, of ResNeXt and of SKNet.

    A unit that replaces a convolution replaces the 3×3 one. ``se`` is as in :class:`BasicBlock`.
    """

    def __init__(self, step: Step, convolution: Convolution, join: Join) -> None:
        super().__init__()
        stride1, stride2 = {"1x1": (step.stride, 1), "3x3": (1, step.stride)}[step.table.stride_in]
        middle = step.site(step.reduce, step.inner, stride2, "relu")
        self.conv1 = conv(step.in_channels, step.reduce, 1, stride1)
        self.bn1 = nn.BatchNorm2d(step.reduce)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.act2 = convolution(middle)
        self.conv3 = conv(step.inner, step.out_channels, 1)
        self.bn3 = nn.BatchNorm2d(step.out_channels)
        self.se = join(step.branch_end())
        self.downsample = step.shortcut()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, out_channels, H/stride, W/stride)."""
        u = self.act1(self.bn1(self.conv1(x)))
        u = self.act2(self.bn2(self.conv2(u)))
        c = self.conv3(u)
        if ends_branch(c, self.bn3, self.se, self.relu):
            return excited(c, self.bn3, self.se, self.downsample(x))
        return self.relu(self.se(self.bn3(c), self.downsample(x)))


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


# --- the network -----------------------------------------------------------------------------------------------


class ResNet(nn.Sequential):
    """A network of the family: stem, stages ``layer1``, ``layer2``, …, mean over all positions, classifier ``fc``.

    Made by :func:`resnet`. Images (N, in_channels, H, W) of any size that survives the strides → logits
    (N, num_classes).
    """


def resnet(
    table: ResNetTable,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    convolution: Convolution = plain_convolution,
    join: Join = plain_join,
) -> ResNet:
    """Build a network from its table.

    Args:
        table: the paper's table; see :mod:`excite.networks.catalog`.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        convolution: makes the 3×3 convolution of each bottleneck, the second one of each basic block.
        join: makes the end of each residual branch.
    """
    channels = table.stem_channels
    parts: dict[str, nn.Module] = {
        "conv1": STEMS[table.stem](in_channels, channels),
        "bn1": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(inplace=True),
    }
    if table.stem != "cifar":
        parts["maxpool"] = POOLS[table.pool]()
    rows = zip(table.depths, table.reduce or table.inner, table.inner, table.outer, strict=True)
    for stage, (depth, reduce, inner, outer) in enumerate(rows, start=1):
        blocks = []
        for index in range(depth):
            stride = 2 if index == 0 and stage > 1 else 1
            step = Step(stage, channels, reduce, inner, outer, stride, table)
            blocks.append(BLOCKS[table.block](step, convolution, join))
            channels = outer
        parts[f"layer{stage}"] = nn.Sequential(*blocks)
    parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten(1)
    if table.dropout:
        parts["dropout"] = nn.Dropout(table.dropout)
    parts["fc"] = nn.Linear(channels, num_classes)
    return ResNet(OrderedDict(parts))


def widened(table: ResNetTable, width: float) -> ResNetTable:
    """The table with every channel count times ``width``.

    Counts are rounded to the nearest multiple of 4 (which keeps option A's zeros even on both sides), inside
    grouped blocks to the nearest one that the groups divide too.

    Raises:
        ValueError: ``width`` is not a number between 0.05 and 20.
    """
    if not 0.05 <= width <= 20:
        raise ValueError(f"width multiplies all channel counts and lies between 0.05 and 20, not {width}")

    def scaled(channels: int, divisor: int) -> int:
        return max(divisor, round(channels * width / divisor) * divisor)

    if width == 1:
        return table
    return replace(
        table,
        stem_channels=scaled(table.stem_channels, 4),
        reduce=table.reduce and tuple(scaled(channels, math.lcm(4, table.groups)) for channels in table.reduce),
        inner=tuple(scaled(channels, math.lcm(4, table.groups)) for channels in table.inner),
        outer=tuple(scaled(channels, 4) for channels in table.outer),
    )


def adjusted(
    table: ResNetTable,
    *,
    width: float = 1.0,
    stride_in: Literal["3x3", "1x1"] | None = None,
    pool: Literal["padded", "ceil"] | None = None,
    branch: Literal["linear", "relu"] | None = None,
) -> ResNetTable:
    """The table with the arguments of a spec.

    Args:
        width: see :func:`widened`.
        stride_in: ``1x1`` for the papers' bottlenecks, ``3x3`` for today's.
        pool: ``ceil`` for Caffe's pooling in the stem, ``padded`` for today's.
        branch: ``relu`` for a ReLU at the end of each residual branch of basic blocks, ``linear`` for none.

    Raises:
        ValueError: the network has no such part.
    """
    if stride_in and table.block != "bottleneck":
        raise ValueError("stride_in is for bottlenecks, and this network has basic blocks: leave it out")
    if pool and table.stem == "cifar":
        raise ValueError("pool is for networks that pool in the stem, and this one does not: leave it out")
    if branch and table.block != "basic":
        raise ValueError("branch is for basic blocks, and this network has bottlenecks: leave it out")
    chosen = replace(
        table,
        stride_in=stride_in or table.stride_in,
        pool=pool or table.pool,
        branch=branch or table.branch,
    )
    return widened(chosen, width)

"""MobileNet V1 and V2: networks of depthwise separable convolutions.

* Howard et al., "MobileNets", arXiv 1704.04861, 2017 (V1: Table 1).
* Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381, 2018 (V2: Table 2).

A unit that replaces a convolution replaces the depthwise ones. A unit at the end of a branch stands behind each
block's last convolution: in V1 on the block's output, in V2 before the shortcut is added, where there is one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from excite.networks.site import ACTIVATIONS, Convolution, Join, Site, conv, plain_convolution, plain_join
from excite.networks.tables import MobileNetV1Table, MobileNetV2Table


class SeparableBlock(nn.Module):
    """A depthwise 3×3 convolution, then a 1×1 one: the block of V1 (Howard et al. 2017, Fig. 3)."""

    def __init__(self, depthwise: Site, out_channels: int, convolution: Convolution, join: Join) -> None:
        super().__init__()
        end = replace(depthwise, in_channels=out_channels, out_channels=out_channels, stride=1, groups=1)
        self.conv1, self.bn1, self.act1 = convolution(depthwise)
        self.conv2 = conv(depthwise.out_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = ACTIVATIONS[depthwise.activation]()
        self.se = join(replace(end, activation="identity"))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, out_channels, H/stride, W/stride)."""
        u = self.act1(self.bn1(self.conv1(x)))
        return self.se(self.act2(self.bn2(self.conv2(u))))


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise 3×3, linear 1×1 projection: the block of V2 (Sandler et al. 2018, Table 1).

    The input is added where the shape stays. With an expansion of 1 there is no first convolution.
    """

    def __init__(self, depthwise: Site, in_channels: int, out_channels: int, convolution: Convolution, join: Join):
        super().__init__()
        hidden = depthwise.in_channels
        self.residual = depthwise.stride == 1 and in_channels == out_channels
        end = Site(depthwise.stage, out_channels, out_channels, 1, 1, "identity", depthwise.input_size, self.residual)
        self.expand: nn.Module = nn.Identity()
        if hidden != in_channels:
            steps = {"conv": conv(in_channels, hidden, 1), "bn": nn.BatchNorm2d(hidden)}
            self.expand = nn.Sequential(OrderedDict(steps, act=ACTIVATIONS[depthwise.activation]()))
        self.conv1, self.bn1, self.act1 = convolution(depthwise)
        self.conv2 = conv(hidden, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.se = join(end)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, out_channels, H/stride, W/stride)."""
        u = self.act1(self.bn1(self.conv1(self.expand(x))))
        u = self.bn2(self.conv2(u))
        return self.se(u, x) if self.residual else self.se(u)


class MobileNet(nn.Sequential):
    """Stem, stages ``layer1``, ``layer2``, …, in V2 a last 1×1 convolution, mean over all positions, ``fc``.

    Made by :func:`mobilenet_v1` and :func:`mobilenet_v2`. Images (N, in_channels, H, W) → logits (N, num_classes).
    """


def mobilenet_v1(
    table: MobileNetV1Table,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    convolution: Convolution = plain_convolution,
    join: Join = plain_join,
) -> MobileNet:
    """Build MobileNet V1 from its table; arguments as for :func:`excite.networks.resnet.resnet`."""
    channels, parts = table.stem[0], _stem(in_channels, table.stem, table.activation)
    for stage, (out_channels, depth, first_stride) in enumerate(table.rows, start=1):
        blocks = []
        for stride in [first_stride] + [1] * (depth - 1):
            site = Site(
                stage, channels, channels, stride, channels, table.activation, table.input_size, residual=False
            )
            blocks.append(SeparableBlock(site, out_channels, convolution, join))
            channels = out_channels
        parts[f"layer{stage}"] = nn.Sequential(*blocks)
    return MobileNet(OrderedDict(parts | _classifier(channels, num_classes, dropout=0.0)))


def mobilenet_v2(
    table: MobileNetV2Table,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    convolution: Convolution = plain_convolution,
    join: Join = plain_join,
) -> MobileNet:
    """Build MobileNet V2 from its table; arguments as for :func:`excite.networks.resnet.resnet`."""
    channels, parts = table.stem[0], _stem(in_channels, table.stem, "relu6")
    for stage, (expansion, out_channels, depth, first_stride) in enumerate(table.rows, start=1):
        blocks = []
        for stride in [first_stride] + [1] * (depth - 1):
            hidden = channels * expansion
            site = Site(stage, hidden, hidden, stride, hidden, "relu6", table.input_size)
            blocks.append(InvertedResidual(site, channels, out_channels, convolution, join))
            channels = out_channels
        parts[f"layer{stage}"] = nn.Sequential(*blocks)
    parts["conv2"] = conv(channels, table.head, 1)
    parts["bn2"] = nn.BatchNorm2d(table.head)
    parts["act2"] = ACTIVATIONS["relu6"]()
    return MobileNet(OrderedDict(parts | _classifier(table.head, num_classes, table.dropout)))


def _stem(in_channels: int, stem: tuple[int, int], activation: str) -> dict[str, nn.Module]:
    channels, stride = stem
    return {
        "conv1": conv(in_channels, channels, 3, stride),
        "bn1": nn.BatchNorm2d(channels),
        "act1": ACTIVATIONS[activation](),
    }


def _classifier(channels: int, num_classes: int, dropout: float) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(1)}
    if dropout:
        parts["dropout"] = nn.Dropout(dropout)
    return parts | {"fc": nn.Linear(channels, num_classes)}


# --- arguments of a spec ---------------------------------------------------------------------------------------


def adjusted_v1(
    table: MobileNetV1Table, *, width: float = 1.0, activation: Literal["relu", "relu6"] | None = None
) -> MobileNetV1Table:
    """The table with every channel count times ``width`` (the paper's α), and another activation."""
    rows = tuple((_scaled(channels, width), depth, stride) for channels, depth, stride in table.rows)
    stem = (_scaled(table.stem[0], width), table.stem[1])
    return replace(table, stem=stem, rows=rows, activation=activation or table.activation)


def adjusted_v2(table: MobileNetV2Table, *, width: float = 1.0) -> MobileNetV2Table:
    """The table with every channel count times ``width``; the last convolution never narrows (Sect. 4)."""
    rows = tuple((t, _scaled(channels, width), depth, stride) for t, channels, depth, stride in table.rows)
    stem = (_scaled(table.stem[0], width), table.stem[1])
    return replace(table, stem=stem, rows=rows, head=_scaled(table.head, max(1.0, width)))


def _scaled(channels: int, width: float) -> int:
    """``channels`` × ``width``, to the nearest multiple of 8 that is not more than a tenth below it.

    The rule of the authors' releases.
    """
    if not 0.05 <= width <= 20:
        raise ValueError(f"width multiplies all channel counts and lies between 0.05 and 20, not {width}")
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8

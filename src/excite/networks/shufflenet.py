"""ShuffleNet V2.

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", arXiv 1807.11164, 2018
(blocks: Fig. 3; network: Table 5).

A unit that replaces a convolution replaces the depthwise one of the right-hand branch, as in Li et al. 2019,
Sect. 4.1. A unit at the end of a branch ends that branch, before the halves are put side by side.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from excite.networks.site import Convolution, Join, Site, conv, plain_convolution, plain_join
from excite.networks.tables import ShuffleNetV2Table


def shuffle(x: Tensor) -> Tensor:
    """Channels a₁ … aₙ b₁ … bₙ become a₁ b₁ a₂ b₂ …, so that the halves mix: (N, 2n, H, W) → the same shape."""
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleBlock(nn.Module):
    """Half of the channels pass, half go through 1×1, depthwise 3×3, 1×1 (Ma et al. 2018, Fig. 3c).

    Where it strides, both halves take all channels, and the left one has a depthwise and a 1×1 convolution of its
    own (Fig. 3d).
    """

    def __init__(self, site: Site, in_channels: int, convolution: Convolution, join: Join) -> None:
        super().__init__()
        half = site.in_channels
        self.strides = site.stride > 1
        self.shortcut: nn.Module = nn.Identity()
        if self.strides:
            steps = {
                "conv1": conv(in_channels, in_channels, 3, site.stride, groups=in_channels),
                "bn1": nn.BatchNorm2d(in_channels),
                "conv2": conv(in_channels, half, 1),
                "bn2": nn.BatchNorm2d(half),
                "act2": nn.ReLU(inplace=True),
            }
            self.shortcut = nn.Sequential(OrderedDict(steps))
        self.conv1 = conv(in_channels if self.strides else half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.act2 = convolution(site)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.act3 = nn.ReLU(inplace=True)
        self.se = join(Site(site.stage, half, half, 1, 1, "identity", site.input_size, residual=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, 2 · half, H/stride, W/stride)."""
        left, right = (x, x) if self.strides else x.chunk(2, dim=1)
        u = self.act1(self.bn1(self.conv1(right)))
        u = self.act2(self.bn2(self.conv2(u)))
        u = self.se(self.act3(self.bn3(self.conv3(u))))
        return shuffle(torch.cat((self.shortcut(left), u), dim=1))


class ShuffleNet(nn.Sequential):
    """Stem, stages ``layer1`` to ``layer3``, a last 1×1 convolution, mean over all positions, classifier ``fc``.

    Made by :func:`shufflenet_v2`. Images (N, in_channels, H, W) → logits (N, num_classes).
    """


def shufflenet_v2(
    table: ShuffleNetV2Table,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    convolution: Convolution = plain_convolution,
    join: Join = plain_join,
) -> ShuffleNet:
    """Build ShuffleNet V2 from its table; arguments as for :func:`excite.networks.resnet.resnet`."""
    channels = table.stem
    parts: dict[str, nn.Module] = {
        "conv1": conv(in_channels, channels, 3, stride=2),
        "bn1": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }
    for stage, (out_channels, depth) in enumerate(zip(table.channels, table.depths, strict=True), start=1):
        blocks = []
        for stride in [2] + [1] * (depth - 1):
            half = out_channels // 2
            site = Site(stage, half, half, stride, half, "identity", table.input_size, residual=False)
            blocks.append(ShuffleBlock(site, channels, convolution, join))
            channels = out_channels
        parts[f"layer{stage}"] = nn.Sequential(*blocks)
    parts["conv2"] = conv(channels, table.head, 1)
    parts["bn2"] = nn.BatchNorm2d(table.head)
    parts["act2"] = nn.ReLU(inplace=True)
    parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten(1)
    parts["fc"] = nn.Linear(table.head, num_classes)
    return ShuffleNet(OrderedDict(parts))


def adjusted(table: ShuffleNetV2Table) -> ShuffleNetV2Table:
    """The table as it is: the widths have names of their own."""
    return table

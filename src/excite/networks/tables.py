"""The papers' tables as plain data: one class for each way of drawing one. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ResNetTable:
    """A network of the ResNet family as its paper's table draws it.

    Args:
        depths: blocks per stage.
        inner: channels of the 3×3 convolutions, per stage.
        outer: channels that each stage hands on.
        block: ``basic`` (two 3×3) or ``bottleneck`` (1×1, 3×3, 1×1).
        stem: ``imagenet`` (7×7 and pooling) or ``cifar`` (3×3).
        stem_channels: channels after the stem.
        groups: cardinality of the 3×3 convolutions.
        shortcut: where the shape changes: ``projection`` (option B) or ``zero_pad`` (option A).
        stride_in: which convolution of a bottleneck strides: ``3x3`` (today's way) or ``1x1`` (He et al.).
        input_size: side of the square images that the paper's costs are for.
    """

    depths: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    block: Literal["basic", "bottleneck"]
    stem: Literal["imagenet", "cifar"]
    stem_channels: int
    groups: int = 1
    shortcut: Literal["projection", "zero_pad"] = "projection"
    stride_in: Literal["3x3", "1x1"] = "3x3"
    input_size: int = 224

"""HybridSN: the window around a pixel of a hyperspectral scene → the pixel's class.

Roy, Krishna, Dubey, Chaudhuri, "HybridSN: Exploring 3-D–2-D CNN Feature Hierarchy for Hyperspectral Image
Classification", IEEE GRSL 17(2), 2020, arXiv 1902.06701 (Sect. II, Table I).

Here with batch norm, which the paper has not, and so with less dropout; ``norm=none,dropout=0.4`` is the paper's
network. Its counterparts of equal depth have four 2-d or four 3-d convolutions. A unit that replaces a convolution
replaces any of the four, and a unit that rescales a map stands behind the activation of each.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from excite.networks.site import Convolution, Join, Site, plain_convolution, plain_join
from excite.networks.tables import HybridSNTable

LARGEST_WINDOW = 128  # the first dense layer grows with the window's area: 236 million weights at 128


class HybridSN(nn.Sequential):
    """Convolutions that are not padded, then dense layers: windows (N, bands, window, window) → logits (N, classes).

    Made by :func:`hybridsn`. Its children are run in turn and are, in order: ``spectral`` (where there are 3-d
    convolutions), for each stage i ``conv{i}``, ``norm{i}``, ``act{i}`` and ``se{i}`` (the place of a unit),
    ``stack`` behind the last 3-d one, ``flatten``, ``fc1``, ``act5``, ``dropout1``, ``fc2``, ``act6``, ``dropout2``
    and ``fc``.

    Attributes:
        input_shape: of a window, (bands, window, window); None for a part of the network, which checks nothing.

    Raises:
        ValueError: in ``forward``, windows of another shape.
    """

    input_shape: tuple[int, int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, bands, window, window) → (N, classes)."""
        if self.input_shape is not None:
            _check_windows(x, self.input_shape)
        for module in self:
            x = module(x)
        return x


class Spectral(nn.Module):
    """Makes the bands a dimension that a 3-d convolution goes along: (N, B, H, W) → (N, 1, B, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, B, H, W) → (N, 1, B, H, W)."""
        return x.unsqueeze(1)


class Stack(nn.Module):
    """Makes every band of every 3-d map a map of its own: (N, C, B, H, W) → (N, C·B, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, B, H, W) → (N, C·B, H, W)."""
        return x.flatten(1, 2)


def _check_windows(x: Tensor, expected: tuple[int, int, int]) -> None:
    if x.dim() != 4 or tuple(x.shape[1:]) != expected:
        bands, window, _ = expected
        raise ValueError(
            f"this network was built for windows of {window}×{window} pixels with {bands} bands, (N, {bands}, "
            f"{window}, {window}), but got {tuple(x.shape)}: build it with window= and in_channels= of the data"
        )


torch.fx.wrap("_check_windows")  # it looks at the shape: one node to a tracer


def hybridsn(
    table: HybridSNTable,
    num_classes: int = 16,
    in_channels: int = 30,
    *,
    convolution: Convolution = plain_convolution,
    join: Join = plain_join,
) -> HybridSN:
    """Build HybridSN, or one of its counterparts, from its table.

    Where fewer bands or pixels are left than a kernel spans, it spans those that are left.

    Args:
        table: see :class:`~excite.networks.tables.HybridSNTable`; its ``input_size`` is the side of the windows.
        num_classes: outputs of the classifier.
        in_channels: bands, or principal components, of the windows.
        convolution: makes each convolution with its norm and activation.
        join: makes what stands behind each activation.
    """
    window = table.input_size
    size: tuple[int, ...] = (in_channels, window, window) if table.spectral else (window, window)
    channels = 1 if table.spectral else in_channels
    parts: dict[str, nn.Module] = {"spectral": Spectral()} if table.spectral else {}
    for stage, width in enumerate(table.widths, start=1):
        spans = (table.spectral[stage - 1], 3, 3) if stage <= len(table.spectral) else (3, 3)
        kernel = tuple(map(min, spans, size))
        site = Site(stage, channels, width, 1, 1, "relu", window, residual=False)
        site = replace(site, kernel=kernel, size=size, norm=table.norm == "batch")
        parts[f"conv{stage}"], parts[f"norm{stage}"], parts[f"act{stage}"] = convolution(site)
        parts[f"se{stage}"] = join(replace(site, in_channels=width))
        size = tuple(have - span + 1 for have, span in zip(size, kernel, strict=True))
        channels = width
        if stage == len(table.spectral):
            parts["stack"] = Stack()
            channels, size = channels * size[0], size[1:]
    parts["flatten"] = nn.Flatten(1)
    inputs = channels * math.prod(size)
    for number, width in enumerate(table.dense, start=1):
        parts[f"fc{number}"] = _he_linear(inputs, width)
        parts[f"act{len(table.widths) + number}"] = nn.ReLU(inplace=True)
        parts[f"dropout{number}"] = nn.Dropout(table.dropout)
        inputs = width
    parts["fc"] = nn.Linear(inputs, num_classes)
    network = HybridSN(OrderedDict(parts))
    network.input_shape = (in_channels, window, window)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            # By fan-in, those of units too. The fourth has nine times as many inputs as outputs: by fan-out it would
            # start three times as large, and steps of a given size would move it a third as far.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


def _he_linear(inputs: int, outputs: int) -> nn.Linear:
    """A dense layer that starts normal with variance 2 / fan-in, and from no bias.

    Of its many inputs, fan-out would make an answer of many times their size.
    """
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


# --- arguments of a spec ---------------------------------------------------------------------------------------


def adjusted(
    table: HybridSNTable,
    *,
    window: int | None = None,
    norm: Literal["batch", "none"] | None = None,
    dropout: float | None = None,
    width: float = 1.0,
) -> HybridSNTable:
    """The table with the arguments of a spec.

    Args:
        window: side of the windows in pixels, 1 to 128.
        norm: ``none`` for the paper's network, ``batch`` for today's.
        dropout: share of the hidden units that are dropped in training, at least 0 and below 1.
        width: multiplies the channels of all convolutions and the widths of the hidden layers.

    Raises:
        ValueError: a number that is out of these bounds.
    """
    if window is not None and not 1 <= window <= LARGEST_WINDOW:
        raise ValueError(f"window is the side of a window in pixels, 1 to {LARGEST_WINDOW}, not {window}")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout is a share, at least 0 and below 1, not {dropout}")
    if not 0.05 <= width <= 20:
        raise ValueError(f"width multiplies all channel counts and lies between 0.05 and 20, not {width}")
    return replace(
        table,
        widths=tuple(max(1, round(channels * width)) for channels in table.widths),
        dense=tuple(max(1, round(units * width)) for units in table.dense),
        dropout=table.dropout if dropout is None else dropout,
        norm=norm or table.norm,
        input_size=window or table.input_size,
    )

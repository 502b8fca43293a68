"""DnCNN: a noisy image → the image without its noise.

Zhang, Zuo, Chen, Meng, Zhang, "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising", IEEE
TIP 26(7), 2017, arXiv 1608.03981 (Sect. III).

The first convolution is followed by a ReLU, the hidden ones by batch norm and a ReLU, the last by nothing; each is
padded with zeros, so that the image keeps its size. Their answer is the noise, which is taken from the input. A unit
that replaces a convolution replaces a hidden one, and a unit that rescales a map stands behind a hidden activation.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from excite.networks.site import Convolution, Join, Site, he_conv, plain_convolution, plain_join
from excite.networks.tables import DnCNNTable

FIRST_ANSWER = 0.01
"""How large the last convolution starts, as a share of He's start by fan-in."""

FIRST_SCALE = 0.025
"""The scales that batch norm starts with."""

# What sees no further than its kernel reaches.
_LOCAL = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Identity)


class DnCNN(nn.Module):
    """Noisy images (N, C, H, W) of values from 0 to 1 → denoised images (N, C, H, W), of any height and width.

    Made by :func:`dncnn`. Its children are run in turn and are, in order: ``conv1``, ``act1``, for each hidden
    convolution i = 2 … depth − 1 ``conv{i}``, ``norm{i}``, ``act{i}`` and ``se{i}`` (the place of a unit), and
    ``conv{depth}``. Values outside of 0 to 1 are welcome, and the answer is not clipped.

    Args:
        parts: the children.
        in_channels: see the attributes.
        residual: see the attributes.

    Attributes:
        in_channels: C.
        depth: how many convolutions follow each other.
        residual: whether the children answer with the noise, which is taken from the input, or with the image.

    Raises:
        ValueError: in ``forward``, images with another number of channels.
    """

    def __init__(self, parts: OrderedDict[str, nn.Module], in_channels: int, residual: bool) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.in_channels = in_channels
        self.depth = sum(name.startswith("conv") for name in parts)
        self.residual = residual

    @property
    def receptive_field(self) -> int:
        """Side of the square of input pixels that one output pixel sees, by convolutions alone."""
        return 2 * sum(_reach(child) for child in self.children()) + 1

    @property
    def halo(self) -> int | None:
        """How many pixels an output pixel sees in each direction; None where a unit may look at the whole image."""
        local = all(isinstance(child, _LOCAL) and not list(child.children()) for child in self.children())
        return self.receptive_field // 2 if local else None

    def body(self, x: Tensor) -> Tensor:
        """The children's answer: the noise, or without ``residual`` the image. (N, C, H, W) → (N, C, H, W)."""
        _check_images(x, self.in_channels)
        for module in self.children():
            x = module(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        answer = self.body(x)
        return x - answer if self.residual else answer


def _reach(part: nn.Module) -> int:
    """How many pixels the widest convolution of a part sees in each direction."""
    convolutions = (module for module in part.modules() if isinstance(module, nn.Conv2d))
    return max((conv.dilation[0] * (conv.kernel_size[0] // 2) for conv in convolutions), default=0)


def _check_images(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        channel = "channel" if channels == 1 else "channels"
        raise ValueError(
            f"this network was built for images with {channels} {channel}, (N, {channels}, H, W), but got "
            f"{tuple(x.shape)}: build it with in_channels= of the images"
        )


torch.fx.wrap("_check_images")  # it looks at the shape: one node to a tracer


def dncnn(
    table: DnCNNTable,
    num_classes: int = 1,
    in_channels: int = 1,
    *,
    convolution: Convolution = plain_convolution,
    join: Join = plain_join,
) -> DnCNN:
    """Build DnCNN from its table.

    Args:
        table: see :class:`~excite.networks.tables.DnCNNTable`.
        num_classes: means nothing here: the answer is an image.
        in_channels: channels of the images.
        convolution: makes each hidden convolution with its norm and activation.
        join: makes what stands behind each hidden activation.
    """
    width, kernel = table.channels, table.kernel
    size, padding = (kernel, kernel), (kernel // 2, kernel // 2)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv1"] = he_conv(in_channels, width, size, 1, padding, bias=True)
    parts["act1"] = nn.ReLU(inplace=True)
    for stage in range(1, table.stages + 1):
        site = Site(stage, width, width, 1, 1, "relu", table.input_size, residual=False)
        site = replace(site, kernel=size, norm=table.norm == "batch")
        i = stage + 1
        parts[f"conv{i}"], parts[f"norm{i}"], parts[f"act{i}"] = convolution(site)
        norm = parts[f"norm{i}"]
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.weight, FIRST_SCALE)
        parts[f"se{i}"] = join(site)
    last = he_conv(width, in_channels, size, 1, padding, bias=True)
    # At first next to no noise is found. From He's start and scales of 1 the answer would be many times larger than
    # any noise, and to bring it down a network with batch norm learns to answer nothing at all: after 240 batches of
    # 16 patches it has removed none of the noise, and from here 7.5 dB of it.
    nn.init.normal_(last.weight, std=FIRST_ANSWER * math.sqrt(2 / (width * kernel**2)))
    parts[f"conv{table.depth}"] = last
    return DnCNN(parts, in_channels, table.residual)


def place(stage: int, is_kernel: bool) -> str:
    """The module that a unit is attached to: of a hidden convolution itself, or its activation."""
    return f"conv{stage + 1}" if is_kernel else f"act{stage + 1}"


# --- arguments of a spec ---------------------------------------------------------------------------------------


def adjusted(
    table: DnCNNTable,
    *,
    depth: int | None = None,
    channels: int | None = None,
    kernel: int | None = None,
    norm: Literal["batch", "none"] | None = None,
    residual: bool | None = None,
    width: float = 1.0,
) -> DnCNNTable:
    """The table with the arguments of a spec.

    Args:
        depth: convolutions, 3 to 200.
        channels: of the hidden maps, 1 to 4096.
        kernel: side of every kernel, odd, 1 to 31.
        norm: ``batch``, or ``none`` for biases instead.
        residual: whether the network learns the noise or the image.
        width: multiplies ``channels``.

    Raises:
        ValueError: a number that is out of these bounds.
    """
    if depth is not None and not 3 <= depth <= 200:
        raise ValueError(f"depth is the number of convolutions, 3 to 200, not {depth}")
    if channels is not None and not 1 <= channels <= 4096:
        raise ValueError(f"channels is the number of the hidden maps, 1 to 4096, not {channels}")
    if not 0.01 <= width <= 20:
        raise ValueError(f"width multiplies the number of the hidden maps and lies between 0.01 and 20, not {width}")
    if kernel is not None and not (1 <= kernel <= 31 and kernel % 2):
        raise ValueError(f"kernel is the side of every kernel, an odd number of 1 to 31, not {kernel}")
    return replace(
        table,
        depth=depth or table.depth,
        channels=max(1, round((channels or table.channels) * width)),
        kernel=kernel or table.kernel,
        norm=norm or table.norm,
        residual=table.residual if residual is None else residual,
    )

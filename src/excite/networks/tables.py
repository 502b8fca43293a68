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
        stem: ``imagenet`` (7×7), ``deep`` (three 3×3), both with pooling, or ``cifar`` (3×3).
        stem_channels: channels after the stem.
        groups: cardinality of the 3×3 convolutions.
        shortcut: where the shape changes: ``projection`` (option B), ``zero_pad`` (option A), or ``projection_3x3``
            (option B with a 3×3 convolution where the block strides).
        stride_in: which convolution of a bottleneck strides: ``3x3`` (today's way) or ``1x1`` (He et al.).
        pool: how the stem pools: ``padded`` (today's way: a frame of one pixel) or ``ceil`` (Caffe's: no frame, the
            last window may hang over the edge).
        branch: how the residual branch of a basic block ends, ``linear`` or in a ``relu`` (as in timm's legacy
            SE-ResNets).
        reduce: channels of the first 1×1 convolution, per stage, where they are not those of the 3×3.
        dropout: before the classifier.
        input_size: side of the square images that the paper's costs are for.
    """

    depths: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    block: Literal["basic", "bottleneck"]
    stem: Literal["imagenet", "deep", "cifar"]
    stem_channels: int
    groups: int = 1
    shortcut: Literal["projection", "zero_pad", "projection_3x3"] = "projection"
    stride_in: Literal["3x3", "1x1"] = "3x3"
    pool: Literal["padded", "ceil"] = "padded"
    branch: Literal["linear", "relu"] = "linear"
    reduce: tuple[int, ...] | None = None
    dropout: float = 0.0
    input_size: int = 224

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.depths)


@dataclass(frozen=True)
class MobileNetV1Table:
    """Howard et al. 2017, Table 1: a convolution, then depthwise separable ones.

    Args:
        stem: channels and stride of the first convolution.
        rows: for each stage the output channels, the number of blocks, and the stride of the first.
        activation: ``relu`` (the paper) or ``relu6`` (the authors' release).
        input_size: side of the square images that the table is for.
    """

    stem: tuple[int, int]
    rows: tuple[tuple[int, int, int], ...]
    activation: Literal["relu", "relu6"] = "relu6"
    input_size: int = 224

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.rows)


@dataclass(frozen=True)
class MobileNetV2Table:
    """Sandler et al. 2018, Table 2: inverted residuals with linear bottlenecks.

    Args:
        stem: channels and stride of the first convolution.
        rows: for each stage the expansion factor t, the output channels c, the number of blocks n, and the stride s
            of the first.
        head: channels of the last 1×1 convolution.
        dropout: before the classifier.
        input_size: side of the square images that the table is for.
    """

    stem: tuple[int, int]
    rows: tuple[tuple[int, int, int, int], ...]
    head: int = 1280
    dropout: float = 0.2
    input_size: int = 224

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.rows)


@dataclass(frozen=True)
class ShuffleNetV2Table:
    """Ma et al. 2018, Table 5: channel split, depthwise convolution, shuffle.

    Args:
        stem: channels of the first convolution, which strides, as does the pooling behind it.
        channels: output channels of each stage; its first block strides.
        depths: blocks per stage.
        head: channels of the last 1×1 convolution.
        input_size: side of the square images that the table is for.
    """

    stem: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    head: int
    input_size: int = 224

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.depths)


@dataclass(frozen=True)
class InceptionRow:
    """One module of BN-Inception: a line of Ioffe & Szegedy 2015, Fig. 5, in its columns' order; channels.

    Args:
        name: ``3a`` to ``5b``.
        b1x1: of the 1×1 convolution; 0 for none: the module then strides and hands its pooled input on.
        b3x3_reduce, b3x3: of the 1×1 convolution and the 3×3 behind it.
        double3x3_reduce, double3x3: of the 1×1 convolution and each of the two 3×3 behind it.
        pool: ``average`` or ``max``, 3×3.
        pool_proj: of the 1×1 convolution behind the pooling; 0 for none.
    """

    name: str
    b1x1: int
    b3x3_reduce: int
    b3x3: int
    double3x3_reduce: int
    double3x3: int
    pool: Literal["average", "max"]
    pool_proj: int

    @property
    def stage(self) -> int:
        """3a is of the first stage."""
        return int(self.name[0]) - 2


@dataclass(frozen=True)
class BNInceptionTable:
    """Ioffe & Szegedy 2015, Fig. 5: Inception with batch norm.

    Args:
        stem: channels of the 7×7 convolution, and of the 1×1 and the 3×3 that follow after pooling.
        rows: the modules.
        input_size: side of the square images that the table is for.
    """

    stem: tuple[int, int, int]
    rows: tuple[InceptionRow, ...]
    input_size: int = 224

    @property
    def stages(self) -> int:
        """How many there are: maps of one size are a stage."""
        return self.rows[-1].stage


@dataclass(frozen=True)
class HybridSNTable:
    """Roy et al. 2020, Table I: 3-d convolutions over bands and positions, then 2-d ones, then dense layers.

    No convolution is padded or strides.

    Args:
        spectral: how many bands the kernel of each 3-d convolution spans; the convolutions after them are 2-d.
        widths: output channels of every convolution. All kernels are 3×3 over the positions.
        dense: widths of the hidden dense layers.
        dropout: after each of them; 0.4 in the paper.
        norm: ``batch`` norm behind every convolution, or ``none`` (the paper) and biases instead.
        bands: that the table is for.
        classes: of the scene that the table is for.
        input_size: side of the square windows that the table is for.
    """

    spectral: tuple[int, ...]
    widths: tuple[int, ...]
    dense: tuple[int, ...] = (256, 128)
    dropout: float = 0.1
    norm: Literal["batch", "none"] = "batch"
    bands: int = 30
    classes: int = 16
    input_size: int = 25

    @property
    def stages(self) -> int:
        """How many there are: every convolution is one."""
        return len(self.widths)


@dataclass(frozen=True)
class DnCNNTable:
    """Zhang et al. 2017, Sect. III-A: convolutions of one width, all of which keep the size of the image.

    Args:
        depth: convolutions, the first and the last included; at least 3.
        channels: of the hidden maps.
        kernel: side of every kernel, odd.
        in_channels: of the images that the table is for, 1 or 3.
        norm: ``batch`` norm behind every hidden convolution, or ``none`` and biases instead.
        residual: whether the network answers with the noise, which is then taken from its input, or with the image.
        input_size: side of the square patches that it was trained on.
    """

    depth: int = 17
    channels: int = 64
    kernel: int = 3
    in_channels: int = 1
    norm: Literal["batch", "none"] = "batch"
    residual: bool = True
    input_size: int = 40

    @property
    def stages(self) -> int:
        """How many there are: every hidden convolution is one."""
        return self.depth - 2


@dataclass(frozen=True)
class DSCMRTable:
    """Zhen et al. 2019, Sect. 3.2: two branches of fully connected layers that end in one layer of both.

    Args:
        image_dim: length of an image's vector; 4096 of VGG's last hidden layer.
        text_dim: length of a text's vector; 300 of the sentence vectors.
        hidden: widths of the layers that each branch has of its own.
        dim: of the common space.
        dropout: after each hidden layer; the paper has none.
        input_dropout: of the numbers of both vectors; the paper has none.
        classes: of the set that the table is for.
    """

    image_dim: int = 4096
    text_dim: int = 300
    hidden: tuple[int, ...] = (2048,)
    dim: int = 1024
    dropout: float = 0.0
    input_dropout: float = 0.0
    classes: int = 10

    @property
    def input_size(self) -> int:
        """Of a pair whose vectors stand side by side: one pixel."""
        return 1

    @property
    def stages(self) -> int:
        """There are no maps; one, for the messages about units."""
        return 1


BN_INCEPTION = BNInceptionTable(
    stem=(64, 64, 192),
    rows=(
        InceptionRow("3a", 64, 64, 64, 64, 96, "average", 32),
        InceptionRow("3b", 64, 64, 96, 64, 96, "average", 64),
        InceptionRow("3c", 0, 128, 160, 64, 96, "max", 0),
        InceptionRow("4a", 224, 64, 96, 96, 128, "average", 128),
        InceptionRow("4b", 192, 96, 128, 96, 128, "average", 128),
        InceptionRow("4c", 160, 128, 160, 128, 160, "average", 128),
        InceptionRow("4d", 96, 128, 192, 160, 192, "average", 128),
        InceptionRow("4e", 0, 128, 192, 192, 256, "max", 0),
        InceptionRow("5a", 352, 192, 320, 160, 224, "average", 128),
        InceptionRow("5b", 352, 192, 320, 192, 224, "max", 128),
    ),
)


@dataclass(frozen=True)
class InceptionConv:
    """A convolution of Inception-ResNet.

    Args:
        channels: that it hands on.
        height, width: of its kernel.
        stride: of both directions.
        padded: whether the map keeps its size (at stride 1), or loses an edge to the kernel.
    """

    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padded: bool = True


InceptionBranch = tuple[InceptionConv | Literal["average", "max"], ...]
"""Convolutions and 3×3 poolings in turn: ``average`` keeps the size, ``max`` halves it."""


@dataclass(frozen=True)
class InceptionResNetStage:
    """A plain Inception module, then residual ones.

    Args:
        first, branches: the name of the plain module, and its branches.
        name, residual, depth: the name of the residual modules, the branches of each, and how many there are.
        scale: what the residual branches are multiplied by before the shortcut is added.
    """

    first: str
    branches: tuple[InceptionBranch, ...]
    name: str
    residual: tuple[InceptionBranch, ...]
    depth: int
    scale: float


@dataclass(frozen=True)
class InceptionResNetTable:
    """Inception-ResNet-v2 of Szegedy et al. 2017, as its authors released it.

    Args:
        stem: the names of the first layers, and the layers.
        rows: the stages. A last residual module without scale and activation ends the network.
        head: channels of the last 1×1 convolution.
        eps: of the batch norms.
        dropout: before the classifier.
        input_size: side of the square images that the table is for.
    """

    stem: tuple[tuple[str, InceptionConv | Literal["average", "max"]], ...]
    rows: tuple[InceptionResNetStage, ...]
    head: int
    eps: float = 1e-3
    dropout: float = 0.2
    input_size: int = 299

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.rows)


def _padded(channels: int, height: int = 1, width: int | None = None) -> InceptionConv:
    return InceptionConv(channels, height, width or height)


def _valid(channels: int, stride: int = 1) -> InceptionConv:
    return InceptionConv(channels, 3, 3, stride, padded=False)


INCEPTION_RESNET_V2 = InceptionResNetTable(
    stem=(
        ("conv2d_1a", _valid(32, stride=2)),
        ("conv2d_2a", _valid(32)),
        ("conv2d_2b", _padded(64, 3)),
        ("maxpool_3a", "max"),
        ("conv2d_3b", _padded(80)),
        ("conv2d_4a", _valid(192)),
        ("maxpool_5a", "max"),
    ),
    rows=(
        InceptionResNetStage(
            "mixed_5b",
            (
                (_padded(96),),
                (_padded(48), _padded(64, 5)),
                (_padded(64), _padded(96, 3), _padded(96, 3)),
                ("average", _padded(64)),
            ),
            "repeat",
            ((_padded(32),), (_padded(32), _padded(32, 3)), (_padded(32), _padded(48, 3), _padded(64, 3))),
            depth=10,
            scale=0.17,
        ),
        InceptionResNetStage(
            "mixed_6a",
            ((_valid(384, 2),), (_padded(256), _padded(256, 3), _valid(384, 2)), ("max",)),
            "repeat_1",
            ((_padded(192),), (_padded(128), _padded(160, 1, 7), _padded(192, 7, 1))),
            depth=20,
            scale=0.10,
        ),
        InceptionResNetStage(
            "mixed_7a",
            (
                (_padded(256), _valid(384, 2)),
                (_padded(256), _valid(288, 2)),
                (_padded(256), _padded(288, 3), _valid(320, 2)),
                ("max",),
            ),
            "repeat_2",
            ((_padded(192),), (_padded(192), _padded(224, 1, 3), _padded(256, 3, 1))),
            depth=9,
            scale=0.20,
        ),
    ),
    head=1536,
)

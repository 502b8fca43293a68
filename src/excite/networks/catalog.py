"""The networks that excite knows by name: their tables and what the papers say of them, as plain data.

Imports no torch, so that ``excite networks`` answers at once.

Costs are multiply–adds (MACs), in units of 10⁹: what the papers call GFLOPs. Errors are percentages on the
validation or test images, single crop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from excite.networks.tables import (
    BN_INCEPTION,
    INCEPTION_RESNET_V2,
    BNInceptionTable,
    DnCNNTable,
    DSCMRTable,
    HybridSNTable,
    InceptionResNetTable,
    MobileNetV1Table,
    MobileNetV2Table,
    ResNetTable,
    ShuffleNetV2Table,
)

Table = (
    ResNetTable
    | BNInceptionTable
    | InceptionResNetTable
    | MobileNetV1Table
    | MobileNetV2Table
    | ShuffleNetV2Table
    | HybridSNTable
    | DnCNNTable
    | DSCMRTable
)


@dataclass(frozen=True)
class Figures:
    """What a paper, or its authors' release, says of a network; None where it says nothing.

    Args:
        source: paper and table.
        data: the images that the errors were measured on.
        parameters: in millions.
        macs: multiply–adds for one image, in 10⁹.
        top1, top5: error in percent, single crop.
        spec: the spec that the figures are for, where it is not just the entry's name.
        note: why parameters or MACs are not those of the network here, where they differ by more than a hundredth.
    """

    source: str
    data: str
    parameters: float | None = None
    macs: float | None = None
    top1: float | None = None
    top5: float | None = None
    spec: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A name, what it stands for and what is published about it.

    Args:
        units: the units that belong to the network, each as the text that follows a ``+`` in a spec.
    """

    name: str
    title: str
    table: Table
    units: tuple[str, ...] = ()
    figures: tuple[Figures, ...] = ()

    @property
    def input_size(self) -> int:
        """Side of the square images that the network was drawn for."""
        return self.table.input_size

    @property
    def in_channels(self) -> int:
        """Channels of the images that the network was drawn for: bands, for windows of a hyperspectral scene.

        Of pairs of vectors that stand side by side, as one pixel, the length of both together.
        """
        if isinstance(self.table, DnCNNTable):
            return self.table.in_channels
        if isinstance(self.table, DSCMRTable):
            return self.table.image_dim + self.table.text_dim
        return self.table.bands if isinstance(self.table, HybridSNTable) else 3

    @property
    def classes(self) -> int | None:
        """How many the network was drawn for: ImageNet's 1000, CIFAR's 10, or those of the paper's first scene.

        None for a network that answers with an image.
        """
        if isinstance(self.table, DnCNNTable):
            return None
        if isinstance(self.table, HybridSNTable | DSCMRTable):
            return self.table.classes
        return 10 if self.input_size <= 64 else 1000


def _basic(depths: tuple[int, ...], pool: Literal["padded", "ceil"] = "padded") -> ResNetTable:
    """He et al. 2016, Table 1, columns 18 and 34."""
    channels = (64, 128, 256, 512)
    return ResNetTable(depths, channels, channels, block="basic", stem="imagenet", stem_channels=64, pool=pool)


def _bottleneck(depths: tuple[int, ...], inner: int = 64) -> ResNetTable:
    """He et al. 2016, Table 1, columns 50, 101 and 152; ``inner`` is 128 in Zagoruyko and Komodakis 2016."""
    return ResNetTable(depths, _doubling(inner), _doubling(256), "bottleneck", "imagenet", stem_channels=64)


def _resnext(depths: tuple[int, ...], groups: int = 32, group_channels: int = 4) -> ResNetTable:
    """Xie et al. 2017, Table 1: 32 groups of 4 channels in the first stage."""
    inner = _doubling(groups * group_channels)
    return ResNetTable(depths, inner, _doubling(256), "bottleneck", "imagenet", stem_channels=64, groups=groups)


def _caffe(table: ResNetTable) -> ResNetTable:
    """The form of the SE and SK authors' releases: Caffe's pooling, and without groups the stride in the 1×1."""
    return replace(table, pool="ceil", stride_in="1x1" if table.groups == 1 else "3x3")


def _doubling(channels: int) -> tuple[int, ...]:
    return (channels, 2 * channels, 4 * channels, 8 * channels)


_SENET154 = ResNetTable(
    depths=(3, 8, 36, 3),
    reduce=_doubling(128),
    inner=_doubling(256),
    outer=_doubling(256),
    block="bottleneck",
    stem="deep",
    stem_channels=128,
    groups=64,
    shortcut="projection_3x3",
    pool="ceil",
    dropout=0.2,
)
"""Hu et al. 2018, appendix A."""

_MOBILENET_V1 = MobileNetV1Table(stem=(32, 2), rows=((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2)))
_MOBILENET_V2 = MobileNetV2Table(
    stem=(32, 2),
    rows=(
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ),
)
# On images of 32×32 the first convolution keeps the size, in V2 the first two strides do: 2×2 and 4×4 are left.
_MOBILENET_V1_CIFAR = replace(_MOBILENET_V1, stem=(32, 1), input_size=32)
_MOBILENET_V2_CIFAR = replace(
    _MOBILENET_V2,
    stem=(32, 1),
    rows=((1, 16, 1, 1), (6, 24, 2, 1), *_MOBILENET_V2.rows[2:]),
    dropout=0.0,
    input_size=32,
)


def _shufflenet(channels: tuple[int, int, int], head: int = 1024) -> ShuffleNetV2Table:
    """Ma et al. 2018, Table 5."""
    return ShuffleNetV2Table(stem=24, channels=channels, depths=(4, 8, 4), head=head)


def _cifar(blocks: int) -> ResNetTable:
    """He et al. 2016, Sect. 4.2: 6n + 2 layers, n blocks in each of three stages, option-A shortcuts."""
    channels = (16, 32, 64)
    depths = (blocks, blocks, blocks)
    return ResNetTable(depths, channels, channels, "basic", "cifar", 16, shortcut="zero_pad", input_size=32)


def _resnext29(groups: int, group_channels: int) -> ResNetTable:
    """Xie et al. 2017, Sect. 5.3: three stages of three bottlenecks."""
    inner = tuple(groups * group_channels * factor for factor in (1, 2, 4))
    return ResNetTable((3, 3, 3), inner, (256, 512, 1024), "bottleneck", "cifar", 64, groups=groups, input_size=32)


_HE = "He et al. 2016"
_SE = "Hu et al. 2018, Table 2"
_SE_RELEASE = "Hu et al., release of the trained networks"
_SK = "Li et al. 2019, Table 1 and release"
_HOWARD = "Howard et al. 2017"
_SANDLER = "Sandler et al. 2018"
_MA = "Ma et al. 2018, Table 8"
_MA_COUNT = "the paper counts slightly more than convolutions and the classifier"
_IMAGENET = "ImageNet validation, 224×224"
_IMAGENET_299 = "ImageNet validation, 299×299"
_SE_INCEPTION = "of the SE authors' own re-implementation, not of the released definition"
_CIFAR10 = "CIFAR-10 test"
_CIFAR100 = "CIFAR-100 test"
_ROY = "Roy et al. 2020"
_INDIAN_PINES = "Indian Pines test, {} % trained on"


def _se(macs: float, top1: float, top5: float, spec: str | None = None) -> Figures:
    return Figures(_SE, _IMAGENET, macs=macs, top1=top1, top5=top5, spec=spec)


def _se_release(top1: float, top5: float) -> Figures:
    return Figures(_SE_RELEASE, _IMAGENET, top1=top1, top5=top5)


def _sk(parameters: float, macs: float, top1: float) -> Figures:
    return Figures(_SK, _IMAGENET, parameters, macs, top1)


def _he_cifar(parameters: float, top1: float) -> Figures:
    return Figures(f"{_HE}, Table 6", _CIFAR10, parameters, top1=top1)


# The SE paper's ResNets stride in the first 1×1 convolution, as He et al. wrote it, and pool as Caffe does. Ours of
# the plain names stride in the 3×3 and pool with a frame, as today's do; the figures say which spec they are for.
CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("resnet18", "ResNet-18", _basic((2, 2, 2, 2))),
        Entry("resnet34", "ResNet-34", _basic((3, 4, 6, 3))),
        Entry(
            "resnet50",
            "ResNet-50",
            _bottleneck((3, 4, 6, 3)),
            figures=(_se(3.86, 24.8, 7.48, spec="resnet50:stride_in=1x1"),),
        ),
        Entry(
            "resnet101",
            "ResNet-101",
            _bottleneck((3, 4, 23, 3)),
            figures=(_se(7.58, 23.17, 6.52, spec="resnet101:stride_in=1x1"),),
        ),
        Entry(
            "resnet152",
            "ResNet-152",
            _bottleneck((3, 8, 36, 3)),
            figures=(_se(11.3, 22.42, 6.34, spec="resnet152:stride_in=1x1"),),
        ),
        Entry(
            "resnext50_32x4d",
            "ResNeXt-50, 32×4d",
            _resnext((3, 4, 6, 3)),
            figures=(_se(4.24, 22.11, 5.90), _sk(25.0, 4.24, 22.23)),
        ),
        Entry(
            "resnext101_32x4d",
            "ResNeXt-101, 32×4d",
            _resnext((3, 4, 23, 3)),
            figures=(_se(7.99, 21.18, 5.57), _sk(44.3, 7.99, 21.11)),
        ),
        Entry("resnext101_32x8d", "ResNeXt-101, 32×8d", _resnext((3, 4, 23, 3), 32, 8)),
        Entry(
            "resnext101_64x4d",
            "ResNeXt-101, 64×4d",
            _resnext((3, 4, 23, 3), 64, 4),
            figures=(Figures("Hu et al. 2018, Table 3", _IMAGENET, top1=20.4, top5=5.3),),
        ),
        Entry("wide_resnet50_2", "Wide ResNet-50-2", _bottleneck((3, 4, 6, 3), 128)),
        Entry("wide_resnet101_2", "Wide ResNet-101-2", _bottleneck((3, 4, 23, 3), 128)),
        Entry("se_resnet18", "SE-ResNet-18", _basic((2, 2, 2, 2), pool="ceil"), ("se",)),
        Entry("se_resnet34", "SE-ResNet-34", _basic((3, 4, 6, 3), pool="ceil"), ("se",)),
        Entry(
            "se_resnet50",
            "SE-ResNet-50",
            _caffe(_bottleneck((3, 4, 6, 3))),
            ("se",),
            (_se(3.87, 23.29, 6.62), _se_release(22.37, 6.36)),
        ),
        Entry(
            "se_resnet101",
            "SE-ResNet-101",
            _caffe(_bottleneck((3, 4, 23, 3))),
            ("se",),
            (_se(7.60, 22.38, 6.07), _se_release(21.75, 5.72)),
        ),
        Entry(
            "se_resnet152",
            "SE-ResNet-152",
            _caffe(_bottleneck((3, 8, 36, 3))),
            ("se",),
            (_se(11.32, 21.57, 5.73), _se_release(21.34, 5.54)),
        ),
        Entry(
            "se_resnext50_32x4d",
            "SE-ResNeXt-50, 32×4d",
            _caffe(_resnext((3, 4, 6, 3))),
            ("se",),
            (_se(4.25, 21.10, 5.49), _se_release(20.97, 5.54), _sk(27.7, 4.25, 21.12)),
        ),
        Entry(
            "se_resnext101_32x4d",
            "SE-ResNeXt-101, 32×4d",
            _caffe(_resnext((3, 4, 23, 3))),
            ("se",),
            (_se(8.00, 20.70, 5.01), _se_release(19.81, 4.96), _sk(49.2, 8.00, 20.58)),
        ),
        Entry("se_resnext26_32x4d", "SE-ResNeXt-26, 32×4d", _caffe(_resnext((2, 2, 2, 2))), ("se",)),
        Entry(
            "senet154",
            "SENet-154",
            _SENET154,
            ("se",),
            (
                Figures("Hu et al. 2018, Table 3 and release", _IMAGENET, 115.0, 20.7, 18.68, 4.47),
                Figures("Hu et al. 2018, Table 3", "ImageNet validation, 320×320", top1=17.28, top5=3.79),
            ),
        ),
        Entry("sknet26", "SKNet-26", _caffe(_resnext((2, 2, 2, 2))), ("sk",)),
        Entry("sknet50", "SKNet-50", _caffe(_resnext((3, 4, 6, 3))), ("sk",), (_sk(27.5, 4.47, 20.79),)),
        Entry("sknet101", "SKNet-101", _caffe(_resnext((3, 4, 23, 3))), ("sk",), (_sk(48.9, 8.46, 20.19),)),
        Entry("bn_inception", "BN-Inception", BN_INCEPTION, figures=(_se(2.03, 25.38, 7.89),)),
        Entry(
            "se_bn_inception",
            "SE-BN-Inception",
            BN_INCEPTION,
            ("se",),
            (_se(2.04, 24.23, 7.14), _se_release(23.62, 7.04)),
        ),
        Entry(
            "inception_resnet_v2",
            "Inception-ResNet-v2",
            INCEPTION_RESNET_V2,
            figures=(
                Figures("released definition", _IMAGENET_299, 55.8, 13.16),
                Figures("Szegedy et al. 2016", "ImageNet validation, 299×299, non-blacklisted", top1=19.9, top5=4.9),
                Figures(_SE, _IMAGENET_299, macs=11.75, top1=20.37, top5=5.21, note=_SE_INCEPTION),
            ),
        ),
        Entry(
            "se_inception_resnet_v2",
            "SE-Inception-ResNet-v2",
            INCEPTION_RESNET_V2,
            ("se",),
            (Figures(_SE, _IMAGENET_299, macs=11.76, top1=19.80, top5=4.79, note=_SE_INCEPTION),),
        ),
        Entry(
            "mobilenet_v1",
            "MobileNet V1",
            _MOBILENET_V1,
            figures=(
                Figures(f"{_HOWARD}, Table 8", _IMAGENET, 4.2, 0.569, 29.4),
                Figures(f"{_HOWARD}, Table 6", _IMAGENET, 2.6, 0.325, 31.6, spec="mobilenet_v1:width=0.75"),
                Figures(f"{_HOWARD}, Table 6", _IMAGENET, 1.3, 0.149, 36.3, spec="mobilenet_v1:width=0.5"),
                Figures(f"{_HOWARD}, Table 6", _IMAGENET, 0.5, 0.041, 49.4, spec="mobilenet_v1:width=0.25"),
            ),
        ),
        Entry(
            "mobilenet_v2",
            "MobileNet V2",
            _MOBILENET_V2,
            figures=(
                Figures(f"{_SANDLER}, Table 4", _IMAGENET, 3.4, 0.300, 28.0, note="the release has 3.5 M parameters"),
                Figures("torchvision, trained network", _IMAGENET, 3.505, 0.301, 28.122, 9.714),
                Figures(
                    f"{_SANDLER}, Table 4",
                    _IMAGENET,
                    6.9,
                    0.585,
                    25.3,
                    spec="mobilenet_v2:width=1.4",
                    note="the release has 6.1 M parameters",
                ),
            ),
        ),
        Entry("mobilenet_v1_cifar", "MobileNet V1 for CIFAR", _MOBILENET_V1_CIFAR),
        Entry("mobilenet_v2_cifar", "MobileNet V2 for CIFAR", _MOBILENET_V2_CIFAR),
        Entry(
            "shufflenet_v2_x0_5",
            "ShuffleNet V2, 0.5×",
            _shufflenet((48, 96, 192)),
            figures=(
                Figures(_MA, _IMAGENET, macs=0.041, top1=39.7, note=_MA_COUNT),
                Figures("torchvision, trained network", _IMAGENET, 1.367, 0.0405, 39.448, 18.254),
            ),
        ),
        Entry(
            "shufflenet_v2_x1_0",
            "ShuffleNet V2, 1×",
            _shufflenet((116, 232, 464)),
            figures=(
                Figures(_MA, _IMAGENET, macs=0.146, top1=30.6),
                Figures("torchvision, trained network", _IMAGENET, 2.279, 0.145, 30.638, 11.684),
            ),
        ),
        Entry(
            "shufflenet_v2_x1_5",
            "ShuffleNet V2, 1.5×",
            _shufflenet((176, 352, 704)),
            figures=(
                Figures(_MA, _IMAGENET, macs=0.299, top1=27.4, note=_MA_COUNT),
                Figures("torchvision, trained network", _IMAGENET, 3.504, 0.296, 27.004, 8.914),
            ),
        ),
        Entry(
            "shufflenet_v2_x2_0",
            "ShuffleNet V2, 2×",
            _shufflenet((244, 488, 976), head=2048),
            figures=(
                Figures(_MA, _IMAGENET, macs=0.591, top1=25.1, note=_MA_COUNT),
                Figures("torchvision, trained network", _IMAGENET, 7.394, 0.583, 23.77, 6.994),
            ),
        ),
        Entry("resnet20", "ResNet-20", _cifar(3), figures=(_he_cifar(0.27, 8.75),)),
        Entry("resnet32", "ResNet-32", _cifar(5), figures=(_he_cifar(0.46, 7.51),)),
        Entry("resnet44", "ResNet-44", _cifar(7), figures=(_he_cifar(0.66, 7.17),)),
        Entry("resnet56", "ResNet-56", _cifar(9), figures=(_he_cifar(0.85, 6.97),)),
        Entry("resnet110", "ResNet-110", _cifar(18), figures=(_he_cifar(1.7, 6.43),)),
        Entry(
            "resnext29_16x64d",
            "ResNeXt-29, 16×64d",
            _resnext29(16, 64),
            figures=(
                Figures("Xie et al. 2017, Table 7", _CIFAR10, 68.1, top1=3.58),
                Figures("Xie et al. 2017, Table 7", _CIFAR100, 68.1, top1=17.31),
            ),
        ),
        Entry(
            "sknet29",
            "SKNet-29 on ResNeXt-29, 16×32d",
            _resnext29(16, 32),
            ("sk:branches=1-3,reduction=32",),
            (
                Figures("Li et al. 2019, Table 5", _CIFAR10, 27.7, top1=3.47),
                Figures("Li et al. 2019, Table 5", _CIFAR100, 27.7, top1=17.33),
            ),
        ),
        # Roy et al. have no batch norm; the figures are of their network. The other two are for comparison with it.
        Entry(
            "hybridsn",
            "HybridSN",
            HybridSNTable(spectral=(7, 5, 3), widths=(8, 16, 32, 64)),
            figures=(
                Figures(_ROY, _INDIAN_PINES.format(30), 5.122176, top1=0.25, spec="hybridsn:norm=none,dropout=0.4"),
                Figures(_ROY, _INDIAN_PINES.format(10), 5.122176, top1=1.61, spec="hybridsn:norm=none,dropout=0.4"),
            ),
        ),
        Entry("hybridsn_2d", "HybridSN in two dimensions", HybridSNTable(spectral=(), widths=(96, 160, 256, 64))),
        Entry(
            "hybridsn_3d",
            "HybridSN in three dimensions",
            HybridSNTable(spectral=(7, 5, 3, 3), widths=(8, 16, 32, 4)),
        ),
        # Zhang et al. 2017, Sect. IV-B: 17 layers for one level of noise, 20 for all others; patches of 40 and 50.
        Entry("dncnn_s", "DnCNN-S, for one level of noise", DnCNNTable()),
        Entry("dncnn_b", "DnCNN-B, for any level of noise", DnCNNTable(depth=20, input_size=50)),
        Entry("dncnn_color", "CDnCNN-B, in colour", DnCNNTable(depth=20, in_channels=3, input_size=50)),
        Entry("dncnn_3", "DnCNN-3, for noise, upscaling and JPEG", DnCNNTable(depth=20, input_size=50)),
        Entry("dscmr", "DSCMR, for images and texts in one space", DSCMRTable()),
    )
}

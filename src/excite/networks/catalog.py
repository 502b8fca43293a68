"""The networks that excite knows by name: their tables and what the papers say of them, as plain data.

Imports no torch, so that ``excite networks`` answers at once.

Costs are multiply–adds (MACs), in units of 10⁹: what the papers call GFLOPs. Errors are percentages on the
validation or test images, single crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from excite.networks.tables import ResNetTable


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
    """

    source: str
    data: str
    parameters: float | None = None
    macs: float | None = None
    top1: float | None = None
    top5: float | None = None
    spec: str | None = None


@dataclass(frozen=True)
class Entry:
    """A name, what it stands for and what is published about it.

    Args:
        units: the units that belong to the network, each as the text that follows a ``+`` in a spec.
    """

    name: str
    title: str
    table: ResNetTable
    units: tuple[str, ...] = ()
    figures: tuple[Figures, ...] = ()
    family: str = "resnet"

    @property
    def input_size(self) -> int:
        """Side of the square images that the network was drawn for."""
        return self.table.input_size


def _basic(depths: tuple[int, ...]) -> ResNetTable:
    """He et al. 2016, Table 1, columns 18 and 34."""
    channels = (64, 128, 256, 512)
    return ResNetTable(depths, channels, channels, block="basic", stem="imagenet", stem_channels=64)


def _bottleneck(depths: tuple[int, ...], stride_in: Literal["3x3", "1x1"] = "3x3") -> ResNetTable:
    """He et al. 2016, Table 1, columns 50, 101 and 152."""
    inner, outer = (64, 128, 256, 512), (256, 512, 1024, 2048)
    return ResNetTable(depths, inner, outer, "bottleneck", "imagenet", stem_channels=64, stride_in=stride_in)


def _resnext(depths: tuple[int, ...]) -> ResNetTable:
    """Xie et al. 2017, Table 1: 32 groups of 4 channels in the first stage."""
    inner, outer = (128, 256, 512, 1024), (256, 512, 1024, 2048)
    return ResNetTable(depths, inner, outer, "bottleneck", "imagenet", stem_channels=64, groups=32)


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
_IMAGENET = "ImageNet validation, 224×224"
_CIFAR10 = "CIFAR-10 test"
_CIFAR100 = "CIFAR-100 test"


def _se(macs: float, top1: float, top5: float, spec: str | None = None) -> Figures:
    return Figures(_SE, _IMAGENET, macs=macs, top1=top1, top5=top5, spec=spec)


def _se_release(top1: float, top5: float) -> Figures:
    return Figures(_SE_RELEASE, _IMAGENET, top1=top1, top5=top5)


def _sk(parameters: float, macs: float, top1: float) -> Figures:
    return Figures(_SK, _IMAGENET, parameters, macs, top1)


def _he_cifar(parameters: float, top1: float) -> Figures:
    return Figures(f"{_HE}, Table 6", _CIFAR10, parameters, top1=top1)


# The SE paper's ResNets stride in the first 1×1 convolution, as He et al. wrote it. Ours of the plain names stride
# in the 3×3, as today's do; the figures say which spec they are for.
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
        Entry("se_resnet18", "SE-ResNet-18", _basic((2, 2, 2, 2)), ("se",)),
        Entry("se_resnet34", "SE-ResNet-34", _basic((3, 4, 6, 3)), ("se",)),
        Entry(
            "se_resnet50",
            "SE-ResNet-50",
            _bottleneck((3, 4, 6, 3), stride_in="1x1"),
            ("se",),
            (_se(3.87, 23.29, 6.62), _se_release(22.37, 6.36)),
        ),
        Entry(
            "se_resnet101",
            "SE-ResNet-101",
            _bottleneck((3, 4, 23, 3), stride_in="1x1"),
            ("se",),
            (_se(7.60, 22.38, 6.07), _se_release(21.75, 5.72)),
        ),
        Entry(
            "se_resnet152",
            "SE-ResNet-152",
            _bottleneck((3, 8, 36, 3), stride_in="1x1"),
            ("se",),
            (_se(11.32, 21.57, 5.73), _se_release(21.34, 5.54)),
        ),
        Entry(
            "se_resnext50_32x4d",
            "SE-ResNeXt-50, 32×4d",
            _resnext((3, 4, 6, 3)),
            ("se",),
            (_se(4.25, 21.10, 5.49), _se_release(20.97, 5.54), _sk(27.7, 4.25, 21.12)),
        ),
        Entry(
            "se_resnext101_32x4d",
            "SE-ResNeXt-101, 32×4d",
            _resnext((3, 4, 23, 3)),
            ("se",),
            (_se(8.00, 20.70, 5.01), _se_release(19.81, 4.96), _sk(49.2, 8.00, 20.58)),
        ),
        Entry("sknet26", "SKNet-26", _resnext((2, 2, 2, 2)), ("sk",)),
        Entry("sknet50", "SKNet-50", _resnext((3, 4, 6, 3)), ("sk",), (_sk(27.5, 4.47, 20.79),)),
        Entry("sknet101", "SKNet-101", _resnext((3, 4, 23, 3)), ("sk",), (_sk(48.9, 8.46, 20.19),)),
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
    )
}

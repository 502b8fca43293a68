"""From a table to a network: which builder and which arguments belong to which kind of table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from excite.networks import bn_inception, dncnn, dscmr, hybridsn, inception_resnet, mobilenet, resnet, shufflenet
from excite.networks.tables import (
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


@dataclass(frozen=True)
class Family:
    """Networks that are built alike.

    Attributes:
        build: ``build(table, num_classes, in_channels, *, convolution, join)`` → network.
        adjusted: ``adjusted(table, *, …)`` → table; its keyword-only parameters are the arguments of a spec.
        place: ``place(stage, is_kernel)`` → the name of the module that a unit of this stage is attached to, where
            the usual places of networks are none of these networks'.
    """

    build: Callable[..., nn.Module]
    adjusted: Callable[..., Any]
    place: Callable[[int, bool], str] | None = None


FAMILIES: dict[type, Family] = {
    ResNetTable: Family(resnet.resnet, resnet.adjusted),
    MobileNetV1Table: Family(mobilenet.mobilenet_v1, mobilenet.adjusted_v1),
    MobileNetV2Table: Family(mobilenet.mobilenet_v2, mobilenet.adjusted_v2),
    BNInceptionTable: Family(bn_inception.bn_inception, bn_inception.adjusted),
    InceptionResNetTable: Family(inception_resnet.inception_resnet_v2, inception_resnet.adjusted),
    ShuffleNetV2Table: Family(shufflenet.shufflenet_v2, shufflenet.adjusted),
    HybridSNTable: Family(hybridsn.hybridsn, hybridsn.adjusted),
    DnCNNTable: Family(dncnn.dncnn, dncnn.adjusted, dncnn.place),
    DSCMRTable: Family(dscmr.dscmr, dscmr.adjusted, dscmr.place),
}

"""How fast known GPUs train, as published; other networks by their multiply–adds. Imports no torch.

NVIDIA: DeepLearningExamples, PyTorch/Classification/ConvNets, the README files of resnet50v1.5 and
se-resnext101-32x4d, "Training performance results", one GPU of a DGX-1 16GB (V100, FP32) and of a DGX A100 80GB
(A100, TF32 and mixed precision), container 21.03. In PyTorch an A100's convolutions in fp32 are TF32 unless that is
switched off.

Titan X: Hu et al., arXiv 1709.01507, Sect. 4: 209 ms for the forward and backward pass of 256 images through
SE-ResNet-50 on a server of 8.

A network of another cost is taken to be as many times slower as it has more multiply–adds than the published one of
its kind, with grouped convolutions or without. It is the roughest part of a plan: ResNeXt-101, 32×4d, is published
with 150 images per second on a V100 in FP32, and comes to 132 so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from excite.errors import UsageError, nearest
from excite.verbs.plan_model import Device

LAUNCH = 60e-6
"""Seconds that the host needs to start one layer of a forward pass in eager mode. From the same README files: one
image takes a V100 10.4 ms through ResNet-50 (175 layers as they are counted here: 59 µs each), 21.0 ms through
ResNeXt-101 (345: 61 µs) and 24.9 ms through SE-ResNeXt-101 (477: 52 µs); eight images take it hardly longer."""

PASSES = 3
"""A training step starts about as many kernels as three forward passes."""


@dataclass(frozen=True)
class Published:
    """Images per second of a training step, and the network that it was: its multiply–adds for one image."""

    rate: float
    macs: float


_RESNET_50, _SE_RESNEXT_101, _SE_RESNET_50 = 4.089e9, 8.0e9, 3.86e9


@dataclass(frozen=True)
class Gpu:
    """A GPU in a server of eight.

    Args:
        memory: bytes.
        inner_link: bytes per second each way between the GPUs of a server, as printed.
        plain: by precision, a network without grouped convolutions.
        grouped: by precision, one with them.
    """

    memory: float
    inner_link: float
    plain: dict[str, Published]
    grouped: dict[str, Published]


_TITAN_X = {"fp32": Published(256 / 0.209 / 8, _SE_RESNET_50)}
GPUS = {
    "a100": Gpu(
        memory=80e9,
        inner_link=300e9,
        plain={"fp32": Published(938, _RESNET_50), "bf16": Published(2470, _RESNET_50)},
        grouped={"fp32": Published(395, _SE_RESNEXT_101), "bf16": Published(855, _SE_RESNEXT_101)},
    ),
    "v100": Gpu(
        memory=16e9,
        inner_link=150e9,
        plain={"fp32": Published(367, _RESNET_50)},
        grouped={"fp32": Published(132, _SE_RESNEXT_101)},
    ),
    "titan-x": Gpu(memory=12e9, inner_link=16e9, plain=_TITAN_X, grouped=_TITAN_X),
}


def gpu(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        UsageError: no figures for it are known here.
    """
    if name not in GPUS:
        hint = nearest(name, list(GPUS))
        raise UsageError(f"no published rates of '{name}' are known here; {hint or 'there are: ' + ', '.join(GPUS)}")
    return GPUS[name]


def published_device(
    name: str, *, macs: float, layers: int, grouped: bool, precision: Literal["fp32", "bf16"]
) -> Device:
    """How fast a GPU trains a network.

    Args:
        name: of the GPU, see :data:`GPUS`.
        macs: of the network's forward pass of one image.
        layers: modules that do the work, each of which the host has to start.
        grouped: whether most of its convolutions have groups.
        precision: the recipe's.

    Raises:
        UsageError: no figures for that GPU, or for that precision.
    """
    known = gpu(name).grouped if grouped else gpu(name).plain
    if precision not in known:
        raise UsageError(f"no rates in {precision} are known for '{name}': set trainer.precision={next(iter(known))}")
    anchor = known[precision]
    return Device(rate=anchor.rate * anchor.macs / macs, floor=PASSES * LAUNCH * layers)

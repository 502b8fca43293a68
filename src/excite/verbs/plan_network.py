"""What a plan must know of a network: its size, what a step keeps, and how fast a step is here."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from excite.cost import cost
from excite.create import create, for_window
from excite.errors import ExciteError
from excite.memory_format import to_channels_last
from excite.verbs.plan_model import Device

MOST_IMAGES = 8
"""In a trial step on a processor; half and all of them tell what a step costs besides its images."""

LEAST_IMAGES = 4
"""In a trial step on an accelerator: it takes as long as the host needs to start its kernels."""

TRIAL_SECONDS = 3.0


@dataclass(frozen=True)
class Profile:
    """A network by its numbers.

    Attributes:
        parameters: how many are trained.
        macs: multiply–adds of the forward pass of one image.
        layers: modules without children.
        norms: the channels of each batch norm.
        grouped: whether most of its convolutions larger than 1×1 have groups.
        kept: bytes that autograd keeps of each image for the backward pass, its input included.
        kept_once: bytes that it keeps whatever the images.
        largest: bytes of the largest map of one image.
    """

    parameters: int
    macs: int
    layers: int
    norms: tuple[int, ...]
    grouped: bool
    kept: int
    kept_once: int
    largest: int


def profile(spec: str, classes: int, size: int, channels: int, precision: str) -> Profile:
    """Count a network without doing its arithmetic.

    Args:
        spec: of the network.
        classes: that it tells apart.
        size: of its square input, in pixels.
        channels: of its input.
        precision: ``fp32`` or ``bf16``, of the maps.

    Raises:
        UsageError: the network does not take such an input.
    """
    network = create(for_window(spec, size), classes, channels)
    counted = cost(network, (channels, size, size))
    mode = FakeTensorMode()
    hollow = without_contents(network, mode).train()
    with mode:
        few, largest = kept_bytes(hollow, torch.empty(2, channels, size, size), precision)
        more, _ = kept_bytes(hollow, torch.empty(4, channels, size, size), precision)
    leaves = [module for module in network.modules() if not list(module.children())]
    convolutions = [module for module in leaves if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)]
    return Profile(
        parameters=sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        macs=counted.macs,
        layers=len([module for module in leaves if not isinstance(module, nn.Identity | nn.Dropout)]),
        norms=tuple(m.num_features for m in leaves if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)),
        grouped=sum(module.groups > 1 for module in convolutions) > len(convolutions) / 2,
        kept=(more - few) // 2,
        kept_once=2 * few - more,
        largest=largest // 2,
    )


def without_contents(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same modules with tensors that have shapes and storages, but no memory behind them."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})


def kept_bytes(network: nn.Module, images: Tensor, precision: str = "fp32") -> tuple[int, int]:
    """The bytes that a training-mode forward pass keeps for the backward pass, and those of its largest map.

    Each storage is counted once, the images are counted, parameters and buffers are not. With tensors that have no
    contents the units take their plain form, as they do on a GPU.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensors are held, so that no storage's number is given out twice
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), tensor.detach()
            if len(tensor.shape) == 4 and len(tensor) == len(images):
                largest = max(largest, storage.nbytes())
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        network(images)
    return sum(size for size, _ in kept.values()), largest


def measured_device(
    spec: str, classes: int, size: int, channels: int, device: torch.device, precision: str, images: int
) -> Device:
    """How fast this machine trains a network: steps of few and of many images, timed.

    Args:
        spec: of the network.
        classes: that it tells apart.
        size: of its square input, in pixels.
        channels: of its input.
        device: where to train.
        precision: ``fp32`` or ``bf16``.
        images: the micro-batch that is planned for. An accelerator is timed with it, or with as many as fit into its
            memory: its time does not grow evenly with the images.

    Raises:
        ExciteError: not even :data:`LEAST_IMAGES` fit.
    """
    network = create(for_window(spec, size), classes, channels).to(device).train()
    to_channels_last(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)

    def seconds(images: int) -> float:
        return step_seconds(network, optimizer, images, (channels, size, size), classes, device, precision)

    if device.type == "cpu":
        return fitted(MOST_IMAGES, seconds(MOST_IMAGES // 2), seconds(MOST_IMAGES))
    try:
        floor = seconds(LEAST_IMAGES)
        many = max(images, 2 * LEAST_IMAGES)
        while True:
            try:
                return fitted(many, seconds(many // 2), seconds(many), floor)
            except torch.OutOfMemoryError:
                if many == 2 * LEAST_IMAGES:
                    raise
                many = max(many // 2, 2 * LEAST_IMAGES)
    except torch.OutOfMemoryError:
        raise ExciteError(f"{device} has too little memory for {2 * LEAST_IMAGES} images through {spec}.") from None


def fitted(many: int, half: float, whole: float, floor: float = 0.0) -> Device:
    """The rate and the fixed part of a device that takes so many seconds for half of many images, and for all.

    Args:
        many: images.
        half: seconds of a step with half of them.
        whole: likewise with all of them.
        floor: seconds of a step of a few.
    """
    per_image = max((whole - half) / (many - many // 2), 0.5 * whole / many)  # two timings may come in either order
    return Device(rate=1 / per_image, fixed=max(0.0, whole - many * per_image), floor=floor)


def step_seconds(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: int,
    shape: tuple[int, int, int],
    classes: int,
    device: torch.device,
    precision: str = "fp32",
) -> float:
    """The median time of a training step on random images."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(images, *shape, generator=generator).to(device, memory_format=torch.channels_last)
    target = torch.randint(classes, (images,), generator=generator).to(device)
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < 3 or (time.perf_counter() - begin < TRIAL_SECONDS and len(seconds) < 50):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss: Any = nn.functional.cross_entropy(network(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        float(loss.detach())
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[len(seconds[1:]) // 2]

"""``plan``: what a cluster would take for a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from excite.data import ImageData
from excite.errors import UsageError
from excite.networks.catalog import CATALOG
from excite.spec import parse_spec
from excite.training.bars import bar
from excite.training.fit import pick_device
from excite.training.recipe import Recipe, load
from excite.training.recipe_data import load_recipe_data
from excite.verbs.plan_devices import gpu, published_device
from excite.verbs.plan_model import Cluster, Device, Footprint, Work, grown, step, stops_at
from excite.verbs.plan_network import Profile, measured_device, profile

LINK_SHARE = 0.8
"""What of a link's printed rate a ring of all-reduces is taken to reach."""

EFFICIENCY = 0.35
"""What of a device's printed peak a convolutional network is taken to reach."""

SIZES = tuple(2**power for power in range(10))
"""The numbers of devices in the table of a plan: 1 to 512."""

KNOWN_SETS = {
    "imagenet": (1_281_167, 1000),  # ILSVRC 2012
    "places365": (8_026_628, 365),  # Places365-Challenge, from its development kit
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
}
"""Training images and classes of sets that a plan can be made for before they are there."""


@dataclass(frozen=True)
class Facts:
    """What a plan must know of the data."""

    images: int
    classes: int
    size: int
    channels: int


def plan(
    recipe: Recipe | str | Path,
    *,
    nodes: int = 1,
    devices: int = 8,
    link: float = 12.5e9,
    inner_link: float | None = None,
    gpu_name: str | None = None,
    device_rate: float | None = None,
    peak: float | None = None,
    efficiency: float = EFFICIENCY,
    memory: float | None = None,
    images: int | None = None,
    classes: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Predict step time, traffic, memory and duration of a recipe on a cluster, and where it stops scaling.

    The model is :mod:`excite.verbs.plan_model`. Without ``gpu_name``, ``device_rate`` and ``peak`` a step is timed on
    this machine, and the cluster is one of such machines.

    Args:
        recipe: what is to be trained, or a recipe's name or file.
        nodes: how many.
        devices: in each.
        link: bytes per second of a node's network, each way, as printed.
        inner_link: likewise between the devices of a node; by default the GPU's own, else 16 GB/s (PCIe 3.0).
        gpu_name: published rates of this GPU, one of :data:`excite.verbs.plan_devices.GPUS`.
        device_rate: images per second that one device trains of this network.
        peak: floating-point operations per second that one device has, as printed.
        efficiency: what of ``peak`` the network reaches.
        memory: bytes of one device; by default the GPU's, that of this machine where a step is timed on it.
        images: training images in an epoch; by default those of the recipe's data, if they are there.
        classes: likewise.
        progress: show bars on stderr.

    Returns:
        ``network``, ``parameters``, ``macs``, ``images``, ``epochs``, ``batch``, ``nodes``, ``devices``; ``device``,
        how many images it trains in a second, one micro-batch after the other, and where that is known from;
        ``step``, its parts in milliseconds and bytes; ``memory`` of a device, in bytes; ``images_per_second``,
        ``hours_per_epoch``, ``hours``, ``efficiency`` (over as many single devices); ``scaling``, the same for 1 to
        512 devices; ``stops_at``, the number beyond which more devices bring little.

    Raises:
        UsageError: numbers that make no cluster, more than one source of the device's rate, data of an unknown size,
            or a recipe that is not for images with classes.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    if sum(given is not None for given in (gpu_name, device_rate, peak)) > 1:
        raise UsageError("give one of the GPU's name, its rate and its peak")
    _check(nodes=nodes, devices=devices, link=link, inner_link=inner_link, memory=memory, images=images)
    _check(classes=classes, device_rate=device_rate, peak=peak, efficiency=efficiency)
    settings = recipe.trainer
    size = nodes * devices
    if 2 * size > settings.batch_size:
        raise UsageError(
            f"{size} devices are too many for trainer.batch_size={settings.batch_size}: each needs two images"
        )
    if over := settings.batch_size % size:
        near = settings.batch_size - over
        raise UsageError(
            f"trainer.batch_size={settings.batch_size} does not divide among {size} devices: "
            f"take {near} or {near + size}"
        )
    precision = "bf16" if settings.precision == "bf16" else "fp32"
    facts = facts_of(recipe, images, classes)
    counted = profile(recipe.network.spec, facts.classes, facts.size, facts.channels, precision)
    known = gpu(gpu_name) if gpu_name else None
    micro = min(settings.batch_size // size, settings.micro_batch or settings.batch_size)
    device, source = _device(
        recipe, facts, counted, precision, gpu_name, device_rate, peak, efficiency, micro, progress
    )
    cluster = Cluster(
        nodes, devices, LINK_SHARE * link, LINK_SHARE * (inner_link or (known.inner_link if known else 16e9))
    )
    memory = memory or (known.memory if known else None) or _own_memory(recipe, gpu_name or device_rate or peak)
    result = predicted(recipe, facts, counted, device, cluster, memory)
    micro = result["step"]["micro_batch"]
    return result | {"device": {"source": source, "images_per_second": micro / device.seconds(micro)}}


def predicted(
    recipe: Recipe, facts: Facts, counted: Profile, device: Device, cluster: Cluster, memory: float | None
) -> dict[str, Any]:
    """The plan for a device whose rate is known; as :func:`plan`, without ``device``."""
    settings = recipe.trainer
    sharded = settings.strategy == "fsdp"
    work = Work(counted.parameters, counted.norms if settings.sync_batch_norm else (), sharded)
    needs = Footprint(
        counted.parameters,
        slots=2 if recipe.optimizer.name == "adamw" else int(recipe.optimizer.momentum > 0),
        average=settings.ema_decay is not None,
        per_image=counted.kept + 2 * counted.largest,
        fixed=counted.kept_once,
    )

    def row(size: int) -> dict[str, Any]:
        fits = needs.largest_micro_batch(memory, size, sharded) if memory else None
        limits = [limit for limit in (settings.micro_batch, fits) if limit]
        of_one = settings.batch_size // size
        micro = min([of_one, *limits])
        done = step(work, device, grown(cluster, size), settings.batch_size, micro)
        alone = step(work, device, grown(cluster, 1), settings.batch_size, min([settings.batch_size, *limits]))
        steps = -(-facts.images // settings.batch_size)
        return {
            "devices": size,
            "nodes": grown(cluster, size).nodes,
            "images_per_device": done.images,
            "micro_batch": -(-done.images // done.rounds),
            "rounds": done.rounds,
            "compute_ms": 1000 * done.compute,
            "reduce_ms": 1000 * done.reduce,
            "exposed_ms": 1000 * done.exposed,
            "norms_ms": 1000 * done.norms,
            "ms": 1000 * done.seconds,
            "bytes": done.bytes,
            "norm_bytes": done.norm_bytes,
            "images_per_second": settings.batch_size / done.seconds,
            "efficiency": alone.seconds / (size * done.seconds),
            "hours_per_epoch": steps * done.seconds / 3600,
            "hours": settings.epochs * steps * done.seconds / 3600,
            "largest_micro_batch": fits,
        }

    wanted = row(cluster.size)
    sizes = [size for size in SIZES if settings.batch_size % size == 0 and 2 * size <= settings.batch_size]
    table = [row(size) for size in sizes]
    stop, why = stops_at(sizes, [one["ms"] for one in table], settings.batch_size)
    state = needs.state(cluster.size, sharded)
    kept = wanted["micro_batch"] * needs.per_image + needs.fixed
    over_all = ("images_per_second", "efficiency", "hours_per_epoch", "hours")
    return {
        "network": recipe.network.spec,
        "parameters": counted.parameters,
        "macs": counted.macs,
        "images": facts.images,
        "epochs": settings.epochs,
        "batch": settings.batch_size,
        "nodes": cluster.nodes,
        "devices": cluster.devices,
        "step": {key: value for key, value in wanted.items() if key not in (*over_all, "largest_micro_batch")},
        "memory": {
            **state,
            "activations": kept,
            "reserve": needs.reserve,
            "total": sum(state.values()) + kept + needs.reserve,
            "device": memory,
            "largest_micro_batch": wanted["largest_micro_batch"],
        },
        **{key: wanted[key] for key in over_all},
        "scaling": table,
        "stops_at": {"devices": stop, "why": why},
    }


def facts_of(recipe: Recipe, images: int | None = None, classes: int | None = None) -> Facts:
    """The size of a recipe's data: what is given, what is known of sets by their name, or what is there.

    Raises:
        UsageError: it is not known, or not of images with classes.
    """
    spec = parse_spec(recipe.network.spec)
    entry = None if spec.source else CATALOG.get(spec.name)
    size = recipe.data.image_size or (entry.input_size if entry else 224)
    path = Path(recipe.data.path)
    known = KNOWN_SETS.get(path.name) if not path.exists() else None
    if known is None and not (images and classes):
        try:
            data = load_recipe_data(recipe)
        except UsageError as error:
            raise UsageError(f"how many training images and classes? Give both, or the data: {error}") from None
        if not isinstance(data, ImageData) or data.train is None:
            raise UsageError(f"'{recipe.data.path}' has no training images with classes, and plans are for those")
        known = len(data.train.labels), len(data.classes)
        size = recipe.data.image_size or data.preprocessing.size
    counts = known or (0, 0)
    return Facts(images or counts[0], classes or counts[1], size, 3)


def _check(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise UsageError(f"{name.replace('_', ' ')} is {value}: it must be above 0")


def _own_memory(recipe: Recipe, elsewhere: object) -> float | None:
    """The bytes of this machine's GPU, if the plan is for such GPUs."""
    here = None if elsewhere else pick_device(recipe.trainer.device)
    return None if here is None or here.type != "cuda" else float(torch.cuda.get_device_properties(here).total_memory)


def _device(
    recipe: Recipe,
    facts: Facts,
    counted: Profile,
    precision: Any,
    gpu_name: str | None,
    device_rate: float | None,
    peak: float | None,
    efficiency: float,
    micro: int,
    progress: bool,
) -> tuple[Device, str]:
    """How fast a device is, and where that is known from."""
    if gpu_name:
        device = published_device(
            gpu_name, macs=counted.macs, layers=counted.layers, grouped=counted.grouped, precision=precision
        )
        source = f"published rates of {gpu_name}, by multiply–adds"
    elif device_rate:
        device, source = Device(device_rate), "given"
    elif peak:
        # A multiply–add is two operations, and a step does those of the forward pass three times.
        device, source = Device(peak * efficiency / (6 * counted.macs)), f"{efficiency:.0%} of the peak given"
    else:
        with bar("timing steps", progress):
            here = pick_device(recipe.trainer.device)
            device = measured_device(
                recipe.network.spec, facts.classes, facts.size, facts.channels, here, precision, micro
            )
        source = f"measured on this machine ({here.type})"
    return device, source

"""The arithmetic of data-parallel training: what a step takes on so many devices. Imports no torch.

One step of synchronous SGD over W devices. Each works through its share of the batch, in rounds of a micro-batch; the
gradients are then averaged, bucket by bucket, while the last backward pass still runs.

* A round of b images: t(b) = max(floor, fixed + b / rate). Of it the backward pass is two thirds: it has the
  multiply–adds of the forward pass twice, for the gradients of the maps and of the weights.
* A ring all-reduce of S bytes over n devices sends and receives 2 (n − 1) / n · S at each of them (Patarasuk & Yuan,
  "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009; the "bus bandwidth" of NVIDIA's
  nccl-tests). A ring through several nodes crosses each node's link once: the slower of the two kinds of link counts.
* Its start takes 2 ⌈log₂ n⌉ messages, up a tree and down again, which is how NCCL and gloo keep latency low for many
  devices.
* PyTorch's DistributedDataParallel reduces buckets of 25 MiB, the first of 1 MiB, as they become ready (Li et al.,
  "PyTorch Distributed", VLDB 2020, arXiv 2006.15704). With m equal buckets that become ready evenly over a backward
  pass of B seconds, and c seconds each on the wire, the last is done after max(B + c, B / m + m c).
* Synchronised batch norm waits twice for every norm and round, for means and variances on the way forward and for
  their gradients on the way back, and nothing can hide that.
* Fully sharded training gathers the parameters twice, for the forward and the backward pass, and scatters the
  gradients: half as much again on the wire as an all-reduce, in every round (Zhao et al., "PyTorch FSDP", VLDB 2023,
  arXiv 2304.11277).

What is left out: devices that wait for the slowest, other traffic on the links, and the input, which has to keep up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

BUCKET = 25 * 2**20
"""Bytes: DistributedDataParallel's ``bucket_cap_mb``."""

BACKWARD = 2 / 3
"""The backward pass's share of a step."""

FEWEST_IMAGES = 8
"""On one device: with fewer its arithmetic units are idle, and batch norm's own statistics are noise."""

LEAST_GAIN = 1.5
"""What twice as many devices must bring, to be worth it."""


@dataclass(frozen=True)
class Device:
    """How fast a device trains one network: t(b) = max(floor, fixed + b / rate) seconds for b images.

    Args:
        rate: images per second in a long step.
        fixed: seconds of every step that do not depend on the images, such as the optimiser's.
        floor: seconds below which no step comes, because the host cannot start its kernels faster.
    """

    rate: float
    fixed: float = 0.0
    floor: float = 0.0

    def seconds(self, images: float) -> float:
        """Of the forward and backward pass of so many images."""
        return max(self.floor, self.fixed + images / self.rate)


@dataclass(frozen=True)
class Cluster:
    """So many nodes of so many devices, and what lies between them.

    Args:
        link: bytes per second that a node can send while it receives as many: what is reached, not what is printed
            on the cable.
        inner_link: likewise of a device inside a node.
        latency: seconds of a message between nodes.
        inner_latency: seconds of a message inside a node.
        cores: on processors, how many cores the devices of a node share; None where every device is its own.
        overlap: whether gradients travel while the backward pass runs. Where processes fill every core, as gloo's do
            on a processor, they do not.
    """

    nodes: int
    devices: int
    link: float
    inner_link: float
    latency: float = 20e-6
    inner_latency: float = 5e-6
    cores: int | None = None
    overlap: bool = True

    @property
    def size(self) -> int:
        """All devices."""
        return self.nodes * self.devices

    @property
    def crowding(self) -> float:
        """How many times as long a step takes because several devices share a core."""
        return max(1.0, self.devices / self.cores) if self.cores else 1.0


@dataclass(frozen=True)
class Work:
    """What a network asks of a step.

    Args:
        parameters: how many are trained, each of 4 bytes.
        norms: the channels of each batch norm that is synchronised; empty where none is.
        sharded: fully sharded training in place of DistributedDataParallel.
    """

    parameters: int
    norms: tuple[int, ...] = ()
    sharded: bool = False


@dataclass(frozen=True)
class Step:
    """A predicted step; times in seconds.

    Attributes:
        images: of the batch that each device has, rounded up.
        rounds: in how many micro-batches.
        compute: forward and backward passes.
        reduce: the gradients' time on the wire, if nothing hid it.
        exposed: what of it the backward pass does not hide.
        norms: waiting for synchronised batch norms.
        bytes: that each device sends, and receives, for the gradients; of the norms, for the statistics, besides.
    """

    images: int
    rounds: int
    compute: float
    reduce: float
    exposed: float
    norms: float
    bytes: float
    norm_bytes: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.exposed + self.norms


def all_reduce_bytes(size: float, devices: int) -> float:
    """What each of n devices sends, and receives, in a ring all-reduce of ``size`` bytes: 2 (n − 1) / n · S."""
    return 2 * (devices - 1) / devices * size


def all_reduce_seconds(size: float, cluster: Cluster) -> float:
    """How long an all-reduce of ``size`` bytes over all devices takes.

    2 (n − 1) / n · S over the slower kind of link on the way, and 2 ⌈log₂ n⌉ messages.
    """
    if cluster.size == 1:
        return 0.0
    speed = cluster.inner_link if cluster.nodes == 1 else min(cluster.link, cluster.inner_link)
    inside = 2 * math.ceil(math.log2(cluster.devices)) * cluster.inner_latency
    between = 2 * math.ceil(math.log2(cluster.nodes)) * cluster.latency
    return all_reduce_bytes(size, cluster.size) / speed + inside + between


def buckets(parameters: int) -> int:
    """How many all-reduces the gradients take: one of 1 MiB, then as many of 25 MiB as are needed."""
    return 1 + max(0, math.ceil((4 * parameters - 2**20) / BUCKET))


def exposed_seconds(backward: float, count: int, each: float) -> float:
    """What is left to wait for when the backward pass is over.

    max(B + c, B / m + m c) − B, for m buckets of c seconds each on the wire.

    Args:
        backward: B, seconds.
        count: m.
        each: c, seconds.
    """
    return max(backward + each, backward / count + count * each) - backward


def step(work: Work, device: Device, cluster: Cluster, batch: int, micro_batch: int | None = None) -> Step:
    """Predict a step of ``batch`` images over all devices, each with at most ``micro_batch`` in work at once."""
    images = math.ceil(batch / cluster.size)
    rounds = math.ceil(images / (micro_batch or images))
    one_round = device.seconds(images / rounds) * cluster.crowding
    count = buckets(work.parameters)
    each = all_reduce_seconds(4 * work.parameters / count, cluster)
    sent = all_reduce_bytes(4 * work.parameters, cluster.size)
    times = 1
    if work.sharded:
        # Three halves of an all-reduce, and in every round instead of the last alone.
        each, sent, times = 1.5 * each, 1.5 * rounds * sent, rounds
    hidden = cluster.overlap and cluster.size > 1
    exposed = times * (exposed_seconds(BACKWARD * one_round, count, each) if hidden else count * each)
    # Sums, sums of squares and a count forwards; two sums per channel backwards.
    messages = [4 * (2 * channels + extra) for channels in work.norms for extra in (1, 0)]
    waiting = rounds * sum(all_reduce_seconds(size, cluster) for size in messages)
    return Step(
        images=images,
        rounds=rounds,
        compute=rounds * one_round,
        reduce=times * count * each,
        exposed=exposed,
        norms=waiting,
        bytes=sent,
        norm_bytes=rounds * all_reduce_bytes(sum(messages), cluster.size),
    )


@dataclass(frozen=True)
class Footprint:
    """Memory of training one network, in bytes.

    Args:
        parameters: how many.
        slots: numbers of 4 bytes that the optimiser keeps for each: 1 for SGD with momentum, 2 for AdamW.
        average: whether a moving average of the weights is kept.
        per_image: of one image: the input, what autograd keeps for the backward pass, and the maps that the backward
            pass itself needs.
        fixed: kept in a step whatever the images, such as weights in half precision.
        reserve: of the device's own: context, workspaces, what the allocator cannot use.
    """

    parameters: int
    slots: int
    average: bool
    per_image: float
    fixed: float = 0.0
    reserve: float = 1e9

    def state(self, devices: int = 1, sharded: bool = False) -> dict[str, float]:
        """Parameters, gradients, optimiser, and what several devices add, in bytes."""
        each = 4.0 * self.parameters
        share = each / devices if sharded else each
        return {
            "parameters": share + (each if self.average else 0.0),
            "gradients": share,
            "optimizer": self.slots * share,
            # Buckets hold the gradients once more; sharded, the gathered parameters of the layers in work.
            "exchange": each if devices > 1 else 0.0,
        }

    def bytes(self, micro_batch: int, devices: int = 1, sharded: bool = False) -> float:
        """All of it, with so many images in work."""
        state = sum(self.state(devices, sharded).values())
        return state + self.fixed + self.reserve + micro_batch * self.per_image

    def largest_micro_batch(self, memory: float, devices: int = 1, sharded: bool = False) -> int:
        """The most images that fit into ``memory`` bytes; 0 where not even the parameters do."""
        return max(0, int((memory - self.bytes(0, devices, sharded)) // self.per_image))


def grown(cluster: Cluster, size: int) -> Cluster:
    """The cluster with ``size`` devices: nodes of as many as it has in each, and the first filled first."""
    devices = min(size, cluster.devices)
    return replace(cluster, nodes=math.ceil(size / devices), devices=devices)


def stops_at(sizes: Sequence[int], seconds: Sequence[float], batch: int) -> tuple[int, str]:
    """The number of devices beyond which more of them bring little, and why.

    Args:
        sizes: numbers of devices, each twice the one before.
        seconds: of a step on so many.
        batch: images of a step over all devices.

    Returns:
        A number of devices, and ``"images"`` where twice as many would have fewer than :data:`FEWEST_IMAGES` each,
        ``"gain"`` where they would be less than :data:`LEAST_GAIN` times as fast, or ``""`` where neither is seen.
    """
    for size, now, then in zip(sizes, seconds, seconds[1:], strict=False):
        if batch / (2 * size) < FEWEST_IMAGES:
            return size, "images"
        if now / then < LEAST_GAIN:
            return size, "gain"
    return sizes[-1], "images" if batch / (2 * sizes[-1]) < FEWEST_IMAGES else ""

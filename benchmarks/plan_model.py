"""The model behind `excite plan` against real data-parallel steps: 1, 2 and 4 gloo processes on this machine.

    python benchmarks/plan_model.py
    python benchmarks/plan_model.py resnet20+se --batch 64

First what the model is given: what a step takes one process alone, with two batches that are none of those predicted;
how much longer it takes while every core has a process at work; and how long gloo's all-reduce takes between so many
processes, for a small and for a large message. Then what it predicts: a step of the same batch over 1, 2 and 4
processes, each with its share. Then the same steps, run by PyTorch's DistributedDataParallel, once with batch norms
of each process's own and once with excite's synchronised ones. Every process has one thread and is pinned to a core;
where there are more processes than cores, they share. To be run on a quiet machine, and not with real-time priority:
processes that wait for each other would not let each other run. Takes two minutes; written to
``benchmarks/results/plan-model.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from excite.create import create
from excite.files import write_json
from excite.memory_format import to_channels_last
from excite.training.sync_batch_norm import synchronised
from excite.verbs.plan_model import Cluster, Device, Work, step

RESULTS = Path(__file__).parent / "results" / "plan-model.json"
NETWORKS = ("resnet20+se", "resnet18+se")
"""One whose gradients are small beside its arithmetic, and one whose gradients are not."""
PROCESSES = (1, 2, 4)
NORMS = ("own", "shared")
"""Batch norms of each process's images, or of all."""
SMALL, LARGE = 4 * 1024, 16 * 2**20
"""Bytes of the messages that tell latency and bandwidth."""
SIDE = 32


def trials(batch: int) -> tuple[int, int]:
    """The batches that a device's rate is fitted to: none of those that are predicted."""
    return 3 * batch // 16, 3 * batch // 4


def _loss_step(network: nn.Module, images: int) -> Callable[[], None]:
    """One training step of so many random images, without its data."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
    inputs = torch.randn(images, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    target = torch.randint(10, (images,))

    def call() -> None:
        loss: Any = nn.functional.cross_entropy(network(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def _median(call: Callable[[], object], seconds: float) -> float:
    """The median over so many seconds of calls, all processes beginning each one together."""
    took: list[float] = []
    call()
    calls = torch.zeros(1)
    begin = time.perf_counter()
    call()
    calls[0] = max(5, min(500, int(seconds / (time.perf_counter() - begin))))
    dist.broadcast(calls, 0)
    for _ in range(int(calls)):
        dist.barrier()
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def _work(rank: int, count: int, store: str, spec: str, batch: int, seconds: float, told: Any) -> None:
    """One process: its own steps, its part of the all-reduces, and its part of the distributed steps."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Grad strides")  # of 1×1 kernels, which are the same either way
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    torch.manual_seed(0)
    network = create(spec, 10).train()
    to_channels_last(network)
    found: dict[str, Any] = {"trials": {}, "steps": {}}
    for norms in NORMS:
        with synchronised(network) if norms == "shared" else contextlib.nullcontext():
            whole = DistributedDataParallel(network) if count > 1 else network
            found["steps"][norms] = _median(_loss_step(whole, batch // count), seconds)
            if count == 1 or (norms == "own" and count <= len(cores)):
                found["trials"][norms] = {
                    images: _median(_loss_step(network, images), seconds) for images in trials(batch)
                }
    for name, size in (("small", SMALL), ("large", LARGE)):
        message = torch.zeros(size // 4)
        found[name] = _median(functools.partial(dist.all_reduce, message), seconds / 2)
    if rank == 0:
        told.put(found)
    dist.barrier()
    dist.destroy_process_group()


def measure(spec: str, batch: int, count: int, seconds: float) -> dict[str, Any]:
    """What ``count`` processes take."""
    told = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, f"{folder}/store", spec, batch, seconds, told)
        mp.spawn(_work, arguments, nprocs=count)  # type: ignore[attr-defined,no-untyped-call]
    found: dict[str, Any] = told.get()
    return found


def fitted_device(alone: dict[int, float]) -> Device:
    """t(b) = fixed + b / rate through two batches."""
    (few, short), (many, long) = sorted(alone.items())
    per_image = (long - short) / (many - few)
    return Device(rate=1 / per_image, fixed=max(0.0, long - many * per_image))


def gloo_cluster(count: int, small: float, large: float, cores: int) -> Cluster:
    """Latency and bandwidth of one all-reduce over so many processes of this machine, from two of them.

    The model's time is 2 (n − 1) / n · S / speed + 2 ⌈log₂ n⌉ · latency.
    """
    slope = (large - small) / (LARGE - SMALL)
    speed = 2 * (count - 1) / count / slope
    latency = max(0.0, small - SMALL * slope) / (2 * math.ceil(math.log2(count)))
    return Cluster(1, count, speed, speed, inner_latency=latency, cores=cores, overlap=False)


def compare(spec: str, batch: int, seconds: float) -> list[dict[str, Any]]:
    """Predicted and measured steps of one network."""
    cores = len(os.sched_getaffinity(0))
    found = {count: measure(spec, batch, count, seconds) for count in PROCESSES}
    network = create(spec, 10)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    channels = tuple(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    quiet = {norms: fitted_device(found[1]["trials"][norms]) for norms in NORMS}
    busiest = max(count for count in PROCESSES if count <= cores)
    # How much slower a process is with the other cores at work, too: they share a cache and the memory.
    busy = fitted_device(found[busiest]["trials"]["own"]).seconds(batch // 2) / quiet["own"].seconds(batch // 2)
    rows = []
    for norms in NORMS:
        for count in PROCESSES:
            cluster, device = Cluster(1, 1, 1e9, 1e9), quiet[norms]
            if count > 1:
                cluster = gloo_cluster(count, found[count]["small"], found[count]["large"], cores)
                device = Device(device.rate / busy, device.fixed * busy)
            said = step(Work(parameters, channels if norms == "shared" else ()), device, cluster, batch)
            measured = found[count]["steps"][norms]
            rows.append(
                {
                    "network": spec,
                    "parameters": parameters,
                    "batch": batch,
                    "norms": norms,
                    "processes": count,
                    "all_reduce_gb_per_s": cluster.inner_link / 1e9 if count > 1 else None,
                    "all_reduce_latency_us": 1e6 * cluster.inner_latency if count > 1 else None,
                    "predicted_ms": 1000 * said.seconds,
                    "computing_ms": 1000 * said.compute,
                    "gradients_ms": 1000 * said.exposed,
                    "norms_ms": 1000 * said.norms,
                    "measured_ms": 1000 * measured,
                    "ratio": said.seconds / measured,
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| network | norms | processes | predicted, ms | of it gradients | norms | measured, ms | ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['network']}` | {row['norms']} | {row['processes']} | {row['predicted_ms']:.1f} "
            f"| {row['gradients_ms']:.1f} | {row['norms_ms']:.1f} | {row['measured_ms']:.1f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, predict, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="SPEC")
    parser.add_argument("--batch", type=int, default=64, help="of all processes together, a multiple of 16")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing")
    parser.add_argument("--out", type=Path, default=None, help=f"by default {RESULTS.name}, if all are measured")
    options = parser.parse_args()
    rows = [row for spec in options.networks for row in compare(spec, options.batch, options.seconds)]
    out = options.out or (RESULTS if options.networks == list(NETWORKS) else None)
    if out:
        settings = {"cores": len(os.sched_getaffinity(0)), "side": SIDE, "torch": torch.__version__}
        write_json(out, settings | {"results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()

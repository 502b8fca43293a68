"""Images per second in training: ``excite.fit`` against plain PyTorch loops, on CIFAR shapes.

    python benchmarks/training_throughput.py

Every contestant trains in a process of its own on the same cores, and they are driven in turn, a second each. One
call is one whole step: batch, augmentation, forward, backward, SGD, and whatever else the loop does. Written to
``benchmarks/results/training_throughput.json``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from excite.allocator import keep_freed_buffers
from excite.create import create
from excite.files import write_json
from excite.timing import Call, Timings, time_in_turn

BATCH = 128
IMAGES = 20_000  # random pixels: what they show does not change the time
CLASSES = 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RESULTS = Path(__file__).parent / "results" / "training_throughput.json"
ENDLESS = 10**6  # epochs; the processes are ended when enough has been timed


# --- the networks, as a plain script writes them -----------------------------------------------------------------


class PlainSE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, max(4, channels // 16))
        self.expand = nn.Linear(max(4, channels // 16), channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1).flatten(1)
        scale = torch.sigmoid(self.expand(F.relu(self.reduce(scale))))
        return x * scale[:, :, None, None]


class PlainBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, se: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = PlainSE(channels) if se else nn.Identity()
        self.shrink = stride > 1

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        if self.shrink:
            new = out.shape[1] - x.shape[1]
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new // 2))
        return F.relu(out + x)


class PlainResNet20(nn.Module):
    def __init__(self, se: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, se)
        self.layer2 = self._stage(16, 32, 2, se)
        self.layer3 = self._stage(32, 64, 2, se)
        self.fc = nn.Linear(64, CLASSES)

    def _stage(self, in_channels: int, channels: int, stride: int, se: bool) -> nn.Sequential:
        first = PlainBlock(in_channels, channels, stride, se)
        return nn.Sequential(first, *(PlainBlock(channels, channels, 1, se) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


PLAIN = {"resnet20": lambda: PlainResNet20(se=False), "resnet20+se": lambda: PlainResNet20(se=True)}


def check_same_network(spec: str) -> None:
    """The plain network has excite's parameters, and computes the same function."""
    ours, plain = create(spec, CLASSES), PLAIN[spec]()
    ours.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-4, atol=1e-4)


# --- the contestants ---------------------------------------------------------------------------------------------


def synthetic() -> tuple[Tensor, Tensor]:
    """Random images uint8 (N, 3, 32, 32) and their labels int64 (N,)."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(random.integers(0, CLASSES, IMAGES))


@dataclass(frozen=True)
class Excite:
    """``excite.fit``; with ``keep_buffers`` in the process settings of the command ``excite train``."""

    spec: str
    precision: str
    keep_buffers: bool
    threads: int
    folder: str

    def __call__(self) -> Call:
        from excite.data import Augmentation, ImageData, Preprocessing, Split
        from excite.training.fit import fit
        from excite.training.recipe import Recipe

        if self.keep_buffers:
            keep_freed_buffers()
        pixels, labels = synthetic()
        gate = Gate(pixels, labels)
        names = [str(i) for i in range(IMAGES)]
        data = ImageData(
            "synthetic",
            tuple(str(i) for i in range(CLASSES)),
            Preprocessing(32, MEAN, STD),
            Split(gate, labels, names, CLASSES),
            None,
            None,
            Augmentation(crop="pad", flip=0.5),
        )
        settings = {"epochs": ENDLESS, "batch_size": BATCH, "precision": self.precision, "threads": self.threads}
        recipe = Recipe().replace({"network.spec": self.spec, **{f"trainer.{k}": v for k, v in settings.items()}})
        return gate.drive(lambda: fit(recipe, self.folder, data=data))


class Gate:
    """Images in memory that let a training loop pass one batch at a time.

    ``fit`` runs until it is done; to time it step by step it runs in a thread of its own, which waits here whenever
    it wants the next batch.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels
        self.go, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.pixels[i], int(self.labels[i])

    def batch(self, indices: Any, seed: int, epoch: int) -> Tensor:
        self.arrived.release()
        self.go.acquire()
        return self.pixels.index_select(0, torch.from_numpy(indices))

    def drive(self, train: Callable[[], object]) -> Call:
        """Start the training; a call of what is returned lasts from one batch's request to the next."""

        def run() -> None:
            try:
                train()
            except BaseException as error:  # handed to the caller, who waits for an arrival
                self.error = error
            self.arrived.release()

        def step() -> None:
            self.go.release()
            self.arrived.acquire()
            if self.error is not None:
                raise self.error

        threading.Thread(target=run, daemon=True).start()
        self.arrived.acquire()
        if self.error is not None:
            raise self.error
        return step


@dataclass(frozen=True)
class Plain:
    """The loop that people write: SGD with Nesterov momentum, one cycle, mean loss of the epoch."""

    spec: str
    precision: str
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    memory_format: str = "contiguous_format"
    keep_buffers: bool = False

    def __call__(self) -> Call:
        if self.keep_buffers:
            keep_freed_buffers()
        layout = getattr(torch, self.memory_format)
        torch.manual_seed(0)
        model = PLAIN[self.spec]().to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10**7)
        batches = self.batches()
        total_loss = 0.0

        def step() -> None:
            nonlocal total_loss
            images, labels = next(batches)
            images = images.contiguous(memory_format=layout)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total_loss += loss.item()

        return step


class PlainCifar(Dataset[tuple[Tensor, int]]):
    """One PIL image at a time through torchvision's transforms, as ``torchvision.datasets.CIFAR10`` does."""

    def __init__(self) -> None:
        from torchvision import transforms as T

        pixels, labels = synthetic()
        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        crop, flip = T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()
        self.transform = T.Compose([crop, flip, T.ToTensor(), T.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def batches_of_a_data_loader() -> Iterator[tuple[Tensor, Tensor]]:
    """In as many processes as there are cores."""
    workers = len(usable_cores())
    loader = DataLoader(PlainCifar(), BATCH, shuffle=True, num_workers=workers, persistent_workers=True)
    while True:
        yield from loader


def batches_in_memory() -> Iterator[tuple[Tensor, Tensor]]:
    """All images in one tensor, augmented a batch at a time: the quickest way for small images."""
    pixels, labels = synthetic()
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) * 255 for value in (MEAN, STD))
    while True:
        for index in torch.split(torch.randperm(IMAGES), BATCH):
            images = F.pad(pixels[index], (4, 4, 4, 4))
            top, left = torch.randint(0, 9, (2, len(index)))
            images = images.unfold(2, 32, 1).unfold(3, 32, 1)[torch.arange(len(index)), :, top, left]
            flip = torch.rand(len(index)) < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(3), images)
            yield (images.float() - mean) / std, labels[index]


# --- the measurement ---------------------------------------------------------------------------------------------


def usable_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def contestants(spec: str, threads: int, folder: Path) -> dict[tuple[str, str], Excite | Plain]:
    """(precision, name) → contestant."""
    found: dict[tuple[str, str], Excite | Plain] = {}
    for precision in ("fp32", "bf16"):
        for name, keep in (("excite train", True), ("excite.fit, default allocator", False)):
            found[precision, name] = Excite(spec, precision, keep, threads, str(folder / f"{precision} {name}"))
        found[precision, "plain loop, DataLoader"] = Plain(spec, precision, batches_of_a_data_loader)
        found[precision, "plain loop, in memory"] = Plain(spec, precision, batches_in_memory)
        found[precision, "plain loop, in memory, excite's layout and allocator"] = Plain(
            spec, precision, batches_in_memory, "channels_last", keep_buffers=True
        )
    return found


def measure(spec: str, rounds: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    check_same_network(spec)
    with tempfile.TemporaryDirectory() as folder:
        entered = contestants(spec, threads, Path(folder))
        timings = time_in_turn(
            {" ".join(key): contestant for key, contestant in entered.items()},
            rounds=rounds,
            threads=threads,
            min_seconds=seconds,
            max_seconds=3600,
            progress=lambda done, of: print(f"{spec}: round {done} of {of}", file=sys.stderr),
        )
    return [row(spec, precision, name, timings) for precision, name in entered]


def row(spec: str, precision: str, name: str, timings: Timings) -> dict[str, Any]:
    own, ours, fp32 = f"{precision} {name}", f"{precision} excite train", f"fp32 {name}"
    return {
        "network": spec,
        "precision": precision,
        "contestant": name,
        "images_per_second": BATCH / timings.median(own),
        # Ratios of speeds are inverse ratios of times, hence the order of the names.
        "excite_is_times_as_fast": ratio(timings, own, ours) if own != ours else None,
        "times_as_fast_as_fp32": ratio(timings, fp32, own) if own != fp32 else None,
        "peak_mebibytes": round(timings.peak_bytes(own) / 2**20),
        "seconds_per_step": timings.samples[own],
    }


def ratio(timings: Timings, name: str, baseline: str) -> dict[str, Any]:
    found = timings.ratio(name, baseline)
    return {"value": found.value, "ci95": [found.low, found.high]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| network | precision | loop | images/s | excite train is … times as fast | against fp32 | peak MiB |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for r in rows:
        ratios = [
            f"{found['value']:.2f} ({found['ci95'][0]:.2f} – {found['ci95'][1]:.2f})" if found else ""
            for found in (r["excite_is_times_as_fast"], r["times_as_fast_as_fp32"])
        ]
        cells = [r["network"], r["precision"], r["contestant"], f"{r['images_per_second']:.0f}", *ratios]
        lines.append("| " + " | ".join([*cells, str(r["peak_mebibytes"])]) + " |")
    return "\n".join(lines)


def main() -> None:
    from excite.verbs.compare import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(PLAIN), metavar="NETWORK", help=" ".join(PLAIN))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(usable_cores()))
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one sample")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        row for spec in options.networks for row in measure(spec, options.rounds, options.threads, options.seconds)
    ]
    write_json(
        options.out,
        {
            "environment": environment() | {"threads": options.threads, "cores": len(usable_cores())},
            "batch_size": BATCH,
            "input": [3, 32, 32],
            "rounds": options.rounds,
            "results": rows,
        },
    )
    print(table(rows))


if __name__ == "__main__":
    main()

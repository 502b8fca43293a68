"""What it costs to look at the gates: ``explain``'s pass against a plain evaluation of the same network.

    python benchmarks/explain_cost.py [--quick]

Both go over 10,000 images of CIFAR's shape (random pixels: what they show does not change the time), load and
normalise them, run the network in batches of 256 and compute top-1, top-5 and the loss; ``explain`` gathers the gates
of all units besides. Each in a process of its own on the same cores, driven in turn. Enlarged images are no part of
it: they are passes of their own, one for each factor above 1. Written to ``benchmarks/results/explain_cost.json``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from excite.allocator import keep_freed_buffers
from excite.data import Preprocessing, Split
from excite.data.base import StackedImages
from excite.files import write_json
from excite.timing import Build, Call, time_in_turn

RESULTS = Path(__file__).parent / "results" / "explain_cost.json"
SPECS = ("resnet20+se", "resnet20+sk", "resnet20+se+sk")
IMAGES, CLASSES = 10_000, 10
PREPROCESSING = Preprocessing(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def images(count: int) -> Split:
    """Random pixels with random labels."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, CLASSES, (count,), generator=random)
    return Split(StackedImages(pixels, labels), labels, [str(number) for number in range(count)], CLASSES)


def built(spec: str) -> nn.Module:
    """The network with weights from a seed."""
    from excite.create import create

    torch.manual_seed(0)
    return create(spec, CLASSES).eval()


@dataclass(frozen=True)
class Evaluation:
    """A plain evaluation, as ``excite evaluate`` does it."""

    spec: str
    count: int

    def __call__(self) -> Call:
        from excite.tasks.classification import TASK

        keep_freed_buffers()
        network, split = built(self.spec), images(self.count)
        return lambda: TASK.score(network, split, PREPROCESSING)


@dataclass(frozen=True)
class Explanation:
    """The pass of ``excite explain``, with its figures and arrays; without the page."""

    spec: str
    count: int

    def __call__(self) -> Call:
        from excite.analysis.gates import find_gates
        from excite.verbs.explain_pass import Enlargements, gather

        keep_freed_buffers()
        network, split = built(self.spec), images(self.count)
        cpu = torch.device("cpu")

        def call() -> None:
            gates = find_gates(network, torch.zeros(2, 3, 32, 32))
            found = gather(network, gates, split, PREPROCESSING, Enlargements((1.0,)), cpu, CLASSES, "images")
            found.score.metrics("classification")
            if found.excitation:
                found.excitation.figures(50)
            if found.selection:
                found.selection.figures()
                found.selection.arrays()

        return call


def measure(spec: str, count: int, rounds: int, threads: int) -> dict[str, Any]:
    contestants: dict[str, Build] = {"explain": Explanation(spec, count), "evaluate": Evaluation(spec, count)}
    timings = time_in_turn(contestants, rounds=rounds, threads=threads, max_seconds=600)
    ratio = timings.ratio("explain", "evaluate")
    return {
        "spec": spec,
        "images": count,
        "threads": threads,
        "explain_seconds": timings.median("explain"),
        "evaluate_seconds": timings.median("evaluate"),
        "explain_takes": {"value": ratio.value, "ci95": [ratio.low, ratio.high]},
        "samples": {name: list(values) for name, values in timings.samples.items()},
    }


def main() -> None:
    from excite.verbs.compare import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=list(SPECS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="1,024 images and six rounds; nothing is written")
    arguments = parser.parse_args()
    count, rounds = (1024, 6) if arguments.quick else (IMAGES, arguments.rounds)
    rows = []
    print("| network | images | evaluate, s | explain, s | explain takes … of evaluate's time |")
    print("|---|--:|--:|--:|--:|")
    for spec in arguments.specs:
        row = measure(spec, count, rounds, arguments.threads)
        rows.append(row)
        takes = row["explain_takes"]
        low, high = takes["ci95"]
        print(
            f"| `{spec}` | {count:,} | {row['evaluate_seconds']:.2f} | {row['explain_seconds']:.2f} "
            f"| {takes['value']:.3f} ({low:.3f} – {high:.3f}) |",
            flush=True,
        )
    if not arguments.quick:
        write_json(RESULTS, {"environment": environment(), "rounds": rounds, "rows": rows})
        print(f"Written: {RESULTS}", file=sys.stderr)


if __name__ == "__main__":
    main()

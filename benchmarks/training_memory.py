"""What a training step keeps for its backward pass: units against their hosts.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py resnet20 resnet20+se --size 32 --batch 16

Counted by `torch.autograd.graph.saved_tensors_hooks`: the bytes of every storage that autograd holds on to, each
once, parameters and buffers aside. Nothing is timed, so the figures are the same on every machine. Written to
``benchmarks/results/training_memory.json``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from excite.create import create
from excite.files import write_json
from excite.memory_format import to_channels_last

RESULTS = Path(__file__).parent / "results" / "training_memory.json"
NETWORKS = (
    "resnet50",
    "resnet50+se",
    "resnext50_32x4d",
    "sknet50",
    "resnext50_32x4d+se",
    "torchvision:resnet50",
    "torchvision:resnet50+se",
    "resnet18",
    "resnet18+se",
    "resnet18+sk",
    "mobilenet_v1",
    "mobilenet_v1+se",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_0+se",
)
"""Each host in front of what it is a host to."""
HOSTS = {"sknet50": "resnext50_32x4d"}


def saved_bytes(network: nn.Module, images: Tensor) -> int:
    """The bytes that a training-mode forward pass of the network keeps for the backward pass.

    The images are counted, parameters and buffers are not.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensors are held, so that no storage's address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor.detach()
        return tensor

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(images)
    total = sum(size for size, _ in kept.values())
    output.sum().backward()
    return total


def measure(spec: str, batch: int, size: int, compiled: bool) -> int:
    """The bytes that a network of this spec keeps."""
    torch.manual_seed(0)
    network = create(spec, 1000 if size > 64 else 10)
    to_channels_last(network)
    if compiled:
        network.compile()
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    return saved_bytes(network, images)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| network | kept, MiB | against its host |", "|---|--:|--:|"]
    for row in rows:
        ratio = f"{row['ratio']:.3f}" if row["ratio"] else ""
        lines.append(f"| {row['network']} | {row['bytes'] / 2**20:.1f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="SPEC")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--compile", action="store_true", help="of the compiled step (a minute or two each)")
    parser.add_argument("--out", type=Path, default=None, help=f"by default {RESULTS.name}, if all are measured")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for spec in options.networks:
        found[spec] = measure(spec, options.batch, options.size, options.compile)
        host = found.get(HOSTS.get(spec, spec.partition("+")[0])) if "+" in spec or spec in HOSTS else None
        rows.append({"network": spec, "bytes": found[spec], "ratio": found[spec] / host if host else None})
    out = options.out or (RESULTS if options.networks == list(NETWORKS) and not options.compile else None)
    if out:
        settings = {"batch": options.batch, "input": [3, options.size, options.size], "compile": options.compile}
        write_json(out, settings | {"torch": torch.__version__, "results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()

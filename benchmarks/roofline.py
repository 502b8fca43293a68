"""Where an optimised network's time goes, beside what the processor could do: MACs and bytes, layer by layer.

    python benchmarks/roofline.py --batch 8 --precision fp32 resnet50 resnet50+se resnext50_32x4d sknet50

A layer cannot take less than its multiply-adds at the processor's peak, nor less than its bytes at the memory's
bandwidth. Both limits are measured here, on the same threads: the peak by oneDNN's product of large matrices, the
bandwidth by copying an array that no cache holds. Bytes are of weights and maps, each read or written once; what the
caches hold is quicker, so that a layer may take less than its bytes say.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import excite
from excite.allocator import keep_freed_buffers
from excite.deploy.lowered import Convolution, Gates, Lowered, SelectiveKernels

ROUNDS = 15


def shortest(call: Any, rounds: int = ROUNDS) -> float:
    call()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def peak(dtype: torch.dtype) -> float:
    """Multiply-adds a second of a product of large matrices."""
    side = 3072
    a, b = torch.randn(2, side, side).to(dtype).unbind()
    packed = torch.ops.mkldnn._reorder_linear_weight(b, side)
    return side**3 / shortest(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy."""
    a = torch.empty(2**28, dtype=torch.uint8).random_()
    b = torch.empty_like(a)
    return 2 * len(a) / shortest(lambda: b.copy_(a))


def macs(layer: Any, answer: Tensor) -> int:
    if isinstance(layer, SelectiveKernels):
        return macs(layer.first, answer) + macs(layer.second, answer)
    if isinstance(layer, Convolution):
        _, per_group, rows, columns = layer.shape
        return answer.numel() * per_group * rows * columns
    if isinstance(layer, Gates):
        channels, hidden, out = layer.channels
        return len(answer) * hidden * (channels + out)
    return 0


def size(values: Any) -> int:
    return sum(one.numel() * one.element_size() for one in values if isinstance(one, Tensor))


def weights(layer: Any) -> int:
    if isinstance(layer, SelectiveKernels):
        return weights(layer.first) + weights(layer.second) + weights(layer.gates)
    if isinstance(layer, Convolution):
        return size((layer.weight, layer.bias))
    return size(layer.buffers()) if isinstance(layer, torch.nn.Module) else 0


class Watch(fx.Interpreter):
    """Runs the network node by node, with a clock."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.facts: dict[str, tuple[str, int, int]] = {}

    def run_node(self, node: fx.Node) -> Any:
        begin = time.perf_counter()
        answer = super().run_node(node)
        spent = time.perf_counter() - begin
        if node.op in ("call_module", "call_function") and isinstance(answer, Tensor):
            layer = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            given = size(self.env.get(one) for one in node.all_input_nodes)
            self.seconds[node.name].append(spent)
            kind = _kind(layer) if layer is not None else str(node.target)
            self.facts[node.name] = kind, macs(layer, answer), given + size([answer]) + weights(layer)
        return answer


def _kind(layer: Any) -> str:
    name = type(layer).__name__
    if isinstance(layer, Convolution):
        name += f" {layer.shape[2]}×{layer.shape[3]}"
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("specs", nargs="+")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    keep_freed_buffers()
    dtype = torch.float32 if arguments.precision == "fp32" else torch.bfloat16
    top, wide = peak(dtype), bandwidth()
    print(f"peak {top / 1e9:.0f} GMAC/s in {arguments.precision}, memory {wide / 1e9:.0f} GB/s")
    told: dict[str, Any] = {
        "batch": arguments.batch,
        "precision": arguments.precision,
        "peak": top,
        "bandwidth": wide,
    }
    told["threads"], told["networks"] = torch.get_num_threads(), {}
    for spec in arguments.specs:
        example = torch.randn(arguments.batch, 3, 224, 224)
        optimized = excite.optimize(excite.create(spec).eval(), example, dtype=dtype, engine="torch-direct")
        assert isinstance(optimized.network, fx.GraphModule)
        assert any(isinstance(one, Lowered) for one in optimized.modules())
        watch = Watch(optimized.network)
        images = example.to(dtype, memory_format=torch.channels_last)
        with torch.no_grad():
            for _ in range(ROUNDS):
                watch.run(images)
        rows: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for name, (kind, count, moved) in watch.facts.items():
            row = rows[kind]
            row["layers"] += 1
            row["macs"] += count
            row["bytes"] += moved
            row["bound"] += max(count / top, moved / wide)
            row["seconds"] += statistics.median(watch.seconds[name])
        told["networks"][spec] = rows
        print(f"\n{spec}: {1000 * sum(row['seconds'] for row in rows.values()):.1f} ms")
        print(f"{'':34}{'layers':>7}{'GMACs':>8}{'MB':>8}{'bound ms':>10}{'ms':>8}")
        for kind, row in sorted(rows.items(), key=lambda item: -item[1]["seconds"]):
            figures = f"{row['layers']:7.0f}{row['macs'] / 1e9:8.2f}{row['bytes'] / 1e6:8.0f}"
            print(f"{kind:34}{figures}{1000 * row['bound']:10.2f}{1000 * row['seconds']:8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()

"""Seconds to build a network: ``excite.create`` against ``timm.create_model``, both with fresh weights.

    python benchmarks/create_time.py

Each contestant in a process of its own on the same core, driven in turn. Written to
``benchmarks/results/create_time.json``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excite.files import write_json
from excite.timing import Call, time_in_turn

RESULTS = Path(__file__).parent / "results" / "create_time.json"

PAIRS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "resnet152": "resnet152",
    "resnext101_32x4d": "resnext101_32x4d",
    "se_resnet50": "legacy_seresnet50",
    "resnet50+se": "seresnet50",
    "se_resnext101_32x4d": "legacy_seresnext101_32x4d",
    "senet154": "legacy_senet154",
    "sknet50": "skresnext50_32x4d",
    "inception_resnet_v2": "inception_resnet_v2",
    "mobilenet_v1": "mobilenetv1_100",
    "mobilenet_v2": "mobilenetv2_100",
}
"""excite's spec → timm's name of the same network."""


@dataclass(frozen=True)
class Excite:
    """Builds by :func:`excite.create`."""

    spec: str

    def __call__(self) -> Call:
        from excite.create import create

        return lambda: create(self.spec)


@dataclass(frozen=True)
class Timm:
    """Builds by ``timm.create_model``."""

    name: str

    def __call__(self) -> Call:
        import timm

        return lambda: timm.create_model(self.name)


def measure(spec: str, name: str, rounds: int) -> dict[str, Any]:
    timings = time_in_turn({"excite": Excite(spec), "timm": Timm(name)}, rounds=rounds, threads=1, max_seconds=120)
    ratio = timings.ratio("excite", "timm")
    return {
        "spec": spec,
        "timm": name,
        "excite_seconds": timings.median("excite"),
        "timm_seconds": timings.median("timm"),
        "excite_takes": {"value": ratio.value, "ci95": [ratio.low, ratio.high]},
        "samples": {key: list(values) for key, values in timings.samples.items()},
    }


def main() -> None:
    from excite.verbs.compare import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows = []
    print("| network | timm's name | excite, s | timm, s | excite takes … of timm's time |")
    print("|---|---|--:|--:|--:|")
    for spec in arguments.specs:
        row = measure(spec, PAIRS[spec], arguments.rounds)
        rows.append(row)
        takes = row["excite_takes"]
        low, high = takes["ci95"]
        print(
            f"| `{spec}` | `{PAIRS[spec]}` | {row['excite_seconds']:.3f} | {row['timm_seconds']:.3f} "
            f"| {takes['value']:.2f} ({low:.2f} – {high:.2f}) |",
            flush=True,
        )
    write_json(RESULTS, {"environment": environment(), "rounds": arguments.rounds, "rows": rows})
    print(f"Written: {RESULTS}", file=sys.stderr)


if __name__ == "__main__":
    main()

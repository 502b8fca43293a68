"""Pruning a trained network by its gates, by the L1 norm of its filters, and by lot: accuracy against cost.

    python benchmarks/pruning.py --run RUN [--data D --test-data D] [--targets .8,.6,.4] [--epochs N] [--seeds N]

For every method, target and seed the run is pruned to that share of its multiply–adds, trained on, and scored on the
test images; all methods narrow the same layers by as much and are trained alike, so that they differ in nothing but
which channels they keep. Then the latency of the unpruned network and of one for each target is measured, in turn.

The pruned runs are kept in ``--out``: interrupted, the same command goes on where it was; done, it measures only the
latency again. Written to ``benchmarks/results/pruning.json`` and, as a plot, ``docs/images/pruning.svg``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from excite.allocator import keep_freed_buffers
from excite.analysis.importance import METHODS
from excite.files import write_atomically, write_json
from excite.training.run import Run
from excite.verbs.costs import speeds
from excite.verbs.prune import prune

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pruning.json"
PLOT = HERE.parent / "docs" / "images" / "pruning.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a trained network with squeeze-and-excitation")
    parser.add_argument("--data", help="by default what the run was trained on")
    parser.add_argument("--test-data")
    parser.add_argument("--targets", default=".8,.6,.4", help="shares of the multiply–adds that may be left")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epochs", type=int, help="of the training after pruning; by default a third of the run's")
    parser.add_argument("--lr", type=float, help="its peak rate; by default a fifth of the run's")
    parser.add_argument("--constant", type=float, default=0.01, help="units up to this deviation become a scale")
    parser.add_argument("--multiple", type=int, default=1, help="widths are multiples of it")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each, and draws of the lot")
    parser.add_argument("--threads", type=int, help="of the trainings")
    parser.add_argument("--out", type=Path, default=Path("excite-runs/pruning"), help="where the pruned runs go")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--draw", action="store_true", help="draw the plot from the results, and do nothing else")
    wanted = parser.parse_args()
    if wanted.draw:
        write_atomically(wanted.plot, plot(json.loads(wanted.results.read_text())))
        return
    if wanted.run is None:
        parser.error("--run is needed: the folder of a trained network")
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    keep_freed_buffers()
    targets = [float(target) for target in wanted.targets.split(",")]
    rows: list[dict[str, Any]] = []
    folders: dict[float, str] = {}  # of one run for each target
    content: dict[str, Any] = {"rows": rows, "latency": None}
    # Seed by seed, and the methods in turn: what has been done when it is interrupted can be compared.
    for seed in range(wanted.seeds):
        for target in targets:
            for method in wanted.methods.split(","):
                said = prune(
                    wanted.run,
                    wanted.data,
                    test=wanted.test_data,
                    target_macs=target,
                    method=method,
                    epochs=wanted.epochs,
                    lr=wanted.lr,
                    constant=wanted.constant,
                    multiple=wanted.multiple,
                    seed=seed,
                    latency=False,
                    out=wanted.out / f"{method}-{target:g}-{seed}",
                    progress=True,
                )
                rows.append({key: said[key] for key in KEPT} | {"seed": seed})
                folders[target] = said["out"]
                content |= {key: said[key] for key in ("network", "count", "epochs", "lr", "versions")}
                write_json(wanted.results, content)
                figures = said["metrics"]
                print(
                    f"{method:12} {target:4.0%} seed {seed}: {said['macs']['after'] / 1e6:6.2f} million MACs, "
                    f"top-1 {figures['before']['top1']:.2f} → {figures['pruned']['top1']:.2f} → "
                    f"{figures['tuned']['top1']:.2f} %",
                    flush=True,
                )
    content["latency"] = latencies(wanted.run, folders)
    write_json(wanted.results, content)
    write_atomically(wanted.plot, plot(content))
    for name, speed in content["latency"].items():
        print(f"{name:>8}: {speed['latency_ms']:.3f} ms, {speed['throughput']:.0f} images/s")


KEPT = ("method", "target_macs", "macs", "parameters", "metrics", "constant", "widths")


def latencies(run: Path, pruned: dict[float, str]) -> dict[str, Any]:
    """The unpruned network and one of each target, in turn: all methods give layers of the same widths."""
    networks = {"unpruned": run} | {f"{target:g}": Path(folder) for target, folder in pruned.items()}
    shape = None
    contestants = {}
    for name, folder in networks.items():
        trained = Run.open(folder).load()
        shape = shape or (trained.preprocessing.channels, trained.preprocessing.size, trained.preprocessing.size)
        contestants[name] = trained.network, shape
    return speeds(contestants, progress=True)


def _row(rows: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    return next(row for row in rows if row["target_macs"] == target)


# --- the plot ------------------------------------------------------------------------------------------------------

COLOURS = {"excitation": "#0a6cc4", "l1": "#d1500a", "random": "#7a1d75"}
NAMES = {"excitation": "by excitation", "l1": "by L1 norm", "random": "at random"}
INK, SOFT, GRID = "#171b23", "#59616f", "#eceef2"
WIDTH, HEIGHT, LEFT, TOP, SIDE, TALL, GAP = 980, 420, 70, 70, 390, 260, 90


def plot(content: dict[str, Any]) -> str:
    """Accuracy against multiply–adds, and against latency, as one SVG."""
    rows, latency = content["rows"], content["latency"]
    before = rows[0]
    unpruned = before["metrics"]["before"]["top1"]
    values = [row["metrics"]["tuned"]["top1"] for row in rows] + [unpruned]
    low, high = _rounded(min(values), max(values))

    def macs(target: float | None) -> float:
        return float(before["macs"]["before"] if target is None else _row(rows, target)["macs"]["after"]) / 1e6

    def milliseconds(target: float | None) -> float:
        return float(latency["unpruned" if target is None else f"{target:g}"]["latency_ms"])

    panels: list[tuple[str, Callable[[float | None], float]]] = [("Multiply–adds (millions)", macs)]
    if latency:
        panels.append(("Latency, batch of 1 (ms)", milliseconds))
    title = f"{content['network']} on {content['count']:,} test images, pruned and trained on"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="14" fill="{INK}">',
        f"<title>{escape(title)}: accuracy against cost for three ways to choose channels</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="28" font-size="17" font-weight="600">{escape(title)}</text>',
    ]
    for place, (method, colour) in enumerate(COLOURS.items()):
        x = LEFT + 150 * place
        parts.append(f'<line x1="{x}" x2="{x + 22}" y1="48" y2="48" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(f'<text x="{x + 30}" y="53" fill="{SOFT}">{NAMES[method]}</text>')
    parts.append(f'<text x="{LEFT + 450}" y="53" fill="{SOFT}">◆ unpruned</text>')
    for number, (label, cost) in enumerate(panels):
        parts += _panel(rows, unpruned, label, cost, LEFT + number * (SIDE + GAP), (low, high))
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    rows: Sequence[dict[str, Any]],
    unpruned: float,
    label: str,
    cost: Callable[[float | None], float],
    left: float,
    span: tuple[float, float],
) -> list[str]:
    low, high = span
    targets = sorted({row["target_macs"] for row in rows})
    widest = 1.05 * max(cost(target) for target in (None, *targets))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + SIDE * x / widest, TOP + TALL * (high - y) / (high - low)

    parts = []
    for value in _ticks(low, high):
        y = at(0, value)[1]
        parts.append(f'<line x1="{left}" x2="{left + SIDE}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 10}" y="{y + 5:.1f}" text-anchor="end" fill="{SOFT}">{value:g}</text>')
    for value in _ticks(0, widest):
        x = at(value, low)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{TOP + TALL + 22}" text-anchor="middle" fill="{SOFT}">{value:g}</text>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + TALL}" y2="{TOP + TALL + 5}" stroke="{SOFT}"/>'
        )
    parts.append(f'<line x1="{left}" x2="{left + SIDE}" y1="{TOP + TALL}" y2="{TOP + TALL}" stroke="{SOFT}"/>')
    parts.append(f'<text x="{left + SIDE / 2}" y="{TOP + TALL + 48}" text-anchor="middle">{label}</text>')
    middle = TOP + TALL / 2
    parts.append(
        f'<text transform="translate({left - 48} {middle}) rotate(-90)" text-anchor="middle">'
        "Top-1 accuracy (%)</text>"
    )
    for method, colour in COLOURS.items():
        line = []
        for target in targets:
            scores = [
                row["metrics"]["tuned"]["top1"]
                for row in rows
                if row["method"] == method and row["target_macs"] == target
            ]
            if not scores:
                continue
            line.append(at(cost(target), statistics.mean(scores)))
            for score in scores:
                x, y = at(cost(target), score)
                faint = ' fill-opacity=".35"' if len(scores) > 1 else ""
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"{faint}/>')
        line.append(at(cost(None), unpruned))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    x, y = at(cost(None), unpruned)
    parts.append(f'<path d="M{x:.1f} {y - 7:.1f}l7 7-7 7-7-7z" fill="{INK}"/>')
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers."""
    step = next(
        step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if (high - low) / step <= 8
    )
    first = -int(-low // step)
    return [round(step * place, 6) for place in range(first, int(high / step + 1e-9) + 1)]


def _rounded(low: float, high: float) -> tuple[float, float]:
    step = next(step for step in (0.5, 1, 2, 5, 10, 20) if (high - low) / step <= 6)
    return step * (low // step), step * -(-high // step)


if __name__ == "__main__":
    main()

"""A map of a whole scene: the network applied to the scene at once, against window by window.

    python benchmarks/dense_map.py [RUN]

RUN is a finished run on Indian Pines; without one, hybridsn is first trained for three epochs. Measured are, on
Indian Pines, whether the two ways name the same class for every pixel, and their times; and on synthetic scenes of up
to 2,000 × 2,000 pixels with 30 bands, read from a ``.npy`` file, time and peak memory. Written to
``benchmarks/results/dense_map.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from excite.allocator import keep_freed_buffers
from excite.data.cube import Cube, open_cube
from excite.data.spectra import Spectra
from excite.deploy.scene_map import map_scene
from excite.files import write_json
from excite.timing import Call, time_in_turn
from excite.training.run import Run, Trained

RESULTS = Path(__file__).parent / "results" / "dense_map.json"
STRIP = 8  # rows of Indian Pines that the windows are timed on in turn: all 145 take more than a minute
SETTINGS = {"default allocator": False, "freed buffers kept": True}
SIDES = (250, 500, 1000, 2000)
BANDS = 30


@dataclass(frozen=True)
class Mapping:
    """Maps the first rows of Indian Pines: reading and principal components included, and the rewriting."""

    run: str
    dense: bool
    rows: int
    keep_buffers: bool

    def __call__(self) -> Call:
        if self.keep_buffers:
            keep_freed_buffers()
        trained, cube = opened(self.run)
        cube = replace(cube, rows=self.rows)
        return lambda: mapped(trained, cube, self.dense)


def opened(run: str) -> tuple[Trained, Cube]:
    return Run.open(run).load(), open_cube("indian-pines")


def mapped(trained: Trained, cube: Cube, dense: bool) -> Any:
    assert trained.spectra is not None
    return map_scene(trained.network, cube, trained.spectra, trained.preprocessing.size, dense=dense)


def same_labels(run: str) -> dict[str, Any]:
    """Both ways over the whole of Indian Pines, once."""
    trained, cube = opened(run)
    mapped(trained, replace(cube, rows=40), dense=True)
    dense, windows = mapped(trained, cube, dense=True), mapped(trained, cube, dense=False)
    assert dense.dense
    assert not windows.dense
    return {
        "network": trained.spec,
        "window": trained.preprocessing.size,
        "pixels": cube.rows * cube.cols,
        "different_labels": int((dense.labels != windows.labels).sum()),
        "largest_difference_of_confidence": float(np.abs(dense.confidence - windows.confidence).max()),
        "dense_seconds": dense.seconds,
        "windows_seconds": windows.seconds,
        "ratio": windows.seconds / dense.seconds,
    }


def in_turn(run: str, rounds: int, threads: int) -> dict[str, Any]:
    """The two ways in processes of their own, A B A B …: the windows on a strip of the scene."""
    _, cube = opened(run)
    contestants: dict[str, Mapping] = {}
    for setting, keep in SETTINGS.items():
        contestants[f"dense, {setting}"] = Mapping(run, True, cube.rows, keep)
        contestants[f"windows, {setting}"] = Mapping(run, False, STRIP, keep)
    timings = time_in_turn(contestants, rounds=rounds, threads=threads, max_seconds=600)
    share = cube.rows / STRIP
    result: dict[str, Any] = {"threads": threads, "rows_for_windows": STRIP}
    for setting in SETTINGS:
        dense, windows = f"dense, {setting}", f"windows, {setting}"
        ratio = timings.ratio(windows, dense)
        result[setting] = {
            "dense_seconds": timings.median(dense),
            "windows_seconds": timings.median(windows) * share,
            "windows_take": {"value": ratio.value * share, "ci95": [ratio.low * share, ratio.high * share]},
            "peak_bytes": {"dense": timings.peak_bytes(dense), "windows": timings.peak_bytes(windows)},
            "samples": {"dense": list(timings.samples[dense]), "windows": list(timings.samples[windows])},
        }
    return result


# --- large scenes ------------------------------------------------------------------------------------------------


def write_scene(path: Path, side: int) -> None:
    """A scene of (side, side, bands) float32, written a strip at a time."""
    scene = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(side, side, BANDS))
    draw = np.random.default_rng(0)
    for top in range(0, side, 50):
        scene[top : top + 50] = draw.standard_normal((min(50, side - top), side, BANDS), dtype=np.float32)
    scene.flush()


def map_large(path: str, threads: int) -> None:
    """Map one scene in this process and print what it took."""
    from excite.create import create

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = create("hybridsn", 16, in_channels=BANDS)
    spectra = Spectra(np.arange(BANDS), BANDS, np.zeros(BANDS), np.eye(BANDS), 1.0)
    before = _status("VmHWM")
    cube = open_cube(path)
    begin = time.perf_counter()
    found = map_scene(network, cube, spectra, 25)
    seconds = time.perf_counter() - begin
    row = {
        "rows": cube.rows, "cols": cube.cols, "bands": cube.bands, "dense": found.dense, "seconds": seconds,
        "microseconds_per_pixel": 1e6 * seconds / (cube.rows * cube.cols), "file_bytes": os.path.getsize(path),
        "peak_bytes": _status("VmHWM"), "peak_bytes_before": before,
    }  # fmt: skip
    print(json.dumps(row))


def _status(key: str) -> int:
    """A figure of this process, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def large(threads: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            path = Path(folder) / f"{side}.npy"
            write_scene(path, side)
            command = [sys.executable, __file__, "--map", str(path), "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            row = rows[-1]
            print(
                f"| {side:,} × {side:,} × {BANDS} | {row['seconds']:.1f} | {row['microseconds_per_pixel']:.1f} "
                f"| {row['file_bytes'] / 1e6:.0f} | {row['peak_bytes'] / 1e6:.0f} |",
                flush=True,
            )
            path.unlink()
    return rows


def quick_run(folder: str) -> str:
    from excite.training.fit import fit
    from excite.training.recipe import load

    recipe = load("hybridsn-indian-pines").replace({"trainer.epochs": 3})
    return str(fit(recipe, Path(folder) / "run").folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--map", metavar="FILE", help="map one .npy scene, and print its figures")
    arguments = parser.parse_args()
    if arguments.map:
        map_large(arguments.map, arguments.threads)
        return
    from excite.verbs.compare import environment

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or quick_run(folder)
        turns = in_turn(run, arguments.rounds, arguments.threads)
        print("| setting | dense, s | windows, s | windows take … times as long |\n|---|--:|--:|--:|")
        for setting in SETTINGS:
            row = turns[setting]
            times = "{:.0f} ({:.0f} – {:.0f})".format(row["windows_take"]["value"], *row["windows_take"]["ci95"])
            print(f"| {setting} | {row['dense_seconds']:.2f} | {row['windows_seconds']:.0f} | {times} |", flush=True)
        once = same_labels(run)
        print(
            f"\nOnce over all {once['pixels']:,} pixels: dense {once['dense_seconds']:.2f} s, windows "
            f"{once['windows_seconds']:.0f} s, {once['different_labels']} labels differ, confidence by "
            f"{once['largest_difference_of_confidence']:.1g} at most",
            flush=True,
        )
    print("\n| scene | seconds | µs per pixel | file, MB | peak memory, MB |\n|---|--:|--:|--:|--:|")
    rows = large(arguments.threads)
    write_json(RESULTS, {"environment": environment(), "in_turn": turns, "once": once, "large": rows})
    print(f"Written: {RESULTS}", file=sys.stderr)


if __name__ == "__main__":
    main()

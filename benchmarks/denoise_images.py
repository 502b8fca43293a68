"""DnCNN on images of growing size: excite, the same network in plain PyTorch, and OpenVINO where it is installed.

    python benchmarks/denoise_images.py [--weights FILE --images FOLDER]

Plain PyTorch is the network as third-party code runs it: eager, batch norms in place, channels first, the whole image
at once, in fp32. OpenVINO gets the same network, with batch norms merged as it does by itself. Measured are times and
peak memory of grey images of 512² and 1024² pixels in turn, and of 4096² once each; each with the system's allocator
and with freed buffers kept, on both sides. With ``--weights`` and ``--images`` also what the ways differ by on noisy
images, in dB. Written to ``benchmarks/results/denoise_images.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from excite.allocator import keep_freed_buffers
from excite.files import write_json
from excite.timing import Call, time_in_turn

RESULTS = Path(__file__).parent / "results" / "denoise_images.json"
SETTINGS = {"default allocator": False, "freed buffers kept": True}
SIDES = (512, 1024)
LARGE = 4096
PLAIN = "plain PyTorch"
OURS = {"excite fp32": "fp32", "excite bf16": "bf16"}
OPENVINO = {"OpenVINO fp32": "f32", "OpenVINO bf16": "bf16"}


@dataclass(frozen=True)
class Denoising:
    """One contestant: the image goes in as float32 in memory, and so does its answer come out."""

    way: str
    side: int
    keep_buffers: bool
    spec: str
    threads: int

    def __call__(self) -> Call:
        if self.keep_buffers:
            keep_freed_buffers()
        import torch

        torch.set_num_threads(self.threads)
        image = np.random.default_rng(0).random((1, self.side, self.side), dtype=np.float32)
        return way_of(network(self.spec), self.way, image, self.threads)


def network(spec: str, weights: str | None = None) -> Any:
    """With batch norms; of published weights that come without, with such as change nothing."""
    import torch

    from excite.create import create

    torch.manual_seed(0)
    return create(spec, weights=weights).eval()


def way_of(network: Any, way: str, image: np.ndarray[Any, Any], threads: int) -> Call:
    import torch

    if way in OURS:
        from excite.deploy.denoise import Denoiser

        denoiser = Denoiser(network, precision=OURS[way])
        return lambda: denoiser(image)
    batch = torch.from_numpy(image)[None]
    if way == PLAIN:

        def eager() -> object:
            with torch.inference_mode():
                return network(batch).clamp_(0, 1)[0].numpy()

        return eager
    import openvino

    core = openvino.Core()
    model = openvino.convert_model(network, example_input=batch, input=list(batch.shape))
    settings = {"INFERENCE_PRECISION_HINT": OPENVINO[way], "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(model, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
    return lambda: np.clip(compiled(batch.numpy())[0][0], 0, 1)


def ways() -> list[str]:
    there = [PLAIN, *OURS]
    return there + list(OPENVINO) if find_spec("openvino") else there


def in_turn(spec: str, side: int, rounds: int, threads: int) -> dict[str, Any]:
    """All ways in processes of their own, A B A B …, with either allocator."""
    result: dict[str, Any] = {}
    for setting, keep in SETTINGS.items():
        contestants = {way: Denoising(way, side, keep, spec, threads) for way in ways()}
        timings = time_in_turn(contestants, rounds=rounds, threads=threads, max_seconds=900)
        rows = {}
        for way in contestants:
            ratio = timings.ratio(PLAIN, way)
            rows[way] = {
                "seconds": timings.median(way),
                "times_as_fast": {"value": ratio.value, "ci95": [ratio.low, ratio.high]},
                "peak_bytes": timings.peak_bytes(way),
                "samples": list(timings.samples[way]),
            }
            times = f"{ratio.value:.2f} ({ratio.low:.2f} – {ratio.high:.2f})"
            print(
                f"| {side:,}² | {setting} | {way} | {rows[way]['seconds']:.3f} | {times} "
                f"| {timings.peak_bytes(way) / 1e6:,.0f} |",
                flush=True,
            )
        result[setting] = rows
    return result


def once(spec: str, side: int, threads: int) -> dict[str, Any]:
    """Every way in a process of its own, one call: a large image takes minutes, and plain PyTorch all the memory."""
    result: dict[str, Any] = {}
    for setting, keep in SETTINGS.items():
        rows: dict[str, Any] = {}
        for way in ways():
            command = [sys.executable, __file__, "--one", way, "--side", str(side), "--spec", spec]
            command += ["--threads", str(threads), *(["--keep"] if keep else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["it was ended: out of memory?"])[-1]
                rows[way] = {"error": reason}
                print(f"| {side:,}² | {setting} | {way} | {reason} | | |", flush=True)
                continue
            row = rows[way] = json.loads(done.stdout)
            plain = rows.get(PLAIN, {}).get("seconds")
            row["times_as_fast"] = None if plain is None else plain / row["seconds"]
            times = "–" if plain is None else f"{row['times_as_fast']:.2f}"
            memory = f"{row['peak_bytes'] / 1e6:,.0f}"
            print(f"| {side:,}² | {setting} | {way} | {row['seconds']:.1f} | {times} | {memory} |", flush=True)
        result[setting] = rows
    return result


def one(way: str, side: int, keep: bool, spec: str, threads: int) -> None:
    """One call in this process, after one on a small image."""
    Denoising(way, 64, keep, spec, threads)()()
    call = Denoising(way, side, keep, spec, threads)()
    begin = time.perf_counter()
    call()
    print(json.dumps({"seconds": time.perf_counter() - begin, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """Of this process; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def decibels(weights: str, images: str, sigma: float, threads: int) -> dict[str, Any]:
    """The mean PSNR of every way on the images of a folder with noise of one draw."""
    import torch
    from PIL import Image

    torch.set_num_threads(threads)
    trained = network("dncnn_s", weights)
    files = sorted(path for path in Path(images).iterdir() if path.suffix == ".png")
    scores: dict[str, list[float]] = {way: [] for way in (PLAIN, *OURS)}
    for number, path in enumerate(files):
        with Image.open(path) as file:
            clean = np.asarray(file.convert("L"), np.float32)[None] / 255
        noise = np.random.default_rng(number).normal(0, sigma / 255, clean.shape)
        noisy = (clean + noise).astype(np.float32)
        for way, found in scores.items():
            answer: Any = way_of(trained, way, noisy, threads)()
            found.append(-10 * float(np.log10(np.mean((answer - clean) ** 2, dtype=np.float64))))
    means = {way: float(np.mean(found)) for way, found in scores.items()}
    for way, mean in means.items():
        print(
            f"{way}: {mean:.4f} dB over {len(files)} images, {mean - means[PLAIN]:+.4f} against {PLAIN}", flush=True
        )
    return {"weights": Path(weights).name, "sigma": sigma, "images": len(files), "psnr": means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="dncnn_s")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--weights", help="a file of weights, to compare PSNR with")
    parser.add_argument("--images", help="a folder of clean grey .png for that")
    parser.add_argument("--sigma", type=float, default=25)
    parser.add_argument("--quick", action="store_true", help="tiny images, nothing written: does it run?")
    parser.add_argument("--one", metavar="WAY", help="one call, and print its figures")
    parser.add_argument("--side", type=int)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    spec, threads = arguments.spec, arguments.threads
    if arguments.one:
        one(arguments.one, arguments.side, arguments.keep, spec, threads)
        return
    from excite.verbs.compare import environment

    sides, large, rounds = ((96,), 128, 6) if arguments.quick else (SIDES, LARGE, arguments.rounds)
    print("| image | allocator | way | seconds | times as fast as plain PyTorch | peak memory, MB |")
    print("|---|---|---|--:|--:|--:|")
    result: dict[str, Any] = {"spec": spec, "threads": threads}
    result["in_turn"] = {str(side): in_turn(spec, side, rounds, threads) for side in sides}
    result["once"] = {str(large): once(spec, large, threads)}
    if arguments.weights and arguments.images:
        print()
        result["decibels"] = decibels(arguments.weights, arguments.images, arguments.sigma, threads)
    if not arguments.quick:
        write_json(RESULTS, {"environment": environment(), **result})
        print(f"Written: {RESULTS}", file=sys.stderr)


if __name__ == "__main__":
    main()

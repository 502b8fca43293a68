"""PSNR and SSIM of DnCNN with its authors' weights, beside methods that do not learn, on the same noise.

    python benchmarks/denoising_scores.py WEIGHTS FOLDER...

WEIGHTS is the folder with the authors' MatConvNet files, each FOLDER one of test pictures, such as Set12 and BSD68.
The noise is that of ``excite evaluate``: drawn from each picture's name, neither clipped nor rounded. Beside the
networks stand the noisy pictures themselves, scikit-image's non-local means (with the noise level given, its fast
mode, patches of 5 and a distance of 6 pixels, h = 0.6 σ, as in its gallery) and ``bm3d`` (``pip install bm3d``, its
default profile). Written to ``benchmarks/results/denoising_scores.json`` after every method; what is there is not
computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from excite.create import create
from excite.data.denoising import DenoisingSplit, load_denoising
from excite.deploy.denoise import Denoiser
from excite.files import write_json
from excite.tasks.denoising import score_pairs

RESULTS = Path(__file__).parent / "results" / "denoising_scores.json"
SIGMAS = (15, 25, 50)

Method = Callable[[Tensor], Tensor]


def non_local_means(sigma: float) -> Method:
    from skimage.restoration import denoise_nl_means

    def denoise(noisy: Tensor) -> Tensor:
        level = sigma / 255
        settings = {"patch_size": 5, "patch_distance": 6, "h": 0.6 * level, "sigma": level, "fast_mode": True}
        return torch.from_numpy(denoise_nl_means(noisy[0].numpy(), **settings)).float()[None]

    return denoise


def block_matching(sigma: float) -> Method:
    from bm3d import bm3d

    return lambda noisy: torch.from_numpy(np.asarray(bm3d(noisy[0].numpy(), sigma / 255))).float()[None]


def network(spec: str, weights: Path) -> Method:
    ready = Denoiser(create(spec, weights=weights))
    return lambda noisy: torch.from_numpy(ready(noisy))


def methods(weights: Path, sigma: int) -> dict[str, Callable[[], Method]]:
    return {
        "dncnn_s": lambda: network("dncnn_s", weights / f"matconvnet-sigma{sigma}.mat"),
        "dncnn_b": lambda: network("dncnn_b", weights / "matconvnet-gray-blind.mat"),
        "non-local means": lambda: non_local_means(sigma),
        "bm3d": lambda: block_matching(sigma),
    }


def scored(split: DenoisingSplit, denoise: Method) -> dict[str, Any]:
    begin = time.perf_counter()
    result = score_pairs(denoise, split)
    noisy = {name: float(np.mean(result.details[f"noisy_{name}"])) for name in ("psnr", "ssim")}
    seconds = (time.perf_counter() - begin) / len(split)
    return {**result.metrics, "noisy": noisy, "pictures": len(split), "seconds_per_picture": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--sigmas", type=int, nargs="+", default=list(SIGMAS))
    parser.add_argument("--only", nargs="+", help="these methods")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for folder in arguments.folders:
        for sigma in arguments.sigmas:
            data = load_denoising(f"denoising:{folder}", degradation=f"gaussian:{sigma}", all_for_test=True)
            assert data.test is not None
            for name, make in methods(arguments.weights, sigma).items():
                key = f"{folder.name}, σ {sigma}, {name}"
                if key in found or (arguments.only and name not in arguments.only):
                    continue
                found[key] = scored(data.test, make())
                write_json(arguments.out, found)
                print(f"{key}: {found[key]['psnr']:.3f} dB, SSIM {found[key]['ssim']:.4f}", flush=True)


if __name__ == "__main__":
    main()

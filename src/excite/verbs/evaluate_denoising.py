"""``evaluate`` for denoising: PSNR and SSIM of a network on noisy pictures whose clean ones are known."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from excite.create import create
from excite.data.degrade import Degradation
from excite.data.denoising import DenoisingData, is_denoising, load_denoising
from excite.errors import UsageError
from excite.training.bars import bar
from excite.training.fit import pick_device
from excite.training.recipe_data import drawn_channels
from excite.training.run import Run
from excite.verbs.scores import score_pictures
from excite.verbs.source import check_source
from excite.weights.fetch import resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Denoising:
    """A network that denoises, and what is known of it.

    Attributes:
        network: maps noisy images ``(N, C, H, W)`` to clean ones.
        channels: C.
        degradation: what it was trained to undo, where that is known.
        run: where it comes from, if from a run.
    """

    network: nn.Module
    channels: int
    degradation: str | None = None
    run: Run | None = None


def evaluate_denoising(
    source: str | Path | nn.Module,
    data: str | DenoisingData,
    *,
    test: str | None = None,
    weights: str | Path | None = None,
    degradation: str | None = None,
    noise_seed: int | None = None,
    quantised: bool | None = None,
    broken: str = "skip",
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Score a network on noisy pictures.

    Of a folder that is not split, a run is scored on the fifth that its training held out, and a network from
    elsewhere on all pictures.

    Args:
        source: a run's folder, a network spec (with ``weights``), or a module.
        data: a data spec, ``denoising:FOLDER`` or ``photographs``, or pictures that were loaded, with their noise.
        test: a folder of the test pictures, where ``data`` does not hold them.
        weights: for a spec: a file of weights.
        degradation: what spoils the pictures, such as ``gaussian:25`` (:class:`excite.data.degrade.Degradation`); by
            default what the run was trained to undo.
        noise_seed: of the noise, which for a picture of a given name is then always the same; by default 0, or the
            run's.
        quantised: whether the noisy pictures are clipped and rounded to 8 bits; by default not, or as in the run.
        broken: ``skip`` or ``refuse`` files that cannot be decoded.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: show bars on stderr.

    Returns:
        ``{"metrics": {"psnr", "ssim"}, "samples", "count", "images", "degradation", "noisy", "per_image"}``: PSNR in
        dB and SSIM (11×11 Gaussian window, σ 1.5) of the output, clipped to the range of the pictures, means over the
        pictures; ``images`` is their number, as ``count`` is; ``noisy`` has the two figures for the noisy pictures
        themselves; ``per_image`` has ``file``, ``psnr``, ``ssim`` and ``noisy_psnr`` of each.

    Raises:
        UsageError: the network and the pictures do not fit together, or nothing says what spoils them.
        ExciteError: the weights or the pictures cannot be read.
    """
    loaded = data if isinstance(data, DenoisingData) else None
    opened = open_denoising(source, weights, loaded.channels if loaded else None)
    if loaded is None:
        assert isinstance(data, str)
        if not is_denoising(data):
            raise UsageError(f"{source} denoises: name the data denoising:{data}, a folder of clean pictures.")
        with bar("reading pictures", progress) as step:
            loaded = load_denoising(
                data,
                test=test,
                channels=opened.channels,
                broken=broken,
                all_for_test=opened.run is None,
                progress=step,
                **_of_run(opened.run),
                **_noise(opened, degradation, noise_seed, quantised),
            )
    elif degradation or test or noise_seed is not None or quantised is not None:
        raise UsageError("the pictures are loaded, with their noise: load them with other noise instead.")
    split = loaded.test or loaded.train
    assert split is not None
    _warn(opened, split.degradation)
    with bar("denoising", progress) as step:
        scored = score_pictures(opened.network, split, pick_device(device), step)
    details = scored.details
    return {
        "metrics": scored.metrics,
        "samples": "images",
        "count": scored.count,
        "images": scored.count,
        "degradation": str(split.degradation),
        "noisy": {"psnr": float(np.mean(details["noisy_psnr"])), "ssim": float(np.mean(details["noisy_ssim"]))},
        "per_image": [
            {"file": name, "psnr": float(psnr), "ssim": float(ssim), "noisy_psnr": float(noisy)}
            for name, psnr, ssim, noisy in zip(
                details["names"], details["psnr"], details["ssim"], details["noisy_psnr"], strict=True
            )
        ],
    }


def open_denoising(
    source: str | Path | nn.Module, weights: str | Path | None, channels: int | None = None
) -> Denoising:
    """The network that is to denoise.

    Args:
        source: a run's folder, a network spec with ``weights``, or a module.
        weights: a file.
        channels: of the pictures, for a module that does not say them.

    Raises:
        UsageError: neither a run for denoising, nor a spec with weights that fit it.
        ExciteError: the weights cannot be read.
    """
    if isinstance(source, nn.Module):
        if weights is not None:
            raise UsageError("a module has weights of its own: leave the others out.")
        own = getattr(source, "in_channels", None)
        return Denoising(source, own if isinstance(own, int) else channels or 1)
    check_source(source, weights)
    if weights is None:
        run = Run.open(source)
        if run.card["task"] != "denoising":
            raise UsageError(
                f"{source} was trained for {run.card['task']}, not to denoise: give it data of that kind."
            )
        trained = run.load()
        return Denoising(trained.network, trained.preprocessing.channels, run.card["degradation"], run)
    path, _ = resolve(str(source), weights)
    network = create(str(source), weights=path).eval()
    own = getattr(network, "in_channels", None)
    return Denoising(network, own if isinstance(own, int) else drawn_channels(str(source)))


def _of_run(run: Run | None) -> dict[str, Any]:
    """What a run says of how its pictures are split."""
    return {} if run is None else {"val_fraction": run.recipe.data.val_fraction}


def _noise(
    opened: Denoising, degradation: str | None, noise_seed: int | None, quantised: bool | None
) -> dict[str, Any]:
    """What spoils the pictures: as asked, else as in the run's training."""
    asked = degradation or opened.degradation
    if asked is None:
        raise UsageError("nothing says what spoils the pictures: add --sigma 25, or --degradation jpeg:10.")
    settings = opened.run.recipe.data if opened.run else None
    if settings is not None:
        noise_seed = settings.noise_seed if noise_seed is None else noise_seed
        quantised = settings.quantised if quantised is None else quantised
    return {"degradation": asked, "noise_seed": noise_seed or 0, "quantised": bool(quantised)}


def _warn(opened: Denoising, degradation: Degradation) -> None:
    """Say that a network is scored on noise that it never learned, which is allowed."""
    if opened.degradation is None:
        return
    levels, known = degradation.gaussian_levels, Degradation.parse(opened.degradation).gaussian_levels
    if levels and known and not (known[0] <= levels[0] and levels[1] <= known[1]):
        log.warning("This network was trained for %s, and is scored on %s", opened.degradation, degradation)

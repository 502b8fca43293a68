"""A finished run with both kinds of units, made without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from excite.create import create
from excite.data.base import ImageData
from excite.preprocessing import Preprocessing
from excite.training.recipe import load
from excite.training.run import Run

SPEC = "resnet20:width=0.25+sk+se"
CLASSES = ("ant", "bee <b>&amp;</b>", "cow")


def attentive_run(folder: Path) -> Run:
    """The run's folder, with a network of random weights whose gates differ from image to image."""
    torch.manual_seed(0)
    run = Run(folder)
    load("digits").replace({"network.spec": SPEC}).write(folder / "recipe.yaml")
    network = create(SPEC, len(CLASSES)).train()
    with torch.no_grad():
        for _ in range(20):  # the statistics of its norms
            network(torch.randn(16, 3, 24, 24))
    preprocessing = Preprocessing(24, (0.5,) * 3, (0.25,) * 3)
    run.write_model(network, ImageData("made up", CLASSES, preprocessing, None, None, None), spec=SPEC)
    return run


def write_statistics(run: Run, **changes: np.ndarray) -> Path:
    """An ``explain.npz`` in the run's reports, of gates that are all 1/4 for the first class, 1/2 for the second …"""
    from excite.analysis.gates import find_gates

    arrays = {"counts": np.full(len(CLASSES), 7)}
    for gate in find_gates(run.load().network, torch.randn(2, 3, 24, 24)):
        if gate.kind == "se":
            rows = (np.arange(len(CLASSES)) + 1) / 4
            arrays[f"excitation/{gate.name}/mean"] = np.repeat(rows[:, None], gate.channels, 1)
    path = run.folder / "reports" / "explain.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **(arrays | changes))
    return path


def write_image(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
    """A picture of random blocks of colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
    return path

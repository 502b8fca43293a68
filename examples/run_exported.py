"""Name what is in images with a network that ``excite export`` wrote, without excite.

    python examples/run_exported.py FOLDER photo.jpg another.png

Takes NumPy, Pillow and the engine that the network was exported to: onnxruntime, openvino, or torch. All that is to
be known of the network is in FOLDER/model.json. Prints one line of JSON for each image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def prepare(image: Image.Image, card: dict[str, Any]) -> np.ndarray:
    """The network's input, (1, C, H, W): the shorter side resized, the centre cropped, the pixels normalised.

    Args:
        image: of any size and mode.
        card: what ``model.json`` says.
    """
    wanted = card["preprocessing"]
    size, target = wanted["size"], wanted["resize"] or wanted["size"]
    image = image.convert("RGB" if wanted["channels"] == 3 else "L")
    if wanted["resize"] is not None or image.size != (size, size):
        width, height = image.size
        scale = target / min(width, height)
        sides = (max(target, int(width * scale)), max(target, int(height * scale)))
        image = image.resize(sides, getattr(Image.Resampling, wanted["interpolation"].upper()))
        left, top = (round((side - size) / 2) for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)[None]
    if wanted["baked"]:
        return np.ascontiguousarray(pixels)
    mean, std = (np.float32(wanted[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    return np.ascontiguousarray((pixels / np.float32(255) - mean) / std)


def load(folder: Path, card: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """The network: from its input to its logits, (1, classes).

    Args:
        folder: where the files lie.
        card: what ``model.json`` says.
    """
    path = folder / next(iter(card["files"]))
    if card["format"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {card["input"]["name"]: images})[0]
    if card["format"] == "openvino":
        import openvino

        # Left alone, OpenVINO computes in bf16 on a processor that has it.
        hint = {"INFERENCE_PRECISION_HINT": "bf16" if card["precision"] == "bf16" else "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", hint)
        return lambda images: compiled(images)[0]
    import torch

    network = torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: np.ndarray = network(torch.from_numpy(images)).numpy()
        return logits

    return run


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what excite export made")
    parser.add_argument("images", type=Path, nargs="+")
    arguments = parser.parse_args()
    card = json.loads((arguments.folder / "model.json").read_text())
    network = load(arguments.folder, card)
    for path in arguments.images:
        logits = network(prepare(Image.open(path), card))[0].astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        named = dict(zip(card["classes"], probabilities.tolist(), strict=True))
        likeliest = sorted(named, key=lambda name: named[name], reverse=True)[:5]
        print(json.dumps({"file": str(path), "predictions": {name: named[name] for name in likeliest}}))


if __name__ == "__main__":
    main()

"""A network in small that puts pictures and texts into one space: by their colours."""

import hashlib
import re
from pathlib import Path

import numpy as np
from PIL import Image

from excite.data.images import BrokenImageError, decode
from excite.errors import ExciteError, UsageError

COLOURS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "red": (220, 30, 30), "green": (40, 160, 40),
    "blue": (40, 60, 200), "yellow": (240, 220, 40), "brown": (130, 80, 40), "grey": (128, 128, 128),
}  # fmt: skip


class ColourEmbedder:
    """Shares of colours among pixels, or among words, turned into the space by an orthogonal matrix.

    Attributes:
        asked: what was embedded.
    """

    def __init__(self, seed=0, dim=16):
        self.dim = dim
        self.turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, len(COLOURS))))[0].T.astype(np.float32)
        self.checksum = hashlib.sha256(self.turn.tobytes()).hexdigest()
        self.asked = []

    def embed_image_file(self, path):
        try:
            pixels = decode(Path(path).read_bytes()).permute(1, 2, 0).numpy().reshape(-1, 1, 3)
        except BrokenImageError as error:
            raise ExciteError(f"The image {path} cannot be read: {error}.") from error
        self.asked.append(Path(path).name)
        nearest = np.abs(pixels.astype(int) - np.array(list(COLOURS.values()))).sum(2).argmin(1)
        return (np.bincount(nearest, minlength=len(COLOURS)) / len(pixels)).astype(np.float32) @ self.turn

    def embed_texts(self, texts):
        counts = np.array([[re.findall(r"\w+", text.lower()).count(name) for name in COLOURS] for text in texts])
        if not counts.any(axis=1).all():
            raise UsageError("A text names no colour.")
        self.asked += texts
        return (3 * counts).astype(np.float32) @ self.turn


def paint(path, *names, size=(24, 20)):
    """Write a picture of stripes in some colours, as wide as each other."""
    pixels = np.repeat(np.array([COLOURS[name] for name in names], np.uint8), -(-size[0] // len(names)), 0)[: size[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(pixels, (size[1], size[0], 3)).copy()).save(path)
    return path

"""Small sets of images for the tests of shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def tree(root: Path, counts: dict[str, int], size: tuple[int, int] = (80, 70), suffix: str = ".png") -> Path:
    """Noise images in class folders below ``root``: ``counts`` of each; some are wide and some are high."""
    rng = np.random.default_rng(len(root.name))
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            height, width = size if i % 2 else size[::-1]
            pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((width, height)).save(root / name / f"{i}{suffix}")
    return root


def content(root: Path) -> dict[str, bytes]:
    """All files below a folder but the lock, by their paths."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }

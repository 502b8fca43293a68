"""Scenes and networks for the tests of maps, and windows cut by NumPy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from excite.create import create
from excite.data.cube import Cube
from excite.data.spectra import Spectra

BANDS, CHANNELS, WINDOW, CLASSES = 12, 7, 9, 5


class Watched:
    """A cube in memory that notes how much is read at once."""

    def __init__(self, rows: int, cols: int, seed: int = 0) -> None:
        self.values = np.random.default_rng(seed).normal(5, 2, (BANDS, rows, cols)).astype(np.float32)
        self.largest = 0

    def cube(self) -> Cube:
        def read(rows: slice, cols: slice) -> np.ndarray:
            part = self.values[:, rows, cols]
            self.largest = max(self.largest, part[0].size)
            return part

        return Cube("small", BANDS, *self.values.shape[1:], read)


def spectra(seed: int = 1) -> Spectra:
    draw = np.random.default_rng(seed)
    used = np.arange(0, BANDS, 2)
    return Spectra(used, BANDS, draw.normal(5, 1, len(used)), 0.3 * draw.normal(size=(CHANNELS, len(used))), 1.0)


def network(units: str = "", seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create(f"hybridsn:window={WINDOW}{units}", CLASSES, in_channels=CHANNELS).eval()


def windows(scene: np.ndarray) -> torch.Tensor:
    """The window around every pixel, row by row, of the scene with zeros around it: (rows · cols, K, side, side)."""
    own = spectra()
    channels = np.einsum("kb,brc->krc", own.matrix, scene[own.bands].astype(np.float64) - own.mean[:, None, None])
    half = WINDOW // 2
    framed = np.pad(channels, ((0, 0), (half, half), (half, half)))
    cut = sliding_window_view(framed, (WINDOW, WINDOW), axis=(1, 2)).transpose(1, 2, 0, 3, 4)
    return torch.tensor(cut.reshape(-1, CHANNELS, WINDOW, WINDOW), dtype=torch.float32)

"""The class of every pixel of a scene, tile by tile, in bounded memory.

A tile is read with a halo of half a window; beyond the scene's edge lie zeros, as in training. A network that can be
rewritten (:func:`excite.deploy.dense.to_dense`) is applied to the tile at once; any other is asked window by window,
with the same result.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.data.cube import Cube
from excite.data.spectra import Spectra
from excite.deploy.dense import NotDenseError, to_dense
from excite.deploy.monte_carlo import MonteCarlo
from excite.errors import UsageError

Floats = npt.NDArray[np.float32]
Step = Callable[[int, int], object]
"""Called with (done, in all)."""

Tile = tuple[int, int, int, int]
"""Top, bottom, left, right."""

TILE = 160
"""The side of a tile, in pixels: larger ones compute less of the halo twice, and take more memory."""


@dataclass(frozen=True, eq=False)
class SceneMap:
    """What a network says of every pixel of a scene.

    Attributes:
        labels: the likeliest class, counted from 0, uint8 or (beyond 256 classes) int64, (rows, cols).
        confidence: its probability, float32 (rows, cols).
        entropy: of the mean probabilities, as a share of the largest possible one, 0 … 1, float32 (rows, cols); None
            without Monte Carlo passes.
        dense: whether the network was applied to whole tiles, not window by window.
        seconds: how long it took, reading included.
    """

    labels: npt.NDArray[Any]
    confidence: Floats
    entropy: Floats | None
    dense: bool
    seconds: float


def map_scene(
    network: nn.Module,
    cube: Cube,
    spectra: Spectra,
    window: int,
    *,
    device: str | torch.device = "cpu",
    dense: bool = True,
    tile: int = TILE,
    batch: int | None = None,
    passes: int = 0,
    seed: int = 0,
    progress: Step | None = None,
) -> SceneMap:
    """Classify every pixel of a scene.

    Args:
        network: a classifier of windows (N, channels, window, window), on any device; it is used in evaluation mode
            and stays as it was.
        cube: the scene; a tile at a time is read.
        spectra: how its spectra become the network's channels.
        window: the side of the windows, in pixels, odd.
        device: where to compute.
        dense: apply the network to whole tiles where it can be rewritten; False asks it window by window in any case.
        tile: the side of a tile, in pixels.
        batch: windows at a time, for a network that is asked window by window; by default 32 on a CPU, whose caches
            the maps of more would not fit into, else 256.
        passes: how often to ask with dropout left on (Monte Carlo dropout: Gal & Ghahramani 2016, arXiv 1506.02142);
            the probabilities are the mean over the passes. 0: dropout off.
        seed: of the dropout: the same seed gives the same map, bit for bit, on the same machine.
        progress: called with (pixels done, in all).

    Raises:
        UsageError: an even window, one that the network was not built for, passes of a network without dropout, or
            a cube with other bands than ``spectra``.
        ExciteError: the cube cannot be read, or holds values that are not finite.
    """
    begin = time.perf_counter()
    tiles = _tiles(cube.rows, cube.cols, tile)
    asked = _Asked(network, window, device, batch, tiles if dense else [], passes, seed)
    labels: npt.NDArray[Any] | None = None
    confidence = np.empty((cube.rows, cube.cols), np.float32)
    entropy = np.empty_like(confidence) if passes else None
    done, total = 0, cube.rows * cube.cols
    for top, bottom, left, right in tiles:
        pixels = _pixel_numbers(top, bottom, left, right, cube.cols)
        block = _framed(cube, spectra, top, bottom, left, right, window // 2)
        probabilities = asked.probabilities(
            block, pixels, progress and (lambda more, so_far=done: progress(so_far + more, total))
        )
        shape = (bottom - top, right - left)
        best, which = probabilities.max(1)
        if labels is None:
            labels = np.empty((cube.rows, cube.cols), np.uint8 if probabilities.shape[1] <= 256 else np.int64)
        labels[top:bottom, left:right] = which.reshape(shape).cpu().numpy()
        confidence[top:bottom, left:right] = best.reshape(shape).cpu().numpy()
        if entropy is not None:
            entropy[top:bottom, left:right] = _entropy(probabilities).reshape(shape).cpu().numpy()
        done += shape[0] * shape[1]
        if progress:
            progress(done, total)
    assert labels is not None
    return SceneMap(labels, confidence, entropy, asked.is_dense, time.perf_counter() - begin)


def logits_at(
    network: nn.Module,
    padded: Tensor,
    positions: npt.NDArray[np.int64] | Tensor,
    window: int,
    device: str | torch.device = "cpu",
    batch: int | None = None,
    progress: Step | None = None,
) -> Tensor:
    """Logits of chosen pixels of a scene that lies reduced and framed in memory.

    Where they are many, a network that can be rewritten is applied to the whole scene, and theirs are picked.

    Args:
        network: as for :func:`map_scene`.
        padded: the scene in the network's channels with its frame of zeros, float32 (K, rows + window − 1,
            cols + window − 1).
        positions: row and column of each pixel, int64 (N, 2), counted without the frame.
        window: the side of the windows, in pixels, odd.
        device: where to compute.
        batch: windows at a time, as for :func:`map_scene`.
        progress: called with (done, in all).

    Returns:
        Float32 (N, classes), on the CPU.
    """
    positions = torch.as_tensor(positions)
    rows, cols = padded.shape[1] - window + 1, padded.shape[2] - window + 1
    few = len(positions) * window < rows * cols  # a window costs at least `window` times a pixel of a dense map
    tiles = [] if few else _tiles(rows, cols, TILE)
    asked = _Asked(network, window, device, batch, tiles)
    if not asked.is_dense:
        parts: list[Tensor] = []
        for part in asked.windows(padded, positions):
            parts.append(part.cpu())
            if progress:
                progress(min(len(parts) * asked.batch, len(positions)), len(positions))
        return torch.cat(parts)
    logits: Tensor | None = None
    for done, (top, bottom, left, right) in enumerate(tiles):
        row, col = positions[:, 0], positions[:, 1]
        here = ((row >= top) & (row < bottom) & (col >= left) & (col < right)).nonzero()[:, 0]
        if len(here):
            block = padded[:, top : bottom + window - 1, left : right + window - 1]
            answer = asked.dense(block).cpu()
            if logits is None:
                logits = torch.empty(len(positions), answer.shape[0])
            logits[here] = answer[:, row[here] - top, col[here] - left].T
        if progress:
            progress(done + 1, len(tiles))
    assert logits is not None
    return logits


class _Asked:
    """A network as it is asked: all windows of a tile at once where that is exact, else batches of them.

    Without tiles it is asked in batches in any case.
    """

    def __init__(
        self,
        network: nn.Module,
        window: int,
        device: str | torch.device,
        batch: int | None,
        tiles: Sequence[Tile],
        passes: int = 0,
        seed: int = 0,
    ) -> None:
        if window < 1 or window % 2 == 0:
            raise UsageError(f"A window of {window} pixels has no centre: its side must be odd.")
        self.window, self.device = window, torch.device(device)
        self.batch = batch or (32 if self.device.type == "cpu" else 256)
        network = copy.deepcopy(network).to(self.device).eval()
        self.monte_carlo = MonteCarlo(network, passes, seed) if passes else None
        self.network = self.monte_carlo.before if self.monte_carlo else network
        self._dense: nn.Module | None = None
        if tiles:
            widest = max(right - left for _, _, left, right in tiles)
            with contextlib.suppress(NotDenseError):
                self._dense = to_dense(self.network, window, widest)

    @property
    def is_dense(self) -> bool:
        return self._dense is not None

    def probabilities(
        self, block: Tensor, pixels: npt.NDArray[np.int64], progress: Callable[[int], object] | None = None
    ) -> Tensor:
        """Of all windows of a block (K, r + window − 1, c + window − 1): (r·c, classes), row by row."""
        if self._dense is not None:
            return self._shares(self.dense(block).flatten(1).T, pixels)
        rows, cols = block.shape[1] - self.window + 1, block.shape[2] - self.window + 1
        corners = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
        parts, start = [], 0
        for answer in self.windows(block, corners):
            parts.append(self._shares(answer, pixels[start : start + len(answer)]).cpu())
            start += len(answer)
            if progress:
                progress(start)
        return torch.cat(parts)

    def _shares(self, answer: Tensor, pixels: npt.NDArray[np.int64]) -> Tensor:
        return self.monte_carlo.probabilities(answer, pixels) if self.monte_carlo else answer.softmax(1)

    @torch.inference_mode()
    def dense(self, block: Tensor) -> Tensor:
        """(K, r + window − 1, c + window − 1) → (features, r, c)."""
        assert self._dense is not None
        return self._dense(block.to(self.device)[None])[0].float()

    def windows(self, block: Tensor, corners: Tensor) -> Iterator[Tensor]:
        """Of chosen windows, given by their top left corners (N, 2): (n, features), a batch at a time."""
        views = block.unfold(1, self.window, 1).unfold(2, self.window, 1).permute(1, 2, 0, 3, 4)
        for start in range(0, len(corners), self.batch):
            row, col = corners[start : start + self.batch].unbind(1)
            with torch.inference_mode():
                yield self.network(views[row, col].to(self.device)).float()


def _tiles(rows: int, cols: int, side: int) -> list[Tile]:
    """Tiles of about equal size, none larger than ``side``."""
    return [(*high, *wide) for high in _cuts(rows, side) for wide in _cuts(cols, side)]


def _cuts(length: int, most: int) -> list[tuple[int, int]]:
    count = -(-length // most)
    edges = [length * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def _framed(cube: Cube, spectra: Spectra, top: int, bottom: int, left: int, right: int, half: int) -> Tensor:
    """A tile in the network's channels with its halo, zeros beyond the scene."""
    first, last = max(top - half, 0), min(bottom + half, cube.rows)
    west, east = max(left - half, 0), min(right + half, cube.cols)
    block = torch.from_numpy(spectra.reduce(cube, first, last, west, east))
    frame = (west - (left - half), right + half - east, first - (top - half), bottom + half - last)
    return F.pad(block, frame) if any(frame) else block


def _pixel_numbers(top: int, bottom: int, left: int, right: int, cols: int) -> npt.NDArray[np.int64]:
    return (np.arange(top, bottom)[:, None] * cols + np.arange(left, right)).reshape(-1)


def _entropy(probabilities: Tensor) -> Tensor:
    """In units of the entropy of a fair draw among the classes."""
    nats = -torch.xlogy(probabilities, probabilities).sum(1)
    return nats / torch.log(torch.tensor(max(probabilities.shape[1], 2), dtype=nats.dtype))

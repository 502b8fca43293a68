"""A trained retrieval network as what turns pictures and texts into points of their common space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from excite.errors import UsageError
from excite.networks.dscmr import DSCMR
from excite.training.fit import pick_device
from excite.verbs.evaluate_retrieval import open_run

BATCH = 256


class RunEmbedder:
    """A run's network with what its inputs have to go through.

    Args:
        run: the folder of a run that was trained for retrieval.
        device: ``auto``, ``cpu``, ``cuda`` …

    Attributes:
        dim: of the common space.
        checksum: of the network's weights.

    Raises:
        UsageError: no run, or one that was trained for something else.
        ExciteError: its files are damaged.
    """

    def __init__(self, run: str | Path, device: str = "auto") -> None:
        opened = open_run(run)
        self.checksum: str = opened.card["sha256"]
        inputs = opened.inputs
        assert inputs is not None
        self._inputs = inputs
        self._device = pick_device(device)
        network = opened.load().network
        if not isinstance(network, DSCMR):
            raise UsageError(
                f"{run} trained {opened.card['spec']}, which cannot embed an image or a text alone: take dscmr."
            )
        self._network = network.to(self._device).eval()
        self.dim = network.dim

    @torch.inference_mode()
    def embed_image_file(self, path: str | Path) -> NDArray[np.float32]:
        """The point of a picture, (dim,).

        Raises:
            UsageError: no such file, or a network that knows images as vectors alone.
            ExciteError: it cannot be read.
        """
        image = self._inputs.image_file(path).to(self._device)
        point: NDArray[np.float32] = self._network.embed_images(image)[0].float().cpu().numpy()
        return point

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The points of texts, (n, dim).

        Raises:
            UsageError: an empty text, one of unknown words, or a network that knows texts as vectors alone.
        """
        rows = [
            self._network.embed_texts(self._inputs.text_vectors(texts[start : start + BATCH]).to(self._device))
            for start in range(0, len(texts), BATCH)
        ]
        return torch.cat(rows).float().cpu().numpy() if rows else np.empty((0, self.dim), np.float32)

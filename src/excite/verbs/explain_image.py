"""``explain --image``: what the attention of a trained network does with one image."""

from __future__ import annotations

import base64
import io
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excite.analysis.gates import find_gates, require_gates
from excite.analysis.one_image import check_statistics, look
from excite.data.images import BrokenImageError, decode
from excite.errors import ExciteError, UsageError
from excite.training.fit import pick_device
from excite.verbs.opened import count_outputs, open_network, output_classes
from excite.verbs.predict import usual_preprocessing

Floats = NDArray[np.floating[Any]]

STATISTICS = "explain.npz"
"""What ``excite explain`` leaves in a run's ``reports``."""
_MEAN = re.compile(r"excitation/.*/mean")


def explain_image(
    source: str | Path | nn.Module,
    image: str | Path,
    *,
    weights: str | Path | None = None,
    statistics: str | Path | None = None,
    scales: Sequence[float] = (1.0, 2.0),
    device: str = "auto",
) -> dict[str, Any]:
    """What a network sees in one image, and what its units do about it: gates, kernels, receptive field, places.

    Args:
        source: a run's folder, a network spec (with ``weights``), or a module.
        image: the file.
        weights: for a spec: a file of weights, or the tag of published ones such as ``imagenet``.
        statistics: the ``explain.npz`` that ``excite explain`` wrote for this network: what its gates are held
            against. By default the one in the run's ``reports``, where there is one.
        scales: by how much the centre is enlarged, ≥ 1 each.
        device: ``auto``, ``cpu``, ``cuda`` …

    Returns:
        ``network``, ``image``, ``classes`` (all names), ``statistics`` (the file, or None) and ``looks``: for each
        scale what :meth:`Viewer.look` gives, all for the class that is the likeliest at the first scale.

    Raises:
        UsageError: neither a finished run nor a spec with weights, a network without a unit, no such file, or
            statistics of another network.
        ExciteError: the weights or the image cannot be read.
    """
    path = Path(image)
    if not path.is_file():
        raise UsageError(f"{path} is not a file: name an image.")
    viewer = Viewer(source, weights=weights, statistics=statistics, device=device)
    try:
        pixels = viewer.decode(path.read_bytes())
    except (BrokenImageError, OSError) as error:
        raise ExciteError(f"{path} cannot be read as an image: {error}.") from error
    looks: list[dict[str, Any]] = []
    for scale in scales:
        looks.append(viewer.look(pixels, scale, looks[0]["target"] if looks else None))
    return {
        "network": viewer.name,
        "image": str(path),
        "classes": list(viewer.classes),
        "statistics": str(viewer.statistics_file) if viewer.statistics_file else None,
        "looks": looks,
    }


class Viewer:
    """A trained network that stays open, to be asked about one image after the other.

    Args:
        source: as in :func:`explain_image`, like the rest.
        weights: likewise.
        statistics: likewise.
        device: likewise.

    Attributes:
        name: of the network.
        folder: of the run; None where it is none.
        network: in evaluation mode, on its device.
        gates: its units, in the order of running.
        preprocessing: how an image becomes its input.
        classes: the names of its outputs.
        statistics_file: what the gates are held against; None where there is nothing.
    """

    def __init__(
        self,
        source: str | Path | nn.Module,
        *,
        weights: str | Path | None = None,
        statistics: str | Path | None = None,
        device: str = "auto",
    ) -> None:
        opened = open_network(source, weights)
        self.folder = Path(str(source)) if opened.of == "run" else None
        self.name = _name(source, self.folder)
        self.preprocessing = opened.preprocessing or usual_preprocessing(self.name)
        outputs = count_outputs(opened.network, self.preprocessing, device)
        self.classes = output_classes(opened, outputs) or tuple(f"class {i}" for i in range(outputs))
        self.network = opened.network.to(pick_device(device)).eval()
        # Random numbers: the gates of an even image may leave it as it is.
        size = self.preprocessing.size
        example = torch.randn(2, self.preprocessing.channels, size, size, generator=torch.Generator().manual_seed(0))
        self.gates = require_gates(find_gates(self.network, example.to(pick_device(device))))
        self.statistics_file = self._found(statistics)
        self._statistics = read_statistics(self.statistics_file) if self.statistics_file else None
        if self._statistics is not None:
            check_statistics(self._statistics, self.gates, len(self.classes))

    def _found(self, statistics: str | Path | None) -> Path | None:
        if statistics is not None:
            return Path(statistics)
        usual = self.folder / "reports" / STATISTICS if self.folder else None
        return usual if usual is not None and usual.is_file() else None

    def decode(self, content: bytes) -> Tensor:
        """An image file's pixels with as many channels as the network takes, uint8 (C, H, W).

        Raises:
            BrokenImageError: it cannot be decoded.
        """
        return decode(content, self.preprocessing.channels)

    def look(self, image: Tensor, scale: float = 1.0, target: int | None = None) -> dict[str, Any]:
        """As :func:`excite.analysis.one_image.look`, ready to be written as JSON.

        Arrays are lists of numbers with four digits. ``seen`` is a PNG as a data URI; the receptive field's ``field``
        and the activation's ``map`` are shares of their largest value.

        Raises:
            UsageError: no such class, or a scale below 1.
            ExciteError: what the network computes is not a number.
        """
        found = look(
            self.network,
            self.gates,
            image,
            self.preprocessing,
            self.classes,
            self._statistics,
            scale=scale,
            target=target,
        )
        found["seen"] = _data_uri(found["seen"])
        for part, name in (("receptive_field", "field"), ("activation", "map")):
            values = found[part][name]
            found[part][name] = values / max(float(values.max()), 1e-30)
        plain: dict[str, Any] = _plain(found)
        return plain


def read_statistics(path: str | Path) -> Mapping[str, Floats]:
    """What one image is held against in an ``explain.npz``: the mean gates, and how many images they are of.

    Raises:
        UsageError: no such file.
        ExciteError: it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"There are no statistics {path}: make them with excite explain.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name == "counts" or _MEAN.fullmatch(name)}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ExciteError(f"{path} is damaged: it is not what excite explain writes; make it anew.") from error


def _name(source: str | Path | nn.Module, folder: Path | None) -> str:
    from excite.training.run import Run

    if isinstance(source, nn.Module):
        return type(source).__name__
    return (Run.open(folder).card["spec"] or "custom") if folder else str(source)


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """Of uint8 (1 or 3, H, W)."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _plain(value: Any) -> Any:
    """Arrays as lists, and numbers with four digits: what a reader can use, and a page can be sent quickly."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value

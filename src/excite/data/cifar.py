"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), by torchvision: from a local copy, or downloaded into one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from excite.data.base import Split, StackedImages
from excite.errors import ExciteError

ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_PAGE = "https://www.cs.toronto.edu/~kriz"


def default_root() -> Path:
    """Where downloaded sets are kept: ``$EXCITE_DATA``, else ``~/.cache/excite/data``."""
    return Path(os.environ.get("EXCITE_DATA") or Path.home() / ".cache" / "excite" / "data")


def load_cifar(name: str, root: str | Path | None = None) -> tuple[tuple[str, ...], Split, Split]:
    """Class names, training split and test split, as published: 50,000 and 10,000 images of 32×32.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: the folder that holds the archive (or its unpacked folder), or shall hold it.

    Raises:
        ExciteError: it is not there and cannot be downloaded, or the copy is damaged.
    """
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = Path(root) if root is not None else default_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # torchvision checks the files' checksums, and downloads what is missing.
        parts = [kind(folder, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        archive = ARCHIVES[name]
        raise ExciteError(
            f"{name} is not in {folder} and could not be downloaded ({error}). Fetch {_PAGE}/{archive} on a machine "
            f"with network and put it into {folder}, or name the folder that has it: {name}:FOLDER."
        ) from error
    splits = [_split(part.data, part.targets, name, len(part.classes)) for part in parts]
    return tuple(parts[0].classes), splits[0], splits[1]


def _split(pixels: np.ndarray, targets: list[int], name: str, num_classes: int) -> Split:
    labels = torch.tensor(targets, dtype=torch.int64)
    stacked = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    names = [f"{name}-{i:05d}" for i in range(len(labels))]
    return Split(StackedImages(stacked, labels), labels, names, num_classes)

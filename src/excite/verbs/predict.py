"""``predict``: a trained network on the user's own images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from excite.data import Preprocessing
from excite.data.images import SUFFIXES, BrokenImageError, decode, fit, is_image_name, normalise
from excite.errors import UsageError
from excite.training.fit import pick_device
from excite.training.run import Run

BATCH = 32


def predict(
    run: str | Path, paths: Sequence[str | Path], *, top: int = 5, device: str = "auto"
) -> Iterator[dict[str, Any]]:
    """Name what is in images, one after the other, a batch at a time.

    Args:
        run: the folder of a finished run.
        paths: image files, and folders that are searched for them.
        top: how many classes to name.
        device: ``auto``, ``cpu``, ``cuda`` …

    Yields:
        ``{"file", "predictions": [{"class", "probability"}, …]}`` with the likeliest first, or ``{"file", "error"}``
        for a file that cannot be read; the rest goes on.

    Raises:
        UsageError: not a finished run, a path that does not exist, a folder without images.
    """
    if top < 1:
        raise UsageError(f"top is {top}: name at least one class")
    opened = Run.open(run)
    files = list(_files(paths))
    trained = opened.load()
    where = pick_device(device)
    network = trained.network.to(where)
    for start in range(0, len(files), BATCH):
        decoded = [_decode(file, trained.preprocessing) for file in files[start : start + BATCH]]
        good = [item for item in decoded if isinstance(item, torch.Tensor)]
        rows: Iterator[list[dict[str, Any]]] = iter(())
        if good:
            with torch.inference_mode():
                logits = network(normalise(torch.stack(good), trained.preprocessing).to(where)).float()
            likely = logits.softmax(1).cpu().topk(min(top, len(trained.classes)), dim=1)
            rows = (
                [{"class": trained.classes[i], "probability": p} for p, i in zip(ps, indices, strict=True)]
                for ps, indices in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
            )
        for file, item in zip(files[start : start + BATCH], decoded, strict=True):
            if isinstance(item, torch.Tensor):
                yield {"file": str(file), "predictions": next(rows)}
            else:
                yield {"file": str(file), "error": item}


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for given in paths:
        path = Path(given)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if is_image_name(p.name) and not p.name.startswith("."))
            if not found:
                raise UsageError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
            yield from found
        elif path.exists():
            yield path
        else:
            raise UsageError(f"{path} does not exist")


def _decode(file: Path, preprocessing: Preprocessing) -> torch.Tensor | str:
    try:
        return fit(decode(file.read_bytes(), preprocessing.channels), preprocessing)
    except (BrokenImageError, OSError) as error:
        return str(error)

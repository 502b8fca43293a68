"""``predict``: a trained network on the user's own images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from excite.data import Preprocessing
from excite.data.base import CIFAR_MEAN, CIFAR_STD
from excite.data.images import SUFFIXES, BrokenImageError, decode, fit, is_image_name, normalise
from excite.data.load import SMALL, adjusted
from excite.errors import UsageError
from excite.networks.catalog import CATALOG
from excite.networks.tables import DSCMRTable
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from excite.spec import parse_spec
from excite.training.fit import pick_device
from excite.training.run import Run
from excite.verbs.evaluate import count_outputs, open_network, output_classes
from excite.verbs.source import check_source

log = logging.getLogger(__name__)

BATCH = 32


def predict(
    source: str | Path,
    paths: Sequence[str | Path],
    weights: str | Path | None = None,
    *,
    top: int = 5,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Name what is in images, one after the other, a batch at a time.

    The images are fed as the network's weights want it: as in the run's training, or as the published file, or what
    lies beside the file, says. What is given here goes before that.

    Args:
        source: the folder of a finished run, or a network spec (with ``weights``).
        paths: image files, and folders that are searched for them.
        weights: for a spec: a file of weights, or the tag of published ones such as ``imagenet``.
        top: how many classes to name.
        mean: per channel, of pixels in 0–1.
        std: likewise.
        image_size: side of the network's input in pixels.
        resize: what the shorter side is resized to before the centre is cropped, in pixels.
        interpolation: ``bilinear`` or ``bicubic``.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: show a bar on stderr while weights are fetched.

    Yields:
        ``{"file", "predictions": [{"class", "probability"}, …]}`` with the likeliest first, or ``{"file", "error"}``
        for a file that cannot be read; the rest goes on. The classes of a file of weights are ImageNet's where it has
        1,000, and ``class 0`` … where nothing names them.

    Raises:
        UsageError: neither a finished run nor a spec with weights, a network for retrieval, a path that does not
            exist, a folder without images.
        ExciteError: the weights cannot be read or fetched.
    """
    if top < 1:
        raise UsageError(f"top is {top}: name at least one class")
    if _retrieves(source):
        raise UsageError(
            f"{source} puts images and texts into one space and names nothing: make an index with excite index, and "
            "ask it with excite search."
        )
    check_source(source, weights)
    files = list(_files(paths))
    opened = open_network(source, weights, progress=progress)
    preprocessing = adjusted(
        opened.preprocessing or usual_preprocessing(str(source)),
        mean=mean,
        std=std,
        image_size=image_size,
        resize=resize,
        interpolation=interpolation,
    )
    outputs = count_outputs(opened.network, preprocessing, device)
    classes = output_classes(opened, outputs) or tuple(f"class {i}" for i in range(outputs))
    where = pick_device(device)
    network = opened.network.to(where)
    for start in range(0, len(files), BATCH):
        decoded = [_decode(file, preprocessing) for file in files[start : start + BATCH]]
        good = [item for item in decoded if isinstance(item, torch.Tensor)]
        rows: Iterator[list[dict[str, Any]]] = iter(())
        if good:
            with torch.inference_mode():
                logits = network(normalise(torch.stack(good), preprocessing).to(where)).float()
            likely = logits.softmax(1).cpu().topk(min(top, outputs), dim=1)
            rows = (
                [{"class": classes[i], "probability": p} for p, i in zip(ps, indices, strict=True)]
                for ps, indices in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
            )
        for file, item in zip(files[start : start + BATCH], decoded, strict=True):
            if isinstance(item, torch.Tensor):
                yield {"file": str(file), "predictions": next(rows)}
            else:
                yield {"file": str(file), "error": item}


def _retrieves(source: str | Path) -> bool:
    """Whether this is the folder of a run of task retrieval, or the spec of a network for it."""
    if (Path(source) / "recipe.yaml").is_file():
        return bool(Run(source).card["task"] == "retrieval")
    try:
        spec = parse_spec(str(source))
    except UsageError:
        return False
    return spec.source is None and spec.name in CATALOG and isinstance(CATALOG[spec.name].table, DSCMRTable)


def usual_preprocessing(spec: str) -> Preprocessing:
    """What is usual for images of the size that a network is drawn for, where its weights do not say."""
    entry = CATALOG.get(parse_spec(spec).name)
    if entry is not None and entry.input_size <= SMALL:
        usual = Preprocessing(entry.input_size, CIFAR_MEAN, CIFAR_STD)
    else:
        usual = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, resize=256)
    log.warning(
        "Nothing says what images these weights expect: taken are %d×%d pixels, mean %s, std %s",
        usual.size,
        usual.size,
        usual.mean,
        usual.std,
    )
    return usual


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

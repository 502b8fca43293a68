"""``predict``: a trained network on the user's own images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excite.arguments import known
from excite.data import Preprocessing
from excite.data.base import CIFAR_MEAN, CIFAR_STD
from excite.data.images import SUFFIXES, BrokenImageError, decode, fit, is_image_name, normalise
from excite.data.load import SMALL, adjusted
from excite.deploy.engines_choice import BATCHES, choose
from excite.deploy.export import FORMATS, Exported, in_memory, is_export
from excite.errors import UsageError
from excite.networks.catalog import CATALOG
from excite.networks.tables import DSCMRTable
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from excite.spec import parse_spec
from excite.training.fit import pick_device
from excite.training.run import Run
from excite.verbs.opened import count_outputs, open_network, output_classes
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
    engine: str | None = None,
    precision: str = "fp32",
    device: str = "auto",
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Name what is in images, one after the other, a batch at a time.

    The images are fed as the network's weights want it: as in the run's training, or as the published file, or what
    lies beside the file, says. What is given here goes before that.

    Args:
        source: the folder of a finished run, a network spec (with ``weights``), or a folder made by ``export``.
        paths: image files, and folders that are searched for them.
        weights: for a spec: a file of weights, or the tag of published ones such as ``imagenet``.
        top: how many classes to name.
        mean: per channel, of pixels in 0–1.
        std: likewise.
        image_size: side of the network's input in pixels.
        resize: what the shorter side is resized to before the centre is cropped, in pixels.
        interpolation: ``bilinear`` or ``bicubic``.
        engine: ``torch``, ``onnx`` or ``openvino``: run the network rewritten for inference by this engine, on the
            CPU. How many images it gets at once and how many threads is found by trying, told in a log line, and kept
            in the folder (``engines.json``; nothing is kept for a spec). None runs the network as it was trained; an
            export is run by its own engine.
        precision: of an engine: ``fp32`` or ``bf16``; an export has its own.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: show a bar on stderr while weights are fetched.

    Yields:
        ``{"file", "predictions": [{"class", "probability"}, …]}`` with the likeliest first, or ``{"file", "error"}``
        for a file that cannot be read; the rest goes on. The classes of a file of weights are ImageNet's where it has
        1,000, and ``class 0`` … where nothing names them.

    Raises:
        UsageError: neither a finished run, an export, nor a spec with weights, a network for retrieval, a path that
            does not exist, a folder without images, an engine that is not installed.
        ExciteError: the weights cannot be read or fetched, an export is damaged.
    """
    if top < 1:
        raise UsageError(f"top is {top}: name at least one class")
    if _retrieves(source):
        raise UsageError(
            f"{source} puts images and texts into one space and names nothing: make an index with excite index, and "
            "ask it with excite search."
        )
    wishes: dict[str, Any] = {
        "mean": mean,
        "std": std,
        "image_size": image_size,
        "resize": resize,
        "interpolation": interpolation,
    }
    if engine is not None:
        known(engine, list(FORMATS), "engine")
    if engine is not None or is_export(source):
        if device not in ("auto", "cpu"):
            raise UsageError(f"An engine runs on the CPU, and the device is {device!r}: leave one of them out.")
    elif precision != "fp32":
        raise UsageError("precision is of an engine: name one, such as openvino.")
    if is_export(source):
        if weights is not None:
            raise UsageError(f"{source} is an export and has weights of its own: leave the others out.")
        files = list(_files(paths))
        ready = _exported(source, engine, precision, wishes, len(files))
    else:
        check_source(source, weights)
        files = list(_files(paths))
        ready = _trained(source, weights, wishes, engine, precision, device, len(files), progress)
    for start in range(0, len(files), ready.batch):
        decoded = [_decode(file, ready.preprocessing) for file in files[start : start + ready.batch]]
        good = [item for item in decoded if isinstance(item, torch.Tensor)]
        rows: Iterator[list[dict[str, Any]]] = iter(())
        if good:
            logits = ready.answer(torch.stack(good))
            likely = logits.softmax(1).cpu().topk(min(top, logits.shape[1]), dim=1)
            rows = (
                [{"class": ready.classes[i], "probability": p} for p, i in zip(ps, indices, strict=True)]
                for ps, indices in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
            )
        for file, item in zip(files[start : start + ready.batch], decoded, strict=True):
            if isinstance(item, torch.Tensor):
                yield {"file": str(file), "predictions": next(rows)}
            else:
                yield {"file": str(file), "error": item}


@dataclass(frozen=True)
class _Ready:
    """A network that is to name what is in images.

    Attributes:
        answer: from uint8 pixels of the input's size to logits.
        preprocessing: how images come to that size.
        classes: the names of its outputs.
        batch: how many images it is given at once.
    """

    answer: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    classes: Sequence[str]
    batch: int


def _trained(
    source: str | Path,
    weights: str | Path | None,
    wishes: dict[str, Any],
    engine: str | None,
    precision: str,
    device: str,
    count: int,
    progress: bool,
) -> _Ready:
    opened = open_network(source, weights, progress=progress)
    preprocessing = adjusted(opened.preprocessing or usual_preprocessing(str(source)), **wishes)
    outputs = count_outputs(opened.network, preprocessing, "cpu" if engine else device)
    classes = output_classes(opened, outputs) or tuple(f"class {i}" for i in range(outputs))
    if engine is not None:
        example = normalise(_black(preprocessing), preprocessing)
        network = opened.network
        memory = Path(source) / "export" / "engines.json" if opened.of == "run" else None
        choice, run = choose(
            lambda threads: in_memory(network, example, engine, precision, threads),
            example,
            count,
            key=f"{engine} {precision}",
            memory=memory,
        )
        return _Ready(
            lambda pixels: _padded(run, normalise(pixels, preprocessing), choice.batch),
            preprocessing,
            classes,
            choice.batch,
        )
    where = pick_device(device)
    network = opened.network.to(where)

    def answer(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(normalise(pixels, preprocessing).to(where)).float()
        return logits

    return _Ready(answer, preprocessing, classes, BATCH)


def _exported(source: str | Path, engine: str | None, precision: str, wishes: dict[str, Any], count: int) -> _Ready:
    export = Exported(source)
    own = export.card["format"]
    if engine not in (None, own):
        raise UsageError(f"{source} was exported to {own}, and the engine is {engine}: leave it out.")
    if precision not in ("fp32", export.card["precision"]):
        raise UsageError(f"{source} computes in {export.card['precision']}: leave the precision out.")
    for name in ("mean", "std", "image_size"):
        if wishes[name] is not None:
            raise UsageError(f"{name} was settled when {source} was exported: leave it out.")
    preprocessing = adjusted(export.preprocessing, **wishes)

    def prepare(pixels: Tensor) -> Tensor:
        return pixels if export.baked else normalise(pixels, preprocessing)

    choice, run = choose(
        export.engine,
        prepare(_black(preprocessing)),
        count,
        batches=BATCHES if export.dynamic else (1,),
        key=f"{own} {export.card['precision']}",
        memory=export.folder / "engines.json",
    )
    return _Ready(
        lambda pixels: _padded(run, prepare(pixels), choice.batch),
        preprocessing,
        export.card["classes"],
        choice.batch,
    )


def _black(preprocessing: Preprocessing) -> Tensor:
    side = preprocessing.size
    return torch.zeros(1, preprocessing.channels, side, side, dtype=torch.uint8)


def _padded(run: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    """What an engine says of images, given to it in batches of one size only: each new size would be compiled for."""
    count = len(images)
    if count < batch:
        images = torch.cat([images, images[-1:].expand(batch - count, -1, -1, -1)])
    return run(images)[:count]


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

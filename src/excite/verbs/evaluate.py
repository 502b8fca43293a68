"""``evaluate``: the scores of a trained network on a set of images."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from torch import nn

from excite.create import create
from excite.data import ImageData, Loader, Preprocessing, Split, load_data
from excite.errors import ExciteError, UsageError
from excite.files import write_atomically, write_json
from excite.tasks import classification
from excite.tasks.base import Evaluation
from excite.training.bars import Step, bar
from excite.training.fit import pick_device
from excite.training.run import Run

BATCH = 256


def evaluate(
    source: str | Path | nn.Module,
    data: str | ImageData,
    *,
    test: str | None = None,
    weights: str | Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    broken: str = "skip",
    device: str = "auto",
    per_class: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a network on the test images of a set.

    Of a set that is not split, these are the fifth of each class that training holds out as well, so that a run is
    never scored on images that it has learned from.

    Args:
        source: a run's folder, a network spec (with ``weights``), or a module.
        data: a data spec, or images of the user's own.
        test: a data spec of the test images, where ``data`` does not hold them.
        weights: a file of weights for the spec.
        mean: per channel, of pixels in 0–1; by default the run's, or the usual ones of such images.
        std: likewise.
        image_size: side of the network's input in pixels; by default the run's, or the images' own.
        broken: ``skip`` or ``refuse`` files that cannot be decoded.
        device: ``auto``, ``cpu``, ``cuda`` …
        per_class: add the accuracy of each class and the confusion matrix.
        progress: show bars on stderr.

    Returns:
        ``{"metrics": {"top1", "top5", "loss"}, "images"}``, percentages as 0–100, and with ``per_class`` also
        ``classes``, ``per_class`` (percent, None for a class without images) and ``confusion`` (true classes in
        rows).

    Raises:
        UsageError: the network and the data do not fit together.
        ExciteError: the weights or the images cannot be read.
    """
    trained = own = None
    if not isinstance(source, nn.Module) and (Path(source) / "recipe.yaml").is_file():
        trained = Run.open(source).load()
        own = trained.preprocessing
    if isinstance(data, ImageData):
        images = data
    else:
        with bar("reading images", progress) as step:
            images = load_data(
                data,
                test=test,
                mean=mean or (own.mean if own else None),
                std=std or (own.std if own else None),
                image_size=image_size or (own.size if own else None),
                channels=own.channels if own else 3,
                broken=broken,
                classes=trained.classes if trained else None,
                progress=step,
            )
    split = images.test or images.train
    assert split is not None
    if trained is not None:
        network = trained.network
    elif isinstance(source, nn.Module):
        network = source
    else:
        network = create(str(source), len(images.classes), images.preprocessing.channels, weights=weights)
    with bar("evaluating", progress) as step:
        scored = score(network, split, images.preprocessing, device, step)
    result: dict[str, Any] = {"metrics": scored.metrics, "images": scored.images}
    if per_class:
        confusion = scored.details["confusion"]
        totals = confusion.sum(1)
        right = confusion.diagonal()
        names = trained.classes if trained else images.classes
        result |= {
            "classes": list(names),
            "per_class": [100 * float(r) / float(t) if t else None for r, t in zip(right, totals, strict=True)],
            "confusion": confusion.tolist(),
        }
    return result


def score(
    network: nn.Module, split: Split, preprocessing: Preprocessing, device: str = "auto", step: Step | None = None
) -> Evaluation:
    """Evaluate on one split, in its order; ``step`` is called with (batches done, in all)."""
    batches = Loader(split, preprocessing, BATCH, seed=0)

    def counted() -> Iterator[classification.Batch]:
        for done, batch in enumerate(batches, start=1):
            yield batch
            if step:
                step(done, len(batches))

    return classification.evaluate(network, counted(), pick_device(device))


def scores_on_test(run: Run, images: ImageData, build: Callable[[], nn.Module] | None) -> NDArray[np.float32]:
    """The per-image test scores of a finished run, kept beside it so that a second comparison need not compute them.

    Args:
        run: a finished run.
        images: the data whose test split counts.
        build: makes the module for a run of the user's own class.
    """
    assert images.test is not None
    card = run.card
    if tuple(card["classes"]) != images.classes:
        raise UsageError(f"{run.folder} was trained on other classes than those of '{images.name}'")
    fingerprint = _fingerprint(images, card["sha256"])
    kept, summary = run.folder / "test.safetensors", run.folder / "test.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        if json.loads(summary.read_text())["fingerprint"] == fingerprint:
            scores: NDArray[np.float32] = safetensors.numpy.load_file(kept)["scores"]
            if len(scores) == len(images.test):
                return scores
    trained = run.load(build() if build else None)
    scored = score(trained.network, images.test, trained.preprocessing, run.recipe.trainer.device)
    arrays = {"scores": scored.scores, "predictions": scored.details["predictions"]}
    write_atomically(kept, safetensors.numpy.save(arrays))
    write_json(summary, {"metrics": scored.metrics, "images": scored.images, "fingerprint": fingerprint})
    return scored.scores


def _fingerprint(images: ImageData, weights: str) -> str:
    split = images.test
    if split is None:
        raise ExciteError(f"'{images.name}' has no test images.")
    digest = hashlib.sha256(weights.encode())
    digest.update(images.name.encode())
    digest.update(split.labels.numpy().tobytes())
    digest.update("\n".join(split.names).encode())
    return digest.hexdigest()

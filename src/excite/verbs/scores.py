"""Scores of trained networks: on one split, and those that a run keeps beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import nn

from excite.analysis.overlap import Overlap, Range, accuracy_by_distance, overlap
from excite.data import Preprocessing, Split
from excite.data.crossmodal import CrossmodalSplit
from excite.data.denoising import DenoisingSplit
from excite.data.hyperspectral import SceneData, Windows
from excite.deploy.denoise import Denoiser
from excite.deploy.scene_map import logits_at
from excite.errors import ExciteError, UsageError
from excite.files import write_atomically, write_json
from excite.tasks import denoising, hyperspectral, task_named
from excite.tasks.base import Evaluation
from excite.training.bars import Step
from excite.training.fit import pick_device
from excite.training.recipe_data import AnyData
from excite.training.run import Run


def score(
    network: nn.Module,
    split: Split | DenoisingSplit | CrossmodalSplit,
    preprocessing: Preprocessing,
    task: str = "classification",
    device: str = "auto",
    step: Step | None = None,
) -> Evaluation:
    """Evaluate on one split, in its order; ``step`` is called with (done, in all)."""
    where = pick_device(device)
    if isinstance(split, DenoisingSplit):
        return score_pictures(network, split, where, step)
    if isinstance(split, Split) and isinstance(split.images, Windows):
        windows = split.images
        said = logits_at(network, windows.padded, windows.positions, windows.window, where, progress=step)
        return hyperspectral.evaluation(said, split.labels)
    return task_named(task).score(network, split, preprocessing, where, step=step)


def score_pictures(
    network: nn.Module, split: DenoisingSplit, device: torch.device, step: Step | None = None
) -> Evaluation:
    """Evaluate on noisy pictures, large ones in tiles."""
    denoise = Denoiser(network, device=device)
    return denoising.score_pairs(lambda noisy: torch.from_numpy(denoise(noisy)), split, step=step)


def overlap_of(data: AnyData) -> Overlap | None:
    """What the test pixels of a scene share with its training pixels; None for anything else."""
    if not isinstance(data, SceneData) or not data.train or not data.test:
        return None
    return overlap(*_places(data.train), *_places(data.test), data.preprocessing.size)


def check_scene(run: Run, scene: SceneData) -> None:
    """Refuse a scene that is not as the run saw it: its test pixels may be what the network was trained on.

    Raises:
        UsageError: other classes, windows, components or training pixels.
    """
    trained, card = run.spectra, run.card
    if trained is None:
        raise UsageError(f"{run.folder} was trained on images, and {scene.name} is a hyperspectral scene.")
    if tuple(card["classes"]) != scene.classes:
        raise UsageError(f"{run.folder} was trained on other classes than those of {scene.name}")
    if card["preprocessing"]["size"] != scene.preprocessing.size:
        size = card["preprocessing"]["size"]
        raise UsageError(f"{run.folder} was trained on windows of {size} pixels, not {scene.preprocessing.size}")
    theirs = scene.spectra
    if not np.array_equal(trained.bands, theirs.bands) or not all(
        one.shape == other.shape and np.allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(one).max())
        for one, other in ((trained.mean, theirs.mean), (trained.matrix, theirs.matrix))
    ):
        raise UsageError(
            f"{run.folder} was trained on other components of the spectra than those of {scene.name}: load the scene "
            "with the run's options, or with spectra=Run.open(…).spectra"
        )
    if scene.train and card["scene"]["learned_from"] != scene.learned_from():
        raise UsageError(
            f"{run.folder} was trained on other pixels of {scene.name} than are set apart here, so that some of the "
            "test pixels would be known to it: the split is another one, or the ground truth has changed since"
        )


def by_distance(data: SceneData, scored: Evaluation) -> list[Range]:
    """The accuracy on a scene's test pixels by their distance to training pixels of their class; none without any."""
    if not data.train or not data.test:
        return []
    return accuracy_by_distance(*_places(data.train), *_places(data.test), scored.scores > 0)


def _places(split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each pixel of a scene's split, (n, 2), and its class, (n,)."""
    assert isinstance(split.images, Windows)
    return split.images.positions.numpy(), split.labels.numpy()


def per_class(scored: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """``classes``, ``per_class`` (percent, None for a class without samples) and ``confusion`` of an evaluation."""
    confusion = scored.details["confusion"]
    totals = confusion.sum(1)
    right = confusion.diagonal()
    return {
        "classes": list(classes),
        "per_class": [100 * float(r) / float(t) if t else None for r, t in zip(right, totals, strict=True)],
        "confusion": confusion.tolist(),
    }


def scores_on_test(run: Run, images: AnyData, build: Callable[[], nn.Module] | None) -> NDArray[np.float32]:
    """The per-sample test scores of a finished run, kept beside it so that a second comparison need not compute them.

    Args:
        run: a finished run.
        images: the data whose test split counts.
        build: makes the module for a run of the user's own class.
    """
    assert images.test is not None
    card = run.card
    if tuple(card["classes"]) != images.classes:
        raise UsageError(f"{run.folder} was trained on other classes than those of '{images.name}'")
    if isinstance(images, SceneData):
        check_scene(run, images)
    wanted = fingerprint(images, card["sha256"])
    kept, summary = run.folder / "test.safetensors", run.folder / "test.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        if json.loads(summary.read_text())["fingerprint"] == wanted:
            scores: NDArray[np.float32] = safetensors.numpy.load_file(kept)["scores"]
            if len(scores) == len(images.test):
                return scores
    trained = run.load(build() if build else None)
    scored = score(trained.network, images.test, trained.preprocessing, images.task, run.recipe.trainer.device)
    arrays = {"scores": scored.scores}
    if "predictions" in scored.details:
        arrays["predictions"] = scored.details["predictions"]
    write_atomically(kept, safetensors.numpy.save(arrays))
    write_json(summary, {"metrics": scored.metrics, "count": scored.count, "fingerprint": wanted})
    return scored.scores


def fingerprint(images: AnyData, weights: str) -> str:
    """What scores on the test images hang on: the images, and the weights by their checksum."""
    split = images.test
    if split is None:
        raise ExciteError(f"'{images.name}' has no test images.")
    digest = hashlib.sha256(weights.encode())
    digest.update(images.name.encode())
    digest.update(split.key())
    return digest.hexdigest()

"""``evaluate`` for hyperspectral scenes: the scores of a trained network on a scene's test pixels, and its doubts."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from excite.data.cube import same_scene
from excite.data.hyperspectral import SceneData
from excite.deploy.scene_map import SceneMap, map_scene
from excite.errors import UsageError
from excite.files import check_writable
from excite.report.scene import confusion_picture, uncertainty_picture
from excite.tasks.hyperspectral import evaluation
from excite.training.bars import bar
from excite.training.fit import pick_device
from excite.training.recipe_data import load_recipe_scene
from excite.training.run import Run, Trained
from excite.verbs import scores
from excite.verbs.files_of_maps import write_array, write_picture

log = logging.getLogger(__name__)
SINGLE_ANSWERS = 5
SUFFIXES = (".png", ".npy")


def evaluate_scene(
    source: str | Path | nn.Module,
    data: str | SceneData,
    *,
    ground_truth: str | None = None,
    mc_dropout: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    per_class: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a network on a scene's test pixels.

    On the scene that a run was trained on these are the pixels that its recipe kept for testing; on another scene
    they are all pixels of which the ground truth knows the class.

    Args:
        source: a run's folder, or a module.
        data: a data spec, or a scene that was loaded.
        ground_truth: a file of labels, where it is not found beside the scene; by default the run's.
        mc_dropout: how often to ask with dropout left on (Gal and Ghahramani 2016); 0 for not at all. The scatter of
            the answers is drawn as a map.
        out: the map of uncertainty, ``.png`` or ``.npy``; by default in the run's ``reports/``.
        device: ``auto``, ``cpu``, ``cuda`` …
        per_class: add the accuracy of each class and the confusion matrix.
        progress: show bars on stderr.

    Returns:
        ``{"metrics": {"oa", "aa", "kappa", "loss"}, "samples", "count", "overlap"}``, where ``overlap`` says what the
        test pixels share with the training pixels (:class:`excite.analysis.overlap.Overlap`; None for a scene that
        was not trained on). With ``per_class`` as for images, ``by_distance``, the accuracy near training pixels and
        far from them (:class:`excite.analysis.overlap.Range`), and of a run the ``picture`` of the confusion matrix.
        With ``mc_dropout`` also ``uncertainty``: ``passes``, the ``metrics`` of the mean of all answers,
        ``entropy_right`` and ``entropy_wrong`` (mean entropy, 0 … 1, of the pixels that are right and wrong),
        ``auroc`` (how well the entropy tells wrong pixels from right ones: 0.5 not at all, 1 perfectly; None where
        none is wrong), ``single`` (mean and standard deviation of the ``oa`` of single answers with dropout left on;
        None where that would take long), and the ``map``'s file.

    Raises:
        UsageError: the network and the scene do not fit together.
        ExciteError: the scene or the weights cannot be read.
    """
    if out is not None and not mc_dropout:
        raise UsageError("out is where the map of uncertainty goes, which mc_dropout asks for: give both or neither.")
    if out is not None and Path(out).suffix.lower() not in SUFFIXES:
        raise UsageError(f"{out}: the map of uncertainty is written as {' or '.join(SUFFIXES)}.")
    trained, scene = _opened(source, data, ground_truth, progress)
    if out is not None:
        check_writable(out)  # before the work, not after it
    network = trained.network if trained else source
    assert isinstance(network, nn.Module)
    split = scene.test
    if split is None or not len(split):
        raise UsageError(f"'{scene.name}' has no test pixels.")
    with bar("evaluating", progress) as step:
        scored = scores.score(network, split, scene.preprocessing, scene.task, device, step)
    result: dict[str, Any] = {"metrics": scored.metrics, "samples": "pixels", "count": scored.count}
    result["overlap"] = asdict(shared) if (shared := scores.overlap_of(scene)) else None
    reports = None if isinstance(source, nn.Module) else Path(source) / "reports"
    if per_class:
        result |= scores.per_class(scored, scene.classes)
        result["by_distance"] = [asdict(found) for found in scores.by_distance(scene, scored)]
        if reports is not None:
            picture = confusion_picture(scored.details["confusion"], scene.classes)
            result["picture"] = str(write_picture(reports / "confusion.png", picture))
    if mc_dropout:
        with bar("asking with dropout", progress) as step:
            where = pick_device(device)
            window = scene.preprocessing.size
            asked = map_scene(
                network, scene.cube, scene.spectra, window, device=where, passes=mc_dropout, progress=step
            )
        result["uncertainty"] = _uncertainty(asked, scene, mc_dropout) | {"single": None, "map": None}
        if asked.dense:  # window by window it would take as long as all that was done so far
            result["uncertainty"]["single"] = _single_answers(network, scene, where)
        if out is None and reports is not None:
            out = reports / "uncertainty.png"
        if out is not None:
            assert asked.entropy is not None
            if Path(out).suffix.lower() == ".png":
                write_picture(out, uncertainty_picture(asked.entropy))
            else:
                write_array(out, asked.entropy)
            result["uncertainty"]["map"] = str(out)
    return result


def _opened(
    source: str | Path | nn.Module, data: str | SceneData, ground_truth: str | None, progress: bool
) -> tuple[Trained | None, SceneData]:
    if isinstance(source, nn.Module):
        if not isinstance(data, SceneData):
            raise UsageError(
                "A module is evaluated on a scene that was loaded: excite.data.hyperspectral.load_scene."
            )
        return None, data
    run = Run.open(source)
    trained = run.load()
    if trained.spectra is None:
        raise UsageError(f"{source} was trained on images, and {data!r} is a hyperspectral scene.")
    if isinstance(data, SceneData):
        scores.check_scene(run, data)
        return trained, data
    settings = run.recipe.data
    same = same_scene(data, settings.path)
    if not same:
        log.warning(
            "%s is not the scene of the run, %s: all its labelled pixels are scored. Were it a copy of that scene, "
            "those that the network was trained on would be among them.",
            data,
            settings.path,
        )
        settings = settings.model_copy(update={"path": data, "ground_truth": None, "variable": None})
    if ground_truth is not None:
        settings = settings.model_copy(update={"ground_truth": ground_truth})
    wanted = {"spectra": trained.spectra, "classes": trained.classes, "all_for_test": not same}
    scene = load_recipe_scene(settings, progress, **wanted)
    if same:
        scores.check_scene(run, scene)
    return trained, scene


def _uncertainty(asked: SceneMap, scene: SceneData, passes: int) -> dict[str, Any]:
    assert scene.test is not None
    assert asked.entropy is not None
    rows, columns = scene.pixels.test.T
    labels = scene.test.labels
    said = torch.from_numpy(asked.labels[rows, columns].astype(np.int64))
    entropy: NDArray[np.float32] = asked.entropy[rows, columns]
    wrong = (said != labels).numpy()
    metrics = evaluation(_certain(said, len(scene.classes)), labels).metrics
    return {
        "passes": passes,
        "metrics": {name: value for name, value in metrics.items() if name != "loss"},
        "entropy_right": float(entropy[~wrong].mean()) if not wrong.all() else None,
        "entropy_wrong": float(entropy[wrong].mean()) if wrong.any() else None,
        "auroc": float(roc_auc_score(wrong, entropy)) if wrong.any() and not wrong.all() else None,
    }


def _single_answers(network: nn.Module, scene: SceneData, device: torch.device) -> dict[str, float]:
    assert scene.test is not None
    rows, columns = scene.pixels.test.T
    labels = scene.test.labels.numpy()
    scores = []
    for seed in range(SINGLE_ANSWERS):
        window = scene.preprocessing.size
        asked = map_scene(network, scene.cube, scene.spectra, window, device=device, passes=1, seed=seed)
        scores.append(100 * float((asked.labels[rows, columns] == labels).mean()))
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores, ddof=1))}


def _certain(labels: Tensor, classes: int) -> Tensor:
    """Logits that say these labels."""
    return nn.functional.one_hot(labels, classes).float()

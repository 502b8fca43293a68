"""``evaluate`` for cross-modal retrieval: how well images find texts and texts find images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from excite.analysis.retrieval import Retrieval
from excite.data.crossmodal import CrossmodalData
from excite.errors import UsageError
from excite.tasks import task_named
from excite.training.bars import bar
from excite.training.fit import pick_device
from excite.training.recipe_data import load_recipe_pairs
from excite.training.run import Run

TASK = task_named("retrieval")


def evaluate_retrieval(
    source: str | Path | nn.Module,
    data: str | CrossmodalData,
    *,
    test: str | None = None,
    broken: str = "skip",
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Score a network on the test pairs of a set.

    A run is scored on the pairs that it did not learn from, in the vectors that its training pairs gave: nothing is
    fitted on the test pairs.

    Args:
        source: a run's folder, or a module that maps (images, texts) to points, see
            :class:`excite.tasks.retrieval.RetrievalTask`.
        data: a data spec, or pairs that were loaded.
        test: the path of the test pairs, where ``data`` does not hold them.
        broken: ``skip`` or ``refuse`` pairs whose picture cannot be decoded.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: show bars on stderr.

    Returns:
        ``{"metrics": {"map", "image_to_text", "text_to_image"}, "samples", "count", "directions"}``: mean average
        precision in percent over all test pairs, and by direction ``at`` (for k of 1, 5, 10 and 50 mAP, precision and
        recall in percent), ``recalls`` and ``precisions`` of the curve (percent), and ``without_match``, the number
        of queries that have no match and are in none of the means.

    Raises:
        UsageError: the network and the pairs do not fit together.
        ExciteError: the weights or the pairs cannot be read.
    """
    if isinstance(source, nn.Module):
        if not isinstance(data, CrossmodalData):
            raise UsageError("for a module of your own, load the pairs first: they come as its training saw them.")
        network, loaded = source, data
    else:
        run = open_run(source)
        network = run.load().network
        loaded = data if isinstance(data, CrossmodalData) else _pairs_of(run, data, test, broken, progress)
        if loaded.classes != tuple(run.card["classes"]):
            raise UsageError(f"{run.folder} was trained on other classes than those of {loaded.name}")
    split = loaded.test or loaded.train
    assert split is not None
    with bar("ranking", progress) as step:
        scored = TASK.score(network, split, None, pick_device(device), step=step)
    return {
        "metrics": scored.metrics,
        "samples": TASK.samples,
        "count": scored.count,
        "directions": {name: _said(found) for name, found in scored.details.items()},
    }


def open_run(source: str | Path) -> Run:
    """A finished run that was trained for retrieval.

    Raises:
        UsageError: it was trained for something else, or is not finished.
    """
    if not (Path(source) / "recipe.yaml").is_file():
        raise UsageError(f"'{source}' is not a run: retrieval takes the folder of one, which excite train makes.")
    run = Run.open(source)
    if run.card["task"] != TASK.name:
        raise UsageError(f"{source} was trained for {run.card['task']}, not for retrieval.")
    return run


def _pairs_of(run: Run, data: str, test: str | None, broken: str, progress: bool) -> CrossmodalData:
    """The pairs as the run's training would have made them, split as there where they are the same."""
    settings = run.recipe.data
    same = settings.path == data
    wanted = settings.model_copy(
        update={
            "path": data,
            "test_path": test or (settings.test_path if same else None),
            "broken": broken,
            # What the trained inputs say already.
            "text": None,
            "text_dim": None,
            "scaling": None,
            "image_size": None,
        }
    )
    return load_recipe_pairs(
        wanted, progress, inputs=run.inputs, classes=tuple(run.card["classes"]), all_for_test=not same
    )


def _said(found: Retrieval) -> dict[str, Any]:
    return {
        "map": 100 * found.map,
        "at": {
            k: {name: 100 * share for name, share in dataclasses.asdict(at).items()} for k, at in found.at_k.items()
        },
        "recalls": np.round(100 * found.recalls, 6).tolist(),
        "precisions": np.round(100 * found.precisions, 6).tolist(),
        "without_match": found.without_match,
    }

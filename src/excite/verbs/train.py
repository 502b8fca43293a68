"""``train``: one network, one run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excite.errors import UsageError
from excite.processes import processes
from excite.tasks import task_named
from excite.training.distributed import one_sentence
from excite.training.fit import fit
from excite.training.recipe import Recipe
from excite.training.recipe_data import AnyData, load_recipe_data
from excite.training.run import Run
from excite.verbs.scores import scores_on_test


def train(
    recipe: Recipe | None = None,
    *,
    resume: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train by a recipe, or go on with a run that was cut off, and score the result on the test images.

    Args:
        recipe: what to train; not with ``resume``.
        resume: the folder of a run to go on with.
        out: a new folder; by default one below ``excite-runs/`` named after network, data and time.
        progress: show a bar on stderr.

    Returns:
        ``{"run", "spec", "epochs", "train_seconds", "metrics", "samples", "count"}``; ``metrics`` is None without
        test data, ``count`` says how many samples (``images``, ``pixels``) were scored.

    Raises:
        UsageError: neither or both of recipe and resume, or a folder that does not fit.
        ExciteError: the training failed; what was saved stays.
    """
    if (recipe is None) == (resume is None):
        raise UsageError("train needs either a recipe to start or a run to resume")
    with processes() as group, one_sentence(group):
        with group.together():
            if resume is not None and group.writes:
                recipe = Run.open(resume).recipe
        recipe = group.firsts(recipe)
        assert recipe is not None
        with group.together():
            data = load_recipe_data(recipe, progress and group.writes)
        title = recipe.network.spec if progress else None
        run = fit(recipe, resume or out, data=data, resume=resume is not None, title=title)
        with group.together():
            result = _result(run, data) if group.writes else {}
        return group.firsts(result)


def _result(run: Run, data: AnyData) -> dict[str, Any]:
    card = run.card
    result: dict[str, Any] = {
        "run": str(run.folder),
        "spec": card["spec"],
        "epochs": card["epochs"],
        "train_seconds": card["train_seconds"],
        "metrics": None,
        "samples": task_named(data.task).samples,
        "count": 0,
    }
    if data.test is not None:
        scores = scores_on_test(run, data, None)
        result |= {"metrics": run.test_metrics(), "count": len(scores)}
    return result

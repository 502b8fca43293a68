from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
import torch

from excite.errors import ExciteError, UsageError
from excite.tasks import task_named
from excite.tasks.hyperspectral import TASK, evaluation


@pytest.mark.parametrize("missing", [False, True])
def test_metrics_are_those_of_scikit_learn(missing: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4 if missing else 5, (211,), generator=generator)  # of class 4 none
    logits = torch.randn(211, 5, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 5)
    predicted = logits.argmax(1)
    result = evaluation(logits, labels)

    assert result.count == 211
    assert result.metrics["oa"] == pytest.approx(100 * sklearn.metrics.accuracy_score(labels, predicted))
    # The mean of the classes' recalls, over those that there are.
    recalls = sklearn.metrics.recall_score(labels, predicted, labels=range(4 + (not missing)), average=None)
    assert result.metrics["aa"] == pytest.approx(100 * recalls.mean())
    assert result.metrics["kappa"] == pytest.approx(
        100 * sklearn.metrics.cohen_kappa_score(labels, predicted), abs=1e-3
    )
    losses = sklearn.metrics.log_loss(labels, logits.double().softmax(1).numpy(), labels=range(5))
    assert result.metrics["loss"] == pytest.approx(losses, rel=1e-6)
    theirs = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(5))
    assert np.array_equal(result.details["confusion"], theirs)
    assert np.array_equal(result.scores, (predicted == labels).numpy())
    assert TASK.metric.factor * result.scores.mean() == pytest.approx(result.metrics["oa"])


def test_one_class_that_is_right_everywhere_agrees_fully() -> None:
    result = evaluation(torch.eye(3)[torch.zeros(7, dtype=torch.long)], torch.zeros(7, dtype=torch.long))
    assert result.metrics["kappa"] == result.metrics["oa"] == 100


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ExciteError, match="not finite for 1 of 2 pixels"):
        evaluation(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]), torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="knows 2 classes, but there are pixels of class 3"):
        evaluation(torch.zeros(2, 2), torch.tensor([0, 2]))


def test_the_task_by_its_name() -> None:
    assert task_named("hyperspectral") is TASK
    assert task_named("classification").metric.name == "top1"

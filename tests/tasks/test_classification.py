from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from torch import nn

from excite.errors import ExciteError
from excite.tasks.base import Evaluation
from excite.tasks.classification import TASK, ClassificationTask, evaluation, outputs


def evaluate(network: nn.Module, made) -> Evaluation:
    return evaluation(*outputs(network, made))


def batches(inputs: torch.Tensor, labels: torch.Tensor, size: int, order: torch.Tensor | None = None):
    order = torch.arange(len(labels)) if order is None else order
    for part in order.split(size):
        yield inputs[part], labels[part], part


@pytest.mark.parametrize("classes", [3, 8])
def test_metrics_are_those_of_scikit_learn(classes) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(101, classes, generator=generator)
    labels = torch.randint(0, classes, (101,), generator=generator)
    result = evaluate(nn.Identity(), batches(logits, labels, 20))
    probabilities = logits.double().softmax(1).numpy()
    assert result.count == 101
    assert result.metrics["top1"] == pytest.approx(100 * sklearn.metrics.accuracy_score(labels, logits.argmax(1)))
    assert result.metrics["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, probabilities), rel=1e-6)
    if classes > 5:
        theirs = sklearn.metrics.top_k_accuracy_score(labels, logits, k=5)
        assert result.metrics["top5"] == pytest.approx(100 * theirs)
    else:
        assert "top5" not in result.metrics
    assert np.array_equal(result.details["confusion"], sklearn.metrics.confusion_matrix(labels, logits.argmax(1)))
    assert np.array_equal(result.scores, (logits.argmax(1) == labels).float().numpy())
    assert TASK.metric.factor * result.scores.mean() == pytest.approx(result.metrics["top1"])


def test_scores_come_in_the_order_of_the_images_whatever_the_batches() -> None:
    logits, labels = torch.randn(50, 4), torch.randint(0, 4, (50,))
    straight = evaluate(nn.Identity(), batches(logits, labels, 50))
    mixed = evaluate(nn.Identity(), batches(logits, labels, 7, torch.randperm(50)))
    assert np.array_equal(straight.scores, mixed.scores)


def test_evaluation_uses_evaluation_mode_and_leaves_no_trace() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, batches(torch.randn(8, 4, 1, 1), torch.zeros(8, dtype=torch.long), 4))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_no_images_and_outputs_that_are_not_finite_are_errors() -> None:
    with pytest.raises(ExciteError, match="no images"):
        evaluate(nn.Identity(), [])
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    with pytest.raises(ExciteError, match="1 of 2 images"):
        evaluate(nn.Identity(), batches(logits, torch.zeros(2, dtype=torch.long), 2))


def test_the_loss_takes_weights_smoothing_and_soft_targets() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = torch.tensor([1.0, 2.0, 3.0])
    task = ClassificationTask(nn.Identity(), label_smoothing=0.1, class_weights=weights)
    # Written out: smoothed one-hot targets, log-probabilities weighted by class, mean by the labels' weights.
    smooth = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    expected = -(smooth * weights * logits.log_softmax(1)).sum() / weights[labels].sum()
    assert task.loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    soft = torch.softmax(torch.randn(6, 3), 1)
    plain = ClassificationTask(nn.Identity())
    assert plain.loss(logits, soft).item() == pytest.approx(
        -(soft * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5
    )
    step = task.one_batch((logits, labels, torch.arange(6)))
    assert step["score"].item() == (logits.argmax(1) == labels).sum().item()

"""Calibration against torchmetrics, and the temperature against scipy's and torch's own optimisers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torchmetrics.classification import MulticlassCalibrationError

from excite.errors import UsageError
from excite.verbs.calibration import calibration, fit_temperature, scaled


def answers(
    sharpness: float, count: int = 3000, classes: int = 7, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose probabilities are right at ``sharpness`` 1: the labels are drawn from them."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=draw)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
    return sharpness * logits, labels


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 2.5])
def test_the_errors_are_torchmetrics(sharpness, bins) -> None:
    logits, labels = answers(sharpness)
    found = calibration(logits, labels, bins)
    for name, norm in (("ece", "l1"), ("mce", "max")):
        theirs = MulticlassCalibrationError(logits.shape[1], n_bins=bins, norm=norm)(logits, labels)
        assert found[name] == pytest.approx(100 * theirs.item(), abs=1e-4)


def test_bins_by_hand() -> None:
    # Two classes: confidences 0.9 (right), 0.92 (wrong), 0.6 (right), and exactly 0.5, which belongs below.
    chances = torch.tensor([[0.9, 0.1], [0.08, 0.92], [0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)
    found = calibration(chances.log(), torch.tensor([0, 0, 0, 1]), bins=4)
    assert [(one["from"], one["to"], one["count"]) for one in found["bins"]] == [
        (25, 50, 1),
        (50, 75, 1),
        (75, 100, 2),
    ]
    assert [one["accuracy"] for one in found["bins"]] == [0, 100, 50]
    assert [one["confidence"] for one in found["bins"]] == pytest.approx([50, 60, 91])
    assert found["ece"] == pytest.approx((50 + 40 + 2 * 41) / 4)
    assert found["mce"] == pytest.approx(50)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_temperature_is_where_the_loss_is_least(sharpness) -> None:
    logits, labels = answers(sharpness)
    found = fit_temperature(logits, labels)
    best = minimize_scalar(
        lambda power: F.cross_entropy(logits.double() / np.exp(power), labels).item(),
        bounds=(-4, 4),
        method="bounded",
    )
    assert found == pytest.approx(np.exp(best.x), rel=1e-3)
    assert found == pytest.approx(sharpness, rel=0.08), "it undoes what made the probabilities wrong"
    temperature = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(logits.double() / temperature, labels).backward()
    assert temperature.grad is not None
    assert abs(temperature.grad.item()) < 1e-6


def test_it_does_not_hang_on_a_constant_added_to_the_logits() -> None:
    logits, labels = answers(2.0)
    assert fit_temperature(logits.double().log_softmax(1) + 50, labels) == pytest.approx(
        fit_temperature(logits.double(), labels), rel=1e-6
    )


def test_scaling_mends_the_confidence_and_changes_no_answer() -> None:
    found = fit_temperature(*answers(3.0))
    logits, labels = answers(3.0, seed=1)  # other images than it was fitted on
    before, after = scaled(logits, labels), scaled(logits, labels, found)
    assert before["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert after["loss"] < before["loss"]
    assert after["ece"] < 4 < 15 < before["ece"]


def test_answers_without_a_temperature_are_refused() -> None:
    labels = torch.arange(20) % 4
    right = F.one_hot(labels, 4).float()
    with pytest.raises(UsageError, match="all right"):
        fit_temperature(5 * right, labels)
    with pytest.raises(UsageError, match="no better than chance"):
        fit_temperature(-right, labels)

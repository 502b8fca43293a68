"""Whether a network's confidence is right: of the answers given with 80 % confidence, 80 % should be right.

Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks": the expected calibration error
(their Eq. 3), and temperature scaling (Sect. 4.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from excite.errors import UsageError

BINS = 15
HOTTEST = 100.0


def calibration(logits: Tensor, labels: Tensor, bins: int = BINS) -> dict[str, Any]:
    """How far confidence, the probability of the most likely class, is from accuracy.

    Args:
        logits: (N, classes).
        labels: (N,).
        bins: of equal width, (0, 1/bins], (1/bins, 2/bins] ….

    Returns:
        ``ece``, the mean distance between confidence and accuracy over bins, each counted by its images; ``mce``, the
        largest; and the ``bins`` that hold images, with ``from``, ``to``, ``count``, ``confidence`` and ``accuracy``.
        All but the counts are in percent.
    """
    confidence, predictions = logits.double().softmax(1).max(1)
    right = (predictions == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins)
    sums = (torch.bincount(place, weights=values, minlength=bins) for values in (confidence, right))
    sure, correct = (total / count.clamp(min=1) for total in sums)
    gap = (sure - correct).abs()
    filled = [i for i in range(bins) if count[i]]
    return {
        "ece": 100 * float((gap * count).sum() / count.sum()),
        "mce": 100 * float(gap.max()),
        "bins": [
            {
                "from": 100 * i / bins,
                "to": 100 * (i + 1) / bins,
                "count": int(count[i]),
                "confidence": 100 * float(sure[i]),
                "accuracy": 100 * float(correct[i]),
            }
            for i in filled
        ],
    }


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T for which softmax(logits / T) gives the labels the least cross-entropy.

    It changes no answer, only how sure of it the network is. The cross-entropy is convex in 1/T; where its slope
    changes sign is found by bisection.

    Args:
        logits: (N, classes), of images that the network has not learned from.
        labels: (N,).

    Raises:
        UsageError: there is no such temperature: all answers are right, or they are no better than chance.
    """
    logits = logits.double()
    logits = logits - logits.mean(1, keepdim=True)

    def slope(inverse: float) -> float:
        """Of the mean cross-entropy, by 1/T: the logit that is expected, less that of the label."""
        expected = ((inverse * logits).softmax(1) * logits).sum(1)
        return float((expected - logits.gather(1, labels[:, None])[:, 0]).mean())

    low, high = 1 / HOTTEST, HOTTEST
    if slope(high) <= 0:
        raise UsageError(
            f"No temperature can be fitted on {len(labels)} images whose answers are all right, or nearly so: give "
            "more or harder ones."
        )
    if slope(low) >= 0:
        raise UsageError("No temperature can be fitted: on these images the network is no better than chance.")
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / math.sqrt(low * high)


def scaled(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, Any]:
    """``loss`` (mean cross-entropy, in nats) and calibration of logits at a temperature."""
    cooled = logits.double() / temperature
    return {"loss": F.cross_entropy(cooled, labels).item(), **calibration(cooled, labels)}

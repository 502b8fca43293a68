"""What every task says of itself: its headline metric, and what an evaluation gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Metric:
    """The score by which networks are compared."""

    name: str
    unit: str
    higher_is_better: bool

    @property
    def factor(self) -> float:
        """What turns the mean of the images' scores into the metric in its unit."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class Evaluation:
    """What a network scored on a set of images.

    Attributes:
        metrics: every metric by name, in the task's units (percentages as 0–100).
        scores: ``(N,)``, each image's own score, whose mean is the headline metric; where that is a percentage the
            scores are fractions (0 and 1 for wrong and right).
        details: arrays that are too long for a table, such as the confusion matrix.
    """

    metrics: dict[str, float]
    scores: NDArray[np.float32]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """How many images were scored."""
        return len(self.scores)

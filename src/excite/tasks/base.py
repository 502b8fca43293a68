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


@dataclass(frozen=True)
class Evaluation:
    """What a network scored on a set of images.

    Attributes:
        metrics: every metric by name, in the task's units (percentages as 0–100).
        scores: ``(N,)``, each image's own share in the headline metric, whose mean is that metric.
        details: arrays that are too long for a table, such as the confusion matrix.
    """

    metrics: dict[str, float]
    scores: NDArray[np.float32]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """How many images were scored."""
        return len(self.scores)

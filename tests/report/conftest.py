from __future__ import annotations

import copy
from typing import Any

import pytest

RESULT: dict[str, Any] = {
    "data": "digits",
    "seeds": [0, 1, 2],
    "metric": {"name": "top1", "unit": "%", "higher_is_better": True},
    "baseline": "resnet20",
    "weights": None,
    "verdict": "resnet20+se is better than resnet20 by 1.20 points.",
    "results": [
        {
            "spec": "resnet20", "role": "baseline", "score": 95.0, "score_ci95": [94.0, 96.0], "difference": None,
            "difference_ci95": None, "p_holm": None, "parameters": 272_474, "macs": 40_813_184, "latency_ms": 2.0,
            "latency_ratio": None, "latency_ratio_ci95": None, "throughput": 1830.0, "train_seconds": 41.2,
            "runs": ["runs/resnet20/0", "runs/resnet20/1", "runs/resnet20/2"], "scores": [94.9, 95.0, 95.1],
            "start_score": None, "start_scores": None,
            "metrics": {"top1": {"mean": 95.0, "std": 0.1}, "loss": {"mean": 0.1234, "std": 0.01}},
        },
        {
            "spec": "resnet20+se", "role": "contender", "score": 96.2, "score_ci95": [95.5, 96.9], "difference": 1.2,
            "difference_ci95": [0.4, 2.0], "p_holm": 0.012, "parameters": 276_001, "macs": 40_871_000,
            "latency_ms": 2.5, "latency_ratio": 1.25, "latency_ratio_ci95": [1.2, 1.3], "throughput": 1511.0,
            "train_seconds": 47.9, "runs": ["runs/se/0", "runs/se/1", "runs/se/2"], "scores": [95.9, 96.3, 96.4],
            "start_score": None, "start_scores": None,
            "metrics": {"top1": {"mean": 96.2, "std": 0.2646}, "loss": {"mean": 0.1234, "std": 0.01}},
        },
        {
            "spec": "resnet20:width=1.25", "role": "control", "score": 95.1, "score_ci95": [94.5, 95.7],
            "difference": 0.1, "difference_ci95": [-0.7, 0.9], "p_holm": 0.71, "parameters": 424_000,
            "macs": 63_300_000, "latency_ms": 2.6, "latency_ratio": 1.3, "latency_ratio_ci95": [1.28, 1.33],
            "throughput": 1390.0, "train_seconds": 52.0, "runs": ["runs/w/0", "runs/w/1", "runs/w/2"],
            "scores": [95.1, 95.0, 95.2], "start_score": None, "start_scores": None,
            "metrics": {"top1": {"mean": 95.1, "std": 0.1}, "loss": {"mean": 0.1234, "std": 0.01}},
        },
    ],
    "recipe": {"epochs": 12, "optimiser": {"name": "sgd", "nesterov": True}, "data": {"augment": {"crop": [4, 4]}}},
    "environment": {"excite": "0.1.0", "torch": "2.14.1", "cpu": "a processor", "threads": 2, "date": "2026-01-01"},
    "samples": "images",
    "count": 1450,
    "blocks": None,
    "epochs": 12,
    "notes": ["One broken image was skipped."],
}  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    """A comparison of a baseline, a contender that is better and a control that is not."""
    return copy.deepcopy(RESULT)


@pytest.fixture
def tuned(result: dict[str, Any]) -> dict[str, Any]:
    """The same, had every network started from weights."""
    for entry, scores in zip(result["results"], ([12.0, 12.5, 13.0], [7.75] * 3, [100.0] * 3), strict=True):
        entry |= {"start_score": sum(scores) / 3, "start_scores": scores}
    return result | {"weights": "somewhere/resnet20.th"}


@pytest.fixture
def curves(result: dict[str, Any]) -> dict[str, list[dict[str, list[float | None]]]]:
    """Three epochs of two series for every seed."""
    return {
        entry["spec"]: [
            {"epoch": [1, 2, 3], "train_loss": [2.0 + seed, 1.0, 0.5], "val_score": [60.0 + seed, 80.0, 90.0]}
            for seed in range(3)
        ]
        for entry in result["results"]
    }

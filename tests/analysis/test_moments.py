from __future__ import annotations

import numpy as np
import pytest
import torch

from excite.analysis.moments import Moments


def gathered(values: torch.Tensor, labels: torch.Tensor, classes: int, sizes: list[int]) -> Moments:
    moments = Moments(classes, values.shape[1:].numel())
    for part, own in zip(values.split(sizes), labels.split(sizes), strict=True):
        moments.update(part, own)
    return moments


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [0, 7, 63, 30]])
def test_one_pass_gives_the_figures_of_numpy(sizes) -> None:
    random = np.random.default_rng(0)
    # A mean far from zero: sums of squares would lose all digits.
    values = random.normal(1e6, 0.01, (100, 2, 3))
    labels = random.choice([0, 2, 3], 100)
    moments = gathered(torch.from_numpy(values), torch.from_numpy(labels), 5, sizes)
    flat = values.reshape(100, 6)
    assert moments.count.tolist() == np.bincount(labels, minlength=5).tolist()
    for number in (0, 2, 3):
        own = flat[labels == number]
        np.testing.assert_allclose(moments.mean[number], own.mean(0), rtol=1e-13)
        np.testing.assert_allclose(moments.variance[number], own.var(0), rtol=1e-6)
    assert np.isnan(moments.mean[[1, 4]]).all()
    assert np.isnan(moments.variance[[1, 4]]).all()
    overall = moments.overall()
    assert overall.samples == 100
    np.testing.assert_allclose(overall.mean, flat.mean(0), rtol=1e-13)
    np.testing.assert_allclose(overall.deviation, flat.std(0), rtol=1e-6)


def test_what_was_gathered_apart_is_joined_exactly() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(60, 4, generator=random, dtype=torch.float64)
    labels = torch.randint(0, 3, (60,), generator=random)
    whole = gathered(values, labels, 4, [60])
    first, second, none = (gathered(values[a:b], labels[a:b], 4, [b - a]) for a, b in ((0, 13), (13, 60), (0, 0)))
    none.merge(first)
    none.merge(second)
    none.merge(Moments(4, 4))
    for name in ("count", "mean", "variance"):
        np.testing.assert_allclose(getattr(none, name), getattr(whole, name), rtol=1e-12)
    assert first.count.sum() == 13, "what was merged is left as it was"


def test_single_precision_is_summed_in_double() -> None:
    values = torch.full((4096, 1), 0.1)
    moments = gathered(values, torch.zeros(4096, dtype=torch.int64), 1, [64] * 64)
    assert moments.mean[0, 0] == pytest.approx(float(values[0].double()), rel=1e-14)
    assert moments.variance[0, 0] == 0

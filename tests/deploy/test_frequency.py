"""The convolution in the frequency domain against SciPy's plain sums in float64."""

import numpy as np
import pytest
import torch
from scipy.signal import correlate
from torch import nn

from excite.deploy.frequency import BLOCK, FrequencyConv2d, pays


def plain(x, weight, bias):
    """Σ over channels of the valid cross-correlation, in float64."""
    sums = [
        sum(correlate(plane, kernel, mode="valid", method="direct") for plane, kernel in zip(x, kernels, strict=True))
        for kernels in weight
    ]
    return np.stack(sums) + (0 if bias is None else bias[:, None, None])


@pytest.mark.parametrize(
    ("kernel", "height", "width", "with_bias"),
    [
        (17, 17, 17, True),
        (17, 17 + BLOCK - 1, 20, True),
        (17, 17 + BLOCK, 60, False),
        (8, 45, 9, True),
        (2, 70, 40, False),
        (1, 3, 33, True),
        (33, 70, 40, True),
    ],
)
def test_against_plain_sums(kernel, height, width, with_bias) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(3, 1, (3, height, width))
    weight, bias = draw.normal(size=(4, 3, kernel, kernel)), draw.normal(size=4) if with_bias else None
    expected = plain(x, weight, bias)
    tensors = [None if part is None else torch.tensor(part, dtype=torch.float32) for part in (weight, bias)]
    with torch.inference_mode():
        y = FrequencyConv2d(*tensors)(torch.tensor(x, dtype=torch.float32)[None])
    assert y.shape[1:] == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(y[0].numpy(), expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("width", [1, 29, 33, 64, 145])
def test_blocks_of_other_sides(width) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2, 50, 80), torch.randn(3, 2, 7, 7)
    expected = nn.functional.conv2d(x.double(), weight.double()).float()
    torch.testing.assert_close(FrequencyConv2d(weight, None, width)(x), expected, rtol=0, atol=2e-5)


def test_its_rounding_is_no_worse_than_that_of_the_plain_convolution() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 16, 40, 40).relu(), torch.randn(8, 16, 17, 17)
    exact = nn.functional.conv2d(x.double(), weight.double())
    ours = (FrequencyConv2d(weight, None)(x) - exact).abs().max()
    assert ours <= 1.5 * (nn.functional.conv2d(x, weight) - exact).abs().max()


def test_it_pays_for_large_kernels_only() -> None:
    assert pays(64, 256, (17, 17))
    assert not pays(64, 256, (3, 3))
    assert not pays(1, 1, (17, 17))
    assert not pays(64, 256, (17, 16))
    assert not pays(64, 256, (1, 1))

"""Convolutions with the ReLU that follows in the same pass, where PyTorch's oneDNN does that."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def convolve(convolution: nn.Conv2d, values: Tensor, padding: tuple[int, int]) -> Tensor:
    """The convolution with another zero padding, (rows, cols) on either side."""
    return functional.conv2d(
        values,
        convolution.weight,
        convolution.bias,
        padding=padding,
        stride=convolution.stride,
        dilation=convolution.dilation,
        groups=convolution.groups,
    )


def convolve_relu(convolution: nn.Conv2d, values: Tensor, padding: tuple[int, int]) -> Tensor:
    """The same, and ReLU: on a CPU without another pass over the answer."""
    if values.device.type != "cpu" or not _fuses(values.dtype):
        return convolve(convolution, values, padding).relu_()
    return _fused(convolution, values, padding)


def _fused(convolution: nn.Conv2d, values: Tensor, padding: tuple[int, int]) -> Tensor:
    # What torch.compile calls for the same; there is no public name for it.
    answer: Tensor = torch.ops.mkldnn._convolution_pointwise(
        values,
        convolution.weight,
        convolution.bias,
        list(padding),
        list(convolution.stride),
        list(convolution.dilation),
        convolution.groups,
        "relu",
        [],
        "",
    )
    return answer


@cache
def _fuses(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this processor do it, tried on a small convolution with a known answer."""
    one: dict[str, Any] = {"dtype": dtype}
    convolution = nn.Conv2d(1, 2, 1, **one).requires_grad_(False)
    convolution.weight.copy_(torch.tensor([1.0, -1.0], **one).view(2, 1, 1, 1))
    assert convolution.bias is not None
    convolution.bias.fill_(1)
    try:
        answer = _fused(convolution, torch.full((1, 1, 1, 2), 2, **one), (0, 1))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return answer.flatten().tolist() == [1, 3, 3, 1, 1, 0, 0, 1]

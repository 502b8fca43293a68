"""The passes in C, called with tensors.

All maps are (N, C, H, W), dense in channels-last order, float32 or bfloat16; gates are (N, C) in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from excite.native.build import kernels

FUNCTIONS = {
    "identity": 0,
    "relu": 1,
    "sigmoid": 2,
    "hard_sigmoid": 3,
    "tanh": 4,
    "silu": 5,
    "hard_swish": 6,
    "relu6": 7,
}
LANES = 16
"""Maps have a multiple of so many channels."""


@dataclass(frozen=True)
class Excitation:
    """The small layers between a squeeze and its gates.

    Attributes:
        reduce, reduce_bias: the first linear layer, from :func:`packed_layer`.
        activation, function: names in ``FUNCTIONS``: between the layers, and of the gate.
        expand, expand_bias: the second, likewise.
        factor: the gates are this times the function.
        hidden, out: d and C′, what the two layers answer with.
    """

    reduce: Tensor
    reduce_bias: Tensor
    activation: str
    expand: Tensor
    expand_bias: Tensor
    function: str
    factor: float
    hidden: int
    out: int


def available(dtype: torch.dtype) -> bool:
    """Whether the passes can be had for maps of this type."""
    return dtype in (torch.float32, torch.bfloat16) and kernels(dtype) is not None


def laid_out(u: Tensor) -> Tensor:
    """The map in dense channels-last order: itself, if it is."""
    return (
        u if u.is_contiguous(memory_format=torch.channels_last) else u.contiguous(memory_format=torch.channels_last)
    )


def can_group(dtype: torch.dtype) -> bool:
    """Whether grouped convolutions can be had for maps of this type: in bfloat16 the processor has to multiply it."""
    library = kernels(dtype) if available(dtype) else None
    return library is not None and bool(library.has_grouped())


def packed_layer(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A linear layer (out, in) as the passes read it: blocks of 16 outputs, (⌈out/16⌉, in, 16), in the maps' type.

    The bias is in float32.
    """
    out, given = weight.shape
    missing = -out % LANES
    whole = F.pad(weight.float(), (0, 0, 0, missing)).reshape(-1, LANES, given).transpose(1, 2).contiguous()
    known = weight.new_zeros(out) if bias is None else bias
    return whole.to(dtype), F.pad(known.float(), (0, missing)).contiguous()


def gates(maps: Sequence[Tensor], e: Excitation) -> Tensor:
    """Gates (N, C′) from the mean of one map, or of the sum of two, in float32.

    Args:
        maps: one or two.
        e: the layers.
    """
    first = laid_out(maps[0])
    second = laid_out(maps[1]) if len(maps) > 1 else None
    n, channels, height, width = first.shape
    hidden, out = e.hidden, e.out
    pieces = 1 if n > 1 else min(_PIECES, height * width)
    answer = torch.empty(n, out)
    scratch = torch.empty(n * ((pieces + 1) * channels + hidden))
    library = kernels(first.dtype)
    assert library is not None
    library.gate(
        first.data_ptr(),
        None if second is None else second.data_ptr(),
        n,
        height * width,
        channels,
        *_layers(e),
        out,
        *_functions(e),
        answer.data_ptr(),
        scratch.data_ptr(),
        pieces,
    )
    return answer


_PIECES = 8
"""Into so many pieces one map is cut to be summed up: a number of the map's, so that threads change no bit."""


def _layers(e: Excitation) -> tuple[Any, ...]:
    layers = (e.reduce.data_ptr(), e.reduce_bias.data_ptr(), e.hidden, FUNCTIONS[e.activation])
    return (*layers, e.expand.data_ptr(), e.expand_bias.data_ptr())


def _functions(e: Excitation) -> tuple[int, float]:
    return FUNCTIONS[e.function], e.factor


def scale(u: Tensor, gate: Tensor, shortcut: Tensor | None, relu: bool, answer: Tensor) -> Tensor:
    """gate · u (+ shortcut) (then ReLU), written to ``answer``, which may be one of the maps."""
    library = kernels(u.dtype)
    assert library is not None
    n, channels, height, width = u.shape
    other = None if shortcut is None else shortcut.data_ptr()
    library.scale(u.data_ptr(), gate.data_ptr(), other, answer.data_ptr(), n, height * width, channels, relu)
    return answer


def select_two(u: Tensor, v: Tensor, gate: Tensor, answer: Tensor) -> Tensor:
    """v + gate · (u − v), written to ``answer``, which may be one of the maps."""
    library = kernels(u.dtype)
    assert library is not None
    n, channels, height, width = u.shape
    library.select_two(u.data_ptr(), v.data_ptr(), gate.data_ptr(), answer.data_ptr(), n, height * width, channels)
    return answer


@dataclass(frozen=True)
class Branch:
    """A grouped convolution with as many channels out as in.

    Attributes:
        weight: from :func:`packed_groups`.
        bias: (C,) in float32, or None.
        group: channels of a group: 4, 8, or a multiple of 16.
        kernel, padding: (rows, columns).
        stride, dilation: the same in both dimensions.
    """

    weight: Tensor
    bias: Tensor | None
    group: int
    kernel: tuple[int, int]
    padding: tuple[int, int]
    stride: int
    dilation: int

    def answers(self, height: int, width: int) -> tuple[int, int]:
        """The sides of what it makes of a map."""
        (rows, columns), (pad_h, pad_w) = self.kernel, self.padding
        high = (height + 2 * pad_h - self.dilation * (rows - 1) - 1) // self.stride + 1
        return high, (width + 2 * pad_w - self.dilation * (columns - 1) - 1) // self.stride + 1


def packed_groups(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (C, group, rows, columns) of a grouped convolution in the order that the passes read."""
    channels, group, rows, columns = weight.shape
    blocks = weight.reshape(channels // LANES, LANES, group, rows, columns).permute(0, 3, 4, 2, 1)
    if dtype == torch.bfloat16:  # two input channels side by side
        blocks = blocks.reshape(channels // LANES, rows, columns, group // 2, 2, LANES).transpose(-1, -2)
    return blocks.to(dtype).contiguous()


def grouped(x: Tensor, branch: Branch, relu: bool) -> Tensor:
    """A grouped convolution, and perhaps ReLU: (N, C, H, W) → (N, C, H′, W′)."""
    n, channels, height, width = x.shape
    out_h, out_w = branch.answers(height, width)
    answer = torch.empty((n, channels, out_h, out_w), dtype=x.dtype, memory_format=torch.channels_last)
    library = kernels(x.dtype)
    assert library is not None
    failed = library.grouped(
        x.data_ptr(),
        branch.weight.data_ptr(),
        None if branch.bias is None else branch.bias.data_ptr(),
        answer.data_ptr(),
        n,
        height,
        width,
        channels,
        branch.group,
        *branch.kernel,
        branch.stride,
        branch.dilation,
        *branch.padding,
        out_h,
        out_w,
        relu,
    )
    if failed:
        raise MemoryError("There is no memory left for the rows of a grouped convolution.")
    return answer


def grouped_weight(x: Tensor, dy: Tensor, weight: Tensor, branch: Branch) -> Tensor:
    """The gradient of the weight (C, group, rows, 3) of a grouped convolution of 4 or 8 channels to a group.

    Args:
        x: what went into the convolution, (N, C, H, W).
        dy: the gradient of what came out of it, (N, C, H′, W′).
        weight: the weight, for its shape and type.
        branch: the convolution; its own weight and bias are not read.
    """
    n, channels, height, width = x.shape
    rows, columns = branch.kernel
    sums = torch.empty((n, channels // LANES, rows, columns, branch.group, LANES), dtype=torch.float32)
    library = kernels(x.dtype)
    assert library is not None
    failed = library.grouped_weight(
        x.data_ptr(),
        dy.data_ptr(),
        sums.data_ptr(),
        n,
        height,
        width,
        channels,
        branch.group,
        rows,
        columns,
        branch.stride,
        branch.dilation,
        *branch.padding,
        *dy.shape[2:],
    )
    if failed:
        raise MemoryError("There is no memory left for the rows of a grouped convolution.")
    # [blocks][rows][columns][group][lanes], as the weight has it
    whole = sums.sum(0, dtype=torch.float64).permute(0, 4, 3, 1, 2).reshape(weight.shape)
    return whole.to(weight.dtype)


_AT_ONCE_BYTES = 2**20
"""Of selective kernels, what both branches may answer before a selection is made: it is to stay in the caches."""


def selective(x: Tensor, branches: tuple[Branch, Branch], e: Excitation) -> Tensor:
    """Selective kernels of two branches with ReLU: (N, C, H, W) → (N, C, H′, W′).

    Args:
        x: the map.
        branches: both; their answers are of one size.
        e: from the mean of their sum to the share of the first.
    """
    n, channels, height, width = x.shape
    first = branches[0]
    out_h, out_w = first.answers(height, width)
    image = out_h * out_w * channels
    images = max(1, min(n, _AT_ONCE_BYTES // (2 * image * x.element_size())))
    answer = torch.empty((n, channels, out_h, out_w), dtype=x.dtype, memory_format=torch.channels_last)
    maps = torch.empty(2 * images * image, dtype=x.dtype)
    scratch = torch.empty(images * ((2 * out_h + 2) * channels + e.hidden))
    library = kernels(x.dtype)
    assert library is not None
    both: list[Any] = []
    for branch in branches:
        bias = None if branch.bias is None else branch.bias.data_ptr()
        both += [branch.weight.data_ptr(), bias, *branch.kernel, branch.dilation, *branch.padding]
    failed = library.selective(
        x.data_ptr(),
        answer.data_ptr(),
        n,
        images,
        height,
        width,
        channels,
        first.group,
        first.stride,
        out_h,
        out_w,
        *both,
        *_layers(e),
        *_functions(e),
        maps.data_ptr(),
        scratch.data_ptr(),
    )
    if failed:
        raise MemoryError("There is no memory left for the rows of a selective kernel.")
    return answer

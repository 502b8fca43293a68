"""Split: the convolutions of a selective kernel's branches, of one map and with one gradient for it.

What they compute is what the convolutions compute one by one. What is different is the way there:

* A convolution whose stride is a multiple of its dilation looks at every d-th position only: it is one without
  dilation of the map that holds those. PyTorch has no quick gradients for convolutions that stride and are dilated.
* Where groups have 4 or 8 channels, fewer than the processor's vectors, the passes in C do what they are quicker at:
  convolutions without a stride, the gradient of their map, which is the convolution with kernels turned around, and
  that of their weight.
* The branches' gradients are added up in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.native import passes, training_passes

from .training_forms import can_act, is_bare

_NARROW = (4, 8)


def split(x: Tensor, convolutions: Sequence[nn.Module]) -> list[Tensor]:
    """Returns what each convolution makes of the map.

    Args:
        x: the map, (N, C, *).
        convolutions: one for each branch.
    """
    if not can_act(x) or not all(_is_simple(convolution) for convolution in convolutions):
        return [convolution(x) for convolution in convolutions]
    steps: Sequence[Any] = convolutions
    weights: list[Tensor] = [step.weight for step in steps]
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        lower = torch.get_autocast_dtype("cpu")
        x, *weights = (value.to(lower) for value in (x, *weights))
    ways = tuple(_way(convolution, x) for convolution in convolutions)
    if any(weight.dtype != x.dtype for weight in weights) or not training_passes.is_laid_out(x):
        return [convolution(x) for convolution in convolutions]
    return list(_Split.apply(ways, x, *weights))


def _is_simple(convolution: nn.Module) -> bool:
    return (
        type(convolution) is nn.Conv2d
        and is_bare(convolution)
        and convolution.bias is None
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


# --- the ways to convolve ----------------------------------------------------------------------------------------


Pair = tuple[int, int]


@dataclass(frozen=True)
class _Way:
    """How a convolution is computed.

    Attributes:
        every: of so many positions in each dimension one is looked at.
        stride, padding, dilation: of the convolution of what is left.
        groups: of the channels.
        in_c: whether the passes in C can do it.
    """

    every: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    in_c: bool

    def thinned(self, x: Tensor) -> Tensor:
        """The positions that are looked at."""
        if self.every == (1, 1):
            return x
        return self.of(x).contiguous(memory_format=torch.channels_last)

    def of(self, x: Tensor) -> Tensor:
        """A view of them."""
        return x[:, :, :: self.every[0], :: self.every[1]]

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of what is left of a map."""
        if self.in_c and self.stride == (1, 1):
            return passes.grouped(x, self._branch(weight, self.padding), relu=False)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def gradients(self, dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> list[Tensor | None]:
        """The gradients of what is left of a map, and of the weight: those that are asked for."""
        found: list[Tensor | None] = [None, None]
        if of_x and self.in_c and self.stride == (1, 1):
            found[0] = self._turned_around(dy, weight)
        # Without a stride, PyTorch is as quick from 8 channels on.
        if of_weight and self.in_c and weight.shape[3] == 3 and (weight.shape[1] == 4 or self.stride != (1, 1)):
            found[1] = passes.grouped_weight(x, dy, weight, self._branch(weight, self.padding))
        asked = [of_x and found[0] is None, of_weight and found[1] is None, False]
        if any(asked):
            places = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
            rest = torch.ops.aten.convolution_backward(dy, x, weight, None, *places, asked)
            found = [own if own is not None else other for own, other in zip(found, rest, strict=False)]
        return found

    def _turned_around(self, dy: Tensor, weight: Tensor) -> Tensor:
        group = weight.shape[1]
        inwards = weight.view(self.groups, group, *weight.shape[1:]).transpose(1, 2).flip(3, 4).flatten(0, 1)
        sides = zip(weight.shape[2:], self.dilation, self.padding, strict=True)
        first, second = (dilation * (side - 1) - padding for side, dilation, padding in sides)
        return passes.grouped(dy, self._branch(inwards, (first, second)), relu=False)

    def _branch(self, weight: Tensor, padding: Pair) -> passes.Branch:
        packed, (rows, columns) = passes.packed_groups(weight, weight.dtype), weight.shape[2:]
        group = weight.shape[1]
        return passes.Branch(packed, None, group, (rows, columns), padding, self.stride[0], self.dilation[0])


def _way(convolution: Any, x: Tensor) -> _Way:
    stride, padding, dilation = convolution.stride, convolution.padding, convolution.dilation
    every: Pair = (1, 1)
    if all(one % d == 0 for value in (stride, padding) for one, d in zip(value, dilation, strict=True)):
        every, dilation = dilation, (1, 1)
        stride, padding = (tuple(one // d for one, d in zip(v, every, strict=True)) for v in (stride, padding))
    channels, group, rows, columns = convolution.weight.shape
    in_c = (
        group in _NARROW
        and channels == convolution.in_channels
        and channels % passes.LANES == 0
        and stride[0] == stride[1]
        and dilation[0] == dilation[1]
        and padding[0] <= dilation[0] * (rows - 1)
        and padding[1] <= dilation[1] * (columns - 1)
        and passes.can_group(x.dtype)
    )
    return _Way(every, stride, padding, dilation, convolution.groups, in_c)


class _Split(torch.autograd.Function):
    """(ways, x, weights …) → what each of them makes of x."""

    @staticmethod
    def forward(ctx: Any, ways: tuple[_Way, ...], x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.ways = ways
        ctx.set_materialize_grads(False)
        return tuple(way.convolve(way.thinned(x), weight) for way, weight in zip(ways, weights, strict=True))

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        ways: tuple[_Way, ...] = ctx.ways
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            return None, *_differentiable(ways, x, weights, given, wanted)
        dx: Tensor | None = None
        of_weights: list[Tensor | None] = [None] * len(weights)
        # Those of every position first: the others are added to some of them.
        for m in sorted(range(len(ways)), key=lambda m: ways[m].every):
            dy, way = given[m], ways[m]
            if dy is None:
                continue
            dy = dy.contiguous(memory_format=torch.channels_last)
            own, of_weights[m] = way.gradients(dy, way.thinned(x), weights[m], wanted[0], wanted[1 + m])
            if own is None:
                continue
            if way.every == (1, 1):
                dx = own if dx is None else dx.add_(own)
            else:
                dx = torch.zeros_like(x) if dx is None else dx
                way.of(dx).add_(own)
        return None, dx, *of_weights


def _differentiable(
    ways: Sequence[_Way], x: Tensor, weights: Sequence[Tensor], given: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x and of the weights that are wanted, such that they have gradients themselves."""
    both = zip(ways, weights, given, strict=True)
    pairs = [
        (F.conv2d(way.of(x), weight, None, way.stride, way.padding, way.dilation, way.groups), dy)
        for way, weight, dy in both
        if dy is not None
    ]
    inputs = [value for value, is_wanted in zip((x, *weights), wanted, strict=True) if is_wanted]
    outputs, gradients = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, gradients, create_graph=True, allow_unused=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]

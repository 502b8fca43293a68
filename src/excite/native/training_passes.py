"""The passes of the units' training forms in C, called with tensors.

All maps are (N, C, *), dense with the channels last, float32 or bfloat16. What belongs to channels is float32, (C,),
or (N, C) where it is each image's own, such as the sums over its positions.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from excite.native.build import kernels

_PIECE = 256
"""So many positions of an image are summed in float32 before the sum goes on in float64."""

_SAMPLES = 16
"""Of so many positions the mean is taken, to be near that of all."""


def available(dtype: torch.dtype) -> bool:
    """Whether the passes can be had for maps of this type."""
    return dtype in (torch.float32, torch.bfloat16) and _library(dtype) is not None


def is_laid_out(c: Tensor) -> bool:
    """Whether a map is dense with its channels last."""
    return c.movedim(1, -1).is_contiguous()


def laid_out_as(c: Tensor, value: Tensor) -> Tensor:
    """A value of the map's shape in the map's type and layout: itself, if it is."""
    if value.dtype == c.dtype and is_laid_out(value):
        return value
    return torch.empty_like(c).copy_(value)


def moments(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over positions of c − k and of its square, and k (C,), which is near the mean of c.

    What is near 0 keeps its digits when it is squared and summed.
    """
    # An odd step, or the positions might all be of one column, such as that at the border.
    rows = c.movedim(1, -1).reshape(-1, c.shape[1])
    near = rows[:: len(rows) // _SAMPLES | 1].mean(0, dtype=torch.float32)
    first, second = _summed(2, c, "moments", c, near)
    return first, second, near


def active(c: Tensor, a: Tensor, b: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """At how many positions a · c + b is above 0, and the sums of c − mean over those."""
    count, sums = _summed(2, c, "active", c, a, b, mean)
    return count, sums


def join(c: Tensor, shortcut: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """relu(p · c + q + shortcut) with p and q (N, C)."""
    out = torch.empty_like(c)
    _call(c, "join", c, shortcut, p, q, out)
    return out


def join_backward(dy: Tensor, out: Tensor, c: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g = dy where out is above 0, and the sums of g and of g · (c − mean)."""
    g = torch.empty_like(c)
    first, second = _summed(2, c, "join_backward", dy, out, c, mean, g)
    return g, first, second


def select(
    maps: Sequence[Tensor], lines: Sequence[tuple[Tensor, Tensor]], factors: Sequence[Tensor], relus: int
) -> Tensor:
    """Σ factor · u over branches, where u is relu(a · c + b), or a · c + b.

    Args:
        maps: c of each branch.
        lines: a and b of each.
        factors: of each, (N, C).
        relus: a bit for each branch that has a ReLU.
    """
    v = torch.empty_like(maps[0])
    a, b = zip(*lines, strict=True)
    _call(v, "select_sum", _pointers(maps), _pointers(a), _pointers(b), _pointers(factors), len(maps), relus, v)
    return v


def select_backward(
    dv: Tensor, maps: Sequence[Tensor], lines: Sequence[tuple[Tensor, Tensor]], means: Sequence[Tensor], relus: int
) -> list[tuple[Tensor, Tensor]]:
    """For each branch the sums of dv and of dv · (c − mean) over the positions where its ReLU lets gradients through.

    Args:
        dv: the gradient of the selection.
        maps, lines, relus: as in :func:`select`.
        means: of each branch's c.
    """
    a, b = zip(*lines, strict=True)
    given = (dv, _pointers(maps), _pointers(a), _pointers(b), _pointers(means), len(maps), relus)
    sums = _summed(2 * len(maps), dv, "select_backward", *given)
    return list(zip(sums[::2], sums[1::2], strict=True))


def through_norm(
    g: Tensor, c: Tensor, p: Tensor, q: Tensor, r: Tensor, t: Tensor, line: tuple[Tensor, Tensor], relu: bool
) -> Tensor:
    """p · g + q where the ReLU behind the line a · c + b lets it through (or everywhere), and to that r · c + t.

    p and q are (N, C).
    """
    dc = torch.empty_like(c)
    _call(c, "through_norm", g, c, _pointers((p, q, r, t, *line)), relu, dc)
    return dc


def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    return kernels(dtype, "training.c")


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _pieces(c: Tensor) -> int:
    return -(-math.prod(c.shape[2:]) // _PIECE)


def _summed(kinds: int, c: Tensor, name: str, *given: Any) -> list[Tensor]:
    """Calls a pass that takes sums."""
    n, channels = c.shape[:2]
    scratch = torch.empty(n * _pieces(c) * kinds * -(-channels // 16) * 16, dtype=torch.float32)
    sums = torch.empty((kinds, n, channels), dtype=torch.float32)
    _call(c, name, *given, scratch, sums)
    return list(sums.unbind(0))


def _call(c: Tensor, name: str, *given: Any) -> None:
    """Calls a pass over maps like c."""
    library = _library(c.dtype)
    assert library is not None
    pointed = (value.data_ptr() if isinstance(value, Tensor) else value for value in given)
    getattr(library, name)(*pointed, c.shape[0], math.prod(c.shape[2:]), c.shape[1], _pieces(c))

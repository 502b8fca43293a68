"""Training forms: what the units compute, in fewer passes over their maps and with fewer of them kept.

PyTorch's autograd keeps, for every product of a map and a gate, the map. But behind a batch norm the map u follows
from the norm's input c, which the norm keeps anyway: u = a · c + b with one a and one b per channel. The functions
here keep c alone and compute u again, part by part, when the gradients want it:

* :func:`excited` is relu(s · bn(c) + shortcut), the end of a residual branch with squeeze-and-excitation;
* :class:`Branch` and :func:`selected` are the branches and the selection of a selective kernel.

They give the gradients of the plain composition (and its second gradients, where they are asked for by
``create_graph=True``). What they cannot do is left to it: another device than the CPU, half precision, evaluation
mode, hooks on the modules that are passed over, `torch.compile` (which decides for itself what to keep), `torch.fx`,
`torch.func`, forward-mode gradients.

Of channels-last maps in float32 and bfloat16 u is never written down where the passes in C can be had
(:mod:`excite.native.training_passes`): what follows it is computed from c, and the sums that a batch norm, a squeeze
and their gradients need come out of the same few passes. Elsewhere PyTorch's operators do the work, for a few images
of a gradient at a time: what several operators need lies in the processor's cache then. How many follows from the
shape alone, so that a repeat sums in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.native import training_passes as passes

from .efficient_channel import EfficientChannelAttention
from .parts import Mean
from .squeeze_excite import SqueezeExcite

_CACHED = 2**18
"""So many numbers of each map are worked on at a time: 1 MiB of float32."""

_TYPES = (torch.float32, torch.float64, torch.bfloat16)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# --- where they apply ------------------------------------------------------------------------------------------


def can_act(x: Tensor) -> bool:
    """Whether a map is one of the types, on the device and in the mode that the functions here are for."""
    # First of all, so that a compiler sees nothing of the rest.
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._get_tracing_state() is not None:
        return False
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in _TYPES
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def applies_to(c: Tensor, norm: nn.Module) -> bool:
    """Whether a map that goes into a batch norm can take a training form.

    Args:
        c: the map, (N, C, *).
        norm: what normalises it.
    """
    return (
        can_act(c)
        and c.requires_grad
        and type(norm) in _NORMS
        and is_bare(norm)
        and norm.training
        and norm.weight is not None
        and c.dim() > 2
        and c.shape[1] == norm.num_features
        and c.numel() > c.shape[1]  # of one value per channel batch norm itself has something to say
        and (norm.weight.dtype == c.dtype or (c.dtype == torch.bfloat16 and norm.weight.dtype == torch.float32))
    )


def is_bare(module: nn.Module) -> bool:
    """Whether nobody but the module itself takes part in its call: no hook, of its own or of all modules."""
    every = torch.nn.modules.module
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


def ends_branch(c: Tensor, norm: nn.Module, unit: nn.Module, activation: nn.Module) -> bool:
    """Whether :func:`excited` may stand for activation(unit(norm(c), shortcut)).

    Args:
        c: the map that goes into the batch norm, (N, C, *).
        norm: the batch norm.
        unit: one whose gate follows from the mean of its map alone, by its method ``excitation``.
        activation: a ReLU.
    """
    return (
        applies_to(c, norm)
        and type(unit) in (SqueezeExcite, EfficientChannelAttention)
        and type(unit.squeeze) is Mean
        and type(activation) is nn.ReLU
        and all(is_bare(module) for module in (unit, unit.squeeze, activation))
    )


def can_come_apart(x: Tensor, branches: Iterable[nn.Module]) -> bool:
    """Whether every branch is a convolution, a batch norm in training and a ReLU or nothing, to be called one by one.

    Args:
        x: what goes into the branches.
        branches: as :class:`~excite.units.selective_kernel.SelectiveKernel` has them.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not torch.is_grad_enabled():
        return False
    return all(
        type(branch) is nn.Sequential
        and len(branch) == 3
        and is_bare(branch)
        and type(branch[1]) in _NORMS
        and branch[1].training
        and type(branch[2]) in (nn.ReLU, nn.Identity)
        and is_bare(branch[2])
        for branch in branches
    )


# --- the forms -------------------------------------------------------------------------------------------------


def excited(c: Tensor, norm: nn.Module, unit: nn.Module, shortcut: Tensor) -> Tensor:
    """Returns relu(s · u + shortcut) for u = norm(c) and s = excitation(mean of u over all positions).

    Args:
        c: the map, (N, C, *); see :func:`applies_to`.
        norm: a batch norm in training mode; its running statistics move on.
        unit: a :class:`SqueezeExcite` or :class:`EfficientChannelAttention`, which has the excitation.
        shortcut: what is added.
    """
    assert isinstance(unit, (SqueezeExcite, EfficientChannelAttention))
    if shortcut.shape != c.shape or shortcut.dtype != c.dtype:
        return F.relu(unit(norm(c), shortcut))
    branch = Branch(c, norm, relu=False)
    s = unit.excitation(branch.z)
    out: Tensor = _ScaleAdd.apply(branch.u, s, shortcut, branch.call, *branch.given)
    return out


class Branch:
    """A branch of a selective kernel behind its convolution.

    Args:
        c: the convolution's map, (N, C, *); see :func:`applies_to`.
        norm: a batch norm in training mode; its running statistics move on.
        relu: whether a ReLU follows.

    Attributes:
        u: norm(c) or relu(norm(c)), or what only stands for it in the graph. It is not kept for the backward pass,
            is overwritten in :func:`selected`, and must be used nowhere else: its gradient is a private matter of the
            functions here.
        z: the mean of u over all positions, (N, C).
    """

    def __init__(self, c: Tensor, norm: nn.Module, relu: bool) -> None:
        assert isinstance(norm, _NORMS)
        weight, bias = norm.weight, norm.bias
        self.call = _Call(relu, norm.eps, _has_passes(c, weight, bias))
        self.u, self.z, mean, rstd = _Normalise.apply(c, weight, bias, self.call, *_moved_on(norm))
        self.given: tuple[Tensor, ...] = (c, weight, bias, mean, rstd)


def selected(branches: Sequence[Branch], attention: Tensor) -> Tensor:
    """Returns V = a₁ · u₁ + … + a_M · u_M.

    Args:
        branches: M of them, with maps of one shape.
        attention: (N, M, C), which adds up to 1 over M: of two branches only the first one's is used.
    """
    calls = tuple(branch.call for branch in branches)
    maps, given = (branch.u for branch in branches), (value for branch in branches for value in branch.given)
    v: Tensor = _Select.apply(calls, attention, *maps, *given)
    return v


def _moved_on(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> tuple[Tensor | None, Tensor | None, float]:
    """The running statistics that are to be updated, and by how much, as the norm's own forward pass has it."""
    if not norm.track_running_stats:
        return None, None, 0.0
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    return norm.running_mean, norm.running_var, momentum or 0.0


# --- the functions ---------------------------------------------------------------------------------------------


class _Call:
    """What the batch norm and the product behind it know of each other in one forward and backward pass.

    The product hands back the gradient of its *output* in the place of u's, which spares a map, and here the factor
    that is missing. Both are gone when the norm has taken them, so that nothing is kept by it.
    """

    def __init__(self, relu: bool, eps: float, in_c: bool) -> None:
        self.relu, self.eps = relu, eps
        self.in_c = in_c  # whether the passes in C do the work, and u is not there
        self.factor: Tensor | None = None  # of the gradient that is handed back, (N, C)
        # Of that gradient g, and of g · (c − mean), over the positions where u lets a gradient through, (N, C).
        self.sums: tuple[Tensor, Tensor] | None = None

    def take(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What was put in."""
        factor, sums = self.factor, self.sums
        assert factor is not None
        self.factor = self.sums = None
        return factor, sums

    def again(self, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """u, in operators that autograd can differentiate."""
        u = F.batch_norm(c, None, None, weight, bias, True, 0.0, self.eps)
        return u.relu() if self.relu else u

    def again_backward(
        self, c: Tensor, weight: Tensor, bias: Tensor, du: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The gradients of (c, weight, bias), such that they have gradients themselves."""
        u = self.again(c, weight, bias)
        pairs = [(o, d) for o, d in ((u, du), (u.mean(_positions(c)), dz)) if d is not None]
        outputs, gradients = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, (c, weight, bias), gradients, create_graph=True)


class _Normalise(torch.autograd.Function):
    """(c, weight, bias) → u, its mean over positions, and the mean and 1 / deviation of every channel of c."""

    @staticmethod
    def forward(
        ctx: Any,
        c: Tensor,
        weight: Tensor,
        bias: Tensor,
        call: _Call,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        step = _normalised_in_c if call.in_c else _normalised
        u, z, mean, rstd, *shares = step(c, weight, bias, call, running_mean, running_var, momentum)
        ctx.save_for_backward(c, weight, bias, mean, rstd, *shares)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        return u, z.to(c.dtype), mean, rstd

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        c, weight, bias, mean, rstd, *shares = ctx.saved_tensors
        call: _Call = ctx.call
        if g is None and dz is None:
            return (None,) * 7
        gradients: tuple[Tensor, ...]
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            gradients = call.again_backward(c, weight, bias, g, dz)
        else:
            share = None if dz is None else dz.to(_sum_type(c)) / math.prod(c.shape[2:])
            factor, sums = (None, None) if g is None else call.take()
            if g is not None and factor is not None and sums is not None:
                gradients = _through_norm(c, (weight, bias, mean, rstd), call, shares, g, factor, sums, share)
            else:
                du = _through_relu(c, weight, bias, mean, rstd, call.relu, g, factor, share)
                gradients = torch.ops.aten.native_batch_norm_backward(
                    du, c, weight, None, None, mean, rstd, True, call.eps, [True, True, True]
                )
        return *gradients, None, None, None, None


_Normalised = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _normalised(
    c: Tensor,
    weight: Tensor,
    bias: Tensor,
    call: _Call,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> _Normalised:
    """u, z, and each channel's mean and 1 / deviation, and what :func:`_through_norm` may want.

    That is at how many positions of an image the ReLU lets a gradient through (None: at all of them), and the sums of
    c − mean over those.
    """
    u, mean, rstd = torch.native_batch_norm(c, weight, bias, running_mean, running_var, True, momentum, call.eps)
    kind, positions = _sum_type(c), math.prod(c.shape[2:])
    if call.relu:
        return u, u.relu_().sum(_positions(c), dtype=kind) / positions, mean, rstd, None, None
    away = c.sum(_positions(c), dtype=kind) - positions * mean
    return u, weight * rstd * (away / positions) + bias, mean, rstd, None, away


def _normalised_in_c(
    c: Tensor,
    weight: Tensor,
    bias: Tensor,
    call: _Call,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> _Normalised:
    """The same, with what has u's shape and no contents in u's place."""
    first, second, near = passes.moments(c)
    positions = math.prod(c.shape[2:])
    m = c.shape[0] * positions
    beyond = first.sum(0) / m
    variance = (second.sum(0) / m - beyond.square()).clamp_min_(0)
    mean, rstd = near + beyond, (variance + call.eps).rsqrt()
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((variance * (m / (m - 1))).to(running_var.dtype), momentum)
    if call.relu:
        count, away = passes.active(c, *_line(weight, bias, mean, rstd), mean)
    else:
        count, away = None, first - positions * beyond
    z = (weight * rstd * away + bias * (positions if count is None else count)) / positions
    u = c.new_empty_strided(c.shape, (0,) * c.dim())
    return u, z, mean, rstd, count, away


def _through_norm(
    c: Tensor,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    call: _Call,
    shares: Sequence[Tensor | None],
    g: Tensor,
    s: Tensor,
    sums: tuple[Tensor, Tensor],
    share: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (c, weight, bias) where that of u is s · g + share, and 0 where a ReLU gave 0.

    With ĉ = (c − mean) · rstd, m numbers in each channel and du = s · g + share or 0, the gradient of batch norm is

        dc = weight · rstd · (du − Σ du / m − ĉ · Σ (du · ĉ) / m),

    whose sums follow from those over each image's positions: dc is du · weight · rstd + r · c + t, in one pass.
    """
    weight, _, mean, rstd = given
    count, away = shares
    g_sum, ga_sum = sums
    m = c.numel() // c.shape[1]
    if share is None:
        share = torch.zeros_like(s)
    assert away is not None
    bias_gradient = (s * g_sum + share * (m // c.shape[0] if count is None else count)).sum(0)
    weight_gradient = ((s * ga_sum + share * away) * rstd).sum(0)
    a = weight * rstd
    r = -a * rstd * weight_gradient / m
    p, q, t = a * s, a * share, -a * bias_gradient / m - r * mean
    if call.in_c:
        p, q, r, t = (_floats(value) for value in (p, q, r, t))
        dc = passes.through_norm(passes.laid_out_as(c, g), c, p, q, r, t, _line(*given), call.relu)
    else:
        kind, dc = _sum_type(c), torch.empty_like(c)
        p, q, r = (_wide(value.to(kind), c) for value in (p, q + t, r[None]))
        for part, room in _parts(c, dc):
            torch.addcmul(q[part], g[part].to(kind), p[part], out=room).addcmul_(c[part].to(kind), r)
            _put(room, dc[part])
    return dc, weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype)


def _through_relu(
    c: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
    g: Tensor | None,
    factor: Tensor | None,
    share: Tensor | None,
) -> Tensor:
    """factor · g + share, and 0 where the ReLU behind the norm of c gave 0."""
    kind, du = _sum_type(c), torch.empty_like(c)
    a, b = _wide_line(c, weight, bias, mean, rstd)
    factor, share = (None if value is None else _wide(value, c) for value in (factor, share))
    for part, room in _parts(c, du):
        if g is None or factor is None:
            room.copy_(share[part].expand_as(room) if share is not None else torch.zeros_like(room))
        elif share is None:
            torch.mul(g[part].to(kind), factor[part], out=room)
        else:
            torch.addcmul(share[part], g[part].to(kind), factor[part], out=room)
        if relu:
            u = torch.addcmul(b, c[part].to(kind), a)
            torch.ops.aten.threshold_backward.grad_input(room, u, 0, grad_input=room)
        _put(room, du[part])
    return du


class _ScaleAdd(torch.autograd.Function):
    """(u, s, shortcut) → relu(s · u + shortcut), written over u. In the backward pass c stands for u."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        s: Tensor,
        shortcut: Tensor,
        call: _Call,
        c: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        rstd: Tensor,
    ) -> Tensor:
        if call.in_c:
            a, b = _line(weight, bias, mean, rstd)
            wide = s.float()
            out = passes.join(c, passes.laid_out_as(c, shortcut), _floats(wide * a), _floats(wide * b))
        else:
            out = torch.addcmul(shortcut, u, _wide(s.to(u.dtype), u), out=u).relu_()
            ctx.mark_dirty(u)
        ctx.save_for_backward(out, s, c, weight, bias, mean, rstd)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        out, s, c, weight, bias, mean, rstd = ctx.saved_tensors
        call: _Call = ctx.call
        nothing = (None,) * 6
        if torch.is_grad_enabled():
            g = dy * (out > 0)
            ds = (g * call.again(c, weight, bias)).sum(_positions(c))
            return g * _wide(s.to(g.dtype), g), ds.to(s.dtype), g, *nothing
        kind = _sum_type(c)
        if call.in_c:
            g, g_sum, ga_sum = passes.join_backward(passes.laid_out_as(c, dy), out, c, mean)
        else:
            g, g_sum = torch.empty_like(c), torch.empty_like(s, dtype=kind)
            gc_sum = torch.empty_like(g_sum)
            for part, room in _parts(c):
                torch.ops.aten.threshold_backward.grad_input(dy[part], out[part], 0, grad_input=g[part])
                torch.sum(g[part], _positions(c), dtype=kind, out=g_sum[part])
                torch.mul(g[part].to(kind), c[part].to(kind), out=room)
                torch.sum(room, _positions(c), out=gc_sum[part])
            ga_sum = gc_sum - mean * g_sum
        ds = weight * rstd * ga_sum + bias * g_sum
        call.factor, call.sums = s.to(kind), (g_sum, ga_sum)
        return g, ds.to(s.dtype), g, *nothing


class _Select(torch.autograd.Function):
    """(calls, attention, u₁ …, and five of each branch that stand for u) → Σ attention · u, written over one u."""

    @staticmethod
    def forward(ctx: Any, calls: tuple[_Call, ...], attention: Tensor, *tensors: Tensor) -> Tensor:
        given = _fives(tensors[len(calls) :])
        alike = len({(one[0].shape, one[0].dtype) for one in given}) == 1
        ctx.in_c = alike and all(call.in_c for call in calls)
        if ctx.in_c:
            factors = [_floats(factor) for factor in _factors(attention.float())]
            v = passes.select([one[0] for one in given], [_line(*one[1:]) for one in given], factors, _relus(calls))
        else:
            # One that is not there has a layout of its own.
            maps = [
                call.again(*one[:3]) if call.in_c else u for call, one, u in zip(calls, given, tensors, strict=False)
            ]
            v = _weighted_sum(maps, attention)
            if not calls[-1].in_c:
                ctx.mark_dirty(v)
        ctx.save_for_backward(attention, *tensors[len(calls) :])
        ctx.calls = calls
        return v

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        attention, *rest = ctx.saved_tensors
        calls: tuple[_Call, ...] = ctx.calls
        given = _fives(rest)
        c = given[0][0]
        nothing = (None,) * len(rest)
        if torch.is_grad_enabled():
            dots = [(g * call.again(*one[:3])).sum(_positions(c)) for call, one in zip(calls, given, strict=True)]
            factors = _factors(attention.to(g.dtype))
            gradients = [g * _wide(factor, g) for factor in factors]
            return None, _of_attention(dots).to(attention.dtype), *gradients, *nothing
        kind = _sum_type(c)
        for call, factor in zip(calls, _factors(attention.to(kind)), strict=True):
            call.factor = factor
        if ctx.in_c:
            g = passes.laid_out_as(c, g)
            lines, means = [_line(*one[1:]) for one in given], [one[3] for one in given]
            both = passes.select_backward(g, [one[0] for one in given], lines, means, _relus(calls))
            for call, sums in zip(calls, both, strict=True):
                call.sums = sums
            dots = [
                weight * rstd * ga_sum + bias * g_sum
                for (g_sum, ga_sum), (_, weight, bias, _, rstd) in zip(both, given, strict=True)
            ]
            return None, _of_attention(dots).to(attention.dtype), *[g] * len(calls), *nothing
        dots = [torch.empty_like(attention[:, 0], dtype=kind) for _ in calls]
        lines = [_wide_line(*one) for one in given]
        for part, room in _parts(c):
            for call, one, (a, b), dot in zip(calls, given, lines, dots, strict=True):
                torch.addcmul(b, one[0][part].to(kind), a, out=room)
                if call.relu:
                    room.relu_()
                room.mul_(g[part])
                torch.sum(room, _positions(c), out=dot[part])
        return None, _of_attention(dots).to(attention.dtype), *[g] * len(calls), *nothing


def _weighted_sum(maps: Sequence[Tensor], attention: Tensor) -> Tensor:
    """Σ attention · u, written over the last u."""
    weights = [_wide(a, maps[0]) for a in attention.to(maps[0].dtype).unbind(1)]
    if len(maps) == 2:
        return torch.lerp(maps[1], maps[0], weights[0], out=maps[1])
    v = maps[-1].mul_(weights[-1])
    for u, weight in zip(maps[:-1], weights, strict=False):
        v.addcmul_(u, weight)
    return v


def _fives(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """What stands for the u of each branch: c, weight, bias, mean, rstd."""
    return [tensors[i : i + 5] for i in range(0, len(tensors), 5)]


def _relus(calls: Sequence[_Call]) -> int:
    """A bit for each branch that has a ReLU."""
    return sum(call.relu << m for m, call in enumerate(calls))


def _factors(attention: Tensor) -> tuple[Tensor, ...]:
    """What each branch is multiplied with: of two the second one with 1 less the first one's attention."""
    a = attention.unbind(1)
    return (a[0], 1 - a[0]) if len(a) == 2 else a


def _of_attention(dots: Sequence[Tensor]) -> Tensor:
    """The gradient of the attention (N, M, C) from each branch's Σ g · u over positions, (N, C)."""
    if len(dots) == 2:
        return torch.stack((dots[0] - dots[1], torch.zeros_like(dots[0])), 1)
    return torch.stack(tuple(dots), 1)


# --- small things ----------------------------------------------------------------------------------------------


def _positions(c: Tensor) -> tuple[int, ...]:
    return tuple(range(2, c.dim()))


def _wide(values: Tensor, c: Tensor) -> Tensor:
    """(N, C) → (N, C, 1, …), to be multiplied with maps of so many dimensions as c has."""
    return values.view(values.shape + (1,) * (c.dim() - 2))


def _sum_type(c: Tensor) -> torch.dtype:
    """What sums over a map of this type are kept in."""
    return torch.float32 if c.dtype == torch.bfloat16 else c.dtype


def _line(weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of u = a · c + b."""
    a = weight * rstd
    return a, bias - a * mean


def _wide_line(c: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the type of sums, as wide as c."""
    a, b = _line(weight, bias, mean, rstd)
    return _wide(a.to(_sum_type(c))[None], c), _wide(b.to(_sum_type(c))[None], c)


def _floats(values: Tensor) -> Tensor:
    """As the passes in C read them."""
    return values.to(torch.float32).contiguous()


def _has_passes(c: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the passes in C can do the work."""
    return (
        weight.dtype == bias.dtype == torch.float32
        and weight.is_contiguous()
        and bias.is_contiguous()
        and passes.is_laid_out(c)
        and passes.available(c.dtype)
    )


def _parts(c: Tensor, result: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The images of a map a few at a time, with room of the type of sums for as many.

    Args:
        c: the map.
        result: where the room is to be, if that is of the right type.
    """
    kind = _sum_type(c)
    step = max(1, _CACHED * len(c) // c.numel())
    if result is not None and result.dtype == kind:
        for start in range(0, len(c), step):
            yield slice(start, start + step), result[start : start + step]
    else:
        room = torch.empty_like(c[:step], dtype=kind)
        for start in range(0, len(c), step):
            part = slice(start, start + step)
            yield part, room[: len(c[part])]


def _put(room: Tensor, target: Tensor) -> None:
    """Stores what was worked out, unless it was worked out in its place."""
    if room.data_ptr() != target.data_ptr():
        target.copy_(room)

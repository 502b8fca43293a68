"""Batch norm over the images of several processes, as if one process had them all.

On CUDA that is PyTorch's own ``SyncBatchNorm``. It knows no other device, and so here is the same in plain operators:
every process tells the others the mean, the variance and the number of its values in each channel, which combine to
those of all (Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
1979); in the backward pass the sums over all values are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from excite.errors import UsageError

_EPS = 1e-12  # keeps a constant channel's 1 / √variance finite, and is taken off again


@contextmanager
def synchronised(network: nn.Module, device: str = "cpu") -> Iterator[None]:
    """Within it, every batch norm of a network in training takes its statistics over all processes.

    The modules stay the same objects with the same parameters, buffers and hooks, only their class is another one.

    Args:
        network: changed in place.
        device: the type of device on which it will be.

    Raises:
        UsageError: a batch norm does more than its class says, such as one of timm's with an activation of its own.
    """
    before: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for name, module in network.named_modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                before.append((module, type(module)))
                module.__class__ = _synchronised(module, name, device)  # type: ignore[assignment]
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind


def _synchronised(module: nn.Module, name: str, device: str) -> type[nn.Module]:
    kind = type(module)
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return _OnCuda if device == "cuda" else SharedBatchNorm
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return _SharedWithActivation
    raise UsageError(
        f"key 'trainer.sync_batch_norm': set it to false, for {name} is a {kind.__name__}, whose statistics cannot "
        "be shared"
    )


class SharedBatchNorm(_BatchNorm):
    """Batch norm whose statistics are those of all processes' values; how many each has may differ, and be none.

    In evaluation mode it is batch norm, and its ``state_dict`` is batch norm's.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected a map (N, C, *), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *) → the same shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        keep = _momentum(self)
        out, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), keep)
                # As batch norm has it: the running variance is the unbiased one.
                unbiased = variance * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), keep)
        normed: Tensor = out
        return normed


class _SharedWithActivation(SharedBatchNorm):
    """timm's ``BatchNormAct2d``: batch norm, then its ``drop`` and ``act``."""

    def forward(self, input: Tensor) -> Tensor:
        drop, act = self.drop, self.act
        assert isinstance(drop, nn.Module)
        assert isinstance(act, nn.Module)
        out: Tensor = act(drop(super().forward(input)))
        return out


class _OnCuda(nn.SyncBatchNorm):
    process_group = None  # all processes; only __init__, which is passed over, would set it


def _momentum(norm: _BatchNorm) -> float:
    """How far the running statistics move on in this step."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0


class _Normalise(torch.autograd.Function):
    """(x, weight, bias) → batch norm of x, and the mean, the variance and the number of all processes' values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kind = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        mean, variance, count = _statistics(x.to(kind))
        if count < 2:
            raise ValueError(f"expected more than 1 value per channel of all processes, got {int(count)}")
        rstd = (variance + eps).rsqrt()
        out = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        kind, shape = mean.dtype, (1, -1, *[1] * (x.dim() - 2))
        given, dy, x = x.dtype, dy.to(kind), x.to(kind)
        own = _sums(dy, x, mean, rstd)
        total = own.clone()
        dist.all_reduce(total)
        # dx = weight · rstd · (dy − Σ dy / n − x̂ · Σ (dy · x̂) / n), the sums and n those of all processes; with
        # x̂ = (x − mean) · rstd that is a · dy + b · x + c with one a, b and c per channel.
        slope = rstd if weight is None else rstd * weight.to(kind)
        of_dy, of_product = (total / count).unbind()
        b = -slope * rstd * of_product
        c = -slope * of_dy - b * mean
        dx = (dy * slope.view(shape)).addcmul_(x, b.view(shape)).add_(c.view(shape)).to(given)
        if weight is None:
            return dx, None, None, None
        # Of parameters each process gives its own part: what adds up their gradients adds up these.
        return dx, own[1].to(weight.dtype), own[0].to(weight.dtype), None


def _sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The sums of dy and of dy · x̂ over this process's values, (2, C)."""
    if not x.numel():
        return mean.new_zeros(2, len(mean))
    # PyTorch's batch norm computes both in one pass, as the gradients of its bias and weight.
    _, of_product, of_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, torch.ones_like(mean), None, None, mean, rstd, True, 0.0, (False, True, True)
    )
    return torch.stack((of_dy, of_product))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over all processes, (C,), and the number of values in one."""
    channels, values = x.shape[1], x.numel() // max(1, x.shape[1])
    own = x.new_zeros(3, channels)
    if values:
        # PyTorch's batch norm finds them ten times as quickly as its var_mean, which goes over channels one by one.
        _, own[0], rstd = torch.native_batch_norm(x, None, None, None, None, True, 0.0, _EPS)
        own[1] = rstd.pow(-2).sub_(_EPS).clamp_(min=0.0)
    own[2] = values
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    means, variances, counts = torch.stack(every).unbind(1)
    count = counts[:, 0].sum()
    mean = (counts * means).sum(0) / count
    variance = (counts * (variances + (means - mean).square())).sum(0) / count
    return mean, variance, count


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """All batch norms of a network, synchronised or not."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]

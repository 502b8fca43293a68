"""Optimisers, and the learning rate as a plain function of the step.

The rate depends on nothing but the step, so a resumed run needs no scheduler state to go on exactly.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from excite.training.recipe import Optimizer, Schedule


def build_optimizer(network: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """SGD with (Nesterov) momentum or AdamW over the network's trainable parameters."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if settings.decay_norm_and_bias:
        groups = [{"params": trainable, "weight_decay": settings.weight_decay}]
    else:
        # Vectors are biases and the scales and shifts of normalisation: decay does not regularise those.
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)


def rate_factor(settings: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The factor on the peak learning rate for step 0 … total_steps − 1.

    One-cycle follows Smith and Topin (arXiv 1708.07120) in the cosine form that PyTorch's OneCycleLR takes: from
    1/25 of the peak up to it at ``peak_at`` of the run, then down to 1/250,000.
    """
    if settings.name == "onecycle":
        return _onecycle(step, total_steps, settings.peak_at)
    warmup = min(settings.warmup_epochs * steps_per_epoch, total_steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    if settings.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if settings.name == "step":
        return settings.gamma ** sum(step >= milestone * total_steps for milestone in settings.milestones)
    return 1.0


def _onecycle(step: int, total_steps: int, peak_at: float) -> float:
    start, end = 1 / 25, 1 / 25e4
    peak = peak_at * total_steps - 1
    last = total_steps - 1
    if step <= peak:
        low, high, share = start, 1.0, step / peak if peak > 0 else 1.0
    else:
        low, high, share = 1.0, end, (step - max(peak, 0)) / max(1.0, last - max(peak, 0))
    return high + (low - high) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

"""Optimisers, and the learning rate as a plain function of the step.

The rate depends on nothing but the step, so a resumed run needs no scheduler state to go on exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from excite.training.recipe import Optimizer, Recipe, Schedule

log = logging.getLogger(__name__)

WARMUP_EPOCHS = 5


def build_optimizer(
    network: nn.Module, settings: Optimizer, fresh: Collection[str] | None = None
) -> torch.optim.Optimizer:
    """SGD with (Nesterov) momentum or AdamW over the network's trainable parameters.

    Args:
        network: what is to learn.
        settings: the optimiser, its rates and its weight decay.
        fresh: the names of the parameters that did not come from weights; None where all are new.

    Returns:
        An optimiser of up to four groups, the new parameters before those of the host, and in each those that decay
        before those that do not. A group's ``lr`` is its own peak.
    """
    trainable = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    new = [p for name, p in trainable if fresh is None or name in fresh]
    host = [p for name, p in trainable if fresh is not None and name not in fresh]
    groups = [
        {"params": [p for p in parameters if _decays(p, settings) == decays], "lr": rate, "weight_decay": decay}
        for parameters, rate in ((new, settings.lr), (host, settings.lr * host_factor(settings, fresh)))
        for decays, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)


def scaled(recipe: Recipe) -> Recipe:
    """The recipe with its learning rate in proportion to the batch, where ``optimizer.lr_batch`` asks for it.

    Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv 1706.02677, Sect. 2.1 and 2.2:
    the rate times k for a batch k times as large, after a warm-up over five epochs from the smaller of both rates, in
    equal steps. Here it takes at most a tenth of the run; a recipe that has a warm-up keeps its own, and one-cycle is
    one by itself. What comes out asks for nothing more.
    """
    wanted, batch = recipe.optimizer.lr_batch, recipe.trainer.batch_size
    if wanted is None or wanted == batch:
        return recipe
    before, factor = recipe.optimizer.lr, batch / wanted
    changes: dict[str, Any] = {"optimizer.lr": before * factor, "optimizer.lr_batch": batch}
    said = f"{before:g} for {wanted} images a step is {before * factor:g} for {batch}"
    if recipe.schedule.warmup_epochs == 0 and recipe.schedule.name != "onecycle":
        epochs = min(WARMUP_EPOCHS, recipe.trainer.epochs / 10)
        start = min(factor, 1 / factor)
        changes |= {"schedule.warmup_epochs": epochs, "schedule.warmup_from": start}
        said += f", after a warm-up of {epochs:g} epochs from {start * before * factor:g}"
    log.info("optimizer.lr: %s", said)
    return recipe.replace(changes)


def host_factor(settings: Optimizer, fresh: Collection[str] | None) -> float:
    """The factor on the rate of the parameters that came from weights: the recipe's, or one for what is new there."""
    if settings.host_factor is not None:
        return settings.host_factor
    return 0.1 if fresh else 1.0


def host_is_frozen(settings: Schedule, step: int, steps_per_epoch: int) -> bool:
    """Whether in this step only the new parameters learn."""
    return step < settings.host_frozen_epochs * steps_per_epoch


def _decays(parameter: nn.Parameter, settings: Optimizer) -> bool:
    # Vectors are biases and the scales and shifts of normalisation: decay does not regularise those.
    return settings.decay_norm_and_bias or parameter.ndim > 1


def rate_factor(settings: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The factor on the peak learning rate for step 0 … total_steps − 1.

    One-cycle follows Smith and Topin (arXiv 1708.07120) in the cosine form that PyTorch's OneCycleLR takes: from
    1/25 of the peak up to it at ``peak_at`` of the run, then down to 1/250,000.
    """
    if settings.name == "onecycle":
        return _onecycle(step, total_steps, settings.peak_at)
    warmup = min(settings.warmup_epochs * steps_per_epoch, total_steps - 1)
    if step < warmup:
        return settings.warmup_from + (1 - settings.warmup_from) * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    if settings.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if settings.name == "exponential":
        return float(settings.final**progress)
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

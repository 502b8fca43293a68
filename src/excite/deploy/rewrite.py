"""Exact rewrites of a network for inference: the same numbers, but for rounding, from less work.

Every rewrite reads and writes graphs of PyTorch's own operators (:mod:`excite.deploy.capture`), so that it applies to
units wherever they come from, and so that exporters take what comes out.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from excite.deploy.capture import Editor, capture
from excite.deploy.rewrite_constants import fold_constant_gates
from excite.deploy.rewrite_norms import fold_batch_norms
from excite.deploy.rewrite_select import branches_apart, split_before_convolution, two_branches_by_one_gate
from excite.deploy.rewrite_squeeze import merge_linear_layers, pooled_as_vectors, squeeze_before_projection
from excite.errors import ExciteError

log = logging.getLogger(__name__)

Rewrite = Callable[[Editor], int]

REWRITES: dict[str, Rewrite] = {
    "pooled maps as vectors": pooled_as_vectors,
    "batch norm folded": fold_batch_norms,
    "branches apart": branches_apart,
    "split before the convolution": split_before_convolution,
    "constant gates folded": fold_constant_gates,
    "squeeze before projection": squeeze_before_projection,
    "linear layers merged": merge_linear_layers,
    "two branches by one gate": two_branches_by_one_gate,
}
"""By name, in the order in which they are made. Each answers with the number of places that it changed."""

TOLERANCE, TOLERANCE_64 = 1e-4, 1e-8
"""How far, relative to the largest output, a rewritten network may answer from the original on the example: in
float32, or where the network magnifies rounding, in float64."""


@dataclass
class Rewritten:
    """What was done.

    Attributes:
        made: by rewrite, at how many places.
        refused: by rewrite, why it was taken back.
        difference: of the outputs from the original's, relative to the largest one.
    """

    made: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0


def rewrite(network: nn.Module, example: Tensor, rewrites: Sequence[str] = tuple(REWRITES)) -> fx.GraphModule:
    """The network for inference, rewritten where that changes nothing but rounding.

    Args:
        network: in float32. It is read, not changed.
        example: (N, …), what it takes; what the outputs are compared on. Random numbers will do.
        rewrites: names from ``REWRITES``.

    Returns:
        A graph of PyTorch's operators that takes batches of any size; ``meta["rewritten"]`` says what was done, as a
        dictionary of :class:`Rewritten`.

    Raises:
        UsageError: the network cannot be followed operator by operator.
        ExciteError: what was followed does not answer as the network does.
    """
    original = capture(network, example)
    example = example.to(next((one.device for one in original.buffers()), example.device))
    wanted = _answers(network, example)
    done = Rewritten(difference=_difference(_answers(original, example), wanted))
    if not done.difference <= TOLERANCE:
        raise ExciteError(
            f"{type(network).__name__} answers differently when it is followed operator by operator "
            f"({done.difference:.1e} of the largest output): does it draw random numbers in evaluation mode?"
        )
    module = _apply(original, rewrites, done)
    done.difference = _difference(_answers(module, example), wanted)
    if not done.difference <= TOLERANCE:
        if _in_float64(network, example, rewrites) <= TOLERANCE_64:
            log.warning(
                "The network magnifies rounding: rewritten it answers %.1e of its largest output away, in float32.",
                done.difference,
            )
        else:
            module = _one_by_one(network, example, rewrites, wanted, done)
            done.difference = _difference(_answers(module, example), wanted)
    module.meta["rewritten"] = asdict(done)
    return module


def _in_float64(network: nn.Module, example: Tensor, rewrites: Sequence[str]) -> float:
    """How far the rewritten network answers from the original where both compute in float64.

    A deep network may magnify its own rounding until nothing can be compared in float32.
    """
    exact, example = copy.deepcopy(network).double(), example.double()
    module = _apply(capture(exact, example), rewrites, Rewritten())
    return _difference(_answers(module, example), _answers(exact, example))


def _apply(module: fx.GraphModule, rewrites: Sequence[str], done: Rewritten) -> fx.GraphModule:
    for name in rewrites:
        editor = Editor(module)
        if count := REWRITES[name](editor):
            done.made[name] = count
            editor.tidy()
    return module


def _one_by_one(
    network: nn.Module, example: Tensor, rewrites: Sequence[str], wanted: list[Tensor], done: Rewritten
) -> fx.GraphModule:
    """Each rewrite alone, on top of those that were right; those that were not are left out and said."""
    kept: list[str] = []
    for name in rewrites:
        trial = _apply(capture(network, example), [*kept, name], Rewritten())
        difference = _difference(_answers(trial, example), wanted)
        if difference <= TOLERANCE:
            kept.append(name)
        else:
            done.refused[name] = f"the output would change by {difference:.1e} of its largest value"
            log.info("Rewrite refused, %s: %s", name, done.refused[name])
    done.made.clear()
    return _apply(capture(network, example), kept, done)


@torch.no_grad()
def _answers(network: nn.Module, example: Tensor) -> list[Tensor]:
    modes = {module: module.training for module in network.modules()}
    if not isinstance(network, fx.GraphModule):
        network.eval()
    try:
        answer: Any = network(example)
    finally:
        for module, training in modes.items():
            module.training = training
    leaves = torch.utils._pytree.tree_leaves(answer)
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]


def _difference(said: list[Tensor], wanted: list[Tensor]) -> float:
    worst = 0.0
    for one, other in zip(said, wanted, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if other.numel():
            scale = other.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            worst = max(worst, float((one - other).abs().max() / scale))
    return worst

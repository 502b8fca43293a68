"""``attach`` and ``detach``: units into a live network, and out of it again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from excite.cost import macs_of
from excite.errors import UsageError
from excite.networks.site import Site
from excite.spec import UnitSpec, parse_spec
from excite.surgery import hooks, places
from excite.surgery.hooks import attached_units
from excite.surgery.places import Found, How, Place
from excite.surgery.record import CONVOLUTIONS, Record, record
from excite.surgery.summary import Attached, AttachedUnit
from excite.surgery.units import EVERY_UNITS, arguments_of, he_initialise, is_own, unit

logger = logging.getLogger("excite.surgery")

Init = Literal["identity", "paper"]
Predicate = Callable[[str, nn.Module], bool]
HOOKS: dict[How, type[hooks.Hook]] = {
    "after": hooks.OnOutput,
    "before": hooks.OnInput,
    "around": hooks.Around,
    "shortcut": hooks.OnShortcut,
}

PLACEMENTS: dict[str, tuple[str, Callable[[Record], Found]]] = {
    "branch": ("residual branches (additions of two feature maps, one of them a shortcut)", places.before_additions),
    "before": ("residual branches with one first convolution", places.before_branches),
    "after": ("residual additions", places.after_additions),
    "identity": ("shortcuts of residual additions", places.on_shortcuts),
    "conv3x3": ("residual branches with a kernel of 3 or more", places.after_spatial_convolutions),
    "concat": ("concatenations of feature maps", places.after_concatenations),
    "stage": ("last feature maps of a resolution", places.at_stage_ends),
}


def attach(
    module: nn.Module,
    unit: str | UnitSpec | Callable[[Site], nn.Module] = "se",
    *,
    where: str | Predicate = "auto",
    init: Init = "identity",
    stages: str | int | Iterable[int] | None = None,
    example: Any = None,
) -> Attached:
    """Put an attention unit into every suitable place of a network, in place.

    The network may be anyone's. Its code, classes, and the names of its parameters stay; each unit is a child of a
    module that is there (``layer1.0.bn2.se.reduce.weight``), and acts through a forward hook of it. State dicts of
    the bare host still load, also strictly; :func:`detach` gives the host back.

    With ``init="identity"`` the network goes on computing what it computed, and learns from there. Rescaling units
    end in a gate of 2σ(logits) whose last layer is zero: every gate is 1, where the sigmoid is steepest; the gradient
    reaches that last layer at once, and what lies before it as soon as that is no longer zero. Kernel units put out
    V = M · Σ aₘ Uₘ, where all M gates are equal and the new kernels zero, so that V is the old branch U₁. Had
    the softmax been pushed to choose U₁ instead, it would be flat there, and no gradient would ever undo that; from
    equal gates, gradients reach them (U₁ is not the others) and the new kernels (their gates are not zero). The
    factors 2 and M are buffers, stored with the weights. What is not zero is drawn as for training from scratch,
    after He et al. 2015 and with biases of zero: with PyTorch's own biases, bottlenecks after a batch norm are often
    dead from the start, for the means that they see are small. ``init="paper"`` draws all of it so, with factor 1.

    Args:
        module: the network; edited in place.
        unit: ``se``, ``sk``, ``eca``, ``cbam`` or a registered name, with arguments as in a spec
            (``se:reduction=8``); or a function from a :class:`~excite.networks.site.Site` to a module that maps a
            feature map to one of the same shape.
        where: for units that rescale a feature map (all but ``sk``):

            * ``auto``: ``branch``; where there is no residual branch, ``concat``; where there is neither, ``stage``.
            * ``branch``: every residual branch, just before its addition (Hu et al., Sect. 3.2).
            * ``before``, ``after``, ``identity``, ``conv3x3``: the paper's other places (Sect. 6.5): the branch's
              input, after the addition and its activation, the shortcut, the branch's first 3×3 convolution with its
              norm.
            * ``concat``: after each concatenation, as at the end of an Inception module; ``stage``: the last feature
              map of each resolution.
            * a name or pattern (``*``, ``?``) that ends a module's name, such as ``layer?.*.conv2``: after each such
              module; or a predicate ``(name, module) → bool``.

            ``sk`` stands around convolutions with a square kernel of 3 and more: in ``auto`` the last of each
            residual branch, and those on none before the last addition, but the network's first; where there is no
            residual branch all but the first; else a pattern or predicate.
        init: ``identity`` or ``paper``.
        stages: only these resolutions, ``1-3``, 2 or [1, 2]; 1 is the largest feature map that would get a unit. (Hu
            et al., Sect. 4: without the last stage most of the parameters are saved at little loss.)
        example: what to call the network with, a tensor or a tuple of arguments; by default an image that suits
            its first convolution.

    Returns:
        What was attached where, with the parameters and multiply–adds that it adds; printed, a table.

    Raises:
        UsageError: no such unit or place, nothing found, or a unit that cannot start as asked. The network is then
            unchanged.
    """
    if init not in ("identity", "paper"):
        raise UsageError(f"init is identity or paper, not {init!r}.")
    _check_bare(module)
    maker = _maker(unit)
    before = [name for name, _ in attached_units(module)]
    recorded = record(module, example)
    while True:
        found, looked_for = _found(recorded, where, maker.is_kernel)
        numbered = _stage_numbers(found.places)
        chosen = _chosen(found.places, numbered, stages)
        if not chosen:
            raise UsageError(_nothing(module, recorded, looked_for, found))
        built = _all_built(maker, module, recorded, chosen, numbered, init)
        names = _insert(maker.name, chosen, built)
        try:
            idle = _idle(record(module, example, attached=True), chosen, built)
        except UsageError as error:
            hooks.remove(module, only=set(names))
            kind = type(module).__name__
            raise UsageError(f"{kind} no longer runs with units in it, and has none: {error}") from error
        if not idle:
            break
        hooks.remove(module, only=set(names))
        recorded = replace(recorded, barred=recorded.barred | idle)
    gated = places.channel_gates(recorded) + ([] if maker.is_kernel else before)
    if gated:
        logger.warning(
            "%s gates its channels already, in %d places (%s, …): a second gate seldom helps",
            type(module).__name__,
            len(gated),
            gated[0] or "its forward",
        )
    _note_fresh(module, names)
    rows = [
        AttachedUnit(
            full,
            numbered[place.value.size],
            place.value.size,
            place.value.channels,
            _width(item),
            sum(parameter.numel() for parameter in item.parameters()),
            macs_of(item, *_inputs(place)),
        )
        for full, place, item in zip(names, chosen, built, strict=True)
    ]
    text = str(unit) if isinstance(unit, (str, UnitSpec)) else maker.name
    return Attached(text, tuple(rows), tuple(found.missed))


def detach(module: nn.Module) -> nn.Module:
    """Take every attached unit out of a network again; what the host's own parameters learned stays.

    Args:
        module: the network; edited in place.

    Returns:
        The same network.

    Raises:
        UsageError: nothing is attached to it.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"Units are detached from an nn.Module, not from {type(module).__name__}.")
    if not hooks.remove(module):
        raise UsageError(f"{type(module).__name__} has no attached units.")
    return module


def _idle(recorded: Record, chosen: list[Place], built: list[nn.Module]) -> frozenset[nn.Module]:
    """The modules that cannot hold a unit, as a run with units shows.

    Some run their children one after the other, and so call a unit twice; of some the output is not used.

    Raises:
        UsageError: a unit changes the shape of a feature map.
    """
    bad = set()
    for place, item in zip(chosen, built, strict=True):
        calls = recorded.calls_of(item)
        used = all(call.output is not None and call.output.consumers for call in calls)
        if len(calls) != len(recorded.calls_of(place.call.module)) or not used:
            bad.add(place.call.module)
        for call in calls if place.how != "around" else []:
            if call.input and call.output and call.input.shape != call.output.shape:
                raise UsageError(f"the unit gives {call.output.shape} for a map of {call.input.shape}")
    return frozenset(bad)


def _note_fresh(module: nn.Module, names: list[str]) -> None:
    """Where a network knows the origin of its weights, the units are no part of what came from there."""
    origin = getattr(module, "origin", None)
    if origin is not None and hasattr(origin, "fresh"):
        new = {name for name, _ in module.named_parameters() if name.startswith(tuple(f"{unit}." for unit in names))}
        module.origin = replace(origin, fresh=origin.fresh | new)


def _check_bare(module: nn.Module) -> None:
    """Refuse what has looked at the network already, and would not notice new parts of it."""
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"Units are attached to an nn.Module, not to {type(module).__name__}: excite.create makes one."
        )
    wrapped = {
        "compiled by torch.compile": hasattr(module, "_orig_mod") or module._compiled_call_impl is not None,
        "wrapped for parallel training": isinstance(module, (DistributedDataParallel, nn.DataParallel)),
        "scripted by torch.jit": isinstance(module, torch.jit.ScriptModule),
    }
    for what, is_so in wrapped.items():
        if is_so:
            raise UsageError(
                f"The network is {what}, which does not see new parts: attach to the network before that."
            )


# --- which unit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maker:
    """How a kind of unit is made.

    Attributes:
        name: of the units, as children of their modules.
        make: from the module at a place and the place's site.
        is_kernel: whether it stands around a convolution, rather than after or before a module.
        draw: gives its weights their first values; None where the unit does so itself.
    """

    name: str
    make: Callable[[nn.Module, Site], nn.Module]
    is_kernel: bool = False
    draw: Callable[[nn.Module], None] | None = None


def _maker(given: str | UnitSpec | Callable[[Site], nn.Module]) -> _Maker:
    if not isinstance(given, (str, UnitSpec)):
        if isinstance(given, (nn.Module, type)) or not callable(given):
            raise UsageError("A unit is a name such as 'se', or a function from a site to a new module for it.")
        name = getattr(given, "__name__", "unit").strip("<>").replace(".", "_")
        return _Maker(name, lambda _, site: given(site))
    several = parse_spec(f"host+{given}").units
    if len(several) > 1:
        raise UsageError(f"{str(given)!r} are {len(several)} units: attach one after the other.")
    (spec,) = several
    for key in EVERY_UNITS:
        if key in dict(spec.arguments):
            raise UsageError(f"{key} is an argument of attach, not of the unit: attach(…, {key}=…).")
    kind = unit(spec.name)
    name = spec.name.replace(".", "_")  # a point separates modules in PyTorch
    draw = he_initialise if is_own(spec.name) else None
    if kind.location == "branch":
        arguments = arguments_of(spec, kind.factory)
        return _Maker(name, lambda _, site: kind.factory(site, **arguments), draw=draw)
    if kind.around is None:
        raise UsageError(f"The unit {spec.name!r} stands for a whole convolution: it cannot keep a trained one.")
    around, arguments = kind.around, arguments_of(spec, kind.around)
    return _Maker(name, lambda host, site: around(host, site.input_size, **arguments), is_kernel=True, draw=draw)


def _built(maker: _Maker, place: Place, site: Site, init: Init, like: torch.Tensor | None) -> nn.Module:
    """A unit with its first values, on the device of the module at its place and in the precision of ``like``."""
    host = place.call.module
    try:
        built = maker.make(host, site)
        if maker.draw is not None:
            maker.draw(built)
        if init == "identity":
            start = getattr(built, "start_as_identity", None)
            if start is None:
                raise ValueError(
                    f"{type(built).__name__} has no start_as_identity(): write one, or give init='paper'"
                )
            start()
    except (TypeError, ValueError) as error:
        raise UsageError(f"Cannot attach to {place.name}: {error}.") from error
    if like is not None:
        # A network may lie on several devices; its norms may be of higher precision than the rest.
        built.to(next(host.parameters(), like).device, like.dtype)
    return built.train(host.training)


def _all_built(
    maker: _Maker,
    module: nn.Module,
    recorded: Record,
    chosen: list[Place],
    numbered: dict[tuple[int, ...], int],
    init: Init,
) -> list[nn.Module]:
    """A unit for each place."""
    input_size = recorded.inputs[0].size[-1] if recorded.inputs and recorded.inputs[0].size else 224
    like = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    units = []
    for place in chosen:
        channels, stage = place.value.channels, numbered[place.value.size]
        site = Site(stage, channels, channels, 1, 1, "identity", input_size, residual=False, attached=True)
        units.append(_built(maker, place, site, init, like))
    return units


def _width(built: nn.Module) -> int | None:
    reduce = next((child for name, child in built.named_modules() if name.split(".")[-1] == "reduce"), None)
    return getattr(reduce, "out_features", None)


def _inputs(place: Place) -> list[tuple[int, ...]]:
    if place.how != "around":
        return [(1, *place.value.shape[1:])]
    assert place.call.input is not None
    return [(1, *place.call.input.shape[1:]), (1, *place.value.shape[1:])]


# --- which places --------------------------------------------------------------------------------------------------


def _found(recorded: Record, where: str | Predicate, is_kernel: bool) -> tuple[Found, str]:
    """The places, and what was looked for, in words."""
    if is_kernel:
        if where == "auto":
            return places.kernels(recorded), "2-d convolutions with a square kernel of 3 or more"
        _check_pattern(where, known=())
        matches = places.matching(where) if isinstance(where, str) else where
        return places.kernels(recorded, matches), f"2-d convolutions with a square kernel that match {where!r}"
    if where == "auto":
        missed: list[str] = []
        for name in ("branch", "concat", "stage"):
            words, find = PLACEMENTS[name]
            found = find(recorded)
            if found.places:
                return found, words
            missed += found.missed
        return Found([], missed), "residual branches, concatenations and ends of stages"
    if isinstance(where, str) and where in PLACEMENTS:
        words, find = PLACEMENTS[where]
        return find(recorded), words
    _check_pattern(where, known=("auto", *PLACEMENTS))
    if isinstance(where, str):
        return places.after_named(recorded, places.matching(where)), f"modules whose name ends in {where!r}"
    return places.after_named(recorded, where), "modules that the predicate picks"


def _check_pattern(where: Any, known: tuple[str, ...]) -> None:
    if callable(where):
        return
    if not isinstance(where, str):
        raise UsageError(f"where is a placement, a pattern of names or a predicate, not {where!r}.")
    if not known and where in PLACEMENTS:
        raise UsageError(f"where={where}: a kernel unit stands around convolutions; give auto or a pattern of names.")


def _stage_numbers(found: list[Place]) -> dict[tuple[int, ...], int]:
    sizes = sorted({place.value.size for place in found}, key=lambda size: [-side for side in size])
    return {size: number for number, size in enumerate(sizes, start=1)}


def _chosen(found: list[Place], numbered: dict[tuple[int, ...], int], stages: Any) -> list[Place]:
    if stages is None or not found:
        return found
    wanted = _stage_list(stages, len(numbered))
    return [place for place in found if numbered[place.value.size] in wanted]


def _stage_list(stages: Any, last: int) -> set[int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(stages))
    if match:
        wanted = set(range(int(match[1]), int(match[2] or match[1]) + 1))
    elif not isinstance(stages, str) and isinstance(stages, Iterable):
        wanted = {stage for stage in stages if isinstance(stage, int)}
    else:
        wanted = set()
    if not wanted or not wanted <= set(range(1, last + 1)):
        raise UsageError(f"stages={stages}: expected one stage such as 3, or a range such as 1-2, within 1-{last}.")
    return wanted


def _nothing(module: nn.Module, recorded: Record, looked_for: str, found: Found) -> str:
    convolutions = list(
        dict.fromkeys(c.name for c in recorded.calls if isinstance(c.module, CONVOLUTIONS) and c.name)
    )
    listed = ", ".join(convolutions[:8]) + (f" and {len(convolutions) - 8} more" if len(convolutions) > 8 else "")
    why = (
        f"none of its {looked_for} can be reached ({found.missed[0]})" if found.missed else f"it has no {looked_for}"
    )
    candidates = f" Its convolutions, as candidates for a pattern in where=, are {listed}." if listed else ""
    return f"Nothing attached to {type(module).__name__}: {why}.{candidates}"


def _insert(name: str, chosen: list[Place], built: list[nn.Module]) -> list[str]:
    names = []
    for place, item in zip(chosen, built, strict=True):
        host = place.call.module
        names_for_it = chain([name], (f"{name}_{number}" for number in count(2)))
        free = next(candidate for candidate in names_for_it if not hasattr(host, candidate))
        hooks.insert(host, free, item, HOOKS[place.how])
        names.append(f"{place.name}.{free}")
        if place.block is not None:
            hooks.keep_shortcut(place.block.module, names[-1].removeprefix(f"{place.block.name}."))
    return names

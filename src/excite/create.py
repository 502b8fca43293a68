"""From a spec to a network: names, sources, arguments, units, weights."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, TypeAdapter, ValidationError
from torch import nn

from excite.errors import UsageError, nearest
from excite.networks.catalog import CATALOG, Entry
from excite.networks.families import FAMILIES
from excite.networks.site import Site, plain_convolution, plain_join
from excite.spec import Arguments, Spec, UnitSpec, parse_spec
from excite.units.selective_kernel import SelectiveKernel
from excite.units.squeeze_excite import SqueezeExcite
from excite.weights.fetch import resolve
from excite.weights.load import put, read_weights

# A place in a block where a unit goes: at the end of the branch, where it also adds the shortcut if there is one, or
# instead of the 3×3 convolution with its batch norm and activation.
Place = Literal["branch", "convolution"]
NetworkFactory = Callable[..., nn.Module]  # (num_classes, in_channels, *, arguments of the spec) -> network
UnitFactory = Callable[..., nn.Module]  # (site, *, arguments of the spec) -> unit


def create(
    spec: str | Spec, num_classes: int | None = None, in_channels: int = 3, weights: str | Path | None = None
) -> nn.Module:
    """Build the network that a spec names, and load weights into it.

    Args:
        spec: ``[source:]name[:key=value,…]{+unit[:key=value,…]}``, such as ``resnet20+se:reduction=8``;
            :func:`networks` lists the names, ``torchvision:`` and ``timm:`` are the sources.
        num_classes: outputs of the classifier; by default those of the weights, or 1000. With weights of another
            number of outputs the classifier starts afresh, and the rest is kept.
        in_channels: channels of the images.
        weights: ``imagenet`` (fetched from where it is published, or another tag of :func:`excite.weights.published
            .tags`), or the path of a file, see :func:`excite.weights.load.load_weights`.

    Returns:
        The network in training mode: images (N, in_channels, H, W) → logits (N, num_classes). Where weights were
        loaded, its attribute ``origin`` says which, and what images they expect
        (:class:`excite.weights.base.Origin`).

    Raises:
        UsageError: the spec, an argument or the weights do not fit; the message says which and what would.
        ExciteError: the weights cannot be fetched or read.
    """
    spec = parse_spec(spec)
    if num_classes is not None:
        _check_count("num_classes", num_classes)
    _check_count("in_channels", in_channels)
    with _about(spec):
        build = _source(spec)
    if weights is None:
        with _about(spec):
            return build(spec, num_classes or 1000, in_channels)
    path, published = resolve(spec, weights)
    read = read_weights(path)
    with _about(spec):
        network = build(spec, num_classes or read.outputs or 1000, in_channels)
    preprocessing = published.preprocessing if published else None
    origin = put(network, read, replace_head=num_classes is not None, preprocessing=preprocessing)
    network.origin = origin  # type: ignore[assignment]
    return network


def networks() -> list[str]:
    """The names that :func:`create` knows without a source: the catalogue's, then the registered ones."""
    return [*CATALOG, *_registered_networks]


def units() -> list[str]:
    """The names of the units that a spec can add."""
    return list(_units)


def register_network(name: str, factory: NetworkFactory) -> None:
    """Give a network of your own a name for specs.

    Args:
        name: letters, digits and ``_ . -``. A name registered before is replaced, one of excite's is refused.
        factory: ``factory(num_classes, in_channels, *, …)`` → network. Its keyword-only parameters are the
            arguments a spec can give; their annotations (``int``, ``float``, ``bool``, ``str``, ``Literal``) are
            checked.
    """
    if name in CATALOG:
        raise UsageError(f"The name {name!r} belongs to a network of excite's own; choose another.")
    _check_name(name)
    _registered_networks[name] = factory


def register_unit(name: str, factory: UnitFactory, place: Place = "branch") -> None:
    """Give a unit of your own a name for specs.

    Args:
        name: letters, digits and ``_ . -``. A name registered before is replaced, one of excite's is refused.
        factory: ``factory(site, *, …)`` → module, called once per block with a
            :class:`~excite.networks.site.Site`. Keyword-only parameters as for :func:`register_network`;
            ``stages`` is every unit's and handled for it.
        place: ``branch``: the module ends the branch of a block, ``forward(u, shortcut)`` → (rescaled u) + shortcut,
            or where ``site.residual`` is false ``forward(u)`` → rescaled u. ``convolution``: it stands for the 3×3
            convolution, batch norm and activation, ``forward(x)``. Where ``site.activation`` is ``identity``, the
            shortcut may be added to its output in place, so the output must not be one that its last step needs for
            the backward pass (a sigmoid's, a ReLU's).
    """
    if name in ("se", "sk"):
        raise UsageError(f"The name {name!r} belongs to a unit of excite's own; choose another.")
    _check_name(name)
    if place not in typing.get_args(Place):
        raise UsageError(f"A unit's place is branch or convolution, not {place!r}.")
    _units[name] = (factory, place)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}.")


def _check_name(name: str) -> None:
    if parse_spec(name) != Spec(name):
        raise UsageError(f"{name!r} cannot be a name: use letters, digits and _ . - only.")


def _source(spec: Spec) -> Callable[[Spec, int, int], nn.Module]:
    if spec.source in networks():
        raise UsageError(f"{spec.source} is a network and not a source; its arguments are written key=value.")
    return _SOURCES[_known(spec.source, list(_SOURCES), "source")]


# --- excite's own networks -------------------------------------------------------------------------------------


def _own(spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    name = _known(spec.name, networks(), "network")
    if name in CATALOG:
        return _from_catalog(CATALOG[name], spec, num_classes, in_channels)
    if spec.units:
        raise UsageError(f"units cannot be added to {name!r} by a spec yet, only to excite's own networks.")
    factory = _registered_networks[name]
    return factory(num_classes, in_channels, **_typed(factory, spec.arguments, f"the network {name}"))


def _from_catalog(entry: Entry, spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    family = FAMILIES[type(entry.table)]
    table = family.adjusted(entry.table, **_typed(family.adjusted, spec.arguments, f"the network {entry.name}"))
    given = [unit for text in entry.units for unit in parse_spec(f"{entry.name}+{text}").units]
    chosen = _units_by_stage([*given, *spec.units], stages=table.stages)

    def convolution(site: Site) -> tuple[nn.Module, nn.Module, nn.Module]:
        make = chosen["convolution"].get(site.stage)
        return (make(site), nn.Identity(), nn.Identity()) if make else plain_convolution(site)

    def join(site: Site) -> nn.Module:
        return chosen["branch"].get(site.stage, plain_join)(site)

    network = family.build(table, num_classes, in_channels, convolution=convolution, join=join)
    network.table = table  # what it was built as: published weights are for one form of a network
    return network


def _units_by_stage(unit_specs: list[UnitSpec], stages: int) -> dict[str, dict[int, Callable[[Site], nn.Module]]]:
    """For each place, which stage gets which unit."""
    chosen: dict[str, dict[int, Callable[[Site], nn.Module]]] = {"branch": {}, "convolution": {}}
    for unit in unit_specs:
        factory, place = _units[_known(unit.name, units(), "unit")]
        wanted = dict(unit.arguments)
        first, last = _stages(wanted.pop("stages", f"1-{stages}"), stages)
        arguments = _typed(factory, tuple(wanted.items()), f"the unit {unit.name}", also=("stages",))
        for stage in range(first, last + 1):
            if stage in chosen[place]:
                raise UsageError(f"stage {stage} was given two units for its {place} (the second is {unit}).")
            chosen[place][stage] = partial(factory, **arguments)
    return chosen


def _stages(text: str, count: int) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= count:
        raise UsageError(f"stages={text}: expected one stage such as 3, or a range such as 1-2, within 1-{count}.")
    return first, last


# --- excite's own units ----------------------------------------------------------------------------------------


def _branches(text: str) -> tuple[tuple[int, int], ...]:
    """``3-3d2`` → ((3, 1), (3, 2)): kernels, each with an optional dilation."""
    matches = [re.fullmatch(r"(\d+)(?:d(\d+))?", branch) for branch in text.split("-")]
    if not all(matches):
        raise ValueError("kernels with an optional dilation, such as 3-3d2 or 3-5-7")
    return tuple((int(match[1]), int(match[2] or 1)) for match in matches if match)


Branches = Annotated[tuple[tuple[int, int], ...], PlainValidator(_branches)]


def _squeeze_excite(
    site: Site,
    *,
    reduction: int = 16,
    min_width: int = 4,
    squeeze: Literal["mean", "max", "both"] = "mean",
    gate: Literal["sigmoid", "hard_sigmoid", "tanh"] = "sigmoid",
    activation: Literal["relu", "silu", "gelu", "hard_swish", "identity"] = "relu",
) -> nn.Module:
    # Hu et al. have no least width, nor need one: their maps have 64 channels and more. On 16 channels r = 16 would
    # leave one hidden unit, which can only turn all channels up or down together.
    return SqueezeExcite(
        site.out_channels, reduction, min_width=min_width, squeeze=squeeze, gate=gate, activation=activation
    )


def _selective_kernel(
    site: Site,
    *,
    branches: Branches = ((3, 1), (3, 2)),
    groups: int | None = None,
    reduction: int = 16,
    min_width: int | None = None,
) -> nn.Module:
    # Li et al.'s least width L = 32 is a quarter of the channels at most in their networks (128 and up). On the
    # 16 to 64 channels of a CIFAR ResNet it would be no bottleneck at all; 8 is half of them to an eighth.
    if min_width is None:
        min_width = 8 if _small(site) and site.out_channels < 128 else 32
    return SelectiveKernel(
        site.in_channels,
        site.out_channels,
        site.stride,
        branches,
        groups or site.groups,
        reduction,
        min_width,
        activation=site.activation,
    )


def _small(site: Site) -> bool:
    return site.input_size <= 64


# --- other people's networks -----------------------------------------------------------------------------------


def _torchvision(spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    import torchvision

    name = _known(spec.name, torchvision.models.list_models(module=torchvision.models), "torchvision network")
    if in_channels != 3:
        raise UsageError(f"torchvision's networks take images of 3 channels, not {in_channels}.")
    return _foreign(spec, torchvision.models.get_model, name, weights=None, num_classes=num_classes)


def _timm(spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError("timm is not installed; pip install 'excite[timm]' brings it.") from error

    _known(spec.name.partition(".")[0], timm.list_models(), "timm network")
    return _foreign(spec, timm.create_model, spec.name, num_classes=num_classes, in_chans=in_channels)


def _foreign(spec: Spec, builder: Callable[..., nn.Module], name: str, **ours: Any) -> nn.Module:
    if spec.units:
        raise UsageError(
            f"units cannot be added to networks of {spec.source} yet: build {spec.source}:{spec.name} without, "
            "or one of excite's own networks with."
        )
    given = {key: _guessed(value) for key, value in spec.arguments}
    if clash := sorted(given.keys() & (ours.keys() | {"pretrained", "weights", "checkpoint_path"})):
        raise UsageError(f"{', '.join(clash)} cannot be given in a spec: create sets it.")
    try:
        return builder(name, **ours, **given)
    except (TypeError, RuntimeError) as error:
        raise UsageError(f"{spec.source} cannot build {name} with these arguments ({error}).") from error


def _guessed(text: str) -> bool | int | float | str:
    """Foreign builders declare no types: what looks like a truth value or a number is one."""
    if text in ("true", "false", "True", "False"):
        return text in ("true", "True")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# --- names and arguments ---------------------------------------------------------------------------------------


def _known(word: Any, known: list[Any], what: str) -> Any:
    if word in known:
        return word
    names = [name for name in known if name]
    hint = nearest(word, names) or (f"there are {', '.join(names)}." if len(names) < 30 else "")
    raise UsageError(f"unknown {what} {word!r}" + (f"; {hint}" if hint else "."))


def _typed(factory: Callable[..., Any], given: Arguments, what: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments of a spec as the values that the factory's keyword-only parameters are annotated with."""
    hints = typing.get_type_hints(factory, include_extras=True)
    parameters = inspect.signature(factory).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for key, _ in given:
        if key not in known:
            there = ", ".join([*known, *also]) or "none"
            hint = nearest(key, [*known, *also])
            raise UsageError(f"unknown argument {key!r} of {what}; " + (hint or f"its arguments are {there}."))
    return {key: _value(key, text, hints.get(key, str)) for key, text in given}


def _value(key: str, text: str, annotation: Any) -> Any:
    try:
        return TypeAdapter(annotation).validate_strings(text)
    except ValidationError as error:
        first = error.errors()[0]
        expected = str(first["ctx"]["error"]) if first["type"] == "value_error" else _expected(annotation)
        raise UsageError(f"{key}={text}: expected {expected}.") from None


def _expected(annotation: Any) -> str:
    """An annotation in words."""
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    choices = [_expected(choice) for choice in typing.get_args(annotation) if choice is not type(None)]
    return words.get(annotation) or " or ".join(choices) or str(annotation)


@contextmanager
def _about(spec: Spec) -> Iterator[None]:
    """Every refusal on the way names the spec it is about."""
    try:
        yield
    except ValueError as error:
        sentence = f"Cannot build {str(spec)!r}: {error}"
        raise UsageError(sentence if sentence.endswith((".", "?")) else sentence + ".") from error


_registered_networks: dict[str, NetworkFactory] = {}
_units: dict[str, tuple[UnitFactory, Place]] = {
    "se": (_squeeze_excite, "branch"),
    "sk": (_selective_kernel, "convolution"),
}
_SOURCES: dict[str | None, Callable[[Spec, int, int], nn.Module]] = {
    None: _own,
    "torchvision": _torchvision,
    "timm": _timm,
}

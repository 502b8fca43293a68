"""From a spec to a network: names, sources, arguments, units, weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from excite.arguments import known, typed
from excite.errors import UsageError
from excite.networks.catalog import CATALOG, Entry
from excite.networks.families import FAMILIES
from excite.networks.site import Site, plain_convolution, plain_join
from excite.networks.tables import DnCNNTable
from excite.spec import Spec, UnitSpec, parse_spec
from excite.surgery.attach import attach
from excite.surgery.units import EVERY_UNITS, arguments_of, check_name, unit
from excite.weights.dncnn import ConvertedDnCNN
from excite.weights.fetch import resolve
from excite.weights.load import Weights, put, read_weights

NetworkFactory = Callable[..., nn.Module]  # (num_classes, in_channels, *, arguments of the spec) -> network
Builder = Callable[[Spec, int, int], nn.Module]


def create(
    spec: str | Spec,
    num_classes: int | None = None,
    in_channels: int | None = None,
    weights: str | Path | None = None,
) -> nn.Module:
    """Build the network that a spec names, and load weights into it.

    Args:
        spec: ``[source:]name[:key=value,…]{+unit[:key=value,…]}``, such as ``resnet20+se:reduction=8``;
            :func:`networks` lists the names, ``torchvision:`` and ``timm:`` are the sources.
        num_classes: outputs of the classifier; by default those of the weights, or 1000. With weights of another
            number of outputs the classifier starts afresh, and the rest is kept. Means nothing to a network that
            answers with an image.
        in_channels: channels of the images; by default those of the weights, where they are a DnCNN's, else those
            that the network was drawn for (for windows of hyperspectral scenes 30, of other people's networks 3).
        weights: ``imagenet`` (fetched from where it is published, or another tag of :func:`excite.weights.published
            .tags`), or the path of a file, see :func:`excite.weights.load.load_weights`.

    Units are built into excite's own networks as their papers have them. Those of other people's networks, and those
    that are given ``where=`` or ``init=``, are attached (:func:`excite.attach`): to a network without weights with
    ``init=paper``, to one with weights with ``init=identity``, unless the spec says otherwise. Weights may be those
    of the host alone; the units of an own network are then attached, too. The spec of a DnCNN is completed by its
    weights: depth, width, kernel and norm are those of the file, and only a spec that gives others is refused.

    Returns:
        The network in training mode: images (N, in_channels, H, W) → logits (N, num_classes), or of a DnCNN images
        (N, in_channels, H, W). Its attributes say what it is: ``attached`` what was attached where
        (:class:`excite.surgery.summary.Attached`, one for each unit of the spec), ``spec`` the spec that builds it
        without the weights, and where weights were loaded ``origin`` which, and what images they expect
        (:class:`excite.weights.base.Origin`).

    Raises:
        UsageError: the spec, an argument or the weights do not fit; the message says which and what would.
        ExciteError: the weights cannot be fetched or read.
    """
    spec = parse_spec(spec)
    if num_classes is not None:
        _check_count("num_classes", num_classes)
    if in_channels is not None:
        _check_count("in_channels", in_channels)
    entry = None if spec.source else CATALOG.get(spec.name)
    drawn_for = entry.in_channels if entry else 3
    with _about(spec):
        build = _source(spec)
        if weights is None:
            return _built(build, spec, num_classes or 1000, in_channels or drawn_for)
    path, published = resolve(spec, weights)
    read = read_weights(path)
    outputs = num_classes or read.outputs or 1000
    with _about(spec):
        if entry and isinstance(entry.table, DnCNNTable) and isinstance(read.converted, ConvertedDnCNN):
            spec = _completed(spec, entry.table, read.converted, path)
            in_channels = _channels(in_channels, read.converted, path)
        in_channels = in_channels or drawn_for
        spec = _with_weights(spec, read, partial(_built, build, num_classes=outputs, in_channels=in_channels))
        network = _built(build, spec, outputs, in_channels)
    preprocessing = published.preprocessing if published else None
    origin = put(network, read, replace_head=num_classes is not None, preprocessing=preprocessing)
    network.origin = origin  # type: ignore[assignment]
    return network


def _built(build: Builder, spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    """The network of a spec: built, then with units attached."""
    attached = [given for given in spec.units if _is_attached(spec, given)]
    inside = tuple(given for given in spec.units if given not in attached)
    network = build(replace(spec, units=inside), num_classes, in_channels)
    tables = []
    for given in attached:
        wanted = dict(given.arguments)
        how: dict[str, Any] = {key: wanted.pop(key) for key in EVERY_UNITS if key in wanted}
        how = {"init": "paper", **how, **_place(network, spec, given)}
        tables.append(attach(network, UnitSpec(given.name, tuple(wanted.items())), **how))
    network.attached = tuple(tables)  # type: ignore[assignment]
    network.spec = str(spec)  # type: ignore[assignment]
    return network


def _is_attached(spec: Spec, given: UnitSpec) -> bool:
    """Whether a unit is put into the finished network, rather than built in."""
    return (
        spec.source is not None or spec.name not in CATALOG or not {"where", "init"}.isdisjoint(dict(given.arguments))
    )


def _place(network: nn.Module, spec: Spec, given: UnitSpec) -> dict[str, Any]:
    """Where a unit goes that is attached to an own network which says so itself: the place that it is built into."""
    arguments = dict(given.arguments)
    if spec.source is not None or spec.name not in CATALOG or "where" in arguments:
        return {}
    table = CATALOG[spec.name].table
    place = FAMILIES[type(table)].place
    if place is None:
        return {}
    stages = getattr(network, "table", table).stages
    first, last = _stages(arguments.get("stages", f"1-{stages}"), stages)
    is_kernel = unit(given.name).location == "convolution"
    names = {place(stage, is_kernel) for stage in range(first, last + 1)}
    return {"where": lambda name, _: name in names, "stages": None}


def _completed(spec: Spec, table: DnCNNTable, weights: ConvertedDnCNN, path: Path) -> Spec:
    """The spec of a DnCNN with what its weights say and it does not.

    Raises:
        UsageError: it says something else.
    """
    adjusted = FAMILIES[DnCNNTable].adjusted
    given = adjusted(table, **typed(adjusted, spec.arguments, f"the network {spec.name}"))
    said = dict(spec.arguments)
    for key, value in weights.form.items():
        own = getattr(given, key)
        if key in said and str(own) != value:
            raise UsageError(
                f"it says {key}={own}, but the weights in {path} are of a network with {key}={value}; leave {key}= "
                "out of the spec"
            )
        if str(own) != value:
            said[key] = value
    return replace(spec, arguments=tuple(said.items()))


def _channels(given: int | None, weights: ConvertedDnCNN, path: Path) -> int:
    if given is not None and given != weights.channels:
        raise UsageError(
            f"in_channels is {given}, but the weights in {path} are for images with {weights.channels}; "
            "leave in_channels out"
        )
    return weights.channels


def _with_weights(spec: Spec, weights: Weights, build: Callable[[Spec], nn.Module]) -> Spec:
    """The spec with every unit's ``init`` said, where these weights are of the host alone or the unit is attached."""
    inside = tuple(given for given in spec.units if not _is_attached(spec, given))
    names = weights.tensors.keys() | (weights.converted.tensors.keys() if weights.converted else set())
    if inside:
        with torch.device("meta"):
            host = build(replace(spec, units=())).state_dict().keys()
            own = build(replace(spec, units=inside)).state_dict().keys() - host
        of_host = own.isdisjoint(names)
    units = []
    for given in spec.units:
        settled = "init" in dict(given.arguments) or (given in inside and not of_host)
        units.append(given if settled else replace(given, arguments=(*given.arguments, ("init", "identity"))))
    return replace(spec, units=tuple(units))


def for_window(spec: str | Spec, window: int) -> Spec:
    """The spec of a network that takes windows of this side.

    A network of excite's own that is built for windows of one size (:mod:`excite.networks.hybridsn`) gets the
    argument ``window``, where the spec does not give it and the side is not the one that it was drawn for. Every
    other spec stays as it is.

    Args:
        spec: of any network.
        window: side of the windows, or images, in pixels.

    Raises:
        UsageError: the spec gives another side.
    """
    spec = parse_spec(spec)
    if spec.source is not None or spec.name not in CATALOG:
        return spec
    entry = CATALOG[spec.name]
    if "window" not in inspect.signature(FAMILIES[type(entry.table)].adjusted).parameters:
        return spec
    given = dict(spec.arguments).get("window")
    if given is not None and given.isdecimal() and int(given) != window:
        raise UsageError(
            f"{str(spec)!r} is a network for windows of {given}×{given} pixels, but these are {window}×{window}; "
            "leave window= out of the spec."
        )
    if given is not None or window == entry.input_size:
        return spec
    return replace(spec, arguments=(*spec.arguments, ("window", str(window))))


def networks() -> list[str]:
    """The names that :func:`create` knows without a source: the catalogue's, then the registered ones."""
    return [*CATALOG, *_registered_networks]


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
    check_name(name)
    _registered_networks[name] = factory


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}.")


def _source(spec: Spec) -> Builder:
    if spec.source in networks():
        raise UsageError(f"{spec.source} is a network and not a source; its arguments are written key=value.")
    return _SOURCES[known(spec.source, list(_SOURCES), "source")]


# --- excite's own networks -------------------------------------------------------------------------------------


def _own(spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    name = known(spec.name, networks(), "network")
    if name in CATALOG:
        return _from_catalog(CATALOG[name], spec, num_classes, in_channels)
    factory = _registered_networks[name]
    return factory(num_classes, in_channels, **typed(factory, spec.arguments, f"the network {name}"))


def _from_catalog(entry: Entry, spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    family = FAMILIES[type(entry.table)]
    table = family.adjusted(entry.table, **typed(family.adjusted, spec.arguments, f"the network {entry.name}"))
    given = [item for text in entry.units for item in parse_spec(f"{entry.name}+{text}").units]
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
    for given in unit_specs:
        kind = unit(given.name)
        first, last = _stages(dict(given.arguments).get("stages", f"1-{stages}"), stages)
        arguments = arguments_of(given, kind.factory)
        for stage in range(first, last + 1):
            if stage in chosen[kind.location]:
                raise UsageError(
                    f"stage {stage} was given two units for its {kind.location} (the second is {given})."
                )
            chosen[kind.location][stage] = partial(kind.factory, **arguments)
    return chosen


def _stages(text: str, count: int) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= count:
        raise UsageError(f"stages={text}: expected one stage such as 3, or a range such as 1-2, within 1-{count}.")
    return first, last


# --- other people's networks -----------------------------------------------------------------------------------


def _torchvision(spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    import torchvision

    name = known(spec.name, torchvision.models.list_models(module=torchvision.models), "torchvision network")
    if in_channels != 3:
        raise UsageError(f"torchvision's networks take images of 3 channels, not {in_channels}.")
    return _foreign(spec, torchvision.models.get_model, name, weights=None, num_classes=num_classes)


def _timm(spec: Spec, num_classes: int, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError("timm is not installed; pip install 'excite[timm]' brings it.") from error

    known(spec.name.partition(".")[0], timm.list_models(), "timm network")
    return _foreign(spec, timm.create_model, spec.name, num_classes=num_classes, in_chans=in_channels)


def _foreign(spec: Spec, builder: Callable[..., nn.Module], name: str, **ours: Any) -> nn.Module:
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


@contextmanager
def _about(spec: Spec) -> Iterator[None]:
    """Every refusal on the way names the spec it is about."""
    try:
        yield
    except ValueError as error:
        sentence = f"Cannot build {str(spec)!r}: {error}"
        raise UsageError(sentence if sentence.endswith((".", "?")) else sentence + ".") from error


_registered_networks: dict[str, NetworkFactory] = {}
_SOURCES: dict[str | None, Callable[[Spec, int, int], nn.Module]] = {
    None: _own,
    "torchvision": _torchvision,
    "timm": _timm,
}

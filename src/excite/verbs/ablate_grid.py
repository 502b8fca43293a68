"""The grid of an ablation: keys and values, made into network specs and changes of the recipe."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from excite.errors import UsageError, nearest
from excite.networks.catalog import CATALOG
from excite.networks.families import FAMILIES
from excite.spec import Arguments, Spec, parse_spec
from excite.surgery.units import EVERY_UNITS, unit
from excite.training.recipe import all_keys, parse_settings

Values = str | Sequence[str | int | float | bool]

_GIVEN_ELSEWHERE = {
    "seed": "seeds are given with --seeds",
    "data.path": "an ablation holds the data fixed: give --data",
    "data.test_path": "an ablation holds the data fixed: give --test-data",
    "trainer.minutes": "the time is given with --minutes",
}


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Attributes:
        setting: every key of the grid with its value here, as text.
        spec: the network that this makes of the one given.
        recipe: the recipe keys that it sets, with typed values.
    """

    setting: dict[str, str]
    spec: str
    recipe: dict[str, Any]

    @property
    def label(self) -> str:
        """``reduction=8, gate=tanh``."""
        return label(self.setting)


@dataclass(frozen=True)
class _Target:
    """What a key of the grid sets: an argument of the network or of units by their name, or a recipe key."""

    kind: Literal["network", "unit", "recipe"]
    key: str
    unit: str = ""


def label(setting: Mapping[str, str]) -> str:
    """A setting in words: ``reduction=8, gate=tanh``."""
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def host_of(network: str) -> str:
    """The spec without its units: ``resnet20`` of ``resnet20+se:reduction=8``."""
    return str(replace(parse_spec(network), units=()))


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """``["reduction=2,4,8", "gate=sigmoid,tanh"]`` as keys with their values.

    Commas part the values, but for those within brackets: ``optimizer.betas=[0.9,0.99],[0.8,0.9]``.

    Raises:
        UsageError: no ``KEY=VALUE,VALUE``, or a key twice.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not key or not equals:
            raise UsageError(f"{text!r}: expected KEY=VALUE,VALUE,… such as reduction=2,4,8")
        if key in grid:
            raise UsageError(f"{text!r}: the values of {key} were given before; write them as one list")
        grid[key] = _split(values)
    return grid


def points(grid: Mapping[str, Values], network: str) -> list[Point]:
    """Every point of the grid, in its order; of several keys their product, the last running fastest.

    Args:
        grid: keys with their values. A key is an argument of the network's unit (``reduction``), of one of several
            (``se.reduction``), of the network itself (``width``), or a recipe key (``optimizer.lr``).
        network: the spec whose arguments vary.

    Raises:
        UsageError: nothing to vary, a key that is none of these or is not for an ablation, or a value twice.
    """
    if not grid:
        raise UsageError("an ablation needs at least one key with its values, such as reduction=2,4,8")
    spec = parse_spec(network)
    targets = {key: _target(key, spec) for key in grid}
    columns = []
    for key, values in grid.items():
        texts = _split(values) if isinstance(values, str) else [_text(value) for value in values]
        if not texts or "" in texts:
            raise UsageError(f"{key}: expected values with commas between them, such as {key}=2,4,8")
        if twice := sorted({text for text in texts if texts.count(text) > 1}):
            raise UsageError(f"{key}: the value {twice[0]} is given twice")
        columns.append([(key, text) for text in texts])
    return [_point(dict(chosen), targets, spec) for chosen in itertools.product(*columns)]


def _point(setting: dict[str, str], targets: Mapping[str, _Target], spec: Spec) -> Point:
    changes: dict[str, Any] = {}
    for key, value in setting.items():
        target = targets[key]
        if target.kind == "recipe":
            changes |= parse_settings([f"{target.key}={value}"])
        elif target.kind == "network":
            spec = replace(spec, arguments=_with(spec.arguments, target.key, value))
        else:
            units = tuple(
                replace(given, arguments=_with(given.arguments, target.key, value))
                if given.name == target.unit
                else given
                for given in spec.units
            )
            spec = replace(spec, units=units)
    return Point(setting, str(parse_spec(str(spec))), changes)


def _with(arguments: Arguments, key: str, value: str) -> Arguments:
    return tuple((dict(arguments) | {key: value}).items())


def _target(key: str, spec: Spec) -> _Target:
    units = {given.name: _takes_unit(given.name) for given in spec.units}
    owner, dot, rest = key.rpartition(".")
    if dot and owner in units:
        if rest not in units[owner]:
            hint = nearest(rest, units[owner]) or f"its arguments are {', '.join(units[owner])}"
            raise UsageError(f"{key}: unknown argument {rest!r} of the unit {owner}; {hint}")
        return _Target("unit", rest, owner)
    if key in _GIVEN_ELSEWHERE:
        raise UsageError(f"{key}: {_GIVEN_ELSEWHERE[key]}")
    if key.startswith("network."):
        raise UsageError(f"{key}: the network is given with --network, and its own arguments vary as KEY=VALUE,VALUE")
    if key in all_keys():
        return _Target("recipe", key)
    takers = [name for name, arguments in units.items() if key in arguments]
    if len(takers) > 1:
        choices = " or ".join(f"{name}.{key}" for name in takers)
        raise UsageError(f"{key}: {spec} has several units with this argument; write {choices}")
    if takers:
        return _Target("unit", key, takers[0])
    own = _takes_network(spec)
    if not dot and (own is None or key in own):
        return _Target("network", key)
    plain = list(dict.fromkeys([*(own or []), *(name for arguments in units.values() for name in arguments)]))
    dotted = [f"{name}.{argument}" for name in units for argument in units[name]]
    hint = nearest(key, [*plain, *dotted, *all_keys()])
    there = f"there are {', '.join(plain)}, and recipe keys such as optimizer.lr"
    raise UsageError(f"{key}: neither an argument of {spec} nor a recipe key; {hint or there}")


def _takes_unit(name: str) -> list[str]:
    """The arguments of a unit, built in or attached."""
    kind = unit(name)
    factories = [kind.factory, *([kind.around] if kind.around else [])]
    return list(dict.fromkeys([*(key for factory in factories for key in _keywords(factory)), *EVERY_UNITS]))


def _takes_network(spec: Spec) -> list[str] | None:
    """The arguments of a network; None where only building it tells."""
    if spec.source or spec.name not in CATALOG:
        return None
    return _keywords(FAMILIES[type(CATALOG[spec.name].table)].adjusted)


def _keywords(factory: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(factory).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _split(text: str) -> list[str]:
    """At commas that stand within no brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text)]


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

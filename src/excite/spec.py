"""Network specs: one line of text that names any network.

    [source:]name[:key=value,…]{+unit[:key=value,…]}

``resnet50``, ``resnet50:stride_in=1x1``, ``resnet20+se:reduction=8,stages=1-2``, ``torchvision:resnet50``.
The part before the first ``:`` is a source when what follows holds no ``=``. A spec needs no quotes in a
shell and is a legal folder name on Linux and macOS: letters, digits and ``_ . -`` are all that its words may hold.

This file knows the grammar only. Which names, units and arguments there are is for :mod:`excite.create` to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from excite.errors import UsageError

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9_.-]+")
_GRAMMAR = "a spec is [source:]name[:key=value,…]{+unit[:key=value,…]}, such as resnet20+se:reduction=8"

Arguments = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class UnitSpec:
    """A unit and its arguments, as text: ``se:reduction=8,stages=1-2``."""

    name: str
    arguments: Arguments = ()

    def __str__(self) -> str:
        return self.name + _arguments_text(self.arguments)


@dataclass(frozen=True)
class Spec:
    """A parsed network spec; ``str(spec)`` is its text, and ``parse_spec(str(spec)) == spec``.

    Args:
        name: the network, as its source calls it.
        source: where the name comes from (``torchvision``, ``timm``); None for excite's own and registered ones.
        arguments: the network's arguments, in the order given, values still text.
        units: the units, in the order given.
    """

    name: str
    source: str | None = None
    arguments: Arguments = ()
    units: tuple[UnitSpec, ...] = field(default=())

    def __str__(self) -> str:
        source = f"{self.source}:" if self.source else ""
        return "+".join([source + self.name + _arguments_text(self.arguments), *map(str, self.units)])


def parse_spec(text: str | Spec) -> Spec:
    """Read a network spec.

    Raises:
        UsageError: the text does not follow the grammar; the message quotes the part that does not.
    """
    if isinstance(text, Spec):
        return text
    if not isinstance(text, str):
        raise UsageError(f"A network spec is text, not {type(text).__name__}: {_GRAMMAR}.")
    network, *units = text.split("+")
    head, *rest = network.split(":")
    source = None
    if rest and rest[0] and "=" not in rest[0]:
        source, (head, *rest) = _word(text, head, "source"), rest
    return Spec(
        name=_word(text, head, "network name"),
        source=source,
        arguments=_arguments(text, rest),
        units=tuple(_unit(text, unit) for unit in units),
    )


def _unit(text: str, unit: str) -> UnitSpec:
    head, *rest = unit.split(":")
    return UnitSpec(_word(text, head, "unit name"), _arguments(text, rest))


def _arguments(text: str, rest: list[str]) -> Arguments:
    """The arguments in what followed the name, already split at ``:``."""
    if not rest:
        return ()
    if len(rest) > 1:
        raise _malformed(text, ":" + rest[1], "expected no second ':' after the arguments")
    arguments: dict[str, str] = {}
    for item in rest[0].split(","):
        key, equals, value = item.partition("=")
        if not equals or not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise _malformed(text, item, "expected key=value")
        if key in arguments:
            raise _malformed(text, item, f"{key} was given before")
        arguments[key] = value
    return tuple(arguments.items())


def _word(text: str, word: str, what: str) -> str:
    if not _WORD.fullmatch(word):
        raise _malformed(text, word, f"expected a {what} of letters, digits and _ . -, letter or digit first")
    return word


def _malformed(text: str, part: str, expected: str) -> UsageError:
    return UsageError(f"Cannot read {part!r} in the network spec {text!r}: {expected} ({_GRAMMAR}).")


def _arguments_text(arguments: Arguments) -> str:
    return ":" + ",".join(f"{key}={value}" for key, value in arguments) if arguments else ""

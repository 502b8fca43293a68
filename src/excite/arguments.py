"""The arguments of a spec as typed values, and refusals of names that are not known."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from excite.errors import UsageError, nearest
from excite.spec import Arguments


def known(word: Any, names: list[Any], what: str) -> Any:
    """The word, if it is one of the names.

    Raises:
        UsageError: it is not; the message says what is nearest, or what there is.
    """
    if word in names:
        return word
    others = [name for name in names if name]
    hint = nearest(word, others) or (f"there are {', '.join(others)}." if len(others) < 30 else "")
    raise UsageError(f"unknown {what} {word!r}" + (f"; {hint}" if hint else "."))


def typed(factory: Callable[..., Any], given: Arguments, what: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments of a spec as the values that the factory's keyword-only parameters are annotated with.

    Args:
        factory: whose parameters they are.
        given: keys and texts.
        what: whose they are, in words.
        also: keys that are handled elsewhere, to be named as existing.

    Raises:
        UsageError: an unknown key, or a text that is no such value.
    """
    hints = typing.get_type_hints(factory, include_extras=True)
    parameters = inspect.signature(factory).parameters.values()
    known_keys = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for key, _ in given:
        if key not in known_keys:
            there = ", ".join([*known_keys, *also]) or "none"
            hint = nearest(key, [*known_keys, *also])
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

"""What all pages share: their templates, Plotly, and settings laid out for reading."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from excite.report.figures import SYMBOLS

Settings = list[tuple[str, list[tuple[str, str]]]]


@functools.cache
def templates() -> jinja2.Environment:
    """The templates of all pages; what is put into them is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("excite.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["symbols"] = [path for _, path in SYMBOLS]
    environment.filters["breakable"] = _breakable
    environment.filters["unbroken"] = unbroken
    return environment


def _breakable(spec: str) -> Markup:
    """A long spec that may be broken after its separators rather than within a word."""
    return Markup("<wbr>").join(re.split(r"(?<=[:,+/])", spec))


def unbroken(text: str) -> str:
    """A sentence with every number kept on one line with its percent sign."""
    return text.replace(" %", "\u00a0%")


@functools.cache
def plotly_js() -> Markup:
    """The whole of Plotly, to stand in a page that loads nothing."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def settings(recipe: Mapping[str, Any]) -> Settings:
    """A nested recipe as one group per top-level key, deeper keys joined by dots as ``--set`` takes them."""
    plain = [(key, _yaml(value)) for key, value in recipe.items() if not isinstance(value, Mapping)]
    groups = [("recipe", plain)] if plain else []
    groups += [(key, list(_flat(value))) for key, value in recipe.items() if isinstance(value, Mapping)]
    return [(name, settings) for name, settings in groups if settings]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _yaml(value)


def _yaml(value: Any) -> str:
    """A setting as it stands in the recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    return str(value)

"""``excite recipes``."""

from __future__ import annotations

from typing import Annotated

import typer

from excite.cli.common import Json, print_json

NAME = "recipes"


def run(
    name: Annotated[str | None, typer.Argument(help="Print this recipe whole.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """The recipes that come with excite, or one of them in full."""
    from rich.console import Console
    from rich.table import Table

    from excite.training.recipe import load, shipped

    if name:
        content = load(name).model_dump(mode="json")
        if json:
            print_json(content)
        else:
            import yaml

            print(yaml.safe_dump(content, sort_keys=False), end="")
        return
    found = shipped()
    if json:
        print_json({"recipes": [{"name": name, "description": text} for name, text in found.items()]})
        return
    table = Table("recipe", "what it is for")
    for recipe, text in found.items():
        table.add_row(recipe, text)
    Console(highlight=False).print(table)

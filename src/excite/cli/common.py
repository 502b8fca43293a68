"""Options and printing that the verbs share."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, Any

import typer

from excite.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps …")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe key, e.g. trainer.batch_size=64 (repeatable)."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="digits, cifar10, cifar100, a folder or tar of class folders, shards:DIR, indian-pines, a scene's file, "
        "photographs, denoising:FOLDER, digits-words, or crossmodal:PATH.",
        show_default=False,
    ),
]
TestData = Annotated[
    str | None,
    typer.Option("--test-data", help="The test images, where --data does not hold them.", show_default=False),
]

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A recipe's name or file. Default: what suits the data; with --weights, finetune.",
        show_default=False,
    ),
]
StartWeights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="Weights that every network starts from: imagenet, or a file.", show_default=False
    ),
]
AllMinutes = Annotated[
    float | None,
    typer.Option("--minutes", help="Choose the epochs so that all runs together take so long.", show_default=False),
]


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content, indent=2, allow_nan=False))


def show_log() -> None:
    """Let what the library has to say be seen: one line each, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("excite")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """``.485,.456,.406`` as numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text}: expected numbers with commas between them, such as .485,.456,.406"
        ) from None

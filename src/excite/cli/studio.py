"""``excite studio``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from excite.cli.common import Device, Json, print_json, show_log
from excite.cli.evaluate import Weights

NAME = "studio"


def run(
    source: Annotated[
        str, typer.Argument(metavar="RUN|SPEC", help="A run's folder, or a network spec with --weights.")
    ],
    weights: Weights = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="The explain.npz to hold the gates against. Default: the one in the run's reports/.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 for any that is free.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Open a local page: drop an image on it and see what the network's attention does with it.

    It listens on 127.0.0.1 alone and writes nothing; Ctrl+C ends it. With --json the page's address is printed as
    JSON.
    """
    from rich.console import Console

    from excite.verbs.studio import studio

    def ready(address: str) -> None:
        if json:
            print_json({"url": address})
        else:
            Console(highlight=False).print(f"{address}  (Ctrl+C ends it)", soft_wrap=True)
        sys.stdout.flush()  # whoever reads it from a pipe waits for the address

    show_log()
    studio(
        source,
        weights=weights,
        statistics=statistics,
        port=port,
        browser=browser,
        device=device,
        ready=ready,
    )

"""The command line: one thin file per verb, heavy imports inside the call."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from excite.cli import (
    ablate,
    bench,
    compare,
    cost,
    data,
    evaluate,
    explain,
    export,
    index,
    networks,
    plan,
    predict,
    prune,
    recipes,
    search,
    studio,
    train,
)
from excite.errors import ExciteError

app = typer.Typer(
    name="excite",
    help="Channel and kernel attention for any convolutional network: compare, train, evaluate, explain, predict.",
    epilog="Every verb takes --debug to show where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for verb in (
    compare,
    ablate,
    train,
    evaluate,
    explain,
    predict,
    export,
    prune,
    index,
    search,
    studio,
    cost,
    bench,
    plan,
    networks,
    recipes,
):
    app.command(name=verb.NAME)(verb.run)
app.add_typer(data.app, name=data.NAME)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and end.")) -> None:
    if version:
        from excite import __version__

        typer.echo(f"excite {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line; exit code 0 for done, 1 for failed, 2 for wrong usage."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="excite")
    except ExciteError as error:
        if debug:
            raise
        print(f"excite: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("excite: interrupted; what was saved stays, and the same command goes on from there", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader (head, less) has gone; there is nobody left to tell.
        sys.stderr.close()
        sys.exit(1)
    sys.exit(0)

"""``excite data``: what data there is, and shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from excite.cli.common import Json, print_json, show_log

NAME = "data"

app = typer.Typer(
    name=NAME,
    help="What data excite takes; pack large sets into shards (data pack), check them (data check).",
    add_completion=False,
)

_SHOWN = 20  # of what is broken; --json has all

KINDS = {
    "digits": "8×8 digits of scikit-learn on a canvas of 32×32, built in",
    "cifar10, cifar100[:FOLDER]": "a local copy, or downloaded",
    "PATH": "a folder or tar of class folders, with or without train/, val/ and test/",
    "list:FILE": "lines of a path and a class; ImageNet's and Places365's lists are found by themselves",
    "shards:DIR": "what excite data pack has made; also shards:s3://bucket/prefix",
    "indian-pines, hyperspectral:FILE": "a scene with its ground truth",
    "photographs, denoising:FOLDER": "clean pictures, which are spoilt on the way",
    "digits-words, crossmodal:PATH": "pairs of images and texts",
}


@app.callback(invoke_without_command=True)
def kinds(context: typer.Context, json: Json = False) -> None:
    """The kinds of data that --data takes."""
    if context.invoked_subcommand is not None:
        return
    if json:
        print_json({"data": [{"spec": spec, "description": text} for spec, text in KINDS.items()]})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("--data", "what it is")
    for spec, text in KINDS.items():
        table.add_row(spec, text)
    console = Console(highlight=False)
    console.print(table)
    console.print("Large sets:  excite data pack DIR OUT", markup=False)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A folder or tar of class folders, or list:FILE.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the shards.")],
    shard_size: Annotated[str, typer.Option(help="The most bytes of a shard: 256MB, 1GiB …")] = "256MB",
    resize: Annotated[
        int | None,
        typer.Option(help="Bring the shorter side of larger images to so many pixels.", show_default=False),
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="Of the JPEGs that --resize makes. Default: 90.", show_default=False)
    ] = None,
    refuse_broken: Annotated[
        bool, typer.Option("--refuse-broken", help="End at the first image that cannot be read.")
    ] = False,
    json: Json = False,
) -> None:
    """Pack a folder or tar of class folders into shards: tars in the WebDataset format, with an index.

    What was killed goes on with the same command. Images that cannot be read are named and left out.
    """
    import sys

    from rich.console import Console
    from rich.text import Text

    from excite.report.search import legible
    from excite.report.wording import duration
    from excite.verbs.pack import pack as pack_shards

    show_log()
    result = pack_shards(
        source,
        out,
        shard_size=shard_size,
        resize=resize,
        quality=quality,
        refuse_broken=refuse_broken,
        progress=True,
    )
    if json:
        print_json(result)
    else:
        console = Console(highlight=False)
        for split, one in result["splits"].items():
            console.print(f"{_counted(split, one)}, {one['bytes'] / 1e6:,.1f} MB")
        kept = f", {_plural(result['kept'], 'shard')} of it before" if result["kept"] else ""
        console.print(f"Packed in {duration(result['seconds'])}{kept}")
        console.print(Text(f"Use them:  --data shards:{legible(result['out'])}"), soft_wrap=True)
    for row in result["broken"][:_SHOWN]:
        print(f"excite: left out: {legible(row['file'])}: {legible(row['error'])}", file=sys.stderr)
    if (more := len(result["broken"]) - _SHOWN) > 0:
        print(f"excite: left out: {more:,} more, which --json names", file=sys.stderr)


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="WebDataset shards, or train/, val/ … with them.")],
    classes: Annotated[
        Path | None,
        typer.Option(help="A text file with a class name a line, in the order of the labels.", show_default=False),
    ] = None,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Read all, so that data check can check it.")
    ] = False,
    json: Json = False,
) -> None:
    """Make the index of WebDataset shards that somebody else has made: --data shards:DIR then reads them."""
    from excite.data.shards_tar import index_shards
    from excite.errors import UsageError

    show_log()
    try:
        names = None if classes is None else classes.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the classes in {classes}: {error}.") from error
    found = index_shards(
        folder, classes=names and [name.strip() for name in names if name.strip()], checksums=checksums
    )
    rows = {
        split: {"images": len(one), "shards": len(one.shards), "classes": len(one.classes)}
        for split, one in found.items()
    }
    if json:
        print_json({"shards": str(folder), "splits": rows})
        return
    for split, row in rows.items():
        print(_counted(split, row))


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the shards.")],
    json: Json = False,
) -> None:
    """Hold shards against their index, byte for byte; exit code 1 where one is missing or has changed."""
    import sys

    from excite.data.shards_tar import check_shards
    from excite.report.search import legible

    broken = check_shards(folder)
    if json:
        print_json({"shards": str(folder), "broken": broken})
    elif not broken:
        print("All shards are as their index has them.")
    for row in broken:
        print(f"excite: {legible(row['file'])}: {legible(row['error'])}", file=sys.stderr)
    if broken:
        raise typer.Exit(1)


def _counted(split: str, row: dict[str, Any]) -> str:
    counts = f"{_plural(row['images'], 'image')} of {row['classes']:,} classes in {_plural(row['shards'], 'shard')}"
    return f"{split}: {counts}" if split else counts


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"

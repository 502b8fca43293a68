"""``excite predict``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from excite.cli.common import Device, numbers, print_json, show_log
from excite.cli.evaluate import ImageSize, Interpolation, Mean, Resize, Std, Weights
from excite.errors import UsageError

NAME = "predict"


class Format(StrEnum):
    """How predictions are printed."""

    table = "table"
    jsonl = "jsonl"
    csv = "csv"
    json = "json"


def run(
    source: Annotated[
        str, typer.Argument(metavar="RUN|SPEC", help="A run's folder, or a network spec with --weights.")
    ],
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Image files and folders of them; for a run of a hyperspectral scene, one scene."
        ),
    ],
    weights: Weights = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="How many classes to name. [default: 5]", show_default=False)
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(help="table, jsonl, csv (one line a class) or json. [default: table]", show_default=False),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Of a scene: where its map goes: .png (a picture), .tif or .npy (class numbers).", show_default=False
        ),
    ] = None,
    ground_truth: Annotated[
        str | None,
        typer.Option(help="Of a scene: a file of labels, where none lies beside it.", show_default=False),
    ] = None,
    variable: Annotated[
        str | None, typer.Option(help="Of a scene: the cube's name in a .mat of several.", show_default=False)
    ] = None,
    mc_dropout: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Of a scene: take the mean of N answers with dropout left on."),
    ] = 0,
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Name what is in images, or map the classes of a hyperspectral scene.

    A broken image is reported and the rest goes on (exit code 1 at the end).
    """
    from excite.cli.process import keep_freed_buffers
    from excite.verbs.predict_scene import maps_scenes

    scenes = weights is None and maps_scenes(source)
    if scenes:
        keep_freed_buffers()  # before the log is shown: only training need tell of it
    show_log()
    of_images = {
        "--weights": weights, "--top": top, "--mean": mean, "--std": std, "--image-size": image_size,
        "--resize": resize, "--interpolation": interpolation,
    }  # fmt: skip
    of_scenes = {
        "--out": out, "--ground-truth": ground_truth, "--variable": variable, "--mc-dropout": mc_dropout or None,
    }  # fmt: skip
    if scenes:
        if format in (Format.jsonl, Format.csv):
            of_images["--format"] = format
        _refuse(of_images, f"{source} was trained on a hyperspectral scene", "images")
        if len(paths) > 1:
            raise UsageError(f"{source} was trained on a hyperspectral scene: give it one scene, not {len(paths)}.")
        _map(source, str(paths[0]), out, ground_truth, variable, mc_dropout, device, json or format is Format.json)
        return
    _refuse(of_scenes, f"{source} is a network of images", "hyperspectral scenes")
    _name(
        source,
        paths,
        Format.json if json else format or Format.table,
        weights=weights,
        top=5 if top is None else top,
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        image_size=image_size,
        resize=resize,
        interpolation=interpolation,
        device=device,
    )


def _refuse(options: dict[str, Any], what: str, others: str) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise UsageError(f"{what}, and {given[0]} is an option for {others}: leave it out.")


def _map(
    run: str,
    scene: str,
    out: Path | None,
    ground_truth: str | None,
    variable: str | None,
    passes: int,
    device: str,
    json: bool,
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from excite.verbs.predict_scene import predict_scene

    result = predict_scene(
        run,
        scene,
        out,
        ground_truth=ground_truth,
        variable=variable,
        passes=passes,
        device=device,
        progress=True,
    )
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    table = Table("number", "class", "pixels", "share")
    for column in table.columns[2:]:
        column.justify = "right"
    for entry in result["classes"]:
        if entry["pixels"]:
            share = f"{100 * entry['share']:.2f} %"
            table.add_row(str(entry["number"]), escape(entry["class"]), f"{entry['pixels']:,}", share)
    console.print(table)
    how = "the whole scene at once" if result["dense"] else "window by window"
    console.print(f"{result['rows']:,} × {result['cols']:,} pixels in {result['seconds']:.1f} s, {how}")
    if result["agreement"] is not None:
        among = ", those trained on included: no test" if result["trained_here"] else ""
        labelled = f"{result['agreement']:.2f} % of {result['labelled']:,} labelled pixels"
        console.print(f"{labelled} as in the ground truth{among}", soft_wrap=True)
    if result["out"]:
        console.print(f"Map: {escape(result['out'])}", soft_wrap=True)


def _name(source: str, paths: list[Path], format: Format, **options: Any) -> None:
    import csv
    import json as writer
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from excite.verbs.predict import predict

    rows = predict(source, paths, progress=True, **options)
    failed = 0
    table = Table("file", "prediction")
    lines = csv.writer(sys.stdout, lineterminator="\n")
    if format is Format.csv:
        lines.writerow(["file", "rank", "class", "probability", "error"])
    gathered = []
    for row in rows:
        failed += "error" in row
        if format is Format.json:
            gathered.append(row)
        elif format is Format.jsonl:
            print(writer.dumps(row), flush=True)
        elif format is Format.csv:
            if "error" in row:
                lines.writerow([row["file"], "", "", "", row["error"]])
            for rank, guess in enumerate(row.get("predictions", []), 1):
                lines.writerow([row["file"], rank, guess["class"], f"{guess['probability']:.6f}", ""])
        else:
            guesses = "  ".join(f"{g['class']} {100 * g['probability']:.1f} %" for g in row.get("predictions", []))
            table.add_row(escape(row["file"]), escape(guesses) or f"[red]{escape(row['error'])}[/red]")
    if format is Format.json:
        print(writer.dumps({"predictions": gathered}, indent=2))
    elif format is Format.table:
        Console(highlight=False).print(table)
    if failed:
        print(f"excite: {failed} files could not be read", file=sys.stderr)
        raise typer.Exit(1)

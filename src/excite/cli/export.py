"""``excite export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from excite.cli.common import Data, Json, TestData, print_json, show_log
from excite.cli.evaluate import Weights

NAME = "export"


class Target(StrEnum):
    """What a network is exported to."""

    onnx = "onnx"
    openvino = "openvino"
    torch = "torch"


class Numbers(StrEnum):
    """In which numbers an exported network computes."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


def run(
    source: Annotated[
        str, typer.Argument(metavar="RUN|SPEC", help="A run's folder, or a network spec with --weights.")
    ],
    to: Annotated[
        Target, typer.Option(help="onnx, openvino (its IR), or torch (torch.export, and AOTInductor's machine code).")
    ] = Target.onnx,
    precision: Annotated[
        Numbers, typer.Option(help="fp32; bf16 (openvino, torch); int8 (onnx, openvino), quantised after training.")
    ] = Numbers.fp32,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Any number of images at once. Default: one.")
    ] = False,
    weights: Weights = None,
    data: Data = None,
    test_data: TestData = None,
    max_drop: Annotated[float, typer.Option(min=0, help="Of int8: how many points of accuracy it may cost.")] = 0.5,
    bake_preprocessing: Annotated[
        bool, typer.Option("--bake-preprocessing", help="Normalise inside the file, which then takes uint8 pixels.")
    ] = False,
    calibration: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of int8: training images that the scales are taken from.")
    ] = 300,
    images: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Verify on no more images than this. Default: all.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder. Default: export/ in the run, or one by the spec's name.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Write a classifier as a file that runs without excite, and verify it against the original.

    Test images are taken from the run's data or from --data; without any, random ones. Beside the file lies
    model.json: classes, preprocessing, shapes, what was verified, checksums.
    """
    from rich.console import Console
    from rich.table import Table

    from excite.allocator import keep_freed_buffers
    from excite.verbs.export import export

    keep_freed_buffers()  # before the log is shown: it is no news here
    show_log()
    card = export(
        source,
        to.value,
        weights=weights,
        precision=precision.value,
        dynamic_batch=dynamic_batch,
        data=data,
        test=test_data,
        max_drop=max_drop,
        bake_preprocessing=bake_preprocessing,
        calibration=calibration,
        images=images,
        out=out,
        progress=True,
    )
    if json:
        print_json(card)
        return
    console = Console(highlight=False)
    verified = card["verification"]
    title = (
        f"{card['spec']} → {card['format']} {card['precision']}, {verified['count']:,} {verified['images']} images"
    )
    table = Table("", "original", "exported", title=title.replace(" images images", " images"), title_justify="left")
    if accuracy := verified["accuracy"]:
        table.add_row("accuracy (%)", f"{accuracy['before']:.2f}", f"{accuracy['after']:.2f}")
    table.add_row("same top class (%)", "", f"{verified['top1_agreement']:.2f}")
    table.add_row("largest difference", "", f"{verified['max_abs']:.2g}")
    table.add_row("… over the largest output", "", f"{verified['max_relative']:.2g}")
    console.print(table)
    for layer in card.get("int8", {}).get("worst_layers", []):
        console.print(f"{layer['layer']}: signal over 8-bit error {layer['decibels']:.0f} dB", soft_wrap=True)
    console.print(f"{', '.join(card['files'])} and model.json in {card['out']}", soft_wrap=True)

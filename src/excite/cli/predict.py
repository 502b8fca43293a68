"""``excite predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from excite.cli.common import Device, numbers, show_log
from excite.cli.evaluate import ImageSize, Interpolation, Mean, Resize, Std, Weights
from excite.cli.formats import Format, Precision
from excite.cli.predict_denoising import denoise
from excite.cli.predict_images import name_images
from excite.cli.predict_scene import map_scene
from excite.errors import UsageError

NAME = "predict"


def run(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|SPEC", help="A run's folder, an export's, or a network spec with --weights."),
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
            help="Of a scene: where its map goes: .png (a picture), .tif or .npy (class numbers). Of denoising: the "
            "folder for the pictures.",
            show_default=False,
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
    sigma: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=255,
            help="Of denoising: the noise, on the scale of 0 … 255; chooses among the weights in a folder.",
            show_default=False,
        ),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Of denoising: measure each picture's noise, and choose by it.")
    ] = False,
    by_channel: Annotated[
        bool,
        typer.Option("--by-channel", help="Of denoising: colour through a network for grey, channel by channel."),
    ] = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Of denoising: also write before, after and their difference.")
    ] = False,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of denoising and engines: fp32, or bf16 for speed. [default: fp32]", show_default=False),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Of images: torch, onnx or openvino, which run the network rewritten for speed.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Name what is in images, map the classes of a hyperspectral scene, or denoise pictures.

    A broken image is reported and the rest goes on (exit code 1 at the end).
    """
    from excite.allocator import keep_freed_buffers
    from excite.verbs.predict_denoising import denoises
    from excite.verbs.predict_scene import maps_scenes

    scenes = weights is None and maps_scenes(source)
    noise = not scenes and denoises(source)
    if scenes or noise:
        keep_freed_buffers()  # before the log is shown: only training need tell of it
    show_log()
    of_classes = {
        "--top": top, "--mean": mean, "--std": std, "--image-size": image_size, "--resize": resize,
        "--interpolation": interpolation, "--engine": engine,
    }  # fmt: skip
    of_scenes = {"--ground-truth": ground_truth, "--variable": variable, "--mc-dropout": mc_dropout or None}
    of_denoising = {
        "--sigma": sigma, "--estimate": estimate or None, "--by-channel": by_channel or None,
        "--side-by-side": side_by_side or None, "--precision": precision,
    }  # fmt: skip
    printed = Format.json if json else format or Format.table
    if scenes:
        what = f"{source} was trained on a hyperspectral scene"
        rows = {"--format": format if format in (Format.jsonl, Format.csv) else None}
        _refuse({"--weights": weights} | of_classes | rows, what, "images")
        _refuse(of_denoising, what, "denoising")
        if len(paths) > 1:
            raise UsageError(f"{what}: give it one scene, not {len(paths)}.")
        map_scene(source, str(paths[0]), out, ground_truth, variable, mc_dropout, device, printed is Format.json)
    elif noise:
        what = f"{source} is a network that denoises"
        _refuse(of_classes | {"--format": format if format is Format.csv else None}, what, "images with classes")
        _refuse(of_scenes, what, "hyperspectral scenes")
        if out is None:
            raise UsageError(f"{what}: say with --out FOLDER where the pictures are to go.")
        denoise(
            source,
            paths,
            out,
            printed,
            weights=weights,
            sigma=sigma,
            estimate=estimate,
            by_channel=by_channel,
            side_by_side=side_by_side,
            precision=precision or Precision.fp32,
            device=device,
        )
    else:
        what = f"{source} is a network of images"
        _refuse({"--out": out} | of_scenes, what, "hyperspectral scenes")
        if engine is not None:
            keep_freed_buffers()
            del of_denoising["--precision"]
        _refuse(of_denoising, what, "denoising")
        name_images(
            source,
            paths,
            printed,
            weights=weights,
            top=5 if top is None else top,
            mean=numbers(mean, "--mean"),
            std=numbers(std, "--std"),
            image_size=image_size,
            resize=resize,
            interpolation=interpolation,
            engine=engine,
            precision=precision.value if precision else "fp32",
            device=device,
        )


def _refuse(options: dict[str, Any], what: str, others: str) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise UsageError(f"{what}, and {given[0]} is an option for {others}: leave it out.")

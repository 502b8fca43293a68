"""``excite explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from excite.cli.common import Device, Json, TestData, numbers, print_json, show_log
from excite.errors import UsageError

NAME = "explain"


def run(
    source: Annotated[
        str, typer.Argument(metavar="RUN|SPEC", help="A run's folder, or a network spec with --weights.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="digits, cifar10, cifar100, a folder or tar of class folders, or a hyperspectral scene.",
            show_default=False,
        ),
    ] = None,
    test_data: TestData = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights for a spec: imagenet (fetched where published), or a file.", show_default=False),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="The classes that are drawn at first: cat,dog. Default: four.", show_default=False),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Look at no more than so many, evenly spread.", show_default=False)
    ] = None,
    channels: Annotated[int, typer.Option(min=1, help="Channels of each unit that are drawn, evenly spread.")] = 50,
    scales: Annotated[
        str, typer.Option(help="By which the centre of each image is enlarged, for selective kernels.")
    ] = "1,1.5,2",
    image: Annotated[
        Path | None,
        typer.Option(help="Explain what the network makes of this one image file.", show_default=False),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="With --image: an explain.npz to hold it against. Default: the run's, if there is one.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder of the page and its figures. Default: the run's reports/.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare batches ahead.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show what the attention of a trained network learned: gates by class and depth, kernels by object scale."""
    from excite.allocator import keep_freed_buffers

    show_log()
    if image is not None:
        given = {"--data": data, "--test-data": test_data, "--classes": classes, "--images": images, "--out": out}
        for option, value in given.items():
            if value is not None:
                raise UsageError(f"{option} is for a set of images, and --image names one: leave one of them out.")
        _one_image(source, image, weights, statistics, device, json)
        return
    if statistics is not None:
        raise UsageError("--statistics is what one image is held against: give it with --image.")
    if data is None:
        raise UsageError("Give the images to look at with --data, such as --data cifar10, or one with --image FILE.")
    keep_freed_buffers()

    from rich.console import Console
    from rich.markup import escape

    from excite.processes import first_of_all
    from excite.verbs.explain import explain

    result = explain(
        source,
        data,
        test=test_data,
        weights=weights,
        classes=[name.strip() for name in classes.split(",")] if classes is not None else None,
        images=images,
        channels=channels,
        scales=numbers(scales, "--scales") or (),
        out=out,
        device=device,
        workers=workers,
        progress=True,
    )
    if not first_of_all():
        return
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    for part, said in (("excitation", "Squeeze-and-excitation"), ("selection", "Selective kernels")):
        if result[part] is None:
            continue
        console.print(f"[bold]{said}[/], {len(result[part]['units'])} units")
        for one in result[part]["observations"]:
            console.print(f"  {escape(one['question'])}\n    {escape(one['sentence'])}")
    score = ", ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items() if name != "loss")
    console.print(f"{result['count']:,} images in {result['seconds']:.1f} s; {score}")
    console.print(f"Page: {escape(result['folder'])}/explain.html", soft_wrap=True)


def _one_image(
    source: str, image: Path, weights: str | None, statistics: Path | None, device: str, json: bool
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from excite.verbs.explain_image import explain_image

    result = explain_image(source, image, weights=weights, statistics=statistics, device=device)
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    for look in result["looks"]:
        likely = ", ".join(f"{one['class']} {100 * one['probability']:.1f} %" for one in look["predictions"])
        console.print(f"At scale {look['scale']:g}: {escape(likely)}")
        for one in look["excitation"]:
            up, down = (" ".join(str(entry["channel"]) for entry in one[way]) for way in ("up", "down"))
            console.print(f"  {escape(one['unit'])}: channels up {up}, down {down}")
        for one in look["selection"]:
            chosen = zip(one["kernels"], one["chosen"], strict=True)
            shares = ", ".join(f"{name} by {100 * share:.0f} % of the channels" for name, share in chosen)
            console.print(f"  {escape(one['unit'])}: {escape(shares)}")

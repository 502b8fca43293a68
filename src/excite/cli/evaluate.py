"""``excite evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excite.cli.common import Device, Json, TestData, numbers, print_json, show_log
from excite.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

NAME = "evaluate"

# How the images are fed; by default as the run or the weights want it. ``predict`` has the same.
Weights = Annotated[
    str | None,
    typer.Option(help="Weights for a spec: imagenet (fetched where published), or a file.", show_default=False),
]
Mean = Annotated[str | None, typer.Option(help="Per channel, of pixels in 0–1: .485,.456,.406", show_default=False)]
Std = Annotated[str | None, typer.Option(help="Likewise: .229,.224,.225", show_default=False)]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the input in pixels.", show_default=False)]
Resize = Annotated[
    int | None,
    typer.Option(min=1, help="The shorter side before the centre is cropped, in pixels.", show_default=False),
]
Interpolation = Annotated[str | None, typer.Option(help="bilinear or bicubic.", show_default=False)]


def run(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|SPEC…",
            help="A run's folder, or a network spec with --weights. Several answer together: the mean of their "
            "probabilities is scored.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="digits, cifar10, cifar100, a folder or tar of class folders, ImageNet or Places365 as they come, "
            "list:FILE, shards:DIR, a hyperspectral scene, photographs, denoising:FOLDER, digits-words, or "
            "crossmodal:PATH.",
        ),
    ],
    test_data: TestData = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights for a spec: imagenet (fetched where published), or a file. Of several specs for all, or "
            "given once for each.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="The views of each image: center-crop:224,256 (size, and the shorter side before; ,flip for the "
            "mirror image, too), ten-crop, multi-crop:224,scales=224/256/288,grid=3. Default: the network's own.",
            show_default=False,
        ),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Add each class's accuracy and the confusion.")
    ] = False,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Add how far confidence is from accuracy (ECE).")
    ] = False,
    temperature: Annotated[
        bool,
        typer.Option("--temperature", help="Fit a temperature on validation images, and add what it changes."),
    ] = False,
    calibration_data: Annotated[
        str | None,
        typer.Option(help="What it is fitted on. Default: the run's validation images.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images ahead.")] = 0,
    refuse_broken: Annotated[
        bool, typer.Option("--refuse-broken", help="Fail on an image that cannot be read, instead of skipping it.")
    ] = False,
    ground_truth: Annotated[
        str | None,
        typer.Option(help="Of a scene: its file of labels, where it is not found beside it.", show_default=False),
    ] = None,
    mc_dropout: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Of a scene: ask N times with dropout left on, and map the uncertainty."
        ),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Where that map goes, .png or .npy. Default: in the run's reports/.", show_default=False),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(min=0, help="Of denoising: Gaussian noise of this σ (0 … 255).", show_default=False),
    ] = None,
    degradation: Annotated[
        str | None,
        typer.Option(help="Of denoising: what spoils the pictures, e.g. poisson:30, jpeg:10.", show_default=False),
    ] = None,
    noise_seed: Annotated[
        int | None, typer.Option(min=0, help="Of denoising: another draw of the noise.", show_default=False)
    ] = None,
    quantised: Annotated[
        bool, typer.Option("--quantised", help="Of denoising: clip the noisy pictures and round them to 8 bits.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Score a trained network on the test images of a set, the test pixels of a scene, or noisy pictures."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from excite.verbs.evaluate import evaluate

    show_log()
    if sigma is not None:
        if degradation is not None:
            raise UsageError("--sigma 25 is short for --degradation gaussian:25: give one of them.")
        degradation = f"gaussian:{sigma:g}"
    result = evaluate(
        sources,
        data,
        test=test_data,
        weights=weights,
        protocol=protocol,
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        image_size=image_size,
        resize=resize,
        interpolation=interpolation,
        broken="refuse" if refuse_broken else "skip",
        device=device,
        workers=workers,
        per_class=per_class,
        calibration=calibration,
        temperature=temperature,
        calibration_data=calibration_data,
        ground_truth=ground_truth,
        mc_dropout=mc_dropout,
        out=out,
        degradation=degradation,
        noise_seed=noise_seed,
        quantised=quantised or None,
        progress=True,
    )
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    width = max(5, *map(len, result["metrics"]))
    errors = result.get("errors", {})
    for name, value in result["metrics"].items():
        error = f"   error {errors[name]:.2f} %" if name in errors else ""
        console.print(f"{name:>{width}}  {_said(name, value)}{error}")
    console.print(f"{result['count']} {result['samples']}")
    _print_protocol(console, result)
    _print_calibration(console, result)
    if noisy := result.get("noisy"):
        figures = ", ".join(f"{name} {_said(name, value)}" for name, value in noisy.items())
        console.print(f"{result['degradation']}: the noisy images have {figures}")
    if shared := result.get("overlap"):
        console.print(
            f"{shared['windows']:.0f} % of them have training pixels in their windows; the class of the nearest "
            f"training pixel alone is right for {shared['nearest']:.2f} %"
        )
    if per_class:
        title = next(iter(result["metrics"])) if result["samples"] == "images" else "accuracy"
        table = Table("class", result["samples"], f"{title} %", "most often taken for")
        for i, (name, right) in enumerate(zip(result["classes"], result["per_class"], strict=True)):
            if right is None:
                continue  # of a network's 1,000 classes the images may show a few
            row = result["confusion"][i]
            wrong = [
                (count, other) for j, (count, other) in enumerate(zip(row, result["classes"], strict=True)) if j != i
            ]
            count, other = max(wrong, default=(0, ""))
            taken = f"{escape(other)} ({count})" if count else ""
            table.add_row(escape(name), str(sum(row)), f"{right:.2f}", taken)
        console.print(table)
        if ranges := result.get("by_distance"):
            table = Table("pixels to training of its class", "test pixels", "accuracy %")
            for found in ranges:
                last = found["farthest"]
                reach = str(last) if last == found["nearest"] else f"{found['nearest']} to {last}"
                reach = reach if last else f"{found['nearest']} and more"
                table.add_row(reach, str(found["pixels"]), f"{found['accuracy']:.2f}")
            console.print(table)
        if "picture" in result:
            console.print(f"Confusion: {escape(result['picture'])}", soft_wrap=True)
    if mc_dropout:
        doubts = result["uncertainty"]
        figures = ", ".join(f"{name} {_said(name, value)}" for name, value in doubts["metrics"].items())
        console.print(f"Mean of {doubts['passes']} answers with dropout: {figures}")
        if doubts["auroc"] is not None:
            console.print(
                f"Entropy of right pixels {doubts['entropy_right']:.3f}, of wrong ones {doubts['entropy_wrong']:.3f} "
                f"(0 … 1); it tells wrong from right with an AUROC of {doubts['auroc']:.3f}"
            )
        console.print(f"Map: {escape(str(doubts['map']))}", soft_wrap=True)


def _print_protocol(console: Console, result: dict[str, Any]) -> None:
    """What each image was shown as, and what the members of an ensemble score alone."""
    from rich.markup import escape
    from rich.table import Table

    if shown := result.get("protocol"):
        views = f": the mean probabilities of {shown['views']} views of each image" if shown["views"] > 1 else ""
        console.print(f"{escape(shown['name'])}{views}")
    if members := result.get("members"):
        table = Table("alone", *(f"{name} error %" for name in result["errors"]), "loss")
        for one in members:
            figures = [f"{error:.2f}" for error in one["errors"].values()]
            table.add_row(escape(one["source"]), *figures, _said("loss", one["metrics"]["loss"]))
        console.print(table)


def _print_calibration(console: Console, result: dict[str, Any]) -> None:
    """How far confidence is from accuracy, and what a temperature makes of it."""
    from rich.table import Table

    if said := result.get("calibration"):
        console.print(f"Expected calibration error {said['ece']:.2f} % ({len(said['bins'])} bins with images)")
        table = Table("confidence %", "images", "mean confidence %", "accuracy %")
        for one in said["bins"]:
            reach = f"{one['from']:.1f} … {one['to']:.1f}"
            table.add_row(reach, str(one["count"]), f"{one['confidence']:.2f}", f"{one['accuracy']:.2f}")
        console.print(table)
    if fitted := result.get("temperature"):
        console.print(f"Temperature {fitted['temperature']:.3f}, fitted on {fitted['fitted_on']} images")
        for when in ("before", "after"):
            console.print(f"  {when:>6}  loss {fitted[when]['loss']:.4f}   ECE {fitted[when]['ece']:.2f} %")


def _said(name: str, value: float) -> str:
    """A metric with its unit; kappa × 100 has none."""
    if name in ("loss", "ssim"):
        return f"{value:.4f}"
    if name == "psnr":
        return f"{value:.2f} dB"
    return f"{value:.2f}" if name == "kappa" else f"{value:.2f} %"

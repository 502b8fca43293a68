"""``excite bench``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from excite.cli.common import Json, print_json, show_log
from excite.errors import UsageError

NAME = "bench"


class Allocator(StrEnum):
    """What becomes of large buffers that are freed."""

    both = "both"
    system = "system"
    kept = "kept"


def run(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC]...",
            help="Networks; the first is the host that the others are held against. Default: ResNet-50 with and "
            "without SE, then ResNeXt-50 and SKNet-50, excite's and timm's.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N...", help="Images in one call.")] = "1,8",
    precision: Annotated[str, typer.Option(metavar="P,P...", help="Of fp32, bf16 and int8.")] = "fp32",
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="M,M...",
            help="Of eager, eager-cl, compiled, onnx, openvino, excite, excite-onnx and excite-openvino; in "
            "training of eager, eager-cl, compiled, excite and excite-compiled.",
            show_default=False,
        ),
    ] = None,
    what: Annotated[str, typer.Option(metavar="W,W", help="Of inference and training.")] = "inference,training",
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of the images in pixels. Default: the first network's own.", show_default=False
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=6, help="Samples of each contestant under each allocator setting.")] = 11,
    minutes: Annotated[
        float | None,
        typer.Option(help="A bound on the whole. Default: 10 without SPEC, else none.", show_default=False),
    ] = None,
    allocator: Annotated[
        Allocator,
        typer.Option(help="Freed buffers go back to the system, are kept for the next, or one after the other."),
    ] = Allocator.both,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each contestant. Default: one for each core.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder; what it holds already is not measured again.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Time networks on this machine: eager, compiled, ONNX Runtime, OpenVINO and optimised by excite, side by side.

    Each contestant runs in a process of its own, pinned to the same cores; they are driven in turn, and ratios are
    medians over the rounds with 95 % intervals.
    """
    from rich.console import Console

    from excite.report.bench_table import bench_table
    from excite.verbs.bench import bench

    show_log()
    result = bench(
        specs or (),
        batch=_counts(batch),
        precision=_words(precision),
        mode=_words(mode) if mode else None,
        what=_words(what),
        size=size,
        rounds=rounds,
        minutes=minutes,
        allocator=allocator.value,
        threads=threads,
        out=out,
        progress=True,
    )
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    console.print(bench_table(result))
    console.print(f"Page: {result['folder']}/reports/bench.html", soft_wrap=True)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _counts(text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise UsageError(f"--batch {text}: expected whole numbers with commas between them, such as 1,8")
    return [int(word) for word in words]

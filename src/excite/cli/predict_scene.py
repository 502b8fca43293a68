"""``excite predict`` for hyperspectral scenes: the call, and how its answer is printed."""

from __future__ import annotations

from pathlib import Path

from excite.cli.common import print_json


def map_scene(
    run: str,
    scene: str,
    out: Path | None,
    ground_truth: str | None,
    variable: str | None,
    passes: int,
    device: str,
    json: bool,
) -> None:
    """Map a scene and print what there is on it."""
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

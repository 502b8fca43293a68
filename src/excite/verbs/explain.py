"""``explain``: what the attention of a trained network learned."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from excite.analysis.excitation import stage_of
from excite.analysis.gates import Gate, find_gates, require_gates
from excite.analysis.observations import on_excitation, on_selection
from excite.analysis.selection import scale_bins
from excite.errors import ExciteError, UsageError
from excite.files import check_writable, write_atomically
from excite.processes import Processes, own_device, processes
from excite.training.bars import bar
from excite.training.fit import pick_device
from excite.training.recipe_data import AnyData
from excite.training.run import versions
from excite.verbs.explain_data import Subject, at_most, check_classes, open_subject, shown_classes
from excite.verbs.explain_pass import Bins, Enlargements, Gathered, gather

SCALES = (1.0, 1.5, 2.0)
CHANNELS = 50
FILES = ("explain.npz", "explain.json", "explain.html")


def explain(
    source: str | Path | nn.Module,
    data: str | AnyData,
    *,
    test: str | None = None,
    weights: str | Path | None = None,
    classes: Sequence[str] | None = None,
    images: int | None = None,
    channels: int = CHANNELS,
    scales: Sequence[float] = SCALES,
    out: str | Path | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Look at the gates of every attention unit while the network sees the test images, and say what they show.

    Of squeeze-and-excitation units: how the gates differ from class to class at each depth, and how many are
    saturated (Hu et al., arXiv 1709.01507, Sect. 6.3). Of selective kernels: how the attention for the large kernel
    changes as the centre of each image is enlarged or, where the set knows the size of its objects, with that size
    (Li et al., arXiv 1903.06586, Sect. 4.4). Units of other people's networks are found, too.

    Statistics are gathered in one pass, in memory that does not grow with the number of images. Under ``torchrun``
    each process takes its share of the images, with the same figures; the first one writes.

    Args:
        source: a run's folder, a network spec (with ``weights``), or a module.
        data: a data spec, or data of the user's own: images with classes, or a hyperspectral scene.
        test: a data spec of the test images, where ``data`` does not hold them.
        weights: for a spec: a file of weights, or the tag of published ones such as ``imagenet``.
        classes: the names of those that the page draws at first; by default four.
        images: look at no more than so many, evenly spread over the classes.
        channels: of how many channels of each unit, evenly spread, the page draws the means.
        scales: by which centres are enlarged, 1 and more; where the set knows the size of its objects, as many bins
            of equal counts are made by it instead.
        out: the folder of ``explain.html`` (the page), ``explain.json`` (what is returned) and ``explain.npz`` (the
            means and deviations of all channels); by default the run's ``reports/``, else a folder below
            ``excite-runs/``.
        device: ``auto``, ``cpu``, ``cuda`` …
        workers: processes that prepare batches ahead.
        progress: show bars on stderr.

    Returns:
        What ``explain.json`` holds, with the ``folder``: ``network``, ``data``, ``classes`` and the ``counts`` of
        their images, ``metrics`` as an evaluation gives them, ``units`` in order of depth, ``excitation`` and
        ``selection`` (None without such units) with figures for each unit and ``observations``, ``recipe`` and
        ``versions``. The places of classes without images hold None.

    Raises:
        UsageError: the network has no such unit, or does not fit the data; a wrong option.
        ExciteError: weights or images cannot be read, gates are not finite, or the files cannot be written.
    """
    began = time.perf_counter()
    _check(images, channels, scales)
    with processes() as here:
        subject = open_subject(source, data, test, weights, device, progress and here.writes)
        if classes is not None:
            check_classes(classes, subject.classes)
        where = own_device(pick_device(device))
        gates = _units(subject)
        folder = _folder(subject, out)
        if here.writes:
            for name in FILES:
                check_writable(folder / name)
        split = at_most(subject.split, images)
        seen = _scales(split.scales, scales)
        with bar("looking at the gates", progress and here.writes) as step:
            found = _shared(
                here,
                lambda: gather(
                    subject.network,
                    gates,
                    split,
                    subject.preprocessing,
                    seen,
                    where,
                    len(subject.classes),
                    subject.samples,
                    workers=workers,
                    processes=here,
                    step=step,
                ),
            )
        result = _said(subject, gates, found, seen, classes, channels)
        result |= {"versions": versions(), "seconds": time.perf_counter() - began, "processes": here.count}
        if here.writes:
            _write(folder, result, _arrays(found))
        here.wait()
    return result | {"folder": str(folder)}


def _check(images: int | None, channels: int, scales: Sequence[float]) -> None:
    for name, number in (("images", images), ("channels", channels)):
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}: it must be at least 1.")
    if not scales or any(not 1 <= factor <= 100 for factor in scales):
        raise UsageError(
            f"scales are {', '.join(map(str, scales)) or 'none'}: give numbers from 1 on, such as 1,1.5,2."
        )
    if list(scales) != sorted(set(scales)):
        raise UsageError(f"scales are {', '.join(map(str, scales))}: give each once, in rising order.")


def _units(subject: Subject) -> list[Gate]:
    preprocessing = subject.preprocessing
    shape = (2, preprocessing.channels, preprocessing.size, preprocessing.size)
    return require_gates(find_gates(subject.network, torch.zeros(shape)))


def _folder(subject: Subject, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    if subject.run is not None:
        return subject.run.folder / "reports"
    name = f"explain-{subject.name}-{Path(subject.data).name}"
    return Path("excite-runs") / "".join(c if c.isalnum() or c in "-_.+" else "-" for c in name)


def _scales(sizes: torch.Tensor | None, scales: Sequence[float]) -> Bins | Enlargements:
    if sizes is None:
        return Enlargements(tuple(float(factor) for factor in scales))
    bins, medians = scale_bins(sizes, min(len(scales), len(sizes)))
    return Bins(bins, medians)


def _shared(here: Processes, work: Any) -> Gathered:
    """What all processes gathered; where one fails, all do, for the others would wait for it."""
    part: Gathered | Exception
    try:
        part = work()
    except Exception as error:
        if here.count == 1:
            raise
        part = error
    parts = here.everyones(part)
    for one in parts:
        if isinstance(one, Exception):
            raise one
    found: Gathered = parts[0]
    for other in parts[1:]:
        found.merge(other)
    return found


# --- what is said of it --------------------------------------------------------------------------------------------


def _said(
    subject: Subject,
    gates: list[Gate],
    found: Gathered,
    seen: Bins | Enlargements,
    classes: Sequence[str] | None,
    channels: int,
) -> dict[str, Any]:
    units = [
        {
            "name": gate.name,
            "kind": gate.kind,
            "depth": depth,
            "stage": stage_of(gate.name),
            "size": list(gate.size),
            "channels": gate.channels,
            "kernels": [{"name": kernel.name, "span": kernel.span} for kernel in gate.kernels],
        }
        for depth, gate in enumerate(gates)
    ]
    metrics = found.score.metrics(subject.task)
    assert found.score.confusion is not None
    counts = [int(count) for count in found.score.confusion.sum(1)]
    return {
        "network": subject.name,
        "run": str(subject.run.folder) if subject.run else None,
        "data": subject.data,
        "split": subject.part,
        "count": found.score.count,
        "classes": list(subject.classes),
        "counts": counts,
        "metrics": metrics,
        "units": units,
        "excitation": _excitation(units, found, counts, shown_classes(classes, subject.classes, counts), channels),
        "selection": _selection(units, found, seen),
        "recipe": subject.recipe,
    }


def _excitation(
    units: list[dict[str, Any]], found: Gathered, counts: list[int], shown: list[int], channels: int
) -> dict[str, Any] | None:
    if found.excitation is None:
        return None
    figures = found.excitation.figures(channels)
    places = [place for place, unit in enumerate(units) if unit["kind"] == "se"]
    return {
        "shown_classes": shown,
        "units": [{"unit": place, **one} for place, one in zip(places, figures, strict=True)],
        "observations": on_excitation(figures, [units[place] for place in places], counts),
    }


def _selection(units: list[dict[str, Any]], found: Gathered, seen: Bins | Enlargements) -> dict[str, Any] | None:
    if found.selection is None:
        return None
    figures = found.selection.figures()
    places = [place for place, unit in enumerate(units) if unit["kind"] == "sk"]
    return {
        "scales": list(seen.scales),
        "scale_is": seen.scale_is,
        "counts": [int(count) for count in found.selection.counts],
        "units": [{"unit": place, **one} for place, one in zip(places, figures, strict=True)],
        "observations": on_selection(figures, [units[place]["name"] for place in places], seen.scales),
    }


def _arrays(found: Gathered) -> dict[str, NDArray[Any]]:
    assert found.score.confusion is not None
    arrays: dict[str, NDArray[Any]] = {"counts": found.score.confusion.sum(1).numpy()}
    for gathered in (found.excitation, found.selection):
        if gathered is not None:
            arrays |= gathered.arrays()
    return arrays


def _write(folder: Path, result: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    from excite.report.explain import explain_page

    page = explain_page(result)
    write_atomically(folder / "explain.npz", lambda file: np.savez(file, **cast(dict[str, Any], arrays)))
    try:
        text = json.dumps(result, allow_nan=False)
    except ValueError as error:
        raise ExciteError(
            f"A figure of the explanation is not a finite number ({error}): nothing was kept."
        ) from error
    write_atomically(folder / "explain.json", text + "\n")
    write_atomically(folder / "explain.html", page)

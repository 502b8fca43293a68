"""``predict`` for denoising networks: picture files without their noise."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from excite.create import create
from excite.data.images import SUFFIXES, BrokenImageError, is_image_name
from excite.data.pictures import Picture, read_picture, write_picture
from excite.deploy.denoise import Denoiser, white_of
from excite.errors import ExciteError, UsageError
from excite.files import check_writable
from excite.networks.catalog import CATALOG
from excite.networks.tables import DnCNNTable
from excite.report.side_by_side import side_by_side as before_and_after
from excite.spec import parse_spec
from excite.training.bars import Step, bar
from excite.training.fit import pick_device
from excite.training.run import Run
from excite.verbs import files_of_maps
from excite.verbs.noise_levels import (
    Choice,
    Levels,
    choices,
    choose,
    choose_nearest,
    estimate_sigma,
    estimator,
    is_far,
    levels_of,
    told,
)
from excite.verbs.source import check_source

log = logging.getLogger(__name__)

SIDE = ".side.png"


def denoise_files(
    source: str | Path | nn.Module,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    weights: str | Path | None = None,
    sigma: float | None = None,
    estimate: bool = False,
    by_channel: bool = False,
    side_by_side: bool = False,
    precision: str = "fp32",
    device: str = "auto",
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Denoise picture files, one after the other; format, bit depth and all around the pixels stay as they are.

    A picture of any size is denoised in bounded memory (:class:`excite.deploy.denoise.Denoiser`); alpha stays as it
    is. Grey that is stored as colour, three equal channels, is denoised as grey where the network is for grey, and
    grey goes through a network for colour three times over and comes back as the mean.

    Args:
        source: the folder of a finished run of task denoising, a network spec (with ``weights``), or a module.
        paths: picture files, and folders that are searched for them.
        out: the folder for what comes of them, made if missing. A file keeps its name, and its place below the folder
            that was given.
        weights: for a spec: a file of weights, or a folder of several (or of runs) for different levels of noise. The
            level is in a file's name (``sigma25``, ``sigma=25``, ``s25``, ``blind``) or in the run's card.
        sigma: the noise of the pictures, a standard deviation on the scale of 0 … 255; the weights that were trained
            for it are taken.
        estimate: measure each picture's noise instead, and choose by that.
        by_channel: let a network for grey denoise the channels of colour one by one.
        side_by_side: also write ``NAME.side.png``: before, after, and the difference.
        precision: ``fp32`` or ``bf16``.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: show a bar on stderr.

    Yields:
        For each file ``{"file", "out", "seconds", "width", "height"}``, with ``weights`` where they were chosen,
        ``sigma_estimated`` where the noise was measured, ``side`` where that was asked for, ``warning`` where the
        answer is doubtful and ``note`` where the file could not be written just as it was; or ``{"file", "error"}``,
        and the rest goes on.

    Raises:
        UsageError: neither a finished run nor a spec with weights, none that was trained for ``sigma``, a path that
            does not exist, a folder without pictures, two files of the same name, an input that would be overwritten.
        ExciteError: the weights cannot be read, or ``out`` not be written.
    """
    if sigma is not None and estimate:
        raise UsageError("The noise is either given (sigma) or measured (estimate): leave one out.")
    if sigma is not None and not 0 <= sigma <= 255:
        raise UsageError(f"sigma is {sigma:g}: it is a standard deviation on the scale of pixels from 0 to 255.")
    if estimate:
        estimator()
    networks = _Networks(source, weights, precision, device)
    if sigma is not None:
        networks.open(choose(networks.choices, sigma))
    elif len(networks.choices) > 1 and not estimate:
        there = ", ".join(map(str, networks.choices))
        raise UsageError(f"{weights} holds several weights ({there}): choose by sigma, or by estimate for each file.")
    elif not estimate:
        networks.open(networks.choices[0])
    wanted = _targets(paths, Path(out), side_by_side)
    check_writable(Path(out) / "picture")
    asked = _Asked(networks, sigma, estimate, by_channel)
    with bar("denoising", progress) as step:
        for number, (file, target) in enumerate(wanted):
            moved = step and _moved(step, number, len(wanted))
            row: dict[str, Any] = {"file": str(file)}
            try:
                row |= _denoised(file, target, asked, side_by_side, moved)
            except (BrokenImageError, ExciteError, OSError) as error:
                row["error"] = str(error)
            except MemoryError:
                row["error"] = "it does not fit into memory"
            yield row
            if step:
                step(1000 * (number + 1), 1000 * len(wanted))


def denoises(source: str | Path) -> bool:
    """Whether this is the folder of a run of task denoising, or the spec of a network that denoises.

    Raises:
        UsageError: it is the folder of a run that is not finished.
    """
    if (Path(source) / "recipe.yaml").is_file():
        return bool(Run(source).card["task"] == "denoising")
    try:
        spec = parse_spec(str(source))
    except UsageError:
        return False
    return spec.source is None and spec.name in CATALOG and isinstance(CATALOG[spec.name].table, DnCNNTable)


# --- the networks ------------------------------------------------------------------------------------------------


class _Networks:
    """The networks that can be chosen, each loaded when it is first needed."""

    def __init__(
        self, source: str | Path | nn.Module, weights: str | Path | None, precision: str, device: str
    ) -> None:
        self._source, self._precision = source, precision
        self._device = pick_device(device)
        self._opened: dict[Path, tuple[Denoiser, int]] = {}
        if isinstance(source, nn.Module):
            if weights is not None:
                raise UsageError("A module has weights of its own: leave the others out.")
            origin = getattr(source, "origin", None)
            path = getattr(origin, "path", None)
            self.choices = [Choice(Path("the module"), levels_of(path) if path else None)]
            return
        check_source(source, weights)
        if weights is None:
            self.choices = [Choice(Path(source), levels_of(source))]
        else:
            self.choices = choices(weights, parse_spec(str(source)).name)

    @property
    def several(self) -> bool:
        """Whether there is a choice."""
        return len(self.choices) > 1

    def open(self, choice: Choice) -> tuple[Denoiser, int]:
        """The network, and how many pixels wide the square is that one of its pixels sees."""
        if choice.path not in self._opened:
            network = self._network(choice)
            denoiser = Denoiser(network, device=self._device, precision=self._precision)
            self._opened[choice.path] = denoiser, int(getattr(network, "receptive_field", 1))
        return self._opened[choice.path]

    def _network(self, choice: Choice) -> nn.Module:
        if isinstance(self._source, nn.Module):
            return self._source
        if (choice.path / "recipe.yaml").is_file():
            return Run.open(choice.path).load().network
        return create(str(self._source), weights=choice.path)


@dataclass(frozen=True)
class _Asked:
    """What each file is to be denoised with."""

    networks: _Networks
    sigma: float | None
    estimate: bool
    by_channel: bool

    def choice(self, estimated: float | None) -> Choice:
        if self.sigma is not None:
            return choose(self.networks.choices, self.sigma)
        if estimated is not None and self.networks.several:
            return choose_nearest(self.networks.choices, estimated)
        return self.networks.choices[0]


# --- one file ------------------------------------------------------------------------------------------------------


@dataclass
class _Row:
    """What is told of a file."""

    told: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def _denoised(
    file: Path, target: Path, asked: _Asked, side: bool, step: Callable[[float], object] | None
) -> dict[str, Any]:
    begin = time.perf_counter()
    picture = read_picture(file)
    row = _Row({"width": picture.pixels.shape[1], "height": picture.pixels.shape[0]})
    white = white_of(picture.pixels.dtype)
    estimated = estimate_sigma(picture.pixels, white) if asked.estimate else None
    choice = asked.choice(estimated)
    if estimated is not None:
        row.told["sigma_estimated"] = round(estimated, 2)
        if choice.levels is not None and is_far(choice.levels, estimated):
            row.warnings.append(_far(choice.levels, estimated))
    if asked.networks.several:
        row.told["weights"] = str(choice.path)
    denoiser, seen = asked.networks.open(choice)
    if min(picture.pixels.shape[:2]) < seen:
        row.warnings.append(f"the picture is smaller than the {seen} × {seen} pixels that the network looks at")
    pixels = _apply(denoiser, picture, asked.by_channel, row, step)
    write_picture(target, picture, pixels)
    row.told = {"out": str(target)} | row.told
    if side:
        beside = _beside(target)
        drawn = before_and_after(picture.pixels, pixels, white, picture.orientation)
        files_of_maps.write_picture(beside, drawn)
        row.told["side"] = str(beside)
    if row.warnings:
        row.told["warning"] = "; ".join(row.warnings)
    if picture.note:
        row.told["note"] = picture.note
    return row.told | {"seconds": round(time.perf_counter() - begin, 3)}


def _far(levels: Levels, estimated: float) -> str:
    return f"its noise is about σ = {estimated:.1f}, and the network was trained for {told(levels)}"


def _apply(
    denoiser: Denoiser, picture: Picture, by_channel: bool, row: _Row, step: Callable[[float], object] | None
) -> np.ndarray[Any, Any]:
    """The picture's pixels without their noise; its channels and the network's brought together."""
    before = picture.pixels
    after = np.empty_like(before, order="C")
    found, wanted = before.shape[2], denoiser.channels or before.shape[2]

    def run(image: np.ndarray[Any, Any], into: np.ndarray[Any, Any], part: int = 0, parts: int = 1) -> None:
        def moved(done: int, total: int) -> None:
            if step:
                step((part + done / total) / parts)

        denoiser(image.transpose(2, 0, 1), out=into.transpose(2, 0, 1), progress=moved)

    if found == wanted:
        run(before, after)
    elif wanted == 1 and found == 3:
        if _is_grey(before):
            run(before[..., :1], after[..., :1])
            after[..., 1:] = after[..., :1]
        elif by_channel:
            for channel in range(3):
                part = slice(channel, channel + 1)
                run(before[..., part], after[..., part], channel, 3)
        else:
            raise UsageError(
                "the picture is in colour and the network is for grey: let it denoise one channel after the other "
                "(--by-channel), or take a network for colour"
            )
    elif wanted == 3 and found == 1:
        row.warnings.append("a grey picture went through a network for colour: its three answers' mean was taken")
        colour = np.empty((*before.shape[:2], 3), before.dtype)
        run(np.broadcast_to(before, colour.shape), colour)
        mean = colour.mean(axis=2, keepdims=True, dtype=np.float32)
        after[...] = mean if after.dtype == np.float32 else np.rint(mean)
    else:
        raise UsageError(f"the picture has {found} channels and the network is for {wanted}")
    return after


def _is_grey(pixels: np.ndarray[Any, Any]) -> bool:
    return all(
        bool((pixels[top : top + 256, :, :1] == pixels[top : top + 256, :, 1:]).all())
        for top in range(0, len(pixels), 256)
    )


def _moved(step: Step, number: int, count: int) -> Callable[[float], object]:
    return lambda share: step(round(1000 * (number + share)), 1000 * count)


# --- where files go ------------------------------------------------------------------------------------------------


def _targets(paths: Sequence[str | Path], out: Path, side: bool) -> list[tuple[Path, Path]]:
    """Every input file with the file that is to come of it.

    Raises:
        UsageError: a path that does not exist or holds no pictures, or a file that would be written twice or over an
            input.
    """
    found: list[tuple[Path, Path, Path]] = []  # the file, its place, and the same below the folder that was given
    seen = set()
    for given in paths:
        for file, place, below in _files(Path(given), out):
            if (real := file.resolve()) not in seen:
                seen.add(real)
                found.append((file, place, below))
    times = Counter(place for _, place, _ in found)
    targets = [(file, out / (place if times[place] == 1 else below)) for file, place, below in found]
    inputs = {file.resolve(): file for file, _ in targets}
    written: dict[Path, Path] = {}
    for file, target in targets:
        for one in (target, _beside(target)) if side else (target,):
            real = one.resolve()
            if real in inputs:
                raise UsageError(f"{inputs[real]} would be overwritten: give another folder than {out} to write to.")
            if real in written:
                raise UsageError(
                    f"{written[real]} and {file} would both be written to {one}: denoise them one folder at a time."
                )
            written[real] = file
    return targets


def _files(given: Path, out: Path) -> Iterator[tuple[Path, Path, Path]]:
    if given.is_dir():
        results = out.resolve()
        inside = [
            path
            for path in sorted(given.rglob("*"))
            if is_image_name(path.name)
            and not path.name.endswith(SIDE)
            and not any(step.startswith(".") for step in path.relative_to(given).parts)
            # What an earlier call has written into a folder inside is not denoised again.
            and (results == given.resolve() or not path.resolve().is_relative_to(results))
        ]
        if not inside:
            raise UsageError(f"{given} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        name = given.resolve().name
        yield from ((path, path.relative_to(given), Path(name, path.relative_to(given))) for path in inside)
    elif given.exists():
        yield given, Path(given.name), Path(given.resolve().parent.name, given.name)
    else:
        raise UsageError(f"{given} does not exist")


def _beside(target: Path) -> Path:
    """``photo.jpg`` → ``photo.jpg.side.png``: a ``photo.png`` may lie in the same folder."""
    return target.with_name(target.name + SIDE)

"""``bench``: how fast networks are on this machine, side by side with the alternatives that are installed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from excite import timing
from excite.allocator import can_keep_buffers
from excite.arguments import known
from excite.cost import cost
from excite.create import create, for_window
from excite.errors import ExciteError, UsageError
from excite.files import check_writable, write_atomically, write_json
from excite.networks.catalog import CATALOG
from excite.report.bench import bench_page
from excite.spec import parse_spec
from excite.training.bars import bar
from excite.verbs.bench_answers import rows_of, summary
from excite.verbs.bench_contestants import INFERENCE_MODES, MODES, PRECISIONS, TRAINING_MODES, Contestant, Kept, keep
from excite.verbs.bench_plan import DEFAULT, Group, Question, groups_of
from excite.verbs.compare import environment

log = logging.getLogger(__name__)

ALLOCATORS = ("system", "kept")
DEFAULT_MINUTES = 10.0
_PACKAGES = ("timm", "openvino", "nncf", "onnx", "onnxscript", "onnxruntime")
_SCHEMA = 1


def bench(
    specs: Sequence[str] = (),
    *,
    batch: Sequence[int] = (1, 8),
    precision: Sequence[str] = ("fp32",),
    mode: Sequence[str] | None = None,
    what: Sequence[str] = ("inference", "training"),
    size: int | None = None,
    rounds: int = 11,
    minutes: float | None = None,
    allocator: str = "both",
    threads: int | None = None,
    out: str | Path | None = None,
    min_seconds: float = 0.2,
    progress: bool = False,
) -> dict[str, Any]:
    """Time networks in the ways there are to run them, each in a pinned process of its own, driven in turn.

    Args:
        specs: network specs; the first is the host that the others are held against. Without any, the questions of
            the SE and SK papers: ResNet-50 and SE-ResNet-50, then ResNeXt-50 and SKNet-50, excite's against timm's.
        batch: images in one call.
        precision: of fp32, bf16 and int8 (inference by OpenVINO and ONNX Runtime; calibrated on random images, since
            only its time is asked for).
        mode: of ``bench_contestants.INFERENCE_MODES`` and ``TRAINING_MODES``; by default all, except those that
            differ from another in the layout alone.
        what: of inference and training (a whole step with SGD).
        size: side of the images; by default the first network's own.
        rounds: samples of each contestant under each allocator setting; six are the fewest.
        minutes: a bound on the whole; the most important goes first, and what is left out is said. By default ten
            without specs, else none. Six rounds of what has begun may go past it.
        allocator: ``system`` (as the C library comes), ``kept`` (freed buffers are kept, as in the command line's own
            processes) or ``both``, one after the other in the same processes.
        threads: of each contestant; by default one for each core.
        out: the folder; by default a new one below ``excite-runs/``. Groups that it holds in full, measured with the
            same settings and versions, are not measured again.
        min_seconds: the least length of one sample.
        progress: show bars on stderr.

    Returns:
        What ``bench.json`` holds: ``settings``, ``environment``, ``networks`` (parameters and MACs), ``modes`` (in
        words), ``rows`` (one for each contestant and allocator setting; see
        :func:`excite.verbs.bench_answers.rows_of`), ``groups`` (who was driven in turn with whom), ``summary``
        (sentences), ``notes``, ``seconds``, and with them ``folder``.

    Raises:
        UsageError: an unknown name, or a number that makes no sense; told before anything is timed.
        ExciteError: nothing could be timed, or the folder cannot be written.
    """
    begin = time.perf_counter()
    allocators = _settings_of(allocator)
    what = [known(one, ["inference", "training"], "kind of work") for one in what]
    precision = [known(one, list(PRECISIONS), "precision") for one in precision]
    modes = [known(one, list(INFERENCE_MODES | TRAINING_MODES), "mode") for one in mode] if mode else None
    _check_numbers(batch, rounds, minutes, size)
    questions = [Question(tuple(str(parse_spec(spec)) for spec in specs))] if specs else _installed(DEFAULT)
    if minutes is None and not specs:
        minutes = DEFAULT_MINUTES
    folder = Path(out) if out else Path("excite-runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    networks = {
        spec: _described(spec, size or _side(question.specs[0])) for question in questions for spec in question.specs
    }
    check_writable(folder / "bench.json")
    threads, cores = timing.settle(threads, None)
    env = _environment(threads, cores)
    planned = groups_of(
        questions, what, precision, batch, modes, lambda spec: (networks[spec]["shape"], networks[spec]["classes"]),
        threads, _workers_at_once,
    )  # fmt: skip
    deadline = None if minutes is None else begin + 60 * minutes
    measured: list[tuple[Group, dict[str, Any] | None]] = []
    pace = _Pace()
    for number, group in enumerate(planned, start=1):
        file = folder / "groups" / f"{_key(group, rounds, allocators, min_seconds, env)}.json"
        found = _finished(file)
        if not group.contestants:
            found = {"seconds": 0.0, "complete": True, "allocators": {}, "told": {}, "failures": {}}
        elif found is None:
            left = None if deadline is None else deadline - time.perf_counter()
            if left is not None and (
                left <= 0 or (pace.known and pace.estimate(group, len(allocators)) > 1.2 * left)
            ):
                measured.append((group, None))
                continue
            title = f"{group.title} ({number} of {len(planned)})"
            log.info("%s: %d contestants", title, len(group.contestants))
            found = _measure(group, allocators, rounds, threads, cores, min_seconds, left, title, progress)
            pace.note(group, len(allocators), found["seconds"])
            write_json(file, found)
        else:
            log.info("%s: taken from %s, measured with the same settings", group.title, file)
        measured.append((group, found))
    rows = rows_of(measured, networks)
    result = {
        "schema": _SCHEMA,
        "settings": {
            "specs": list(specs), "batch": list(batch), "precision": list(precision), "mode": modes or "default",
            "what": list(what), "size": size, "rounds": rounds, "minutes": minutes,
            "allocator": list(allocators), "threads": threads, "cores": cores, "min_seconds": min_seconds,
        },
        "environment": env,
        "networks": networks,
        "modes": MODES,
        "summary": summary(rows),
        "rows": rows,
        "groups": [_group_record(group, found) for group, found in measured],
        "notes": _notes(measured, minutes, allocators, rounds),
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip
    if not any(row["status"] == "timed" for row in rows):
        reasons = dict.fromkeys(row["reason"] for row in rows if row["reason"])
        raise ExciteError(f"Nothing could be timed: {'; '.join(reasons)}.")
    write_json(folder / "bench.json", result)
    write_atomically(folder / "reports" / "bench.html", bench_page(result))
    return result | {"folder": str(folder)}


# --- what is asked for ---------------------------------------------------------------------------------------------


def _settings_of(allocator: str) -> tuple[str, ...]:
    known(allocator, [*ALLOCATORS, "both"], "allocator setting")
    if allocator != "system" and not can_keep_buffers():
        if allocator == "kept":
            raise UsageError(
                "this system's C library cannot keep freed buffers: choose the allocator setting system."
            )
        log.warning("This system's C library cannot keep freed buffers: one allocator setting is timed")
        return ("system",)
    # The system's own comes first: it cannot be had back in full once it was changed.
    return ALLOCATORS if allocator == "both" else (allocator,)


def _check_numbers(batch: Sequence[int], rounds: int, minutes: float | None, size: int | None) -> None:
    if not batch or min(batch) < 1:
        raise UsageError(f"batch is {list(batch)}: it takes numbers of images, such as 1,8.")
    if rounds < timing.FEWEST_ROUNDS:
        raise UsageError(f"{rounds} rounds give no 95 % interval: take at least {timing.FEWEST_ROUNDS}.")
    if minutes is not None and minutes <= 0:
        raise UsageError(f"minutes is {minutes:g}: it takes a positive number.")
    if size is not None and size < 1:
        raise UsageError(f"size is {size}: it takes a positive number of pixels.")


def _installed(questions: Sequence[Question]) -> list[Question]:
    """The questions without the networks of packages that are not there."""
    if find_spec("timm") is not None:
        return list(questions)
    log.warning("timm is not installed: excite's networks are timed alone; pip install 'excite[timm]' brings it")
    kept = []
    for question in questions:
        specs = tuple(spec for spec in question.specs if not spec.startswith("timm:"))
        # The ways in which timm's would have been run are then excite's own network's.
        kept.append(Question(specs))
    return kept


def _side(spec: str) -> int:
    """The side of the images that a network was drawn for."""
    parsed = parse_spec(spec)
    return CATALOG[parsed.name].input_size if parsed.source is None and parsed.name in CATALOG else 224


def _described(spec: str, side: int) -> dict[str, Any]:
    """A network's input and cost. Where its package is not installed, its contestants say so, each in its row."""
    parsed = parse_spec(spec)
    entry = None if parsed.source else CATALOG.get(parsed.name)
    channels = entry.in_channels if entry else 3
    classes = entry.classes if entry and channels != 3 else 10 if side <= 32 else 1000
    classes = classes if entry is None or entry.classes else None
    described: dict[str, Any] = {
        "shape": [channels, side, side],
        "classes": classes,
        "parameters": None,
        "macs": None,
    }
    if parsed.source == "timm" and find_spec("timm") is None:
        return described
    network = create(for_window(parsed, side), classes, channels)
    counted = cost(network, (channels, side, side))
    return described | {"parameters": counted.parameters, "macs": counted.macs}


def _workers_at_once(contestants: Sequence[Contestant]) -> int:
    """How many processes the free memory holds: Python and its packages, weights, the maps of a step."""
    _, height, width = contestants[0].shape
    one = max(
        2**30 + contestant.batch * height * width * (2**13 if contestant.what == "training" else 2**11)
        for contestant in contestants
    )
    return max(3, int(0.8 * psutil.virtual_memory().available / one))


def _environment(threads: int, cores: Sequence[int] | None) -> dict[str, Any]:
    found: dict[str, Any] = environment() | {"threads": threads}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cores"] = ", ".join(map(str, cores)) if cores is not None else "not pinned"
    found["memory"] = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    found["system"] = platform.platform()
    found["libc"] = " ".join(platform.libc_ver()).strip() or "unknown"
    for variable in ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX"):  # they would change both allocator settings
        if os.environ.get(variable):
            found[variable] = os.environ[variable]
    return found


# --- the measurement -----------------------------------------------------------------------------------------------


def _measure(
    group: Group,
    allocators: Sequence[str],
    rounds: int,
    threads: int,
    cores: Sequence[int] | None,
    min_seconds: float,
    left: float | None,
    title: str,
    progress: bool,
) -> dict[str, Any]:
    """One group driven in turn, as plain data."""
    begin = time.perf_counter()
    settings = {name: keep if name == "kept" else None for name in allocators}
    builds: dict[str, timing.Build] = {one.name: one for one in group.contestants}
    if set(allocators) == {"kept"}:  # then they are built under it, too
        builds = {one.name: Kept(one) for one in group.contestants}
    with bar(title, progress) as step:
        found = timing.time_under_settings(
            builds,
            settings,
            rounds=rounds,
            threads=threads,
            cores=cores,
            min_seconds=min_seconds,
            max_seconds=float("inf"),
            progress=step,
            one_by_one=True,
            let_fail=True,
            whole_seconds=left,
        )
    first = next(iter(found.values()))
    return {
        "what": group.what,
        "precision": group.precision,
        "batch": group.batch,
        "contestants": [dataclasses.asdict(contestant) for contestant in group.contestants],
        "complete": not any(reason == timing.NO_TIME for reason in first.failures.values())
        and all(len(samples) == rounds for one in found.values() for samples in one.samples.values()),
        "seconds": time.perf_counter() - begin,
        "allocators": {
            name: {
                "samples": {key: list(values) for key, values in one.samples.items()},
                "peak_bytes": dict(one.peaks),
                "running_peak_bytes": dict(one.running_peaks),
            }
            for name, one in found.items()
        },
        "told": {name: _plain(told) for name, told in first.told.items()},
        "failures": dict(first.failures),
    }


def _plain(told: dict[str, Any]) -> dict[str, Any]:
    """What JSON holds; of other values their text."""
    plain: dict[str, Any] = json.loads(
        json.dumps(told, default=str).replace("NaN", "null").replace("Infinity", "null")
    )
    return plain


class _Pace:
    """How long groups take, learned from those that were measured."""

    def __init__(self) -> None:
        self.seconds = self.weight = 0.0

    @property
    def known(self) -> bool:
        return self.weight > 0

    def note(self, group: Group, settings: int, seconds: float) -> None:
        self.seconds += seconds
        self.weight += group.weight(settings)

    def estimate(self, group: Group, settings: int) -> float:
        return self.seconds / self.weight * group.weight(settings)


def _key(group: Group, rounds: int, allocators: Sequence[str], min_seconds: float, env: dict[str, Any]) -> str:
    """A name for what was measured and how: another machine, version or setting makes another."""
    same = {name: value for name, value in env.items() if name != "date"}
    content = [dataclasses.asdict(group), rounds, list(allocators), min_seconds, same, _SCHEMA]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _finished(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if found.get("complete") else None


def _group_record(group: Group, found: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "title": group.title,
        "what": group.what,
        "precision": group.precision,
        "batch": group.batch,
        "contestants": [contestant.name for contestant in group.contestants],
        "seconds": found["seconds"] if found else None,
        "complete": bool(found and found["complete"]),
    }


def _notes(
    measured: Sequence[tuple[Group, dict[str, Any] | None]],
    minutes: float | None,
    allocators: Sequence[str],
    rounds: int,
) -> list[str]:
    notes = []
    out = [f"{group.title}, {' and '.join(group.specs)}" for group, found in measured if found is None]
    cut = [group.title for group, found in measured if found is not None and not found["complete"]]
    bound = "" if minutes is None else f" within {minutes:g} minutes"
    if out:
        notes.append(f"Left out, for there was no time{bound}: {'; '.join(out)}.")
    if cut:
        notes.append(
            f"Cut short, for there was no time{bound}: contestants are missing, or there are fewer than {rounds} "
            f"rounds: {'; '.join(cut)}."
        )
    if any("int8" in group.precision for group, _ in measured):
        notes.append("int8 was calibrated on random images: its times count here, its answers do not.")
    if len(allocators) > 1:
        notes.append(
            "Both allocator settings were timed in the same processes, the system's first; networks were built, and "
            "optimised ones chose their operators, under the system's."
        )
    return notes

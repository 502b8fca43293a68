"""From samples to what ``bench`` says: a row for each contestant, and the sentences above the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from excite.spec import parse_spec
from excite.timing import NO_TIME, Timings, median_interval
from excite.verbs.bench_contestants import Contestant
from excite.verbs.bench_plan import Group

Row = dict[str, Any]


def rows_of(
    measured: Sequence[tuple[Group, Mapping[str, Any] | None]], networks: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """One row for each contestant under each allocator setting; for those without a time, one each.

    Args:
        measured: the groups with what was measured, None where a group was left out.
        networks: by spec, ``parameters`` and ``macs``.

    Returns:
        Rows with ``spec``, ``mode``, ``precision``, ``batch``, ``what`` and ``allocator``; ``status`` (timed,
        refused, failed or left out) and its ``reason``; ``group`` (an index) and ``same_as`` (the first spec with
        this number of parameters and MACs). Those timed have ``seconds`` (the median of a call) with
        ``seconds_ci95``, ``images_per_second``, ``samples``; ``host_ratio`` (the time over the host's in the same
        mode and precision) and ``eager_ratio`` (over that of the same network in fp32 by eager), each with ``to``,
        ``value``, ``low`` and ``high``, the median of the ratios of the same round and its 95 % interval;
        ``peak_bytes`` (of the process, building included), ``running_peak_bytes`` (while it was timed),
        ``imported_bytes`` (before there was a network), ``ready_seconds``, ``difference`` and ``report``.
    """
    rows: list[Row] = []
    for index, (group, found) in enumerate(measured):
        for contestant, reason in group.refused:
            rows.append(_row(contestant, index, networks, None, "refused", reason))
        if found is None:
            rows += [_row(one, index, networks, None, "left out", NO_TIME) for one in group.contestants]
            continue
        for one in group.contestants:
            reason = found["failures"].get(one.name)
            if reason is not None:
                rows.append(_row(one, index, networks, None, "left out" if reason == NO_TIME else "failed", reason))
                continue
            for allocator, figures in found["allocators"].items():
                row = _row(one, index, networks, allocator, "timed", None)
                rows.append(row | _timed(one, group, figures) | found["told"].get(one.name, {}))
    return rows


def _row(
    one: Contestant,
    group: int,
    networks: Mapping[str, Mapping[str, Any]],
    allocator: str | None,
    status: str,
    reason: str | None,
) -> Row:
    return {
        "spec": one.spec,
        "mode": one.mode,
        "precision": one.precision,
        "batch": one.batch,
        "what": one.what,
        "allocator": allocator,
        "group": group,
        "same_as": same_network(one.spec, networks),
        "status": status,
        "reason": reason,
    }


def same_network(spec: str, networks: Mapping[str, Mapping[str, Any]]) -> str:
    """The first spec whose network has as many parameters and MACs: the same network, by whoever it was written."""
    wanted = networks[spec]
    if wanted["parameters"] is None:
        return spec
    return next(
        other
        for other, own in networks.items()
        if (own["parameters"], own["macs"]) == (wanted["parameters"], wanted["macs"])
    )


def _timed(one: Contestant, group: Group, figures: Mapping[str, Any]) -> Row:
    timings = Timings(figures["samples"], figures["peak_bytes"])
    samples = list(figures["samples"][one.name])
    seconds = statistics.median(samples)
    host = _named(group, spec=group.specs[0], mode=one.mode, precision=one.precision)
    eager = _named(group, spec=one.spec, mode="eager", precision="fp32")
    return {
        "seconds": seconds,
        "seconds_ci95": list(median_interval(samples)),
        "images_per_second": one.batch / seconds,
        "samples": samples,
        "host_ratio": _ratio(timings, one, host),
        "eager_ratio": _ratio(timings, one, eager),
        "peak_bytes": figures["peak_bytes"][one.name],
        "running_peak_bytes": figures["running_peak_bytes"][one.name],
    }


def _named(group: Group, *, spec: str, mode: str, precision: str) -> Contestant | None:
    wanted = (spec, mode, precision)
    return next((one for one in group.contestants if (one.spec, one.mode, one.precision) == wanted), None)


def _ratio(timings: Timings, one: Contestant, to: Contestant | None) -> dict[str, Any] | None:
    if to is None or to == one or to.name not in timings.samples:
        return None
    ratio = timings.ratio(one.name, to.name)
    return {"to": to.name, "value": ratio.value, "low": ratio.low, "high": ratio.high}


def between(one: Row, other: Row) -> tuple[float, float, float]:
    """How many times as long one row's calls take as another's of the same group and setting, with its interval."""
    ratio = Timings({"one": tuple(one["samples"]), "other": tuple(other["samples"])}, {}).ratio("one", "other")
    return ratio.value, ratio.low, ratio.high


# --- the sentences -------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the rows answer, for each group under its last allocator setting.

    Returns:
        Dictionaries with ``group`` (its index), ``allocator`` and ``sentences``: what a network costs over its host
        in each mode, and the fastest way of excite's against eager PyTorch and against the fastest without excite.
    """
    found = []
    for group in dict.fromkeys(row["group"] for row in rows):
        timed = [row for row in rows if row["group"] == group and row["status"] == "timed"]
        if not timed:
            continue
        allocator = timed[-1]["allocator"]
        timed = [row for row in timed if row["allocator"] == allocator]
        sentences = [*_costs(timed), *_fastest(timed)]
        if sentences:
            found.append({"group": group, "allocator": allocator, "sentences": sentences})
    return found


def _costs(rows: Sequence[Row]) -> list[str]:
    """What each network takes over its host, mode by mode."""
    sentences = []
    for spec in dict.fromkeys(row["spec"] for row in rows):
        held = [row for row in rows if row["spec"] == spec and row["host_ratio"]]
        if held:
            host = held[0]["host_ratio"]["to"].split(" ")[0]
            said = [
                f"{row['host_ratio']['value']:.2f}× by {_way(row)} "
                f"({row['host_ratio']['low']:.2f}–{row['host_ratio']['high']:.2f})"
                for row in held
            ]
            sentences.append(f"{spec} takes, against {host}: {', '.join(said)}.")
    return sentences


def _fastest(rows: Sequence[Row]) -> list[str]:
    """For each network but a host of others: excite's fastest way, and how much faster it is."""
    sentences = []
    networks = list(dict.fromkeys(row["same_as"] for row in rows))
    for network in networks[1:] or networks:
        same = [row for row in rows if row["same_as"] == network]
        ours = [row for row in same if row["mode"].startswith("excite")]
        foreign = [row for row in same if parse_spec(row["spec"]).source is not None]
        theirs = [row for row in foreign or same if not row["mode"].startswith("excite")]
        if not ours or not theirs:
            continue
        best = min(ours, key=_seconds)
        eager = next((row for row in theirs if row["mode"] == "eager" and row["precision"] == "fp32"), None)
        quickest = min(theirs, key=_seconds)
        rivals = [("", eager)] if eager is not None and eager is not quickest else []
        said = []
        for words, rival in (*rivals, ("the fastest without excite, ", quickest)):
            value, low, high = between(rival, best)
            said.append(f"{value:.2f}× ({low:.2f}–{high:.2f}) as fast as {words}{rival['spec']} by {_way(rival)}")
        took = f"{1000 * best['seconds']:.3g} ms"
        sentences.append(f"With excite, {best['spec']} by {_way(best)} takes {took}: {', '.join(said)}.")
    return sentences


def _way(row: Row) -> str:
    return row["mode"] if row["precision"] == "fp32" else f"{row['mode']} in {row['precision']}"


def _seconds(row: Row) -> float:
    return float(row["seconds"])

"""``compare``: which network is better, by how much, and at what cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from excite import timing
from excite.analysis.statistics import Estimate, holm, mean_interval, paired_difference
from excite.cost import cost
from excite.create import create
from excite.data.crossmodal import is_crossmodal
from excite.data.cube import is_scene, same_scene
from excite.data.denoising import DenoisingData, is_denoising
from excite.errors import UsageError
from excite.files import write_atomically, write_json
from excite.report import wording
from excite.report.compare import compare_page
from excite.spec import parse_spec
from excite.tasks import task_named
from excite.training.fit import (
    check_freezing,
    fit,
    fitted,
    fresh_parameters,
    pick_device,
    starting_point,
    step_seconds,
)
from excite.training.optimization import host_factor
from excite.training.recipe import SCENE_KEYS, Recipe, load
from excite.training.recipe_data import AnyData, load_recipe_data, spec_for, training_loader
from excite.training.run import Run, versions
from excite.verbs.costs import speeds
from excite.verbs.scores import fingerprint, overlap_of, score, scores_on_test

log = logging.getLogger(__name__)

Factory = Callable[[], nn.Module]
PICTURE = 256
"""Side of the picture, in pixels, that the costs of a denoising network are said for."""
DEFAULT_SPECS = ("resnet20", "resnet20+se", "resnet20+sk")


@dataclass(frozen=True)
class Entry:
    """One network of the comparison, with its finished runs in the order of the seeds."""

    name: str
    role: str
    build: Factory
    runs: list[Run]


def compare(
    contestants: Sequence[str | Path] | Mapping[str, Factory] = DEFAULT_SPECS,
    data: str | AnyData | None = None,
    *,
    test: str | None = None,
    seeds: int | Sequence[int] = 3,
    recipe: Recipe | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    control: bool = False,
    weights: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train networks from the same seeds under the same recipe, and say which is better.

    Args:
        contestants: network specs, or folders of finished runs, or names with functions that build the user's own
            modules. The first is the baseline.
        data: a data spec, or images of the user's own; by default the recipe's.
        test: a data spec of the test images, where ``data`` does not hold them.
        seeds: how many (0, 1, …), or which. Three are the fewest that allow a verdict.
        recipe: how to train; by default the one that suits the data, or with weights the one for fine-tuning. Its
            network and seed are replaced; weights that it names are kept where none are given here.
        epochs: overrides the recipe's.
        minutes: choose the epochs so that all trainings together take about so long.
        control: add the honest rival: the baseline, widened until its latency is that of the slowest contestant.
        weights: what every network starts from: ``imagenet``, or a file of weights. What is new in a network (an
            added unit, a classifier for other classes) starts from the seed.
        out: the folder; by default one below ``excite-runs/`` named after data and recipe. Called again with the same
            folder, finished runs are kept and a broken one goes on where it was.
        progress: show bars on stderr.

    Returns:
        What ``compare.json`` holds: ``data``, ``seeds``, ``metric``, ``baseline``, ``verdict`` (None below three
        seeds), ``samples`` (what was scored: images or pixels) and their ``count``, ``blocks`` (how many patches of
        ground the pixels come from, which the intervals count; else None) and ``results``, one for each contestant;
        percentages as 0–100. ``metrics`` of a result has mean and standard deviation over the seeds of every metric.
        With weights each result has a ``start_score``, the score before the first step (``start_scores`` of each
        seed), else None.

    Raises:
        UsageError: contestants, data and folder do not fit together.
        ExciteError: a training failed; everything finished stays.
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) != len(chosen):
        raise UsageError(f"seeds: expected at least one, each once, found {seeds}")
    if not contestants:
        raise UsageError("compare needs at least one network")
    folders = _given_runs(contestants)
    if weights and (folders or isinstance(contestants, Mapping)):
        who = "finished runs have" if folders else "modules of your own come with"
        raise UsageError(f"weights are for network specs: {who} weights of their own")
    if folders:
        return _compare_runs(folders, data, test, out, progress)
    images = None if isinstance(data, str) else data
    recipe = recipe or default_recipe(data if isinstance(data, str) else None, weights)
    start = None if isinstance(contestants, Mapping) else weights or recipe.network.weights
    if control and start:
        raise UsageError("the control is the baseline made wider, and no weights are of its shape: leave control out")
    changes: dict[str, Any] = {"network": {"weights": start and str(start)}, "seed": 0}
    if isinstance(data, str):
        changes |= {"data.path": data, "data.test_path": test}
    if epochs is not None:
        changes |= {"trainer.epochs": epochs}
    recipe = recipe.replace(changes)
    builders = _builders(contestants)
    if images is None:
        first = recipe if isinstance(contestants, Mapping) else recipe.replace({"network.spec": next(iter(builders))})
        images = load_recipe_data(first, progress)
    if images.test is None:
        raise UsageError(f"'{images.name}' has no test images; give them with --test-data")
    classes, channels = len(images.classes) or None, images.preprocessing.channels
    if recipe.network.image is not None:
        raise UsageError("key 'network.image': networks for pairs are compared on vectors; train them one by one")
    builders = {name if build else spec_for(name, images): build for name, build in builders.items()}

    folder = Path(out) if out else _default_folder(images.name, recipe, minutes)
    recipe, images = _settled(folder, recipe, builders, classes, channels, images, len(chosen), minutes)

    shape = example_shape(images)
    factories = {name: build or partial(create, name, classes, channels) for name, build in builders.items()}
    roles = dict.fromkeys(builders, "contender") | {next(iter(builders)): "baseline"}
    if control:
        widened = _control(folder, factories, classes, shape)
        if widened not in builders:
            roles[widened] = "control"
            builders[widened] = None
            factories[widened] = partial(create, widened, classes, channels)

    entries = []
    for name, build in builders.items():
        runs = []
        for seed in chosen:
            run = Run(folder / "runs" / name / str(seed))
            own = recipe.replace({"seed": seed} if build else {"seed": seed, "network.spec": name})
            if start:
                _score_start(run, own, images)
            torch.manual_seed(seed)
            run = fit(
                own,
                run.folder,
                network=build() if build else None,
                data=images,
                resume=True,
                title=f"{name}  seed {seed}" if progress else None,
            )
            scores_on_test(run, images, build)
            runs.append(run)
        # What a spec builds may depend on the weights, as how its units are put in: what was trained is measured.
        trained = build or partial(create, runs[0].card["spec"], classes, channels)
        entries.append(Entry(name, roles[name], trained, runs))
    return _report(folder, entries, images, chosen, recipe, progress=progress)


def default_recipe(data: str | None, weights: str | Path | None = None) -> Recipe:
    """The shipped recipe that suits a data spec, or with weights to start from the one for fine-tuning."""
    if weights:
        return load("finetune").replace({"data.path": data} if data else {})
    if data is not None and is_scene(data):
        return load("hybridsn-indian-pines").replace({"data.path": data})
    if data is not None and is_crossmodal(data):
        return load("dscmr").replace({"data.path": data})
    if data is not None and is_denoising(data):
        return load("dncnn-s-25").replace({"data.path": data, "data.patches": None})
    name = {None: "digits", "digits": "digits", "cifar10": "cifar10", "cifar100": "cifar10"}.get(data, "default")
    return load(name)


def _given_runs(contestants: Sequence[str | Path] | Mapping[str, Factory]) -> list[Run]:
    if isinstance(contestants, Mapping):
        return []
    folders = [item for item in contestants if isinstance(item, Path) or (Path(item) / "recipe.yaml").is_file()]
    if folders and len(folders) != len(contestants):
        raise UsageError("compare takes either network specs or folders of finished runs, not both at once")
    return [Run.open(folder) for folder in folders]


def _builders(contestants: Sequence[str | Path] | Mapping[str, Factory]) -> dict[str, Factory | None]:
    if isinstance(contestants, Mapping):
        return dict(contestants)
    names = [str(parse_spec(str(item))) for item in contestants]
    if len(set(names)) != len(names):
        raise UsageError(f"the same network is given twice: {' '.join(names)}")
    return dict.fromkeys(names)


def _default_folder(data: str, recipe: Recipe, minutes: float | None) -> Path:
    text = json.dumps([recipe.model_dump(mode="json"), minutes], sort_keys=True)
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(data).name)
    return Path("excite-runs") / f"compare-{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _settled(
    folder: Path,
    recipe: Recipe,
    builders: Mapping[str, Factory | None],
    classes: int | None,
    channels: int,
    images: AnyData,
    seeds: int,
    minutes: float | None,
) -> tuple[Recipe, AnyData]:
    """The recipe with every choice made, as the folder holds it or for it to hold, and the data as it has it."""
    path = folder / "recipe.yaml"
    # What a run would settle for itself by measuring has to be the same for all of a comparison.
    own: dict[str, Any] = {"trainer.compile": recipe.trainer.compile is True}
    if recipe.trainer.precision == "auto":
        own["trainer.precision"] = "fp32"
    recipe = recipe.replace(own)
    # Every spec is built once now: a wrong one is better refused before the first training than after the third.
    weights = recipe.network.weights
    networks = [build() if build else create(name, classes, channels, weights) for name, build in builders.items()]
    for network in networks:
        check_freezing(recipe, network)
    if path.is_file():
        held = load(path)
        free: dict[str, Any] = {"trainer.threads": held.trainer.threads}
        if recipe.optimizer.host_factor is None:
            free["optimizer.host_factor"] = held.optimizer.host_factor
        if minutes is not None:
            free |= {"trainer.epochs": held.trainer.epochs, "data.patches": held.data.patches}
        if recipe.replace(free) != held:
            raise UsageError(f"{folder} holds a comparison under another recipe: choose another folder with --out")
        if isinstance(images, DenoisingData) and held.data.patches is not None:
            images = replace(images, patches=held.data.patches)
        return held, images
    if minutes is not None:
        device = pick_device(recipe.trainer.device)
        loader = training_loader(recipe, images, device=device)
        task = task_named(images.task)
        step = seeds * sum(step_seconds(recipe, network, task, loader, device) for network in networks)
        recipe, images = fitted(recipe, images, int(60 * minutes / step), len(loader))
    fresh = [names for network in networks if (names := fresh_parameters(network)) is not None]
    if fresh:
        # One for all: what the networks have in common is to learn at the same rate, whatever is new beside it.
        factor = host_factor(recipe.optimizer, frozenset().union(*fresh))
        recipe = recipe.replace({"optimizer.host_factor": factor})
    recipe = recipe.replace({"trainer.threads": recipe.trainer.threads or torch.get_num_threads()})
    recipe.write(path)
    return recipe, images


def example_shape(images: AnyData) -> tuple[int, int, int]:
    """(C, H, W) of the image that costs and latencies are said for: a network's input, or a picture of usual size."""
    size = PICTURE if isinstance(images, DenoisingData) else images.preprocessing.size
    return images.preprocessing.channels, size, size


def _compare_runs(
    runs: list[Run], data: str | AnyData | None, test: str | None, out: str | Path | None, progress: bool
) -> dict[str, Any]:
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault(_name(run), {})
        if group.setdefault(run.card["seed"], run) is not run:
            raise UsageError(f"{run.folder} and {group[run.card['seed']].folder} are the same network and seed")
    common = sorted(set.intersection(*(set(group) for group in groups.values())))
    if not common:
        raise UsageError("the runs of the networks have no seed in common: they cannot be paired")
    _check_scenes(runs, data)
    first = runs[0].recipe
    changes = {} if not isinstance(data, str) else {"data.path": data, "data.test_path": test}
    images = load_recipe_data(first.replace(changes), progress) if data is None or isinstance(data, str) else data
    if images.test is None:
        raise UsageError(f"'{images.name}' has no test images; give them with --test-data")
    notes = []
    same = {json.dumps(_comparable(run.recipe), sort_keys=True) for run in runs}
    if len(same) > 1:
        notes.append("The runs were trained under different recipes: differences are not due to the network alone.")
    dropped = sum(len(group) for group in groups.values()) - len(common) * len(groups)
    if dropped:
        notes.append(f"{dropped} runs were left out: their seed is not there for every network.")
    classes, channels = len(images.classes) or None, images.preprocessing.channels
    entries = []
    for position, (name, group) in enumerate(groups.items()):
        for seed in common:
            scores_on_test(group[seed], images, None)
        pruned = group[common[0]].card.get("pruned")
        build = partial(_network, group[common[0]].folder) if pruned else partial(create, name, classes, channels)
        entries.append(Entry(name, "contender" if position else "baseline", build, [group[seed] for seed in common]))
    folder = Path(out) if out else Path("excite-runs") / ("compare-" + "-".join(groups).replace("/", "-"))
    return _report(folder, entries, images, common, first, notes, progress)


def _name(run: Run) -> str:
    """What a run's network is called; of one that was pruned, its spec says only what it was before."""
    spec: str | None = run.card["spec"]
    if spec is None:
        return run.folder.name
    return f"{spec} ({run.folder.absolute().name})" if run.card.get("pruned") else spec


def _network(folder: Path) -> nn.Module:
    return Run(folder).load().network


def _check_scenes(runs: Sequence[Run], data: str | AnyData | None) -> None:
    """Refuse runs of several tasks, or of scenes that were not trained on the same pixels, seen in the same way.

    Raises:
        UsageError: what one was trained on would be another's test, or would not even fit it.
    """
    first = runs[0]
    for run in runs:
        if run.card["task"] != first.card["task"]:
            raise UsageError(
                f"{first.folder} was trained for {first.card['task']} and {run.folder} for {run.card['task']}: "
                "compare runs of the same task"
            )
    if first.card["task"] != "hyperspectral":
        return
    for run in runs:
        for key in ("path", *SCENE_KEYS):
            one, other = (getattr(item.recipe.data, key) for item in (first, run))
            if one != other and not (key == "path" and same_scene(one, other)):
                raise UsageError(
                    f"{first.folder} was trained with data.{key}={one} and {run.folder} with {other}: runs on a "
                    "scene are compared on the pixels that all of them left out"
                )
    if isinstance(data, str) and not same_scene(data, first.recipe.data.path):
        raise UsageError(f"runs are compared on the scene that they were trained on, {first.recipe.data.path}")


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """What has to be the same in runs whose difference is to be that of their networks."""
    # A run from before this key was there has no factor, which without weights is the same as 1.
    recipe = recipe.replace({"optimizer.host_factor": recipe.optimizer.host_factor or 1.0})
    return recipe.model_dump(mode="json", exclude={"network": {"spec"}, "seed": True})


def _score_start(run: Run, recipe: Recipe, images: AnyData) -> None:
    """Score what a run starts from on the test images, once, and keep it in the run's folder."""
    if _start_score(run, images) is not None:
        return
    recipe, fed, network = starting_point(recipe, images)
    assert images.test is not None
    scored = score(network, images.test, fed.preprocessing, images.task, recipe.trainer.device)
    content = {"metrics": scored.metrics, "count": scored.count, "fingerprint": fingerprint(images, "start")}
    write_json(run.folder / "start.json", content)


def _start_score(run: Run, images: AnyData) -> float | None:
    """What a run started from scored on these images, or None where that is not known."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads((run.folder / "start.json").read_text())
        if kept["fingerprint"] == fingerprint(images, "start"):
            return float(kept["metrics"][task_named(images.task).metric.name])
    return None


def _start_scores(runs: list[Run], images: AnyData) -> list[float] | None:
    found = [_start_score(run, images) for run in runs]
    known = [value for value in found if value is not None]
    return known if len(known) == len(runs) else None


def _control(folder: Path, builders: Mapping[str, Factory], classes: int | None, shape: tuple[int, int, int]) -> str:
    """The baseline's spec, widened until one image takes as long as with the slowest contestant.

    The choice is kept in the folder: measured again it might come out otherwise, and its runs would be lost.
    """
    path = folder / "control.json"
    names = list(builders)
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads(path.read_text())
        if kept["contestants"] == names:
            return str(kept["spec"])
    baseline = parse_spec(names[0])
    if len(names) < 2 or baseline.source or "width" in dict(baseline.arguments):
        raise UsageError("--control needs a baseline of excite's own without a width, and a network to rival")
    calls = {name: timing.InferenceCall(build(), shape, batch=1) for name, build in builders.items()}
    slowest = max(names, key=timing.time_in_turn(calls).median)
    low, high = 1.0, 4.0
    for _ in range(5):
        width = (low + high) / 2
        spec = str(replace(baseline, arguments=(*baseline.arguments, ("width", f"{width:.3g}"))))
        both = {spec: timing.InferenceCall(create(spec, classes, shape[0]), shape, batch=1), slowest: calls[slowest]}
        ratio = timing.time_in_turn(both).ratio(spec, slowest).value
        if abs(ratio - 1) < 0.02:
            break
        low, high = (width, high) if ratio < 1 else (low, width)
    write_json(path, {"contestants": names, "slowest": slowest, "spec": spec, "latency_ratio_to_slowest": ratio})
    return spec


def _report(
    folder: Path,
    entries: list[Entry],
    images: AnyData,
    seeds: list[int],
    recipe: Recipe,
    notes: list[str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    task = task_named(images.task)
    metric = task.metric
    notes = [*(notes or []), *_overlap_note(images)]
    shape = example_shape(images)
    assert images.test is not None
    patches = getattr(images.test, "blocks", None)  # of ground: pictures for denoising have none
    blocks = None if patches is None else patches.numpy()
    scores = {entry.name: np.stack([scores_on_test(run, images, None) for run in entry.runs]) for entry in entries}
    starts = {entry.name: _start_scores(entry.runs, images) for entry in entries}
    measured = _measured(folder, entries, shape, progress)
    baseline = entries[0]
    results: list[dict[str, Any]] = []
    for entry in entries:
        mean = mean_interval(scores[entry.name], blocks=blocks)
        size = cost(entry.build(), shape)
        start = starts[entry.name]
        result: dict[str, Any] = {
            "spec": entry.name,
            "role": entry.role,
            "score": metric.factor * mean.value,
            "score_ci95": _interval(mean, metric.factor),
            "difference": None,
            "difference_ci95": None,
            "p_holm": None,
            "parameters": size.parameters,
            "macs": size.macs,
            **measured[entry.name],
            "train_seconds": float(np.mean([run.card["train_seconds"] for run in entry.runs])),
            "runs": [_relative(run.folder, folder) for run in entry.runs],
            "scores": [metric.factor * float(row.mean()) for row in scores[entry.name]],
            "start_score": None if start is None else float(np.mean(start)),
            "start_scores": start,
            "metrics": _spread([run.test_metrics() for run in entry.runs]),
        }
        results.append(result)
    rivals = results[1:]
    differences = [paired_difference(scores[r["spec"]], scores[baseline.name], blocks=blocks) for r in rivals]
    testable = [d.p for d in differences]
    adjusted = holm([p for p in testable if p is not None]) if None not in testable else [None] * len(testable)
    for result, difference, p in zip(rivals, differences, adjusted, strict=True):
        result["difference"] = metric.factor * difference.value
        result["difference_ci95"] = _interval(difference, metric.factor)
        result["p_holm"] = None if p is None else float(p)
    comparison: dict[str, Any] = {
        "data": images.name,
        "seeds": seeds,
        "metric": {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better},
        "baseline": baseline.name,
        "weights": recipe.network.weights,
        "verdict": None,
        "results": results,
        "samples": task.samples,
        "count": len(images.test),
        "blocks": None if blocks is None else len(np.unique(blocks)),
        "epochs": recipe.trainer.epochs,
        "recipe": recipe.model_dump(mode="json", exclude={"network", "seed"}),
        "environment": environment(),
        "notes": notes,
    }
    comparison["verdict"] = verdict(comparison)
    write_json(folder / "compare.json", comparison)
    curves = {entry.name: [_learning(run) for run in entry.runs] for entry in entries}
    write_atomically(folder / "reports" / "compare.html", compare_page(comparison, curves))
    return comparison | {"folder": str(folder)}


def _overlap_note(images: AnyData) -> list[str]:
    shared = overlap_of(images)
    if shared is None or not shared.windows:
        return []
    return [
        f"{shared.windows:.0f} % of the test pixels have training pixels in their windows: to guess each one's class "
        f"from the nearest training pixel, without a look at the spectra, is right for {shared.nearest:.2f} %. "
        "Scores under data.split=disjoint say what the networks know of ground they have not seen."
    ]


def _spread(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation over the seeds of every metric."""
    values = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    return {
        name: {"mean": float(column.mean()), "std": float(column.std(ddof=1)) if len(column) > 1 else None}
        for name, column in values.items()
    }


def verdict(comparison: dict[str, Any]) -> str | None:
    """One sentence on every contestant against the baseline; None below three seeds.

    A difference counts as shown when its own 95 % interval leaves out zero and it stands after Holm's correction.
    """
    if len(comparison["seeds"]) < 3:
        return None
    name, unit = comparison["baseline"], wording.difference_unit(comparison["metric"]["unit"])
    rivals = [entry for entry in comparison["results"] if entry["spec"] != name]
    if not rivals:
        return f"{name} was trained alone: there is nothing to compare it with."
    clauses, undecided = [], []
    for entry in rivals:
        found = wording.finding(entry, comparison)
        if found == wording.UNDECIDED:
            undecided.append(entry["spec"])
            continue
        ends = sorted(abs(end) for end in entry["difference_ci95"])
        clause = f"{entry['spec']} is {found} than {name} by {abs(entry['difference']):.2f} {unit}".rstrip()
        clause += f" (95 % interval {ends[0]:.2f} to {ends[1]:.2f})"
        if entry["latency_ratio"]:
            clause += f" at {entry['latency_ratio']:.2f}× its latency"
        clauses.append(clause)
    if undecided:
        start = "no" if clauses else "No"
        clauses.append(f"{start} difference shown for {' and '.join(undecided)} against {name}")
    return "; ".join(clauses) + "."


def environment() -> dict[str, Any]:
    """Where the figures were taken."""
    return {
        **versions(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _measured(
    folder: Path, entries: list[Entry], shape: tuple[int, int, int], progress: bool
) -> dict[str, dict[str, Any]]:
    """Latency and throughput of each network, driven in turn; kept, so that a second look shows the same figures."""
    path = folder / "timing.json"
    with contextlib.suppress(OSError, ValueError):
        held: dict[str, dict[str, Any]] = json.loads(path.read_text())
        if list(held) == [entry.name for entry in entries]:
            return held
    measured = speeds({entry.name: (entry.build().eval(), shape) for entry in entries}, progress)
    write_json(path, measured)
    return measured


def _learning(run: Run) -> dict[str, list[float]]:
    """The columns of the metrics that show learning, not the clock or the schedule."""
    shown = ("epoch", "train_", "val_")
    return {name: column for name, column in run.metrics().items() if name.startswith(shown)}


def _interval(estimate: Estimate, factor: float) -> list[float] | None:
    if estimate.low is None or estimate.high is None:
        return None
    return [factor * estimate.low, factor * estimate.high]


def _relative(path: Path, folder: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(folder))
    return str(path)

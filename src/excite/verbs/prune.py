"""``prune``: a trained network made smaller by what its gates say, and trained on for a while."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from excite.analysis import importance
from excite.analysis.gates import Gate, find_gates
from excite.analysis.importance import METHODS, GateStatistics, Method
from excite.arguments import known
from excite.cost import cost
from excite.data import ImageData, Loader, Split
from excite.data.hyperspectral import SceneData
from excite.deploy.channels import Channels, TooNarrowError, widths
from excite.deploy.constant_gates import replace_constant_gates
from excite.deploy.fresh_statistics import retake_statistics
from excite.deploy.pruned import Record, changed_widths, widths_of
from excite.errors import ExciteError, UsageError
from excite.files import sha256, write_json
from excite.memory_format import to_channels_last
from excite.training.bars import bar
from excite.training.fit import fit, pick_device
from excite.training.recipe import Recipe
from excite.training.recipe_data import load_recipe_data
from excite.training.run import Run, Trained, versions
from excite.verbs import scores
from excite.verbs.costs import speeds

CONSTANT = 0.01
"""A unit counts as constant whose gates' standard deviation over the images is no more than this."""
IMAGES = 2048
"""So many training images the gates are read on, at most."""
TARGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""The shares of the multiply–adds that a search by accuracy tries some of."""


@dataclass(frozen=True)
class Settings:
    """What a pruning hangs on, beside the network and its images."""

    method: Method
    constant: float
    multiple: int
    images: int
    seed: int


def prune(
    run: str | Path,
    data: str | ImageData | None = None,
    *,
    test: str | None = None,
    target_macs: float | None = None,
    max_drop: float | None = None,
    method: str = "excitation",
    epochs: int | None = None,
    lr: float | None = None,
    constant: float = CONSTANT,
    multiple: int = 1,
    images: int = IMAGES,
    seed: int = 0,
    latency: bool = True,
    out: str | Path | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Make a trained classifier of images smaller, and train it on.

    First, squeeze-and-excitation units whose gates hardly vary are replaced by a constant scale, which is folded into
    the batch norm or convolution before it where nothing else reads that. Then channels are taken out, of all layers
    in the same proportion, until the multiply–adds are down; the method says which: see
    :func:`excite.analysis.importance.scores`. Last, the network is trained on by the run's recipe, with a fifth of
    its rate, which falls along a cosine.

    The same command goes on where it was cut off, and shows the result again where it is done.

    Args:
        run: the folder of a finished run.
        data: a data spec, or images of the user's own; by default what the run was trained on.
        test: a data spec of the test images, where ``data`` does not hold them.
        target_macs: the share of the multiply–adds that may be left, in 0…1; 0.7 where ``max_drop`` is not given.
        max_drop: instead: how many points of accuracy it may cost. The smallest of the networks with 90, 80 … 10 % of
            the multiply–adds is found by bisection, each trained on and scored on the validation images; where the
            recipe sets none apart, a tenth of the training images are, which the run itself has learned from.
        method: ``excitation``, ``l1`` or ``random``.
        epochs: of the training after it; by default a third of the run's.
        lr: its peak rate; by default a fifth of the run's.
        constant: the standard deviation of a unit's gates (root mean square over its channels) up to which it is
            replaced; a negative number keeps all.
        multiple: widths that are narrowed are multiples of it.
        images: how many training images the gates are read on, at most.
        seed: of the training after it, and of the lot.
        latency: measure before and after, in turn.
        out: the new run's folder; by default one beside the run, named after method and target.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: show bars on stderr.

    Returns:
        What ``reports/prune.json`` of the new run says: ``{"run", "out", "network", "data", "method", "target_macs",
        "max_drop", "epochs", "lr", "split", "count", "constant", "widths", "metrics", "macs", "parameters",
        "latency", "search", "versions", "seconds"}``:

        * ``constant``: the units that became a scale, ``[{"unit", "spread", "how", "into"}…]``;
        * ``widths``: of each group of channels, by the layer that it was found by, ``[left, before]``;
        * ``metrics``: ``before``; ``constant``, with only the units replaced (None where none was); ``pruned``, with
          the statistics of batch norms taken anew; and ``tuned``, at the end;
        * ``macs`` and ``parameters``: ``{"before", "after"}``, and ``latency`` likewise, what
          :func:`excite.verbs.costs.speeds` says of each, or None;
        * ``search``: with ``max_drop``, what was tried, ``[{"target_macs", "drop"}…]``.

        The folder is a run as any other: ``evaluate`` and ``predict`` take it.

    Raises:
        UsageError: not a finished run of a classifier of images, both or wrong targets, no gates to go by, a folder
            that is taken, or Torch-Pruning not installed.
        ExciteError: the network cannot be made narrower, or no target keeps within ``max_drop``.
    """
    known(method, list(METHODS), "method")
    _check_targets(target_macs, max_drop)
    opened = Run.open(run)
    trained = opened.load()
    recipe = _recipe(opened.recipe, data, test, epochs, lr, seed, device, val=max_drop is not None)
    if trained.task != "classification":
        raise UsageError(f"{run} was trained for {trained.task}: only classifiers of images are pruned.")
    loaded = data if isinstance(data, ImageData) else load_recipe_data(recipe, progress)
    if not isinstance(loaded, ImageData) or isinstance(loaded, SceneData):
        raise UsageError(f"{loaded.name} holds no images with classes: only classifiers of images are pruned.")
    if loaded.classes != trained.classes:
        raise UsageError(f"{run} was trained on other classes than those of {loaded.name}.")
    settings = Settings(method, constant, multiple, images, seed)  # type: ignore[arg-type]
    work = _Work(opened, trained, recipe, loaded, settings, progress)
    named = f"macs-{target_macs or 0.7:g}" if max_drop is None else f"drop-{max_drop:g}"
    folder = Path(out) if out else opened.folder.with_name(f"{opened.folder.name}-{method}-{named}")
    if max_drop is None:
        return work.result(folder, target_macs or 0.7, latency)
    return _search(work, folder, max_drop, latency)


def _check_targets(target_macs: float | None, max_drop: float | None) -> None:
    if target_macs is not None and max_drop is not None:
        raise UsageError("target_macs and max_drop are two ways to say how far to go: give one.")
    if target_macs is not None and not 0 < target_macs <= 1:
        raise UsageError(f"target_macs is the share of multiply–adds that may be left, in 0…1, not {target_macs:g}.")
    if max_drop is not None and not 0 <= max_drop < 100:
        raise UsageError(f"max_drop is in points of accuracy, such as 0.5, not {max_drop:g}.")


def _recipe(
    recipe: Recipe,
    data: str | ImageData | None,
    test: str | None,
    epochs: int | None,
    lr: float | None,
    seed: int,
    device: str,
    val: bool,
) -> Recipe:
    """The run's recipe, for the training after pruning."""
    changes: dict[str, Any] = {
        "network.weights": None,
        "optimizer.host_factor": None,
        "optimizer.lr": lr or recipe.optimizer.lr / 5,
        "schedule.name": "cosine",
        "schedule.warmup_epochs": 0.0,
        "schedule.host_frozen_epochs": 0.0,
        "trainer.epochs": epochs or max(1, round(recipe.trainer.epochs / 3)),
        "trainer.device": device,
        "seed": seed,
    }
    if isinstance(data, str):
        changes |= {"data.path": data, "data.test_path": test}
    if val and not recipe.data.val_fraction and not isinstance(data, ImageData):
        changes["data.val_fraction"] = 0.1
    return recipe.replace(changes)


# --- one target ----------------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """A run that is pruned, once or several times."""

    run: Run
    trained: Trained
    recipe: Recipe
    data: ImageData
    settings: Settings
    progress: bool

    def __post_init__(self) -> None:
        preprocessing = self.data.preprocessing
        self.device = pick_device(self.recipe.trainer.device)
        self.shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
        # Random numbers rather than zeros: a scale shows on them.
        self.example = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))
        self._scored: dict[str, dict[str, float]] = {}
        self._gates: tuple[list[Gate], dict[str, GateStatistics]] | None = None

    def result(self, folder: Path, target: float, latency: bool, *, split: str = "test") -> dict[str, Any]:
        """Prune to a share of the multiply–adds, train on, score and write it all down."""
        begin = time.perf_counter()
        report = folder / "reports" / "prune.json"
        asked = {
            "run": str(self.run.folder),
            "weights": self.run.card["sha256"],
            "data": self.data.name,
            "target_macs": target,
            "epochs": self.recipe.trainer.epochs,
            "lr": self.recipe.optimizer.lr,
            "split": split,
            **asdict(self.settings),
        }
        if report.is_file():
            kept: dict[str, Any] = json.loads(report.read_text())
            if kept["asked"] == asked:
                return kept
        network, record, told = self.smaller(target, split)
        steps = [*self._earlier(), record]
        self._claim(folder, {"steps": steps, "asked": asked})
        title = f"{self.trained.spec} at {target:.0%}" if self.progress else None
        start = copy.deepcopy(network).to(self.device)
        with bar("taking the statistics of batch norms", self.progress) as step:
            retake_statistics(start, self._images(step), self.device)
        metrics = told.pop("metrics") | {"pruned": self.score(start, split)}
        new = fit(self.recipe, folder, network=network, data=self.data, resume=True, title=title)
        finish(new, self.trained.spec)
        tuned = new.load().network
        metrics["tuned"] = self.score(tuned, split)
        before, after = cost(self.trained.network, self.shape), cost(tuned, self.shape)
        said = {
            "run": str(self.run.folder),
            "out": str(folder),
            "network": self.trained.spec,
            "data": self.data.name,
            "method": self.settings.method,
            "target_macs": target,
            "max_drop": None,
            "epochs": self.recipe.trainer.epochs,
            "lr": self.recipe.optimizer.lr,
            "split": split,
            "count": len(self._split(split)),
            **told,
            "metrics": metrics,
            "macs": {"before": before.macs, "after": after.macs},
            "parameters": {"before": before.parameters, "after": after.parameters},
            "latency": self.speeds(tuned) if latency else None,
            "search": None,
            "versions": versions(),
            "seconds": time.perf_counter() - begin,
            "asked": asked,
        }
        write_json(report, said)
        return said

    def smaller(self, target: float, split: str) -> tuple[nn.Module, Record, dict[str, Any]]:
        """A copy of the network with constant units folded and channels taken out.

        Returns:
            The copy; the record that it can be built again by; and what is to be said of it.
        """
        network = copy.deepcopy(self.trained.network).cpu().eval()
        gates, statistics = self.gates()
        hardly = {
            gate.name: statistics[gate.name].constant
            for gate in gates
            if gate.kind == "se" and statistics[gate.name].spread <= self.settings.constant
        }
        units = replace_constant_gates(network, gates, hardly, self.example)
        folded = self.score(copy.deepcopy(network), split) if units else None
        most = target * cost(self.trained.network, self.shape).macs
        left = [gate for gate in gates if gate.name not in hardly]
        fed = importance.what_feeds(network, left, self.example)
        means = importance.mean_gates(left, statistics, fed, network)
        channels = Channels(network, self.example, left)
        before = widths_of(network)
        counts = widths(channels.groups, channels.macs, most, multiple=self.settings.multiple)
        kept = {}
        for group in channels.groups:
            if counts[group.name] < group.size:
                counted = importance.scores(
                    self.settings.method, network, group, gates=means, seed=self.settings.seed
                )
                best = counted.argsort(descending=True, stable=True)[: counts[group.name]]
                kept[group.name] = sorted(best.tolist())
        channels.keep(kept)
        record: Record = {
            "routes": channels.routes,
            "units": units,
            "layers": changed_widths(before, widths_of(network)),
            "kept": kept,
        }
        told = {
            "constant": [
                {
                    "unit": one["unit"],
                    "spread": statistics[one["unit"]].spread,
                    "how": one["how"],
                    "into": one["into"],
                }
                for one in units
            ],
            "widths": {group.name: [counts[group.name], group.size] for group in channels.groups},
            "metrics": {"before": self.score(self.trained.network, split), "constant": folded},
        }
        return network, record, told

    def gates(self) -> tuple[list[Gate], dict[str, GateStatistics]]:
        """The units, and what their gates are on training images.

        Raises:
            UsageError: there are none, but the method goes by them.
        """
        if self._gates is None:
            gates = find_gates(self.trained.network.cpu(), self.example)
            if not gates and self.settings.method == "excitation":
                raise UsageError(
                    f"{self.trained.spec} has no gates to go by: take method l1, or prune a network with +se."
                )
            network = self.trained.network.to(self.device)
            with bar("reading the gates", self.progress) as step:
                read = importance.gate_statistics(network, gates, self._images(step), self.device) if gates else {}
            self.trained.network.cpu()
            self._gates = gates, read
        return self._gates

    def _images(self, step: Any) -> Iterator[Tensor]:
        """Training images, without augmentation, in an order that mixes the classes."""
        assert self.data.train is not None
        loader = Loader(self.data.train, self.data.preprocessing, 128, seed=0, shuffle=True)
        batches = min(len(loader), -(-self.settings.images // 128))
        for done, (images, *_) in enumerate(islice(loader, batches), start=1):
            yield images
            if step:
                step(done, batches)

    def score(self, network: nn.Module, split: str) -> dict[str, float]:
        """The metrics of a network on the test or validation images; those of the unpruned one are kept."""
        own = network is self.trained.network
        if own and split in self._scored:
            return self._scored[split]
        preprocessing = self.data.preprocessing
        laid_out = copy.deepcopy(network).to(self.device)
        to_channels_last(laid_out)
        with bar("evaluating", self.progress) as step:
            found = scores.score(laid_out, self._split(split), preprocessing, device=str(self.device), step=step)
        if own:
            self._scored[split] = found.metrics
        return found.metrics

    def _split(self, name: str) -> Split:
        found = self.data.val if name == "val" else self.data.test
        if found is None:
            raise UsageError(f"{self.data.name} has no {name} images to score the network on.")
        return found

    def speeds(self, network: nn.Module) -> dict[str, Any]:
        """Latency and throughput of the unpruned network and of a pruned one, in turn."""
        contestants = {"before": self.trained.network, "after": network}
        return speeds({name: (module, self.shape) for name, module in contestants.items()}, self.progress)

    def _earlier(self) -> list[Record]:
        path = self.run.folder / "pruned.json"
        return list(json.loads(path.read_text())["steps"]) if path.is_file() else []

    def _claim(self, folder: Path, content: Mapping[str, Any]) -> None:
        """Write what is done to the network, or see that it is what was done before.

        Raises:
            UsageError: the folder holds something else.
        """
        path = folder / "pruned.json"
        if path.is_file():
            if json.loads(path.read_text()) != json.loads(json.dumps(content)):
                raise UsageError(f"{folder} holds a pruning with other settings: choose another folder.")
            return
        if (folder / "recipe.yaml").exists():
            raise UsageError(f"{folder} already holds a run: choose another folder.")
        write_json(path, content)


def finish(run: Run, spec: str) -> None:
    """Write into a pruned run's card what it was built from, so that it can be opened.

    Args:
        run: trained as a module of its own.
        spec: that its network had before it was pruned.
    """
    card = run.card
    if card.get("pruned") is None:
        write_json(run.folder / "model.json", card | {"spec": spec, "pruned": sha256(run.folder / "pruned.json")})


# --- by accuracy ---------------------------------------------------------------------------------------------------


def _search(work: _Work, folder: Path, max_drop: float, latency: bool) -> dict[str, Any]:
    """The smallest network whose accuracy on the validation images falls by no more than so many points."""
    if (folder / "recipe.yaml").exists() and not (folder / "pruned.json").exists():
        raise UsageError(f"{folder} already holds a run: choose another folder.")
    begin = time.perf_counter()
    drops: dict[float, float] = {}
    low, high = -1, len(TARGETS)  # the last that is known to do, the first that is known not to
    while high - low > 1:
        middle = (low + high) // 2
        target = TARGETS[middle]
        try:
            metrics = work.result(folder / "trials" / f"{target:g}", target, False, split="val")["metrics"]
            drops[target] = metrics["before"]["top1"] - metrics["tuned"]["top1"]
        except TooNarrowError:
            high = middle
            continue
        low, high = (middle, high) if drops[target] <= max_drop else (low, middle)
    if low < 0:
        raise ExciteError(
            f"With {TARGETS[0]:.0%} of the multiply–adds the accuracy on validation images falls by "
            f"{drops[TARGETS[0]]:.2f} points, which is more than {max_drop:g}: train on for longer (epochs), or "
            "allow for more."
        )
    chosen = folder / "trials" / f"{TARGETS[low]:g}"
    for name in ("recipe.yaml", "metrics.csv", "model.safetensors", "pruned.json", "model.json"):
        shutil.copyfile(chosen / name, folder / name)
    said = json.loads((chosen / "reports" / "prune.json").read_text())
    tuned = Run.open(folder).load().network
    said |= {
        "out": str(folder),
        "max_drop": max_drop,
        "validation": said["metrics"],
        "search": [{"target_macs": target, "drop": drop} for target, drop in sorted(drops.items(), reverse=True)],
        "latency": work.speeds(tuned) if latency else None,
        "seconds": time.perf_counter() - begin,
    }
    if work.data.test is not None:
        metrics = {"before": work.score(work.trained.network, "test"), "constant": None, "pruned": None}
        said |= {
            "split": "test",
            "count": len(work.data.test),
            "metrics": metrics | {"tuned": work.score(tuned, "test")},
        }
    write_json(folder / "reports" / "prune.json", said)
    return dict(said)

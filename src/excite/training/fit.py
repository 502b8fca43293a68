"""``fit``: a recipe in, a run folder out.

PyTorch Lightning's Trainer does the steps (device, precision, gradient clipping, loggers). What makes a run repeat
and survive is ours and small: the whole run is one stream of batches that can start at any step, and everything
else that a step depends on is in the checkpoint or a function of the step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from excite.create import create
from excite.data import ImageData
from excite.data.denoising import DenoisingData
from excite.data.hyperspectral import SceneData
from excite.errors import UsageError
from excite.memory_format import to_channels_last
from excite.processes import Processes, check_apart, own_device, processes
from excite.tasks import task_named
from excite.tasks.base import Batch, Inputs, StepBatch, Task, TaskModule, each
from excite.training import checkpoint
from excite.training.callbacks import (
    Bar,
    Best,
    Freeze,
    FreezeNorms,
    Position,
    Rate,
    Record,
    StopOnSignal,
    WeightAverage,
)
from excite.training.distributed import one_sentence, trainer_options
from excite.training.distributed_launch import can_restart, claim, goes_on
from excite.training.distributed_parts import check_divides
from excite.training.distributed_shares import shard, shared_out, whole
from excite.training.optimization import build_optimizer, host_factor, host_is_frozen, rate_factor, scaled
from excite.training.recipe import Recipe, load
from excite.training.recipe_data import (
    AnyData,
    AnyLoader,
    load_recipe_data,
    resolved,
    spec_for,
    training_loader,
    with_backbone,
)
from excite.training.run import Run
from excite.training.sync_batch_norm import synchronised
from excite.weights.base import Origin

log = logging.getLogger(__name__)

MUCH_WAITING = 20.0
"""Percent of the steps' time from which on a remedy is named."""

FEWEST_STEPS = 500
SECONDS_TO_COMPILE_FOR = 900.0
"""A run of fewer steps, or of less time, is compiled only where that is asked for: compiling takes a minute or two,
twice where the network is scored in between, and wins back some percent of the rest."""

LEAST_GAIN = 0.97
"""The share of its time that a run may take at most when it is compiled: two measurements differ by some percent."""

TRIAL_SECONDS = 3.0
"""For so long, or 50 steps, a step is measured."""

FEWEST_EPOCHS = 10
"""Into so many epochs a training on patches is cut that is to last for so many minutes."""


def fit(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    network: nn.Module | None = None,
    data: AnyData | None = None,
    resume: bool = False,
    title: str | None = None,
) -> Run:
    """Train one network.

    Where ``torchrun`` started this process beside others, or there is a process group of ``torch.distributed``
    already, all of them train it together. A process that was started anew for a lost one goes on with the run of its
    launch.

    Args:
        recipe: everything the run depends on, or the name or file of a recipe.
        out: the run's folder, new or (with ``resume``) begun before; by default a new one below ``excite-runs/``.
        network: a module of the user's own instead of ``recipe.network``; its present weights are the start. Where
            its attribute ``origin`` (:class:`excite.weights.base.Origin`) says what of it is new, the rest is the
            host of ``optimizer.host_factor`` and ``schedule.host_frozen_epochs``.
        data: images of the user's own instead of ``recipe.data``.
        resume: go on where the folder's newest checkpoint stands, under the recipe that the folder holds. A run that
            is finished is given back as it is.
        title: shows a progress bar with this title.

    Returns:
        The finished run. The same recipe on the same machine gives the same weights, bit for bit, with or without
        breaks in between; where it says ``auto``, the recipe that the run's folder holds.

    Raises:
        UsageError: the folder is taken, or network and data do not fit together.
        ExciteError: the loss is no longer a number, the disk is full, or the run was interrupted.
    """
    if not isinstance(recipe, Recipe):
        recipe = load(recipe)
    if out is None and can_restart():
        raise UsageError("give the run a folder (--out): processes that are started again are to find it")
    with processes() as group, one_sentence(group), _quiet_others(group):
        run = Run(group.firsts(Path(out or new_folder(recipe))))
        recipe, finished = _found(run, recipe, resume, group)
        if not finished:
            _fit(run, recipe, network, data, group, title if group.writes else None)
        group.wait()
    return run


def _found(run: Run, recipe: Recipe, resume: bool, group: Processes) -> tuple[Recipe, bool]:
    """The recipe to train by, that of a run to go on with if there is one, and whether that is finished."""
    found = recipe, False
    with group.together():
        if group.writes and (run.folder / "recipe.yaml").exists():
            if not (resume or goes_on(run.folder)):
                check_free(run.folder)
            found = run.recipe, run.finished
    return group.firsts(found)


def _fit(
    run: Run, recipe: Recipe, network: nn.Module | None, data: AnyData | None, group: Processes, title: str | None
) -> None:
    device = own_device(pick_device(recipe.trainer.device))
    check_apart(group, device)
    threads = group.firsts(recipe.trainer.threads or torch.get_num_threads())
    with _settings(threads, device):
        own = network is not None
        with group.together():
            recipe, data, network, loader = _prepared(recipe, data, network, group, device, title is not None)
        group.spread(network.state_dict().values())
        # What is measured, one process measures for all.
        measured = _measured(recipe, data, network, loader, device) if group.writes else None
        recipe = group.firsts(measured) or recipe
        recipe = scaled(recipe.replace({"trainer.threads": threads, "trainer.device": device.type}))
        if isinstance(data, DenoisingData) and recipe.data.patches not in (None, data.patches):
            data = dataclasses.replace(data, patches=recipe.data.patches)
            loader = training_loader(recipe, data, group, device)
        with group.together():
            if group.writes and not (run.folder / "recipe.yaml").exists():
                recipe.write(run.folder / "recipe.yaml")
                claim(run.folder)
        _train(run, recipe, network, None if own else recipe.network.spec, data, loader, device, title, group)


def _prepared(
    recipe: Recipe,
    data: AnyData | None,
    network: nn.Module | None,
    group: Processes,
    device: torch.device,
    progress: bool,
) -> tuple[Recipe, AnyData, nn.Module, AnyLoader]:
    """What a run begins with, once everything is known to fit together."""
    check_divides(recipe.trainer.batch_size, group.count)
    data = data or load_recipe_data(recipe, progress=progress)
    recipe, data, network = starting_point(recipe, data, network)
    check_freezing(recipe, network)
    factor = host_factor(recipe.optimizer, fresh_parameters(network))
    recipe = recipe.replace({"optimizer.host_factor": factor})
    if recipe.trainer.patience and data.val is None:
        raise UsageError("key 'trainer.patience' needs a validation split: set data.val_fraction, such as 0.1")
    if recipe.trainer.strategy == "fsdp" and recipe.trainer.ema_decay:
        raise UsageError(
            "key 'trainer.ema_decay': leave it out, or take trainer.strategy=ddp: it averages whole tensors"
        )
    # FSDP divides contiguous parameters only.
    if recipe.trainer.channels_last and recipe.trainer.strategy != "fsdp":
        to_channels_last(network)
    recipe = resolved(recipe, data)
    _check_precision(recipe, device)
    loader = training_loader(recipe, data, group, device)
    _check_task(recipe, network, loader, data, device)
    return recipe, data, network, loader


def _measured(recipe: Recipe, data: AnyData, network: nn.Module, loader: AnyLoader, device: torch.device) -> Recipe:
    """The recipe with all that is settled by measuring, ``auto`` and the epochs of ``trainer.minutes``."""
    task = task_named(data.task)
    recipe = fastest(recipe, network, task, loader, device)
    if recipe.trainer.minutes is not None:
        seconds = step_seconds(recipe, network, task, loader, device)
        recipe, _ = fitted(recipe, data, int(60 * recipe.trainer.minutes / seconds), len(loader))
    return recipe


def starting_point(
    recipe: Recipe, data: AnyData, network: nn.Module | None = None
) -> tuple[Recipe, AnyData, nn.Module]:
    """The network as it is before the first step, in training mode, and the recipe and data as it wants them.

    Args:
        recipe: what is to be trained.
        data: its images; those of the user's own keep their preprocessing.
        network: a module of the user's own instead of ``recipe.network``.
    """
    torch.manual_seed(recipe.seed)
    if network is None:
        spec = spec_for(recipe.network.spec, data)
        network = create(spec, len(data.classes) or None, data.preprocessing.channels, recipe.network.weights)
        with_backbone(network, recipe.network.image, recipe.network.image_weights)
        # With what weights decide written in, such as how an added unit starts.
        recipe = recipe.replace({"network.spec": getattr(network, "spec", recipe.network.spec)})
    if data.name == recipe.data.path and isinstance(data, ImageData) and not isinstance(data, SceneData):
        recipe, data = normalised_as_weights(recipe, data, network)
    return recipe, data, network


def fresh_parameters(network: nn.Module) -> frozenset[str] | None:
    """The names of what did not come from the network's weights; None where no weights were loaded."""
    origin = getattr(network, "origin", None)
    return origin.fresh if isinstance(origin, Origin) else None


def check_freezing(recipe: Recipe, network: nn.Module) -> None:
    """Refuse to freeze what came from weights where there is nothing else to train.

    Raises:
        UsageError: no weights were loaded, or they filled the whole network.
    """
    if not recipe.schedule.host_frozen_epochs:
        return
    fresh = fresh_parameters(network)
    if not fresh:
        name = getattr(network, "spec", type(network).__name__)
        why = "was loaded from weights" if fresh is None else "is new: all its parameters came from the weights"
        raise UsageError(f"key 'schedule.host_frozen_epochs': set it to 0, for nothing in {name} {why}")


def normalised_as_weights(recipe: Recipe, data: ImageData, network: nn.Module) -> tuple[Recipe, ImageData]:
    """The recipe and its data with the mean and standard deviation that the network's weights were trained with.

    What the recipe itself says goes first, and without weights that say it nothing changes. Size and crop stay those
    of the data.
    """
    origin = getattr(network, "origin", None)
    known = origin.preprocessing if isinstance(origin, Origin) else None
    if known is not None and known.channels == data.preprocessing.channels:
        wanted = {"data.mean": recipe.data.mean or known.mean, "data.std": recipe.data.std or known.std}
        recipe = recipe.replace(wanted)
    mean, std = recipe.data.mean or data.preprocessing.mean, recipe.data.std or data.preprocessing.std
    return recipe, dataclasses.replace(
        data, preprocessing=dataclasses.replace(data.preprocessing, mean=mean, std=std)
    )


def new_folder(recipe: Recipe) -> Path:
    """A folder name for a run: network, data and time."""
    data = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in Path(recipe.data.path).name)
    return Path("excite-runs") / f"{recipe.network.spec}-{data}-{datetime.now():%Y%m%d-%H%M%S}"


def check_free(folder: Path) -> None:
    """Refuse a folder for a new run in which there is one already.

    Raises:
        UsageError: there is.
    """
    if (folder / "recipe.yaml").exists():
        raise UsageError(f"{folder} already holds a run: resume it, or choose another folder.")


def pick_device(name: str) -> torch.device:
    """The device by its name; ``auto`` takes an accelerator where there is one.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"device '{name}' is not available here; use 'auto' or 'cpu'") from None
    return device


def check_devices(name: str, count: int) -> None:
    """Refuse to share a run among more devices of a machine than it has.

    Raises:
        UsageError: there are fewer.
    """
    device = pick_device(name)
    if ":" in name:
        raise UsageError(f"device '{name}' is one: to share a run among {count}, name their type alone")
    if device.type != "cpu" and count > torch.accelerator.device_count():
        raise UsageError(f"--devices {count}: this machine has {torch.accelerator.device_count()} ({device.type})")


class Stream:
    """The steps of a whole run, from any on, as one process sees them; Lightning takes them for one epoch."""

    def __init__(self, loader: AnyLoader, start: int, total: int, channels_last: bool) -> None:
        self.loader, self.start, self.total = loader, start, total
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.waited = 0.0

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[StepBatch]:
        epoch, batch = divmod(self.start, len(self.loader))
        while epoch * len(self.loader) < self.total:
            self.loader.load_state_dict(self.loader.state_dict() | {"epoch": epoch, "batch": batch})
            batches = iter(self.loader)
            while True:
                begin = time.perf_counter()
                item = next(batches, None)
                if item is None:
                    break
                parts, planned, _ = cast(tuple[list[Batch], int, Any], item)
                ready = [(each(inputs, self._laid_out), target, index) for inputs, target, index in parts]
                self.waited += time.perf_counter() - begin
                yield ready, planned
            epoch, batch = epoch + 1, 0

    def _laid_out(self, part: Tensor) -> Tensor:
        return part.contiguous(memory_format=self.format) if part.ndim == 4 else part


def _train(
    run: Run,
    recipe: Recipe,
    network: nn.Module,
    spec: str | None,
    data: AnyData,
    loader: AnyLoader,
    device: torch.device,
    title: str | None,
    group: Processes,
) -> None:
    settings = recipe.trainer
    total = settings.epochs * len(loader)
    fresh = fresh_parameters(network)
    divided = settings.strategy == "fsdp" and group.count > 1
    average = WeightAverage(network, settings.ema_decay) if settings.ema_decay else None
    # The folder may be on rank 0's machine alone.
    with group.together():
        saved = checkpoint.load_newest(run.folder / "checkpoints") if group.writes else None
    saved = group.firsts(saved)
    position = Position(0, total, len(loader))
    if saved is not None:
        network.load_state_dict(saved["network"])
        if average is not None:
            average.model.load_state_dict(saved["average"])
        position = Position(total_steps=total, steps_per_epoch=len(loader), **saved["position"])

    def optimize(trained: nn.Module) -> torch.optim.Optimizer:
        optimizer = build_optimizer(trained, recipe.optimizer, fresh)
        if saved is not None:
            optimizer.load_state_dict(shared_out(saved["optimizer"], optimizer))
        return optimizer

    kind = task_named(data.task)
    task = kind.module(network, optimize, **kind.options(recipe.task.model_dump(), data))
    task.processes, task.clip, task.ready = group, settings.clip, loader.ready
    task.divide = shard if divided else None
    # What is scored and written: the average, or the network; of a divided one a copy that is whole.
    kept = average.model.module if average is not None else copy.deepcopy(network) if divided else network
    best = Best(kept, kind.metric, settings.patience) if settings.patience else None
    if best is not None and saved is not None:
        best.load_state_dict(saved["best"])

    def state() -> dict[str, Any]:
        optimizer = task.optimizers(use_pl_optimizer=False)
        return {
            "network": whole(network.state_dict()),
            "average": average.model.state_dict() if average is not None else None,
            "best": best.state_dict() if best is not None else None,
            "optimizer": whole(optimizer.state_dict()),  # type: ignore[union-attr]
        }

    def gather() -> None:
        if divided:
            kept.load_state_dict(whole(network.state_dict()))
        # Running statistics of batch norm, where each process has its own.
        group.spread(kept.buffers())

    def validation() -> dict[str, float]:
        gather()
        scored = kind.score(kept, data.val, data.preprocessing, device, workers=recipe.data.workers, processes=group)
        return scored.metrics

    if not position.is_done(best):
        stream = Stream(loader, position.step, total, settings.channels_last)
        record = Record(
            position,
            run.folder,
            state,
            kind.metric,
            validation if data.val is not None else None,
            best,
            settings.checkpoint_steps,
            settings.checkpoint_minutes,
            settings.keep_checkpoints,
            lambda: stream.waited,
            group,
        )
        task.wishes = record.wishes
        with _norms(task, network, settings.sync_batch_norm, device), _quiet_lightning():
            if settings.compile is True:
                network.compile()
            trainer = pl.Trainer(
                accelerator="cpu" if device.type == "cpu" else device.type,
                precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
                max_steps=total - position.step,
                logger=_loggers(recipe, run) if group.writes else False,
                callbacks=_callbacks(recipe, network, position, average, record, group, title),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                benchmark=False,
                **trainer_options(group, settings.strategy, device, recipe.schedule.host_frozen_epochs > 0),
            )
            trainer.fit(task, stream)
            gather()
        log.info("%s", _about_waiting(record.data_share(), recipe.data.workers))
    if best is not None:
        kept.load_state_dict(best.weights)
    if group.writes:
        run.write_model(
            kept,
            data,
            spec=spec,
            image=recipe.network.image,
            weights="best" if best is not None else "ema" if average is not None else "last",
            seed=recipe.seed,
            epochs=position.epoch,
            train_seconds=position.seconds,
        )


def _callbacks(
    recipe: Recipe,
    network: nn.Module,
    position: Position,
    average: WeightAverage | None,
    record: Record,
    group: Processes,
    title: str | None,
) -> list[pl.Callback]:
    """What is done around each step, in this order."""
    total, steps = position.total_steps, position.steps_per_epoch
    factor = functools.partial(rate_factor, recipe.schedule, total_steps=total, steps_per_epoch=steps)
    callbacks: list[pl.Callback] = [Rate(position, factor, recipe.seed, group.rank)]
    if average is not None:
        callbacks.append(average)
    callbacks += [record, StopOnSignal(record)]
    if recipe.schedule.host_frozen_epochs:
        frozen = functools.partial(host_is_frozen, recipe.schedule, steps_per_epoch=steps)
        callbacks.append(Freeze(position, network, fresh_parameters(network) or (), frozen))
    if recipe.trainer.frozen_norm_epochs:
        begin = total - recipe.trainer.frozen_norm_epochs * steps
        callbacks.append(FreezeNorms(position, network, begin, group))
    if title:
        callbacks.append(Bar(position, title))
    return callbacks


@contextlib.contextmanager
def _norms(task: TaskModule, network: nn.Module, wanted: bool, device: torch.device) -> Iterator[None]:
    """Within it batch norms share their statistics where several processes are to have it so."""
    if wanted and task.processes.count > 1:
        task.shared_norm = True
        with synchronised(network, device.type):
            yield
    else:
        yield


def _about_waiting(share: float, workers: int) -> str:
    """What to say of the share of the steps' time, in percent, that went into waiting for data."""
    said = f"{share:.0f} % of the steps' time went into waiting for data"
    if share < MUCH_WAITING:
        return said
    return f"{said}: data.workers={max(2, 2 * workers)} has more processes prepare it ahead"


def _check_task(recipe: Recipe, network: nn.Module, loader: AnyLoader, data: AnyData, device: torch.device) -> None:
    task = task_named(data.task)
    task.options(recipe.task.model_dump(), data)
    # One sample through the network in evaluation mode: a wrong head is better found now than after an epoch.
    inputs: Inputs = next(iter(loader))[0][0][0]
    one = each(inputs, lambda part: loader.ready(part[:1].to(device)))
    network.to(device).eval()
    try:
        with torch.inference_mode():
            output = network(one)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(one, Tensor):
            raise
        reason = str(error).partition("\n")[0]
        raise UsageError(f"the network cannot take a pair of an image and a text ({reason}): take dscmr") from error
    network.train()
    task.expect(data, one, output)


def fitted(recipe: Recipe, data: AnyData, steps: int, steps_per_epoch: int) -> tuple[Recipe, AnyData]:
    """The recipe and its data made to last about so many steps.

    Where an epoch is a number of patches that can be chosen, it is made so short that there are ten of them: the
    validation scores of a single epoch would show nothing.
    """
    if isinstance(data, DenoisingData) and steps < FEWEST_EPOCHS * steps_per_epoch:
        steps_per_epoch = max(1, steps // FEWEST_EPOCHS)
        data = dataclasses.replace(data, patches=steps_per_epoch * recipe.trainer.batch_size)
        recipe = recipe.replace({"data.patches": data.patches})
    epochs = max(1, steps // steps_per_epoch)
    return recipe.replace({"trainer.epochs": epochs, "trainer.minutes": None}), data


def _check_precision(recipe: Recipe, device: torch.device) -> None:
    if (
        recipe.trainer.precision == "bf16"
        and device.type == "cpu"
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        log.warning("This processor has no bfloat16 instructions: trainer.precision=bf16 is emulated and slow here")


def fastest(recipe: Recipe, network: nn.Module, task: Task, loader: AnyLoader, device: torch.device) -> Recipe:
    """The recipe with what ``auto`` leaves open, ``trainer.precision`` and ``trainer.compile``, settled by measuring.

    Every choice is timed on copies of the network, so that the run begins as if nothing had been tried. A run of few
    steps is not delayed by it: to compile takes longer than it could win back.
    """
    settings = recipe.trainer
    if settings.precision == "auto":
        recipe = recipe.replace({"trainer.precision": "fp32"})
        if _has_bf16(device):
            lowered = recipe.replace({"trainer.precision": "bf16"})
            slow, quick = (step_seconds(one, network, task, loader, device) for one in (recipe, lowered))
            recipe = lowered if quick < slow else recipe
            log.info("trainer.precision: %s (a step %s)", recipe.trainer.precision, _compared(quick, slow, "in bf16"))
        else:
            log.info("trainer.precision: fp32, for there are no bfloat16 instructions here")
    if settings.compile != "auto":
        return recipe
    plain = recipe.replace({"trainer.compile": False})
    steps = settings.epochs * len(loader)
    if settings.minutes is None and steps < FEWEST_STEPS:
        return plain
    seconds = step_seconds(plain, network, task, loader, device)
    length = 60 * settings.minutes if settings.minutes is not None else steps * seconds
    if length < SECONDS_TO_COMPILE_FOR:
        return plain
    compiled = plain.replace({"trainer.compile": True})
    log.info("The run takes about %.0f minutes: trying whether torch.compile makes its steps quicker …", length / 60)
    begin = time.perf_counter()
    try:
        quick = step_seconds(compiled, network, task, loader, device)
    except Exception as error:  # of the compiler's, which are of many kinds; the run does not depend on it
        log.info("trainer.compile: false, for it fails here: %s", str(error).strip().partition("\n")[0])
        return plain
    cost = time.perf_counter() - begin
    pays = cost + length * quick / seconds < LEAST_GAIN * length
    log.info(
        "trainer.compile: %s (a step %s, and compiling takes %.0f s)",
        str(pays).lower(),
        _compared(quick, seconds, "compiled"),
        cost,
    )
    return compiled if pays else plain


def _compared(changed: float, plain: float, how: str) -> str:
    return f"takes {changed:.3g} s {how}, {plain:.3g} s as it is"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def step_seconds(recipe: Recipe, network: nn.Module, task: Task, loader: AnyLoader, device: torch.device) -> float:
    """The median time of a training step, measured on a copy of the network."""
    trial = copy.deepcopy(network).to(device).train()
    optimizer = build_optimizer(trial, recipe.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    module = task.module(trial)
    lowered = recipe.trainer.precision == "bf16"
    if recipe.trainer.compile is True:
        trial.compile()
    seconds: list[float] = []
    stream = iter(Stream(loader, 0, 10**9, recipe.trainer.channels_last))
    begin = time.perf_counter()
    while len(seconds) < 5 or (time.perf_counter() - begin < TRIAL_SECONDS and len(seconds) < 50):
        start = time.perf_counter()
        parts, _ = next(stream)
        optimizer.zero_grad()
        for inputs, target, _ in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=lowered):
                loss = module.loss(trial(each(inputs, lambda part: loader.ready(part.to(device)))), target.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        float(loss.detach())
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[len(seconds[2:]) // 2]


@contextlib.contextmanager
def _settings(threads: int, device: torch.device) -> Iterator[None]:
    """Threads and determinism for the run; what the process had before comes back after it."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    safety: Any = torch.utils.deterministic
    fill = safety.fill_uninitialized_memory
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    safety.fill_uninitialized_memory = False  # a safety net that costs a pass over every buffer
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        safety.fill_uninitialized_memory = fill


@contextlib.contextmanager
def _quiet_others(group: Processes) -> Iterator[None]:
    """Of several processes only the first says how things go; what is wrong with its own files each one says."""
    ours = logging.getLogger("excite")
    before = ours.level
    if not group.writes:
        ours.setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.setLevel(before)


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    # Lightning's advice on workers and its farewell lines speak of things that are settled here.
    talkers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    talkers += [
        logging.getLogger("pytorch_lightning.utilities.rank_zero"),
        logging.getLogger("lightning_fabric.utilities.rank_zero"),
    ]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # A kernel of 1×1 lies channels-last and channels-first at once, and DistributedDataParallel takes note.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)


def _loggers(recipe: Recipe, run: Run) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: pl.loggers.TensorBoardLogger(run.folder, name="tensorboard", version=""),
        "wandb": lambda: pl.loggers.WandbLogger(project="excite", name=run.folder.name, save_dir=run.folder),
        "mlflow": lambda: pl.loggers.MLFlowLogger(experiment_name="excite", save_dir=str(run.folder / "mlruns")),
    }
    built = []
    for name in recipe.trainer.loggers:
        try:
            built.append(makers[name]())
        except ModuleNotFoundError:
            raise UsageError(
                f"trainer.loggers asks for {name}, which is not installed: pip install 'excite[{name}]'"
            ) from None
    return built or False

"""``excite train``."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from excite.allocator import keep_freed_buffers
from excite.cli.common import Data, Device, Json, Settings, TestData, print_json, show_log
from excite.errors import UsageError

if TYPE_CHECKING:
    from excite.training.recipe import Recipe

NAME = "train"


def run(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's name or file. Default: what suits the data; with --weights, finetune.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[str | None, typer.Option(help="A network spec.", show_default=False)] = None,
    data: Data = None,
    test_data: TestData = None,
    epochs: Annotated[int | None, typer.Option(min=1, show_default=False)] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Choose the epochs so that training takes so long.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default=False)] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights to start from: imagenet, or a file.", show_default=False)
    ] = None,
    settings: Settings = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was cut off.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default=False)] = None,
    device: Device = "auto",
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine, one for each of its GPUs.", show_default=False),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines; on each the same command is to be given.")] = 1,
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where several machines find each other.", show_default=False),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How often all processes are started again when one is lost.")
    ] = 0,
    json: Json = False,
) -> None:
    """Train one network; --resume goes on exactly where a run was cut off.

    With --devices, --nodes, torchrun or srun several processes train it together, in batches of the same size.
    """
    from rich.console import Console

    from excite.processes import PeerError, first_of_all
    from excite.training.recipe import load, parse_settings
    from excite.verbs.compare import default_recipe
    from excite.verbs.train import train

    show_log()
    given: dict[str, Any] = {
        "data.path": data,
        "data.test_path": test_data,
        "network.spec": network,
        "network.weights": weights,
        "trainer.epochs": epochs,
        "trainer.minutes": minutes,
        "trainer.device": device if device != "auto" else None,
        "seed": seed,
    }
    changes = {key: value for key, value in given.items() if value is not None} | parse_settings(settings or [])
    chosen = None
    if resume:
        if recipe or changes or out:
            raise UsageError("--resume goes on with the run's own recipe: it takes no other settings")
    else:
        if not (recipe or data or network):
            raise UsageError("train needs a recipe, or --network and --data; see: excite recipes, excite networks")
        start = load(recipe) if recipe else default_recipe(data, changes.get("network.weights"))
        chosen = start.replace(changes)
    if not _is_joined(devices, nodes):
        _launch(chosen, out, device, devices or 1, nodes, rendezvous, restarts)
    if not first_of_all():
        logging.getLogger("excite").setLevel(logging.WARNING)
    keep_freed_buffers()
    try:
        result = train(chosen, resume=resume, out=out, progress=True)
    except PeerError as error:
        time.sleep(1)  # the process that says why is to have said it when the end of this one ends all
        raise typer.Exit(error.exit_code) from None
    if not first_of_all():
        return
    if json:
        print_json(result)
        return
    console = Console(highlight=False)
    if result["metrics"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
        console.print(f"{result['spec']}: {figures} on {result['count']} test {result['samples']}")
    console.print(f"Run: {result['run']}", soft_wrap=True)


def _is_joined(devices: int | None, nodes: int) -> bool:
    """Whether all the processes there are to be run already.

    Raises:
        UsageError: there are others than was asked for.
    """
    from excite.processes import join_slurm, started_together

    asked = (devices or 1) * nodes
    if asked > 1:
        join_slurm()
    if started_together():
        count = int(os.environ["WORLD_SIZE"])
        if (devices is not None or nodes > 1) and asked != count:
            raise UsageError(f"--nodes {nodes} --devices {devices or 1} asks for {asked} processes, but {count} run")
        return True
    return asked == 1


def _launch(
    chosen: Recipe | None,
    out: Path | None,
    device: str,
    devices: int,
    nodes: int,
    rendezvous: str | None,
    restarts: int,
) -> NoReturn:
    """Start as many processes with the same command, and end as they do."""
    import sys

    from excite.training.distributed_launch import launch
    from excite.training.fit import check_devices, check_free, new_folder

    if nodes > 1 and rendezvous is None:
        raise UsageError(
            "--nodes: say with --rendezvous HOST:PORT where the machines find each other, or start it with torchrun "
            "or srun"
        )
    check_devices(device if chosen is None else chosen.trainer.device, devices)
    command = [sys.executable, "-m", "excite", *sys.argv[1:]]
    if chosen is not None and out is not None:
        check_free(out)
    elif chosen is not None:
        # Processes that are started again are to find it.
        command += ["--out", str(new_folder(chosen))]
    raise typer.Exit(launch(command, devices, nodes, rendezvous, restarts))

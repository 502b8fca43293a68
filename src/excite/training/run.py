"""A run is a folder; this reads one, and writes the trained network into it."""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from excite.create import create
from excite.data import Preprocessing
from excite.data.crossmodal import CrossmodalData
from excite.data.crossmodal_inputs import Inputs
from excite.data.denoising import DenoisingData
from excite.data.hyperspectral import SceneData
from excite.data.spectra import Spectra
from excite.deploy.pruned import rebuild
from excite.errors import ExciteError, UsageError
from excite.files import sha256, write_atomically, write_json
from excite.training import recipe as recipes
from excite.training.recipe import Recipe
from excite.training.recipe_data import AnyData, with_backbone


@dataclass(frozen=True)
class Trained:
    """A network with what is needed to use it.

    Attributes:
        network: in evaluation mode.
        spec: what built it; ``custom`` for a module of the user's own.
        classes: the names of its outputs.
        preprocessing: what it is to be fed.
        task: what it was trained for.
        spectra: how a spectrum becomes its input, for a network of scenes.
    """

    network: nn.Module
    spec: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    task: str = "classification"
    spectra: Spectra | None = None


class Run:
    """The folder of one training run.

    ``recipe.yaml``, ``metrics.csv``, ``checkpoints/``, and once it is finished ``model.safetensors`` and
    ``model.json``; for a network of scenes ``spectra.safetensors`` beside them, for one of pairs
    ``inputs.safetensors``, and for one that was pruned ``pruned.json``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run that exists.

        Raises:
            UsageError: no such folder, or one that holds no run.
        """
        run = cls(folder)
        if not (run.folder / "recipe.yaml").is_file():
            raise UsageError(f"{folder} is not a run: it has no recipe.yaml")
        return run

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return recipes.load(self.folder / "recipe.yaml")

    @property
    def finished(self) -> bool:
        """Whether the trained network has been written."""
        return (self.folder / "model.json").is_file()

    @property
    def card(self) -> dict[str, Any]:
        """What ``model.json`` says.

        Raises:
            UsageError: the run is not finished, or the file is damaged.
        """
        if not self.finished:
            raise UsageError(f"{self.folder} is not finished; go on with: excite train --resume {self.folder}")
        try:
            card: dict[str, Any] = json.loads((self.folder / "model.json").read_text())
        except ValueError:
            raise ExciteError(f"{self.folder / 'model.json'} is damaged: it is not JSON.") from None
        return card

    def metrics(self) -> dict[str, list[float]]:
        """The columns of ``metrics.csv``."""
        path = self.folder / "metrics.csv"
        rows = list(csv.DictReader(path.open())) if path.is_file() else []
        return {key: [float(row[key]) for row in rows] for key in (rows[0] if rows else {})}

    def test_metrics(self) -> dict[str, float]:
        """The metrics on the test images, as they were last computed."""
        metrics: dict[str, float] = json.loads((self.folder / "test.json").read_text())["metrics"]
        return metrics

    def load(self, network: nn.Module | None = None) -> Trained:
        """The trained network, in evaluation mode.

        Args:
            network: for a run of the user's own module, a module of the same class to load into.

        Raises:
            UsageError: the run is not finished, or needs ``network``.
            ExciteError: the weights are damaged.
        """
        card = self.card
        if network is None:
            if card["spec"] is None:
                raise UsageError(f"{self.folder} trained a module of the user's own: pass one to load into.")
            network = create(card["spec"], len(card["classes"]) or None, card["in_channels"])
            with_backbone(network, card.get("image"))
            for step in self._prunings(card):
                rebuild(network, step)
        network.load_state_dict(self._tensors("model.safetensors", card["sha256"]))
        preprocessing: dict[str, Any] = card["preprocessing"]
        return Trained(
            network.eval(),
            card["spec"] or "custom",
            tuple(card["classes"]),
            Preprocessing(**preprocessing),
            card["task"],
            self.spectra,
        )

    def _prunings(self, card: dict[str, Any]) -> list[dict[str, Any]]:
        """What was done to the spec's network to make it smaller, first things first."""
        path = self.folder / "pruned.json"
        if card.get("pruned") is None:
            return []
        if not path.is_file() or sha256(path) != card["pruned"]:
            raise ExciteError(f"{path} is missing or damaged: its checksum is not the one in model.json.")
        steps: list[dict[str, Any]] = json.loads(path.read_text())["steps"]
        return steps

    @property
    def spectra(self) -> Spectra | None:
        """How spectra become the network's channels, for a network of scenes."""
        card = self.card
        if "scene" not in card:
            return None
        return Spectra.read(self._tensors("spectra.safetensors", card["scene"]["sha256"]))

    @property
    def inputs(self) -> Inputs | None:
        """How images and texts become the network's input, for a network of pairs."""
        card = self.card
        if "inputs" not in card:
            return None
        return Inputs.read(self._tensors("inputs.safetensors", card["inputs"]["sha256"]))

    def _tensors(self, name: str, checksum: str) -> dict[str, torch.Tensor]:
        path = self.folder / name
        if not path.is_file() or sha256(path) != checksum:
            raise ExciteError(f"{path} is missing or damaged: its checksum is not the one in model.json.")
        return safetensors.torch.load_file(path)

    def write_model(self, network: nn.Module, data: AnyData, *, spec: str | None, **more: Any) -> None:
        """Write the weights, then the card that says that the run is finished.

        Args:
            network: what was trained.
            data: what it was trained on.
            spec: what built it; None for a module of the user's own.
            more: what else the card is to say.
        """
        weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        path = self.folder / "model.safetensors"
        write_atomically(path, safetensors.torch.save(weights))
        card = {
            "spec": spec,
            "task": data.task,
            "classes": list(data.classes),
            "in_channels": data.preprocessing.channels,
            "preprocessing": dataclasses.asdict(data.preprocessing),
            "sha256": sha256(path),
            "versions": versions(),
            **more,
        }
        if isinstance(data, DenoisingData):
            assert data.train is not None
            card["degradation"] = str(data.train.degradation)
        if isinstance(data, CrossmodalData):
            path = self.folder / "inputs.safetensors"
            write_atomically(path, safetensors.torch.save(data.tensors()))
            card["inputs"] = {"name": data.name, "sha256": sha256(path)}
        if isinstance(data, SceneData):
            path = self.folder / "spectra.safetensors"
            write_atomically(path, safetensors.torch.save(data.spectra.tensors()))
            card["scene"] = {
                "name": data.name,
                "numbers": list(data.kept),
                "split": data.pixels.note,
                "excluded": [data.truth.classes[number - 1] for number in data.pixels.excluded],
                "train_pixels": len(data.pixels.train),
                "learned_from": data.learned_from(),
                "sha256": sha256(path),
            }
        write_json(self.folder / "model.json", card)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {}
    for package in ("excite", "torch", "torchvision", "pytorch-lightning", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = torch.__version__ if package == "torch" else "not installed"
    return found

"""What ``explain`` is asked of: a trained network, and the images that it is looked at with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excite.data import ImageData, Preprocessing, Split, load_data
from excite.data.base import BatchedImages, Images
from excite.data.crossmodal import CrossmodalData, is_crossmodal
from excite.data.cube import is_scene, same_scene
from excite.data.denoising import DenoisingData, is_denoising
from excite.data.draws import Indices
from excite.data.hyperspectral import SceneData
from excite.errors import UsageError, nearest
from excite.training.bars import bar
from excite.training.recipe_data import AnyData, load_recipe_scene
from excite.training.run import Run
from excite.verbs import scores
from excite.verbs.opened import onto_outputs, open_network


@dataclass(frozen=True)
class Subject:
    """A network with the images to look at it with.

    Attributes:
        network: the network.
        name: its spec; of a module its class.
        run: the run that it is from.
        data: the name of the data.
        part: ``test`` or ``train``.
        split: the images; their labels are the network's outputs.
        classes: the names of the outputs.
        preprocessing: how images become input.
        task: ``classification`` or ``hyperspectral``.
    """

    network: nn.Module
    name: str
    run: Run | None
    data: str
    part: str
    split: Split
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    task: str

    @property
    def samples(self) -> str:
        """What the images are called."""
        return "pixels" if self.task == "hyperspectral" else "images"

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The run's, resolved."""
        return self.run.recipe.model_dump(mode="json") if self.run else None


def open_subject(
    source: str | Path | nn.Module,
    data: str | AnyData,
    test: str | None,
    weights: str | Path | None,
    device: str,
    progress: bool,
) -> Subject:
    """Open what ``explain`` was asked for; arguments as there.

    Raises:
        UsageError: the network and the data do not fit together, or the task has no classes.
        ExciteError: the weights or the images cannot be read.
    """
    what = data if isinstance(data, str) else data.name
    if isinstance(data, DenoisingData) or (isinstance(data, str) and is_denoising(data)):
        raise UsageError(f"{what} is for denoising, and gates are explained by classes: give images with classes.")
    if isinstance(data, CrossmodalData) or (isinstance(data, str) and is_crossmodal(data)):
        raise UsageError(f"{what} holds pairs of images and texts: give images with classes to explain a network on.")
    if isinstance(data, SceneData) or (isinstance(data, str) and is_scene(data)):
        return _open_scene(source, data, test, weights, progress)
    channels = data.preprocessing.channels if isinstance(data, ImageData) else None
    opened = open_network(source, weights, channels, progress)
    if isinstance(data, ImageData):
        images = data
    else:
        with bar("reading images", progress) as step:
            images = load_data(
                data,
                test=test,
                preprocessing=opened.preprocessing,
                classes=opened.classes if opened.of == "run" else None,
                all_for_test=opened.of == "file",
                progress=step,
            )
    part = "test" if images.test else "train"
    split = images.test or images.train
    assert split is not None
    names = opened.classes or images.classes
    if opened.of in ("file", "loaded"):
        split, names = onto_outputs(split, images, opened, device)
    run = Run.open(source) if opened.of == "run" and not isinstance(source, nn.Module) else None
    name = run.card["spec"] if run else None
    return Subject(
        opened.network,
        name or _name(source),
        run,
        images.name,
        part,
        split,
        tuple(names),
        images.preprocessing,
        images.task,
    )


def _name(source: str | Path | nn.Module) -> str:
    if not isinstance(source, nn.Module):
        return str(source)
    spec = getattr(source, "spec", None)
    return spec if isinstance(spec, str) else type(source).__name__


def _open_scene(
    source: str | Path | nn.Module,
    data: str | SceneData,
    test: str | None,
    weights: str | Path | None,
    progress: bool,
) -> Subject:
    """A network of hyperspectral scenes, and the windows of a scene's test pixels."""
    what = data if isinstance(data, str) else data.name
    for option, given in (("test", test), ("weights", weights)):
        if given is not None:
            raise UsageError(f"{what} is a hyperspectral scene, and {option} is an option for images: leave it out.")
    run = None
    if isinstance(source, nn.Module):
        if isinstance(data, str):
            raise UsageError(
                "A module is explained on a scene that was loaded: excite.data.hyperspectral.load_scene."
            )
        network, name, scene = source, _name(source), data
    else:
        run = Run.open(source)
        trained = run.load()
        if trained.spectra is None:
            raise UsageError(f"{source} was trained on images, and {what} is a hyperspectral scene.")
        network, name = trained.network, trained.spec
        if isinstance(data, str):
            settings, same = run.recipe.data, same_scene(data, run.recipe.data.path)
            if not same:
                settings = settings.model_copy(update={"path": data, "ground_truth": None, "variable": None})
            scene = load_recipe_scene(
                settings, progress, spectra=trained.spectra, classes=trained.classes, all_for_test=not same
            )
        else:
            scene, same = data, True
        if same:
            scores.check_scene(run, scene)
    if scene.test is None or not len(scene.test):
        raise UsageError(f"'{scene.name}' has no test pixels.")
    return Subject(network, name, run, scene.name, "test", scene.test, scene.classes, scene.preprocessing, scene.task)


# --- some of the images, some of the classes -----------------------------------------------------------------------


def at_most(split: Split, images: int | None) -> Split:
    """At most so many images of a split, spread evenly over its classes and over each class's images."""
    if images is None or images >= len(split):
        return split
    by_class = np.argsort(split.labels.numpy(), kind="stable")
    # The middle of each of so many equal parts.
    places = ((np.arange(images) + 0.5) * len(split) / images).astype(np.int64)
    chosen = np.sort(by_class[places])
    here = torch.from_numpy(chosen)
    return replace(
        split,
        images=_chosen(split.images, chosen),
        labels=split.labels[here],
        names=[split.names[int(i)] for i in chosen],
        scales=_of(split.scales, here),
        blocks=_of(split.blocks, here),
    )


def _of(values: Tensor | None, here: Tensor) -> Tensor | None:
    return None if values is None else values[here]


def _chosen(images: Images, chosen: NDArray[np.int64]) -> Images:
    return _ChosenBatches(images, chosen) if isinstance(images, BatchedImages) else _Chosen(images, chosen)


class _Chosen:
    """Some images of a set."""

    def __init__(self, images: Any, chosen: NDArray[np.int64]) -> None:
        self.images = images
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image, label = self.images[int(self.chosen[i])]
        return image, label


class _ChosenBatches(_Chosen):
    """Some images of a set that hands out whole batches."""

    def batch(self, indices: Indices, seed: int, epoch: int) -> Tensor:
        """The images of ``indices`` among those chosen."""
        found: Tensor = self.images.batch(self.chosen[indices], seed, epoch)
        return found


def shown_classes(wanted: Sequence[str] | None, names: Sequence[str], counts: Sequence[int]) -> list[int]:
    """Which classes are drawn: those asked for, else four as in the paper's figure, spread over those with images.

    Args:
        wanted: names, or None.
        names: of all classes.
        counts: how many images each has.

    Raises:
        UsageError: a name that is no class's, or a class without images.
    """
    if wanted is None:
        there = np.flatnonzero(np.asarray(counts) > 0)
        places = np.linspace(0, len(there) - 1, min(4, len(there))).round().astype(int)
        return [int(there[place]) for place in places]
    check_classes(wanted, names)
    found = [list(names).index(name) for name in wanted]
    for number in found:
        if not counts[number]:
            raise UsageError(f"There are no images of the class {names[number]!r}: choose another.")
    return list(dict.fromkeys(found))


def check_classes(wanted: Sequence[str], names: Sequence[str]) -> None:
    """Refuse names of no class, before any work.

    Raises:
        UsageError: one is unknown, or there is none.
    """
    if isinstance(wanted, str) or not wanted:
        raise UsageError(f"classes is {wanted!r}: give a list of names, such as {list(names[:2])}.")
    for name in wanted:
        if name not in names:
            hint = nearest(name, list(names))
            known = ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "")
            raise UsageError(f"The class {name!r} is none of {known}" + (f": {hint}" if hint else "."))

"""Networks that a verb is to apply, and which of their outputs the classes of the data are."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from excite.create import create
from excite.data import ImageData, Preprocessing, Split
from excite.errors import UsageError, nearest
from excite.evaluation_mode import evaluation_mode
from excite.training.fit import pick_device
from excite.training.run import Run
from excite.verbs.source import check_source
from excite.weights.base import Origin
from excite.weights.fetch import resolve
from excite.weights.published import imagenet_classes, imagenet_synsets, known_classes, known_preprocessing

# --- the network ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A trained network, and what is known of the images that it was trained on.

    Attributes:
        network: the network.
        of: a ``run`` of excite's, a spec with the weights in a ``file``, or a module that was passed in: ``loaded``
            with weights when it was created, or just a ``module``.
        classes: the names of its outputs, where they are known.
        preprocessing: what it was trained to be fed, where that is known.
    """

    network: nn.Module
    of: Literal["run", "file", "loaded", "module"]
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing | None


def open_network(
    source: str | Path | nn.Module, weights: str | Path | None, channels: int | None = None, progress: bool = False
) -> Opened:
    """The network that a verb is to apply.

    Args:
        source: a run's folder, a network spec with ``weights``, or a module.
        weights: a file, or the tag of published weights.
        channels: of the images; None for those that the weights are for.
        progress: show a bar while weights are fetched.

    Raises:
        UsageError: neither a run, nor a spec with weights that fit it.
        ExciteError: the weights cannot be read or fetched.
    """
    if isinstance(source, nn.Module):
        origin = getattr(source, "origin", None)
        if not isinstance(origin, Origin):
            return Opened(source, "module", None, None)
        return Opened(source, "loaded", origin.classes, origin.preprocessing)
    check_source(source, weights)
    if weights is None:
        trained = Run.open(source).load()
        if trained.task == "hyperspectral":
            raise UsageError(f"{source} was trained on a hyperspectral scene, not on images: give it a scene.")
        if trained.task == "denoising":
            raise UsageError(f"{source} was trained to denoise: name the data denoising:FOLDER, of clean pictures.")
        if trained.task == "retrieval":
            raise UsageError(f"{source} was trained on pairs: name the data crossmodal:PATH, of images and texts.")
        return Opened(trained.network, "run", trained.classes, trained.preprocessing)
    path, published = resolve(str(source), weights, progress)
    known = known_preprocessing(path) or (published.preprocessing if published else None)
    network = create(str(source), in_channels=channels or (known.channels if known else None), weights=path)
    origin = network.origin
    assert isinstance(origin, Origin)
    classes = known_classes(path) or origin.classes
    return Opened(network.eval(), "file", classes, known or origin.preprocessing)


def count_outputs(network: nn.Module, preprocessing: Preprocessing, device: str = "auto") -> int:
    """How many classes a network tells apart, by what it says of a black image.

    Raises:
        UsageError: it does not give one row of scores for an image.
    """
    black = torch.zeros(1, preprocessing.channels, preprocessing.size, preprocessing.size)
    where = pick_device(device)
    with evaluation_mode(network, where), torch.inference_mode():
        logits = network(black.to(where))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise UsageError("The network does not classify: for an image it must give one row of scores.")
    return int(logits.shape[1])


def output_classes(opened: Opened, outputs: int) -> tuple[str, ...] | None:
    """The names of a network's outputs: as they are known, or ImageNet's where there are 1,000; else None."""
    if opened.classes is not None and len(opened.classes) == outputs:
        return opened.classes
    return imagenet_classes() if outputs == len(imagenet_classes()) else None


# --- its classes and the data's ------------------------------------------------------------------------------------


def onto_outputs(split: Split, images: ImageData, opened: Opened, device: str) -> tuple[Split, tuple[str, ...]]:
    """The images with the network's outputs as their labels, and the names of these outputs.

    Raises:
        UsageError: a class of the data is none of the network's, or there is no saying which.
    """
    given = images.classes
    outputs = count_outputs(opened.network, images.preprocessing, device)
    known = output_classes(opened, outputs)
    if known is None:
        if outputs == len(given):
            return split, given
        raise UsageError(
            f"The network has {outputs} outputs and {images.name} {len(given)} classes, and nothing says which is "
            "which: give weights trained on these classes."
        )
    if outputs == len(given) and sum(bool(places(name, known)) for name in given) < outputs / 2:
        return split, given  # other classes, or names of another kind: in sorted order, as in training
    if len(given) != outputs and all(name.isdecimal() and name not in known for name in given):
        # Counted from nought, as the digits 0 to 9 are too: alone they do not say that they count these outputs.
        raise UsageError(
            f"The classes of {images.name} are only numbers, {len(given)} of them, and the network has {outputs} "
            "outputs: name the folders like the network's classes, or by their WordNet ids."
        )
    at = [_place(name, known, images.name) for name in given]
    if len(set(at)) < len(at):
        first = next(number for number in at if at.count(number) > 1)
        same = " and ".join(repr(name) for name, number in zip(given, at, strict=True) if number == first)
        raise UsageError(f"In {images.name}, {same} are the same class of the network: merge them.")
    labels = torch.tensor(at, dtype=torch.int64)[split.labels]
    return replace(split, labels=labels, num_classes=outputs), known


def _place(name: str, known: tuple[str, ...], data: str) -> int:
    """The one output that a class folder is for.

    Raises:
        UsageError: there is none, or more than one.
    """
    found = places(name, known)
    if len(found) == 1:
        return found[0]
    if found:
        both = " or ".join(f"{known[i]!r} (number {i})" for i in found)
        raise UsageError(f"The class {name!r} in {data} may be the network's {both}: rename it.")
    hint = nearest(name, list(known)) or "name the folder like the class, or by its WordNet id."
    raise UsageError(f"The class {name!r} in {data} is none of the {len(known)} classes of the network: {hint}")


def places(name: str, known: tuple[str, ...]) -> list[int]:
    """The outputs that the name of a class folder may mean: by name, plain name, WordNet id, or number."""
    if exact := [i for i, other in enumerate(known) if other == name]:
        return exact
    if alike := [i for i, other in enumerate(known) if _plain(other) == _plain(name)]:
        return alike
    if known == imagenet_classes():
        if name in (synsets := imagenet_synsets() or ()):
            return [synsets.index(name)]
        if name.isdecimal() and int(name) < len(known):
            return [int(name)]
    return []


@cache
def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()

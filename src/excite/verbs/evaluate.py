"""``evaluate``: the scores of a trained network on a set of images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from excite.create import create
from excite.data import ImageData, Preprocessing, Split, load_data
from excite.data.crossmodal import CrossmodalData, is_crossmodal
from excite.data.cube import is_scene
from excite.data.denoising import DenoisingData, is_denoising
from excite.data.hyperspectral import SceneData
from excite.data.load import adjusted
from excite.errors import UsageError, nearest
from excite.training.bars import bar
from excite.training.fit import pick_device
from excite.training.recipe_data import AnyData
from excite.training.run import Run
from excite.verbs import scores
from excite.verbs.evaluate_denoising import evaluate_denoising
from excite.verbs.evaluate_retrieval import evaluate_retrieval
from excite.verbs.evaluate_scene import evaluate_scene
from excite.verbs.source import check_source
from excite.weights.base import Origin
from excite.weights.fetch import resolve
from excite.weights.published import imagenet_classes, imagenet_synsets, known_classes, known_preprocessing


def evaluate(
    source: str | Path | nn.Module,
    data: str | AnyData,
    *,
    test: str | None = None,
    weights: str | Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
    broken: str = "skip",
    device: str = "auto",
    per_class: bool = False,
    ground_truth: str | None = None,
    mc_dropout: int = 0,
    out: str | Path | None = None,
    degradation: str | None = None,
    noise_seed: int | None = None,
    quantised: bool | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a network on the test images of a set, the test pixels of a scene, noisy pictures, or pairs.

    For hyperspectral scenes see :func:`excite.verbs.evaluate_scene.evaluate_scene`, for denoising
    :func:`excite.verbs.evaluate_denoising.evaluate_denoising`, for pairs of images and texts
    :func:`excite.verbs.evaluate_retrieval.evaluate_retrieval`; what follows is of images with classes.

    Of a set that is not split, these are the fifth of each class that training holds out as well, so that a run is
    never scored on images that it has learned from; for a spec with weights from elsewhere they are all images.

    The images are fed as the network's weights want it: as in the run's training, or as the published file, or what
    lies beside the file, says. What is given here goes before that. :class:`ImageData` keeps its own preprocessing.

    The network keeps the outputs that it was trained with. Where the set has as many classes, they are taken in
    sorted order; where it has others, its class folders must have the names of the network's classes (ImageNet's, or
    the WordNet ids that timm knows, for 1,000 outputs).

    Args:
        source: a run's folder, a network spec (with ``weights``), or a module.
        data: a data spec, or images of the user's own.
        test: a data spec of the test images, where ``data`` does not hold them.
        weights: for a spec: a file of weights, or the tag of published ones such as ``imagenet``.
        mean: per channel, of pixels in 0–1.
        std: likewise.
        image_size: side of the network's input in pixels.
        resize: what the shorter side is resized to before the centre is cropped, in pixels.
        interpolation: ``bilinear`` or ``bicubic``.
        broken: ``skip`` or ``refuse`` files that cannot be decoded.
        device: ``auto``, ``cpu``, ``cuda`` …
        per_class: add the accuracy of each class and the confusion matrix.
        ground_truth: of scenes: a file of labels, where it is not found.
        mc_dropout: of scenes: how often to ask with dropout left on, for a map of uncertainty.
        out: of scenes: where that map goes.
        degradation: of denoising: what spoils the pictures, such as ``gaussian:25``.
        noise_seed: of denoising: which noise.
        quantised: of denoising: whether the noisy pictures are rounded to 8 bits.
        progress: show bars on stderr.

    Returns:
        ``{"metrics": {"top1", "top5", "loss"}, "samples": "images", "count"}``, percentages as 0–100, and with
        ``per_class`` also
        ``classes`` (of the network's outputs), ``per_class`` (percent, None for a class without images) and
        ``confusion`` (true classes in rows).

    Raises:
        UsageError: the network and the data do not fit together.
        ExciteError: the weights or the images cannot be read or fetched.
    """
    wishes: dict[str, Any] = {
        "mean": mean,
        "std": std,
        "image_size": image_size,
        "resize": resize,
        "interpolation": interpolation,
    }
    of_scenes = {"ground_truth": ground_truth, "mc_dropout": mc_dropout or None, "out": out}
    of_denoising: dict[str, Any] = {"degradation": degradation, "noise_seed": noise_seed, "quantised": quantised}
    if isinstance(data, DenoisingData) or (isinstance(data, str) and is_denoising(data)):
        refuse_options(wishes | {"per_class": per_class or None}, data, "is for denoising", "images with classes")
        refuse_options(of_scenes, data, "is for denoising", "hyperspectral scenes")
        return evaluate_denoising(
            source,
            data,
            test=test,
            weights=weights,
            **of_denoising,
            broken=broken,
            device=device,
            progress=progress,
        )
    if isinstance(data, CrossmodalData) or (isinstance(data, str) and is_crossmodal(data)):
        images_only = wishes | {"per_class": per_class or None, "weights": weights}
        refuse_options(images_only, data, "holds pairs of images and texts", "images with classes")
        refuse_options(of_scenes, data, "holds pairs of images and texts", "hyperspectral scenes")
        refuse_options(of_denoising, data, "holds pairs of images and texts", "denoising")
        return evaluate_retrieval(source, data, test=test, broken=broken, device=device, progress=progress)
    if isinstance(data, SceneData) or (isinstance(data, str) and is_scene(data)):
        unused = None if broken == "skip" else broken
        images_only = wishes | {"test": test, "weights": weights, "broken": unused}
        refuse_options(images_only, data, "is a hyperspectral scene", "images")
        refuse_options(of_denoising, data, "is a hyperspectral scene", "denoising")
        return evaluate_scene(
            source,
            data,
            ground_truth=ground_truth,
            mc_dropout=mc_dropout,
            out=out,
            device=device,
            per_class=per_class,
            progress=progress,
        )
    refuse_options(of_scenes, data, "holds images with classes", "hyperspectral scenes")
    refuse_options(of_denoising, data, "holds images with classes", "denoising")
    channels = data.preprocessing.channels if isinstance(data, ImageData) else None
    opened = open_network(source, weights, channels, progress)
    if isinstance(data, ImageData):
        images = replace(data, preprocessing=adjusted(data.preprocessing, **wishes))
    else:
        with bar("reading images", progress) as step:
            images = load_data(
                data,
                test=test,
                preprocessing=opened.preprocessing,
                **wishes,
                broken=broken,
                classes=opened.classes if opened.of == "run" else None,
                all_for_test=opened.of == "file",
                progress=step,
            )
    split = images.test or images.train
    assert split is not None
    names = opened.classes or images.classes
    if opened.of in ("file", "loaded"):
        split, names = onto_outputs(split, images, opened, device)
    with bar("evaluating", progress) as step:
        scored = scores.score(opened.network, split, images.preprocessing, images.task, device, step)
    result: dict[str, Any] = {"metrics": scored.metrics, "samples": "images", "count": scored.count}
    if per_class:
        result |= scores.per_class(scored, names)
    return result


def refuse_options(given: Mapping[str, Any], data: str | AnyData, what: str, others: str) -> None:
    """Refuse what makes no sense for data of a kind.

    Args:
        given: options by name, None where they were not given.
        data: what is to be evaluated on.
        what: of what kind it is.
        others: what the options are for.

    Raises:
        UsageError: an option of another kind of data was given.
    """
    if named := [name for name, value in given.items() if value is not None]:
        name = data if isinstance(data, str) else data.name
        raise UsageError(f"{name} {what}, and {named[0]} is an option for {others}: leave it out.")


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
    was_training = network.training
    network.eval().to(where)
    try:
        with torch.inference_mode():
            logits = network(black.to(where))
    finally:
        network.train(was_training)
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
    if outputs == len(given) and sum(bool(_places(name, known)) for name in given) < outputs / 2:
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
    found = _places(name, known)
    if len(found) == 1:
        return found[0]
    if found:
        both = " or ".join(f"{known[i]!r} (number {i})" for i in found)
        raise UsageError(f"The class {name!r} in {data} may be the network's {both}: rename it.")
    hint = nearest(name, list(known)) or "name the folder like the class, or by its WordNet id."
    raise UsageError(f"The class {name!r} in {data} is none of the {len(known)} classes of the network: {hint}")


def _places(name: str, known: tuple[str, ...]) -> list[int]:
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

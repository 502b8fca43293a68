"""``evaluate``: the scores of a trained network on a set of images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from excite.data import ImageData
from excite.data.crossmodal import CrossmodalData, is_crossmodal
from excite.data.cube import is_scene
from excite.data.denoising import DenoisingData, is_denoising
from excite.data.hyperspectral import SceneData
from excite.errors import UsageError
from excite.training.recipe_data import AnyData
from excite.verbs.evaluate_denoising import evaluate_denoising
from excite.verbs.evaluate_images import Asking, Source, Weights, evaluate_images
from excite.verbs.evaluate_retrieval import evaluate_retrieval
from excite.verbs.evaluate_scene import evaluate_scene
from excite.verbs.protocols import parse_protocol


def evaluate(
    source: Source | Sequence[Source],
    data: str | AnyData,
    *,
    test: str | None = None,
    weights: Weights | Sequence[Weights] = None,
    protocol: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
    broken: str = "skip",
    device: str = "auto",
    workers: int = 0,
    per_class: bool = False,
    calibration: bool = False,
    temperature: bool = False,
    calibration_data: str | ImageData | None = None,
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

    Several networks answer together: the mean of their probabilities is scored. Each is fed as its own weights want
    it, and its classes are found by their names. A protocol with several views of each image averages the
    probabilities over these, too.

    Args:
        source: a run's folder, a network spec (with ``weights``), or a module; or several of these.
        data: a data spec, or images of the user's own.
        test: a data spec of the test images, where ``data`` does not hold them.
        weights: for a spec: a file of weights, or the tag of published ones such as ``imagenet``; for several specs
            one for all, or one for each.
        protocol: which views of each image are shown, see :func:`excite.verbs.protocols.parse_protocol`; by default
            the one of the preprocessing.
        mean: per channel, of pixels in 0–1.
        std: likewise.
        image_size: side of the network's input in pixels.
        resize: what the shorter side is resized to before the centre is cropped, in pixels.
        interpolation: ``bilinear`` or ``bicubic``.
        broken: ``skip`` or ``refuse`` files that cannot be decoded.
        device: ``auto``, ``cpu``, ``cuda`` …
        workers: processes that read images ahead.
        per_class: add the accuracy of each class and the confusion matrix.
        calibration: add how far confidence is from accuracy (:func:`excite.verbs.calibration.calibration`).
        temperature: fit a temperature, and add what it changes; see :func:`excite.verbs.calibration.fit_temperature`.
        calibration_data: what it is fitted on; by default the run's validation images, and never test images.
        ground_truth: of scenes: a file of labels, where it is not found.
        mc_dropout: of scenes: how often to ask with dropout left on, for a map of uncertainty.
        out: of scenes: where that map goes.
        degradation: of denoising: what spoils the pictures, such as ``gaussian:25``.
        noise_seed: of denoising: which noise.
        quantised: of denoising: whether the noisy pictures are rounded to 8 bits.
        progress: show bars on stderr.

    Returns:
        ``{"metrics": {"top1", "top5", "loss"}, "errors": {"top1", "top5"}, "samples": "images", "count"}``,
        percentages as 0–100. With ``protocol`` also its ``name`` with all numbers and the ``views`` of each image; of
        several networks the ``members``, each with its ``source``, ``metrics`` and ``errors``. With ``per_class``
        also ``classes`` (of the network's outputs), ``per_class`` (percent, None for a class without images) and
        ``confusion`` (true classes in rows). With ``calibration`` also ``calibration``; with ``temperature`` also
        ``{"temperature": {"temperature", "fitted_on", "before", "after"}}``: on how many images it was fitted, and
        ``loss`` and calibration on the test images.

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
    sources = [source] if isinstance(source, str | Path | nn.Module) else list(source)
    if not sources:
        raise UsageError("There is nothing to evaluate: name a run, a spec with weights, or a module.")
    of_classes: dict[str, Any] = {
        "protocol": protocol,
        "workers": workers or None,
        "calibration": calibration or None,
        "temperature": temperature or None,
        "calibration_data": calibration_data,
    }
    of_scenes = {"ground_truth": ground_truth, "mc_dropout": mc_dropout or None, "out": out}
    of_denoising: dict[str, Any] = {"degradation": degradation, "noise_seed": noise_seed, "quantised": quantised}
    if isinstance(data, DenoisingData) or (isinstance(data, str) and is_denoising(data)):
        images_only = wishes | of_classes | {"per_class": per_class or None}
        refuse_options(images_only, data, "is for denoising", "images with classes")
        refuse_options(of_scenes, data, "is for denoising", "hyperspectral scenes")
        alone, own = only_one(sources, weights, data)
        return evaluate_denoising(
            alone,
            data,
            test=test,
            weights=own,
            **of_denoising,
            broken=broken,
            device=device,
            progress=progress,
        )
    if isinstance(data, CrossmodalData) or (isinstance(data, str) and is_crossmodal(data)):
        images_only = wishes | of_classes | {"per_class": per_class or None, "weights": weights or None}
        refuse_options(images_only, data, "holds pairs of images and texts", "images with classes")
        refuse_options(of_scenes, data, "holds pairs of images and texts", "hyperspectral scenes")
        refuse_options(of_denoising, data, "holds pairs of images and texts", "denoising")
        alone, _ = only_one(sources, weights, data)
        return evaluate_retrieval(alone, data, test=test, broken=broken, device=device, progress=progress)
    if isinstance(data, SceneData) or (isinstance(data, str) and is_scene(data)):
        unused = None if broken == "skip" else broken
        images_only = wishes | of_classes | {"test": test, "weights": weights or None, "broken": unused}
        refuse_options(images_only, data, "is a hyperspectral scene", "images")
        refuse_options(of_denoising, data, "is a hyperspectral scene", "denoising")
        alone, _ = only_one(sources, weights, data)
        return evaluate_scene(
            alone,
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
    if calibration_data is not None and not temperature:
        raise UsageError("calibration_data is what a temperature is fitted on: ask for temperature, or leave it out.")
    asked = parse_protocol(protocol) if protocol is not None else None
    if asked and (image_size or resize):
        raise UsageError("The protocol says the sizes: leave image_size and resize out, or name no protocol.")
    asking = Asking(wishes, asked, broken, device, workers, progress)
    return evaluate_images(
        sources,
        data,
        test=test,
        weights=weights_of(sources, weights),
        asking=asking,
        per_class=per_class,
        calibration=calibration,
        temperature=temperature,
        calibration_data=calibration_data,
    )


def only_one(
    sources: Sequence[Source], weights: Weights | Sequence[Weights], data: str | AnyData
) -> tuple[Source, Weights]:
    """The one network, with its weights, that such data is for.

    Raises:
        UsageError: there are several.
    """
    if len(sources) != 1:
        name = data if isinstance(data, str) else data.name
        raise UsageError(f"{name} is for one network at a time: several answer together about images with classes.")
    return sources[0], weights_of(sources, weights)[0]


def weights_of(sources: Sequence[Source], given: Weights | Sequence[Weights]) -> list[Weights]:
    """The weights of each source: one for all specs, or one for each of them in turn.

    Raises:
        UsageError: there are neither one nor as many as specs.
    """
    listed = [given] if given is None or isinstance(given, str | Path) else list(given) or [None]
    if len(sources) == 1 and len(listed) == 1:
        return listed
    is_spec = [not isinstance(one, nn.Module) and not (Path(one) / "recipe.yaml").is_file() for one in sources]
    if listed == [None]:
        return [None] * len(sources)  # which is refused where a spec needs some
    if len(listed) not in (1, sum(is_spec)) or not any(is_spec):
        raise UsageError(
            f"{len(listed)} weights for {sum(is_spec)} specs: give one for each, in their order, or one for all."
        )
    own = itertools.cycle(listed)
    return [next(own) if spec else None for spec in is_spec]


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

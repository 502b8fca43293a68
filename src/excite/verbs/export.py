"""``export``: a trained classifier as a file that runs without excite, verified against the original."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excite.data import ImageData, Loader, Preprocessing, Split, load_data
from excite.data.crossmodal import is_crossmodal
from excite.data.cube import is_scene
from excite.data.denoising import is_denoising
from excite.deploy import export as files
from excite.errors import ExciteError, UsageError
from excite.files import check_writable
from excite.training.bars import Step, bar
from excite.training.recipe_data import load_recipe_data
from excite.training.run import Run
from excite.verbs.opened import Opened, count_outputs, onto_outputs, open_network, output_classes
from excite.verbs.predict import usual_preprocessing

log = logging.getLogger(__name__)

CALIBRATION = 300
"""So many training images the scales of 8 bits are taken from."""
COMPARED = 256
"""On so many images the file's answers are held against the original's."""
BATCH = 64


def export(
    source: str | Path,
    to: str = "onnx",
    *,
    weights: str | Path | None = None,
    precision: str = "fp32",
    dynamic_batch: bool = False,
    data: str | ImageData | None = None,
    test: str | None = None,
    max_drop: float = 0.5,
    bake_preprocessing: bool = False,
    calibration: int = CALIBRATION,
    images: int | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Write a trained classifier of images as a file for an engine, and hold the file against the original.

    The network is first rewritten exactly (:func:`excite.deploy.rewrite.rewrite`). The written file is then read
    again by its engine and compared, on test images where there are any: its answers with the original's, and with
    labels its accuracy too.

    Args:
        source: a run's folder, or a network spec (with ``weights``).
        to: ``onnx``; ``openvino`` (its IR); or ``torch``, a program of ``torch.export``, with AOTInductor's machine
            code beside it where there is a C++ compiler.
        weights: for a spec: a file of weights, or the tag of published ones such as ``imagenet``.
        precision: ``fp32``; ``bf16`` (openvino, torch); or ``int8`` (onnx, openvino), quantised after training.
        dynamic_batch: leave the number of images open; else the file takes one at a time.
        data: images to calibrate and to verify on: a data spec, or images of the user's own; for a run by default
            what it was trained on.
        test: a data spec of the test images, where ``data`` does not hold them.
        max_drop: for ``int8``: how many points of accuracy it may cost.
        bake_preprocessing: normalise inside the file, which then takes pixels as uint8. Resizing stays outside.
        calibration: for ``int8``: how many training images the scales are taken from.
        images: verify on no more test images than this; by default on all.
        out: the folder; by default ``export/FORMAT-PRECISION`` in the run, or one named after the spec.
        progress: show bars on stderr.

    Returns:
        What ``model.json`` in the folder says, and ``out``, the folder. Its ``verification`` is ``{"images":
        what they are, "data", "count", "max_abs", "max_relative" (to the largest output), "top1_agreement" (percent),
        "accuracy": {"count", "before", "after"} or None}``, and with 8 bits ``int8`` is ``{"calibration": what the
        images are, "calibration_images", "worst_layers": [{"layer", "decibels"}…]}``.

    Raises:
        UsageError: no trained classifier, a format and precision that do not go together, 8 bits without data, or a
            package that is not installed.
        ExciteError: the network cannot be converted, the file does not answer as the original does, or 8 bits cost
            more than ``max_drop``; nothing is left in the folder then.
    """
    files.check_wish(to, precision)
    if max_drop < 0:
        raise UsageError(f"max_drop is {max_drop}: it is how many points of accuracy may be lost, at least 0.")
    if min(calibration, images or 1) < 1:
        raise UsageError("Calibrate and verify on at least one image.")
    opened = _open(source, weights, progress)
    folder = Path(out) if out is not None else _folder(source, to, precision)
    if (folder / "recipe.yaml").exists():
        raise UsageError(f"{folder} is a run: choose another folder for the export.")
    check_writable(folder / files.CARD)
    found = _images(source, opened, data, test, progress)
    preprocessing = found.preprocessing if found else opened.preprocessing or usual_preprocessing(str(source))
    outputs = count_outputs(opened.network, preprocessing, "cpu")
    classes = output_classes(opened, outputs) or (found.classes if found and len(found.classes) == outputs else None)
    calibrated: dict[str, Any] | None = None
    batches: Iterator[Tensor] = iter(())
    if precision == "int8":
        if found is None:
            raise UsageError("8 bits are calibrated on images like those in use: name some with --data.")
        split, what = _calibration_split(found)
        calibration = min(calibration, len(split))
        batch = min(25, calibration)
        calibrated = {"calibration": what, "calibration_images": calibration // batch * batch}
        batches = islice(_feed(split, preprocessing, bake_preprocessing, batch, shuffle=True), calibration // batch)
    example = torch.randn(
        2,
        preprocessing.channels,
        preprocessing.size,
        preprocessing.size,
        generator=torch.Generator().manual_seed(0),
    )
    with bar(f"making {to}", progress):
        done = files.package(
            opened.network,
            example,
            to,
            precision=precision,
            dynamic=dynamic_batch,
            calibration=batches,
            bake=preprocessing if bake_preprocessing else None,
        )
    with files.beside(folder) as made:
        names = done.write(made)
        card = files.describe(
            done,
            made,
            names,
            source=str(source),
            spec=str(source) if opened.of != "run" else str(Run(source).card["spec"]),
            classes=classes or [f"class {i}" for i in range(outputs)],
            preprocessing=preprocessing,
            baked=bake_preprocessing,
        )
        for note in done.notes:
            log.info("%s", note)
        run = files.engine(made, names, to, precision)
        with bar("verifying", progress) as step:
            compared = _verify(opened, run, found, preprocessing, done.dynamic, bake_preprocessing, images, step)
        card["verification"] = compared.said
        if calibrated is not None:
            card["int8"] = calibrated | {"worst_layers": []}
            _check_drop(card, done, compared, max_drop)
        elif precision == "fp32" and not compared.said["max_relative"] <= files.TOLERANCE:
            raise ExciteError(
                f"The {to} file does not answer as the network does: its outputs differ by "
                f"{compared.said['max_relative']:.1e} of the largest one. Nothing was written."
            )
        files.settle(made, folder, names, card)
    written: dict[str, Any] = json.loads((folder / files.CARD).read_text())
    return written | {"out": str(folder)}


def _open(source: str | Path, weights: str | Path | None, progress: bool) -> Opened:
    if (Path(source) / "recipe.yaml").is_file():
        task = Run(source).card["task"]
        if task != "classification":
            raise UsageError(f"{source} was trained for {task}: only classifiers of images are exported.")
    return open_network(source, weights, progress=progress)


def _folder(source: str | Path, to: str, precision: str) -> Path:
    if (Path(source) / "recipe.yaml").is_file():
        return Path(source) / "export" / f"{to}-{precision}"
    return Path(f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', str(source))}-{to}-{precision}")


# --- the images ----------------------------------------------------------------------------------------------------


def _images(
    source: str | Path, opened: Opened, data: str | ImageData | None, test: str | None, progress: bool
) -> ImageData | None:
    """The images to calibrate and to verify on, labelled by the network's outputs; None where there are none."""
    if data is None and opened.of == "run":
        recipe = Run(source).recipe
        try:
            loaded = load_recipe_data(recipe, progress)
        except ExciteError as error:
            log.warning("The images of %s cannot be read (%s): name others with --data", source, error)
            return None
        assert isinstance(loaded, ImageData)
        return loaded
    if data is None:
        return None
    if isinstance(data, ImageData):
        return data
    if is_scene(data) or is_denoising(data) or is_crossmodal(data):
        raise UsageError(f"{data} holds no images with classes: only classifiers of images are exported.")
    with bar("reading images", progress) as step:
        found = load_data(
            data,
            test=test,
            preprocessing=opened.preprocessing,
            classes=opened.classes if opened.of == "run" else None,
            all_for_test=opened.of == "file",
            progress=step,
        )
    if opened.of == "run":
        return found
    train, test_split = (
        onto_outputs(split, found, opened, "cpu")[0] if split is not None else None
        for split in (found.train, found.test)
    )
    return replace(found, train=train, test=test_split)


def _calibration_split(found: ImageData) -> tuple[Split, str]:
    if found.train is not None:
        return found.train, f"training images of {found.name}"
    assert found.test is not None
    log.warning(
        "%s holds no training images: 8 bits are calibrated on some of those that the accuracy is then measured on",
        found.name,
    )
    return found.test, f"test images of {found.name}"


def _feed(
    split: Split, preprocessing: Preprocessing, pixels: bool, batch: int, shuffle: bool = False
) -> Iterator[Tensor]:
    """Batches of a split as the file takes them."""
    for images, *_ in Loader(split, preprocessing, min(batch, len(split)), seed=0, shuffle=shuffle):
        yield _as_pixels(images, preprocessing) if pixels else images


def _as_pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The pixels that were normalised, uint8."""
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    return ((images * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


# --- verification --------------------------------------------------------------------------------------------------


@dataclass
class _Compared:
    """What a file was found to answer, and a few of the images for a closer look."""

    said: dict[str, Any]
    some: Tensor


def _verify(
    opened: Opened,
    run: Callable[[Tensor], Tensor],
    found: ImageData | None,
    preprocessing: Preprocessing,
    dynamic: bool,
    baked: bool,
    limit: int | None,
    step: Step | None,
) -> _Compared:
    split = (found.test or found.train) if found else None
    if split is None:
        log.warning("There are no images at hand: the file is verified on random ones, and its accuracy is not known")
        generator = torch.Generator().manual_seed(1)
        shape = (32, preprocessing.channels, preprocessing.size, preprocessing.size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
        std = torch.tensor(preprocessing.std).view(-1, 1, 1)
        batches: Any = [((pixels / 255 - mean) / std, None, None)]
        total, what = 1, "random images"
    else:
        batches = Loader(split, preprocessing, min(BATCH, len(split)), seed=0)
        total = len(batches)
        what = "test images" if found and found.test is not None else "training images"
    network = opened.network.eval()
    difference = largest = 0.0
    agreed = compared = count = before = after = 0
    some: Tensor | None = None
    for number, (images, labels, _) in enumerate(batches, start=1):
        if limit is not None and count + len(images) > limit:
            images, labels = images[: limit - count], labels[: limit - count] if labels is not None else None
        if not len(images):
            continue
        given = _as_pixels(images, preprocessing) if baked else images
        some = given if some is None else some
        with torch.inference_mode():
            wanted = network(images).float()
        answers = run(given) if dynamic else torch.cat([run(given[i : i + 1]) for i in range(len(given))])
        if compared < COMPARED:
            difference = max(difference, float((answers - wanted).abs().max()))
            largest = max(largest, float(wanted.abs().max()))
        compared += len(images)
        said, right = answers.argmax(1), wanted.argmax(1)
        agreed += int((said == right).sum())
        count += len(images)
        if labels is not None:
            before += int((right == labels).sum())
            after += int((said == labels).sum())
        if step:
            step(number, total)
        if count == limit:
            break
    assert some is not None
    accuracy = {"count": count, "before": 100 * before / count, "after": 100 * after / count}
    return _Compared(
        {
            "images": what,
            "data": found.name if found else None,
            "count": count,
            "max_abs": difference,
            "max_relative": difference / max(largest, 1e-30),
            "top1_agreement": 100 * agreed / count,
            "accuracy": accuracy if split is not None else None,
        },
        some,
    )


def _check_drop(card: dict[str, Any], done: files.Package, compared: _Compared, max_drop: float) -> None:
    """Refuse what 8 bits have made too inaccurate, and say where it went.

    Raises:
        ExciteError: the accuracy fell by more than allowed.
    """
    assert done.blame is not None
    worst = done.blame(compared.some)
    card["int8"]["worst_layers"] = [{"layer": one.layer, "decibels": round(one.decibels, 1)} for one in worst]
    accuracy = card["verification"]["accuracy"]
    drop = accuracy["before"] - accuracy["after"]
    if drop > max_drop:
        named = ", ".join(f"{one.layer} ({one.decibels:.0f} dB)" for one in worst[:3])
        raise ExciteError(
            f"8 bits cost {drop:.2f} points of accuracy ({accuracy['before']:.2f} → {accuracy['after']:.2f} % of "
            f"{accuracy['count']} images), more than {max_drop:g}, and nothing was written. The layers that lose "
            f"most, signal over error: {named}. Calibrate on more images, or allow for more with --max-drop."
        )

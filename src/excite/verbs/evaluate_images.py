"""``evaluate`` for images with classes: one network or several together, under a protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from excite.data import ImageData, Preprocessing, Split, load_data
from excite.data.images import BrokenImageError
from excite.data.load import adjusted
from excite.data.views import Views
from excite.errors import UsageError
from excite.tasks.classification import check_outputs, evaluation
from excite.training.bars import bar
from excite.training.fit import pick_device
from excite.training.run import Run
from excite.verbs.calibration import calibration as error_of_confidence
from excite.verbs.calibration import fit_temperature, scaled
from excite.verbs.opened import Opened, onto_outputs, open_network, places
from excite.verbs.protocols import Protocol
from excite.verbs.protocols_score import Answers, answers, together
from excite.verbs.scores import per_class as by_class

Source = str | Path | nn.Module
Weights = str | Path | None
_PROBES = 64
_GIVE_OTHERS = "give calibration data (--calibration-data)"


@dataclass(frozen=True)
class Asking:
    """How networks are asked.

    Attributes:
        wishes: what goes before a network's own preprocessing, as :func:`excite.data.load.adjusted` takes it.
        protocol: which views of each image; None for the one of the preprocessing.
        broken: ``skip`` or ``refuse`` images that cannot be decoded.
        device: ``auto``, ``cpu``, ``cuda`` …
        workers: processes that read images ahead.
        progress: show bars on stderr.
    """

    wishes: Mapping[str, Any]
    protocol: Protocol | None
    broken: str
    device: str
    workers: int
    progress: bool


@dataclass(frozen=True)
class _Images:
    """Where the images of a split come from.

    Attributes:
        data: a data spec, or images.
        test: a data spec of the test images, if ``data`` does not hold them.
        splits: which split it is: the first of these that there is.
        whole: of a set without splits take all images.
        options: others of :func:`excite.data.load_data`.
    """

    data: str | ImageData
    test: str | None
    splits: tuple[str, ...]
    whole: bool
    options: Mapping[str, Any]


@dataclass(frozen=True)
class _Shown:
    """A split as a network wants it, with the classes in the order of its outputs."""

    split: Split
    classes: tuple[str, ...]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class _Said:
    """What a network said of a split, without the images, which may be large.

    Attributes:
        answers: what it said.
        labels: of the images that it was asked about.
        key: which images these are.
        classes: in the order of its outputs.
        views: what it was shown of each image.
    """

    answers: Answers
    labels: Tensor
    key: tuple[str, ...]
    classes: tuple[str, ...]
    views: Views | None


def evaluate_images(
    sources: Sequence[Source],
    data: str | ImageData,
    *,
    test: str | None,
    weights: Sequence[Weights],
    asking: Asking,
    per_class: bool,
    calibration: bool,
    temperature: bool,
    calibration_data: str | ImageData | None,
) -> dict[str, Any]:
    """Score a network, or several by the mean of their probabilities; see :func:`excite.verbs.evaluate.evaluate`.

    Args:
        sources: runs, specs or modules.
        data: a data spec, or images of the user's own.
        test: a data spec of the test images, where ``data`` does not hold them.
        weights: for each source.
        asking: how they are asked.
        per_class: add the accuracy of each class and the confusion matrix.
        calibration: add how far confidence is from accuracy.
        temperature: fit one, and add what it changes.
        calibration_data: what it is fitted on, instead of the runs' validation images.
    """
    # All networks are shown the same images: those that one of them has learned from are left out for all.
    whole = not any(_is_run(source) for source in sources)
    tested = _Images(data, test, ("test", "train"), whole, {"broken": asking.broken})
    fitting = _fitting_images(sources, data, calibration_data, asking) if temperature else None
    on_test, on_fitting = [], []
    for source, own in zip(sources, weights, strict=True):
        channels = data.preprocessing.channels if isinstance(data, ImageData) else None
        opened = open_network(source, own, channels, asking.progress)
        shown = _show(opened, tested, asking)
        if fitting:
            others = _show(opened, fitting, asking)
            _refuse_common_images(others.split, shown.split)
            on_fitting.append(_ask(opened, others, asking))
        on_test.append(_ask(opened, shown, asking))
    said = _together(sources, on_test)
    scored = evaluation(said.answers.logits, said.labels)
    result: dict[str, Any] = {
        "metrics": scored.metrics,
        "errors": _errors(scored.metrics),
        "samples": "images",
        "count": scored.count,
    }
    if asking.protocol:
        result["protocol"] = _described(asking.protocol, on_test)
    if len(sources) > 1:
        result["members"] = [_member(*one, asking.protocol) for one in zip(sources, on_test, strict=True)]
    if per_class:
        result |= by_class(scored, said.classes)
    if calibration:
        result["calibration"] = error_of_confidence(said.answers.logits, said.labels)
    if fitting:
        result["temperature"] = _temperature(_together(sources, on_fitting), said)
    return result


# --- one network ----------------------------------------------------------------------------------------------------


def _is_run(source: Source) -> bool:
    return not isinstance(source, nn.Module) and (Path(source) / "recipe.yaml").is_file()


def _show(opened: Opened, wanted: _Images, asking: Asking) -> _Shown:
    """Load the images as the network wants them.

    Raises:
        UsageError: there is no such split, or its classes are not the network's.
    """
    images = _load(opened, wanted, asking)
    split = next((found for name in wanted.splits if (found := getattr(images, name)) is not None), None)
    if split is None:
        raise UsageError(f"'{images.name}' has no validation images to fit a temperature on: {_GIVE_OTHERS}.")
    classes = opened.classes or images.classes
    if opened.of in ("file", "loaded"):
        split, classes = onto_outputs(split, images, opened, asking.device)
    return _Shown(split, classes, images.preprocessing)


def _ask(opened: Opened, shown: _Shown, asking: Asking) -> _Said:
    """Ask the network about each image.

    Raises:
        UsageError: the protocol does not suit it, or there are more classes than it has outputs.
        ExciteError: no image can be read, or the output is not finite.
    """
    split = shown.split
    views = asking.protocol.views(shown.preprocessing) if asking.protocol else None
    with bar("evaluating", asking.progress) as step:
        said = answers(
            opened.network,
            split,
            shown.preprocessing,
            views,
            pick_device(asking.device),
            workers=asking.workers,
            step=step,
        )
    check_outputs(said.logits, split.labels, "images")
    key = tuple(split.names[i] for i in said.positions.tolist())
    return _Said(said, split.labels[said.positions], key, shown.classes, views)


def _load(opened: Opened, wanted: _Images, asking: Asking) -> ImageData:
    if isinstance(wanted.data, ImageData):
        return replace(wanted.data, preprocessing=adjusted(wanted.data.preprocessing, **asking.wishes))
    with bar("reading images", asking.progress) as step:
        return load_data(
            wanted.data,
            test=wanted.test,
            preprocessing=opened.preprocessing,
            **asking.wishes,
            **wanted.options,
            classes=opened.classes if opened.of == "run" else None,
            all_for_test=wanted.whole,
            own_size=asking.protocol is not None,
            progress=step,
        )


def _errors(metrics: Mapping[str, float]) -> dict[str, float]:
    """Top-1 and top-5 error in percent, as the papers' tables have them."""
    return {name: round(100 - metrics[name], 9) for name in ("top1", "top5") if name in metrics}


def _described(protocol: Protocol, said: Sequence[_Said]) -> dict[str, Any]:
    """The protocol with its numbers: what each network was shown, where that differs."""
    views = [one.views for one in said if one.views]
    names = dict.fromkeys(protocol.named(one) for one in views)
    return {"name": " / ".join(names), "views": len(views[0])}


# --- several networks -----------------------------------------------------------------------------------------------


def _together(sources: Sequence[Source], said: Sequence[_Said]) -> _Said:
    """The mean of the probabilities, in the first network's order of classes.

    Raises:
        UsageError: the networks have other classes, or were shown other images.
    """
    first = said[0]
    aligned = [first.answers]
    for source, other in zip(sources[1:], said[1:], strict=True):
        columns = _columns(_name(sources[0]), first.classes, _name(source), other.classes)
        if other.key != first.key or not torch.equal(torch.tensor(columns)[first.labels], other.labels):
            raise UsageError(f"{_name(sources[0])} and {_name(source)} were not shown the same images and classes.")
        aligned.append(replace(other.answers, logits=other.answers.logits[:, columns]))
    return replace(first, answers=together(aligned))


def _columns(first: str, classes: tuple[str, ...], second: str, others: tuple[str, ...]) -> list[int]:
    """For each class of the first network the second one's output for it.

    Raises:
        UsageError: they do not have the same classes.
    """
    if len(classes) == len(others):
        found = [places(name, others) for name in classes]
        if all(len(one) == 1 for one in found) and len({one[0] for one in found}) == len(found):
            return [one[0] for one in found]
        back = [places(name, classes) for name in others]
        if all(len(one) == 1 for one in back) and len({one[0] for one in back}) == len(back):
            return [int(i) for i in torch.tensor([one[0] for one in back]).argsort()]
    missing = next((name for name in classes if not places(name, others)), None)
    what = f"{missing!r} is none of the second's" if missing else f"they have {len(classes)} and {len(others)}"
    raise UsageError(f"{first} and {second} cannot answer together, their classes differ: {what}.")


def _member(source: Source, said: _Said, protocol: Protocol | None) -> dict[str, Any]:
    metrics = evaluation(said.answers.logits, said.labels).metrics
    member = {"source": _name(source), "metrics": metrics, "errors": _errors(metrics)}
    return member | ({"protocol": protocol.named(said.views)} if protocol and said.views else {})


def _name(source: Source) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


# --- temperature ----------------------------------------------------------------------------------------------------


def _fitting_images(
    sources: Sequence[Source], data: str | ImageData, given: str | ImageData | None, asking: Asking
) -> _Images:
    """The images that a temperature is fitted on: what was given for it, or the runs' validation images.

    Raises:
        UsageError: there are none that no network has learned from.
    """
    if given is not None:
        return _Images(given, None, ("val", "test", "train"), True, {"broken": asking.broken})
    if isinstance(data, ImageData):
        return _Images(data, None, ("val",), False, {})
    if not all(_is_run(source) for source in sources):
        raise UsageError(
            "A temperature is fitted on images that are neither for training nor for test, and only a run knows of "
            f"such: {_GIVE_OTHERS}."
        )
    settings = [Run.open(source).recipe.data for source in sources if not isinstance(source, nn.Module)]
    first = settings[0]
    own = [(one.path, one.test_path, one.val_fraction) for one in settings]
    for source, theirs in zip(sources[1:], own[1:], strict=True):
        if theirs != own[0]:
            raise UsageError(
                f"{_name(sources[0])} and {_name(source)} may have learned from each other's validation images: "
                f"{_GIVE_OTHERS}."
            )
    options = {"val_fraction": first.val_fraction, "broken": first.broken}
    return _Images(first.path, first.test_path, ("val",), False, options)


def _temperature(fitted: _Said, tested: _Said) -> dict[str, Any]:
    """The temperature of one split's answers, and what it makes of another's."""
    found = fit_temperature(fitted.answers.logits, fitted.labels)
    return {
        "temperature": found,
        "fitted_on": len(fitted.labels),
        "before": scaled(tested.answers.logits, tested.labels),
        "after": scaled(tested.answers.logits, tested.labels, found),
    }


def _refuse_common_images(fitted: Split, tested: Split) -> None:
    """Refuse to fit on test images: up to 64 that have names in common are compared.

    Raises:
        UsageError: an image is in both.
    """
    by_name = {Path(name).name: i for i, name in enumerate(tested.names)}
    common = [(i, by_name[Path(name).name]) for i, name in enumerate(fitted.names) if Path(name).name in by_name]
    for i, j in common[:: max(1, len(common) // _PROBES)]:
        with contextlib.suppress(BrokenImageError):
            if torch.equal(fitted.images[i][0], tested.images[j][0]):
                raise UsageError(
                    f"The temperature would be fitted on images of the test, such as {tested.names[j]}: give others."
                )

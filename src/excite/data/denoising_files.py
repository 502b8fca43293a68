"""Where clean images lie: the files of each split, in a folder, in a tar, or among those that come with scikit-image.

What cannot be read, has several frames or is too small is told of here, and left out or refused.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from excite.data.clean import CleanImages, FileImages, HeldImages, Stored, content_of, decode_deep, measure
from excite.data.draws import hold_out
from excite.data.encoded import FileSource, tell_broken
from excite.data.folder import FolderFiles
from excite.data.images import BrokenImageError, is_image_name
from excite.data.layout import SPLITS
from excite.data.tar import TarFiles
from excite.errors import ExciteError, UsageError

logger = logging.getLogger("excite.data")

KIND, PHOTOGRAPHS = "denoising", "photographs"
OWN_TEST_FRACTION = 0.2
# Of the pictures that come with scikit-image those that were taken by a camera of something that fills the picture.
_PHOTOGRAPHS = {
    "train": ("brick", "coffee", "grass", "gravel", "ihc", "moon", "motorcycle_left", "rocket"),
    "test": ("astronaut", "camera", "chelsea", "coins"),
}
_COLOUR = ("coffee", "ihc", "motorcycle_left", "rocket", "astronaut", "chelsea")


@dataclass(frozen=True)
class Part:
    """The images of one split.

    Attributes:
        source: where the files are.
        files: position of each in the source.
        names: relative to the split's folder.
        where: the path that was given, or the set's name.
        sizes: height and width of each, as soon as they are measured.
        item_sizes: bytes per value of each; likewise.
        reasons: why images were left out, by name.
    """

    source: FileSource
    files: tuple[int, ...]
    names: tuple[str, ...]
    where: str
    sizes: tuple[tuple[int, int], ...] = ()
    item_sizes: tuple[int, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def only(self, chosen: Sequence[int], **changes: Any) -> Part:
        """The images at the positions ``chosen``, with fields changed."""

        def of(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[i] for i in chosen) if values else ()

        kept = {key: of(getattr(self, key)) for key in ("files", "names", "sizes", "item_sizes")}
        return replace(self, **{**kept, **changes})

    def bytes_per_channel(self) -> int:
        """What all images take decoded, for each channel."""
        return sum(height * width * item for (height, width), item in zip(self.sizes, self.item_sizes, strict=True))


def find_splits(
    spec: str, test: str | None, val_fraction: float, channels: int, all_for_test: bool, memory_limit: int
) -> dict[str, Part]:
    """The images that a data spec names, by split; arguments as for :func:`excite.data.denoising.load_denoising`.

    Raises:
        UsageError: a path is missing, or holds no images of a kind that is needed.
        ExciteError: a folder or tar cannot be read.
    """
    if spec == PHOTOGRAPHS:
        if test is not None:
            raise UsageError(f"{PHOTOGRAPHS} have their own test images: leave out the test data {test!r}.")
        found = _photographs(channels)
    else:
        found = _found(_path(spec), memory_limit)
        if test is not None:
            found = {**_training_part(found, spec), "test": _test_part(test, memory_limit)}
        elif "" in found:
            found = {"test": found[""]} if all_for_test else _hold_out_test(found[""], spec)
        elif "test" not in found and "val" in found:
            found = {**{name: part for name, part in found.items() if name == "train"}, "test": found["val"]}
    if val_fraction and "val" in found:
        raise UsageError(f"{spec} has its own val/ folder: leave val_fraction at 0.")
    if val_fraction and "train" in found:
        rest, held = _halves(found["train"], val_fraction)
        found = {**found, "train": rest, **({"val": held} if held.files else {})}
    return found


def _path(spec: str) -> str:
    kind, _, path = spec.partition(":")
    if kind != KIND or not path:
        raise UsageError(f"{spec!r} names no images to denoise: write '{KIND}:PATH' or '{PHOTOGRAPHS}'.")
    return path


def _photographs(channels: int) -> dict[str, Part]:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise UsageError(
            f"The {PHOTOGRAPHS} come with scikit-image, which is not installed: pip install 'excite[denoising]'."
        )
    source = FolderFiles(Path(package.origin).parent / "data")
    stems = {Path(name).stem: i for i, name in enumerate(source.names) if is_image_name(name)}

    def part(names: Sequence[str]) -> Part:
        there = [name for name in names if name in stems and (channels == 1 or name in _COLOUR)]
        files = tuple(stems[name] for name in there)
        return Part(source, files, tuple(source.names[i] for i in files), PHOTOGRAPHS)

    return {split: part(names) for split, names in _PHOTOGRAPHS.items()}


def _source(path: str, memory_limit: int) -> tuple[FileSource, str]:
    """Where the files of a path are, and the folder inside a tar, with a slash."""
    if Path(path).is_dir():
        return FolderFiles(path), ""
    for parent in (Path(path), *Path(path).parents):
        if parent.is_file():
            if is_image_name(parent.name):
                raise UsageError(f"{path} is an image: give the folder that it is in.")
            inside = Path(path).relative_to(parent).as_posix()
            return TarFiles(parent, memory_limit), "" if inside == "." else f"{inside}/"
    raise UsageError(f"There is no folder or tar {path}.")


def _found(path: str, memory_limit: int) -> dict[str, Part]:
    """The images below a path by split, under ``""`` where it has none."""
    source, prefix = _source(path, memory_limit)
    images: list[tuple[tuple[str, ...], int]] = []
    for position, name in enumerate(source.names):
        steps = tuple(name.removeprefix(prefix).split("/"))
        hidden = any(step.startswith(".") or step == "__MACOSX" for step in steps)
        if name.startswith(prefix) and not hidden and is_image_name(name):
            images.append((steps, position))
    images.sort()
    if not images:
        raise UsageError(f"{path} holds no images: expected are files like 1.png, or train/1.png and test/9.png.")

    depth = _wrapper_depth([steps for steps, _ in images])
    tops = {steps[depth].lower() for steps, _ in images if len(steps) > depth + 1}
    known = {SPLITS[top] for top in tops if top in SPLITS}
    if not known or not (len(known) > 1 or tops <= set(SPLITS)):
        return {"": Part(source, tuple(i for _, i in images), tuple("/".join(steps) for steps, _ in images), path)}
    members: dict[str, list[tuple[str, int]]] = {name: [] for name in ("train", "val", "test") if name in known}
    outside = 0
    for steps, position in images:
        split = SPLITS.get(steps[depth].lower()) if len(steps) > depth + 1 else None
        if split is None:
            outside += 1
        else:
            members[split].append(("/".join(steps[depth + 1 :]), position))
    if outside:
        logger.info("%s: %d images left out that are in none of %s", path, outside, ", ".join(members))
    return {
        split: Part(source, tuple(i for _, i in part), tuple(name for name, _ in part), path)
        for split, part in members.items()
    }


def _wrapper_depth(images: Sequence[tuple[str, ...]]) -> int:
    """How many folders merely wrap the set: ``photos/train/1.jpg`` has one, ``photos``."""
    depth = 0
    while True:
        tops = {steps[depth] if len(steps) > depth + 1 else "" for steps in images}
        if len(tops) != 1 or "" in tops or next(iter(tops)).lower() in SPLITS:
            return depth
        depth += 1


def _training_part(found: dict[str, Part], spec: str) -> dict[str, Part]:
    if "test" in found and "train" in found:
        logger.info("%s: its own test/ is not used, as test data are given apart", spec)
    train = found.get("train") or found.get("")
    if train is None:
        raise UsageError(f"{spec} holds no training images, only {', '.join(sorted(found))}/.")
    return {"train": train, **({"val": found["val"]} if "val" in found else {})}


def _test_part(test: str, memory_limit: int) -> Part:
    path = _path(test) if test.startswith(f"{KIND}:") else test
    found = _found(path, memory_limit)
    for name in ("test", "val", ""):
        if name in found:
            return found[name]
    raise UsageError(f"{path} is given as test data, but holds only training images (train/).")


def _hold_out_test(part: Part, spec: str) -> dict[str, Part]:
    train, test = _halves(part, OWN_TEST_FRACTION)
    if not test.files:
        logger.warning("%s has a single image, which is for training: there is none for test", spec)
        return {"train": train}
    logger.warning(
        "%s has no test split: %d of its %d images, a fifth, are held out for test",
        spec,
        len(test.files),
        len(part.files),
    )
    return {"train": train, "test": test}


def _halves(part: Part, fraction: float) -> tuple[Part, Part]:
    """What is left, and what is held out: always the same images, whatever the seed of a run."""
    held = hold_out(np.zeros(len(part.files), dtype=np.int64), part.names, fraction, 0)
    return part.only(np.flatnonzero(~held).tolist()), part.only(np.flatnonzero(held).tolist())


def measured(part: Part) -> Part:
    """With sizes, and without what has no size."""
    sizes: dict[int, tuple[int, int, int]] = {}

    def look(i: int) -> None:
        sizes[i] = measure(content_of(part.source, part.files[i]))

    reasons = _each(look, len(part.files))
    good = [i for i in range(len(part.files)) if i in sizes]
    return part.only(
        good,
        sizes=tuple(sizes[i][:2] for i in good),
        item_sizes=tuple(sizes[i][2] for i in good),
        reasons={part.names[i]: reason for i, reason in reasons.items()},
    )


def without_small(part: Part, patch: int, broken: str) -> Part:
    """Without the images in which no patch fits; a log line names them.

    Raises:
        UsageError: none is left, or ``broken`` is ``"refuse"``.
    """
    small = [i for i, size in enumerate(part.sizes) if min(size) < patch]
    if not small:
        return part
    shown = ", ".join(f"{part.names[i]} ({part.sizes[i][0]}×{part.sizes[i][1]})" for i in small[:5])
    more = f", and {len(small) - 5} more" if len(small) > 5 else ""
    count = f"{len(small)} of {len(part.files)}"
    what = f"{count} training images of {part.where} are smaller than a patch of {patch} pixels"
    if broken == "refuse" or len(small) == len(part.files):
        raise UsageError(f"{what}: {shown}{more}. Choose a smaller patch, or leave them out.")
    logger.warning("%s and skipped: %s%s", what, shown, more)
    kept = sorted(set(range(len(part.files))) - set(small))
    return part.only(kept)


def decoded(
    part: Part, channels: int, split: str, broken: str, hold: bool, step: Callable[[int], object]
) -> tuple[tuple[str, ...], CleanImages, tuple[str, ...]]:
    """Names and images of what can be decoded, and names of what cannot; a log line tells why.

    Where the images do not fit in memory, those for training are left to be looked at when they are needed; held-out
    ones are decoded once all the same, since a score must not break off in the middle.

    Raises:
        ExciteError: no image is left, or one is broken and ``broken`` is ``"refuse"``.
    """
    pixels: dict[int, Stored] = {}
    failed: dict[int, str] = {}

    def look(i: int) -> None:
        image = decode_deep(content_of(part.source, part.files[i]), channels)
        if hold:
            pixels[i] = image

    if hold or split != "train":
        failed = _each(look, len(part.files), step)
    reasons = {**part.reasons, **{part.names[i]: reason for i, reason in failed.items()}}
    names = sorted(reasons)
    good = [i for i in range(len(part.files)) if i not in failed]
    if not good:
        shown = "; ".join(f"{name} ({reasons[name]})" for name in names[:3]) + ("; …" if len(names) > 3 else "")
        raise ExciteError(f"None of the {split} images of {part.where} can be read: {shown}.")
    if names:
        tell_broken(names, [reasons[name] for name in names], broken == "refuse")
    kept = part.only(good)
    if hold:
        return kept.names, HeldImages([pixels[i] for i in good]), tuple(names)
    left = FileImages(part.source, kept.files, kept.sizes, kept.item_sizes, channels, broken == "refuse")
    return kept.names, left, tuple(names)


def _each(
    look: Callable[[int], None], count: int, step: Callable[[int], object] = lambda done: None
) -> dict[int, str]:
    """Run ``look`` for all images in threads; why it failed for some."""
    reasons: dict[int, str] = {}

    def one(i: int) -> None:
        try:
            look(i)
        except BrokenImageError as error:
            reasons[i] = str(error)

    for done, _ in enumerate(_in_threads(one, count), start=1):
        step(done)
    return reasons


def _in_threads(work: Callable[[int], None], count: int) -> Iterator[None]:
    # Pillow and the file system release the interpreter lock while they decode and read.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, range(count))

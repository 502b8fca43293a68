"""Which split and class a file belongs to, judged by its path alone.

Folders and tars share this: ``[wrapper/…][train|val|test]/class/…/image.jpg``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from excite.data.images import is_image_name

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass
class Part:
    """The images of one split.

    Attributes:
        files: position of each image in the list of all files, sorted by class and name.
        classes: the class folder of each image.
        folders: all class folders, with or without images.
    """

    files: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


@dataclass
class Layout:
    """What was found.

    Attributes:
        parts: by split name (``train``, ``val``, ``test``); by ``""`` where the set has no splits.
        ignored: how many files were left out, by reason.
    """

    parts: dict[str, Part]
    ignored: Counter[str]


def read_layout(files: Sequence[str], folders: Iterable[str]) -> Layout:
    """Sort files into splits and classes.

    Args:
        files: paths relative to the root, with ``/``.
        folders: the same for the folders, so that an empty class is noticed.
    """
    ignored: Counter[str] = Counter()
    images: list[tuple[tuple[str, ...], int]] = []
    for position, name in enumerate(files):
        steps = tuple(name.split("/"))
        if _hidden(steps):
            ignored["hidden"] += 1
        elif not is_image_name(name):
            ignored["not an image by its suffix"] += 1
        else:
            images.append((steps, position))
    images.sort()
    folder_steps = [steps for folder in folders if not _hidden(steps := tuple(folder.split("/")))]

    wrapper = _wrapper([steps for steps, _ in images])
    depth = len(wrapper)
    has_splits = _has_splits({steps[depth] for steps, _ in images if len(steps) > depth + 1})

    parts: dict[str, Part] = {}
    for folder in folder_steps:
        if folder[:depth] == wrapper and (place := _place((*folder[depth:], ""), has_splits)):
            parts.setdefault(place[0], Part()).folders.add(place[1])
    for steps, position in images:
        inside = _place(steps[depth:], has_splits)
        if inside is None:
            ignored["in no class folder"] += 1
            continue
        part = parts.setdefault(inside[0], Part())
        part.files.append(position)
        part.classes.append(inside[1])
        part.folders.add(inside[1])
    return Layout({name: part for name, part in parts.items() if part.files or not has_splits}, ignored)


def _hidden(steps: tuple[str, ...]) -> bool:
    return any(step.startswith(".") or step == "__MACOSX" for step in steps)


def _wrapper(images: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that merely wrap the set: ``photos/train/cat/1.jpg`` has one, ``photos``."""
    wrapper: tuple[str, ...] = ()
    while True:
        depth = len(wrapper)
        tops = {steps[depth] for steps in images if len(steps) >= depth + 2}
        deep = [steps for steps in images if len(steps) >= depth + 3]
        # A lone folder is a wrapper if most images lie at least two folders deep inside it; a lone train/ is a
        # split, and a lone class is refused later.
        if len(tops) != 1 or next(iter(tops)).lower() in SPLITS or 2 * len(deep) <= len(images):
            return wrapper
        wrapper = deep[0][: depth + 1]


def _has_splits(tops: set[str]) -> bool:
    known = {SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    # A class may be called "train"; beside other classes it is a split only with its counterpart.
    return bool(known) and (len(known) > 1 or all(top.lower() in SPLITS for top in tops))


def _place(steps: tuple[str, ...], has_splits: bool) -> tuple[str, str] | None:
    """(split, class) of a path below the wrapper whose last step is the file; None if it is in no class."""
    if not has_splits:
        return ("", steps[0]) if len(steps) >= 2 else None
    if len(steps) < 3 or steps[0].lower() not in SPLITS:
        return None
    return SPLITS[steps[0].lower()], steps[1]

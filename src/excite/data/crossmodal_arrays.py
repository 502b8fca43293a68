"""Pairs whose images and texts are vectors already, in ``.mat``, ``.npy`` or ``.npz`` files of known names.

* Of the Wikipedia set (Rasiwasia et al. 2010): ``X1`` (d, N) images, ``X2`` (t, N) texts, ``Y`` (classes, N), and
  ``ind_train`` and ``ind_test``, which count from 1; at the top of the file or in structs.
* Of DSCMR's authors (Zhen et al. 2019): ``train_img`` (N, d), ``train_txt`` (N, t), ``train_img_lab`` (N, 1) or
  (N, classes), perhaps ``train_txt_lab``, and the same for ``test_…`` and perhaps ``val_…``; in one file, or as
  theirs in a folder with a file for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excite.data.arrays import StoredArray, listing
from excite.data.crossmodal_inputs import Floats
from excite.data.crossmodal_mat import named_arrays
from excite.data.crossmodal_pairs import Mask, Pairs
from excite.errors import ExciteError, UsageError

SUFFIXES = (".mat", ".npz")

_SPLITS = ("train", "val", "test")
_PARTS = ("img", "txt", "img_lab", "txt_lab")
_NAMES = tuple(f"{split}_{part}" for split in _SPLITS for part in _PARTS)
_BLOCK = 1 << 24  # bytes of the file that are worked on at once

_Arrays = Mapping[str, StoredArray]


def holds_arrays(path: Path) -> bool:
    """Whether a path is a file of arrays, or a folder with a file for each."""
    return (path.is_file() and path.suffix.lower() in SUFFIXES) or (path.is_dir() and bool(_files(path)))


def array_pairs(path: Path) -> dict[str, Pairs]:
    """The pairs of a file or folder by split, under ``""`` where it has none.

    Raises:
        UsageError: there are no arrays of these names, they do not have the same number of pairs, or a pair has no
            label or other ones for its image than for its text.
        ExciteError: a file cannot be read, or holds a value that is not a finite number.
    """
    files = [path] if path.is_file() else _files(path)
    arrays: dict[str, StoredArray] = {}
    found: list[StoredArray] = []
    for file in files:
        own = named_arrays(file)
        found += own
        for array in own:
            # In a file of its own an array may have any name.
            name = file.stem if path.is_dir() and len(own) == 1 else array.name.rpartition(".")[2]
            arrays.setdefault(name, array)
    for names, read in ((("X1", "X2", "Y"), _wikipedia), (("train_img", "train_txt", "train_img_lab"), _authors)):
        if all(name in arrays for name in names):
            return read(path, arrays)
    if "test_img" in arrays and "test_txt" in arrays:
        return _authors(path, arrays)
    raise UsageError(
        f"{path} holds {listing(found) or 'no arrays'}: expected are X1, X2, Y, ind_train and ind_test, or "
        "train_img, train_txt, train_img_lab and the same for test."
    )


def vectors(array: StoredArray, where: Path, pairs: int | None = None, columns: bool = False) -> Floats:
    """An array of vectors as float32 (N, d).

    Args:
        array: (N, d), or (d, N) where ``columns`` is set.
        where: its file, for messages.
        pairs: how many vectors there should be.
        columns: whether a vector is a column.

    Raises:
        UsageError: it is not of real numbers, has other axes, or holds another number of vectors.
        ExciteError: it cannot be read, or holds a value that is not a finite number.
    """
    _check_kind(array, where)
    shape = "×".join(map(str, array.shape))
    if len(array.shape) != 2 or 0 in array.shape:
        order = "numbers × pairs" if columns else "pairs × numbers"
        raise UsageError(f"{array.name or 'The array'} in {where} is of {shape} numbers: expected are {order}.")
    if pairs is not None and array.shape[columns] != pairs:
        raise UsageError(
            f"{array.name or 'The array'} in {where} is of {shape} numbers, which is {array.shape[columns]:,} "
            f"vectors for {pairs:,} pairs: every pair needs one."
        )
    stored = array.read()
    stored = stored.T if columns else stored
    out = np.empty(stored.shape, dtype=np.float32)
    step = max(_BLOCK // (8 * stored.shape[1]), 1)
    with np.errstate(over="ignore"):  # what is too large is told of below
        for start in range(0, len(out), step):
            out[start : start + step] = stored[start : start + step]
    broken = ~np.isfinite(out).all(axis=1)
    if broken.any():
        count, first = int(broken.sum()), int(broken.argmax()) + 1
        raise ExciteError(
            f"{array.name or 'The array'} in {where} holds values that are not finite numbers (NaN, infinite, or too "
            f"large for float32) in {count:,} of {len(out):,} vectors, of which number {first} is the first: mend "
            "them, or leave these pairs out."
        )
    return out


def _files(folder: Path) -> list[Path]:
    suffixes = (*SUFFIXES, ".npy")
    return sorted(file for file in folder.iterdir() if file.stem in _NAMES and file.suffix.lower() in suffixes)


def _wikipedia(path: Path, arrays: _Arrays) -> dict[str, Pairs]:
    images = vectors(arrays["X1"], path, columns=True)
    texts = vectors(arrays["X2"], path, columns=True)
    _same_number(path, {"X1": len(images), "X2": len(texts)}, " (a vector is a column of X1 and X2)")
    names = tuple(f"pair {i + 1}" for i in range(len(images)))
    labels, classes = _labels(arrays["Y"], path, len(images), names, columns=True)
    pairs = Pairs(str(path), names, images, texts, labels, classes)
    given = {
        split: _places(arrays[f"ind_{split}"], path, len(pairs)) for split in _SPLITS if f"ind_{split}" in arrays
    }
    seen: dict[int, str] = {}
    for split, places in given.items():
        for place in places.tolist():
            if place in seen:
                raise UsageError(
                    f"In {path}, pair {place + 1} is in ind_{seen[place]} and again in ind_{split}: each pair is for "
                    "one purpose, once."
                )
            seen[place] = split
    return {split: pairs.only(places) for split, places in given.items()} or {"": pairs}


def _places(array: StoredArray, path: Path, pairs: int) -> npt.NDArray[np.int64]:
    _check_kind(array, path)
    values = array.read().ravel()
    places = np.nan_to_num(values, nan=-1).astype(np.int64)
    if (places != values).any() or (len(places) and not 1 <= places.min() <= places.max() <= pairs):
        raise UsageError(
            f"{array.name} in {path} does not number pairs: expected are whole numbers in 1 … {pairs:,}."
        )
    return places - 1


def _authors(path: Path, arrays: _Arrays) -> dict[str, Pairs]:
    found: dict[str, Pairs] = {}
    for split in _SPLITS:
        there = [part for part in _PARTS if f"{split}_{part}" in arrays]
        if not there:
            continue
        for part in _PARTS[:3]:
            if part not in there:
                raise UsageError(f"{path} has {split}_{there[0]}, but no {split}_{part}: it needs all of them.")
        images, texts = (vectors(arrays[f"{split}_{part}"], path) for part in ("img", "txt"))
        _same_number(path, {f"{split}_img": len(images), f"{split}_txt": len(texts)})
        names = tuple(f"{split} pair {i + 1}" for i in range(len(images)))
        labels, classes = _labels(arrays[f"{split}_img_lab"], path, len(images), names)
        if "txt_lab" in there:
            of_texts, also = _labels(arrays[f"{split}_txt_lab"], path, len(images), names)
            other = (of_texts != labels).any(axis=1) if classes == also else np.ones(len(names), dtype=bool)
            if other.any():
                count, first = int(other.sum()), names[int(other.argmax())]
                raise UsageError(
                    f"In {path}, {split}_txt_lab and {split}_img_lab do not agree on {count} pairs, of which {first} "
                    "is the first: an image and its text share their labels."
                )
        found[split] = Pairs(str(path), names, images, texts, labels, classes)
    widths = {(part.images.shape[1], part.texts.shape[1]) for part in found.values()}  # type: ignore[union-attr]
    if len(widths) > 1:
        shown = " and ".join(f"{image} and {text}" for image, text in sorted(widths))
        raise UsageError(
            f"The vectors of images and texts in {path} are of {shown} numbers: all splits need the same."
        )
    return {split: _of_all(part, found) for split, part in found.items()}


def _of_all(part: Pairs, found: Mapping[str, Pairs]) -> Pairs:
    """With a column for each class of any split."""
    classes = sorted({name for other in found.values() for name in other.classes}, key=_natural)
    labels = np.zeros((len(part), len(classes)), dtype=bool)
    labels[:, [classes.index(name) for name in part.classes]] = part.labels
    return replace(part, labels=labels, classes=tuple(classes))


def _natural(name: str) -> tuple[int, str]:
    return (int(name) if name.lstrip("-").isdecimal() else 0, name)


def _same_number(path: Path, counts: Mapping[str, int], note: str = "") -> None:
    if len(set(counts.values())) > 1:
        shown = " and ".join(f"{name} {count:,}" for name, count in counts.items())
        raise UsageError(f"In {path}, {shown} vectors do not make pairs: each image needs one text{note}.")


def _labels(
    array: StoredArray, path: Path, pairs: int, names: tuple[str, ...], columns: bool = False
) -> tuple[Mask, tuple[str, ...]]:
    """Labels (N, classes), and the classes' names, which are their numbers.

    They are numbers of classes, one for each pair, or a row (a column, where ``columns`` is set) of 0 and 1 for each
    pair, whose columns are counted from 1.
    """
    _check_kind(array, path)
    values = array.read()
    shape = "×".join(map(str, values.shape))
    if values.size == pairs and max(values.shape, default=0) == pairs:
        return _of_numbers(values.ravel(), array.name, path, names)
    values = values.T if columns else values
    if values.ndim != 2 or len(values) != pairs:
        raise UsageError(
            f"{array.name} in {path} is of {shape} numbers, but there are {pairs:,} pairs: each needs its labels, as "
            "the number of its class or as 0 and 1 for each class."
        )
    missing = np.isnan(values.astype(np.float64)).any(axis=1) | ~(values != 0).any(axis=1)
    _refuse_missing(missing, array.name, path, names)
    if not np.isin(values, (0, 1)).all():
        raise UsageError(
            f"{array.name} in {path} holds other numbers than 0 and 1: each says whether a pair has a class."
        )
    return values != 0, tuple(str(i + 1) for i in range(values.shape[1]))


def _of_numbers(
    values: npt.NDArray[Any], name: str, path: Path, names: tuple[str, ...]
) -> tuple[Mask, tuple[str, ...]]:
    _refuse_missing(np.isnan(values.astype(np.float64)) | (values < 0), name, path, names)
    if not np.isfinite(values).all() or (values != np.floor(values)).any():
        raise UsageError(f"{name} in {path} does not number classes: expected are whole numbers.")
    classes, which = np.unique(values.astype(np.int64), return_inverse=True)
    labels = which[:, None] == np.arange(len(classes))
    return labels, tuple(str(number) for number in classes)


def _refuse_missing(missing: Mask, name: str, path: Path, names: tuple[str, ...]) -> None:
    if missing.any():
        raise UsageError(
            f"{name} in {path} has no label for {int(missing.sum())} of {len(names):,} pairs, of which "
            f"{names[int(missing.argmax())]} is the first: label them, or leave them out."
        )


def _check_kind(array: StoredArray, path: Path) -> None:
    if array.kind not in ("i", "u", "f"):
        raise UsageError(f"{array.name or 'The array'} in {path} is not of real numbers.")

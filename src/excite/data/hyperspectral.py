"""Hyperspectral scenes as image data: a window around each labelled pixel, cut from one padded scene when asked for.

The usual scripts make an array of all windows; of Indian Pines that is 10,249 × 25 × 25 × 30 numbers. Here all splits
share the reduced scene, framed with zeros, and a batch of windows is copied out of it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, overload

import numpy as np
import numpy.typing as npt
import torch

from excite.data.augment import Augmentation
from excite.data.base import ImageData, Split
from excite.data.cube import Cube, open_cube
from excite.data.draws import Indices
from excite.data.ground_truth import GroundTruth, open_ground_truth
from excite.data.scene_split import ENOUGH, ScenePixels, disjoint_split, patches, random_split
from excite.data.spectra import Spectra, fit_spectra
from excite.errors import UsageError
from excite.preprocessing import Preprocessing

logger = logging.getLogger("excite.data")

SPLITS = {"random": random_split, "disjoint": disjoint_split}
TRAIN_RATIO, WINDOW, COMPONENTS = 0.1, 25, 30  # Roy et al. 2020, section III
SEEN_FROM_ABOVE = Augmentation(flip=0.5, quarter_turns=1.0)

Progress = Callable[[int, int], object]


class Windows:
    """Windows of a scene that all share its pixels.

    Args:
        padded: float32 (K, rows + window − 1, cols + window − 1), the scene in a frame of zeros.
        positions: row and column of each window's centre in the scene without its frame, int64 (N, 2).
        labels: int64 (N,).
        window: side of a window in pixels, odd.
    """

    def __init__(self, padded: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, window: int) -> None:
        self.padded = padded
        self.positions = positions
        self.labels = labels
        self.window = window

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        row, col = self.positions[i].tolist()
        return self.padded[:, row : row + self.window, col : col + self.window].clone(), int(self.labels[i])

    def batch(self, indices: Indices, seed: int, epoch: int) -> torch.Tensor:
        """The windows of ``indices``, float32 (N, K, window, window); they are the same in every epoch."""
        positions = self.positions[torch.from_numpy(indices % len(self.positions))].tolist()
        out = torch.empty(len(positions), len(self.padded), self.window, self.window)
        for window, (row, col) in zip(out, positions, strict=True):
            window.copy_(self.padded[:, row : row + self.window, col : col + self.window])
        return out


class PixelNames(Sequence[str]):
    """Names of pixels, ``"row,column"`` counted from 0, made when they are asked for.

    Args:
        positions: int64 (N, 2).
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> PixelNames: ...

    def __getitem__(self, i: int | slice) -> str | PixelNames:
        if isinstance(i, slice):
            return PixelNames(self.positions[i])
        row, col = self.positions[i].tolist()
        return f"{row},{col}"


@dataclass(frozen=True, eq=False, kw_only=True)
class SceneData(ImageData):
    """The labelled pixels of a hyperspectral scene, each with its window.

    Attributes:
        cube: the scene.
        spectra: how its bands become channels.
        truth: its ground truth.
        pixels: which pixels are for what; those of classes that are not kept are in none of its lists.
        padded: the reduced scene in its frame of zeros, float32 (K, rows + window − 1, cols + window − 1).
        kept: the ground truth's number of each class, in the order of ``classes``; 0 for a class that this scene does
            not have.
        options: what :func:`load_scene` was asked for, with its defaults.
    """

    task: ClassVar[str] = "hyperspectral"

    cube: Cube
    spectra: Spectra
    truth: GroundTruth
    pixels: ScenePixels
    padded: torch.Tensor
    kept: tuple[int, ...]
    options: dict[str, Any]

    def learned_from(self) -> str:
        """A checksum of the pixels that are for training and validation, and of their classes."""
        places = np.concatenate([self.pixels.train, self.pixels.val])
        places = places[np.lexsort(places.T[::-1])]
        digest = hashlib.sha256(np.ascontiguousarray(places, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.truth.labels[tuple(places.T)], dtype="<i8").tobytes())
        return digest.hexdigest()


def load_scene(
    spec: str,
    *,
    train_ratio: float | None = None,
    train_per_class: int | None = None,
    split: str | None = None,
    split_seed: int | None = None,
    window: int | None = None,
    components: int | None = None,
    pca: str | None = None,
    whiten: bool | None = None,
    bands: str | None = None,
    ground_truth: str | None = None,
    variable: str | None = None,
    val_fraction: float = 0.0,
    spectra: Spectra | None = None,
    classes: Sequence[str] | None = None,
    all_for_test: bool = False,
    progress: Progress | None = None,
) -> SceneData:
    """Load a scene with its ground truth, divide its labelled pixels, and reduce its spectra.

    Args:
        spec: ``indian-pines``, ``hyperspectral:PATH`` or the path of a .mat, .hdr (ENVI), .npy or .tif file.
        train_ratio: share of each class's labelled pixels for training; 0.1 by default.
        train_per_class: how many of each class, instead.
        split: ``"random"`` (the default) or ``"disjoint"``; see :mod:`excite.data.scene_split`.
        split_seed: of the choice of pixels; 0 by default.
        window: side of a window in pixels, odd; 25 by default.
        components: number of principal components; 30 by default, 0 for the bands themselves, standardised.
        pca: fit on all of the ``"scene"`` (the default, as in the paper) or on the ``"train"`` pixels only.
        whiten: bring each component to variance 1, as by default.
        bands: the bands in use, counted from 1, such as ``"1-103,109-149"``; all by default.
        ground_truth: a file of labels; by default it is looked for, as
            :func:`excite.data.ground_truth.open_ground_truth` says.
        variable: name of the cube in a ``.mat`` of several.
        val_fraction: share of the training pixels that is set aside for validation.
        spectra: those of a trained network, which are then not fitted anew.
        classes: the classes of a trained network, in its order: pixels of others are left out.
        all_for_test: take all labelled pixels for test, and none to train on; a class may then be missing here.
        progress: called with (rows done, rows in all) while the scene is read, once or twice.

    Raises:
        UsageError: there is no such scene, it has no ground truth or one of another size, a value is out of range, a
            class has a single pixel, or the window is larger than the scene.
        ExciteError: a file is cut off or damaged, or a band in use holds a value that is not a finite number.
    """
    options = _settled(
        {
            "train_ratio": train_ratio,
            "train_per_class": train_per_class,
            "split": split,
            "split_seed": split_seed,
            "window": window,
            "components": components,
            "pca": pca,
            "whiten": whiten,
            "bands": bands,
            "ground_truth": ground_truth,
            "variable": variable,
        }
    )
    window = int(options["window"])
    _check(train_ratio, train_per_class, split, window, pca, val_fraction)
    cube = open_cube(spec, variable, bands=spectra.cube_bands if spectra else None)
    truth = open_ground_truth(spec, cube, ground_truth)
    if truth is None:
        raise UsageError(
            f"The scene {spec} has no ground truth: none is in the file, and there is no NAME_gt.* beside it; say in "
            "ground_truth which file it is."
        )
    cube = cube.sized(truth.size) or cube
    if window > min(cube.rows, cube.cols):
        raise UsageError(f"A window of {window} pixels is larger than {cube.name}, which is {cube.rows}×{cube.cols}.")
    if spectra is not None:
        spectra.check(cube.bands, cube.name)

    if all_for_test:
        pixels = _all_for_test(truth.labels, window)
    else:
        if options["split"] == "random":
            _refuse_single(truth)
        pixels = SPLITS[options["split"]](
            truth.labels,
            ratio=options["train_ratio"],
            per_class=train_per_class,
            val_fraction=val_fraction,
            seed=options["split_seed"],
            window=window,
        )
    kept = _kept(truth, pixels, window) if classes is None else _those_of(truth, classes, all_for_test)
    pixels = _only(pixels, truth.labels, kept)
    names = tuple(truth.classes[number - 1] for number in kept) if classes is None else tuple(classes)

    passes = 1 if spectra is not None else 2
    if spectra is None:
        spectra = fit_spectra(
            cube,
            bands=bands,
            components=options["components"],
            whiten=options["whiten"],
            pixels=_mask(truth.size, pixels.train) if options["pca"] == "train" else None,
            progress=progress and (lambda done, rows: progress(done, passes * rows)),
        )
    before = (passes - 1) * cube.rows
    padded = padded_scene(
        cube, spectra, window, progress and (lambda done, rows: progress(before + done, passes * rows))
    )
    number = np.full(int(truth.labels.max()) + 1, -1, dtype=np.int64)
    number[[value for value in kept if value]] = [i for i, value in enumerate(kept) if value]

    def part(positions: Indices) -> Split | None:
        if not len(positions):
            return None
        rows, cols = positions.T
        labels, place = torch.from_numpy(number[truth.labels[rows, cols]]), torch.from_numpy(positions)
        blocks = torch.from_numpy(pixels.blocks[rows, cols])
        return Split(Windows(padded, place, labels, window), labels, PixelNames(place), len(names), blocks=blocks)

    channels = spectra.channels
    return SceneData(
        name=spec,
        classes=names,
        preprocessing=Preprocessing(window, (0.0,) * channels, (1.0,) * channels, channels=channels),
        train=part(pixels.train),
        val=part(pixels.val),
        test=part(pixels.test),
        augmentation=SEEN_FROM_ABOVE,
        cube=cube,
        spectra=spectra,
        truth=truth,
        pixels=pixels,
        padded=padded,
        kept=kept,
        options=options | {"val_fraction": val_fraction},
    )


def _settled(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of :func:`load_scene` with the defaults of those that are left empty.

    ``train_ratio`` has one only where ``train_per_class`` does not take its place.
    """
    defaults: dict[str, Any] = {
        "split": "random",
        "split_seed": 0,
        "window": WINDOW,
        "components": COMPONENTS,
        "pca": "scene",
        "whiten": True,
    }
    if options.get("train_per_class") is None:
        defaults["train_ratio"] = TRAIN_RATIO
    return {**options, **{key: value for key, value in defaults.items() if options.get(key) is None}}


def padded_scene(cube: Cube, spectra: Spectra, window: int, progress: Progress | None = None) -> torch.Tensor:
    """The reduced scene in a frame of zeros of width ``window // 2``.

    Returns:
        float32 (K, rows + window − 1, cols + window − 1).

    Raises:
        UsageError: the cube has another number of bands than the one that ``spectra`` was fitted on.
        ExciteError: the cube cannot be read, or holds a value in use that is not a finite number.
    """
    frame = window // 2
    padded = torch.zeros(spectra.channels, cube.rows + 2 * frame, cube.cols + 2 * frame)
    inside = padded.numpy()[:, frame : frame + cube.rows, frame : frame + cube.cols]
    for top, bottom in cube.strips():
        inside[:, top:bottom] = spectra.reduce(cube, top, bottom)
        if progress:
            progress(bottom, cube.rows)
    return padded


def _check(
    ratio: float | None, per_class: int | None, split: str | None, window: int, pca: str | None, val_fraction: float
) -> None:
    if split not in (None, *SPLITS):
        raise UsageError(f"split is {split!r}: choose 'random' or 'disjoint'.")
    if pca not in (None, "scene", "train"):
        raise UsageError(f"pca is {pca!r}: choose 'scene' or 'train'.")
    if ratio is not None and per_class is not None:
        raise UsageError("train_ratio and train_per_class both say how many pixels to train on: leave one out.")
    if ratio is not None and not (0 < ratio < 1):
        raise UsageError(f"train_ratio is {ratio}: a share of the labelled pixels lies between 0 and 1.")
    if per_class is not None and per_class < 1:
        raise UsageError(f"train_per_class is {per_class}: at least one pixel of each class is needed.")
    if window < 1 or window % 2 == 0:
        raise UsageError(f"window is {window}: it must be odd, so that a pixel is in its middle.")
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction is {val_fraction}: a share of the training pixels lies in 0 … 1.")


def _refuse_single(truth: GroundTruth) -> None:
    single = np.flatnonzero(np.bincount(truth.labels.ravel())[1:] == 1) + 1
    if len(single):
        names = _quoted(truth.classes[number - 1] for number in single)
        what = f"The class {names} has" if len(single) == 1 else f"The classes {names} have"
        raise UsageError(
            f"{what} a single pixel in the ground truth {truth.origin}, and to train and to test takes two: label "
            "more, or set it to 0, which is unlabelled."
        )


def _all_for_test(labels: npt.NDArray[np.int64], window: int) -> ScenePixels:
    none = np.empty((0, 2), dtype=np.int64)
    return ScenePixels(none, none, np.argwhere(labels), patches(labels.shape, window), (), "all pixels are for test")


def _kept(truth: GroundTruth, pixels: ScenePixels, window: int) -> tuple[int, ...]:
    """The classes that the split keeps; a warning says which it does not."""
    present = np.unique(truth.labels[truth.labels > 0]).tolist()
    kept = tuple(number for number in present if number not in pixels.excluded)
    left_out = _quoted(truth.classes[number - 1] for number in pixels.excluded)
    if len(present) < 2:
        raise UsageError(
            f"The ground truth {truth.origin} has the one class {truth.classes[present[0] - 1]!r}: it takes at least "
            "two to tell them apart."
        )
    if len(kept) < 2:
        raise UsageError(
            f"A disjoint split with windows of {window} pixels leaves {len(kept)} of the {len(present)} classes of "
            f"{truth.origin}: take a smaller window, or split='random'."
        )
    if pixels.excluded:
        logger.warning(
            "%s: left out are %s (%d of %d classes): with windows of %d pixels no way was found to have %d pixels of "
            "each on both sides",
            truth.origin,
            left_out,
            len(pixels.excluded),
            len(present),
            window,
            ENOUGH,
        )
    return kept


def _those_of(truth: GroundTruth, classes: Sequence[str], some_will_do: bool) -> tuple[int, ...]:
    """The numbers of a trained network's classes; 0 for those that the scene does not have."""
    known = {truth.classes[number - 1]: int(number) for number in np.unique(truth.labels) if number}
    numbers = tuple(known.get(name, 0) for name in classes)
    missing = _quoted(name for name, number in zip(classes, numbers, strict=True) if not number)
    if not any(numbers) or (missing and not some_will_do):
        raise UsageError(
            f"The ground truth {truth.origin} lacks classes of the network ({missing}): it has {_quoted(known)}."
        )
    return numbers


def _only(pixels: ScenePixels, labels: npt.NDArray[np.int64], kept: tuple[int, ...]) -> ScenePixels:
    def of(positions: Indices) -> Indices:
        return positions[np.isin(labels[tuple(positions.T)], [number for number in kept if number])]

    return replace(pixels, train=of(pixels.train), val=of(pixels.val), test=of(pixels.test))


def _mask(size: tuple[int, int], positions: Indices) -> npt.NDArray[np.bool_]:
    mask = np.zeros(size, dtype=bool)
    mask[tuple(positions.T)] = True
    return mask


def _quoted(names: Iterable[str]) -> str:
    every = [repr(name) for name in names]
    return ", ".join(every[:8]) + (f" and {len(every) - 8} more" if len(every) > 8 else "")

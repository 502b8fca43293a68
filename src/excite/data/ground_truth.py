"""Ground truth: which class each pixel of a scene belongs to, where somebody went and looked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excite.data.arrays import StoredArray, existing, listing, stored_arrays
from excite.data.cube import INDIAN_PINES, Cube, indian_pines_file, scene_path
from excite.data.rasters import open_raster
from excite.errors import ExciteError, UsageError

SUFFIXES = (".mat", ".npy", ".tif", ".tiff", ".hdr", ".png")
MOST_CLASSES = 10_000
INDIAN_PINES_CLASSES = (
    "Alfalfa",
    "Corn-notill",
    "Corn-mintill",
    "Corn",
    "Grass-pasture",
    "Grass-trees",
    "Grass-pasture-mowed",
    "Hay-windrowed",
    "Oats",
    "Soybean-notill",
    "Soybean-mintill",
    "Soybean-clean",
    "Wheat",
    "Woods",
    "Buildings-Grass-Trees-Drives",
    "Stone-Steel-Towers",
)
"""Baumgardner, Biehl & Landgrebe 2015, doi:10.4231/R7RX991C, in the order of their numbers."""

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The classes of a scene's pixels.

    Attributes:
        labels: int64 (rows, cols); 0 is unlabelled, the classes are numbered from 1 on, and numbers may be left out.
        classes: names of the classes 1, 2, …, of those that are left out too.
        origin: where it came from, for messages.
    """

    labels: Labels
    classes: tuple[str, ...]
    origin: str

    @property
    def size(self) -> tuple[int, int]:
        """(rows, cols)."""
        rows, cols = self.labels.shape
        return rows, cols


def open_ground_truth(spec: str, cube: Cube, path: str | None = None) -> GroundTruth | None:
    """Find and read the ground truth of a scene.

    Where no file is given, it is an array of whole numbers of the scene's size in the scene's own ``.mat`` (one whose
    name speaks of ground truth or labels, if there are several), or a file beside the scene: ``NAME_gt`` with the
    ending .mat, .npy, .tif, .tiff, .hdr or .png, where NAME may lose a ``_corrected`` at its end.

    Classes are called ``class 1``, ``class 2``, …, unless the header of an ENVI classification names them, or a text
    file ``NAME_classes.txt`` beside the ground truth or the scene does: the name of class 1 in its first line, and so
    on. A name that comes again has its class's number added, as in ``Corn (2)``. What a GeoTIFF declares as nodata is
    unlabelled.

    Args:
        spec: the data spec of the scene.
        cube: the scene. Where the bands lie on another axis than was thought, labels of the size that the other axes
            have are taken too (:meth:`excite.data.cube.Cube.sized`).
        path: a file of it.

    Returns:
        None where none was given and none is found.

    Raises:
        UsageError: it is of another size than the scene, there is no such file, or it holds no labels.
        ExciteError: it cannot be read.
    """
    scene = scene_path(spec)
    if path is None and scene is None:
        labels = stored_arrays(indian_pines_file("Indian_pines_gt.npy"))[0].read()
        return GroundTruth(labels.astype(np.int64), INDIAN_PINES_CLASSES, INDIAN_PINES)
    if path is None:
        assert scene is not None
        return _inside(scene, cube) or next((_read(file, cube, scene) for file in _beside(scene)), None)
    return _read(existing(path, "ground truth"), cube, scene)


def _inside(scene: Path, cube: Cube) -> GroundTruth | None:
    """The ground truth in the scene's own ``.mat``."""
    if scene.suffix.lower() != ".mat":
        return None
    arrays = [array for array in stored_arrays(scene) if len(array.shape) == 2 and _fits(cube, array.shape)]
    arrays = [array for array in arrays if array.kind] if len(arrays) < 2 else [*filter(_speaks, arrays)]
    if len(arrays) != 1 or not _whole(values := arrays[0].read()):
        return None
    return _made(values, _names(None, scene), f"{arrays[0].name} in {scene}")


def _beside(scene: Path) -> Iterator[Path]:
    for stem in dict.fromkeys((scene.stem, scene.stem.removesuffix("_corrected"))):
        for suffix in SUFFIXES:
            if (file := scene.with_name(f"{stem}_gt{suffix}")).is_file():
                yield file


def _read(file: Path, cube: Cube, scene: Path | None) -> GroundTruth:
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"The ground truth {file} must end in one of {', '.join(SUFFIXES)}.")
    classes = None
    if suffix in (".mat", ".npy"):
        values = _labels_of(file, stored_arrays(file), cube).read()
    else:
        raster = open_raster(file)
        if raster.bands != 1:
            raise UsageError(
                f"The ground truth {file} has {raster.bands} bands; labels are one number for each pixel."
            )
        _check_size(file, cube, (raster.rows, raster.cols))
        values = np.asarray(raster.read(slice(0, raster.rows), slice(0, raster.cols)))[0]
        if raster.nodata is not None:
            missing = np.isnan(values) if np.isnan(raster.nodata) else values == raster.nodata
            values = np.where(missing, 0, values)
        classes = raster.classes[1:] if raster.classes else None
    if not _whole(values):
        below = values.dtype.kind in "if" and values.min() < 0
        held = f" (it holds {values.min():.10g})" if below else ""
        raise UsageError(
            f"The ground truth {file} is no raster of labels{held}, which are whole numbers from 0 (unlabelled) to "
            f"{MOST_CLASSES:,}."
        )
    return _made(values, _names(file, scene) or classes, str(file))


def _labels_of(file: Path, arrays: list[StoredArray], cube: Cube) -> StoredArray:
    flat = [array for array in arrays if len(array.shape) == 2 and array.kind]
    fitting = [array for array in flat if _fits(cube, array.shape)]
    if len(fitting) > 1:
        fitting = [*filter(_speaks, fitting)] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UsageError(f"{file} holds several arrays that could be the ground truth: {listing(fitting)}.")
    if len(flat) == 1:
        rows, cols = flat[0].shape
        _check_size(file, cube, (rows, cols))
    raise UsageError(
        f"{file} holds no ground truth of {cube.rows}×{cube.cols} pixels, the size of {cube.name}: it holds "
        f"{listing(arrays) or 'nothing'}."
    )


def _check_size(file: Path, cube: Cube, size: tuple[int, int]) -> None:
    if not _fits(cube, size):
        raise UsageError(
            f"The ground truth {file} has {size[0]}×{size[1]} pixels, but the scene {cube.name} has "
            f"{cube.rows}×{cube.cols}."
        )


def _fits(cube: Cube, shape: tuple[int, ...]) -> bool:
    rows, cols = shape
    return cube.sized((rows, cols)) is not None


def _speaks(array: StoredArray) -> bool:
    name = array.name.lower()
    return any(word in name for word in ("gt", "label", "truth", "class"))


def _whole(values: npt.NDArray[Any]) -> bool:
    """Whether these can be labels. MATLAB writes them as double as often as not."""
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            if not (np.isfinite(values).all() and (values == np.rint(values)).all()):
                return False
    elif values.dtype.kind not in "iub":
        return False
    return bool(values.min() >= 0 and 1 <= values.max() <= MOST_CLASSES)


def _names(file: Path | None, scene: Path | None) -> tuple[str, ...] | None:
    """The names in a ``NAME_classes.txt`` beside the ground truth or the scene."""
    stems = [file.with_name(file.stem.removesuffix("_gt")), file.with_name(file.stem)] if file else []
    if scene:
        stems += [scene.with_name(scene.stem), scene.with_name(scene.stem.removesuffix("_corrected"))]
    for stem in stems:
        path = stem.with_name(f"{stem.name}_classes.txt")
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8-sig").strip().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ExciteError(f"Cannot read the class names {path}: it is no text in UTF-8.") from error
        names = tuple(line.strip() for line in lines)
        if not all(names) or len(set(names)) < len(names):
            raise UsageError(f"The class names {path} must be different from each other, and one in each line.")
        return names
    return None


def _made(values: npt.NDArray[Any], names: tuple[str, ...] | None, origin: str) -> GroundTruth:
    labels = np.ascontiguousarray(values.astype(np.int64))
    largest = int(labels.max())
    names = (names or ())[:largest]
    names += tuple(f"class {i + 1}" for i in range(len(names), largest))
    return GroundTruth(labels, _told_apart(names), origin)


def _told_apart(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names with the class's number added to those that came before: a network's classes are found by their names."""
    taken: dict[str, None] = {}
    for number, name in enumerate(names, start=1):
        while name in taken:
            name = f"{name} ({number})"
        taken[name] = None
    return tuple(taken)

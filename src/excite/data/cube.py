"""Hyperspectral cubes: a spectrum for each pixel of a scene, in files that are read piece by piece.

Indian Pines (Baumgardner, Biehl & Landgrebe 2015, doi:10.4231/R7RX991C; 145 × 145 pixels of 20 m, 200 bands without
those of water vapour) comes with the package tensorly; any other cube is a ``.mat``, ENVI, ``.npy`` or GeoTIFF file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excite.data.arrays import StoredArray, existing, listing, stored_arrays
from excite.data.rasters import Georeference, open_raster
from excite.errors import ExciteError, UsageError, nearest

INDIAN_PINES = "indian-pines"
KIND = "hyperspectral"
SUFFIXES = (".mat", ".hdr", ".npy", ".tif", ".tiff")
INSTALL = "pip install 'excite[hyperspectral]'"

_REAL = ("i", "u", "f")

Block = npt.NDArray[np.float32]
_Reader = Callable[[slice, slice], Any]


_OTHER_KIND = re.compile(r"(crossmodal|denoising|folder|tar|cifar10|cifar100|shards):")


@dataclass(frozen=True, eq=False)
class Cube:
    """A cube of (bands, rows, cols), of which nothing is read before it is asked for.

    Attributes:
        name: the data spec or path that it came from, for messages.
        bands: number of bands.
        rows: height, in pixels.
        cols: width, in pixels.
        georeference: None where the file has none.
        wavelengths: the centre of each band in nanometres; None where the file does not say.
    """

    name: str
    bands: int
    rows: int
    cols: int
    reader: _Reader  # rows and columns → (bands, rows, cols) of any numbers
    georeference: Georeference | None = None
    wavelengths: tuple[float, ...] | None = None
    array: StoredArray | None = None  # where the axes had to be found
    packed_rows: int = 1  # that the file keeps packed together

    def read(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> Block:
        """A part of the scene, rows ``top`` … ``bottom`` − 1, columns ``left`` … ``right`` − 1.

        Returns:
            float32 (bands, bottom − top, right − left), a fresh array.

        Raises:
            ExciteError: the file cannot be read.
        """
        right = self.cols if right is None else right
        if not (0 <= top <= bottom <= self.rows and 0 <= left <= right <= self.cols):
            raise ValueError(f"rows {top}:{bottom}, columns {left}:{right} of a scene of {self.rows}×{self.cols}")
        try:
            part = self.reader(slice(top, bottom), slice(left, right))
        except ExciteError:
            raise
        except Exception as error:  # HDF5 and GDAL find damage only here, and tell of it by errors of their own
            raise ExciteError(
                f"Cannot read rows {top} to {bottom} of {self.name}: it is cut off or damaged."
            ) from error
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            return np.array(part, dtype=np.float32, order="C")

    def strips(self, size: int = 1 << 22) -> Iterator[tuple[int, int]]:
        """The scene cut into strips of about ``size`` bytes of float32: (top, bottom) of each.

        Rows that lie packed together in the file are kept together, up to 64 MB, so that none is unpacked often.
        """
        row = 4 * self.bands * self.cols
        step = max(size // row, min(self.packed_rows, (1 << 26) // row), 1)
        for top in range(0, self.rows, step):
            yield top, min(top + step, self.rows)

    def sized(self, size: tuple[int, int]) -> Cube | None:
        """This cube with its band axis found by the scene's (rows, cols); None where none is left over then."""
        if (self.rows, self.cols) == size:
            return self
        if self.array is None:
            return None
        for axis in (2, 0, 1):
            if tuple(np.delete(self.array.shape, axis)) == size:
                return _array_cube(self.name, self.array, axis, self.wavelengths)
        return None


def is_scene(spec: str) -> bool:
    """Whether a data spec names a hyperspectral scene: ``indian-pines``, ``hyperspectral:PATH``, or by its suffix."""
    return _kind(spec) is not None


def scene_path(spec: str) -> Path | None:
    """The file of a data spec of a scene; None for ``indian-pines``."""
    return None if spec == INDIAN_PINES else Path(spec.removeprefix(f"{KIND}:"))


def same_scene(one: str, other: str) -> bool:
    """Whether two data specs name the same scene, however its path is written."""
    paths = scene_path(one), scene_path(other)
    if paths[0] is None or paths[1] is None:
        return paths[0] is paths[1]
    return paths[0].resolve() == paths[1].resolve()


def _kind(spec: str) -> str | None:
    if spec == INDIAN_PINES or spec.startswith(f"{KIND}:"):
        return spec.partition(":")[0]
    if _OTHER_KIND.match(spec):
        return None
    return KIND if spec.lower().endswith(SUFFIXES) and not Path(spec).is_dir() else None


def open_cube(spec: str, variable: str | None = None, *, bands: int | None = None) -> Cube:
    """Open a cube.

    An array in a ``.mat`` or ``.npy`` file does not say which of its axes is that of the bands. It is the one with
    ``bands`` entries where that is given, or the one that the scene's size leaves over where its ground truth is
    known (:meth:`Cube.sized`). Else it is the last, unless the first is shorter than both others and the last is the
    longest or the second's equal: such arrays are taken for (bands, rows, cols).

    Args:
        spec: ``indian-pines``, ``hyperspectral:PATH`` or a path that ends in .mat, .hdr (ENVI), .npy, .tif or .tiff.
        variable: name of the cube in a ``.mat`` file; by default the largest array of three axes.
        bands: how many bands the cube has, where that is known.

    Raises:
        UsageError: there is no such file, it holds no cube, or a package to read it is missing.
        ExciteError: the file is cut off or damaged.
    """
    if _kind(spec) is None:
        hint = nearest(spec, [INDIAN_PINES])
        raise UsageError(
            f"{spec} is no hyperspectral scene: give {INDIAN_PINES} or a file that ends in {', '.join(SUFFIXES)}. "
            f"{hint}".strip()
        )
    path = scene_path(spec)
    if path is None:
        array = stored_arrays(indian_pines_file("Indian_pines_corrected.npy"))[0]
        return _array_cube(spec, array, 2, None)
    if spec == f"{KIND}:":
        raise UsageError(f"The data spec {spec!r} lacks the path of a scene: write {KIND}:PATH.")
    if path.name == INDIAN_PINES and not path.exists():
        raise UsageError(f"There is no scene {path}: {INDIAN_PINES} is named without '{KIND}:' before it.")
    path = existing(path, "scene")
    suffix = path.suffix.lower()
    if variable is not None and suffix != ".mat":
        raise UsageError(f"The variable {variable!r} is that of a .mat file, and {path} is none.")
    if suffix not in SUFFIXES:
        raise UsageError(f"The scene {path} must end in one of {', '.join(SUFFIXES)}.")
    if suffix not in (".mat", ".npy"):
        raster = open_raster(path)
        if raster.kind not in _REAL:
            raise UsageError(f"{path} holds no real numbers, as a cube's are.")
        sizes = raster.bands, raster.rows, raster.cols
        place, wavelengths = raster.georeference, raster.wavelengths
        return Cube(str(path), *sizes, raster.read, place, wavelengths, packed_rows=raster.packed_rows)
    array = _cube_of(path, stored_arrays(path), variable)
    return _array_cube(str(path), array, _band_axis(array.shape, bands), None)


def indian_pines_file(name: str) -> Path:
    """A file of tensorly's data sets; the package itself is not imported.

    Raises:
        UsageError: tensorly is not installed, or is too old.
    """
    from importlib.util import find_spec

    found = find_spec("tensorly")
    for folder in (found.submodule_search_locations or []) if found else []:
        if (path := Path(folder) / "datasets" / "data" / name).is_file():
            return path
    raise UsageError(f"{INDIAN_PINES} comes with the package tensorly (0.8 or newer): {INSTALL}.")


def _cube_of(path: Path, arrays: list[StoredArray], variable: str | None) -> StoredArray:
    cubes = [array for array in arrays if array.kind in _REAL and len(array.shape) == 3 and min(array.shape) > 0]
    holds = f"it holds {listing(arrays)}" if arrays else "it is empty"
    if variable is not None:
        chosen = [array for array in arrays if array.name == variable]
        if not chosen:
            raise UsageError(f"{path} has no variable {variable!r}: {holds}.")
        if chosen[0] not in cubes:
            raise UsageError(f"The variable {variable!r} of {path} is no array of numbers with three axes: {holds}.")
        return chosen[0]
    if not cubes:
        raise UsageError(f"{path} holds no cube, which is an array of real numbers with three axes: {holds}.")
    largest = max(math.prod(array.shape) for array in cubes)
    first, *others = (array for array in cubes if math.prod(array.shape) == largest)
    if others:
        raise UsageError(f"{path} holds several cubes of one size ({listing([first, *others])}): choose a variable.")
    return first


def _band_axis(shape: tuple[int, ...], bands: int | None) -> int:
    first, second, last = shape
    if bands is not None and bands in shape:
        return next(axis for axis in (2, 0, 1) if shape[axis] == bands)
    return 0 if first < second <= last else 2


def _array_cube(name: str, array: StoredArray, axis: int, wavelengths: tuple[float, ...] | None) -> Cube:
    rows_axis, cols_axis = (i for i in range(3) if i != axis)

    def read(rows: slice, cols: slice) -> Any:
        wanted: list[slice] = [slice(None)] * 3
        wanted[rows_axis], wanted[cols_axis] = rows, cols
        part = array.open()[tuple(wanted[::-1] if array.reverse else wanted)]
        return np.moveaxis(part.T if array.reverse else part, axis, 0)

    shape = array.shape
    sizes = shape[axis], shape[rows_axis], shape[cols_axis]
    packed_rows = array.chunks[rows_axis] if array.chunks else 1
    return Cube(name, *sizes, read, None, wavelengths, array, packed_rows)

"""Rasters that may know their place on the earth: ENVI files (a ``.hdr`` beside the pixels), GeoTIFF, and PNG labels.

ENVI headers are read with the package spectral, and the pixels through a memory map; GeoTIFF with rasterio, window by
window. Of what GDAL could open under such a name only GeoTIFF is let in: other formats may refer to other files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from excite.data.arrays import reason
from excite.errors import ExciteError, UsageError

_LONGEST_HEADER = 1 << 26  # bytes
_NANOMETRES = {"nanometers": 1.0, "nanometres": 1.0, "nm": 1.0}
_NANOMETRES |= {"micrometers": 1e3, "micrometres": 1e3, "microns": 1e3, "um": 1e3, "µm": 1e3, "μm": 1e3}
_GDAL_CACHE = 64  # MB; GDAL itself would take a twentieth of the memory


@dataclass(frozen=True, eq=False)
class Georeference:
    """Where a scene lies on the earth.

    Attributes:
        transform: a, b, c, d, e, f of the affine map from pixels to coordinates, as rasterio has them:
            x = a · column + b · row + c, y = d · column + e · row + f, from the upper left corner of the first pixel.
        crs: the coordinate system, as WKT or as an EPSG code; empty where it is not known.
    """

    transform: tuple[float, ...]
    crs: str


@dataclass(frozen=True, eq=False)
class Raster:
    """A raster of (bands, rows, cols), not read yet.

    Attributes:
        kind: of its numbers: ``"i"``, ``"u"`` or ``"f"``; anything else is not of real numbers.
        read: from rows and columns to (bands, rows, cols) of such numbers.
        classes: names of the classes from 0 on, of an ENVI classification; else None.
        packed_rows: how many rows the file keeps together.
        nodata: the number that a GeoTIFF declares to stand for no value.
    """

    bands: int
    rows: int
    cols: int
    kind: str
    read: Callable[[slice, slice], Any]
    georeference: Georeference | None = None
    wavelengths: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    packed_rows: int = 1
    nodata: float | None = None


def open_raster(path: Path) -> Raster:
    """Open a ``.hdr``, ``.tif``, ``.tiff`` or ``.png`` file.

    Raises:
        UsageError: the package that reads it is not installed, or the pixels beside a header are missing.
        ExciteError: the file is cut off or damaged.
    """
    suffix = path.suffix.lower()
    if suffix == ".hdr":
        return _envi(path)
    return _png(path) if suffix == ".png" else _geotiff(path)


def _envi(path: Path) -> Raster:
    try:
        from spectral.io import envi
    except ImportError as error:
        raise UsageError(
            f"Reading the ENVI file {path} takes the package spectral: pip install 'excite[hyperspectral]'."
        ) from error
    if path.stat().st_size > _LONGEST_HEADER:
        raise ExciteError(f"{path} is no ENVI header: it has {path.stat().st_size:,} bytes.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys in capitals, which are as good
            header = envi.read_envi_header(path)
            envi.check_compatibility(header)
            parameters = envi.gen_params(header)
    except Exception as error:  # what is not in the header is a KeyError, what is no number a ValueError
        raise ExciteError(f"Cannot read the ENVI header {path}: {reason(error)}.") from error
    interleave = str(header.get("interleave", "")).lower()
    bands, rows, cols = sizes = parameters.nbands, parameters.nrows, parameters.ncols
    if min(sizes) < 1 or parameters.offset < 0 or interleave not in ("bsq", "bil", "bip"):
        raise ExciteError(
            f"The ENVI header {path} says {bands} bands, {rows} lines, {cols} samples, offset {parameters.offset}, "
            f"interleave {interleave or 'missing'!r}: that is no raster."
        )
    if "library" in str(header.get("file type", "")).lower():
        raise UsageError(f"{path} is a library of spectra, not a scene.")
    pixels = _pixel_file(path, interleave)
    dtype = np.dtype(parameters.dtype)
    needed, size = parameters.offset + math.prod(sizes) * dtype.itemsize, pixels.stat().st_size
    if size < needed:
        raise ExciteError(
            f"{pixels} is cut off, or {path} is not its header: {bands} bands × {rows} × {cols} pixels of "
            f"{dtype.itemsize} bytes take {needed:,} bytes, and it has {size:,}."
        )
    shape, axes = {  # how the axes lie, and where bands, rows and columns are among them
        "bsq": ((bands, rows, cols), (0, 1, 2)),
        "bil": ((rows, bands, cols), (1, 0, 2)),
        "bip": ((rows, cols, bands), (2, 0, 1)),
    }[interleave]
    values = np.memmap(pixels, dtype=dtype, mode="r", offset=parameters.offset, shape=shape).transpose(axes)
    return Raster(
        bands,
        rows,
        cols,
        dtype.kind,
        lambda r, c: values[:, r, c],
        _envi_georeference(header),
        _envi_wavelengths(header, bands),
        tuple(header["class names"]) if isinstance(header.get("class names"), list) else None,
    )


def _pixel_file(header: Path, interleave: str) -> Path:
    """The file of pixels beside a header: its name without ``.hdr``, or with another ending."""
    endings = ["", ".img", ".dat", ".raw", ".bin", ".hyspex", f".{interleave}"]
    stem = header.with_suffix("")
    for ending in [*endings, *(ending.upper() for ending in endings[1:])]:
        candidate = stem.with_name(stem.name + ending)
        if candidate.is_file():
            return candidate
    raise UsageError(
        f"The pixels of {header} are missing: expected beside it is {stem.name} without an ending, or with "
        f"{', '.join(endings[1:])}."
    )


def _envi_georeference(header: Mapping[str, Any]) -> Georeference | None:
    """ENVI's map info: projection, the reference pixel (from 1), its coordinates, the pixels' sizes, and so on."""
    info = header.get("map info")
    if not isinstance(info, list) or len(info) < 7:
        return None
    try:
        col, row, x, y, width, height = (float(value) for value in info[1:7])
        turns = [value.partition("=")[2] for value in info if value.lower().startswith("rotation")]
        angle = math.radians(float(turns[0])) if turns else 0.0
    except ValueError:
        return None
    a, b = width * math.cos(angle), height * math.sin(angle)
    d, e = width * math.sin(angle), -height * math.cos(angle)
    corner = (x - a * (col - 1) - b * (row - 1), y - d * (col - 1) - e * (row - 1))
    return Georeference((a, b, corner[0], d, e, corner[1]), _envi_crs(header, info))


def _envi_crs(header: Mapping[str, Any], info: list[str]) -> str:
    text = header.get("coordinate system string", "")
    text = ",".join(text) if isinstance(text, list) else str(text).strip("{} ")
    if text:
        return text
    names = [str(value).strip().lower() for value in info]
    if not any(name in ("wgs-84", "wgs84", "wgs 84") for name in names):
        return ""
    if names[0] == "geographic lat/lon":
        return "EPSG:4326"
    if names[0] == "utm" and len(names) > 8 and names[7].isdecimal() and names[8] in ("north", "south"):
        return f"EPSG:{(32600 if names[8] == 'north' else 32700) + int(names[7])}"
    return ""


def _envi_wavelengths(header: Mapping[str, Any], bands: int) -> tuple[float, ...] | None:
    try:
        values = tuple(float(value) for value in header.get("wavelength", ()))
    except ValueError:
        return None
    if len(values) != bands or not all(math.isfinite(value) and value > 0 for value in values):
        return None
    unit = str(header.get("wavelength units", "")).strip().lower()
    factor = _NANOMETRES.get(unit)
    if factor is None:
        if unit not in ("", "unknown"):
            return None  # wavenumbers, gigahertz
        factor = 1e3 if max(values) < 100 else 1.0  # light is longer than 100 nm and shorter than 100 µm
    return tuple(value * factor for value in values)


def _geotiff(path: Path) -> Raster:
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning
    except ImportError as error:
        raise UsageError(f"Reading {path} takes the package rasterio: pip install 'excite[geotiff]'.") from error

    def opened() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(path, driver="GTiff")

    try:
        with opened() as file:
            bands, rows, cols = file.count, file.height, file.width
            packed_rows = max(height for height, _ in file.block_shapes)
            kinds = {np.dtype(name).kind for name in file.dtypes if not name.startswith("complex")}
            placed = file.crs is not None or not file.transform.is_identity
            transform, crs = tuple(file.transform)[:6], file.crs.to_wkt() if file.crs else ""
            nodata = file.nodata
            kind = "c" if any(name.startswith("complex") for name in file.dtypes) else sorted(kinds)[0]
    except Exception as error:  # GDAL tells of damage by errors of its own
        raise ExciteError(f"Cannot read {path}: it is cut off, damaged, or no TIFF ({reason(error)}).") from error
    file = opened()

    def read(r: slice, c: slice) -> Any:
        with rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE):
            return file.read(window=((r.start, r.stop), (c.start, c.stop)))

    place = Georeference(transform, crs) if placed else None
    return Raster(bands, rows, cols, kind, read, place, packed_rows=packed_rows, nodata=nodata)


def _png(path: Path) -> Raster:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                if image.mode not in ("1", "L", "P", "I", "I;16"):
                    raise UsageError(
                        f"{path} is a coloured picture: labels are the grey values, or the numbers of a palette."
                    )
                values = np.asarray(image)
    except UsageError:
        raise
    except Exception as error:
        raise ExciteError(f"Cannot read {path}: it is cut off, damaged, or no PNG ({reason(error)}).") from error
    values = values.astype(np.int64)[None]
    return Raster(1, values.shape[1], values.shape[2], "i", lambda r, c: values[:, r, c])

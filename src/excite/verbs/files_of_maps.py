"""Writing maps: pictures, arrays, and rasters that lie on the earth."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from excite.data.rasters import Georeference
from excite.errors import UsageError
from excite.files import write_atomically

log = logging.getLogger(__name__)


def write_picture(path: str | Path, picture: Image.Image) -> Path:
    """Write a picture as PNG, atomically."""
    return write_atomically(path, lambda file: picture.save(file, "PNG", optimize=True))


def write_array(path: str | Path, array: npt.NDArray[Any]) -> Path:
    """Write an array as ``.npy``, atomically."""
    return write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


def write_raster(
    path: str | Path,
    numbers: npt.NDArray[np.integer[Any]],
    colours: Sequence[tuple[int, int, int]],
    names: Sequence[str],
    georeference: Georeference | None,
) -> Path:
    """Write a raster of class numbers as GeoTIFF, atomically, with a colour for each number.

    Args:
        path: the file.
        numbers: (rows, cols), 0 … 65,535; stored in 8 bits where they fit (16 otherwise).
        colours: of the number 0, 1, …
        names: of the number 0, 1, …, kept as the file's category names.
        georeference: where the scene lies; None leaves it out. A coordinate system that rasterio cannot read is left
            out with a warning.

    Raises:
        UsageError: rasterio is not installed.
    """
    rasterio = rasterio_package()
    profile: dict[str, Any] = {
        "driver": "GTiff", "count": 1, "height": numbers.shape[0], "width": numbers.shape[1],
        "dtype": "uint8" if numbers.max(initial=0) < 256 else "uint16", "compress": "deflate",
    }  # fmt: skip
    if georeference is not None:
        profile["transform"] = rasterio.Affine(*georeference.transform)
        try:
            profile["crs"] = rasterio.crs.CRS.from_user_input(georeference.crs) if georeference.crs else None
        except rasterio.errors.CRSError:
            log.warning("%s keeps its place without a coordinate system: the scene's cannot be read", path)
    with warnings.catch_warnings(), rasterio.MemoryFile() as memory:
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with memory.open(**profile) as raster:
            raster.write(numbers.astype(profile["dtype"]), 1)
            raster.write_colormap(1, {i: (*colour, 255) for i, colour in enumerate(colours)})
            raster.update_tags(1, **{f"CLASS_{i}": name for i, name in enumerate(names) if name})
        content = bytes(memory.getbuffer())
    return write_atomically(path, content)


def rasterio_package() -> Any:
    """The package rasterio.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import rasterio
        import rasterio.crs
        import rasterio.errors
    except ImportError:
        raise UsageError("A GeoTIFF is written with the package rasterio: pip install 'excite[geotiff]'.") from None
    return rasterio

"""Spectra: how the bands of a cube become the few channels that a network sees.

The channels are the principal components of the spectra, whitened (Roy et al. 2020, arXiv 1902.06701, section II),
or the bands themselves, standardised. The covariance is summed up strip by strip in float64: a cube is never held
as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from excite.data.cube import Block, Cube
from excite.errors import ExciteError, UsageError

Floats = npt.NDArray[np.float64]
_STRIP = 1 << 22  # bytes of float64 that are worked on at once


@dataclass(frozen=True, eq=False)
class Spectra:
    """How a spectrum x becomes the network's channels: ``matrix @ (x[bands] − mean)``.

    Attributes:
        bands: the bands in use, counted from 0: int64 (B,).
        cube_bands: how many bands the cube has that this was fitted on.
        mean: float64 (B,).
        matrix: float64 (K, B).
        explained: the share of the variance that the channels keep, 1.0 without PCA.
    """

    bands: npt.NDArray[np.int64]
    cube_bands: int
    mean: Floats
    matrix: Floats
    explained: float

    @property
    def channels(self) -> int:
        """K, the number of channels."""
        return len(self.matrix)

    def check(self, bands: int, name: str) -> None:
        """Refuse a cube of another number of bands than that which this was fitted on.

        Raises:
            UsageError: it has another number.
        """
        if bands != self.cube_bands:
            raise UsageError(
                f"{name} has {bands} bands, but the network was trained on spectra of {self.cube_bands}: give a cube "
                "of the same sensor with the same bands."
            )

    def apply(self, block: npt.NDArray[Any], name: str = "The cube") -> Block:
        """The channels of each pixel.

        Args:
            block: a part of a cube, (cube_bands, rows, cols).
            name: the cube's, for messages.

        Returns:
            float32 (K, rows, cols).

        Raises:
            UsageError: the block has another number of bands than the cube that this was fitted on.
            ExciteError: a band in use holds a value that is not a finite number.
        """
        bands, rows, cols = block.shape
        self.check(bands, name)
        pixels = block.reshape(bands, -1)
        channels = np.empty((self.channels, pixels.shape[1]), dtype=np.float32)
        step = max(_STRIP // (8 * max(len(self.bands), 1)), 1)
        for start in range(0, pixels.shape[1], step):
            # In float64: what is left of large values after whitening is small.
            centred = pixels[self.bands, start : start + step] - self.mean[:, None]
            channels[:, start : start + step] = self.matrix @ centred
        if not np.isfinite(channels).all():
            counts = np.count_nonzero(~np.isfinite(pixels[self.bands]), axis=1)
            raise _not_finite(name, self.bands, counts, "these are bands that the network looks at: mend them")
        return channels.reshape(-1, rows, cols)

    def reduce(self, cube: Cube, top: int, bottom: int, left: int = 0, right: int | None = None) -> Block:
        """Read a part of a cube and give the channels of its pixels; as :meth:`Cube.read` and :meth:`apply`."""
        return self.apply(cube.read(top, bottom, left, right), cube.name)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as tensors, for a file of weights."""
        return {
            "bands": torch.from_numpy(self.bands.copy()),
            "cube_bands": torch.tensor(self.cube_bands),
            "mean": torch.from_numpy(self.mean.copy()),
            "matrix": torch.from_numpy(np.ascontiguousarray(self.matrix)),
            "explained": torch.tensor(self.explained, dtype=torch.float64),
        }

    @classmethod
    def read(cls, tensors: dict[str, torch.Tensor]) -> Spectra:
        """What :meth:`tensors` gave.

        Raises:
            ExciteError: a tensor is missing, or they do not fit together.
        """
        try:
            bands, mean, matrix = (tensors[name].numpy() for name in ("bands", "mean", "matrix"))
            cube_bands, explained = int(tensors["cube_bands"]), float(tensors["explained"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ExciteError(f"The saved spectra lack {error}: the run's files are damaged.") from error
        fits = (
            mean.shape == bands.shape == matrix.shape[1:]
            and len(matrix)
            and len(bands)
            and bands.min() >= 0
            and bands.max() < cube_bands
        )
        if not fits:
            raise ExciteError("The saved spectra do not fit together: the run's files are damaged.")
        return cls(bands.astype(np.int64), cube_bands, mean.astype(np.float64), matrix.astype(np.float64), explained)


def fit_spectra(
    cube: Cube,
    *,
    bands: str | None = None,
    components: int = 30,
    whiten: bool = True,
    pixels: npt.NDArray[np.bool_] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Spectra:
    """Fit mean and matrix to the pixels of a cube.

    With PCA the sign of each component is such that its largest loading is positive; the rest is as scikit-learn's
    ``PCA(whiten=…)`` has it. Without, bands are standardised as its ``StandardScaler`` does.

    Args:
        cube: the scene.
        bands: those in use, counted from 1, such as ``"1-103,109-149"``; None for all.
        components: how many principal components are kept; 0 for no PCA.
        whiten: whether each component is brought to variance 1.
        pixels: where to fit, bool (rows, cols); None for the whole scene. All of it is looked at for broken values.
        progress: called with (rows done, rows in all).

    Raises:
        UsageError: there are fewer bands or pixels than components, or ``bands`` is not a list of the cube's bands.
        ExciteError: a band in use holds a value that is not a finite number.
    """
    used = parse_bands(bands, cube.bands, cube.name)
    count = cube.rows * cube.cols if pixels is None else int(np.count_nonzero(pixels))
    if components < 0 or components > len(used):
        raise UsageError(
            f"components is {components}: {cube.name} has {len(used)} bands in use; choose 1 … {len(used)}, or 0 to "
            "keep the bands as they are."
        )
    if count < max(components, 2):
        raise UsageError(f"{components} components cannot be fitted on {count} pixels of {cube.name}: choose fewer.")
    mean, covariance = _moments(cube, used, pixels, progress)
    if components:
        matrix, explained = _principal(covariance, components, whiten, cube.name)
    else:
        std = np.sqrt(np.diag(covariance) * (count - 1) / count)
        matrix, explained = np.diag(1 / np.where(std > 0, std, 1)), 1.0
    return Spectra(used, cube.bands, mean, matrix, explained)


def parse_bands(text: str | None, count: int, name: str) -> npt.NDArray[np.int64]:
    """Bands counted from 1, such as ``"1-103,109-149"``, as sorted indices from 0: int64 (B,).

    Raises:
        UsageError: it is not such a list, or names a band that a cube of ``count`` bands does not have.
    """
    if text is None:
        return np.arange(count)
    chosen = np.zeros(count, dtype=bool)
    for part in str(text).split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(
                f"bands is {text!r}: write bands counted from 1 and ranges of them, such as '1-103,109-149'."
            )
        low, high = int(first), int(last or first)
        if not 1 <= low <= high <= count:
            raise UsageError(f"bands has {part.strip()!r}, but {name} has the bands 1 to {count}.")
        chosen[low - 1 : high] = True
    return np.flatnonzero(chosen)


def _moments(
    cube: Cube,
    used: npt.NDArray[np.int64],
    pixels: npt.NDArray[np.bool_] | None,
    progress: Callable[[int, int], object] | None,
) -> tuple[Floats, Floats]:
    """Mean and covariance (divisor n − 1), strip after strip (Chan, Golub & LeVeque 1983, "Algorithms for computing
    the sample variance", equation 2.1)."""
    broken = np.zeros(len(used), dtype=np.int64)
    mean, scatter, seen = np.zeros(len(used)), np.zeros((len(used), len(used))), 0
    for top, bottom in cube.strips(_STRIP // 2):
        strip = cube.read(top, bottom)[used]
        finite = np.isfinite(strip)
        if not finite.all():
            broken += np.count_nonzero(~finite, axis=(1, 2))
        if not broken.any():
            own = strip.reshape(len(used), -1) if pixels is None else strip[:, pixels[top:bottom]]
            if own.shape[1]:
                part = own.astype(np.float64)
                own_mean = part.mean(axis=1)
                part -= own_mean[:, None]
                shift, total = own_mean - mean, seen + part.shape[1]
                scatter += part @ part.T + np.outer(shift, shift) * (seen * part.shape[1] / total)
                mean += shift * (part.shape[1] / total)
                seen = total
        if progress:
            progress(bottom, cube.rows)
    if broken.any():
        raise _not_finite(cube.name, used, broken, "leave these bands out (the option bands), or mend them")
    return mean, scatter / (seen - 1)


def _principal(covariance: Floats, components: int, whiten: bool, name: str) -> tuple[Floats, float]:
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1].T
    total = float(values.sum())
    least = values[0] * len(values) * np.finfo(np.float64).eps
    rank = int(np.count_nonzero(values > least))
    if whiten and rank < components:
        raise UsageError(
            f"The spectra of {name} have {rank} independent components, so that {components} cannot be whitened: "
            "choose fewer."
        )
    matrix = vectors[:components]
    largest = np.abs(matrix).argmax(axis=1)
    matrix = matrix * np.sign(matrix[np.arange(components), largest])[:, None]
    if whiten:
        matrix = matrix / np.sqrt(values[:components])[:, None]
    return matrix, float(values[:components].sum() / total) if total else 1.0


def _not_finite(name: str, bands: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], advice: str) -> ExciteError:
    worst = np.flatnonzero(counts)
    if not len(worst):
        return ExciteError(f"The channels of {name} are too large for float32: are its values in the usual unit?")
    shown = ", ".join(f"band {bands[i] + 1} in {counts[i]:,} pixels" for i in worst[:5])
    more = f", and {len(worst) - 5} more bands" if len(worst) > 5 else ""
    return ExciteError(
        f"{name} holds values that are not finite numbers (NaN, infinite, or too large for float32): {shown}{more}; "
        f"{advice}."
    )

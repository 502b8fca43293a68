"""Which noise a denoising network was trained for, and which of several suits a picture.

Levels are standard deviations σ of Gaussian noise on the scale of 8-bit pixels, 0 … 255.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from excite.data.degrade import Degradation
from excite.errors import ExciteError, UsageError
from excite.training.run import Run

Levels = tuple[float, float]
"""The lowest and the highest σ; the same twice for a network of one."""

BLIND: Levels = (0.0, 55.0)
"""What the blind networks of the DnCNN paper were trained for (Sect. IV-B)."""

SUFFIXES = (".mat", ".pth", ".pt", ".th", ".bin", ".ckpt", ".safetensors")
_BLIND_NETWORKS = ("dncnn_b", "dncnn_color", "dncnn_3")
_NUMBER = r"(\d+(?:\.\d+)?)"
_LEVEL = re.compile(rf"(?<![a-z0-9])(?:sigma|σ|s)[=_-]?{_NUMBER}(?:-{_NUMBER})?(?![a-z0-9])")
_IS_BLIND = re.compile(r"(?<![a-z])blind(?![a-z])|(?<![a-z])dncnn[_-](?:b|3|colou?r)(?![a-z0-9])")

_NEAR = 1.2  # a network for one level is used for others up to this factor away
_FAR, _FAR_APART = 1.5, 3.0  # and told to be wrong from this factor, where that is more than so many levels
_LARGEST = 2048  # side of the part that noise is measured on


@dataclass(frozen=True)
class Choice:
    """Trained weights that can be chosen.

    Attributes:
        path: a file of weights, or the folder of a run.
        levels: what they were trained for; None where nothing says so.
    """

    path: Path
    levels: Levels | None

    def __str__(self) -> str:
        return f"{self.path.name} ({told(self.levels)})"


def told(levels: Levels | None) -> str:
    """Levels in words: ``σ = 25``, ``σ = 0 to 55``."""
    if levels is None:
        return "σ unknown"
    low, high = levels
    return f"σ = {low:g}" if low == high else f"σ = {low:g} to {high:g}"


def levels_of(path: str | Path, network: str = "") -> Levels | None:
    """What weights were trained for, by the card of the run, or by the name of the file.

    ``sigma25``, ``sigma=25``, ``s25`` and ``sigma0-55`` in a name say it, and so does ``blind``.

    Args:
        path: a run's folder or a file of weights.
        network: the name of the network they are for: ``dncnn_b`` and its like are blind ones.
    """
    path = Path(path)
    if (path / "recipe.yaml").is_file():
        degradation = Run(path).card.get("degradation")
        return Degradation.parse(degradation).gaussian_levels if degradation else None
    name = (
        path.name.lower().removesuffix(path.suffix.lower()) if path.suffix.lower() in SUFFIXES else path.name.lower()
    )
    if match := _LEVEL.search(name):
        low = float(match[1])
        high = float(match[2]) if match[2] else low
        if low <= high <= 255:
            return low, high
    return BLIND if _IS_BLIND.search(name) or network in _BLIND_NETWORKS else None


def choices(weights: str | Path, network: str = "") -> list[Choice]:
    """The weights in a folder, or the one file.

    Raises:
        UsageError: a folder without any.
    """
    weights = Path(weights)
    if not weights.is_dir() or (weights / "recipe.yaml").is_file():
        return [Choice(weights, levels_of(weights, network))]
    inside = sorted(weights.iterdir())
    found = [path for path in inside if path.suffix.lower() in SUFFIXES or (path / "model.json").is_file()]
    if not found:
        raise UsageError(f"{weights} holds no weights ({', '.join(SUFFIXES)}) and no finished runs.")
    return [Choice(path, levels_of(path, network)) for path in found]


def choose(among: Sequence[Choice], sigma: float) -> Choice:
    """The weights that were trained for this level.

    One level within 20 % goes before a range that holds it, and the narrower range before the wider one. A single
    choice that nothing is known of is taken at the user's word.

    Raises:
        UsageError: none was; the message says what there is.
    """
    if len(among) == 1 and among[0].levels is None:
        return among[0]
    fitting = [(choice, choice.levels) for choice in among if choice.levels and _holds(choice.levels, sigma)]
    if not fitting:
        there = ", ".join(map(str, among))
        raise UsageError(f"Nothing here was trained for noise of σ = {sigma:g}: there is {there}.")
    return min(fitting, key=lambda one: (one[1][0] != one[1][1], one[1][1] - one[1][0], _factor(one[1], sigma)))[0]


def choose_nearest(among: Sequence[Choice], sigma: float) -> Choice:
    """The same, or where there is none, the weights of the nearest level."""
    try:
        return choose(among, sigma)
    except UsageError:
        known = [choice for choice in among if choice.levels is not None]
        return min(known, key=lambda choice: _factor(choice.levels or BLIND, sigma))


def is_far(levels: Levels, sigma: float) -> bool:
    """Whether a network trained for these levels is wrong for this one: 1.5 times away, and by more than 3."""
    low, high = levels
    return _factor(levels, sigma) > _FAR and max(low - sigma, sigma - high) > _FAR_APART


def _holds(levels: Levels, sigma: float) -> bool:
    low, high = levels
    return low <= sigma <= high if low < high else _factor(levels, sigma) <= _NEAR


def _factor(levels: Levels, sigma: float) -> float:
    """How many times too high or too low the level is; 1 for one that is held."""
    low, high = levels
    if low <= sigma <= high:
        return 1.0
    outer = low if sigma < low else high
    return max(sigma, outer) / min(sigma, outer) if min(sigma, outer) > 0 else math.inf


def estimate_sigma(pixels: npt.NDArray[np.generic], white: float) -> float:
    """Measure the noise of a picture: σ of Gaussian noise, 0 … 255, the mean over the channels.

    The median of the finest wavelet coefficients (Donoho & Johnstone 1994), by scikit-image; of a large picture that
    of the middle 2048 × 2048 pixels.

    Args:
        pixels: (H, W, C).
        white: their value of white.

    Raises:
        UsageError: scikit-image or PyWavelets is not installed.
        ExciteError: the picture is smaller than 2 × 2 pixels.
    """
    measure = estimator()
    height, width = pixels.shape[:2]
    if min(height, width) < 2:
        raise ExciteError(f"The noise of {height} × {width} pixels cannot be measured: say what it is with --sigma.")
    top, left = (max(side - _LARGEST, 0) // 2 for side in (height, width))
    middle = pixels[top : top + _LARGEST, left : left + _LARGEST].astype(np.float64) * (255 / white)
    return float(measure(middle, average_sigmas=True, channel_axis=-1))


def estimator() -> Callable[..., Any]:
    """scikit-image's function.

    Raises:
        UsageError: it or PyWavelets is not installed.
    """
    try:
        import pywt  # type: ignore[import-untyped]  # noqa: F401
        from skimage.restoration import estimate_sigma as measure
    except ImportError:
        raise UsageError(
            "Noise is measured with the packages scikit-image and PyWavelets: pip install 'excite[denoising]'."
        ) from None
    return cast(Callable[..., Any], measure)

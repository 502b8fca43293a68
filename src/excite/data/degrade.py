"""What is done to a clean image so that a network can learn to undo it: noise, JPEG, and a loss of resolution.

Images are float32 (C, H, W) in 0 … 1. Levels of noise are on the scale of 8-bit pixels (0 … 255), as papers have
them. Noise is neither clipped to the image's range nor rounded: :func:`quantise` does that where it is wanted.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from excite.data.draws import bits
from excite.errors import UsageError, nearest

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Kind:
    """What the strength of a kind of degradation is, and within which bounds it lies."""

    strength: str
    low: float
    high: float
    whole: bool
    example: str


_KINDS = {
    "gaussian": _Kind("σ on the scale of 0 … 255", 0, 255, False, "gaussian:25"),
    "poisson": _Kind("the number of photons at white", 0.01, 1e9, False, "poisson:30"),
    "jpeg": _Kind("Pillow's quality", 1, 100, True, "jpeg:5-99"),
    "bicubic": _Kind("the factor by which the image is made smaller and larger again", 2, 16, True, "bicubic:2-4"),
}
_EXAMPLES = "'gaussian:25', 'gaussian:0-55' or 'gaussian:0-55,jpeg:5-99,bicubic:2-4'"


@dataclass(frozen=True)
class Change:
    """One kind of degradation at one strength.

    Attributes:
        kind: ``"gaussian"``, ``"poisson"``, ``"jpeg"`` or ``"bicubic"``.
        strength: σ (0 … 255), photons at white, quality, or factor.
    """

    kind: str
    strength: float

    def apply(self, clean: Pixels, generator: np.random.Generator, out: Pixels | None = None) -> Pixels:
        """The degraded image; draws noise only.

        Args:
            clean: (C, H, W) in 0 … 1; JPEG takes 1 or 3 channels.
            generator: where the noise comes from.
            out: where to put it, of the same shape and without gaps; by default a fresh array.

        Returns:
            (C, H, W).
        """
        if out is None:
            out = np.empty(clean.shape, dtype=np.float32)
        if self.kind == "gaussian":
            generator.standard_normal(dtype=np.float32, out=out)
            out *= np.float32(self.strength / 255)
            out += clean
        else:
            out[...] = self._applied(clean, generator)
        return out

    def _applied(self, clean: Pixels, generator: np.random.Generator) -> Pixels:
        if self.kind == "poisson":
            # As light is counted: y = Poisson(peak · x) / peak, of mean x and variance x / peak.
            photons = generator.poisson(np.maximum(clean, 0) * self.strength)
            return (photons / self.strength).astype(np.float32)
        if self.kind == "jpeg":
            return _jpeg(clean, int(self.strength))
        return _bicubic(clean, int(self.strength))

    def surroundings(self, channels: int) -> tuple[int, int]:
        """How much around a patch must be degraded with it, so that it comes out as if cut from a degraded image.

        Returns:
            A margin in pixels, beyond which nothing matters, and the period with which an image's pixels are treated
            alike: JPEG works in blocks, and a smaller image has a pixel for ``factor`` of the larger one.
        """
        if self.kind == "jpeg":
            return 0, 8 if channels == 1 else 16  # colour is stored at half the resolution
        if self.kind == "bicubic":
            return 2 * int(self.strength), int(self.strength)
        return 0, 1


@dataclass(frozen=True)
class Range:
    """A kind of degradation and the strengths, both included, from which one is drawn uniformly."""

    kind: str
    low: float
    high: float

    def __str__(self) -> str:
        # Never 1e-05: a range is told by its dash.
        low, high = (f"{value:.6f}".rstrip("0").rstrip(".") for value in (self.low, self.high))
        return f"{self.kind}:{low}" if low == high else f"{self.kind}:{low}-{high}"

    def draw(self, generator: np.random.Generator) -> Change:
        """A strength from the range; a range of one strength takes no draw."""
        if self.low == self.high:
            return Change(self.kind, self.low)
        if _KINDS[self.kind].whole:
            return Change(self.kind, float(generator.integers(int(self.low), int(self.high), endpoint=True)))
        return Change(self.kind, generator.uniform(self.low, self.high))


@dataclass(frozen=True)
class Degradation:
    """What clean images are degraded by: one of several kinds, each as likely, at a strength from its range.

    ``str()`` gives the text that :meth:`parse` takes.
    """

    ranges: tuple[Range, ...]

    @classmethod
    def parse(cls, text: str) -> Degradation:
        """From ``kind:strength`` or ``kind:low-high``, several of which may be joined by commas.

        * ``gaussian:25``: white noise, σ on the scale of 0 … 255.
        * ``poisson:30``: shot noise, with so many photons at white on average.
        * ``jpeg:10``: compressed by Pillow at this quality, 1 … 100; whole numbers.
        * ``bicubic:3``: made smaller by this factor and larger again, rounded to 8 bits after both; whole numbers.

        Raises:
            UsageError: an unknown kind, a strength that is no number or out of bounds, or a range upside down.
        """
        return cls(tuple(_range(part.strip(), text) for part in str(text).split(",")))

    def __str__(self) -> str:
        return ",".join(map(str, self.ranges))

    @property
    def gaussian_levels(self) -> tuple[float, float] | None:
        """The lowest and highest σ (0 … 255) where all is Gaussian noise, else None."""
        if any(part.kind != "gaussian" for part in self.ranges):
            return None
        return min(part.low for part in self.ranges), max(part.high for part in self.ranges)

    def draw(self, generator: np.random.Generator) -> Change:
        """A kind and its strength; where there is nothing to choose, no number is drawn."""
        chosen = int(generator.integers(len(self.ranges))) if len(self.ranges) > 1 else 0
        return self.ranges[chosen].draw(generator)

    def apply(self, clean: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """A degraded copy of an image: draws kind, strength and noise, in this order.

        Args:
            clean: float32 (C, H, W) in 0 … 1.
            generator: where the draws come from; the same state gives the same image.

        Returns:
            float32 (C, H, W); noise is neither clipped nor rounded.
        """
        return torch.from_numpy(self.draw(generator).apply(clean.numpy(), generator))


def quantise(image: torch.Tensor) -> torch.Tensor:
    """Rounded to the 256 levels of 8-bit pixels and clipped to 0 … 1, as a file would hold it."""
    return image.mul(255).round_().clamp_(0, 255).div_(255)


def keyed(key: npt.NDArray[np.uint64]) -> np.random.Generator:
    """A generator whose numbers depend on the key alone: Philox (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"), which needs no warming up.

    Args:
        key: two 64-bit draws, shape (2,).
    """
    return np.random.Generator(np.random.Philox(key=key))


class Keyed:
    """:func:`keyed` for many keys: one generator, which is given another key each time, and so is made four times as
    quickly."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)
        self._fresh: Any = self._philox.state

    def __call__(self, key: npt.NDArray[np.uint64]) -> np.random.Generator:
        """The generator of a key, until the next call."""
        self._fresh["state"]["key"] = key
        self._philox.state = self._fresh
        return self._generator


def named(name: str, seed: int) -> np.random.Generator:
    """The generator of an image that is always degraded in the same way, by its name and a seed alone."""
    return keyed(bits(seed, 0, np.zeros(1, dtype=np.int64), f"degrade/{name}", 2)[0])


def _range(part: str, text: str) -> Range:
    name, colon, strengths = (piece.strip() for piece in part.partition(":"))
    kind = _KINDS.get(name)
    if kind is None:
        hint = nearest(name, list(_KINDS))
        known = f"known are {', '.join(_KINDS)}, such as {_EXAMPLES}."
        raise UsageError(" ".join(filter(None, [f"Unknown degradation {name!r} in {text!r}:", hint, known])))
    low, dash, high = strengths.partition("-")
    numbers = _number(low), _number(high if dash else low)
    if not colon or None in numbers:
        raise UsageError(
            f"The degradation {part!r} has no strength that is a number or a range: after the colon comes "
            f"{kind.strength}, such as {kind.example!r}."
        )
    first, last = numbers
    assert first is not None
    assert last is not None
    if kind.whole and not (first.is_integer() and last.is_integer()):
        raise UsageError(f"The degradation {part!r} must be in whole numbers: its strength is {kind.strength}.")
    if first > last:
        raise UsageError(f"The degradation {part!r} has its range upside down: write the lower number first.")
    if first < kind.low or last > kind.high:
        raise UsageError(
            f"The degradation {part!r} is out of bounds: its strength is {kind.strength}, "
            f"{kind.low:g} … {kind.high:g}."
        )
    if last == 0:
        raise UsageError(f"The degradation {part!r} leaves every image as it is: σ must be above 0.")
    return Range(name, first, last)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _jpeg(clean: Pixels, quality: int) -> Pixels:
    from PIL import Image

    if len(clean) not in (1, 3):
        raise UsageError(f"JPEG holds images of 1 or 3 channels, not {len(clean)}.")
    pixels = _eight_bit(clean)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(
        buffer, "JPEG", quality=quality
    )
    with Image.open(buffer) as opened:
        stored: npt.NDArray[Any] = np.asarray(opened)
    stored = stored[None] if stored.ndim == 2 else stored.transpose(2, 0, 1)
    return np.divide(stored, np.float32(255), dtype=np.float32)


def _bicubic(clean: Pixels, factor: int) -> Pixels:
    """Smaller by ``factor`` and back; a size that it does not divide is rounded up, as MATLAB's imresize does."""
    image = torch.from_numpy(_eight_bit(clean)).float()
    height, width = image.shape[1:]
    for size in ((math.ceil(height / factor), math.ceil(width / factor)), (height, width)):
        image = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].round_().clamp_(0, 255)
    return image.div_(255).numpy()


def _eight_bit(image: Pixels) -> npt.NDArray[np.uint8]:
    return np.rint(np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)

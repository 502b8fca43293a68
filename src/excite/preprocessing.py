"""How an image becomes a network's input: what a data set, a run or a file of published weights says of it."""

from __future__ import annotations

from dataclasses import dataclass

from excite.errors import UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input when nothing is drawn at random.

    Attributes:
        size: height and width of the input, in pixels.
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, of pixels scaled to [0, 1].
        resize: the shorter side is first resized to this many pixels, then the centre is cropped; None means
            ``size``, and an image that already is ``size`` × ``size`` is then left as it is.
        interpolation: ``"bilinear"`` or ``"bicubic"``, with antialiasing.
        channels: 3 (red, green, blue), 1 (grey), or as many as a scene has bands or components.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.channels < 1:
            raise UsageError(f"channels is {self.channels}: an image has at least one.")
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise UsageError(
                f"size is {self.size} and resize {self.resize}: the size must be at least 1 pixel, and what is "
                "cropped to it must first be resized to at least as much."
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise UsageError(f"{name} has {len(values)} values, but an image here has {self.channels} channels.")
        if min(self.std) <= 0:
            raise UsageError(f"std is {self.std}: every value must be above 0.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UsageError(f"interpolation is {self.interpolation!r}: choose 'bilinear' or 'bicubic'.")

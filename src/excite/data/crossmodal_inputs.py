"""How an image and a text become what a retrieval network is fed: fitted on the training pairs, kept with a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from excite.data.images import BrokenImageError, decode, fit, normalise
from excite.data.text_vectors import TextVectors, read_text_vectors
from excite.errors import ExciteError, UsageError
from excite.preprocessing import Preprocessing

Floats = npt.NDArray[np.float32]

_BLOCK = 1 << 22  # bytes of float64 that are worked on at once
_CONSTANT = 1e-6  # what varies by less than this part of its mean is rounding


@dataclass(frozen=True, eq=False)
class Standardise:
    """Vectors x as (x − mean) / std.

    Attributes:
        mean: float64 (d,).
        std: float64 (d,), above 0.
    """

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]

    @property
    def dim(self) -> int:
        """d, the length of a vector."""
        return len(self.mean)

    def apply(self, values: npt.NDArray[Any], what: str = "The vectors") -> torch.Tensor:
        """Standardised vectors, float32 (N, d).

        Args:
            values: (N, d).
            what: whose vectors they are, for messages.

        Raises:
            UsageError: they are of another length than those that this was fitted on.
        """
        if values.ndim != 2 or values.shape[1] != self.dim:
            shape = "×".join(map(str, values.shape))
            raise UsageError(f"{what} are of {shape} numbers, but {self.dim} for each are expected.")
        out = np.empty(values.shape, dtype=np.float32)
        for rows in _blocks(*values.shape):
            out[rows] = (values[rows] - self.mean) / self.std
        return torch.from_numpy(out)


def as_they_are(dim: int) -> Standardise:
    """What changes nothing."""
    return Standardise(np.zeros(dim), np.ones(dim))


def fit_standardise(values: npt.NDArray[Any], *, alike: bool = False) -> Standardise:
    """Mean and standard deviation (divisor N) of vectors.

    Args:
        values: of the training pairs, (N, d).
        alike: divide all numbers by the same, the root of their mean variance, so that those that are rarely other
            than 0, as the counts of rare words are, do not become large.
    """
    count, dim = values.shape
    mean = sum((values[rows].sum(axis=0, dtype=np.float64) for rows in _blocks(count, dim)), np.zeros(dim)) / count
    squares = sum((np.square(values[rows] - mean).sum(axis=0) for rows in _blocks(count, dim)), np.zeros(dim))
    std = np.sqrt(squares / count)
    if alike:
        std = np.full(dim, np.sqrt(np.mean(np.square(std))))
    return Standardise(mean, np.where(std > _CONSTANT * np.abs(mean), std, 1.0))


@dataclass(frozen=True, eq=False)
class Inputs:
    """How a pair becomes a network's input.

    Attributes:
        images: of ready vectors their standardisation, of pictures their preprocessing.
        texts: what turns strings into vectors, None where texts are ready vectors.
        text_scale: the standardisation of the texts' vectors.
    """

    images: Standardise | Preprocessing
    texts: TextVectors | None
    text_scale: Standardise

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(d,)`` of vectors, ``(C, H, W)`` of pictures."""
        if isinstance(self.images, Standardise):
            return (self.images.dim,)
        return (self.images.channels, self.images.size, self.images.size)

    @property
    def text_dim(self) -> int:
        """The length of a text's vector."""
        return self.text_scale.dim

    def image_file(self, path: str | Path) -> torch.Tensor:
        """A picture as it is fed to the network, float32 (1, C, H, W).

        Raises:
            UsageError: there is no such file, or the network takes vectors for images.
            ExciteError: it cannot be read.
        """
        if isinstance(self.images, Standardise):
            raise UsageError(
                f"The network knows images as vectors of {self.images.dim} numbers that were computed elsewhere, and "
                f"cannot take the file {path}: train one with an image backbone (network.image) on pictures."
            )
        if not Path(path).is_file():
            raise UsageError(f"There is no image file {path}.")
        try:
            image = fit(decode(Path(path).read_bytes(), self.images.channels), self.images)
        except (BrokenImageError, OSError) as error:
            raise ExciteError(f"The image {path} cannot be read: {error}.") from error
        return normalise(image[None], self.images)

    def image_vectors(self, vectors: npt.NDArray[Any]) -> torch.Tensor:
        """Images that are vectors already, (N, d), as they are fed to the network: float32 (N, d).

        Raises:
            UsageError: they are of another length than in training, or the network takes pictures.
        """
        if not isinstance(self.images, Standardise):
            raise UsageError("The network takes pictures, not vectors: give image files.")
        return self.images.apply(vectors, "The image vectors")

    def text_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """Strings as they are fed to the network, float32 (N, text_dim).

        Raises:
            UsageError: the network takes ready vectors for texts, or a text is empty or has no word that was among
                the training texts.
            ExciteError: the sentence model cannot be loaded.
        """
        if self.texts is None:
            raise UsageError(
                f"The network knows texts as vectors of {self.text_dim} numbers that were computed elsewhere, and "
                "cannot take strings: train one on pairs with texts (a CSV with the column 'text')."
            )
        for text, known in zip(texts, self.texts.known(texts), strict=True):
            if not text.strip():
                raise UsageError("The text is empty: give at least one word.")
            if not known:
                shown = text if len(text) <= 60 else text[:57] + "…"
                raise UsageError(
                    f"No word of the text {shown!r} was among the training texts, so that the network cannot know "
                    "what it means: use other words."
                )
        return self.text_scale.apply(self.texts(texts), "The text vectors")

    def ready_texts(self, vectors: npt.NDArray[Any]) -> torch.Tensor:
        """Texts that are vectors already, (N, text_dim), as they are fed to the network: float32 (N, text_dim).

        Raises:
            UsageError: they are of another length than in training, or the network takes strings.
        """
        if self.texts is not None:
            raise UsageError(f"The network takes texts as strings ({self.texts.spec}), not as vectors: give strings.")
        return self.text_scale.apply(vectors, "The text vectors")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as tensors, for a file of weights; what is no number is JSON in the bytes of ``plain``."""
        plain: dict[str, Any] = {"texts": None if self.texts is None else self.texts.plain()}
        found = {
            "text_mean": torch.from_numpy(self.text_scale.mean.copy()),
            "text_std": torch.from_numpy(self.text_scale.std.copy()),
        }
        if isinstance(self.images, Standardise):
            found["image_mean"] = torch.from_numpy(self.images.mean.copy())
            found["image_std"] = torch.from_numpy(self.images.std.copy())
        else:
            plain["preprocessing"] = dataclasses.asdict(self.images)
        if self.texts is not None:
            found |= {f"text_vectors.{name}": tensor for name, tensor in self.texts.tensors().items()}
        found["plain"] = torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)
        return found

    @classmethod
    def read(cls, tensors: Mapping[str, torch.Tensor]) -> Inputs:
        """What :meth:`tensors` gave.

        Raises:
            ExciteError: something is missing, or does not fit together.
        """
        try:
            plain = json.loads(tensors["plain"].numpy().tobytes())
            text_scale = _standardise(tensors, "text")
            images: Standardise | Preprocessing
            if "preprocessing" in plain:
                images = Preprocessing(**plain["preprocessing"])
            else:
                images = _standardise(tensors, "image")
            texts = plain["texts"]
        except (KeyError, TypeError, ValueError) as error:
            raise ExciteError(f"The saved inputs lack {error}: the run's files are damaged.") from error
        own = {name.removeprefix("text_vectors."): tensor for name, tensor in tensors.items()}
        vectors = None if texts is None else read_text_vectors(texts, own)
        if vectors is not None and vectors.dim != text_scale.dim:
            raise ExciteError("The saved inputs do not fit together: the run's files are damaged.")
        return cls(images, vectors, text_scale)


def _standardise(tensors: Mapping[str, torch.Tensor], what: str) -> Standardise:
    mean, std = (tensors[f"{what}_{name}"].numpy().astype(np.float64) for name in ("mean", "std"))
    if mean.ndim != 1 or mean.shape != std.shape or not len(mean) or not (std > 0).all():
        raise ValueError(f"a standardisation of the {what} vectors")
    return Standardise(mean, std)


def _blocks(count: int, dim: int) -> list[slice]:
    step = max(_BLOCK // (8 * max(dim, 1)), 1)
    return [slice(start, start + step) for start in range(0, count, step)]

"""Pairs of an image and a text as they lie in files: which there are, which belong together, and their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from excite.data.crossmodal_inputs import Floats
from excite.data.draws import Indices, hold_out
from excite.data.images import BrokenImageError, decode, fit
from excite.errors import UsageError
from excite.preprocessing import Preprocessing

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Files:
    """Pictures that are not read yet.

    Attributes:
        folder: what their names are relative to.
        names: of the files; each once.
        index: which file each pair's is, (N,).
    """

    folder: Path
    names: tuple[str, ...]
    index: Indices

    def __len__(self) -> int:
        return len(self.index)

    def only(self, chosen: Indices) -> Files:
        """The pictures of some pairs."""
        used, index = np.unique(self.index[chosen], return_inverse=True)
        return Files(self.folder, tuple(self.names[i] for i in used), index.astype(np.int64))

    def decode(self, file: int, preprocessing: Preprocessing) -> torch.Tensor:
        """A file as uint8 (C, size, size).

        Raises:
            BrokenImageError: it cannot be decoded.
        """
        try:
            content = (self.folder / self.names[file]).read_bytes()
        except OSError as error:
            raise BrokenImageError(error.strerror or str(error)) from error
        return fit(decode(content, preprocessing.channels), preprocessing)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of one split.

    Attributes:
        where: the file that they come from, for messages.
        names: of the pairs.
        images: their vectors, float32 (N, d), or their files.
        texts: their vectors, float32 (N, t), or strings.
        labels: which classes each has, (N, classes).
        classes: the names of the classes.
        broken: names of those that were left out because their picture cannot be read.
    """

    where: str
    names: tuple[str, ...]
    images: Floats | Files
    texts: Floats | tuple[str, ...]
    labels: Mask
    classes: tuple[str, ...]
    broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def only(self, chosen: npt.NDArray[Any], **changes: Any) -> Pairs:
        """Some of the pairs, by a mask or by their positions, with fields changed."""
        places = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        images = self.images.only(places) if isinstance(self.images, Files) else self.images[places]
        texts = tuple(self.texts[i] for i in places) if isinstance(self.texts, tuple) else self.texts[places]
        names = tuple(self.names[i] for i in places)
        return replace(self, names=names, images=images, texts=texts, labels=self.labels[places], **changes)

    def of_classes(self, classes: Sequence[str], split: str, trained: bool = False) -> Pairs:
        """With the labels in the order of ``classes``.

        Args:
            classes: those of the training pairs, or of a trained network.
            split: what the pairs are for, for messages.
            trained: whether the classes are a trained network's.

        Raises:
            UsageError: a pair has a class that is not among them.
        """
        place = {name: i for i, name in enumerate(classes)}
        for name, column in zip(self.classes, self.labels.T, strict=True):
            if name not in place and column.any():
                first = self.names[int(column.argmax())]
                learned = "pair that the network was trained on" if trained else "training pair"
                raise UsageError(
                    f"The class {name!r} of {self.where} is that of {int(column.sum())} {split} pairs, of which "
                    f"{first} is the first, but no {learned} has it: a network cannot find what it has not learned. "
                    "Leave these pairs out, or train on some of them."
                )
        labels = np.zeros((len(self), len(classes)), dtype=bool)
        for name, column in zip(self.classes, self.labels.T, strict=True):
            if name in place:
                labels[:, place[name]] = column
        return replace(self, labels=labels, classes=tuple(classes))

    def content(self) -> bytes:
        """A checksum of the pairs as they are stored; of pictures their names count."""
        digest = hashlib.sha256()
        for part in (self.images, self.texts):
            if isinstance(part, np.ndarray):
                digest.update(repr(part.shape).encode() + np.ascontiguousarray(part, dtype="<f4").tobytes())
            else:
                strings = [part.names[i] for i in part.index] if isinstance(part, Files) else part
                digest.update(repr(list(strings)).encode("utf-8", "surrogateescape"))
        digest.update(repr((self.names, self.classes)).encode("utf-8", "surrogateescape"))
        digest.update(np.packbits(self.labels).tobytes())
        return digest.digest()


def held_out(pairs: Pairs, fraction: float, seed: int) -> Mask:
    """Choose about a fraction of the pairs of every class, by their names: (N,).

    A pair of several classes counts for the rarest of them, and pairs of one name stay together. A class that would
    have no pair left keeps one.
    """
    names, first, which = np.unique(np.array(pairs.names), return_index=True, return_inverse=True)
    labels = pairs.labels[first]
    rarity = np.where(labels, pairs.labels.sum(axis=0), len(pairs) + 1)
    held: Mask = hold_out(rarity.argmin(axis=1).astype(np.int64), names.tolist(), fraction, seed)
    for column in labels.T:
        if column.any() and not (column & ~held).any():
            held[column.argmax()] = False
    return held[which]

"""Sets that lie as image files in class folders, on disk or in a tar."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from excite.data.base import Split, StackedImages
from excite.data.draws import Indices
from excite.data.images import BrokenImageError, Choice, cut, decode, decode_window, fit, header_size
from excite.data.names import Names
from excite.errors import ExciteError
from excite.preprocessing import Preprocessing

logger = logging.getLogger("excite.data")

Progress = Callable[[int, int], object]
_CHUNK = 256
_PROBES = 64


class FileSource(Protocol):
    """Files that can be read by position, from any thread or process."""

    folders: list[str]

    @property
    def names(self) -> Sequence[str]:
        """The files' paths."""
        ...

    def read(self, position: int) -> bytes:
        """The content of a file."""
        ...


@dataclass(frozen=True)
class Listing:
    """The files of one split, with their class indices.

    Attributes:
        source: where the files are.
        files: position of each image in the source, (N,).
        labels: class index of each image, (N,).
    """

    source: FileSource
    files: Indices
    labels: Indices

    def __len__(self) -> int:
        return len(self.files)

    def names(self) -> Sequence[str]:
        """The images' paths inside the source."""
        names = self.source.names
        return names.at(self.files) if isinstance(names, Names) else [names[position] for position in self.files]

    def only(self, chosen: np.ndarray) -> Listing:
        """The part that ``chosen`` (a mask or positions) picks."""
        return Listing(self.source, self.files[chosen], self.labels[chosen])

    def decode(self, i: int, channels: int) -> torch.Tensor:
        """Image ``i`` as uint8 (C, H, W).

        Raises:
            BrokenImageError: it cannot be decoded.
        """
        return decode(self._read(i), channels)

    def window(self, i: int, channels: int, choose: Choice) -> torch.Tensor:
        """A window of image ``i``, as :func:`excite.data.images.decode_window` has it.

        Raises:
            BrokenImageError: it cannot be decoded.
        """
        return decode_window(self._read(i), channels, choose)

    def _read(self, i: int) -> bytes:
        try:
            return self.source.read(int(self.files[i]))
        except OSError as error:
            raise BrokenImageError(error.strerror or str(error)) from error


class EncodedImages:
    """Images that are decoded each time they are asked for, because all of them would not fit in memory.

    Args:
        listing: the files.
        channels: 3 for colour, 1 for grey.
        refuse: whether an image that turns out broken ends the work; else it is skipped.
    """

    def __init__(self, listing: Listing, channels: int, refuse: bool) -> None:
        self.listing = listing
        self.channels = channels
        self.refuse = refuse

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.listing.decode(i, self.channels), int(self.listing.labels[i])

    def window(self, i: int, choose: Choice) -> torch.Tensor:
        """A window of image ``i``, uint8 (C, height, width)."""
        return self.listing.window(i, self.channels, choose)


class DecodedImages:
    """Images of various sizes, held decoded in memory.

    Args:
        pixels: uint8, (C, H, W) each.
        labels: int64, (N,).
    """

    def __init__(self, pixels: Sequence[torch.Tensor], labels: torch.Tensor) -> None:
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.pixels[i], int(self.labels[i])

    def window(self, i: int, choose: Choice) -> torch.Tensor:
        """A window of image ``i``, uint8 (C, height, width)."""
        return cut(self.pixels[i], choose(*self.pixels[i].shape[-2:]))


def probe_sizes(listing: Listing) -> Indices:
    """Height and width of up to 64 images spread over the set, by their headers; broken ones left out: (≤ 64, 2)."""
    sizes = []
    for i in np.unique(np.linspace(0, len(listing) - 1, min(_PROBES, len(listing))).astype(int)):
        try:
            sizes.append(header_size(listing.source.read(int(listing.files[i]))))
        except (BrokenImageError, OSError):
            continue  # counted and named when it is decoded
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def decode_stacked(
    listing: Listing, num_classes: int, preprocessing: Preprocessing, broken: str, progress: Progress | None = None
) -> Split:
    """Decode a split into one tensor, every image brought to the network's size.

    Args:
        broken: ``"skip"`` or ``"refuse"`` what cannot be decoded.
        progress: called with (images done, images in all) from time to time.

    Raises:
        ExciteError: an image is broken and ``broken`` is ``"refuse"``.
    """
    size = preprocessing.size
    pixels = torch.empty(len(listing), preprocessing.channels, size, size, dtype=torch.uint8)

    def put(i: int) -> None:
        pixels[i] = fit(listing.decode(i, preprocessing.channels), preprocessing)

    good, reasons = _each(put, len(listing), listing, broken, progress)
    kept = listing if good.all() else listing.only(good)
    labels = torch.from_numpy(kept.labels)
    stacked = pixels if good.all() else pixels[torch.from_numpy(good)]
    return Split(StackedImages(stacked, labels), labels, kept.names(), num_classes, broken=reasons)


def decode_apart(
    listing: Listing, num_classes: int, channels: int, broken: str, progress: Progress | None = None
) -> Split:
    """Decode a split of images of various sizes, each kept as it is; arguments as :func:`decode_stacked`."""
    images: list[torch.Tensor | None] = [None] * len(listing)

    def put(i: int) -> None:
        images[i] = listing.decode(i, channels)

    good, reasons = _each(put, len(listing), listing, broken, progress)
    kept = listing if good.all() else listing.only(good)
    labels = torch.from_numpy(kept.labels)
    pixels = [image for image in images if image is not None]
    return Split(DecodedImages(pixels, labels), labels, kept.names(), num_classes, broken=reasons)


def left_encoded(listing: Listing, num_classes: int, channels: int, broken: str) -> Split:
    """A split whose images are decoded when they are needed; a broken one is found only then."""
    images = EncodedImages(listing, channels, refuse=broken == "refuse")
    return Split(images, torch.from_numpy(listing.labels), listing.names(), num_classes)


def tell_broken(names: Sequence[str], reasons: Sequence[str], refuse: bool, what: str = "image") -> None:
    """One message that counts the broken images, or what else they lie in, and names the first.

    Raises:
        ExciteError: ``refuse`` is set.
    """
    shown = "; ".join(f"{name} ({reason})" for name, reason in zip(names[:5], reasons[:5], strict=True))
    more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
    count = f"1 {what} is broken" if len(names) == 1 else f"{len(names)} {what}s are broken"
    if refuse:
        raise ExciteError(f"{count}: {shown}{more}. Mend or remove them, or let broken images be skipped.")
    logger.warning("%s and skipped: %s%s", count, shown, more)


def _each(
    put: Callable[[int], None], count: int, listing: Listing, broken: str, progress: Progress | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Run ``put`` for all images; which ones could be decoded, and the names of the others."""
    good = np.ones(count, dtype=bool)
    reasons: dict[int, str] = {}

    def chunk(start: int) -> int:
        stop = min(start + _CHUNK, count)
        for i in range(start, stop):
            try:
                put(i)
            except BrokenImageError as error:
                good[i] = False
                reasons[i] = str(error)
        return stop - start

    done = 0
    for size in _in_threads(chunk, range(0, count, _CHUNK)):
        done += size
        if progress is not None:
            progress(done, count)
    names = tuple(listing.source.names[int(listing.files[i])] for i in sorted(reasons))
    if names:
        tell_broken(names, [reasons[i] for i in sorted(reasons)], broken == "refuse")
    return good, names


def _in_threads(work: Callable[[int], int], starts: Iterable[int]) -> Iterable[int]:
    # Pillow and the file system release the interpreter lock while they decode and read.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, starts)

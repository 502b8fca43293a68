"""Pictures of pairs, brought to the network's size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from excite.data.crossmodal_pairs import Files, Mask, Pairs
from excite.data.draws import Indices
from excite.data.encoded import Progress, tell_broken
from excite.data.images import BrokenImageError, normalise
from excite.errors import ExciteError
from excite.preprocessing import Preprocessing


class Pictures:
    """Pictures of pairs, decoded once and held, or each time they are asked for.

    Args:
        files: where they are.
        preprocessing: how they become input.
        refuse: whether a picture that turns out broken ends the work; else its pair is skipped.
        pixels: the decoded files, uint8 (files, C, size, size), where they are held.
    """

    def __init__(
        self, files: Files, preprocessing: Preprocessing, refuse: bool, pixels: torch.Tensor | None = None
    ) -> None:
        self.files = files
        self.preprocessing = preprocessing
        self.refuse = refuse
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> torch.Tensor:
        """The picture of pair ``i``, normalised: float32 (C, size, size).

        Raises:
            ExciteError: it cannot be decoded, which was not seen before because it did not fit in memory.
        """
        images, _, broken = self.read(np.array([i]))
        for name, reason in broken.items():
            raise ExciteError(f"The image {name} is broken ({reason}): mend or remove it.")
        return images[0]

    def read(self, indices: Indices) -> tuple[torch.Tensor, Mask, dict[str, str]]:
        """The pictures of some pairs, float32 (n, C, size, size); which of them those are; why others are not."""
        good = np.ones(len(indices), dtype=bool)
        broken: dict[str, str] = {}
        places = self.files.index[indices]
        if self.pixels is not None:
            return normalise(self.pixels[torch.from_numpy(places)], self.preprocessing), good, broken
        size = self.preprocessing.size
        images = torch.empty(len(indices), self.preprocessing.channels, size, size, dtype=torch.uint8)
        for n, file in enumerate(places.tolist()):
            try:
                images[n] = self.files.decode(file, self.preprocessing)
            except BrokenImageError as error:
                good[n] = False
                broken[self.files.names[file]] = str(error)
        return normalise(images if good.all() else images[torch.from_numpy(good)], self.preprocessing), good, broken


def read_pictures(
    parts: Mapping[str, Pairs],
    preprocessing: Preprocessing,
    broken: str,
    memory_limit: int,
    progress: Progress | None,
) -> tuple[dict[str, Pairs], dict[str, Pictures]]:
    """The pairs whose picture can be read, and the pictures.

    Where they do not fit in memory, those for training are left to be looked at when they are needed; held-out ones
    are decoded once all the same, since a score must not break off in the middle.

    Raises:
        ExciteError: none of a split can be read, or one is broken and ``broken`` is ``"refuse"``.
    """
    files = {split: part.images for split, part in parts.items() if isinstance(part.images, Files)}
    each = preprocessing.channels * preprocessing.size**2
    hold = each * sum(len(own.names) for own in files.values()) <= memory_limit
    looked_at = {split: own for split, own in files.items() if hold or split != "train"}
    count, done = sum(len(own.names) for own in looked_at.values()), 0
    kept, found = dict(parts), {}
    for split, own in files.items():
        if split not in looked_at:
            found[split] = Pictures(own, preprocessing, broken == "refuse")
            continue

        def step(read: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + read, count)

        pixels, reasons = _decoded(own, preprocessing, hold, step)
        done += len(own.names)
        bad = np.isin(own.index, list(reasons))
        if bad.all():
            name, why = next((own.names[file], why) for file, why in sorted(reasons.items()))
            raise ExciteError(f"None of the {split} pictures of {parts[split].where} can be read: {name} ({why}), ….")
        if reasons:
            files_read = np.setdiff1d(np.arange(len(own.names)), list(reasons))
            pixels = pixels if pixels is None else pixels[torch.from_numpy(files_read)]
            skipped = tuple(own.names[file] for file in sorted(reasons))
            tell_broken(skipped, [reasons[file] for file in sorted(reasons)], broken == "refuse")
            kept[split] = parts[split].only(~bad, broken=skipped)
        left = kept[split].images
        assert isinstance(left, Files)
        found[split] = Pictures(left, preprocessing, broken == "refuse", pixels)
    return kept, found


def _decoded(
    files: Files, preprocessing: Preprocessing, hold: bool, progress: Progress | None = None
) -> tuple[torch.Tensor | None, dict[int, str]]:
    """Decode all files: uint8 (files, C, size, size) where they are to be held, and why some cannot be decoded."""
    size, count = preprocessing.size, len(files.names)
    pixels = torch.zeros(count, preprocessing.channels, size, size, dtype=torch.uint8) if hold else None
    reasons: dict[int, str] = {}

    def one(file: int) -> None:
        try:
            image = files.decode(file, preprocessing)
        except BrokenImageError as error:
            reasons[file] = str(error)
            return
        if pixels is not None:
            pixels[file] = image

    # Pillow and the file system release the interpreter lock while they decode and read.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, _ in enumerate(pool.map(one, range(count)), start=1):
            if progress is not None:
                progress(done, count)
    return pixels, reasons

"""``index``: a user's pictures and texts as points in a network's common space, to be searched."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from excite.deploy.vectors import TYPES
from excite.errors import ExciteError, UsageError
from excite.training.bars import Step, bar
from excite.verbs.embedder import RunEmbedder
from excite.verbs.index_folder import IndexFolder, Part, locked
from excite.verbs.index_items import KINDS, Found, Item, find_items

PART = 8192
"""Items after which a part is written."""
PATIENCE = 60.0
"""Seconds after which a part is written all the same, so that no more work is lost if the process is killed."""

_BATCH = 64  # texts that are embedded at once

Vector = npt.NDArray[np.floating[Any]]


class Embedder(Protocol):
    """What turns pictures and texts into points of one space."""

    @property
    def dim(self) -> int:
        """The length of a vector."""
        ...

    @property
    def checksum(self) -> str:
        """Of its weights: vectors of another one cannot be compared with its own."""
        ...

    def embed_image_file(self, path: str | Path) -> Vector:
        """The vector of a picture, (dim,).

        Raises:
            UsageError: it takes no pictures.
            ExciteError: the file cannot be read.
        """
        ...

    def embed_texts(self, texts: Sequence[str]) -> Vector:
        """The vectors of texts, (n, dim).

        Raises:
            UsageError: it takes no texts, or one of them says nothing to it.
        """
        ...


def index(
    run: str | Path | Embedder,
    path: str | Path,
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Make an index of pictures and texts, or add to one: what it holds already is not embedded again.

    A picture whose file has changed since takes the place of what it was. What cannot be read is left out and told.
    If the process is killed the same call goes on: at most a minute's work, or that of a picture, is lost.

    Args:
        run: the folder of a finished run of task retrieval, or what embeds in its place.
        path: a folder of pictures, with the CSV files in it, one picture, a CSV file with the columns ``file`` and
            ``text`` (or one of them; files are relative to it), or a ``.txt`` file with a text a line.
        out: the folder of the index; by default ``index`` in the run's folder.
        dtype: what vectors are stored as: ``float32``, the default of a new index, or ``float16`` for half the size.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: show a bar on stderr.

    Returns:
        ``index`` (its folder), ``dim``, ``images`` and ``texts`` (how many it holds now), ``added``, ``replaced``
        (pictures that have changed), ``known`` (what it held already), ``errors`` (``{"file"|"text", "error"}`` of
        each that was left out) and ``seconds``.

    Raises:
        UsageError: no such run or path, nothing there to be indexed, an index by another network or of another
            ``dtype``, or another process is adding to it.
        ExciteError: none of what is new can be embedded, the index is damaged, or cannot be written.
    """
    begin = time.perf_counter()
    if dtype is not None and dtype not in TYPES:
        raise UsageError(f"dtype is {dtype!r}: choose {' or '.join(TYPES)}.")
    if out is None:
        if not isinstance(run, (str, Path)):
            raise UsageError("An embedder has no folder of its own: say with out where the index is to be.")
        out = Path(run) / "index"
    out = Path(out)
    _check_folder(out)
    found = find_items(path)
    embedder = open_embedder(run, device)
    with locked(out):
        folder = _folder(out, run, embedder, dtype)
        folder.sweep()
        new, replaced, known = _new(folder, found)
        errors: list[dict[str, str]] = [{"file": file, "error": error} for file, error in found.errors]
        before = folder.count()
        with bar("embedding", progress) as step:
            _add(folder, embedder, new, replaced, errors, step)
    added = folder.count() - before
    failed = len(errors) - len(found.errors)
    if errors and not added and failed == len(new) and not known:
        first = errors[0]
        raise ExciteError(
            f"Nothing in {path} could be indexed: {first.get('file') or first.get('text')}: {first['error']}"
        )
    return {
        "index": str(out),
        "dim": folder.dim,
        "images": folder.count("image"),
        "texts": folder.count("text"),
        "added": added,
        "replaced": len(new) - failed - added,
        "known": known,
        "errors": errors,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def open_embedder(run: str | Path | Embedder, device: str) -> Embedder:
    """A run as what embeds, or what does already.

    Raises:
        UsageError: there is no such run, or it was not trained for retrieval.
        ExciteError: it is damaged.
    """
    return RunEmbedder(run, device) if isinstance(run, (str, Path)) else run


def _check_folder(out: Path) -> None:
    if os.path.isfile(out):
        raise UsageError(f"{out} is a file: an index is a folder.")
    is_other = os.path.isdir(out) and not IndexFolder.exists(out)
    if is_other and any(not file.name.startswith(".") for file in out.iterdir()):
        raise UsageError(f"{out} holds other things and is not an index: give a folder that is new or empty.")


def _folder(out: Path, run: str | Path | Embedder, embedder: Embedder, dtype: str | None) -> IndexFolder:
    """The index, opened or made."""
    place = str(Path(run).absolute()) if isinstance(run, (str, Path)) else None
    if not IndexFolder.exists(out):
        folder = IndexFolder(out, place, embedder.checksum, embedder.dim, dtype or TYPES[0])
        folder.write()
        return folder
    folder = IndexFolder.open(out)
    folder.check_network(embedder.checksum, embedder.dim, str(run) if place else "the one at hand")
    folder.vectors(folder.parts)  # nothing is added to an index that has lost some
    if dtype not in (None, folder.dtype):
        raise UsageError(f"The index {out} stores {folder.dtype}, not {dtype}: leave dtype out, or make a new index.")
    folder.run = place or folder.run  # the same network may have moved
    return folder


def _new(folder: IndexFolder, found: Found) -> tuple[list[Item], dict[Item, tuple[Part, int]], int]:
    """The items to be embedded, the rows that they take the place of, and how many are known."""
    known = {}
    for part in folder.parts:
        gone = frozenset(part.replaced)
        for row, item in enumerate(folder.items(part)):
            if row not in gone:
                known[item.key] = item, part, row
    new, replaced = [], {}
    for item in found.items:
        if item.key not in known:
            new.append(item)
        else:
            before, part, row = known[item.key]
            if item.renews(before):
                item = dataclasses.replace(item, text=item.text or before.text)
                new.append(item)
                replaced[item] = part, row
    return new, replaced, len(found.items) - len(new)


def _add(
    folder: IndexFolder,
    embedder: Embedder,
    new: list[Item],
    replaced: dict[Item, tuple[Part, int]],
    errors: list[dict[str, str]],
    step: Step | None,
) -> None:
    """Embed what is new, and write a part each time that enough has come together."""
    done = 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        if step is not None:
            step(done, len(new))

    for kind in KINDS:
        embed = _images if kind == "image" else _texts
        items: list[Item] = []
        vectors: list[Vector] = []
        since = time.monotonic()
        for item, vector in embed(embedder, [item for item in new if item.kind == kind], errors, moved):
            items.append(item)
            vectors.append(_checked(vector, embedder.dim, item))
            if len(items) >= PART or time.monotonic() - since > PATIENCE:
                _write(folder, items, vectors, replaced)
                items, vectors, since = [], [], time.monotonic()
        if items:
            _write(folder, items, vectors, replaced)


def _write(
    folder: IndexFolder, items: list[Item], vectors: list[Vector], replaced: dict[Item, tuple[Part, int]]
) -> None:
    rows: dict[int, list[int]] = {}
    for item in items:
        if item in replaced:
            part, row = replaced[item]
            rows.setdefault(part.number, []).append(row)
    folder.replace(rows)
    folder.add(items, np.stack(vectors))


def _images(
    embedder: Embedder, items: list[Item], errors: list[dict[str, str]], moved: Callable[[int], None]
) -> Iterator[tuple[Item, Vector]]:
    for item in items:
        assert item.path is not None
        try:
            yield item, embedder.embed_image_file(item.path)
        except (ExciteError, OSError) as error:
            if isinstance(error, UsageError) and Path(item.path).is_file():
                raise  # it takes no pictures at all
            errors.append({"file": item.path, "error": str(error)})
        moved(1)


def _texts(
    embedder: Embedder, items: list[Item], errors: list[dict[str, str]], moved: Callable[[int], None]
) -> Iterator[tuple[Item, Vector]]:
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        try:
            yield from zip(batch, embedder.embed_texts([item.text or "" for item in batch]), strict=True)
        except UsageError:  # one of them says nothing to it: the others do
            for item in batch:
                try:
                    yield item, embedder.embed_texts([item.text or ""])[0]
                except UsageError as error:
                    errors.append({"text": item.text or "", "error": str(error)})
        moved(len(batch))


def _checked(vector: Vector, dim: int, item: Item) -> Vector:
    if vector.shape != (dim,) or not np.isfinite(vector).all():
        raise ExciteError(
            f"The network gives {'no finite numbers' if vector.shape == (dim,) else vector.shape} for "
            f"{item.path or item.text}, where {dim} numbers are expected: it is damaged, or was not trained."
        )
    return vector

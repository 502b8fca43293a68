"""``search``: the pictures and texts of an index that are nearest to a picture or a text."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from excite.data.images import BrokenImageError
from excite.deploy.vectors import FlatIndex, Hits
from excite.errors import ExciteError, UsageError
from excite.files import check_writable, write_atomically
from excite.report.search import search_page
from excite.verbs.index import Embedder, Vector, open_embedder
from excite.verbs.index_folder import IndexFolder, Part
from excite.verbs.index_items import KINDS, Item, Kind

Among = Literal["image", "text", "all"]
AMONG: tuple[Among, ...] = (*KINDS, "all")

_PAGES = (".html", ".htm")  # nothing else is written over


class OpenIndex:
    """An index that stays open, to be asked more than once.

    Args:
        index: the folder of an index.
        run: what made it: the folder of a run, where it is no longer where it was, or what embeds in its place.
        faiss: hold the vectors in memory and search them with FAISS; the hits are the same.
        device: ``auto``, ``cpu``, ``cuda`` …

    Raises:
        UsageError: no such index, its run is not there any more, ``run`` is another network, or FAISS is wanted and
            not installed.
        ExciteError: the index is damaged.
    """

    def __init__(
        self,
        index: str | Path,
        run: str | Path | Embedder | None = None,
        *,
        faiss: bool = False,
        device: str = "auto",
    ) -> None:
        self.folder = IndexFolder.open(index)
        if not self.folder.count():
            raise UsageError(f"The index {index} is empty: add to it with excite index.")
        self._embedder = _embedder(self.folder, run, device)
        self._faiss = faiss
        self._opened: dict[tuple[Kind, ...], _Searched] = {}

    def search(
        self,
        *,
        image: str | Path | None = None,
        text: str | None = None,
        top: int = 10,
        among: Among | None = None,
    ) -> dict[str, Any]:
        """As :func:`search`."""
        if (image is None) == (text is None):
            raise UsageError("Search by an image or by a text: give one of the two.")
        kinds = self._kinds("text" if image is None else "image", among)
        if kinds not in self._opened:
            self._opened[kinds] = _Searched(self.folder, kinds, self._faiss)
        searched = self._opened[kinds]
        begin = time.perf_counter()
        vector = _query(self._embedder, image, text)
        embedded = time.perf_counter()
        hits = searched.hits(vector, top)
        done = time.perf_counter()
        return {
            "index": str(self.folder.folder),
            "query": {"image": os.path.abspath(image)} if image is not None else {"text": text},
            "among": [*kinds],
            "items": self.folder.count(*kinds),
            "hits": [
                {"rank": i + 1, "score": round(score, 6), "kind": item.kind, "path": item.path, "text": item.text}
                for i, (item, score) in enumerate(hits)
            ],
            "embed_ms": round(1000 * (embedded - begin), 3),
            "search_ms": round(1000 * (done - embedded), 3),
        }

    def _kinds(self, of_query: Kind, among: Among | None) -> tuple[Kind, ...]:
        if among == "all":
            return KINDS
        if among is None:
            other: Kind = "image" if of_query == "text" else "text"
            return (other,) if self.folder.count(other) else (of_query,)
        if among not in KINDS:
            raise UsageError(f"among is {among!r}: choose {', '.join(AMONG)}.")
        if not self.folder.count(among):
            raise UsageError(f"The index {self.folder.folder} holds no {among}s: leave among out, or add some.")
        return (among,)


def search(
    index: str | Path,
    *,
    image: str | Path | None = None,
    text: str | None = None,
    top: int = 10,
    among: Among | None = None,
    run: str | Path | Embedder | None = None,
    page: str | Path | None = None,
    faiss: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Find what is nearest to a picture or a text in the network's common space, by cosine similarity; exact.

    Args:
        index: the folder of an index.
        image: the query, a picture's file; or
        text: the query in words.
        top: how many hits.
        among: ``image``, ``text`` or ``all``; by default pictures for a text and texts for a picture, or the other
            way round where the index holds only the other kind.
        run: what made the index: the run's folder, where it is no longer where it was, or what embeds in its place.
        page: where to write a page (``.html``) that shows the hits; none is written by default.
        faiss: search with FAISS; the hits are the same. See :class:`excite.deploy.vectors.FlatIndex`.
        device: ``auto``, ``cpu``, ``cuda`` …

    Returns:
        ``index``, ``query`` (``image`` or ``text``), ``among`` (the kinds that were searched), ``items`` (how many of
        these there are), ``hits`` (``rank``, ``score`` from -1 to 1, ``kind``, ``path`` and ``text``, best first;
        equals in the order in which they were indexed), ``embed_ms`` and ``search_ms`` (of the query, of the search),
        and ``page`` where one was written.

    Raises:
        UsageError: no such index or picture, not one of ``image`` and ``text``, an index by another network, there
            is nothing of the kind to be searched, ``top`` is below 1, or ``page`` is named otherwise.
        ExciteError: the query's picture cannot be read, the index is damaged, or the page cannot be written.
    """
    if image is not None and not os.path.isfile(image):  # Path.is_file() raises where a name is too long
        raise UsageError(f"There is no image file {image}.")
    if page is not None:
        if Path(page).suffix.lower() not in _PAGES:
            raise UsageError(f"{page} is no name of a page: give one that ends in {_PAGES[0]}.")
        check_writable(page)
    result = OpenIndex(index, run, faiss=faiss, device=device).search(image=image, text=text, top=top, among=among)
    if page is not None:
        result["page"] = str(page)
        write_atomically(page, search_page(result))
    return result


class _Searched:
    """The vectors of some kinds, with what they are of."""

    def __init__(self, folder: IndexFolder, kinds: Sequence[Kind], faiss: bool) -> None:
        self._folder = folder
        self._parts: tuple[Part, ...] = folder.of_kinds(kinds)
        files = folder.vectors(self._parts)
        self._vectors = FlatIndex(files) if faiss else files
        self._starts = np.cumsum([0, *(part.count for part in self._parts)])
        self._gone = frozenset(
            int(start) + row for start, part in zip(self._starts, self._parts, strict=False) for row in part.replaced
        )

    def hits(self, vector: Vector, top: int) -> list[tuple[Item, float]]:
        """The items nearest to a vector, with their similarities."""
        found: Hits = self._vectors.search(vector[None], top + len(self._gone) if top > 0 else top)
        pairs = zip(found.rows[0].tolist(), found.scores[0].tolist(), strict=True)
        kept = [(row, score) for row, score in pairs if row not in self._gone][:top]
        items: dict[int, Item] = {}
        for number, part in enumerate(self._parts):
            start, end = self._starts[number : number + 2].tolist()
            own = [row - start for row, _ in kept if start <= row < end]
            if own:
                items |= {start + row: item for row, item in zip(own, self._folder.items(part, own), strict=True)}
        return [(items[row], score) for row, score in kept]


def _embedder(folder: IndexFolder, run: str | Path | Embedder | None, device: str) -> Embedder:
    source = folder.run if run is None else run
    if source is None:
        raise UsageError(f"The index {folder.folder} was made by a network that is none of a run: give it as run.")
    if run is None and not Path(str(source)).is_dir():
        raise UsageError(
            f"The run {source} that made the index {folder.folder} is not there any more: say with run (--run) where."
        )
    embedder = open_embedder(source, device)
    name = str(source) if isinstance(source, (str, Path)) else "the one at hand"
    folder.check_network(embedder.checksum, embedder.dim, name)
    return embedder


def _query(embedder: Embedder, image: str | Path | None, text: str | None) -> Vector:
    if image is None:
        if not (text or "").strip():
            raise UsageError("The text to search for is empty.")
        return embedder.embed_texts([text or ""])[0]
    try:
        return embedder.embed_image_file(image)
    except (BrokenImageError, OSError) as error:
        raise ExciteError(f"The image {image} cannot be read: {error}.") from error

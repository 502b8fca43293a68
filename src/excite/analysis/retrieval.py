"""How well one set of vectors finds what belongs together in another: mean average precision, precision and recall.

Every query ranks all items by cosine similarity, and an item is right where it shares a class with the query.

Items of equal similarity have no order, so none is made up: as in scikit-learn's ``average_precision_score``, they
come all at once, and each of them counts with the precision that is reached when all of them have been taken. Where a
cut after k items goes through such a group, the cut takes the share of its right items that is to be expected of any
order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from excite.errors import ExciteError, UsageError

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Vectors = Tensor | NDArray[Any]

BLOCK = 1 << 26
"""How many bytes of similarities are held at once, though always those of one query at least."""
RECALLS = np.linspace(0, 1, 101)
"""The levels of recall at which precision is given; every tenth is one of the classic eleven points."""


@dataclass(frozen=True)
class AtK:
    """The first k items of each ranking, means over the queries with a match.

    Attributes:
        map: average precision whose sum stops after k items and is divided by the most that can be found there, the
            smaller of k and the number of matches: 1 where nothing could be better.
        map_found: the same divided by the number of matches that were found among the k (0 where none was), as the
            code of Zhen et al. and much of hashing has it. It does not fall when matches are missed.
        precision: share of the k items that match. Where there are fewer than k items, of all of them.
        recall: share of the matches that are among the k items.
    """

    map: float
    map_found: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Retrieval:
    """How well queries find their matches; shares from 0 to 1.

    Attributes:
        map: mean average precision over all items, of the queries that have a match.
        per_query: average precision of each query, float64 (queries,); NaN for one without a match.
        at_k: for each k asked for, see :class:`AtK`.
        recalls: levels of recall, (101,), see :data:`RECALLS`.
        precisions: (101,), for each level the highest precision at this recall or above, mean over the queries.
        without_match: how many queries have no match among the items. They are in none of the means.
    """

    map: float
    per_query: NDArray[np.float64]
    at_k: dict[int, AtK]
    recalls: NDArray[np.float64]
    precisions: NDArray[np.float64]
    without_match: int


def mean_average_precision(
    queries: Vectors,
    items: Vectors,
    query_labels: Vectors,
    item_labels: Vectors,
    *,
    top: Sequence[int] = (),
    block: int | None = None,
    step: Callable[[int, int], object] | None = None,
) -> Retrieval:
    """Rank all items for every query by cosine similarity, and score the rankings.

    Memory: the vectors of both sides at unit length, and similarities of ``block`` queries to all items, by default
    64 MiB of them. Time grows with queries × items (times the logarithm of items, which is hardly seen).

    Args:
        queries: (queries, d), in float64 or else taken as float32; similarities are computed in that precision, and
            equal ones there are ties. A vector of zeros has similarity 0 to all.
        items: (items, d).
        query_labels: (queries, classes), above 0 for the classes that a query has.
        item_labels: (items, classes).
        top: the k for :attr:`Retrieval.at_k`.
        block: how many queries are ranked at once.
        step: is called with (queries done, in all).

    Raises:
        UsageError: sizes that do not fit together, a k or block below 1.
        ExciteError: vectors that are not finite, or no query with a match.
    """
    units = [_unit(queries, "queries"), _unit(items, "items")]
    dtype = np.result_type(*units)
    unit_queries, unit_items = (torch.from_numpy(side.astype(dtype, copy=False)) for side in units)
    query_bits = _bits(query_labels, len(unit_queries), "queries")
    item_bits = _bits(item_labels, len(unit_items), "items")
    _check(unit_queries, unit_items, query_labels, item_labels)
    if wrong := [value for value in (*top, *([block] if block is not None else [])) if value < 1]:
        raise UsageError(f"top and block are whole numbers of at least 1, not {wrong[0]}.")
    block = block or max(1, BLOCK // (dtype.itemsize * len(unit_items)))

    # Queries with the same labels follow each other: what matches them is looked up once.
    _, kind = np.unique(query_bits, axis=1, return_inverse=True)
    order = np.argsort(kind, kind="stable")
    scores = np.full(len(order), np.nan)
    cuts = {int(k): np.zeros(4) for k in top}
    curve = np.zeros(len(RECALLS))
    matches, matched_kind = np.empty(0, dtype=np.int64), -1
    similarities = np.empty((min(block, len(order)), len(unit_items)), dtype=dtype)
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        here = similarities[: len(rows)]
        # PyTorch multiplies with as many threads as it was told to.
        torch.mm(unit_queries[torch.from_numpy(rows)], unit_items.T, out=torch.from_numpy(here))
        for query, row in zip(rows, here, strict=True):
            if kind[query] != matched_kind:
                matches, matched_kind = _sharing(item_bits, query_bits[:, query]), kind[query]
            if len(matches):
                ranking = _Ranking(row, matches)
                scores[query] = ranking.precision.mean()
                curve += ranking.highest_precisions()
                for k, sums in cuts.items():
                    sums += ranking.cut(k)
        if step:
            step(start + len(rows), len(order))
    matched = int(np.isfinite(scores).sum())
    if not matched:
        raise ExciteError("No query shares a class with any item: there is nothing that could be found.")
    return Retrieval(
        map=float(np.nanmean(scores)),
        per_query=scores,
        at_k={k: AtK(*(sums / matched).tolist()) for k, sums in cuts.items()},
        recalls=RECALLS.copy(),
        precisions=curve / matched,
        without_match=len(order) - matched,
    )


class _Ranking:
    """One query's ranking, as far as the places of its matches tell.

    Args:
        similarities: to all items; they are sorted in place.
        matches: which items match, at least one.

    Attributes:
        precision: for each match, from the last in the ranking to the first, the share of matches among the items
            that are at least as similar as it.
    """

    def __init__(self, similarities: Floats, matches: Integers) -> None:
        self.of_matches = similarities[matches]
        self.of_matches.sort()
        similarities.sort()
        self.of_items = similarities
        self.matches = _at_least(self.of_matches, self.of_matches)
        self.precision = self.matches / _at_least(self.of_items, self.of_matches)

    def highest_precisions(self) -> NDArray[np.float64]:
        """For each level of recall, the highest precision at this recall or above."""
        highest = np.maximum.accumulate(self.precision)
        # The first match that reaches the level; what rounding adds to a product must not make it the next.
        wanted = np.ceil(RECALLS * len(highest) - 1e-9).astype(np.int64)
        return highest[len(highest) - np.maximum(wanted, 1)]

    def cut(self, k: int) -> tuple[float, float, float, float]:
        """The numbers of :class:`AtK` for one query."""
        items, matches = len(self.of_items), len(self.of_matches)
        k = min(k, items)
        found = self.of_matches[np.searchsorted(self.of_matches, self.of_items[items - k]) :]
        last, first = _at_least(self.of_items, found), items - np.searchsorted(self.of_items, found, side="right")
        right_after = _at_least(self.of_matches, found)
        right_before = matches - np.searchsorted(self.of_matches, found, side="right")
        # All of a group of equals, but the one that the cut goes through.
        share = np.minimum(k - first, last - first) / (last - first)
        right = right_before + (right_after - right_before) * share
        hits = float(share.sum())
        total = float((share * right / np.minimum(last, k)).sum())
        return total / min(k, matches), total / hits if hits else 0.0, hits / k, hits / matches


def _at_least(ascending: Floats, values: Floats) -> Integers:
    """For each value, how many of the sorted numbers are as large or larger."""
    return len(ascending) - np.searchsorted(ascending, values)


def _sharing(bits: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> Integers:
    """Which items have at least one of the wanted classes."""
    shared = np.zeros(bits.shape[1], dtype=np.uint8)
    for own, byte in zip(bits, wanted, strict=True):
        if byte:
            shared |= own & byte
    return np.flatnonzero(shared)


def _unit(vectors: Vectors, what: str) -> Floats:
    """Vectors at unit length, those of zeros as they are."""
    if isinstance(vectors, Tensor):
        vectors = vectors.detach().cpu()
        vectors = (vectors if vectors.dtype == torch.float64 else vectors.float()).numpy()
    vectors = np.asarray(vectors, dtype=None if vectors.dtype == np.float64 else np.float32)
    if vectors.ndim != 2 or not vectors.size:
        raise UsageError(f"The {what} are vectors (number, dimensions), at least one, not {vectors.shape}.")
    length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))[:, None]
    if not np.isfinite(length).all():
        raise ExciteError(f"The vectors of the {what} hold numbers that are not finite.")
    return vectors / np.where(length > 0, length, 1).astype(vectors.dtype)


def _bits(labels: Vectors, count: int, what: str) -> NDArray[np.uint8]:
    """(number, classes) → (classes / 8, number), one bit for each class."""
    own = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels) > 0
    if own.ndim != 2 or len(own) != count:
        raise UsageError(f"The labels of {count} {what} are ({count}, classes), not {own.shape}.")
    return np.ascontiguousarray(np.packbits(own, axis=1).T)


def _check(queries: Tensor, items: Tensor, query_labels: Vectors, item_labels: Vectors) -> None:
    for name, one, other in (
        ("dimensions", queries.shape[1], items.shape[1]),
        ("classes", query_labels.shape[1], item_labels.shape[1]),
    ):
        if one != other:
            raise UsageError(f"The queries have {one} {name}, but the items have {other}: they must be the same.")

"""Average precision against loops over rankings written out, scikit-learn, and all orders of what is tied."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from excite.analysis import retrieval
from excite.analysis.retrieval import mean_average_precision
from excite.errors import ExciteError, UsageError


def drawn(queries=30, items=90, classes=11, share=0.2, seed=0, tied=False):
    """Vectors and multi-hot labels; tied ones are of few different directions."""
    rng = np.random.default_rng(seed)
    if tied:
        vectors = [rng.integers(0, 2, (count, 4)).astype(float) for count in (queries, items)]
    else:
        vectors = [rng.standard_normal((count, 6)) for count in (queries, items)]
    return (*vectors, *((rng.random((count, classes)) < share).astype(np.float32) for count in (queries, items)))


def cosines(queries, items):
    def unit(vectors):
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(length > 0, length, 1)

    # The product in PyTorch: rounded in another way, equal vectors would not be ties.
    return (torch.from_numpy(unit(queries)) @ torch.from_numpy(unit(items)).T).numpy()


def by_hand(right):
    """(average precision, precisions at each match) of one ranking, given whether each place is right."""
    precisions, found = [], 0
    for place, hit in enumerate(right, start=1):
        if hit:
            found += 1
            precisions.append(found / place)
    return sum(precisions) / len(precisions), precisions


def at_k_by_hand(right, k):
    """(AP@k, the same by matches found, precision, recall) of one ranking."""
    right = np.asarray(right, dtype=float)
    found, total = 0, 0.0
    for place, hit in enumerate(right[:k], start=1):
        if hit:
            found += 1
            total += found / place
    possible = int(min(k, right.sum()))
    return total / possible, total / found if found else 0.0, found / min(k, len(right)), found / right.sum()


@pytest.mark.parametrize("seed", range(3))
def test_by_hand(seed):
    queries, items, query_labels, item_labels = drawn(seed=seed)
    found = mean_average_precision(queries, items, query_labels, item_labels, top=(1, 3, 20, 90, 500))
    similarity, match = cosines(queries, items), (query_labels @ item_labels.T) > 0
    rankings = [match[i][np.argsort(-similarity[i])] for i in range(len(queries))]
    expected = [by_hand(right)[0] if right.any() else np.nan for right in rankings]
    np.testing.assert_allclose(found.per_query, expected, rtol=1e-12)
    rankings = [right for right in rankings if right.any()]
    assert found.map == pytest.approx(np.nanmean(expected), rel=1e-12)
    assert found.without_match == len(queries) - len(rankings)
    for k, cut in found.at_k.items():
        means = np.mean([at_k_by_hand(right, k) for right in rankings], axis=0)
        np.testing.assert_allclose((cut.map, cut.map_found, cut.precision, cut.recall), means, rtol=1e-12)
    curve = []
    for right in rankings:
        _, precisions = by_hand(right)
        recalls = [(number + 1) / len(precisions) for number in range(len(precisions))]
        curve.append(
            [max(p for p, r in zip(precisions, recalls, strict=True) if r >= level - 1e-9) for level in found.recalls]
        )
    np.testing.assert_allclose(found.precisions, np.mean(curve, axis=0), rtol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_average_precision_is_that_of_scikit_learn(tied, share):
    queries, items, query_labels, item_labels = drawn(share=share, tied=tied)
    found = mean_average_precision(queries, items, query_labels, item_labels)
    similarity, match = cosines(queries, items), (query_labels @ item_labels.T) > 0
    for i in range(len(queries)):
        if match[i].any():
            expected = average_precision_score(match[i], similarity[i])
            assert found.per_query[i] == pytest.approx(expected, rel=1e-12)
        else:
            assert np.isnan(found.per_query[i])


@pytest.mark.parametrize("tied", [False, True])
def test_the_curve_is_that_of_scikit_learn(tied):
    queries, items, query_labels, item_labels = drawn(tied=tied, share=0.3)
    found = mean_average_precision(queries, items, query_labels, item_labels)
    similarity, match = cosines(queries, items), (query_labels @ item_labels.T) > 0
    curve = []
    for one, hits in zip(similarity, match, strict=True):
        if hits.any():
            precision, recall, _ = precision_recall_curve(hits, one)
            precision, recall = precision[:-1], recall[:-1]  # the last is a point that no threshold gives
            curve.append([precision[recall >= level - 1e-9].max() for level in found.recalls])
    np.testing.assert_allclose(found.precisions, np.mean(curve, axis=0), rtol=1e-12)
    assert found.recalls[[0, 10, 100]].tolist() == [0, 0.1, 1]


def test_a_cut_through_a_tie_is_what_any_order_gives_on_average():
    # Cosines 1, then four times 0 of which two match, then −1.
    items = np.array([[1.0, 0], [0, 1], [0, 1], [0, 1], [0, 1], [-1, 0]])
    item_labels = np.array([[1], [1], [0], [1], [0], [1]])
    found = mean_average_precision(np.array([[1.0, 0]]), items, np.ones((1, 1)), item_labels, top=range(1, 7))
    orders = [(1, *middle, 1) for middle in itertools.permutations((1, 0, 1, 0))]
    for k, cut in found.at_k.items():
        assert cut.precision == pytest.approx(np.mean([sum(right[:k]) / k for right in orders]))
        assert cut.recall == pytest.approx(np.mean([sum(right[:k]) / 4 for right in orders]))
    # All that the cut leaves of the tie has the precision reached at the cut: of two places one right one.
    assert found.at_k[3].map == pytest.approx((1 + 1 * (2 / 3)) / 3)
    assert found.at_k[5].map == pytest.approx((1 + 2 * (3 / 5)) / 4)
    assert found.at_k[6].map == found.map == pytest.approx((1 + 2 * (3 / 5) + 4 / 6) / 4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_order_of_the_items_does_not_matter(tied):
    queries, items, query_labels, item_labels = (torch.from_numpy(part) for part in drawn(tied=tied))
    first = mean_average_precision(queries, items, query_labels, item_labels, top=(7,))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(1))
    second = mean_average_precision(queries, items[order], query_labels, item_labels[order], top=(7,))
    np.testing.assert_allclose(first.per_query, second.per_query, rtol=1e-12)
    assert first.at_k[7].map == pytest.approx(second.at_k[7].map, rel=1e-12)


@pytest.mark.parametrize("block", [1, 7, 30, 1000])
def test_blocks_change_nothing(block):
    given = drawn()
    seen = []
    whole = mean_average_precision(*given, top=(5,))
    parts = mean_average_precision(*given, top=(5,), block=block, step=lambda done, total: seen.append((done, total)))
    np.testing.assert_allclose(whole.per_query, parts.per_query, rtol=1e-12)
    np.testing.assert_allclose(whole.precisions, parts.precisions, rtol=1e-12)
    assert parts.at_k[5].map == pytest.approx(whole.at_k[5].map)
    assert seen == [(min(end, 30), 30) for end in range(block, 30 + block, block)]


def test_memory_is_of_the_vectors_and_a_block(monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", 1 << 18)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2000, 8)).astype(np.float32)
    labels = np.eye(5, dtype=np.float32)[np.arange(2000) % 5]
    tracemalloc.start()
    try:
        mean_average_precision(vectors, vectors, labels, labels)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (1 << 18) * 0.9 < peak < 6 * (1 << 18)  # all similarities at once: 16 MB


def test_every_kind_of_vectors():
    queries, items, query_labels, item_labels = drawn()
    expected = mean_average_precision(queries, items, query_labels, item_labels).map
    tensors = [torch.from_numpy(part) for part in (queries, items)]
    assert mean_average_precision(*tensors, query_labels, item_labels).map == pytest.approx(expected, rel=1e-12)
    # Random directions: nothing is so near a tie that float32 would turn it.
    singles = [part.float() for part in tensors]
    assert mean_average_precision(*singles, query_labels, item_labels).map == pytest.approx(expected, rel=1e-6)
    before = [part.clone() for part in singles]
    scaled = [part * 1e25 for part in singles]
    assert mean_average_precision(*scaled, query_labels, item_labels > 0).map == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(before, singles, strict=True))


def test_a_vector_of_zeros_is_similar_to_nothing():
    items, item_labels = np.array([[1.0, 0], [0, 0], [-1, 0]]), np.eye(3)
    found = mean_average_precision(np.array([[1.0, 0], [0, 0]]), items, np.array([[0, 1, 0], [0, 0, 1]]), item_labels)
    assert found.per_query.tolist() == pytest.approx([1 / 2, 1 / 3])


def test_the_best_and_the_worst():
    queries, labels = np.eye(4), np.eye(4)
    best = mean_average_precision(queries, queries, labels, labels, top=(1, 2))
    assert (best.map, best.without_match) == (1, 0)
    assert best.precisions.tolist() == [1] * 101
    assert (best.at_k[2].map, best.at_k[2].map_found, best.at_k[2].precision, best.at_k[2].recall) == (1, 1, 0.5, 1)
    worst = mean_average_precision(queries, -queries, labels, labels, top=(1,))
    assert worst.map == 1 / 4
    assert worst.at_k[1].map_found == 0


def test_queries_without_a_match_are_left_out_and_counted():
    queries, items, query_labels, item_labels = drawn(queries=4)
    query_labels[:] = 0
    query_labels[1, 2] = 1
    item_labels[:, 2] = np.arange(len(items)) % 3 == 0
    found = mean_average_precision(queries, items, query_labels, item_labels)
    assert found.without_match == 3
    assert np.isnan(found.per_query).tolist() == [True, False, True, True]
    assert found.map == found.per_query[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"items": np.ones((90, 5))}, UsageError, r"queries have 6 dimensions, but the items have 5"),
        ({"item_labels": np.ones((90, 3))}, UsageError, r"queries have 11 classes, but the items have 3"),
        ({"item_labels": np.ones((89, 11))}, UsageError, r"labels of 90 items are \(90, classes\), not \(89, 11\)"),
        ({"query_labels": np.ones(30)}, UsageError, r"labels of 30 queries are \(30, classes\), not \(30,\)"),
        ({"queries": np.ones((0, 6))}, UsageError, r"queries are vectors .*not \(0, 6\)"),
        ({"queries": np.full((30, 6), np.nan)}, ExciteError, r"vectors of the queries .* not finite"),
        ({"items": np.full((90, 6), np.inf)}, ExciteError, r"vectors of the items .* not finite"),
        ({"query_labels": np.zeros((30, 11))}, ExciteError, r"No query shares a class with any item"),
        ({"top": (5, 0)}, UsageError, r"at least 1, not 0"),
        ({"block": -1}, UsageError, r"at least 1, not -1"),
    ],
)
def test_what_is_refused(change, error, message):
    given = dict(zip(("queries", "items", "query_labels", "item_labels"), drawn(), strict=True)) | change
    with pytest.raises(error, match=message):
        mean_average_precision(**given)

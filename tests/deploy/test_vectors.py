"""Exact search: against similarities computed in double precision, one by one."""

import math
import tracemalloc

import numpy as np
import pytest

from excite.deploy import vectors as module
from excite.deploy.vectors import FlatIndex, VectorFiles, unit_length, write_vectors
from excite.errors import ExciteError, UsageError


def files_of(folder, parts, dtype="float32"):
    paths = [write_vectors(folder / f"{i}.npy", part, dtype) for i, part in enumerate(parts)]
    return VectorFiles(paths, parts[0].shape[1])


def stored(files):
    return np.concatenate([np.load(file.path) for file in files._files])


def brute_force(files, queries, top):
    """Rows and similarities by a full sort, equals in the order of their rows."""
    queries = np.asarray(queries, np.float64)
    unit = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    rows, scores = [], []
    for query in unit:
        exact = [float(np.sum(row.astype(np.float64) * query)) for row in stored(files)]
        rows.append(sorted(range(len(exact)), key=lambda i, exact=exact: (-exact[i], i))[:top])
        scores.append([exact[i] for i in rows[-1]])
    return np.array(rows), np.array(scores)


@pytest.fixture(params=["float32", "float16"])
def dtype(request):
    return request.param


@pytest.fixture(params=["files", "faiss"])
def opened(request):
    """Both ways to search."""
    if request.param == "faiss":
        pytest.importorskip("faiss")
        return FlatIndex
    return lambda files: files


# --- hits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "dim", "top"), [((7,), 3, 1), ((40, 1, 90), 24, 10), ((5, 6), 100, 50)])
def test_hits_are_those_of_a_full_sort(tmp_path, opened, dtype, sizes, dim, top) -> None:
    draw = np.random.default_rng(dim)
    files = files_of(tmp_path, [draw.normal(size=(size, dim)) * 5 for size in sizes], dtype)
    queries = draw.normal(size=(9, dim)) * 1e-3
    hits = opened(files).search(queries, top)
    rows, scores = brute_force(files, queries, top)
    np.testing.assert_array_equal(hits.rows, rows)
    np.testing.assert_allclose(hits.scores, scores, rtol=0, atol=1e-14)
    assert hits.rows.shape == (9, min(top, sum(sizes)))


def test_hits_do_not_depend_on_the_size_of_pieces_and_groups(tmp_path, monkeypatch, dtype) -> None:
    draw = np.random.default_rng(0)
    files = files_of(tmp_path, [draw.normal(size=(size, 17)) for size in (50, 3, 201)], dtype)
    queries = draw.normal(size=(30, 17))
    whole = files.search(queries, 20)
    for piece, similarities, grain in ((1, 1, 5), (4 * 17 * 7, 4 * 254 * 4, 40), (1000, 1 << 20, 1)):
        monkeypatch.setattr(module, "PIECE", piece)
        monkeypatch.setattr(module, "_MANY", 3 * piece)
        monkeypatch.setattr(module, "SIMILARITIES", similarities)
        monkeypatch.setattr(module, "_GRAIN", grain)
        told = []
        hits = files.search(queries, 20, lambda done, total, told=told: told.append((done, total)))
        np.testing.assert_array_equal(hits.rows, whole.rows)
        np.testing.assert_array_equal(hits.scores, whole.scores)
        assert told == sorted(told)
        assert told[-1] == (254 * 30, 254 * 30)
    single = np.concatenate([files.search(query, 20).rows for query in queries])
    np.testing.assert_array_equal(single, whole.rows)


def test_equals_come_in_the_order_of_their_rows(tmp_path, opened, dtype) -> None:
    draw = np.random.default_rng(1)
    one, other = draw.normal(size=(2, 6))
    parts = [np.stack([other, one, 3 * one]), np.stack([one] * 40 + [other]), np.stack([one, -one, 0 * one])]
    files = files_of(tmp_path, parts, dtype)
    same = [1, *range(3, 43), 44]
    hits = opened(files).search(one, 45)
    # Three times a vector is at length 1 what the vector is, up to a last digit.
    assert set(hits.rows[0, :43]) == {*same, 2}
    assert [row for row in hits.rows[0, :43] if row != 2] == same
    assert list(hits.rows[0, 43:]) == brute_force(files, [one], 45)[0][0, 43:].tolist()
    few = opened(files).search(one, 5).rows[0]
    np.testing.assert_array_equal(few, hits.rows[0, :5])


def test_what_single_precision_cannot_tell_apart_is_in_its_exact_order(tmp_path, opened) -> None:
    draw = np.random.default_rng(2)
    query = draw.normal(size=256).astype(np.float32)
    # All about as similar, with differences in the last digits of the products.
    files = files_of(tmp_path, [query + 1e-4 * draw.normal(size=(400, 256))])
    unit = unit_length(query[None], "query")[0]
    own = stored(files)
    exact = [math.fsum(row.astype(np.float64) * unit) for row in own]  # the products are exact, and so is the sum
    order = sorted(range(400), key=lambda i: (-exact[i], i))
    in_single = np.argsort(-(own @ unit), kind="stable")
    assert (in_single[:20] != order[:20]).any()  # or this would show nothing
    np.testing.assert_array_equal(opened(files).search(query, 20).rows[0], order[:20])


@pytest.mark.parametrize("dim", [1, 3, 64, 1000])
def test_the_error_of_single_precision_is_as_large_as_it_is_said_to_be(tmp_path, dim) -> None:
    draw = np.random.default_rng(dim)
    files = files_of(tmp_path, [np.abs(draw.normal(size=(50, dim)))])  # of one sign: nothing cancels
    own = stored(files)
    query = own[0]
    one_by_one = np.zeros(50, np.float32)
    for i in range(dim):
        one_by_one += own[:, i] * query[i]
    exact = own.astype(np.float64) @ query.astype(np.float64)
    assert np.abs(one_by_one - exact).max() <= files.error
    assert np.abs(one_by_one - exact).max() > files.error / 1000 or dim == 1


def test_a_query_counts_by_its_direction_alone(tmp_path, opened) -> None:
    draw = np.random.default_rng(3)
    files = files_of(tmp_path, [draw.normal(size=(30, 8))])
    query = draw.normal(size=8)
    hits = opened(files).search(query, 5)
    for factor in (1e-200, 4.0, 1e200):
        np.testing.assert_array_equal(opened(files).search(query * factor, 5).rows, hits.rows)
    np.testing.assert_array_equal(
        opened(files).search(-query, 30).scores, -opened(files).search(query, 30).scores[:, ::-1]
    )
    nothing = opened(files).search(np.zeros(8), 4)
    assert nothing.rows.tolist() == [[0, 1, 2, 3]]
    assert not nothing.scores.any()


def test_no_vectors_give_no_hits(opened) -> None:
    assert opened(VectorFiles([], 4)).search(np.ones((2, 4)), 3).rows.shape == (2, 0)


# --- what is stored ------------------------------------------------------------------------------------------------


def test_vectors_are_stored_at_length_one_whatever_their_size(tmp_path) -> None:
    draw = np.random.default_rng(4)
    plain = draw.normal(size=(5, 7))
    scale = np.array([1e-300, 1e-30, 1.0, 1e30, 1e300])[:, None]
    files = files_of(tmp_path, [plain * scale])
    np.testing.assert_allclose(stored(files), plain / np.linalg.norm(plain, axis=1)[:, None], rtol=1e-6)
    np.testing.assert_array_equal(files.rows([3, 0, 3]), stored(files)[[3, 0, 3]])
    half = files_of(tmp_path / "half", [plain], "float16")
    assert (half._files[0].path.stat().st_size - 128) * 2 == files._files[0].path.stat().st_size - 128
    np.testing.assert_allclose(half.rows(range(5)), files.rows(range(5)), atol=2.0**-12)


def test_a_search_holds_a_small_part_of_what_it_reads(tmp_path) -> None:
    files = files_of(tmp_path, [np.random.default_rng(5).normal(size=(8_000, 128))])
    query = np.ones(128)
    files.search(query, 10)
    tracemalloc.start()
    try:
        files.search(query, 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # of 4 MiB


# --- errors --------------------------------------------------------------------------------------------------------


def test_wrong_queries_are_refused(tmp_path, opened) -> None:
    index = opened(files_of(tmp_path, [np.eye(4)]))
    for query, top, said in (
        (np.ones(3), 1, "have 4 numbers"),
        (np.ones((1, 1, 4)), 1, "have 4 numbers"),
        (np.ones(4), 0, "top is 0"),
    ):
        with pytest.raises(UsageError, match=said):
            index.search(query, top)
    with pytest.raises(ExciteError, match="not finite"):
        index.search([1, np.nan, 0, 0], 1)


def test_vectors_that_are_not_finite_are_not_written(tmp_path) -> None:
    write_vectors(tmp_path / "a.npy", np.eye(3))
    before = (tmp_path / "a.npy").read_bytes()
    with pytest.raises(ExciteError, match=r"a\.npy hold numbers that are not finite"):
        write_vectors(tmp_path / "a.npy", [[1.0, np.inf, 0.0]])
    assert (tmp_path / "a.npy").read_bytes() == before


def test_damaged_files_are_told(tmp_path) -> None:
    path = write_vectors(tmp_path / "a.npy", np.eye(4))
    content = path.read_bytes()
    with pytest.raises(ExciteError, match=r"b\.npy is missing"):
        VectorFiles([path, tmp_path / "b.npy"], 4)
    for wrong, said in (
        (content[:-1], "cut off"),
        (b"", "no .npy array"),
        (content.replace(b"<f4", b"<i4"), "int32"),
        (content.replace(b"False", b"True "), "expected"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ExciteError, match=said):
            VectorFiles([path], 4)
    path.write_bytes(content)
    with pytest.raises(ExciteError, match="vectors of 5 numbers"):
        VectorFiles([path], 5)
    np.save(path, np.array([[None] * 4]), allow_pickle=True)
    with pytest.raises(ExciteError, match="Python objects"):
        VectorFiles([path], 4)
    path.write_bytes(content)
    files = VectorFiles([path], 4)
    path.write_bytes(content[:-20])  # after it was opened
    with pytest.raises(ExciteError, match="cut off"):
        files.search(np.ones(4), 1)
    np.save(path, np.full((4, 4), np.nan, np.float32))
    with pytest.raises(ExciteError, match=r"a\.npy is damaged: it holds numbers that are not finite"):
        files.search(np.ones(4), 1)


def test_faiss_is_asked_for_where_it_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UsageError, match=r"excite\[faiss\]"):
        FlatIndex(files_of(tmp_path, [np.eye(4)]))

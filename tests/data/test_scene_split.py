from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from sklearn.neighbors import NearestNeighbors

from excite.data import scene_split as module
from excite.data.cube import open_cube
from excite.data.ground_truth import open_ground_truth
from excite.data.scene_split import ENOUGH, ScenePixels, disjoint_split, random_split

TRUTH = open_ground_truth("indian-pines", open_cube("indian-pines"))
assert TRUTH is not None
LABELS = TRUTH.labels
SIZES = np.bincount(LABELS.ravel(), minlength=17)[1:]
USUAL = {"ratio": 0.1, "per_class": None, "val_fraction": 0.0, "seed": 0, "window": 25}


def counts(positions: np.ndarray, labels: np.ndarray = LABELS) -> np.ndarray:
    return np.bincount(labels[tuple(positions.T)], minlength=labels.max() + 1)[1:]


def flat(positions: np.ndarray) -> set[tuple[int, int]]:
    found = {(row, col) for row, col in positions.tolist()}
    assert len(found) == len(positions)
    return found


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many rows or columns, whichever is more, from each of one to the next of the other: brute force."""
    return NearestNeighbors(n_neighbors=1, metric="chebyshev").fit(other).kneighbors(one)[0][:, 0]


def check_whole(split: ScenePixels) -> None:
    """Each labelled pixel is in no more than one part, and each part lies in the order of the rows."""
    parts = [split.train, split.val, split.test]
    together = np.concatenate(parts)
    assert (LABELS[tuple(together.T)] > 0).all()
    flat(together)
    for part in parts:
        assert part.dtype == np.int64
        assert part.shape[1] == 2
        assert (np.diff(part[:, 0] * LABELS.shape[1] + part[:, 1]) > 0).all()


@pytest.mark.parametrize("ratio", [0.001, 0.05, 0.1, 0.3, 0.999])
def test_random_pixels_are_a_share_of_each_class(ratio: float) -> None:
    split = random_split(LABELS, **USUAL | {"ratio": ratio})
    check_whole(split)
    train, test = counts(split.train), counts(split.test)
    np.testing.assert_array_equal(train + test, SIZES)
    assert train.min() >= 1
    assert test.min() >= 1
    assert (np.abs(train - ratio * SIZES) <= 1).all()
    assert split.excluded == ()


def test_random_pixels_of_each_class() -> None:
    split = random_split(LABELS, **USUAL | {"per_class": 50})
    np.testing.assert_array_equal(counts(split.train), np.minimum(50, SIZES // 2))
    assert len(random_split(LABELS, **USUAL | {"per_class": 1}).train) == 16
    two = np.array([[1, 2], [2, 1]])
    np.testing.assert_array_equal(counts(random_split(two, **USUAL | {"per_class": 9}).train, two), [1, 1])


@pytest.mark.parametrize("split", [random_split, disjoint_split])
def test_validation_pixels_come_from_those_for_training(split: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_TRIALS", 40)
    monkeypatch.setattr(module, "_LEAST_TRIALS", 40)
    without, held = split(LABELS, **USUAL), split(LABELS, **USUAL | {"val_fraction": 0.25})
    check_whole(held)
    assert flat(held.train) | flat(held.val) == flat(without.train)
    np.testing.assert_array_equal(held.test, without.test)
    drawn, val = counts(without.train), counts(held.val)
    assert (np.abs(val - 0.25 * drawn) <= 0.5)[drawn > 3].all()
    assert (val[drawn > 1] >= 1).all()
    assert (counts(held.train)[drawn > 0] >= 1).all()
    assert len(without.val) == 0


def test_seeds() -> None:
    one, again, other = (random_split(LABELS, **USUAL | {"seed": seed}) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.train, again.train)
    shared = len(flat(one.train) & flat(other.train)) / len(one.train)
    assert 0.07 < shared < 0.14  # a tenth by chance
    # More of the same seed are the same and more: smaller shares are nested.
    assert flat(random_split(LABELS, **USUAL | {"ratio": 0.05, "seed": 1}).train) < flat(one.train)


def test_random_draws_are_uniform_over_a_class() -> None:
    hits = np.zeros(LABELS.shape)
    for seed in range(100):
        hits[tuple(random_split(LABELS, **USUAL | {"seed": seed}).train.T)] += 1
    woods = hits[LABELS == 14]
    # Binomial with 100 draws of 1/10: variance 9.
    assert woods.mean() == pytest.approx(10, abs=0.2)
    assert woods.var() == pytest.approx(9, rel=0.15)


def test_nearly_all_windows_of_a_random_split_hold_training_pixels() -> None:
    split = random_split(LABELS, **USUAL)
    share = (distance(split.test, split.train) <= 12).mean()
    assert share > 0.99
    assert f"{share:.0%} of the test pixels" in split.note
    few = random_split(LABELS, **USUAL | {"window": 3})
    share = (distance(few.test, few.train) <= 1).mean()
    assert f"{share:.0%} of the test pixels" in few.note


@pytest.mark.parametrize(("ratio", "seed"), [(0.1, 0), (0.05, 1), (0.3, 2)])
def test_no_window_of_a_disjoint_test_pixel_holds_a_training_pixel(ratio: float, seed: int) -> None:
    split = disjoint_split(LABELS, **USUAL | {"ratio": ratio, "seed": seed, "val_fraction": 0.2})
    check_whole(split)
    known = np.concatenate([split.train, split.val])
    assert distance(split.test, known).min() > 12
    # These are single small fields: see the next test.
    assert split.excluded == (1, 7, 9, 16)
    train, test = counts(known), counts(split.test)
    gone = np.isin(np.arange(1, 17), split.excluded)
    assert (train[gone] == 0).all()
    assert (test[gone] == 0).all()
    assert (test[~gone] >= ENOUGH).all()
    quota = np.rint(ratio * SIZES)
    assert (train <= quota).all()
    assert train.sum() > 0.85 * quota[~gone].sum()
    assert len(split.test) > 3000


def test_window_one() -> None:
    split = disjoint_split(LABELS, **USUAL | {"window": 1})
    assert not flat(split.test) & flat(split.train)
    assert split.excluded == ()


@pytest.mark.parametrize("number", [1, 7, 9, 16])
def test_classes_that_are_left_out_could_not_be_kept(number: int) -> None:
    # Beyond 12 rows or columns from even the least pixel there are fewer than ten of the class.
    places = np.argwhere(np.equal(LABELS, number))
    apart = np.abs(places[:, None] - places).max(axis=2) > 12
    assert apart.sum(axis=1).max() < ENOUGH


def test_small_windows_keep_every_class_that_can_be() -> None:
    split = disjoint_split(LABELS, **USUAL | {"window": 5})
    assert distance(split.test, split.train).min() > 2
    assert set(split.excluded) <= {7, 9}


def test_disjoint_splits_of_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_TRIALS", 600)
    one, again, other = (disjoint_split(LABELS, **USUAL | {"seed": seed}) for seed in (3, 3, 4))
    for name in ("train", "test"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert len(flat(one.test) & flat(other.test)) < 0.8 * len(one.test)
    few = disjoint_split(LABELS, **USUAL | {"per_class": 15})
    train = counts(few.train)[~np.isin(np.arange(1, 17), few.excluded)]
    assert train.max() == 15
    assert train.min() >= ENOUGH
    assert np.median(train) == 15


def test_far_is_what_a_maximum_filter_finds() -> None:
    random = np.random.default_rng(0)
    for window in (1, 3, 9, 25):
        mask = random.random((40, 30)) < 0.01
        mask[0, 0] = mask[39, 29] = True
        places = random.permutation(mask.size)
        expected = ndimage.maximum_filter(mask, size=window, mode="constant") == 0
        found = module._far(mask.shape, places, mask.ravel()[places], window)
        np.testing.assert_array_equal(found, expected.ravel()[places])


def test_patches_are_as_large_as_a_window() -> None:
    blocks = random_split(LABELS, **USUAL).blocks
    assert blocks.shape == LABELS.shape
    assert len(np.unique(blocks)) == 36
    for number in (0, 7, 35):
        rows, cols = np.nonzero(blocks == number)
        assert np.ptp(rows) < 25
        assert np.ptp(cols) < 25
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(cols) + 1)


@pytest.mark.slow
def test_the_seeds_of_disjoint_splits_are_all_of_use() -> None:
    kept = []
    for seed in range(6):
        split = disjoint_split(LABELS, **USUAL | {"seed": seed})
        kept.append(len(split.test))
        assert split.excluded == (1, 7, 9, 16)
    assert min(kept) > 3500

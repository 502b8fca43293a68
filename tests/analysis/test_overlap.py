from __future__ import annotations

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from excite.analysis.overlap import accuracy_by_distance, overlap


def test_against_windows_that_are_looked_through_and_scikit_learns_nearest_neighbour() -> None:
    draw = np.random.default_rng(0)
    ground = np.kron(draw.integers(0, 3, (4, 4)), np.ones((10, 10), dtype=np.int64))  # fields of three crops
    places = np.argwhere(ground >= 0)
    chosen = draw.random(len(places)) < 0.02
    train, test = places[chosen], places[~chosen]
    labels = ground[tuple(train.T)], ground[tuple(test.T)]

    for window in (3, 7, 15):
        is_train = np.zeros(ground.shape, dtype=bool)
        is_train[tuple(train.T)] = True
        half = window // 2
        framed = np.pad(is_train, half)
        holds = [framed[row : row + window, column : column + window].any() for row, column in test]
        assert overlap(train, labels[0], test, labels[1], window).windows == 100 * np.mean(holds)

    theirs = KNeighborsClassifier(1).fit(train, labels[0])
    distances, _ = theirs.kneighbors(test, 2)
    clear = distances[:, 0] < distances[:, 1]  # two that are as near may be taken either way
    ours = overlap(train, labels[0], test[clear], labels[1][clear], 3).nearest
    assert ours == 100 * theirs.score(test[clear], labels[1][clear])


def test_accuracy_by_distance_against_all_pairs_of_pixels() -> None:
    draw = np.random.default_rng(1)
    train, test = draw.integers(0, 40, (9, 2)), draw.integers(0, 40, (300, 2))
    classes, labels = draw.integers(0, 3, 9), draw.integers(0, 4, 300)  # of class 3 there is no training pixel
    right = draw.random(300) < 0.5
    pairs = np.abs(test[:, None] - train[None]).max(2).astype(float)
    pairs[labels[:, None] != classes[None]] = np.inf
    distance = pairs.min(1)
    test, labels, right, distance = (part[distance > 0] for part in (test, labels, right, distance))

    ranges = accuracy_by_distance(train, classes, test, labels, right)
    assert sum(found.pixels for found in ranges) == len(test)
    assert ranges[-1].farthest is None
    for found in ranges:
        here = (distance >= found.nearest) & (distance <= (found.farthest or np.inf))
        assert found.pixels == here.sum()
        assert found.accuracy == 100 * right[here].mean()

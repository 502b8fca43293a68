from __future__ import annotations

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from excite.analysis.overlap import overlap


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

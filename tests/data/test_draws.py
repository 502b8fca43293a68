from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from excite.data.draws import _GOLDEN, _mix, bits, hold_out, permutation, uniform

INDEX = np.arange(20_000)


def test_mix_is_splitmix64() -> None:
    # The published first outputs of SplitMix64 for the seed 1234567 (rosettacode.org, "Pseudo-random
    # numbers/Splitmix64"): the state grows by the golden step before each output.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state = np.uint64(1234567) + _GOLDEN * np.arange(1, 6, dtype=np.uint64)
    assert _mix(state).tolist() == expected


def test_draws_are_uniform() -> None:
    draws = uniform(3, 5, INDEX, "crop", 4)
    assert draws.shape == (20_000, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        counts, _ = np.histogram(column, bins=50, range=(0, 1))
        assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 0, "crop"), (0, 0, "flip")), ((0, 0, "crop"), (0, 1, "crop")), ((0, 0, "crop"), (1, 0, "crop"))],
    ids=["stream", "epoch", "seed"],
)
def test_draws_of_another_stream_epoch_or_seed_are_independent(
    first: tuple[int, int, str], second: tuple[int, int, str]
) -> None:
    a, b = (uniform(seed, epoch, INDEX, stream)[:, 0] for seed, epoch, stream in (first, second))
    table, _, _ = np.histogram2d(a, b, bins=8, range=[[0, 1], [0, 1]])
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_neighbouring_samples_and_successive_draws_are_uncorrelated() -> None:
    draws = uniform(0, 0, INDEX, "crop", 2)
    for a, b in [(draws[:-1, 0], draws[1:, 0]), (draws[:, 0], draws[:, 1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))


def test_a_sample_draws_the_same_in_any_company() -> None:
    whole = bits(1, 2, INDEX, "noise", 3)
    chosen = np.array([17, 3, 19_999, 3])
    np.testing.assert_array_equal(bits(1, 2, chosen, "noise", 3), whole[chosen])


def test_another_process_draws_the_same() -> None:
    code = "import numpy as np; from excite.data.draws import bits; print(bits(1, 2, np.arange(3), 'noise').tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(bits(1, 2, np.arange(3), "noise").tolist())


def test_permutation_holds_every_sample_once_and_changes_with_epoch_and_seed() -> None:
    orders = [permutation(0, 0, 1000), permutation(0, 1, 1000), permutation(1, 0, 1000)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    for a, b in pairwise(orders):
        assert (a != b).mean() > 0.9
    np.testing.assert_array_equal(orders[0], permutation(0, 0, 1000))


def test_all_permutations_are_equally_likely() -> None:
    counts = np.zeros(24)
    codes = {}
    for seed in range(4800):
        order = tuple(permutation(seed, 0, 4).tolist())
        counts[codes.setdefault(order, len(codes))] += 1
    assert len(codes) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_hold_out_takes_the_share_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 10, 2])
    names = [f"{i}.png" for i in range(len(labels))]
    held = hold_out(labels, names, 0.2, seed=0)
    assert [int(held[labels == c].sum()) for c in range(3)] == [20, 2, 1]
    assert (hold_out(labels, names, 0.2, seed=1) != held).any()


def test_hold_out_keeps_a_class_of_one_and_both_parts_of_a_class_of_two() -> None:
    labels = np.array([0, 1, 1])
    held = hold_out(labels, ["a", "b", "c"], 0.99, seed=0)
    assert not held[0]
    assert held[1:].sum() == 1


def test_hold_out_depends_on_names_not_on_positions() -> None:
    names = [f"{i}.png" for i in range(200)]
    labels = np.zeros(200, dtype=np.int64)
    held = {name for name, one in zip(names, hold_out(labels, names, 0.25, 0), strict=True) if one}
    shuffled = [names[i] for i in np.random.default_rng(0).permutation(200)]
    again = {name for name, one in zip(shuffled, hold_out(labels, shuffled, 0.25, 0), strict=True) if one}
    assert held == again
    # One more image moves at most one of the others.
    more = [*names, "new.png"]
    grown = hold_out(np.zeros(201, dtype=np.int64), more, 0.25, 0)
    with_more = {name for name, one in zip(more, grown, strict=True) if one}
    assert len((held ^ with_more) - {"new.png"}) <= 1

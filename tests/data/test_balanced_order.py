from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from excite.data import Augmentation, Loader, Preprocessing, Split
from excite.data.base import StackedImages
from excite.data.draws import balanced, permutation, windowed
from excite.errors import UsageError

LABELS = {
    "even": np.arange(40) % 4,
    "skewed": np.repeat([0, 1, 2], [30, 7, 1]),
    "more classes than rounds": np.arange(7),
    "a class without samples": np.array([0, 0, 3, 3, 3, 1]),
    "one class": np.zeros(5, dtype=np.int64),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("epoch", [0, 3])
def test_class_aware_sampling_goes_through_its_lists(labels: np.ndarray, epoch: int) -> None:
    count, there = len(labels), np.unique(labels)
    order = balanced(5, epoch, labels)
    assert len(order) == count
    samples, times = order % count, order // count
    classes = labels[samples]
    # The list of classes: each time through it holds every class once.
    for begin in range(0, count, len(there)):
        part = classes[begin : begin + len(there)]
        assert len(set(part)) == len(part)
    counts = Counter(classes.tolist())
    assert max(counts.values()) - min(counts[c] for c in there.tolist()) <= (count % len(there) > 0)
    for c in there:
        # The list of a class: each time through it holds every sample once.
        own, size = samples[classes == c], int((labels == c).sum())
        for begin in range(0, len(own), size):
            part = own[begin : begin + size]
            assert len(set(part.tolist())) == len(part)
    # The number of a drawing says how often the sample came before.
    seen: Counter[int] = Counter()
    for sample, time in zip(samples.tolist(), times.tolist(), strict=True):
        assert time == seen[sample]
        seen[sample] += 1


def test_lists_are_shuffled_anew_each_time() -> None:
    labels = np.repeat(np.arange(6), [60, 12, 12, 12, 12, 12])
    order = balanced(0, 0, labels)
    classes = labels[order % len(labels)]
    rounds = {tuple(classes[begin : begin + 6].tolist()) for begin in range(0, len(order), 6)}
    assert len(rounds) > 15  # of 20, among 720 that there may be
    own = (order % len(labels))[classes == 1]
    assert own[:12].tolist() != own[12:].tolist()[:12]
    assert (balanced(0, 1, labels) != order).any()
    assert (balanced(1, 0, labels) != order).any()
    np.testing.assert_array_equal(balanced(0, 0, labels), order)


def test_over_many_epochs_classes_and_samples_come_at_any_place_equally_often() -> None:
    labels = np.repeat(np.arange(3), [6, 2, 1])
    first = np.array([balanced(0, epoch, labels)[0] for epoch in range(3000)])
    # Each class 1/3, and in it each sample alike: within five standard deviations of a binomial count.
    for sample, chance in enumerate([1 / 18] * 6 + [1 / 6] * 2 + [1 / 3]):
        assert abs((first == sample).sum() - 3000 * chance) < 5 * np.sqrt(3000 * chance * (1 - chance))


PLAIN = Preprocessing(8, (0.5,) * 3, (0.25,) * 3)


def skewed(sizes: tuple[int, ...] = (20, 3, 1)) -> Split:
    labels = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (len(labels), 3, 8, 8), dtype=np.uint8))
    return Split(StackedImages(pixels, labels), labels, [f"{i}" for i in range(len(labels))], len(sizes))


def test_repeats_of_an_image_are_augmented_each_in_its_own_way() -> None:
    split = skewed()
    loader = Loader(split, PLAIN, 8, seed=0, shuffle=True, balanced=True, augment=Augmentation(crop="pad", padding=4))
    images: dict[int, list[bytes]] = {}
    for x, y, index in loader:
        assert torch.equal(y, split.labels[index])
        for image, i in zip(x, index.tolist(), strict=True):
            images.setdefault(i, []).append(image.numpy().tobytes())
    assert len(images[23]) == 8
    assert len(set(images[23])) > 4  # 81 windows to choose from
    plain = Loader(split, PLAIN, 8, seed=0, shuffle=True, balanced=True)
    lone = {image.numpy().tobytes() for x, _, index in plain for image, i in zip(x, index, strict=True) if i == 23}
    assert len(lone) == 1


def test_mixed_with_what_comes_next_even_where_that_is_the_same_image_again() -> None:
    split = skewed((6, 1))
    options: dict[str, Any] = {"seed": 1, "shuffle": True, "balanced": True}
    raw = [split.images[i][0].numpy().astype(np.float64) / 255 for i in range(7)]
    order = torch.cat([index for _, _, index in Loader(split, PLAIN, 4, **options)]).tolist()
    assert any(a == b == 6 for a, b in pairwise([*order, order[0]]))  # one round ends with it, the next begins
    place = 0
    for x, y, index in Loader(split, PLAIN, 4, augment=Augmentation(mixup=1.0), **options):
        for image, target, i in zip(x, y, index.tolist(), strict=True):
            assert i == order[place]
            partner = order[(place + 1) % 7]
            place += 1
            found = image.numpy() * 0.25 + 0.5
            if i == partner:
                np.testing.assert_allclose(found, raw[i], atol=1e-5)
                continue
            own, other = raw[i], raw[partner]
            kept = float(((found - other) * (own - other)).sum() / ((own - other) ** 2).sum())
            np.testing.assert_allclose(found, kept * own + (1 - kept) * other, atol=1e-5)
            expected = np.zeros(2)
            expected[int(split.labels[i])] += kept
            expected[int(split.labels[partner])] += 1 - kept
            np.testing.assert_allclose(target.numpy(), expected, atol=1e-4)


def test_digits_are_drawn_anew_at_each_repeat() -> None:
    from excite.data import load_data

    data = load_data("digits")
    assert data.train is not None
    images = data.train.images
    n = len(data.train)
    batch = images.batch(np.array([0, n, 2 * n, 1]), 0, 0)
    assert len({image.numpy().tobytes() for image in batch[:3]}) == 3
    assert torch.equal(batch[0], images.batch(np.array([0]), 0, 0)[0])


def test_a_balanced_epoch_is_cut_and_resumed_and_not_mistaken_for_another() -> None:
    def loader(**options: Any) -> Loader:
        return Loader(skewed(), PLAIN, 5, seed=0, shuffle=True, **options)

    whole = [index.tolist() for _, _, index in loader(balanced=True)]
    cut = loader(balanced=True)
    batches = iter(cut)
    assert [next(batches)[2].tolist() for _ in range(2)] == whole[:2]
    resumed = loader(balanced=True)
    resumed.load_state_dict(cut.state_dict())
    assert [index.tolist() for _, _, index in resumed] == whole[2:]
    with pytest.raises(UsageError, match="balanced True, but here it is None"):
        loader().load_state_dict(cut.state_dict())
    with pytest.raises(UsageError, match="balanced None, but here it is True"):
        loader(balanced=True).load_state_dict(loader().state_dict())


def test_evaluation_is_never_balanced() -> None:
    seen = [i for _, _, index in Loader(skewed(), PLAIN, 5, seed=0, balanced=True) for i in index.tolist()]
    assert seen == list(range(24))


# --- groups that are seen together ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "together"), [(7, 1), (7, 2), (7, 3), (10, 4)])
def test_groups_are_seen_so_many_at_a_time(groups: int, together: int) -> None:
    group = np.repeat(np.arange(groups), np.arange(1, groups + 1) * 3)
    order = windowed(0, 2, group, together)
    assert sorted(order.tolist()) == list(range(len(group)))
    places: list[list[int]] = []  # the groups of each window, in the order in which they are first seen
    for g in group[order].tolist():
        if places and g in places[-1]:
            continue
        assert all(g not in window for window in places)  # a window that is over does not come again
        if not places or len(places[-1]) == together:
            places.append([])
        places[-1].append(g)
    assert [len(window) for window in places] == [together] * (groups // together) + [groups % together] * (
        groups % together > 0
    )


def test_inside_a_window_all_orders_come_up() -> None:
    group = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    orders = np.array([windowed(0, epoch, group, 2) for epoch in range(2000)])
    assert len({tuple(sorted(set(group[order[:4]].tolist()))) for order in orders}) == 6  # any two of four
    # Whoever comes first comes second with each of the other three samples of the window equally often.
    own = orders[orders[:, 0] == 0][:, 1]
    mate = (own == 1).mean()
    assert abs(mate - 1 / 3) < 5 * np.sqrt(2 / 9 / len(own))


def test_all_groups_at_once_is_the_plain_permutation() -> None:
    group = np.arange(50) // 7
    for together in (8, 9, 100):
        np.testing.assert_array_equal(windowed(3, 1, group, together), permutation(3, 1, 50))

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from sklearn import datasets
from sklearn.neighbors import KNeighborsClassifier

from excite.data import Augmentation, Loader, load_data
from excite.data import digits as drawing
from excite.data.base import StackedImages
from excite.data.digits import DigitImages
from excite.errors import UsageError

DATA = load_data("digits")
INDEX = np.arange(400)


def train_images() -> DigitImages:
    assert DATA.train is not None
    assert isinstance(DATA.train.images, DigitImages)
    return DATA.train.images


def test_the_set() -> None:
    assert DATA.classes == tuple("0123456789")
    assert DATA.train is not None
    assert DATA.test is not None
    assert DATA.val is None
    assert len(DATA.train) + len(DATA.test) == 1797
    assert set(DATA.train.names).isdisjoint(DATA.test.names)
    source = datasets.load_digits()
    for split in (DATA.train, DATA.test):
        numbers = [int(name.removeprefix("digit-")) for name in split.names]
        np.testing.assert_array_equal(split.labels.numpy(), source.target[numbers])
    shares = torch.bincount(DATA.test.labels) / torch.from_numpy(np.bincount(source.target))
    assert ((shares - 0.25).abs() < 0.01).all()
    assert (DATA.preprocessing.size, DATA.preprocessing.channels) == (32, 3)
    assert DATA.augmentation == Augmentation()


def test_the_test_split_is_the_same_whatever_the_seed_and_the_validation() -> None:
    other = load_data("digits", seed=7, val_fraction=0.2)
    assert other.test is not None
    assert DATA.test is not None
    assert isinstance(DATA.test.images, StackedImages)
    assert isinstance(other.test.images, StackedImages)
    assert torch.equal(other.test.images.pixels, DATA.test.images.pixels)
    assert other.val is not None
    assert other.train is not None
    assert DATA.train is not None
    assert set(other.val.names) | set(other.train.names) == set(DATA.train.names)
    assert set(other.val.names).isdisjoint(other.train.names)
    assert other.val.scales is not None
    assert len(other.val.scales) == len(other.val) == pytest.approx(0.2 * len(DATA.train), abs=5)


def test_scales_are_log_uniform() -> None:
    assert DATA.test is not None
    assert DATA.test.scales is not None
    for scales in (DATA.test.scales.numpy(), train_images().scales(INDEX, 0, 3)):
        assert stats.kstest(np.log2(scales), stats.uniform(-1, 2).cdf).pvalue > 1e-4


def test_training_digits_are_drawn_anew_in_each_epoch_and_alike_in_any_batch() -> None:
    images = train_images()
    first = images.batch(INDEX, 0, 0)
    assert first.shape == (400, 3, 32, 32)
    assert first.dtype == torch.uint8
    assert torch.equal(first[:, 0], first[:, 2])
    part = np.array([5, 399, 0])
    assert torch.equal(images.batch(part, 0, 0), first[part])
    for other in (images.batch(INDEX, 0, 1), images.batch(INDEX, 1, 0)):
        assert (other != first).flatten(1).any(1).all()
    assert torch.equal(images[7][0], images[7][0])


def test_a_digit_has_the_size_that_its_scale_says(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without noise and on black paper what is lit is the digit: its full-height ones span the drawn size.
    monkeypatch.setattr(drawing, "NOISE", 0.0)
    monkeypatch.setattr(drawing, "PAPER", (0.0, 0.0))
    full = DigitImages(np.ones((400, 8, 8), dtype=np.float32), torch.zeros(400, dtype=torch.int64))
    lit = full.batch(INDEX, 0, 0)[:, 0].numpy() > 0
    size = 16 * full.scales(INDEX, 0, 0)
    for span in (lit.any(1).sum(1), lit.any(2).sum(1)):
        # Linear interpolation fades out over half a source pixel at either side.
        assert (np.abs(span - size) <= size / 8 + 2).all()
    inside = lit.any((1, 2)).all()
    assert inside


def test_a_digit_is_drawn_by_linear_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "NOISE", 0.0)
    monkeypatch.setattr(drawing, "PAPER", (0.0, 0.0))
    monkeypatch.setattr(drawing, "CONTRAST", (1.0, 1.0))
    monkeypatch.setattr(drawing, "SCALES", (2.0, 2.0))  # 32 pixels: the place is fixed too
    images = train_images()
    drawn = images.batch(INDEX[:20], 0, 0)[:, 0].numpy() / 255
    centers = (np.arange(32) + 0.5) / 4 - 0.5
    grid = np.meshgrid(centers, centers, indexing="ij")
    for digit, one in zip(images.digits[:20], drawn, strict=True):
        reference = ndimage.map_coordinates(np.pad(digit, 2), [axis + 2 for axis in grid], order=1)
        np.testing.assert_allclose(one, reference, atol=0.003)


def test_the_noise_has_mean_0_and_variance_1_and_differs_between_pixels_and_images() -> None:
    noise = drawing._noise(0, 0, np.arange(50))
    assert noise.shape == (50, 32, 32)
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 0.03
    flat = noise.reshape(50, -1)
    assert abs(np.corrcoef(flat[:, :-1].ravel(), flat[:, 1:].ravel())[0, 1]) < 0.02
    assert np.abs(np.corrcoef(flat) - np.eye(50)).max() < 0.2


def test_mean_and_std_are_those_of_the_training_images() -> None:
    assert DATA.train is not None
    x = torch.cat([x for x, _, _ in Loader(DATA.train, DATA.preprocessing, 256, seed=0, shuffle=True)])
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05


def test_it_is_a_real_task() -> None:
    """Nearest neighbours, which know nothing of place and scale, do better than chance and far from well."""
    assert DATA.train is not None
    assert DATA.test is not None
    train = torch.cat([train_images().batch(np.arange(len(DATA.train)), 0, epoch) for epoch in range(3)])
    labels = DATA.train.labels.repeat(3)
    assert isinstance(DATA.test.images, StackedImages)
    test = DATA.test.images.pixels[:, 0].flatten(1).numpy()
    score = KNeighborsClassifier(1).fit(train[:, 0].flatten(1).numpy(), labels).score(test, DATA.test.labels)
    assert 0.15 < score < 0.6


def test_one_channel_and_bad_sizes() -> None:
    data = load_data("digits", channels=1)
    assert data.train is not None
    assert data.train.images[0][0].shape == (1, 32, 32)
    assert len(data.preprocessing.mean) == 1
    with pytest.raises(UsageError, match="32×32"):
        load_data("digits", image_size=64)
    with pytest.raises(UsageError, match="digits has the classes"):
        load_data("digits", classes=["a", "b"])

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from excite.data import Augmentation, Loader, Preprocessing, Split, from_datasets
from excite.errors import UsageError

SMALL = Preprocessing(8, (0.5,) * 3, (0.25,) * 3)
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8))
LABELS = torch.arange(20) % 3


class Listed(Dataset[tuple[Any, int]]):
    """A dataset as users write them; ``reads`` counts what was asked for."""

    def __init__(self, images: list[Any], labels: list[int], transform: Any = None) -> None:
        self.images, self.own_labels, self.transform = images, labels, transform
        self.reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        self.reads += 1
        image = self.images[i]
        return (image if self.transform is None else self.transform(image)), self.own_labels[i]


def split_of(data: Any) -> Split:
    split = data.train
    assert isinstance(split, Split)
    return split


def batches(split: Split, preprocessing: Preprocessing, **options: Any) -> list[tuple[torch.Tensor, ...]]:
    return list(Loader(split, preprocessing, 8, seed=0, shuffle=True, **options))


def test_float_tensors_are_fed_as_they_are() -> None:
    images = torch.randn(20, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    data = from_datasets(TensorDataset(images, LABELS), None)
    assert data.classes == ("0", "1", "2")
    assert data.test is None
    for x, y, index in batches(split_of(data), data.preprocessing):
        assert torch.equal(x, images[index])
        assert torch.equal(y, LABELS[index])


def test_uint8_tensors_and_pil_images_are_preprocessed() -> None:
    expected = v2.Normalize(SMALL.mean, SMALL.std)(PIXELS / 255)
    for images in (list(PIXELS), [v2.functional.to_pil_image(image) for image in PIXELS]):
        data = from_datasets(Listed(images, LABELS.tolist()), None, preprocessing=SMALL)
        for x, _, index in batches(split_of(data), SMALL):
            torch.testing.assert_close(x, expected[index])


def test_a_users_random_transforms_hang_on_seed_epoch_and_index() -> None:
    def shake(image: torch.Tensor) -> torch.Tensor:
        return image.float() + torch.rand(()) + random.random() + float(np.random.rand())

    data = from_datasets(Listed(list(PIXELS), LABELS.tolist(), shake), None)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def shifts(workers: int, batch_size: int, epoch: int) -> dict[int, float]:
        loader = Loader(split_of(data), data.preprocessing, batch_size, seed=0, shuffle=True, workers=workers)
        loader.set_epoch(epoch)
        return {
            int(i): float((image - PIXELS[i]).mean())
            for x, _, index in loader
            for image, i in zip(x, index, strict=True)
        }

    first = shifts(0, 8, 0)
    assert len({round(value, 4) for value in first.values()}) > 15
    assert first == shifts(0, 5, 0) == shifts(1, 8, 0)
    assert first != shifts(0, 8, 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_augmentation_on_top() -> None:
    choice = Augmentation(flip=1.0)
    data = from_datasets(TensorDataset(PIXELS.float(), LABELS), None, augmentation=choice)
    assert data.augmentation == choice
    for x, _, index in batches(split_of(data), data.preprocessing, augment=choice):
        assert torch.equal(x, PIXELS[index].float().flip(-1))


def test_labels_come_from_targets_without_reading_images() -> None:
    dataset = Listed(list(PIXELS), LABELS.tolist())
    dataset.targets = LABELS.tolist()  # type: ignore[attr-defined]
    dataset.classes = ["a", "b", "c"]  # type: ignore[attr-defined]
    data = from_datasets(dataset, None, preprocessing=SMALL)
    assert dataset.reads <= 1
    assert data.classes == ("a", "b", "c")
    assert torch.equal(split_of(data).labels, LABELS)


def test_all_three_splits() -> None:
    parts = [TensorDataset(PIXELS[:n].float(), LABELS[:n]) for n in (10, 6, 4)]
    data = from_datasets(parts[0], parts[1], val=parts[2], classes=["x", "y", "z"], name="mine")
    assert [len(split) for split in (data.train, data.test, data.val) if split] == [10, 6, 4]
    assert (data.name, data.classes) == ("mine", ("x", "y", "z"))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_classes(label: int) -> None:
    labels = LABELS.clone()
    labels[4] = label
    dataset = TensorDataset(PIXELS.float(), labels)
    with pytest.raises(UsageError, match=rf"Image 4 of the train dataset has the label {label}, .* 0 … 2"):
        from_datasets(dataset, None, classes=["a", "b", "c"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "The train dataset is empty"),
        ([torch.zeros(3, 8, 8, dtype=torch.int64)] * 2, "torch.int64"),
        ([torch.zeros(8, 8)] * 2, r"shape \(8, 8\)"),
        ([np.zeros((8, 8, 3))] * 2, "ndarray"),
        ([torch.zeros(4, 8, 8)] * 2, "4 channels"),
        ([Image.new("RGB", (8, 8))] * 2, "Preprocessing"),
    ],
)
def test_images_of_no_use(images: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_datasets(Listed(images, [0, 1]), None)


def test_nothing_given() -> None:
    with pytest.raises(UsageError, match="Neither"):
        from_datasets(None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 0}, "channels is 0"),
        ({"size": 0}, "size is 0"),
        ({"resize": 6}, "resize 6"),
        ({"mean": (0.5,)}, "mean has 1"),
        ({"std": (1, 1, 0)}, "above 0"),
        ({"interpolation": "cubic"}, "'bilinear' or 'bicubic'"),
    ],
)
def test_bad_preprocessing(values: dict[str, Any], message: str) -> None:
    fine = {"size": 8, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    with pytest.raises(UsageError, match=message):
        Preprocessing(**(fine | values))

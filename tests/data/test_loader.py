from __future__ import annotations

import io
import logging
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from excite.data import Augmentation, Loader, Preprocessing, Split, load_data
from excite.data.augment import ResizedWindows
from excite.data.base import StackedImages
from excite.errors import ExciteError, UsageError

PLAIN = Preprocessing(8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
STANDARD = Augmentation(crop="pad", padding=2, flip=0.5)
ALL = Augmentation(crop="pad", padding=2, flip=0.5, randaugment=1, erasing=0.5, mixup=0.4, cutmix=1.0)


def stacked(count: int, classes: int = 3) -> Split:
    """Noise images, each with its own number in its first pixels."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))
    labels = torch.arange(count) % classes
    return Split(StackedImages(pixels, labels), labels, [f"{i}" for i in range(count)], classes)


def by_index(loader: Loader) -> dict[int, tuple[bytes, bytes]]:
    """Every image and target of an epoch, by its index."""
    seen = {}
    for x, y, index in loader:
        for i, image, target in zip(index.tolist(), x, y, strict=True):
            assert i not in seen
            seen[i] = (image.numpy().tobytes(), target.numpy().tobytes())
    return seen


def assert_same(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one, other)


# --- what a batch is ------------------------------------------------------------------------------------------


def test_a_batch_is_normalised_as_torchvision_does() -> None:
    split = stacked(10)
    (x, y, index) = next(iter(Loader(split, PLAIN, 10, seed=0)))
    assert isinstance(split.images, StackedImages)
    reference = v2.Normalize(PLAIN.mean, PLAIN.std)(v2.functional.to_dtype(split.images.pixels, scale=True))
    torch.testing.assert_close(x, reference)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert y.dtype == index.dtype == torch.int64
    assert torch.equal(y, split.labels)
    assert torch.equal(index, torch.arange(10))


def test_the_stored_pixels_stay_as_they_are() -> None:
    split = stacked(10)
    assert isinstance(split.images, StackedImages)
    before = split.images.pixels.clone()
    for x, _, _ in Loader(split, PLAIN, 4, seed=0, augment=ALL, shuffle=True):
        x.zero_()
    assert torch.equal(split.images.pixels, before)


@pytest.mark.parametrize(("count", "sizes"), [(12, [4, 4, 4]), (10, [4, 4, 2]), (9, [4, 5]), (3, [3])])
def test_a_training_batch_is_never_one_image(count: int, sizes: list[int]) -> None:
    loader = Loader(stacked(count), PLAIN, 4, seed=0, shuffle=True)
    assert [len(x) for x, _, _ in loader] == sizes
    assert len(loader) == len(sizes)
    assert set(by_index(loader)) == set(range(count))


def test_in_evaluation_it_may_be_one() -> None:
    loader = Loader(stacked(9), PLAIN, 4, seed=0)
    assert [index.tolist() for _, _, index in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert len(loader) == 3


def test_soft_targets_where_images_are_mixed() -> None:
    split = stacked(40)
    loader = Loader(split, PLAIN, 16, seed=0, augment=Augmentation(mixup=1.0), shuffle=True)
    plain = by_index(Loader(split, PLAIN, 16, seed=0))
    images = {i: np.frombuffer(x, dtype=np.float32) for i, (x, _) in plain.items()}
    order = torch.cat([index for _, _, index in loader]).tolist()
    for x, y, index in loader:
        assert y.shape == (len(x), 3)
        torch.testing.assert_close(y.sum(1), torch.ones(len(x)))
        for image, target, i in zip(x, y, index.tolist(), strict=True):
            # The partner is the image that comes next in the epoch's order, also over a batch's end.
            partner = order[(order.index(i) + 1) % 40]
            own, other = images[i], images[partner]
            kept = float(((image.numpy().ravel() - other) @ (own - other)) / ((own - other) @ (own - other)))
            np.testing.assert_allclose(image.numpy().ravel(), kept * own + (1 - kept) * other, atol=1e-4)
            expected = np.zeros(3)
            expected[int(split.labels[i])] += kept
            expected[int(split.labels[partner])] += 1 - kept
            np.testing.assert_allclose(target.numpy(), expected, atol=1e-4)


# --- what it depends on, and what not -------------------------------------------------------------------------


def test_order_and_augmentation_change_with_epoch_and_seed_only() -> None:
    split = stacked(50)
    loader = Loader(split, PLAIN, 16, seed=0, augment=STANDARD, shuffle=True)
    first = list(loader)
    assert_same(first, list(loader))
    loader.set_epoch(1)
    second = list(loader)
    assert not torch.equal(first[0][2], second[0][2])
    loader.set_epoch(0)
    assert_same(first, list(loader))
    other = Loader(split, PLAIN, 16, seed=1, augment=STANDARD, shuffle=True)
    assert not torch.equal(first[0][2], next(iter(other))[2])


@pytest.mark.parametrize("augment", [STANDARD, ALL], ids=["standard", "all"])
def test_an_image_comes_out_alike_whatever_the_batch_size(augment: Augmentation) -> None:
    split = stacked(50)
    small, large = (by_index(Loader(split, PLAIN, size, seed=0, augment=augment, shuffle=True)) for size in (7, 50))
    assert small == large


@pytest.mark.parametrize("augment", [STANDARD, ALL], ids=["standard", "all"])
def test_workers_make_the_same_batches_and_leave_the_global_generator_alone(augment: Augmentation) -> None:
    split = stacked(30)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    epochs = []
    for workers in (0, 2):
        loader = Loader(split, PLAIN, 8, seed=0, augment=augment, shuffle=True, workers=workers)
        batches = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches += list(loader)
        loader.set_epoch(5)
        next(iter(loader))  # left after one batch; the next epoch must not see the rest
        loader.set_epoch(2)
        epochs.append(batches + list(loader))
    assert len(epochs[0]) == 12
    assert_same(*epochs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_place_in_an_epoch_is_kept(workers: int) -> None:
    def loader() -> Loader:
        return Loader(stacked(50), PLAIN, 8, seed=0, augment=ALL, shuffle=True, workers=workers)

    whole = loader()
    whole.set_epoch(3)
    batches = list(whole)
    cut = loader()
    cut.set_epoch(3)
    assert_same(list(islice(cut, 2)), batches[:2])
    state = cut.state_dict()
    assert all(isinstance(value, (int, bool)) for value in state.values())

    resumed = loader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    iterator = iter(resumed)
    resumed.set_epoch(3)  # as Lightning does, after it has made the iterator
    assert_same(list(iterator), batches[2:])
    assert_same(list(resumed), batches)  # the next pass is a whole one
    assert len(resumed) == len(batches)


def test_the_end_of_an_epoch_is_a_place_too() -> None:
    loader = Loader(stacked(20), PLAIN, 8, seed=0, shuffle=True)
    loader.set_epoch(1)
    whole = list(loader)
    state = loader.state_dict()
    for epoch, expected in ((1, []), (2, None)):
        resumed = Loader(stacked(20), PLAIN, 8, seed=0, shuffle=True)
        resumed.load_state_dict(state)
        iterator = iter(resumed)
        resumed.set_epoch(epoch)
        rest = list(iterator)
        assert len(rest) == (len(whole) if expected is None else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 4}, "batch_size 8, but here it is 4"),
        ({"seed": 1}, "seed 0, but here it is 1"),
        ({"shuffle": False}, "shuffle True"),
        ({"world_size": 2}, "world_size 1, but here it is 2"),
    ],
)
def test_a_place_in_other_batches_is_refused(change: dict[str, Any], message: str) -> None:
    options = {"batch_size": 8, "seed": 0, "shuffle": True}
    state = Loader(stacked(20), PLAIN, **options).state_dict()
    with pytest.raises(UsageError, match=message):
        Loader(stacked(20), PLAIN, **(options | change)).load_state_dict(state)
    with pytest.raises(UsageError, match="images 20, but here it is 21"):
        Loader(stacked(21), PLAIN, **options).load_state_dict(state)


# --- several processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [24, 25, 31, 32, 33, 47])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_make_the_same_steps_on_different_images(count: int, world_size: int) -> None:
    split = stacked(count)
    ranks = [
        Loader(split, PLAIN, 4, seed=0, augment=STANDARD, shuffle=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = [[index.tolist() for _, _, index in loader] for loader in ranks]
    assert len({tuple(len(step) for step in rank) for rank in steps}) == 1
    assert min(len(step) for rank in steps for step in rank) >= 2
    assert {len(loader) for loader in ranks} == {len(steps[0])}
    seen = [i for rank in steps for step in rank for i in step]
    assert len(set(seen)) == len(seen) == count // world_size * world_size


def test_a_step_of_all_ranks_is_that_of_one_process_with_all_their_images() -> None:
    split = stacked(32)
    one = Loader(split, PLAIN, 8, seed=0, augment=ALL, shuffle=True)
    two = [Loader(split, PLAIN, 4, seed=0, augment=ALL, shuffle=True, rank=r, world_size=2) for r in range(2)]
    for whole, first, second in zip(one, *two, strict=True):
        assert_same([whole], [[torch.cat(parts) for parts in zip(first, second, strict=True)]])


@pytest.mark.parametrize("count", [1, 2, 9, 10])
def test_in_evaluation_every_image_is_seen_once(count: int) -> None:
    ranks = [Loader(stacked(count), PLAIN, 4, seed=0, rank=rank, world_size=2) for rank in range(2)]
    seen = [i for loader in ranks for _, _, index in loader for i in index.tolist()]
    assert sorted(seen) == list(range(count))
    for loader in ranks:
        assert len(list(loader)) == len(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1, "shuffle": True}, "batch size is 1"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "Rank 2 of 2"),
        ({"batch_size": 4, "shuffle": True, "world_size": 2}, "3 images on 2 processes"),
    ],
)
def test_impossible_batches(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Loader(stacked(3), PLAIN, seed=0, **options)


# --- images that are decoded when needed ----------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(6):
            height, width = rng.integers(70, 120, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path


def training(path: Path, memory_limit: int = 1 << 30, **options: Any) -> tuple[Split, Preprocessing]:
    data = load_data(path, image_size=32, memory_limit=memory_limit, **options)
    assert data.train is not None
    return data.train, data.preprocessing


RESIZED = Augmentation(crop="resized", flip=0.5, mixup=0.2)


def test_photos_come_out_alike_from_memory_and_from_files_and_from_workers(photos: Path) -> None:
    memory, files = training(photos), training(photos, 0)
    assert type(memory[0].images) is not type(files[0].images)
    expected = list(Loader(*memory, 4, seed=0, augment=RESIZED, shuffle=True))
    for workers in (0, 2):
        assert_same(expected, list(Loader(*files, 4, seed=0, augment=RESIZED, shuffle=True, workers=workers)))


def test_a_photo_is_resized_and_cropped_as_torchvision_does(photos: Path) -> None:
    split, preprocessing = training(photos)
    x = torch.cat([x for x, _, _ in Loader(split, preprocessing, 5, seed=0)])
    resized = math.floor(32 * 256 / 224 + 0.5)
    reference = v2.Compose(
        [
            v2.Resize(resized, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    torch.testing.assert_close(x, torch.stack([reference(split.images[i][0]) for i in range(len(split))]))


def test_a_window_of_a_photo_is_cut_and_resized_as_torchvision_does(photos: Path) -> None:
    split, preprocessing = training(photos)
    choice = Augmentation(crop="resized")
    for x, _, index in Loader(split, preprocessing, 6, seed=0, augment=choice, shuffle=True):
        for image, i in zip(x, index.tolist(), strict=True):
            photo = split.images[i][0]
            window = ResizedWindows(choice, 0, 0, np.array([i])).window(0, *photo.shape[1:])
            cut = F.resized_crop(photo, *window, [32, 32], antialias=True)
            expected = F.normalize(F.to_dtype(cut, torch.float32, scale=True), preprocessing.mean, preprocessing.std)
            torch.testing.assert_close(image, expected)


@pytest.fixture
def half_broken(photos: Path) -> Path:
    (photos / "train/cat/1.png").write_bytes(b"")
    content = (photos / "train/dog/4.png").read_bytes()
    (photos / "train/dog/4.png").write_bytes(content[:300])
    return photos


@pytest.mark.parametrize("workers", [0, 1])
def test_images_found_broken_while_training_are_named_once_and_left_out(
    half_broken: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    split, preprocessing = training(half_broken, 0)
    loader = Loader(split, preprocessing, 12, seed=0, augment=RESIZED, shuffle=True, workers=workers)
    with caplog.at_level(logging.WARNING, "excite.data"):
        for epoch in range(2):
            loader.set_epoch(epoch)
            ((x, y, index),) = list(loader)
            assert len(x) == len(y) == len(index) == 10
            assert not {split.names[i] for i in index.tolist()} & {"train/cat/1.png", "train/dog/4.png"}
            torch.testing.assert_close(y.sum(1), torch.ones(10))
    assert caplog.text.count("2 images are broken and skipped") == 1
    assert "train/cat/1.png (the file is empty)" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_images_found_broken_while_training_are_refused(half_broken: Path, workers: int) -> None:
    split, preprocessing = training(half_broken, 0, broken="refuse")
    loader = Loader(split, preprocessing, 12, seed=0, augment=RESIZED, shuffle=True, workers=workers)
    with pytest.raises(ExciteError, match=r"2 images are broken: .*train/cat/1\.png"):
        list(loader)


def test_a_training_batch_of_broken_images_ends_the_work(half_broken: Path) -> None:
    split, preprocessing = training(half_broken, 0)
    for path in (half_broken / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ExciteError, match="Fewer than two images"):
        list(Loader(split, preprocessing, 4, seed=0, shuffle=True))
    assert list(Loader(split, preprocessing, 4, seed=0)) == []


def test_a_jpeg_that_was_cut_off(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = io.BytesIO()
    Image.open(photos / "train/cat/0.png").save(buffer, "JPEG")
    (photos / "train/cat/9.jpg").write_bytes(buffer.getvalue()[:-200])
    with caplog.at_level(logging.WARNING, "excite.data"):
        split, _ = training(photos)
    assert split.broken == ("train/cat/9.jpg",)
    assert "truncated" in caplog.text


# --- with Lightning -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop_after", [2, 3, 4, 5, 7])
def test_lightning_goes_on_where_it_was_cut_off(tmp_path: Path, stop_after: int) -> None:
    import pytorch_lightning as pl

    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3 * 8 * 8, 3)
            self.seen: list[tuple[int, list[int]]] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            x, y, index = batch
            self.seen.append((self.current_epoch, index.tolist()))
            return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Cut(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step == stop_after:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                raise KeyboardInterrupt

    def fit(model: Recorder, checkpoint: Path | None, *callbacks: pl.Callback) -> None:
        trainer = pl.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        loader = Loader(stacked(30), PLAIN, 8, seed=0, augment=STANDARD, shuffle=True)  # 4 batches per epoch
        trainer.fit(model, loader, ckpt_path=checkpoint)

    whole, cut, resumed = Recorder(), Recorder(), Recorder()
    fit(whole, None)
    assert len(whole.seen) == 12
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(cut, None, Cut())
    fit(resumed, tmp_path / "cut.ckpt")
    assert cut.seen + resumed.seen == whole.seen


@pytest.mark.filterwarnings("ignore")
def test_lightning_validates_and_tests_on_every_image_once() -> None:
    import pytorch_lightning as pl

    class Counter(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3 * 8 * 8, 3)
            self.seen: list[int] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.layer(batch[0].flatten(1)).mean()

        def validation_step(self, batch: Any, _: int) -> None:
            self.seen += batch[2].tolist()

        test_step = validation_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = Counter()
    trainer.fit(model, Loader(stacked(16), PLAIN, 8, seed=0, shuffle=True), Loader(stacked(9), PLAIN, 4, seed=0))
    assert model.seen == [*range(9), *range(9)]
    model.seen.clear()
    trainer.test(model, Loader(stacked(9), PLAIN, 4, seed=0), verbose=False)
    assert model.seen == list(range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_become_the_same_input_on_the_device(photos: Path, workers: int) -> None:
    """What comes as bytes and is made ready later is what comes normalised, in values and in layout."""
    split, preprocessing = training(photos)
    augment = Augmentation(crop="resized", flip=0.5, rotate=10.0, jitter=20)
    options: dict[str, Any] = {"seed": 3, "augment": augment, "shuffle": True, "workers": workers}
    usual, late = (Loader(split, preprocessing, 4, pixels=pixels, **options) for pixels in (False, True))
    for (images, _, index), (pixels, _, other) in zip(usual, late, strict=True):
        assert torch.equal(index, other)
        assert pixels.dtype == torch.uint8
        ready = late.ready(pixels)
        assert torch.equal(ready, images)
        assert ready.stride() == images.stride()
        assert late.ready(images) is images


@pytest.mark.parametrize("augment", [Augmentation(erasing=1.0), Augmentation(mixup=0.2), Augmentation(cutmix=1.0)])
def test_what_works_on_normalised_images_gets_them(augment: Augmentation) -> None:
    options: dict[str, Any] = {"seed": 3, "augment": augment, "shuffle": True}
    usual, late = (Loader(stacked(20), PLAIN, 4, pixels=pixels, **options) for pixels in (False, True))
    for (images, *_), (same, *_) in zip(usual, late, strict=True):
        assert torch.equal(late.ready(same), images)

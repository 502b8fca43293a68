from __future__ import annotations

import io
import itertools
import logging
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from excite.data.clean import FileImages, HeldImages
from excite.data.degrade import Degradation
from excite.data.denoising import DenoisingSplit, load_denoising
from excite.data.patches import PatchLoader
from excite.errors import ExciteError, UsageError


def split_of(*images: np.ndarray, degradation: str = "gaussian:25", **more: Any) -> DenoisingSplit:
    """Images (C, H, W)."""
    names = tuple(f"{i}.png" for i in range(len(images)))
    return DenoisingSplit(names, HeldImages(images), len(images[0]), Degradation.parse(degradation), **more)


def numbered(height: int, width: int, first: int = 0) -> np.ndarray:
    """An image in which no two pixels are alike, uint16 (1, H, W)."""
    return (first + np.arange(height * width, dtype=np.uint16)).reshape(1, height, width)


def noise_image(height: int, width: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)


def smooth_image(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    values = 128 + 60 * np.sin(x / 4) * np.cos(y / 6) + 50 * (x * 7 % 50 < y)
    return np.clip(values, 0, 255).astype(np.uint8)[None]


def loader_of(
    split: DenoisingSplit, patch: int = 8, patches: int = 64, batch_size: int = 16, **more: Any
) -> PatchLoader:
    return PatchLoader(split, patch, patches, batch_size, **{"seed": 0, "scales": (1.0,), **more})


def whole(loader: PatchLoader) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An epoch in one piece."""
    noisy, clean, index = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return noisy, clean, index


def stored(clean: torch.Tensor, white: int = 65535) -> np.ndarray:
    return np.rint(clean.double().numpy() * white).astype(int)


def eight_ways(patch: np.ndarray) -> list[np.ndarray]:
    """The ways to lay a square (H, W)."""
    return [np.rot90(side, turns) for side in (patch, np.fliplr(patch)) for turns in range(4)]


def assert_same(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


SETTINGS = {
    "noise": "gaussian:0-55",
    "all": "gaussian:0-55,poisson:5-60,jpeg:5-99,bicubic:2-4",
}


def mixed(degradation: str = SETTINGS["all"], **more: Any) -> DenoisingSplit:
    return split_of(*(noise_image(40 + 5 * i, 60, i) for i in range(4)), degradation=degradation, **more)


# --- what a patch is ------------------------------------------------------------------------------------------


def test_a_batch() -> None:
    split = split_of(*(noise_image(40, 50, i, 3) for i in range(2)))
    loader = loader_of(split, patch=12, patches=50, batch_size=20)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    for noisy, clean, index in batches:
        assert noisy.shape == clean.shape == (len(index), 3, 12, 12)
        assert noisy.dtype == clean.dtype == torch.float32
        assert index.dtype == torch.int64
        assert noisy.is_contiguous()
        assert clean.is_contiguous()
        assert clean.min() >= 0
        assert clean.max() <= 1
    assert torch.cat([index for _, _, index in batches]).tolist() == list(range(50))


def test_a_patch_is_a_window_of_an_image_in_one_of_eight_ways_each_as_likely() -> None:
    height, width, side = 20, 26, 8
    image = numbered(height, width)
    _, clean, _ = whole(loader_of(split_of(image), side, 4000))
    ways, tops, lefts = np.zeros(8, int), np.zeros(height - side + 1, int), np.zeros(width - side + 1, int)
    for patch in stored(clean)[:, 0]:
        top, left = divmod(int(patch.min()), width)
        window = image[0, top : top + side, left : left + side]
        same = [np.array_equal(patch, way) for way in eight_ways(window)]
        assert sum(same) == 1
        ways += same
        tops[top] += 1
        lefts[left] += 1
    for counts in (ways, tops, lefts):
        assert stats.chisquare(counts).pvalue > 0.01


def test_images_are_drawn_in_proportion_to_their_area_at_each_scale() -> None:
    sizes, scales = [(10, 12), (20, 30), (16, 16)], (1.0, 0.7)
    # Each image has one value, by which it is known; both scales have it.
    images = [np.full((1, *size), 50 * (i + 1), dtype=np.uint8) for i, size in enumerate(sizes)]
    _, clean, _ = whole(loader_of(split_of(*images), 8, 5000, scales=scales))
    seen = np.bincount(stored(clean, 255)[:, 0, 0, 0] // 50, minlength=4)[1:]
    # 10×12 has no patch of 8 pixels at 0.7, where it is 7×9.
    area = np.array([120, 600 + 14 * 21, 256 + 12 * 12])
    assert stats.chisquare(seen, area / area.sum() * 5000).pvalue > 0.01


def test_a_scaled_image_is_resized_as_pillow_does() -> None:
    image, side = smooth_image(37, 52), 10
    _, clean, _ = whole(loader_of(split_of(image), side, 40, scales=(0.7,)))
    small = np.asarray(Image.fromarray(image[0]).resize((37, 26), Image.Resampling.BICUBIC)).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(small, (side, side)).reshape(-1, side, side)
    for patch in stored(clean, 255)[:, 0]:
        nearest = min(np.abs(windows - way).max(axis=(1, 2)).min() for way in eight_ways(patch))
        assert nearest <= 1
    levels = clean * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_a_scaled_image_of_sixteen_bits_keeps_them() -> None:
    image = smooth_image(30, 30).astype(np.uint16) * 4  # it takes 10 bits
    _, clean, _ = whole(loader_of(split_of(image), 8, 40, scales=(0.8,)))
    values = clean.double() * 65535
    torch.testing.assert_close(values, values.round(), rtol=0, atol=0.01)
    assert len(torch.unique(values.round() % 4)) == 4
    assert values.max() < 1100


def test_colours_stay_together() -> None:
    image = np.concatenate([numbered(20, 20), numbered(20, 20, 1000), numbered(20, 20, 2000)])
    _, clean, _ = whole(loader_of(split_of(image), 8, 50))
    values = stored(clean)
    assert (values[:, 1] - values[:, 0] == 1000).all()
    assert (values[:, 2] - values[:, 0] == 2000).all()


# --- how it is degraded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_is_of_its_level_and_new_in_each_patch(channels: int) -> None:
    split = split_of(noise_image(60, 60, channels=channels), degradation="gaussian:15")
    noisy, clean, _ = whole(loader_of(split, 20, 512, 64))
    noise = 255 * (noisy - clean).double().numpy()
    assert noise.std() == pytest.approx(15, rel=0.01)
    assert stats.kstest(noise.ravel()[::11], stats.norm(0, 15).cdf).pvalue > 0.01
    levels = noise.std(axis=(1, 2, 3))
    assert levels.max() < 15 * (1 + 5 / math.sqrt(2 * 400 * channels))
    patches = noise.reshape(512, -1) / 15
    correlation = np.abs(patches @ patches.T / patches.shape[1])[~np.eye(512, dtype=bool)]
    assert correlation.max() < 6 / math.sqrt(patches.shape[1])


def test_each_patch_has_a_level_of_its_own() -> None:
    split = split_of(noise_image(60, 60), degradation="gaussian:0-55")
    noisy, clean, _ = whole(loader_of(split, 32, 1000, 100))
    levels = 255 * (noisy - clean).std(dim=(1, 2, 3)).numpy()
    assert stats.kstest(levels, stats.uniform(0, 55).cdf).pvalue > 0.01


def jpeg(patch: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(patch.astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer)).astype(int)


def test_an_image_of_one_patch_is_degraded_as_a_whole() -> None:
    image = smooth_image(24, 24)
    for degradation in ("jpeg:10", "bicubic:3"):
        noisy, clean, _ = whole(loader_of(split_of(image, degradation=degradation), 24, 16))
        for one, patch in zip(noisy, clean, strict=True):
            expected = Degradation.parse(degradation).apply(patch, np.random.default_rng(0))
            torch.testing.assert_close(one, expected, rtol=0, atol=1e-7)
            if degradation == "jpeg:10":
                assert np.array_equal(stored(one, 255)[0], jpeg(stored(patch, 255)[0], 10))


def test_a_patch_does_not_tell_where_the_blocks_of_jpeg_begin() -> None:
    # At quality 1 a ramp becomes flat blocks: the steps between them are where the grid is.
    y, x = np.mgrid[:90, :90]
    split = split_of((1.4 * x + 1.4 * y).astype(np.uint8)[None], degradation="jpeg:1")
    noisy, _, _ = whole(loader_of(split, 32, 800, 100))
    for steps in (noisy.diff(dim=3).abs().sum(dim=(1, 2)), noisy.diff(dim=2).abs().sum(dim=(1, 3))):
        folded = torch.stack([steps[:, phase::8].sum(dim=1) for phase in range(8)], dim=1)
        clear = folded.max(dim=1).values > 0.9 * folded.sum(dim=1)
        assert clear.float().mean() > 0.9
        assert stats.chisquare(np.bincount(folded[clear].argmax(dim=1).numpy(), minlength=8)).pvalue > 0.01


def test_a_patch_of_lower_resolution_is_cut_from_a_larger_image() -> None:
    # A ramp keeps its values but for its ends: these must not be in a patch.
    ramp = np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[None], 120, axis=0)[None]
    noisy, clean, _ = whole(loader_of(split_of(ramp, degradation="bicubic:2-4"), 20, 200))
    # Unless the window lies at the picture's own end, to which its values are held on no side.
    assert (255 * (noisy - clean)).abs().flatten(1).max(dim=1).values.median() < 2.5
    sharp = split_of(noise_image(120, 120), degradation="bicubic:4")
    noisy, clean, _ = whole(loader_of(sharp, 20, 50))
    assert ((noisy - clean).abs().amax(dim=(1, 2, 3)) > 0.05).all()


def test_quantised_as_the_split_says() -> None:
    split = split_of(noise_image(40, 40), degradation="gaussian:50")
    plain, _, _ = whole(loader_of(split))
    rounded, _, _ = whole(loader_of(replace(split, quantised=True)))
    torch.testing.assert_close(rounded, plain.mul(255).round().clamp(0, 255) / 255)
    assert plain.min() < 0


# --- what it depends on, and what not -------------------------------------------------------------------------


def test_patches_change_with_epoch_and_seed_only() -> None:
    loader = loader_of(mixed(), scales=(1.0, 0.8))
    first = list(loader)
    assert_same(first, list(loader))
    loader.set_epoch(1)
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(first, loader, strict=True))
    loader.set_epoch(0)
    assert_same(first, list(loader))
    other = loader_of(mixed(), scales=(1.0, 0.8), seed=1)
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("memory_limit", [1 << 30, 6000])
def test_patches_are_alike_whatever_the_batch_size(memory_limit: int) -> None:
    small, large = (
        whole(loader_of(mixed(memory_limit=memory_limit), batch_size=size, scales=(1.0, 0.8))) for size in (7, 64)
    )
    assert all(map(torch.equal, small, large))


@pytest.mark.parametrize("memory_limit", [1 << 30, 6000])
def test_workers_make_the_same_batches_and_leave_the_global_generators_alone(memory_limit: int) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    epochs = []
    for workers in (0, 2):
        loader = loader_of(mixed(memory_limit=memory_limit), scales=(1.0, 0.8), workers=workers)
        batches = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches += list(loader)
        epochs.append(batches)
    assert len(epochs[0]) == 8
    assert_same(*epochs)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("memory_limit", [1 << 30, 6000])
@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_the_place_in_an_epoch_is_kept(memory_limit: int, done: int) -> None:
    def loader() -> PatchLoader:
        made = loader_of(mixed(memory_limit=memory_limit), scales=(1.0, 0.8))
        made.set_epoch(3)
        return made

    batches = list(loader())
    cut = loader()
    assert_same(list(islice(cut, done)), batches[:done])
    state = cut.state_dict()
    assert all(isinstance(value, (int, bool, str)) for value in state.values())
    resumed = loader_of(mixed(memory_limit=memory_limit), scales=(1.0, 0.8))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    iterator = iter(resumed)
    resumed.set_epoch(3)  # as Lightning does, after it has made the iterator
    assert_same(list(iterator), batches[done:])
    assert_same(list(resumed), batches)  # the next pass is a whole one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size 16, but here it is 8"),
        ({"seed": 1}, "seed 0, but here it is 1"),
        ({"patch": 9}, "patch 8, but here it is 9"),
        ({"patches": 65}, "patches 64, but here it is 65"),
        ({"scales": (1.0, 0.9)}, "scales 1, but here it is 1,0.9"),
        ({"world_size": 2}, "world_size 1, but here it is 2"),
    ],
)
def test_a_place_in_other_batches_is_refused(change: dict[str, Any], message: str) -> None:
    state = loader_of(mixed()).state_dict()
    with pytest.raises(UsageError, match=message):
        loader_of(mixed(), **change).load_state_dict(state)


def test_a_place_in_other_images_is_refused() -> None:
    state = loader_of(mixed(), scales=(1.0, 0.8)).state_dict()
    for split, message in (
        (split_of(noise_image(40, 40), degradation=SETTINGS["all"]), "images 4, but here it is 1"),
        (mixed("gaussian:25"), f"degradation {SETTINGS['all']}, but here it is gaussian:25"),
        (mixed(quantised=True), "quantised False"),
        (mixed(memory_limit=6000), "memory_limit 0, but here it is 6000"),
    ):
        with pytest.raises(UsageError, match=message):
            loader_of(split, scales=(1.0, 0.8)).load_state_dict(state)


# --- several processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [24, 25, 31, 47])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_make_the_same_steps_on_different_patches(patches: int, world_size: int) -> None:
    ranks = [
        loader_of(mixed(), patches=patches, batch_size=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = [[index.tolist() for _, _, index in loader] for loader in ranks]
    assert len({tuple(map(len, rank)) for rank in steps}) == 1
    assert min(map(len, itertools.chain(*steps))) >= 2
    seen = [i for rank in steps for step in rank for i in step]
    assert len(set(seen)) == len(seen) == patches // world_size * world_size


def test_a_step_of_all_ranks_is_that_of_one_process_with_all_their_patches() -> None:
    one = loader_of(mixed(), batch_size=16)
    two = [loader_of(mixed(), batch_size=8, rank=rank, world_size=2) for rank in range(2)]
    for step, first, second in zip(one, *two, strict=True):
        assert_same([step], [[torch.cat(parts) for parts in zip(first, second, strict=True)]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "The batch size is 1: training needs at least 2 patches"),
        ({"patches": 3, "world_size": 2}, "3 patches on 2 processes"),
        ({"rank": 2, "world_size": 2}, "Rank 2 of 2"),
        ({"patch": 61}, "No training image is as large as a patch of 61 pixels"),
    ],
)
def test_impossible_batches(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loader_of(mixed(), **options)


# --- sets that do not fit in memory ---------------------------------------------------------------------------


class Counted:
    """Images that are decoded when needed, and how often they were."""

    refuse = False

    def __init__(self, images: list[np.ndarray]) -> None:
        self.images = images
        self.sizes = [image.shape[1:] for image in images]
        self.item_sizes = [image.itemsize for image in images]
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        self.decoded.append(i)
        return self.images[i]


def test_an_epoch_goes_through_groups_that_fit_and_decodes_each_image_once() -> None:
    images = [np.full((1, 20 + i, 20), 10 * i, dtype=np.uint8) for i in range(20)]
    counted = Counted(images)
    limit = 2500
    split = DenoisingSplit(
        tuple(map(str, range(20))), counted, 1, Degradation.parse("gaussian:25"), memory_limit=limit
    )
    loader = loader_of(split, 8, 6000, 50, scales=(1.0, 0.7))
    orders = []
    seen = np.zeros(20, int)
    for epoch in range(2):
        loader.set_epoch(epoch)
        counted.decoded.clear()
        for _, clean, _ in loader:
            kept = sum(view.nbytes for views in loader._cutter._kept.values() for view in views)
            assert kept <= limit
            seen += np.bincount(stored(clean, 255)[:, 0, 0, 0] // 10, minlength=20)
        # The last group of one epoch may serve in the next.
        assert sorted(counted.decoded) == list(range(20)) if epoch == 0 else len(set(counted.decoded)) > 15
        assert len(set(counted.decoded)) == len(counted.decoded)
        orders.append(list(counted.decoded))
    assert orders[0] != orders[1]
    area = np.array([(20 + i) * 20 + math.ceil(0.7 * (20 + i)) * 14 for i in range(20)])
    assert stats.chisquare(seen, area / area.sum() * seen.sum()).pvalue > 0.01


def test_an_image_larger_than_the_limit_is_a_group_of_its_own() -> None:
    images = [noise_image(30, 30, i) for i in range(3)]
    split = DenoisingSplit(("a", "b", "c"), Counted(images), 1, Degradation.parse("gaussian:25"), memory_limit=10)
    assert len(whole(loader_of(split))[2]) == 64


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for i in range(6):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.fromarray(noise_image(50, 50, i)[0]).save(tmp_path / f"train/{i}.png")
    return tmp_path


def test_only_stored_pixels_are_held(files: Path) -> None:
    split = load_denoising(f"denoising:{files}").train
    assert split is not None
    loader = loader_of(split, 20, 128, scales=(1.0, 0.5))
    list(loader)
    views = [view for views in loader._cutter._kept.values() for view in views]
    assert {view.dtype for view in views} == {np.dtype(np.uint8)}
    assert sum(view.nbytes for view in views) == 6 * (50 * 50 + 25 * 25)
    assert views[0] is split.images[int(next(iter(loader._cutter._kept)))]


def test_broken_files_found_while_training_are_named_once_and_left_out(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = (files / "train/2.png").read_bytes()
    (files / "train/2.png").write_bytes(content[:-500])
    for workers in (0, 1):
        split = load_denoising(f"denoising:{files}", memory_limit=6000).train
        assert split is not None
        assert isinstance(split.images, FileImages)
        assert len(split) == 6
        loader = loader_of(split, 20, 120, 30, workers=workers)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "excite.data"):
            count = sum(len(index) for _, _, index in loader)
            assert 80 <= count <= 115
            loader.set_epoch(1)
            list(loader)
        assert caplog.text.count("1 image is broken and skipped: 2.png") == 1
    split = load_denoising(f"denoising:{files}", memory_limit=6000, broken="refuse").train
    assert split is not None
    with pytest.raises(ExciteError, match=r"1 image is broken: 2\.png"):
        list(loader_of(split, 20, 120, 30))

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.decomposition import PCA
from spectral.io import envi

from excite.data import Augmentation, Loader
from excite.data.base import BatchedImages
from excite.data.hyperspectral import SceneData, Windows, load_scene
from excite.data.spectra import Spectra
from excite.errors import ExciteError, UsageError

ROWS, COLS, BANDS = 40, 30, 8
RANDOM = np.random.default_rng(0)
VALUES = (1000 + RANDOM.normal(size=(ROWS, COLS, BANDS)) @ (100 * RANDOM.normal(size=(BANDS, BANDS)))).astype(
    np.float32
)
LABELS = np.kron(np.array([[0, 2, 3], [5, 2, 0], [3, 5, 5], [2, 0, 3]]), np.ones((10, 10), int))
SMALL = {"window": 5, "components": 3}


@pytest.fixture
def spec(tmp_path: Path) -> str:
    np.save(tmp_path / "scene.npy", VALUES)
    np.save(tmp_path / "scene_gt.npy", LABELS)
    return str(tmp_path / "scene.npy")


@pytest.fixture(scope="module")
def indian_pines() -> SceneData:
    return load_scene("indian-pines", train_ratio=0.1, val_fraction=0.1)


def usual_windows(image: np.ndarray, side: int) -> np.ndarray:
    """What the usual scripts make of (rows, cols, K): all windows of the scene, (rows, cols, K, side, side)."""
    framed = np.pad(image, ((side // 2, side // 2), (side // 2, side // 2), (0, 0)))
    return sliding_window_view(framed, (side, side), axis=(0, 1))


def test_indian_pines(indian_pines: SceneData) -> None:
    data = indian_pines
    assert data.task == "hyperspectral"
    assert len(data.classes) == 16
    assert data.kept == tuple(range(1, 17))
    assert data.classes[8] == "Oats"
    assert data.train is not None
    assert data.val is not None
    assert data.test is not None
    assert len(data.train) + len(data.val) + len(data.test) == 10249
    assert len(data.test) == pytest.approx(0.9 * 10249, abs=8)
    preprocessing = data.preprocessing
    assert (preprocessing.size, preprocessing.channels, preprocessing.mean[0], preprocessing.std[-1]) == (
        25,
        30,
        0,
        1,
    )
    assert data.augmentation == Augmentation(flip=0.5, quarter_turns=1.0)
    assert data.padded.shape == (30, 169, 169)
    assert data.padded.dtype == torch.float32
    for split in (data.train, data.val, data.test):
        assert isinstance(split.images, Windows)
        assert split.images.padded is data.padded  # one scene for all
        assert split.num_classes == 16
        assert split.blocks is not None
        assert split.blocks.shape == split.labels.shape


def test_windows_are_those_of_the_usual_scripts(indian_pines: SceneData) -> None:
    data = indian_pines
    cube = data.cube.read(0, 145).transpose(1, 2, 0).reshape(-1, 200).astype(np.float64)
    reduced = PCA(30, whiten=True, svd_solver="covariance_eigh").fit_transform(cube).reshape(145, 145, 30)
    reduced *= np.sign((reduced * data.padded[:, 12:-12, 12:-12].permute(1, 2, 0).numpy()).sum(axis=(0, 1)))
    every = usual_windows(reduced, 25)
    split = data.test
    assert split is not None
    assert isinstance(split.images, BatchedImages)
    chosen = np.array([0, 1, 500, 4000, len(split) - 1, 3])
    batch = split.images.batch(chosen, 0, 0)
    assert batch.shape == (6, 30, 25, 25)
    assert batch.dtype == torch.float32
    for image, i in zip(batch, chosen, strict=True):
        row, col = map(int, split.names[i].split(","))
        assert data.truth.labels[row, col] == data.kept[split.labels[i]]
        np.testing.assert_allclose(image.numpy(), every[row, col], atol=3e-4)
        single, label = split.images[int(i)]
        assert torch.equal(single, image)
        assert label == split.labels[i]
    batch[:] = 7  # a fresh tensor
    assert not (data.padded == 7).any()
    assert len(split.images.batch(np.array([], dtype=np.int64), 0, 0)) == 0


def test_the_frame_is_of_zeros(spec: str) -> None:
    data = load_scene(spec, **SMALL)
    inside = torch.zeros_like(data.padded, dtype=torch.bool)
    inside[:, 2:-2, 2:-2] = True
    assert (data.padded[~inside] == 0).all()
    assert (data.padded[inside] != 0).all()


def test_training_batches(spec: str) -> None:
    data = load_scene(spec, **SMALL)
    assert data.train is not None
    loader = Loader(data.train, data.preprocessing, 16, seed=0, augment=data.augmentation, shuffle=True)
    images, labels, index = next(iter(loader))
    assert images.shape == (16, 3, 5, 5)
    assert isinstance(data.train.images, Windows)
    plain = data.train.images.batch(index.numpy(), 0, 0)
    assert torch.equal(images[:, :, 2, 2], plain[:, :, 2, 2])  # flipped and turned about the pixel itself
    assert not torch.equal(images, plain)
    assert torch.equal(labels, data.train.labels[index])


def test_numbers_with_gaps(spec: str) -> None:
    data = load_scene(spec, **SMALL, train_per_class=20)
    assert data.kept == (2, 3, 5)
    assert data.classes == ("class 2", "class 3", "class 5")
    for split in (data.train, data.test):
        assert split is not None
        rows, cols = np.array([list(map(int, name.split(","))) for name in split.names]).T
        np.testing.assert_array_equal(np.array(data.kept)[split.labels], LABELS[rows, cols])
    assert data.train is not None
    assert torch.bincount(data.train.labels).tolist() == [20, 20, 20]
    assert list(data.train.names[2:4]) == [data.train.names[2], data.train.names[3]]


def test_spectra_of_the_training_pixels_alone(spec: str) -> None:
    data = load_scene(spec, **SMALL, pca="train", val_fraction=0.5, bands="2-8")
    rows, cols = data.pixels.train.T
    truth = PCA(3).fit(VALUES[rows, cols, 1:])
    np.testing.assert_allclose(data.spectra.mean, truth.mean_, rtol=1e-5)
    assert data.spectra.explained == pytest.approx(truth.explained_variance_ratio_.sum(), rel=1e-5)
    everywhere = load_scene(spec, **SMALL, bands="2-8", whiten=False).spectra
    np.testing.assert_allclose(everywhere.mean, VALUES[..., 1:].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(everywhere.matrix, axis=1), 1)
    assert load_scene(spec, window=5, components=0).preprocessing.channels == BANDS


def test_a_disjoint_split_names_what_it_leaves_out(spec: str, caplog: pytest.LogCaptureFixture) -> None:
    labels = LABELS.copy()
    labels[35:37, 15:17] = 4
    np.save(Path(spec).with_name("scene_gt.npy"), labels)
    with caplog.at_level(logging.WARNING, logger="excite.data"):
        data = load_scene(spec, **SMALL, split="disjoint", train_ratio=0.2)
    assert data.classes == ("class 2", "class 3", "class 5")
    assert data.pixels.excluded == (4,)
    assert [record.message for record in caplog.records if "'class 4'" in record.message]
    apart = np.abs(data.pixels.train[:, None] - data.pixels.test).max(axis=2)
    assert apart.min() > 2
    np.save(
        Path(spec).with_name("scene_gt.npy"), labels * (labels == 4) + np.eye(ROWS, COLS, dtype=int) * (labels == 5)
    )
    with pytest.raises(UsageError, match=r"leaves 0 of the 2 classes of .*scene_gt\.npy"):
        load_scene(spec, window=29, components=3, split="disjoint")


def test_for_a_trained_network(spec: str, tmp_path: Path) -> None:
    first = load_scene(spec, **SMALL, split_seed=3)
    classes = ("class 5", "class 2")
    again = load_scene(spec, **SMALL, split_seed=3, spectra=first.spectra, classes=classes)
    assert again.classes == classes
    assert again.kept == (5, 2)
    assert again.spectra is first.spectra
    assert torch.equal(again.padded, first.padded)
    assert again.test is not None
    assert first.test is not None
    wanted = [name for name, label in zip(first.test.names, first.test.labels, strict=True) if label != 1]
    assert list(again.test.names) == wanted
    assert len(again.pixels.test) == len(again.test)

    np.save(tmp_path / "other.npy", VALUES[::-1])
    np.save(tmp_path / "other_gt.npy", np.where(LABELS == 5, 9, LABELS)[::-1])
    other = str(tmp_path / "other.npy")
    with pytest.raises(
        UsageError, match=r"other_gt\.npy lacks classes of the network \('class 5'\): it has 'class 2'"
    ):
        load_scene(other, **SMALL, spectra=first.spectra, classes=first.classes)
    tested = load_scene(other, **SMALL, spectra=first.spectra, classes=first.classes, all_for_test=True)
    assert (tested.train, tested.val) == (None, None)
    assert tested.kept == (2, 3, 0)
    assert tested.test is not None
    assert len(tested.test) == np.isin(LABELS, (2, 3)).sum()
    np.testing.assert_array_equal(tested.padded.numpy()[:, 2:-2, 2:-2], first.padded.numpy()[:, 2:-2, 2:-2][:, ::-1])
    with pytest.raises(UsageError, match="lacks classes"):
        load_scene(other, **SMALL, spectra=first.spectra, classes=("corn",), all_for_test=True)


def test_one_scene_in_many_files(spec: str, tmp_path: Path) -> None:
    first = load_scene(spec, **SMALL)
    scipy.io.savemat(tmp_path / "five.mat", {"scene": VALUES, "gt": LABELS, "more": np.zeros((50, 50, 50))})
    envi.save_image(str(tmp_path / "envi.hdr"), VALUES, interleave="bil", ext=".img")
    np.save(tmp_path / "bands_first.npy", VALUES.transpose(2, 0, 1))
    truth = str(tmp_path / "scene_gt.npy")
    for name, options in {
        "five.mat": {"variable": "scene"},
        "envi.hdr": {"ground_truth": truth},
        "bands_first.npy": {"ground_truth": truth},
    }.items():
        data = load_scene(f"hyperspectral:{tmp_path / name}", **SMALL | options)  # type: ignore[arg-type]
        assert torch.equal(data.padded, first.padded), name
        assert (data.cube.bands, data.cube.rows, data.cube.cols) == (BANDS, ROWS, COLS)
        assert data.test is not None
        assert first.test is not None
        assert torch.equal(data.test.labels, first.test.labels)


def test_progress_goes_to_its_end(spec: str) -> None:
    seen: list[tuple[int, int]] = []
    data = load_scene(spec, **SMALL, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * ROWS, 2 * ROWS)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    seen.clear()
    load_scene(spec, **SMALL, spectra=data.spectra, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (ROWS, ROWS)


def refused(spec: str, *words: str, error: type[ExciteError] = UsageError, **options: object) -> None:
    with pytest.raises(error) as caught:
        load_scene(spec, **SMALL | options)  # type: ignore[arg-type]
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value


def test_options_that_cannot_be(spec: str) -> None:
    refused(spec, "window is 4", "odd", window=4)
    refused(spec, "window is -1", window=-1)
    refused(spec, "31 pixels is larger than", "scene.npy", "40×30", window=31)
    refused(spec, "train_ratio is 1.0", train_ratio=1.0)
    refused(spec, "train_ratio is 0", train_ratio=0)
    refused(spec, "leave one out", train_ratio=0.1, train_per_class=3)
    refused(spec, "train_per_class is 0", train_per_class=0)
    refused(spec, "split is 'even'", "'disjoint'", split="even")
    refused(spec, "pca is 'all'", pca="all")
    refused(spec, "components is 9", "8 bands", components=9)
    refused(spec, "components is -1", components=-1)
    refused(spec, "bands", "1 to 8", bands="1-9")
    refused(spec, "val_fraction is 1", val_fraction=1)


def test_scenes_that_cannot_be(spec: str, tmp_path: Path) -> None:
    truth = tmp_path / "scene_gt.npy"
    labels = LABELS.copy()
    labels[35, 15] = 4
    np.save(truth, labels)
    refused(spec, "'class 4' has a single pixel", str(truth))
    np.save(truth, (LABELS == 2).astype(int))
    refused(spec, "one class 'class 1'", str(truth))
    np.save(truth, LABELS[1:])
    refused(spec, str(truth), "39×30", spec, "40×30")
    truth.unlink()
    refused(spec, spec, "no ground truth")
    np.save(truth, LABELS)
    broken = VALUES.copy()
    broken[:3, :2, 6] = np.nan
    np.save(spec, broken)
    refused(spec, spec, "band 7 in 6 pixels", error=ExciteError)
    identity = Spectra(np.arange(BANDS), BANDS, np.zeros(BANDS), np.eye(BANDS), 1.0)
    refused(spec, spec, "band 7 in 6 pixels", error=ExciteError, spectra=identity)
    other = Spectra(np.arange(BANDS), BANDS + 1, np.zeros(BANDS), np.eye(BANDS), 1.0)
    refused(spec, spec, "has 8 bands", "of 9", spectra=other)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_that_the_data_take() -> None:
    script = """
import re, numpy as np, torch, scipy.io, excite.data.hyperspectral as scenes
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

np.linalg.eigh(np.eye(200) + np.ones((200, 200)))  # what the libraries themselves take
before = peak()
data = scenes.load_scene("indian-pines", train_ratio=0.1, split="random")
for start in range(0, 1024, 64):
    data.train.images.batch(np.arange(start, min(start + 64, len(data.train))), 0, 0)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    scene = 145 * 145 * 200 * 2 / 2**20
    assert float(done.stdout) - scene < 50

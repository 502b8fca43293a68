from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from excite.data import spectra as module
from excite.data.cube import open_cube
from excite.data.spectra import Spectra, fit_spectra, parse_bands
from excite.errors import ExciteError, UsageError

ROWS, COLS, BANDS = 20, 30, 12
RANDOM = np.random.default_rng(0)
MIXED = RANDOM.normal(size=(ROWS, COLS, BANDS)) * np.geomspace(1, 1e-2, BANDS) @ RANDOM.normal(size=(BANDS, BANDS))
VALUES = (3000 + 400 * MIXED).astype(np.float32)
PIXELS = VALUES.reshape(-1, BANDS).astype(np.float64)


@pytest.fixture
def path(tmp_path: Path) -> str:
    np.save(tmp_path / "scene.npy", VALUES)
    return str(tmp_path / "scene.npy")


def aligned(mine: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The other's components with the signs of mine: (K, n) each."""
    return other * np.sign((mine * other).sum(axis=1))[:, None]


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("strip", [1 << 22, 8 * BANDS * COLS * 3])
def test_against_scikit_learn(whiten: bool, strip: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRIP", strip)
    cube = open_cube(path)
    fitted = fit_spectra(cube, components=5, whiten=whiten)
    truth = PCA(5, whiten=whiten).fit(PIXELS)
    mine = fitted.apply(cube.read(0, ROWS))
    assert mine.dtype == np.float32
    expected = aligned(mine.reshape(5, -1), truth.transform(PIXELS).T)
    np.testing.assert_allclose(mine.reshape(5, -1), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert fitted.explained == pytest.approx(truth.explained_variance_ratio_.sum())
    assert fitted.channels == 5
    largest = np.abs(fitted.matrix).argmax(axis=1)
    assert (fitted.matrix[np.arange(5), largest] > 0).all()


def test_on_some_pixels_and_bands(path: str) -> None:
    mask = RANDOM.random((ROWS, COLS)) < 0.2
    mask[:4] = False
    fitted = fit_spectra(open_cube(path), bands="1-3, 6,9-12", components=4, pixels=mask)
    used = [0, 1, 2, 5, 8, 9, 10, 11]
    truth = PCA(4, whiten=True).fit(VALUES[mask][:, used])
    np.testing.assert_array_equal(fitted.bands, used)
    np.testing.assert_allclose(fitted.mean, VALUES[mask][:, used].mean(axis=0), rtol=1e-5)
    mine = fitted.apply(VALUES.transpose(2, 0, 1)).reshape(4, -1)
    np.testing.assert_allclose(mine, aligned(mine, truth.transform(PIXELS[:, used]).T), rtol=1e-3, atol=1e-4)


def test_without_pca_bands_are_standardised(path: str, tmp_path: Path) -> None:
    fitted = fit_spectra(open_cube(path), components=0)
    expected = StandardScaler().fit_transform(PIXELS).T
    mine = fitted.apply(VALUES.transpose(2, 0, 1)).reshape(BANDS, -1)
    np.testing.assert_allclose(mine, expected, atol=1e-5)
    assert fitted.explained == 1.0
    constant = VALUES.copy()
    constant[..., 3] = 7
    np.save(tmp_path / "constant.npy", constant)
    cube = open_cube(str(tmp_path / "constant.npy"))
    assert (fit_spectra(cube, components=0).reduce(cube, 0, 5)[3] == 0).all()


def test_indian_pines_against_scikit_learn() -> None:
    cube = open_cube("indian-pines")
    pixels = cube.read(0, cube.rows).reshape(cube.bands, -1).T.astype(np.float64)
    truth = PCA(30, whiten=True, svd_solver="covariance_eigh").fit(pixels)
    mine = fit_spectra(cube, components=30).reduce(cube, 0, cube.rows).reshape(30, -1)
    np.testing.assert_allclose(mine, aligned(mine, truth.transform(pixels).T), atol=2e-4)


def test_apply_does_not_hang_on_how_the_scene_is_cut(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cube = open_cube(path)
    fitted = fit_spectra(cube, components=5)
    whole = fitted.apply(cube.read(0, ROWS))
    monkeypatch.setattr(module, "_STRIP", 8 * BANDS * 7)
    parts = [fitted.reduce(cube, 3, 9, left, left + 5) for left in range(0, COLS, 5)]
    np.testing.assert_allclose(np.concatenate(parts, axis=2), whole[:, 3:9], rtol=1e-6)


def test_saved_and_read(path: str, tmp_path: Path) -> None:
    fitted = fit_spectra(open_cube(path), bands="2-9", components=4)
    safetensors.torch.save_file(fitted.tensors(), tmp_path / "spectra.safetensors")
    read = Spectra.read(safetensors.torch.load_file(tmp_path / "spectra.safetensors"))
    for name in ("bands", "mean", "matrix"):
        np.testing.assert_array_equal(getattr(read, name), getattr(fitted, name))
    assert (read.cube_bands, read.explained) == (fitted.cube_bands, fitted.explained)
    block = VALUES.transpose(2, 0, 1)
    np.testing.assert_array_equal(read.apply(block), fitted.apply(block))
    with pytest.raises(UsageError, match="11 bands, but the network was trained on spectra of 12"):
        read.apply(block[:11])

    tensors = fitted.tensors()
    for name in tensors:
        with pytest.raises(ExciteError, match="damaged"):
            Spectra.read({key: value for key, value in tensors.items() if key != name})
    for name, wrong in (("mean", tensors["mean"][1:]), ("bands", tensors["bands"] + 9), ("matrix", tensors["mean"])):
        with pytest.raises(ExciteError, match="damaged"):
            Spectra.read({**tensors, name: wrong})


def test_broken_values_are_counted(tmp_path: Path) -> None:
    broken = VALUES.copy()
    broken[3, :, 4] = np.nan
    broken[5:7, 5, 7] = np.inf
    np.save(tmp_path / "broken.npy", broken)
    cube = open_cube(str(tmp_path / "broken.npy"))
    with pytest.raises(ExciteError) as caught:
        fit_spectra(cube, components=3, pixels=np.eye(ROWS, COLS, dtype=bool))
    for word in (cube.name, "band 5 in 30 pixels", "band 8 in 2 pixels"):
        assert word in str(caught.value)
    assert "leave these bands out (the option bands)" in str(caught.value)
    fitted = fit_spectra(cube, bands="1-4,6-7,9-12", components=3)
    assert np.isfinite(fitted.reduce(cube, 0, ROWS)).all()
    np.save(tmp_path / "whole.npy", VALUES)
    whole = fit_spectra(open_cube(str(tmp_path / "whole.npy")), components=3)
    with pytest.raises(ExciteError, match=r"broken\.npy.*band 8 in 1 pixels") as caught:
        whole.reduce(cube, 6, 9)
    assert "option" not in str(caught.value)  # the bands of a trained network are settled
    np.save(tmp_path / "broken.npy", np.where(np.arange(BANDS) == 2, 1e300, VALUES.astype(np.float64)))
    with pytest.raises(ExciteError, match="band 3 in 600 pixels"):
        fit_spectra(open_cube(str(tmp_path / "broken.npy")), components=3)


def test_what_cannot_be_fitted(path: str, tmp_path: Path) -> None:
    cube = open_cube(path)
    with pytest.raises(UsageError, match=r"components is 13: .* has 12 bands"):
        fit_spectra(cube, components=13)
    with pytest.raises(UsageError, match="has 3 bands in use"):
        fit_spectra(cube, bands="1-3", components=4)
    few = np.zeros((ROWS, COLS), dtype=bool)
    few[0, :4] = True
    with pytest.raises(UsageError, match="5 components cannot be fitted on 4 pixels"):
        fit_spectra(cube, components=5, pixels=few)
    with pytest.raises(UsageError, match="have 3 independent"):
        fit_spectra(cube, components=4, pixels=few)
    np.save(tmp_path / "flat.npy", np.full((ROWS, COLS, BANDS), 5))
    with pytest.raises(UsageError, match="have 0 independent"):
        fit_spectra(open_cube(str(tmp_path / "flat.npy")), components=1)


@pytest.mark.parametrize(
    ("text", "bands"), [(None, range(6)), ("1-6", range(6)), ("5, 2-3,2", [1, 2, 4]), ("6", [5])]
)
def test_lists_of_bands(text: str | None, bands: list[int]) -> None:
    np.testing.assert_array_equal(parse_bands(text, 6, "x"), list(bands))


@pytest.mark.parametrize("text", ["", "0-3", "4-2", "7", "1-7", "a", "1..3", "-2", "1-", "1,,2", "²"])
def test_what_is_no_list_of_bands(text: str) -> None:
    with pytest.raises(UsageError, match="bands"):
        parse_bands(text, 6, "x")


def test_memory_is_bounded(tmp_path: Path) -> None:
    large = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint16, (800, 500, 40))  # 32 MB
    large[:] = np.random.default_rng(0).integers(0, 1000, 40, dtype=np.uint16)
    large[::3, ::2, ::5] += 9
    cube = open_cube(str(tmp_path / "large.npy"))
    tracemalloc.start()
    fitted = fit_spectra(cube, components=1)
    fitted.reduce(cube, 0, 50)
    assert tracemalloc.get_traced_memory()[1] < 25e6  # as float64 it would be 128 MB
    tracemalloc.stop()

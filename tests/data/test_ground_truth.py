from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import scipy.io
from PIL import Image
from spectral.io import envi

from excite.data.cube import Cube, open_cube
from excite.data.ground_truth import GroundTruth, open_ground_truth
from excite.errors import ExciteError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
ROWS, COLS, BANDS = 8, 6, 4
LAST = np.random.default_rng(0).random((ROWS, COLS, BANDS))
TRUTH = np.random.default_rng(1).choice([0, 3, 7, 9], (ROWS, COLS)).astype(np.uint8)
GAPS = tuple(f"class {i}" for i in range(1, 10))


def scene(folder: Path, name: str = "Scene_corrected.npy") -> tuple[str, Cube]:
    np.save(folder / name, LAST)
    return str(folder / name), open_cube(str(folder / name))


def save(path: Path, labels: np.ndarray = TRUTH) -> Path:
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".mat":
        scipy.io.savemat(path, {"gt": labels})
    elif path.suffix == ".png":
        Image.fromarray(labels).save(path)
    elif path.suffix == ".hdr":
        envi.save_image(str(path), labels, ext=".img", interleave="bsq")
    else:
        with rasterio.open(path, "w", "GTiff", labels.shape[1], labels.shape[0], 1, dtype=labels.dtype) as file:
            file.write(labels, 1)
    return path


def check(truth: GroundTruth | None, classes: tuple[str, ...] = GAPS) -> None:
    assert truth is not None
    assert truth.labels.dtype == np.int64
    np.testing.assert_array_equal(truth.labels, TRUTH)
    assert truth.classes == classes
    assert truth.size == (ROWS, COLS)


def test_indian_pines() -> None:
    from tensorly import datasets

    truth = open_ground_truth("indian-pines", open_cube("indian-pines"))
    assert truth is not None
    np.testing.assert_array_equal(truth.labels, datasets.load_indian_pines().ticks[0])
    # Table I of the paper: the smallest and the largest classes.
    counts = dict(zip(truth.classes, np.bincount(truth.labels.ravel())[1:], strict=True))
    assert counts["Oats"] == 20
    assert counts["Grass-pasture-mowed"] == 28
    assert counts["Soybean-mintill"] == 2455
    assert counts["Stone-Steel-Towers"] == 93
    assert truth.labels.astype(bool).sum() == 10249


@pytest.mark.parametrize("name", ["Scene_gt", "Scene_corrected_gt"])
@pytest.mark.parametrize("suffix", [".mat", ".npy", ".tif", ".tiff", ".hdr", ".png"])
def test_beside_the_scene(name: str, suffix: str, tmp_path: Path) -> None:
    spec, cube = scene(tmp_path)
    assert open_ground_truth(spec, cube) is None
    path = save(tmp_path / f"{name}{suffix}")
    truth = open_ground_truth(spec, cube)
    check(truth)
    assert truth is not None
    assert truth.origin == str(path)
    check(open_ground_truth(f"hyperspectral:{spec}", cube))


@pytest.mark.parametrize("suffix", [".mat", ".npy", ".tif", ".hdr", ".png"])
def test_a_file_that_is_named(suffix: str, tmp_path: Path) -> None:
    spec, cube = scene(tmp_path)
    save(tmp_path / "Scene_gt.npy", np.ones_like(TRUTH))
    check(open_ground_truth(spec, cube, str(save(tmp_path / f"other{suffix}"))))


def test_in_the_scenes_own_mat(tmp_path: Path) -> None:
    spec = str(tmp_path / "scene.mat")
    scipy.io.savemat(spec, {"scene": LAST, "labels": TRUTH.astype(np.float64), "wavelengths": np.ones((1, BANDS))})
    check(open_ground_truth(spec, open_cube(spec)))
    scipy.io.savemat(spec, {"scene": LAST, "elevation": np.ones((ROWS, COLS)), "scene_gt": TRUTH})
    check(open_ground_truth(spec, open_cube(spec)))
    scipy.io.savemat(spec, {"scene": LAST, "elevation": np.random.default_rng(0).random((ROWS, COLS))})
    assert open_ground_truth(spec, open_cube(spec)) is None
    save(tmp_path / "scene_gt.mat")
    check(open_ground_truth(spec, open_cube(spec)))
    with h5py.File(tmp_path / "seven.mat", "w") as file:
        for name, array in (("scene", LAST), ("gt", TRUTH)):
            file.create_dataset(name, data=array.T).attrs["MATLAB_class"] = np.bytes_("double")
    check(open_ground_truth(str(tmp_path / "seven.mat"), open_cube(str(tmp_path / "seven.mat"))))


def test_its_size_tells_which_axis_is_that_of_the_bands(tmp_path: Path) -> None:
    spec = str(tmp_path / "Scene.npy")
    wide = LAST[:6].transpose(2, 0, 1)  # 4 bands, 6 rows, 6 columns: taken for 4 rows, 6 columns, 6 bands or not
    np.save(spec, np.concatenate([wide, wide, wide]))  # 12 bands: no longer clear
    cube = open_cube(spec)
    assert cube.bands == 6
    save(tmp_path / "Scene_gt.npy", TRUTH[:6])
    truth = open_ground_truth(spec, cube)
    assert truth is not None
    found = cube.sized(truth.size)
    assert found is not None
    assert (found.bands, found.rows, found.cols) == (12, 6, 6)


def test_names_of_classes(tmp_path: Path) -> None:
    spec, cube = scene(tmp_path)
    named = ("Unclassified", *(f"crop {i}" for i in range(1, 10)))
    envi.save_classification(str(tmp_path / "Scene_gt.hdr"), TRUTH, class_names=list(named), ext=".img")
    check(open_ground_truth(spec, cube), named[1:])
    (tmp_path / "Scene_classes.txt").write_text("\n".join(f"field {i}" for i in range(1, 8)) + "\n", encoding="utf-8")
    check(open_ground_truth(spec, cube), (*(f"field {i}" for i in range(1, 8)), "class 8", "class 9"))
    (tmp_path / "Scene_classes.txt").write_text("corn\ncorn\n")
    with pytest.raises(UsageError, match=r"Scene_classes\.txt must be different"):
        open_ground_truth(spec, cube)
    (tmp_path / "Scene_classes.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ExciteError, match=r"Scene_classes\.txt"):
        open_ground_truth(spec, cube)


def test_names_that_come_twice_are_told_apart(tmp_path: Path) -> None:
    spec, cube = scene(tmp_path)
    named = ["Unclassified", "Corn", "Corn", "Corn (2)", "Hay", "Corn", "Oats", "Rye", "Hay", "Oats"]
    envi.save_classification(str(tmp_path / "Scene_gt.hdr"), TRUTH, class_names=named, ext=".img")
    apart = ("Corn", "Corn (2)", "Corn (2) (3)", "Hay", "Corn (5)", "Oats", "Rye", "Hay (8)", "Oats (9)")
    check(open_ground_truth(spec, cube), apart)
    (tmp_path / "Scene_classes.txt").write_text("class 3\nrye\n", encoding="utf-8")
    check(open_ground_truth(spec, cube), ("class 3", "rye", "class 3 (3)", *GAPS[3:]))


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("int16", -1), ("uint8", 255), ("float32", -9999), ("float32", np.nan)]
)
def test_what_a_tiff_declares_as_nodata_is_unlabelled(dtype: str, nodata: float, tmp_path: Path) -> None:
    spec, cube = scene(tmp_path)
    labels = np.where(TRUTH == 0, np.array(nodata, dtype), TRUTH.astype(dtype))
    labels[np.argwhere(TRUTH == 0)[0][0], np.argwhere(TRUTH == 0)[0][1]] = 0  # 0 is unlabelled all the same
    path = tmp_path / "Scene_gt.tif"
    with rasterio.open(path, "w", "GTiff", COLS, ROWS, 1, dtype=dtype, nodata=nodata) as file:
        file.write(labels, 1)
    check(open_ground_truth(spec, cube))


def test_a_palette_is_read_by_its_numbers(tmp_path: Path) -> None:
    spec, cube = scene(tmp_path)
    image = Image.fromarray(TRUTH, mode="P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(tmp_path / "Scene_gt.png")
    check(open_ground_truth(spec, cube))


@pytest.mark.parametrize("suffix", [".mat", ".npy", ".tif", ".hdr", ".png"])
def test_another_size(suffix: str, tmp_path: Path) -> None:
    spec, cube = scene(tmp_path)
    path = save(tmp_path / f"Scene_gt{suffix}", np.pad(TRUTH, ((0, 1), (0, 0))))
    with pytest.raises(UsageError) as caught:
        open_ground_truth(spec, cube)
    for word in (str(path), "9×6", spec, "8×6"):
        assert word in str(caught.value)


def refused(spec: str, cube: Cube, path: Path, *words: str) -> None:
    with pytest.raises(ExciteError) as caught:
        open_ground_truth(spec, cube, str(path))
    assert "\n" not in str(caught.value)
    for word in (str(path), *words):
        assert word in str(caught.value), caught.value


def test_what_is_no_ground_truth(tmp_path: Path) -> None:
    spec, cube = scene(tmp_path)
    refused(spec, cube, save(tmp_path / "a.npy", TRUTH + 0.5), "whole numbers")
    refused(spec, cube, save(tmp_path / "b.npy", TRUTH.astype(int) - 1), "whole numbers")
    refused(spec, cube, save(tmp_path / "b.tif", TRUTH.astype(np.int16) - 1), "it holds -1", "whole numbers")
    refused(spec, cube, save(tmp_path / "c.npy", TRUTH * 0), "whole numbers")
    refused(spec, cube, save(tmp_path / "d.npy", np.full(TRUTH.shape, np.nan)), "whole numbers")
    refused(spec, cube, save(tmp_path / "e.npy", np.full(TRUTH.shape, 10**9)), "whole numbers")
    refused(spec, cube, save(tmp_path / "f.png", np.stack([TRUTH] * 3, axis=2)), "coloured")
    scipy.io.savemat(tmp_path / "g.mat", {"cube": LAST, "x": np.ones((3, 3)), "y": np.ones((2, 2))})
    refused(spec, cube, tmp_path / "g.mat", "8×6", "cube (8×6×4), x (3×3), y (2×2)")
    scipy.io.savemat(tmp_path / "h.mat", {"train_gt": TRUTH, "test_gt": TRUTH})
    refused(spec, cube, tmp_path / "h.mat", "several", "train_gt (8×6), test_gt (8×6)")
    refused(spec, cube, tmp_path / "none.mat", "does not exist")
    (tmp_path / "i.txt").write_text("1")
    refused(spec, cube, tmp_path / "i.txt", ".mat, .npy")
    envi.save_image(str(tmp_path / "j.hdr"), LAST, ext=".img")
    refused(spec, cube, tmp_path / "j.hdr", "4 bands")
    data = save(tmp_path / "k.png").read_bytes()
    (tmp_path / "k.png").write_bytes(data[: len(data) // 2])
    refused(spec, cube, tmp_path / "k.png")

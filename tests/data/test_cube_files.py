from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import scipy.io
from rasterio.transform import Affine
from spectral.io import envi

from excite.data.cube import Cube, is_scene, open_cube
from excite.errors import ExciteError, UsageError

BANDS, ROWS, COLS = 5, 12, 9
CUBE = np.random.default_rng(0).integers(0, 4000, (BANDS, ROWS, COLS)).astype(np.uint16)
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
LAST = np.ascontiguousarray(CUBE.transpose(1, 2, 0))  # (rows, cols, bands), as MATLAB and NumPy files have it
TRUTH = np.ones((ROWS, COLS), np.uint8)


def save_mat73(path: Path, matlab: bool = True, **arrays: np.ndarray) -> Path:
    """A file as MATLAB writes it: a header of its own in front, axes in reverse, the class of each array said."""
    with h5py.File(path, "w", userblock_size=512 if matlab else 0) as file:
        for name, array in arrays.items():
            dataset = file.create_dataset(name, data=array.T if matlab else array, chunks=True, compression="gzip")
            if matlab:
                dataset.attrs["MATLAB_class"] = np.bytes_(str(array.dtype))
    if matlab:
        with open(path, "r+b") as file:
            file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    return path


def save_envi(path: Path, interleave: str, dtype: str = "uint16", byteorder: int = 0, **metadata: object) -> Path:
    options = {"interleave": interleave, "dtype": dtype, "byteorder": byteorder, "ext": ".img", "metadata": metadata}
    envi.save_image(str(path), LAST.astype(dtype), **options)
    return path


def save_tiff(path: Path, array: np.ndarray = CUBE, **options: object) -> Path:
    bands, rows, cols = array.shape
    with rasterio.open(path, "w", "GTiff", cols, rows, bands, dtype=array.dtype, **options) as file:
        file.write(array)
    return path


def save_npy(path: Path, array: np.ndarray = LAST) -> Path:
    np.save(path, array)
    return path


def check(cube: Cube) -> None:
    assert (cube.bands, cube.rows, cube.cols) == CUBE.shape
    whole = cube.read(0, ROWS)
    assert whole.dtype == np.float32
    assert whole.flags.c_contiguous
    assert whole.flags.writeable
    np.testing.assert_array_equal(whole, CUBE)
    np.testing.assert_array_equal(cube.read(3, 7, 2, 8), CUBE[:, 3:7, 2:8])
    assert cube.read(4, 4).shape == (BANDS, 0, COLS)
    cube.read(0, 1)[:] = -1  # a fresh array: nothing else changes
    np.testing.assert_array_equal(cube.read(0, 1), CUBE[:, :1])


def test_indian_pines() -> None:
    from tensorly import datasets

    truth = datasets.load_indian_pines().tensor
    cube = open_cube("indian-pines")
    assert (cube.bands, cube.rows, cube.cols) == (200, 145, 145)
    np.testing.assert_array_equal(cube.read(10, 30, 5, 9), truth[10:30, 5:9].transpose(2, 0, 1))


def test_mat_version_5(tmp_path: Path) -> None:
    for compressed in (False, True):
        path = tmp_path / f"scene-{compressed}.mat"
        small = np.zeros((2, 2, 2))
        scipy.io.savemat(path, {"small": small, "scene": LAST, "gt": TRUTH}, do_compression=compressed)
        check(open_cube(str(path)))
        check(open_cube(f"hyperspectral:{path}", variable="scene"))
        assert open_cube(str(path), variable="small").bands == 2


def test_mat_version_7_3_has_its_axes_in_reverse(tmp_path: Path) -> None:
    check(open_cube(str(save_mat73(tmp_path / "matlab.mat", scene=LAST, gt=TRUTH))))
    check(open_cube(str(save_mat73(tmp_path / "python.mat", matlab=False, scene=LAST))))


def test_npy_in_any_order_of_axes(tmp_path: Path) -> None:
    path = str(save_npy(tmp_path / "scene.npy"))
    check(open_cube(path))
    np.save(path, np.asfortranarray(LAST.astype(np.float64)))
    check(open_cube(path))
    np.save(path, CUBE.astype(">i4"))  # (bands, rows, cols)
    sized = open_cube(path).sized((ROWS, COLS))
    assert sized is not None
    check(sized)
    check(open_cube(path, bands=BANDS))
    np.save(path, CUBE.transpose(1, 0, 2))
    check(open_cube(path, bands=BANDS))
    assert open_cube(path).sized((ROWS, BANDS + 1)) is None


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((145, 145, 200), 2),
        ((610, 340, 103), 2),
        ((349, 1905, 144), 2),
        ((64, 32, 200), 2),
        ((9, 9, 9), 2),
        ((200, 145, 145), 2),  # nobody could tell
        ((30, 200, 200), 0),
        ((103, 340, 610), 0),
    ],
)
def test_the_guess_of_the_band_axis(shape: tuple[int, int, int], axis: int, tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "scene.npy", "w+", np.uint8, shape)  # a file of holes
    assert open_cube(str(tmp_path / "scene.npy")).bands == shape[axis]


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize(("dtype", "byteorder"), [("uint16", 0), ("int32", 1), ("float64", 1)])
def test_envi(interleave: str, dtype: str, byteorder: int, tmp_path: Path) -> None:
    check(open_cube(str(save_envi(tmp_path / "scene.hdr", interleave, dtype, byteorder))))


def test_envi_headers_say_wavelengths_and_place(tmp_path: Path) -> None:
    # What a header says between braces, with commas.
    place = {"map info": ["UTM", "1", "1", "500000", "4480000", "20", "30", "16", "North", "WGS-84", "units=Meters"]}
    micrometres = {"wavelength": [0.4, 0.5, 0.6, 0.7, 2.5], "wavelength units": "Micrometers"}
    cube = open_cube(str(save_envi(tmp_path / "scene.hdr", "bil", **place, **micrometres)))
    assert cube.wavelengths == pytest.approx((400, 500, 600, 700, 2500))
    assert cube.georeference is not None
    assert cube.georeference.transform == pytest.approx((20, 0, 500000, 0, -30, 4480000))
    assert cube.georeference.crs == "EPSG:32616"

    # GDAL reads the same header: an independent opinion of the place.
    turned = {"map info": ["Arbitrary", "1", "1", "10", "20", "2", "2", "0", "North", "rotation=30"]}
    shifted = {"map info": ["UTM", "2", "3", "500000", "4480000", "20", "30", "16", "South", "WGS-84"]}
    for number, said in enumerate((place, turned, shifted)):
        path = save_envi(tmp_path / f"placed-{number}.hdr", "bsq", **said)
        mine = open_cube(str(path)).georeference
        assert mine is not None
        with rasterio.open(path.with_suffix(".img")) as file:
            assert mine.transform == pytest.approx(tuple(file.transform)[:6])
    assert open_cube(str(save_envi(tmp_path / "plain.hdr", "bsq"))).georeference is None
    assert open_cube(
        str(save_envi(tmp_path / "nm.hdr", "bsq", wavelength=[400, 500, 600, 700, 2500]))
    ).wavelengths == (
        400,
        500,
        600,
        700,
        2500,
    )


@pytest.mark.parametrize("suffix", [".tif", ".TIFF"])
def test_geotiff(suffix: str, tmp_path: Path) -> None:
    transform = Affine(20, 1, 500000, 2, -20, 4480000)
    cube = open_cube(str(save_tiff(tmp_path / f"scene{suffix}", crs="EPSG:32616", transform=transform)))
    check(cube)
    assert cube.georeference is not None
    assert cube.georeference.transform == tuple(transform)[:6]
    assert rasterio.CRS.from_string(cube.georeference.crs).to_epsg() == 32616


def test_a_tiff_without_a_place(tmp_path: Path) -> None:
    cube = open_cube(str(save_tiff(tmp_path / "scene.tif", CUBE.astype(np.float32))))
    check(cube)
    assert cube.georeference is None


def test_what_is_a_scene(tmp_path: Path) -> None:
    for spec in ("indian-pines", "hyperspectral:x", "PaviaU.mat", "a/b.hdr", "a.npy", "a.TIF", "a.tiff"):
        assert is_scene(spec), spec
    for spec in ("digits", "photos.tar", "folder", "indian", "a.mat.tar"):
        assert not is_scene(spec), spec
    (tmp_path / "photos.tif").mkdir()
    assert not is_scene(str(tmp_path / "photos.tif"))


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    shape = (600, 500, 40)  # 24 MB
    large = np.zeros(shape, np.uint16)
    envi.save_image(str(tmp_path / "envi.hdr"), large, interleave="bip", ext=".img")
    np.save(tmp_path / "large.npy", large)
    with h5py.File(tmp_path / "large.mat", "w") as file:
        file.create_dataset("scene", data=large, chunks=(10, 500, 40))
    for name in ("envi.hdr", "large.npy", "large.mat"):
        tracemalloc.start()
        part = open_cube(str(tmp_path / name)).read(100, 104, 10, 20)
        assert tracemalloc.get_traced_memory()[1] < 4e6, name
        tracemalloc.stop()
        assert part.shape == (40, 4, 10)


def _whole(path: Path, variable: str | None) -> np.ndarray:
    cube = open_cube(str(path), variable)
    return cube.read(0, cube.rows)


def refused(path: Path, *words: str, error: type[ExciteError] = ExciteError, variable: str | None = None) -> None:
    """One clear sentence that names the file, when it is opened or when it is read."""
    with pytest.raises(error) as caught:
        _whole(path, variable)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    assert str(path.with_suffix("")) in message
    for word in words:
        assert word in message, message


def test_a_mat_without_a_cube(tmp_path: Path) -> None:
    path = tmp_path / "truth.mat"
    scipy.io.savemat(path, {"indian_pines_gt": TRUTH, "cells": np.array([1, "a"], dtype=object), "name": "x"})
    refused(path, "holds no cube", "indian_pines_gt (12×9)", "cells (", error=UsageError)
    refused(path, "no variable 'scene'", "indian_pines_gt", error=UsageError, variable="scene")
    refused(path, "'indian_pines_gt'", "three axes", error=UsageError, variable="indian_pines_gt")
    refused(save_mat73(tmp_path / "truth73.mat", gt=TRUTH), "holds no cube", "gt (12×9)", error=UsageError)
    scipy.io.savemat(path, {"a": LAST, "b": LAST})
    refused(path, "several cubes", "a (12×9×5), b (12×9×5)", error=UsageError)
    scipy.io.savemat(path, {"a": LAST.astype(complex)})
    refused(path, "real numbers", error=UsageError)
    scipy.io.savemat(path, {"a": np.full((3, 2, 2), "x", dtype=object)})
    refused(path, "holds no cube", "a (3×2×2)", error=UsageError)


def test_other_arrays_than_cubes(tmp_path: Path) -> None:
    refused(save_npy(tmp_path / "flat.npy", TRUTH), "three axes", "12×9", error=UsageError)
    refused(save_npy(tmp_path / "complex.npy", LAST.astype(complex)), "real numbers", error=UsageError)
    refused(save_envi(tmp_path / "complex.hdr", "bsq", "complex64"), "real numbers", error=UsageError)
    refused(save_tiff(tmp_path / "complex.tif", CUBE.astype(np.complex64)), "real numbers", error=UsageError)
    path = tmp_path / "objects.npy"
    np.save(path, np.array([[[{}]]], dtype=object), allow_pickle=True)
    refused(path, "Python objects")
    for content in (b"a text\n", b"", pickle.dumps([1])):
        path.write_bytes(content)
        refused(path, "is no .npy array of numbers.")


def test_missing_files(tmp_path: Path) -> None:
    refused(tmp_path / "none.mat", "does not exist", error=UsageError)
    refused(tmp_path / "none.tif", "does not exist", error=UsageError)
    path = save_envi(tmp_path / "scene.hdr", "bsq")
    path.with_suffix(".img").unlink()
    refused(path, "missing", ".img", error=UsageError)
    with pytest.raises(UsageError, match="did you mean 'indian-pines'"):
        open_cube("indian-pine")
    with pytest.raises(UsageError, match="'hyperspectral:' lacks the path of a scene"):
        open_cube("hyperspectral:")
    with pytest.raises(UsageError, match="indian-pines is named without 'hyperspectral:'"):
        open_cube("hyperspectral:indian-pines")
    with pytest.raises(UsageError, match=r"\.mat file, and"):
        open_cube(str(save_npy(tmp_path / "a.npy")), variable="x")


def test_files_that_were_cut_off(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "five.mat", {"scene": LAST})
    scipy.io.savemat(tmp_path / "packed.mat", {"scene": LAST}, do_compression=True)
    save_mat73(tmp_path / "seven.mat", scene=LAST)
    save_npy(tmp_path / "array.npy")
    save_tiff(tmp_path / "image.tif")
    save_tiff(tmp_path / "deflated.tif", compress="deflate")
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        for keep in (0, 20, 200, len(data) // 2, len(data) - 40):
            path.write_bytes(data[:keep])
            refused(path)
    path = save_envi(tmp_path / "scene.hdr", "bsq")
    image = path.with_suffix(".img")
    image.write_bytes(image.read_bytes()[:-1])
    refused(path, "1,080 bytes", "1,079")


def test_headers_that_claim_absurd_sizes(tmp_path: Path) -> None:
    path = save_envi(tmp_path / "scene.hdr", "bsq")
    text = path.read_text()
    for line in (
        "lines = 99999999999",
        "lines = -4",
        "lines = many",
        "bands = 0",
        "header offset = -1",
        "data type = 77",
    ):
        key = line.split(" = ")[0]
        kept = [old for old in text.splitlines() if not old.startswith(key)]
        path.write_text("\n".join([*kept, line]))
        refused(path)
    path.write_bytes(bytes(range(256)))
    refused(path)

    path = save_npy(tmp_path / "array.npy")
    path.write_bytes(path.read_bytes().replace(b"(12, 9, 5)", b"(12, 9, 5" + b"0" * 9 + b")", 1))
    refused(path)

    path = tmp_path / "seven.mat"
    with h5py.File(path, "w") as file:
        file.create_dataset("scene", (10**6, 10**6, 200), "f4", chunks=(100, 100, 10), compression="gzip")
    refused(path, "lacks a part")

    path = tmp_path / "five.mat"
    scipy.io.savemat(path, {"scene": LAST})
    sizes = np.array([ROWS, COLS, BANDS], "<i4").tobytes()
    path.write_bytes(path.read_bytes().replace(sizes, np.array([10**5, 10**5, 200], "<i4").tobytes()))
    refused(path, "100000×100000×200 numbers")


def test_nothing_outside_of_a_file_is_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "secret.npy", LAST)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["scene"] = LAST
    with h5py.File(tmp_path / "scene.mat", "w") as file:
        file["link"] = h5py.ExternalLink("other.h5", "/scene")
        file.create_dataset("outside", LAST.shape, "u2", external=[("secret.npy", 128, LAST.nbytes)])
        layout = h5py.VirtualLayout(LAST.shape, "u2")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "scene", LAST.shape)
        file.create_virtual_dataset("virtual", layout)
    refused(tmp_path / "scene.mat", "holds no cube", error=UsageError)

    save_tiff(tmp_path / "other.tif")
    (tmp_path / "scene.tif").write_text(
        '<VRTDataset rasterXSize="9" rasterYSize="12"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f"<SourceFilename>{tmp_path / 'other.tif'}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    refused(tmp_path / "scene.tif")


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys
    from importlib import util

    files = {
        "h5py": save_mat73(tmp_path / "seven.mat", scene=LAST),
        "spectral.io": save_envi(tmp_path / "scene.hdr", "bsq"),
        "rasterio": save_tiff(tmp_path / "scene.tif"),
    }
    for package, path in files.items():
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            extra = "geotiff" if package == "rasterio" else "hyperspectral"
            with pytest.raises(UsageError, match=rf"pip install 'excite\[{extra}\]'"):
                open_cube(str(path))
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tensorly.*pip install 'excite\[hyperspectral\]'"):
        open_cube("indian-pines")

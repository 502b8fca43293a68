from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from excite.data.mat5 import mat5_arrays
from excite.errors import ExciteError, UsageError

RANDOM = np.random.default_rng(0)
NUMBERS = {
    f"{np.dtype(kind).name}_{'x'.join(map(str, shape))}": (100 * RANDOM.random(shape)).astype(kind)
    for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "?")
    for shape in ((3, 4, 5), (1, 1), (2, 0), (7, 1), (2, 3, 1, 2))
}
# Written by MATLAB itself, of both orders of bytes; they come with SciPy's own tests.
WRITTEN = sorted((Path(scipy.io.__file__).parent / "matlab" / "tests" / "data").glob("test*.mat"))


@pytest.mark.parametrize("packed", [False, True])
def test_against_scipy(packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "numbers.mat"
    scipy.io.savemat(path, NUMBERS, do_compression=packed)
    found = {array.name: array for array in mat5_arrays(path)}
    assert list(found) == list(NUMBERS)
    for name, expected in NUMBERS.items():
        assert found[name].shape == expected.shape
        assert found[name].kind == expected.dtype.kind.replace("b", "u")
        np.testing.assert_array_equal(np.asarray(found[name].open()), expected)


def test_files_of_matlab() -> None:
    if not WRITTEN:
        pytest.skip("SciPy is installed without its tests")
    compared = 0
    for path in WRITTEN:
        if "_4" in path.name or "mat4" in path.name or "hdf5" in path.name:  # of version 4 and of 7.3
            continue
        truth = scipy.io.loadmat(path)
        for array in mat5_arrays(path):
            expected = truth.get(array.name or "__function_workspace__")
            if expected is None:  # SciPy has no names for objects of MATLAB's own
                assert not array.kind
                continue
            if array.kind in ("i", "u", "f"):
                np.testing.assert_array_equal(np.asarray(array.open()), expected)
                compared += 1
            elif array.kind == "c":
                assert expected.dtype.kind == "c"
            else:
                assert expected.dtype.kind not in "iufc" or "sparse" in path.name or "func" in path.name
    assert compared > 10


def test_what_is_not_of_numbers_is_listed_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "mixed.mat"
    cells = np.array([1, "a"], dtype=object)
    scipy.io.savemat(path, {"cells": cells, "text": "abc", "struct": {"a": 1}, "z": np.array([[1j]]), "x": 1.0})
    found = {array.name: array for array in mat5_arrays(path)}
    assert {name: array.kind for name, array in found.items()} == {
        "cells": "",
        "text": "",
        "struct": "",
        "z": "c",
        "x": "f",
    }
    for name in ("cells", "text", "struct", "z"):
        with pytest.raises(UsageError, match=rf"{name} in .*mixed\.mat is not of real numbers"):
            found[name].open()


def test_unpacked_numbers_are_not_read_as_a_whole(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "a.mat", {"a": NUMBERS["uint16_3x4x5"]})
    assert isinstance(mat5_arrays(tmp_path / "a.mat")[0].open(), np.memmap)


@pytest.mark.parametrize("packed", [False, True])
def test_damage_is_told_and_nothing_else(packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "numbers.mat"
    array = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    scipy.io.savemat(path, {"first": array, "second": array}, do_compression=packed)
    whole = path.read_bytes()
    told = 0
    for _ in range(1500):
        data = bytearray(whole)
        for place in RANDOM.integers(0, len(data), RANDOM.integers(1, 4)):
            data[place] = RANDOM.integers(0, 256)
        path.write_bytes(data[: len(data) if RANDOM.random() < 0.8 else RANDOM.integers(len(data))])
        with contextlib.suppress(ExciteError):
            for found in mat5_arrays(path):
                found.open()
            told -= 1
        told += 1
    assert told > 200


def test_a_packed_array_cannot_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.mat"
    scipy.io.savemat(path, {"bomb": np.zeros((100, 100, 10), np.uint8)})
    data = path.read_bytes()
    sides, size = np.array([100, 100, 10], "<i4").tobytes(), np.array([2, 100_000], "<u4").tobytes()
    data = data.replace(sides, np.array([50_000, 40_000, 2], "<i4").tobytes())
    data = data.replace(size, np.array([2, 4_000_000_000], "<u4").tobytes())
    matrix = bytearray(data[128:])
    matrix[4:8] = np.array([4_000_000_056], "<u4").tobytes()
    packed = zlib.compress(bytes(matrix))
    path.write_bytes(data[:128] + np.array([15, len(packed)], "<u4").tobytes() + packed)
    with pytest.raises(ExciteError, match=r"bomb\.mat.*far more"):
        mat5_arrays(path)[0].open()


def test_a_string_of_matlab_beside_the_scene_is_no_damage(tmp_path: Path) -> None:
    def element(kind: int, content: bytes) -> bytes:
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    # MATLAB writes an object as flags, name, system, class, and its own array: without any sides.
    inner = element(
        14, element(6, struct.pack("<II", 13, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, b"")
    )
    text = element(6, struct.pack("<II", 17, 0)) + element(1, b"note") + element(1, b"MCOS") + element(1, b"string")
    path = tmp_path / "scene.mat"
    scipy.io.savemat(path, {"cube": np.arange(24.0).reshape(2, 3, 4)})
    path.write_bytes(path.read_bytes() + element(14, text + inner))
    cube, note = mat5_arrays(path)
    assert (cube.name, cube.shape, note.name, note.kind) == ("cube", (2, 3, 4), "note", "")
    with pytest.raises(UsageError, match=r"note in .* is not of real numbers"):
        note.open()

"""Maps as files, read back by Pillow, NumPy and rasterio."""

import sys

import numpy as np
import pytest
import rasterio
from PIL import Image

from excite.data.rasters import Georeference
from excite.errors import UsageError
from excite.verbs.files_of_maps import write_array, write_picture, write_raster

PLACE = Georeference((30.0, 0.0, 508_000.0, 0.0, -30.0, 4_476_000.0), "EPSG:32616")


def raster(path, numbers, place=PLACE):
    colours = [(i % 256, 7, 9) for i in range(int(numbers.max()) + 1)]
    return write_raster(path, numbers, colours, ["unlabelled", "corn"], place)


def test_a_raster_keeps_its_place_and_colours(tmp_path) -> None:
    numbers = np.arange(12).reshape(3, 4)
    with rasterio.open(raster(tmp_path / "map.tif", numbers)) as back:
        np.testing.assert_array_equal(back.read(1), numbers)
        assert back.dtypes == ("uint8",)
        assert tuple(back.transform)[:6] == PLACE.transform
        assert back.crs.to_epsg() == 32616
        assert back.colormap(1)[5] == (5, 7, 9, 255)
        assert back.tags(1)["CLASS_1"] == "corn"


@pytest.mark.filterwarnings("error")
def test_large_numbers_and_no_place(tmp_path) -> None:
    numbers = np.array([[0, 300], [2, 65535]])
    path = raster(tmp_path / "deep" / "map.tif", numbers, None)
    with Image.open(path) as back:
        np.testing.assert_array_equal(np.asarray(back), numbers)


@pytest.mark.parametrize("crs", ["EPSG:999999", "no such system", 'PROJCS["cut off'])
def test_a_coordinate_system_that_cannot_be_read_is_left_out(tmp_path, caplog, crs) -> None:
    numbers = np.arange(12).reshape(3, 4)
    with rasterio.open(raster(tmp_path / "map.tif", numbers, Georeference(PLACE.transform, crs))) as back:
        np.testing.assert_array_equal(back.read(1), numbers)
        assert tuple(back.transform)[:6] == PLACE.transform
        assert back.crs is None
    assert [record.name for record in caplog.records if record.levelname == "WARNING"] == [write_raster.__module__]
    assert "without a coordinate system" in caplog.text


def test_arrays_and_pictures(tmp_path) -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3)
    np.testing.assert_array_equal(np.load(write_array(tmp_path / "a.npy", values), allow_pickle=False), values)
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    np.testing.assert_array_equal(np.asarray(Image.open(write_picture(tmp_path / "a.png", picture))), picture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.png"]


def test_rasterio_is_named_where_it_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UsageError, match=r"excite\[geotiff\]"):
        raster(tmp_path / "map.tif", np.zeros((2, 2), int))

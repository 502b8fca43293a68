"""Pictures of scenes, by what their pixels show."""

import numpy as np
import pytest
from PIL import Image

from excite.report.palette import CLASSES, UNLABELLED, class_colours, heat, rgb
from excite.report.scene import LARGEST, confusion_picture, false_colour, scene_picture, thinning, uncertainty_picture

NAMES = [f"class {i}" for i in range(1, 5)]


def colours(picture):
    return {tuple(colour) for colour in np.asarray(picture).reshape(-1, 3)}


def area(picture, colour):
    return int((np.asarray(picture) == np.array(colour)).all(2).sum())


def labels(rows=20, cols=30):
    return np.add.outer(np.arange(rows) // 10, np.arange(cols) // 10) % 4


def test_every_class_has_its_colour_in_map_and_legend() -> None:
    shown = labels()
    picture = scene_picture(shown, NAMES)
    scale = 560 // 30
    for i, colour in enumerate(class_colours(4)):
        in_map = int((shown == i).sum()) * scale**2
        assert in_map + 200 < area(picture, colour) < in_map + 400  # with the swatch in the legend
    assert rgb(UNLABELLED) not in colours(picture)


def test_the_ground_truth_stands_beside_it() -> None:
    shown, truth = labels(), labels().copy()
    truth[:, 15:] = -1
    image = false_colour(np.random.default_rng(0).random((3, 20, 30)))
    alone, beside = scene_picture(shown, NAMES), scene_picture(shown, NAMES, image, truth, "A title", "A note")
    assert beside.width > 2.9 * (alone.width - 48)
    assert beside.height > alone.height
    assert area(beside, rgb(UNLABELLED)) > 300 * (560 // 30) ** 2
    with_entropy = scene_picture(shown, NAMES, image, truth, entropy=np.full((20, 30), 0.5))
    assert with_entropy.width > beside.width


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 400), (700, 5), (1401, 900)])
def test_scenes_of_every_shape(rows, cols) -> None:
    shown = np.zeros((rows, cols), np.uint8)
    picture = scene_picture(shown, ["one"], np.zeros((rows, cols, 3), np.uint8), shown.astype(np.int64) - 1, "t", "n")
    assert max(picture.size) < 3 * LARGEST + 200
    assert uncertainty_picture(np.zeros((rows, cols), np.float32)).height > 60


def test_a_large_scene_is_thinned_out() -> None:
    large = np.broadcast_to(np.uint8(2), (40_000, 60_000))  # 2.4 gigapixels, of one byte in memory
    assert thinning(large.shape) == 43
    assert scene_picture(large, NAMES).width < 1500
    assert uncertainty_picture(np.broadcast_to(np.float32(0.5), large.shape)).width < 1600


def test_wide_panels_stand_beneath_each_other() -> None:
    shown = np.zeros((300, 1200), np.uint8)
    picture = scene_picture(shown, ["one"], np.full((300, 1200, 3), 77, np.uint8))
    assert 1200 < picture.width < 1300
    rows = (np.asarray(picture)[:, 600] == 77).all(1).nonzero()[0]
    assert rows.max() < (np.asarray(picture)[:, 600] == class_colours(1)[0]).all(1).nonzero()[0].min()


def test_names_in_other_letters_are_drawn() -> None:
    strange = ["Straße", "été × 2 – 3", "玉米", ""]
    assert isinstance(scene_picture(labels(), strange), Image.Image)
    assert isinstance(confusion_picture(np.eye(4, dtype=int), strange), Image.Image)


@pytest.mark.parametrize("count", [2, 16, 40, 110])
def test_many_classes(count) -> None:
    names = [f"a class with the long name {i}" for i in range(count)]
    shown = np.arange(200).reshape(10, 20) % count
    picture = scene_picture(shown, names)
    wanted = {tuple(colour) for colour in class_colours(count)}
    assert len(wanted) == count
    assert wanted <= colours(picture)
    assert confusion_picture(np.full((count, count), 12345), names).width > 30 * count


def test_uncertainty_goes_from_black_to_pale() -> None:
    values = np.zeros((40, 40), np.float32)
    values[:, 20:] = 0.4
    picture = np.asarray(uncertainty_picture(values, title=None))
    assert tuple(picture[100, 100]) == tuple(heat(np.array(0.0)))
    assert tuple(picture[100, 100 + 280]) == tuple(heat(np.array(0.8)))  # the colours end at 0.5
    assert (np.diff(heat(np.linspace(0, 1, 50)).astype(int) @ (2, 7, 1)) > 0).all()


def test_confusion_counts_stand_where_they_belong() -> None:
    confusion = np.diag([50, 40, 30, 0])
    picture = np.asarray(confusion_picture(confusion, NAMES, title=None)).astype(int)
    confusion[0, 2] = 25
    other = np.asarray(confusion_picture(confusion, NAMES, title=None)).astype(int)
    rows, cols = np.nonzero(np.abs(picture - other).sum(2))
    red = (other[..., 0] - other[..., 2] > 60) & (picture.sum(2) > 700)
    assert red.any()
    assert rows.max() < picture.shape[0] / 2  # the first row, and its share
    assert (cols[red[rows, cols]] > picture.shape[1] / 2).all()


def test_false_colour_stretches_each_band() -> None:
    bands = np.stack([np.linspace(0, 1, 10_000), np.linspace(-500, 500, 10_000), np.full(10_000, 7.0)])
    bands = bands.reshape(3, 100, 100)
    bands[0, 0, 0], bands[0, 0, 1] = np.nan, 1e9
    image = false_colour(bands)
    assert image.shape == (100, 100, 3)
    assert image.dtype == np.uint8
    for band in (0, 1):
        assert 150 < (image[..., band] == 0).sum() < 250
        assert 150 < (image[..., band] == 255).sum() < 250
    assert (image[..., 2] == 0).all()


# --- colours ---------------------------------------------------------------------------------------------------

# Machado, Oliveira & Fernandes 2009, table 1, severity 1.0: what is seen without red and without green cones.
BLIND = {
    "nothing": np.eye(3),
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def oklab(linear):
    lms = linear @ np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    ).T  # fmt: skip
    return np.cbrt(lms) @ np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    ).T  # fmt: skip


@pytest.mark.parametrize(
    ("without", "count", "least"), [("nothing", 24, 0.10), ("red", 16, 0.085), ("green", 16, 0.085)]
)
def test_colours_can_be_told_apart(without, count, least) -> None:
    values = np.concatenate((class_colours(count), [rgb(UNLABELLED)])) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = oklab(np.clip(linear @ np.array(BLIND[without]).T, 0, 1))
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=2) + np.eye(len(seen))
    assert apart.min() > least
    assert len(set(CLASSES)) == 24

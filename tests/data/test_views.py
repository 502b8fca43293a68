"""Views of images, held against torchvision's own crops pixel by pixel."""

from __future__ import annotations

import logging

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import to_pil_image

from excite.data import Split, load_data
from excite.data.base import StackedImages
from excite.data.encoded import DecodedImages
from excite.data.images import BrokenImageError, fit
from excite.data.views import CORNERS_AND_CENTRE, ViewLoader, Views, grid
from excite.errors import ExciteError
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

SIZES = [(40, 57), (61, 33), (32, 32), (33, 32), (37, 90)]


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height)
    )


def sized(image: torch.Tensor, side: int, interpolation: str = "bilinear") -> torch.Tensor:
    return F.resize(image, [side], InterpolationMode(interpolation), antialias=True)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_the_centre_is_torchvisions(size, interpolation) -> None:
    image = picture(*size)
    expected = F.center_crop(sized(image, 32, interpolation), [24])
    assert torch.equal(Views(24, (32,)).of(image, interpolation), expected[None])
    preprocessing = Preprocessing(24, IMAGENET_MEAN, IMAGENET_STD, 32, interpolation)
    assert torch.equal(fit(image, preprocessing), expected), "as an evaluation without a protocol has it"


@pytest.mark.parametrize("size", SIZES)
def test_ten_crops_are_torchvisions(size) -> None:
    image = picture(*size)
    ours = Views(24, (35,), CORNERS_AND_CENTRE, flip=True).of(image)
    theirs = torch.stack(F.ten_crop(sized(image, 35), [24]))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", SIZES)
def test_several_scales_and_mirror_images(size) -> None:
    image = picture(*size)
    ours = Views(24, (24, 30, 41), flip=True).of(image)
    expected = [F.center_crop(one, [24]) for side in (24, 30, 41) for one in _pair(sized(image, side))]
    assert torch.equal(ours, torch.stack(expected))


def _pair(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return image, F.horizontal_flip(image)


def test_a_grid_reaches_every_border_and_is_even() -> None:
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(72), indexing="ij")
    image = torch.stack([rows, columns, 0 * rows]).to(torch.uint8)
    views = Views(24, (48,), grid(4)).of(image)
    corners = views[:, :2, 0, 0].tolist()
    assert corners == [[row, column] for row in (0, 8, 16, 24) for column in (0, 16, 32, 48)]
    assert len(views) == len(Views(24, (48,), grid(4))) == 16
    assert grid(1) == ((0.5, 0.5),)
    assert set(grid(3)) > set(CORNERS_AND_CENTRE)


def split_of(images: list[torch.Tensor]) -> Split:
    labels = torch.arange(len(images)) % 3
    return Split(DecodedImages(images, labels), labels, [f"{i}.png" for i in range(len(images))], 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_comes_once_with_all_its_views(workers) -> None:
    images = [picture(*size) for size in SIZES]
    views = Views(16, (20, 24), flip=True)
    seen = []
    for x, y, index in ViewLoader(split_of(images), views, "bilinear", 2, workers=workers):
        assert x.shape[1:] == (len(views), 3, 16, 16)
        assert x.dtype == torch.uint8
        assert torch.equal(y, index % 3)
        for own, i in zip(x, index.tolist(), strict=True):
            assert torch.equal(own, views.of(images[i]))
            seen.append(i)
    assert seen == list(range(len(images)))


class _Broken(DecodedImages):
    refuse = False

    def __getitem__(self, i: int):
        if i in (1, 2):
            raise BrokenImageError("cut off")
        return super().__getitem__(i)


def test_broken_images_are_skipped_and_told(caplog) -> None:
    images = [picture(*size) for size in SIZES]
    split = split_of(images)
    split = Split(_Broken(images, split.labels), split.labels, split.names, 3)
    with caplog.at_level(logging.WARNING, "excite.data"):
        kept = torch.cat([index for _, _, index in ViewLoader(split, Views(16, (16,)), "bilinear", 1)])
    assert kept.tolist() == [0, 3, 4]
    assert "1.png" in caplog.text
    assert "2.png" in caplog.text


def test_a_broken_image_can_be_refused(tmp_path) -> None:
    for i, (name, size) in enumerate((name, size) for name in ("cat", "dog") for size in SIZES):
        (tmp_path / name).mkdir(exist_ok=True)
        to_pil_image(picture(*size)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat/broken.png").write_bytes(b"nothing")
    data = load_data(tmp_path, all_for_test=True, broken="refuse", memory_limit=0)
    assert data.test is not None
    with pytest.raises(ExciteError, match=r"broken\.png"):
        list(ViewLoader(data.test, Views(16, (16,)), "bilinear", 4))


def test_stacked_images_are_resized_and_cropped_too() -> None:
    pixels = torch.stack([picture(32, 32)] * 2)
    labels = torch.tensor([0, 1])
    split = Split(StackedImages(pixels, labels), labels, ["a", "b"], 2)
    (x, _, _), *_ = ViewLoader(split, Views(32, (40,)), "bilinear", 2)
    assert torch.equal(x[0, 0], F.center_crop(sized(pixels[0], 40), [32]))


def test_images_keep_their_own_size_on_request(tmp_path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            to_pil_image(picture(48, 40 + i)).save(tmp_path / name / f"{i}.png")
    data = load_data(tmp_path, all_for_test=True, own_size=True, image_size=32)
    assert data.test is not None
    assert {tuple(data.test.images[i][0].shape) for i in range(6)} == {(3, 48, 40 + i) for i in range(3)}

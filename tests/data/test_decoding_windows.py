"""A window of a file is decoded to the very pixels that the whole file has there, whatever the file."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from excite.data import Loader, load_data
from excite.data import images as images_module
from excite.data.augment import Augmentation, jitter
from excite.data.images import BrokenImageError, decode, decode_window, normalise
from excite.data.jpeg import first_rows, plain_frame
from excite.preprocessing import Preprocessing

RNG = np.random.default_rng(0)
HALVES = Preprocessing(8, (0.5, 0.4, 0.3), (0.5, 0.4, 0.3))
HEIGHT, WIDTH = 203, 157  # not a whole number of the blocks of 8 or 16 rows that a JPEG file is made of


def photograph(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Colours that change over a few pixels, so that rows and columns next to each other tell in the chroma."""
    coarse = RNG.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillows(content: bytes, mode: str = "RGB") -> np.ndarray:
    """The pixels by Pillow alone, (H, W, C)."""
    pixels = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def turned(orientation: int, **more: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photograph(), exif=exif, **more)


USUAL = {
    "4:2:0": encoded(photograph(), quality=90),
    "4:2:2": encoded(photograph(), quality=90, subsampling="4:2:2"),
    "4:4:4": encoded(photograph(), quality=90, subsampling="4:4:4"),
    "grey": encoded(photograph().convert("L")),
    "restart markers": encoded(photograph(), restart_marker_rows=1),
    "optimised tables": encoded(photograph(), optimize=True),
    "upright by its notes": turned(1),
    "colour profile": encoded(photograph(), icc_profile=bytes(RNG.integers(0, 256, 70_000, dtype=np.uint8))),
    "comment that looks like an end": encoded(photograph(), comment=b"\xff\xd9\xff\xc0"),
    "more than 64 KiB": encoded(photograph(500, 600), quality=97),
    "something after the end": encoded(photograph()) + b"\xff\xd8 and so on",
}
UNUSUAL = {
    "progressive": encoded(photograph(), progressive=True),
    "print colours": encoded(photograph().convert("CMYK")),
    **{f"orientation {number}": turned(number) for number in range(2, 9)},
    "notes without an orientation": encoded(photograph(), exif=Image.Exif().tobytes() or b"Exif\0\0"),
    "PNG": encoded(photograph(), "PNG"),
    "palette": encoded(photograph().quantize(16), "GIF"),
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", [*USUAL, *UNUSUAL])
def test_a_window_has_the_pixels_that_pillow_decodes(kind: str, channels: int) -> None:
    content = (USUAL | UNUSUAL)[kind]
    if kind == "print colours" and channels == 1:
        pytest.skip("grey of print colours comes by way of RGB or not, a matter of taste")
    whole = pillows(content, "RGB" if channels == 3 else "L")
    height, width = whole.shape[:2]
    sizes = []
    for top, bottom in [(0, height), (0, 1), (7, 40), (15, 16), (30, 64), (90, height - 1), (height - 1, height)]:
        left = int(RNG.integers(0, width - 20))

        def choose(*size: int, window: tuple[int, int, int, int] = (top, left, bottom - top, 20)) -> tuple[int, ...]:
            sizes.append(size)
            return window

        window = decode_window(content, channels, choose)
        np.testing.assert_array_equal(window.permute(1, 2, 0).numpy(), whole[top:bottom, left : left + 20])
    assert set(sizes) == {(height, width)}


@pytest.mark.parametrize("kind", USUAL)
def test_of_a_usual_file_the_rows_below_are_left_out(kind: str) -> None:
    content = USUAL[kind]
    frame = plain_frame(content)
    assert frame is not None
    height = Image.open(io.BytesIO(content)).height
    shortened = Image.open(io.BytesIO(first_rows(content, frame, 40)))
    assert 40 < shortened.height <= 64
    assert first_rows(content, frame, height) == content


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_file_is_decoded_whole(kind: str) -> None:
    assert plain_frame(UNUSUAL[kind]) is None


def test_what_is_no_jpeg_or_half_of_one_has_no_plain_frame() -> None:
    content = USUAL["4:2:0"]
    for end in range(len(content)):
        assert plain_frame(content[:end]) is None
    assert plain_frame(content) is not None


def test_a_file_cut_off_below_its_window_is_still_broken() -> None:
    content = USUAL["more than 64 KiB"]
    for end in (20, 700, len(content) // 2, len(content) - 2):
        with pytest.raises(BrokenImageError):
            decode_window(content[:end], 3, lambda *_: (0, 0, 8, 8))
        with pytest.raises(BrokenImageError):
            decode(content[:end])


def test_bytes_that_were_spoilt_end_in_pixels_or_in_a_broken_image() -> None:
    content = USUAL["optimised tables"]
    for _ in range(300):
        spoilt = bytearray(content)
        for place in RNG.integers(0, 700, 3):
            spoilt[place] = RNG.integers(0, 256)
        try:
            whole = decode(bytes(spoilt))
        except BrokenImageError:
            whole = None
        try:
            window = decode_window(bytes(spoilt), 3, lambda height, width: (0, 0, min(30, height), min(20, width)))
        except BrokenImageError:
            assert whole is None
        else:
            assert whole is None or torch.equal(window, whole[:, :30, :20])


def test_an_enormous_file_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(BrokenImageError, match=f"more than the {HEIGHT * WIDTH - 1:,} allowed"):
        decode_window(USUAL["4:2:0"], 3, lambda *_: (0, 0, 8, 8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of JPEG files, one of them progressive and one turned."""
    root = tmp_path_factory.mktemp("photos")
    for name in ("ape", "bee"):
        (root / name).mkdir()
        for number in range(6):
            content = encoded(photograph(90 + 9 * number, 120), quality=90, progressive=number == 3)
            (root / name / f"{number}.jpg").write_bytes(turned(6) if number == 5 else content)
    return root


def loader(root: Path | str, memory_limit: int, workers: int = 0, **augment: object) -> Loader:
    data = load_data(root, image_size=48, all_for_test=True, memory_limit=memory_limit)
    assert data.test is not None
    choice = Augmentation(crop="resized", flip=0.5, **augment)  # type: ignore[arg-type]
    return Loader(data.test, data.preprocessing, 6, seed=0, augment=choice, shuffle=True, workers=workers)


def test_files_decoded_by_windows_give_the_batches_of_images_decoded_whole(photos: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photos.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(photos, ".")
    in_memory = list(loader(photos, 1 << 30))
    for root in (photos, archive):
        encoded_batches = list(loader(root, 0))
        assert len(encoded_batches) == len(in_memory)
        for mine, whole in zip(encoded_batches, in_memory, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(mine, whole, strict=True))


@pytest.mark.parametrize("augment", [{}, {"rotate": 10.0, "jitter": 20}, {"erasing": 1.0}, {"mixup": 0.5}])
def test_a_worker_hands_over_the_very_batches(photos: Path, augment: dict[str, float]) -> None:
    here = list(loader(photos, 0, **augment))
    there = list(loader(photos, 0, workers=1, **augment))
    for mine, others in zip(here, there, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, others, strict=True))
        assert mine[0].stride() == others[0].stride()
        others[0].mul_(2)  # it is the receiver's own: it may be written to
    assert torch.equal(next(iter(loader(photos, 0, **augment)))[0], here[0][0])


def test_a_batch_from_files_lies_channels_last(photos: Path) -> None:
    batch = next(iter(loader(photos, 0, rotate=10, jitter=20)))[0]
    assert batch.shape == (6, 3, 48, 48)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_rotation_and_jitter_reach_the_batches_of_a_loader(photos: Path) -> None:
    plain, moved = (next(iter(loader(photos, 0, **kind)))[0] for kind in ({}, {"rotate": 10.0, "jitter": 20}))
    assert plain.shape == moved.shape
    # As far as a colour is moved, twenty steps of 255 in units of the standard deviation, and turned within.
    assert 0.02 < (plain - moved).abs().mean() < 1.5
    only_jitter = next(iter(loader(photos, 0, jitter=20)))[0]
    std = torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)
    steps = (only_jitter - plain) * std * 255
    assert steps.abs().max() < 20.01
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_a_file_that_breaks_while_training_is_named(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in photos.rglob("*.jpg"):
        place = tmp_path / path.relative_to(photos)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(path.read_bytes())
    (tmp_path / "bee/2.jpg").write_bytes((photos / "bee/2.jpg").read_bytes()[:-2])
    with caplog.at_level(logging.WARNING, "excite.data"):
        seen = torch.cat([index for _, _, index in loader(tmp_path, 0)])
    assert len(seen) == 11
    assert "bee/2.jpg" in caplog.text
    assert "truncated" in caplog.text


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 224, 224), (40, 3, 32, 32), (2, 1, 50, 40), (0, 3, 8, 8), (1, 3, 1, 1)])
def test_normalising_is_torchvisions_in_either_layout(shape: tuple[int, ...], last: bool) -> None:
    images = torch.from_numpy(RNG.integers(0, 256, shape, dtype=np.uint8))
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    mean, std = (0.485, 0.456, 0.406)[: shape[1]], (0.229, 0.224, 0.225)[: shape[1]]
    done = normalise(images, Preprocessing(shape[-1], mean, std, channels=shape[1]))
    expected = F.normalize(F.to_dtype(images, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(done, expected)
    assert done.stride() == images.stride()


@pytest.mark.parametrize("last", [False, True])
def test_images_with_gaps_in_memory_are_normalised_and_jittered_too(last: bool) -> None:
    whole = torch.from_numpy(RNG.integers(0, 256, (4, 3, 12, 14), dtype=np.uint8))
    if last:
        whole = whole.contiguous(memory_format=torch.channels_last)
    for images in (whole[..., 2:9, 1:12], whole[::2], whole.transpose(2, 3)):
        alone = images.contiguous()
        assert torch.equal(normalise(images, HALVES), normalise(alone, HALVES))
        index = np.arange(len(images))
        choice = Augmentation(jitter=9)
        assert torch.equal(jitter(images, choice, 0, 0, index), jitter(alone, choice, 0, 0, index))

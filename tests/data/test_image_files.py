from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from excite.data import images
from excite.data.images import BrokenImageError, decode, fit, header_size, is_image_name
from excite.preprocessing import Preprocessing

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def png_by_hand(header: bytes, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_give_the_very_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert torch.equal(decode(encoded(Image.fromarray(COLOURS), kind, **options)), chw(COLOURS))


def test_jpeg_gives_pillows_pixels() -> None:
    content = encoded(Image.fromarray(COLOURS), "JPEG", quality=90)
    assert torch.equal(decode(content), chw(np.array(Image.open(io.BytesIO(content)))))


def test_grey_is_repeated_or_kept() -> None:
    grey = COLOURS[..., 0]
    content = encoded(Image.fromarray(grey), "PNG")
    assert torch.equal(decode(content, channels=1), torch.from_numpy(grey)[None])
    assert torch.equal(decode(content, channels=3), torch.from_numpy(grey)[None].expand(3, -1, -1))


def test_colour_becomes_grey_by_luma() -> None:
    grey = decode(encoded(Image.fromarray(COLOURS), "PNG"), channels=1)
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    assert grey.shape == (1, 20, 30)
    np.testing.assert_allclose(grey[0].numpy(), luma, atol=1)


def test_cmyk_jpeg() -> None:
    flat = np.zeros((16, 16, 4), dtype=np.uint8)
    flat[..., 0] = 255  # all cyan ink: no red comes back, green and blue do
    pixels = decode(encoded(Image.fromarray(flat, "CMYK"), "JPEG", quality=100))
    assert pixels.shape == (3, 16, 16)
    red, green, blue = pixels.float().mean((1, 2))
    assert red < 10
    assert green > 245
    assert blue > 245


def test_sixteen_bit_png_is_divided_not_clipped() -> None:
    deep = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    content = encoded(Image.fromarray(deep), "PNG")
    assert content[24] == 16  # the header's bit depth
    grey = decode(content, channels=1)[0].numpy()
    np.testing.assert_array_equal(grey, np.round(deep.astype(float) / 257).astype(np.uint8))
    assert torch.equal(decode(content)[2], torch.from_numpy(grey))


def test_sixteen_bit_colour_png() -> None:
    # Pillow does not write these, so the file is put together by hand: 2×1 pixels, colour type 2, 16 bits.
    rows = b"\x00" + struct.pack(">6H", 65535, 0, 32768, 257, 25700, 65535)
    content = png_by_hand(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), rows)
    assert decode(content)[:, 0].T.tolist() == [[255, 0, 128], [1, 100, 255]]


def test_palette_png() -> None:
    palette = Image.fromarray(COLOURS).quantize(16)
    assert torch.equal(decode(encoded(palette, "PNG")), chw(np.array(palette.convert("RGB"))))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_laid_on_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0] * 256)
        content = encoded(image, "PNG", transparency=0)
    else:
        content = encoded(Image.new(mode, (4, 4), 0), "PNG")
    assert decode(content).eq(255).all()


def test_half_transparent_is_blended() -> None:
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    red, green, blue = decode(encoded(image, "PNG"))[:, 0, 0].tolist()
    assert red == 255
    assert abs(green - 127) <= 1
    assert green == blue


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation_is_applied(orientation: int) -> None:
    # What each value means (Exif 2.3, tag 0x0112): how to bring the stored rows and columns upright.
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(COLOURS), "PNG", exif=exif)
    expected = chw(upright(COLOURS))
    assert torch.equal(decode(content), expected)
    assert header_size(content) == tuple(expected.shape[1:])


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("L", (5, 5), value) for value in (10, 200)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(content, channels=1).eq(10).all()


def test_one_bit_image() -> None:
    image = Image.fromarray(COLOURS[..., 0] > 127)
    assert set(decode(encoded(image, "PNG"), channels=1).unique().tolist()) == {0, 255}


JPEG = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
PNG = encoded(Image.fromarray(COLOURS), "PNG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:20], "."),
        (PNG[: len(PNG) // 2], "."),
        (PNG[:60] + b"\x00" * 40 + PNG[100:], "."),
        (encoded(Image.fromarray(np.zeros((3, 3), dtype=np.float32)), "TIFF"), "no known white"),
    ],
    ids=["zero bytes", "text", "half a jpeg", "jpeg header", "half a png", "damaged png", "float tiff"],
)
def test_broken_files_are_told_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BrokenImageError, match=reason):
        decode(content)


def test_an_enormous_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    # A few bytes that claim 60,000 × 60,000 pixels; decoding them would take 10 GB.
    content = png_by_hand(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"\x00" * 100)
    for read in (decode, header_size):
        with pytest.raises(BrokenImageError, match="89,478,485"):
            read(content)
    # Between Pillow's warning and its error the bound is ours.
    monkeypatch.setattr(images, "MAX_PIXELS", 500)
    with pytest.raises(BrokenImageError, match="30 × 20 pixels are more than the 500 allowed"):
        decode(PNG)


def test_suffixes() -> None:
    assert all(is_image_name(name) for name in ("a.JPG", "b.jpeg", "c.d/e.Png", "f.TIF"))
    assert not any(is_image_name(name) for name in ("a.txt", "jpg", ".jpg/readme", "a.jpg.part", "x.npy"))


@pytest.mark.parametrize("shape", [(300, 401), (401, 300), (257, 257), (224, 500), (100, 90)])
def test_fit_takes_the_pixels_that_torchvision_takes(shape: tuple[int, int]) -> None:
    image = torch.from_numpy(RNG.integers(0, 256, (3, *shape), dtype=np.uint8))
    reference = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(image)
    mine = fit(image, Preprocessing(224, (0.5,) * 3, (0.5,) * 3, resize=256))
    assert torch.equal(mine, reference)


def test_fit_leaves_an_image_of_the_right_size_alone() -> None:
    image = torch.from_numpy(RNG.integers(0, 256, (3, 32, 32), dtype=np.uint8))
    assert torch.equal(fit(image, Preprocessing(32, (0.5,) * 3, (0.5,) * 3)), image)


def test_fit_brings_a_larger_image_to_a_small_network() -> None:
    image = torch.from_numpy(RNG.integers(0, 256, (3, 48, 80), dtype=np.uint8))
    mine = fit(image, Preprocessing(32, (0.5,) * 3, (0.5,) * 3))
    reference = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32)])(image)
    assert torch.equal(mine, reference)

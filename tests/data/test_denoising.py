from __future__ import annotations

import importlib
import io
import itertools
import logging
import math
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from excite.data.clean import FileImages, HeldImages
from excite.data.degrade import Degradation
from excite.data.denoising import DenoisingData, DenoisingSplit, is_denoising, load_denoising
from excite.errors import ExciteError, UsageError

COLOUR_PNG, GREY_ALPHA_PNG, COLOUR_ALPHA_PNG = 2, 4, 6


def texture(height: int, width: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3)."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def deep_png(values: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits, by its specification: (H, W, C) of 0 … 65535."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    raw = np.frombuffer(values.astype(">u2").tobytes(), dtype=np.uint8).reshape(height, -1).astype(int)
    step = 2 * values.shape[2]
    left = np.pad(raw, ((0, 0), (step, 0)))[:, :-step]
    up = np.pad(raw, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(left, ((1, 0), (0, 0)))[:-1]
    distances = [abs(left + up - corner - one) for one in (left, up, corner)]
    paeth = np.choose(np.argmin(distances, axis=0), [left, up, corner])
    filtered = [raw, raw - left, raw - up, raw - (left + up) // 2, raw - paeth]  # one after the other
    rows = b"".join(bytes([y % 5]) + (filtered[y % 5][y] % 256).astype(np.uint8).tobytes() for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(chunk, chunks))


def load(path: Path, **options: Any) -> DenoisingData:
    return load_denoising(f"denoising:{path}", **{"patch": 8, **options})


def test_part(path: Path, **options: Any) -> DenoisingSplit:
    """All images of a folder without splits."""
    data = load(path, all_for_test=True, **options)
    assert data.train is data.val is None
    assert data.test is not None
    return data.test


test_part.__test__ = False  # type: ignore[attr-defined]


def names(split: DenoisingSplit | None) -> list[str]:
    return list(split.names) if split else []


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    for i in range(10):
        write(tmp_path / f"{i}.png", texture(12 + i, 20, seed=i))
    return tmp_path


# --- which spec -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "yes"),
    [("denoising:photos", True), ("photographs", True), ("digits", False), ("photos", False), ("folder:x", False)],
)
def test_which_specs_are_of_denoising(spec: str, yes: bool) -> None:
    assert is_denoising(spec) is yes


# --- pixels ---------------------------------------------------------------------------------------------------


def test_eight_bits(tmp_path: Path) -> None:
    pixels = texture(9, 13)
    write(tmp_path / "a.png", pixels)
    split = test_part(tmp_path)
    clean = split.clean(0)
    assert clean.dtype == torch.float32
    assert torch.equal(clean, torch.from_numpy(pixels)[None] / 255)
    assert split.size(0) == (9, 13)
    assert len(split) == 1


def test_colour_becomes_grey_as_rgb2gray_and_pillow_do(tmp_path: Path) -> None:
    pixels = texture(40, 50, 3)
    write(tmp_path / "a.png", pixels)
    grey = 255 * test_part(tmp_path).clean(0)[0].double().numpy()
    exact = pixels.astype(float) @ [0.298936021293776, 0.587043074451121, 0.114020904255103]  # MATLAB's
    assert np.abs(grey - exact).max() < 0.51
    assert np.array_equal(np.rint(grey), np.array(Image.fromarray(pixels).convert("L")))


def test_grey_becomes_colour_by_repeating(tmp_path: Path) -> None:
    pixels = texture(9, 13)
    write(tmp_path / "a.png", pixels)
    clean = test_part(tmp_path, channels=3).clean(0)
    assert torch.equal(clean, (torch.from_numpy(pixels) / 255).expand(3, 9, 13))


def deep(height: int, width: int, channels: int) -> np.ndarray:
    """Values that eight bits cannot tell apart, (H, W, C)."""
    return np.random.default_rng(1).integers(30_000, 30_200, (height, width, channels), dtype=np.uint16)


def save_grey_png(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values[..., 0]).save(path.with_suffix(".png"))


def save_grey_tiff(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values[..., 0]).save(path.with_suffix(".tif"))


def save_pgm(path: Path, values: np.ndarray) -> None:
    header = f"P5 {values.shape[1]} {values.shape[0]} 65535\n".encode()
    path.with_suffix(".pgm").write_bytes(header + values[..., 0].astype(">u2").tobytes())


def save_colour_png(path: Path, values: np.ndarray) -> None:
    path.with_suffix(".png").write_bytes(deep_png(values, COLOUR_PNG))


def save_colour_tiff(path: Path, values: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path.with_suffix(".tif"), values, photometric="rgb")


def save_planar_tiff(path: Path, values: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    planes = values.transpose(2, 0, 1)
    tifffile.imwrite(path.with_suffix(".tif"), planes, photometric="rgb", planarconfig="separate")


@pytest.mark.parametrize("save", [save_grey_png, save_grey_tiff, save_pgm])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_kept(tmp_path: Path, save: Callable[[Path, np.ndarray], None], channels: int) -> None:
    values = deep(9, 13, 1)
    save(tmp_path / "a", values)
    split = test_part(tmp_path, channels=channels)
    assert split.images[0].dtype == np.uint16
    expected = (values[..., 0] / 65535).astype(np.float32)
    np.testing.assert_allclose(split.clean(0).numpy(), np.broadcast_to(expected, (channels, 9, 13)), rtol=1e-7)


@pytest.mark.parametrize("save", [save_colour_png, save_colour_tiff, save_planar_tiff])
def test_sixteen_bits_of_colour_are_kept(tmp_path: Path, save: Callable[[Path, np.ndarray], None]) -> None:
    values = deep(9, 13, 3)
    save(tmp_path / "a", values)
    clean = test_part(tmp_path, channels=3).clean(0).numpy()
    np.testing.assert_allclose(clean, values.transpose(2, 0, 1) / 65535, rtol=1e-6)
    grey = test_part(tmp_path, channels=1).clean(0)[0].double().numpy() * 65535
    assert np.abs(grey - values.astype(float) @ [0.299, 0.587, 0.114]).max() < 0.51


@pytest.mark.parametrize(("kind", "channels"), [(GREY_ALPHA_PNG, 1), (COLOUR_ALPHA_PNG, 3)])
def test_sixteen_bits_with_transparency_are_laid_on_white(tmp_path: Path, kind: int, channels: int) -> None:
    values = deep(9, 13, channels + 1)
    (tmp_path / "a.png").write_bytes(deep_png(values, kind))
    colour, alpha = np.split(values.transpose(2, 0, 1) / 65535, [channels])
    expected = colour * alpha + 1 - alpha
    assert np.abs(test_part(tmp_path, channels=channels).clean(0).numpy() - expected).max() < 0.51 / 65535


def test_images_are_held_as_they_are_stored(tmp_path: Path) -> None:
    write(tmp_path / "a.png", texture(30, 40, 3))
    (tmp_path / "b.png").write_bytes(deep_png(deep(9, 13, 3), COLOUR_PNG))
    images = test_part(tmp_path, channels=3).images
    assert isinstance(images, HeldImages)
    assert [(image.dtype, image.nbytes) for image in images.pixels] == [
        (np.uint8, 30 * 40 * 3),
        (np.uint16, 9 * 13 * 3 * 2),
    ]
    test_part(tmp_path, channels=3).clean(0).zero_()
    assert images.pixels[0].any()


# --- splits ---------------------------------------------------------------------------------------------------


def test_a_fifth_is_held_out_by_name(ten: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "excite.data"):
        data = load(ten)
    assert "2 of its 10 images, a fifth, are held out for test" in caplog.text
    train, test = set(names(data.train)), set(names(data.test))
    assert (len(train), len(test)) == (8, 2)
    assert train | test == {f"{i}.png" for i in range(10)}
    write(ten / "new.png", texture(12, 12))
    write(ten / "sub/new.png", texture(12, 12))
    again = set(names(load(ten).test))
    assert len(again - test) <= 1
    assert test <= again | set(names(load(ten).train))
    assert names(load(ten, val_fraction=0.25).test) == sorted(again)


def test_folders_of_splits(tmp_path: Path) -> None:
    for i, name in enumerate(("train/a.png", "train/deep/b.png", "val/c.png", "Test/d.png", "stray.png")):
        write(tmp_path / "wrapper" / name, texture(12, 12, seed=i))
    data = load(tmp_path)
    assert names(data.train) == ["a.png", "deep/b.png"]
    assert names(data.val) == ["c.png"]
    assert names(data.test) == ["d.png"]
    with pytest.raises(UsageError, match="has its own val/ folder: leave val_fraction at 0"):
        load(tmp_path, val_fraction=0.1)


def test_val_is_for_test_where_there_is_none(tmp_path: Path) -> None:
    write(tmp_path / "train/a.png", texture(12, 12))
    write(tmp_path / "val/b.png", texture(12, 12))
    data = load(tmp_path)
    assert (names(data.train), data.val, names(data.test)) == (["a.png"], None, ["b.png"])


def test_a_folder_that_happens_to_be_called_test_beside_others_is_no_split(tmp_path: Path) -> None:
    for name in ("test/a.png", "city/b.png"):
        write(tmp_path / name, texture(12, 12))
    assert names(test_part(tmp_path)) == ["city/b.png", "test/a.png"]


def test_only_training_or_only_test_images(tmp_path: Path) -> None:
    write(tmp_path / "one/train/a.png", texture(12, 12))
    write(tmp_path / "two/test/b.png", texture(12, 12))
    assert [names(getattr(load(tmp_path / "one"), part)) for part in ("train", "test")] == [["a.png"], []]
    assert [names(getattr(load(tmp_path / "two"), part)) for part in ("train", "test")] == [[], ["b.png"]]


def test_a_single_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.png", texture(12, 12))
    with caplog.at_level(logging.WARNING, "excite.data"):
        data = load(tmp_path, val_fraction=0.5)
    assert (names(data.train), data.val, data.test) == (["a.png"], None, None)
    assert "a single image" in caplog.text


def test_test_images_given_apart(ten: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write(other / "flat/x.png", texture(12, 12))
    write(other / "split/test/y.png", texture(12, 12))
    write(other / "split/train/z.png", texture(12, 12))
    for given in (str(other / "flat"), f"denoising:{other / 'flat'}"):
        data = load(ten, test=given, val_fraction=0.2)
        assert (len(names(data.train)), len(names(data.val)), names(data.test)) == (8, 2, ["x.png"])
    assert names(load(ten, test=str(other / "split")).test) == ["y.png"]
    assert names(load(other / "split", test=str(other / "flat")).train) == ["z.png"]
    (other / "split/test/y.png").unlink()
    with pytest.raises(UsageError, match="holds only training images"):
        load(ten, test=str(other / "split"))


def test_hidden_files_and_others_are_left_out(ten: Path) -> None:
    write(ten / ".thumbs/a.png", texture(12, 12))
    write(ten / "__MACOSX/b.png", texture(12, 12))
    (ten / "notes.txt").write_text("hello")
    assert names(test_part(ten)) == [f"{i}.png" for i in range(10)]


def test_a_tar_is_like_its_folder(ten: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tar = tmp_path_factory.mktemp("tars") / "images.tar"
    write(ten / "sub/a.png", texture(12, 12, seed=77))
    with tarfile.open(tar, "w") as archive:
        archive.add(ten, arcname="photos")
    folder = test_part(ten)
    inside = test_part(Path(f"{tar}/photos"))
    assert inside.key() == folder.key()
    for i in range(len(folder)):
        for one, other in zip(folder.pair(i), inside.pair(i), strict=True):
            assert torch.equal(one, other)
    assert names(test_part(Path(f"{tar}/photos/sub"))) == ["a.png"]
    assert names(test_part(tar))[0] == "photos/0.png"
    with pytest.raises(UsageError, match="holds no images"):
        load(Path(f"{tar}/elsewhere"))


# --- what held-out images look like ---------------------------------------------------------------------------


def noise_of(split: DenoisingSplit, name: str) -> torch.Tensor:
    noisy, clean = split.pair(split.names.index(name))
    return noisy - clean


def test_an_image_has_always_the_same_noise(tmp_path: Path) -> None:
    for name in "bc":
        write(tmp_path / f"{name}.png", texture(100, 100))
    split = test_part(tmp_path, degradation="gaussian:0-55")
    first, second = noise_of(split, "b.png"), noise_of(split, "c.png")
    assert not torch.equal(first, second)
    assert first.std() != pytest.approx(float(second.std()), rel=0.05)  # each has its own level
    write(tmp_path / "a.png", texture(100, 100))
    more = test_part(tmp_path, degradation="gaussian:0-55")
    assert torch.equal(noise_of(more, "b.png"), first)
    assert torch.equal(noise_of(more, "c.png"), second)
    other = test_part(tmp_path, degradation="gaussian:0-55", noise_seed=1)
    assert not torch.equal(noise_of(other, "b.png"), first)


def test_the_noise_of_published_figures(shared_data: Path) -> None:
    # σ = 25 alone makes a PSNR of 10 · log10(255² / 25²) = 20.172 dB.
    split = test_part(shared_data / "denoising-images.tar/Set12")
    assert len(split) == 12
    errors = [float(noise_of(split, name).double().square().mean()) for name in split.names]
    assert 10 * math.log10(1 / np.mean(errors)) == pytest.approx(20.172, abs=0.02)


def test_quantised(tmp_path: Path) -> None:
    write(tmp_path / "a.png", texture(50, 50))
    plain, rounded = (test_part(tmp_path, quantised=quantised).pair(0)[0] for quantised in (False, True))
    assert plain.min() < 0
    assert plain.max() > 1
    torch.testing.assert_close(rounded, plain.mul(255).round().clamp(0, 255) / 255)


def test_a_key_tells_all_apart_that_scores_hang_on(ten: Path) -> None:
    split = test_part(ten)
    assert split.key() == test_part(ten).key() == test_part(ten, memory_limit=0).key()
    others = [
        replace(split, degradation=Degradation.parse("gaussian:50")),
        replace(split, noise_seed=1),
        replace(split, quantised=True),
        replace(split, names=("x", *split.names[1:])),
        test_part(ten, channels=3),
    ]
    write(ten / "9.png", texture(21, 21))
    others.append(test_part(ten))
    assert len({split.key(), *(other.key() for other in others)}) == len(others) + 1


# --- bad files ------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> dict[str, str]:
    """Broken files, and what is said of them."""
    buffer = io.BytesIO()
    Image.fromarray(texture(30, 30)).save(buffer, "PNG")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:-400])
    sixteen = deep_png(np.random.default_rng(0).integers(0, 65536, (30, 30, 3)), COLOUR_PNG)
    (folder / "cut16.png").write_bytes(sixteen[:-900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    frames = [Image.fromarray(texture(30, 30, seed=i)) for i in range(3)]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "pages.tif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moves.png", save_all=True, append_images=frames[1:])
    Image.fromarray(texture(30, 30).astype(np.float32)).save(folder / "float.tif")
    return {
        "cut.png": "",
        "cut16.png": "",
        "empty.png": "the file is empty",
        "text.jpg": "not an image",
        "moves.gif": "3 frames",
        "pages.tif": "3 frames",
        "moves.png": "3 frames",
        "float.tif": "no known white",
    }


@pytest.mark.parametrize("memory_limit", [1 << 30, 0])
def test_broken_images_are_named_and_skipped(
    tmp_path: Path, memory_limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "good.png", texture(30, 30))
    expected = spoil(tmp_path)
    with caplog.at_level(logging.WARNING, "excite.data"):
        split = test_part(tmp_path, memory_limit=memory_limit)
    assert names(split) == ["good.png"]
    assert split.broken == tuple(sorted(expected))
    assert caplog.text.count(f"{len(expected)} images are broken and skipped") == 1
    with pytest.raises(ExciteError, match=f"{len(expected)} images are broken"):
        test_part(tmp_path, memory_limit=memory_limit, broken="refuse")


def test_each_broken_image_is_told_of_in_its_own_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "all"
    source.mkdir()
    for name, said in spoil(source).items():
        folder = tmp_path / name
        write(folder / "good.png", texture(30, 30))
        (source / name).rename(folder / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "excite.data"):
            test_part(folder)
        assert f"1 image is broken and skipped: {name} (" in caplog.text
        assert said in caplog.text


def test_a_photograph_with_a_preview_behind_it_is_a_still(tmp_path: Path) -> None:
    images = [Image.fromarray(texture(30, 30, 3, seed=i)) for i in range(2)]
    images[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=images[1:])
    assert names(test_part(tmp_path)) == ["phone.jpg"]


def test_images_smaller_than_a_patch_are_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, height in enumerate((30, 20, 19, 40)):
        write(tmp_path / f"train/{i}.png", texture(height, 30))
    write(tmp_path / "test/small.png", texture(1, 5))
    with caplog.at_level(logging.WARNING, "excite.data"):
        data = load(tmp_path, patch=20)
    assert names(data.train) == ["0.png", "1.png", "3.png"]
    assert names(data.test) == ["small.png"]
    assert "1 of 4 training images" in caplog.text
    assert "2.png (19×30)" in caplog.text
    with pytest.raises(UsageError, match=r"smaller than a patch of 20 pixels: 2\.png \(19×30\)"):
        load(tmp_path, patch=20, broken="refuse")
    with pytest.raises(UsageError, match="4 of 4 training images"):
        load(tmp_path, patch=64)


@pytest.mark.parametrize("memory_limit", [1 << 30, 0])
def test_no_image_is_left(tmp_path: Path, memory_limit: int) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ExciteError, match=r"None of the test images of .* can be read: a\.png \(the file is empty\)"):
        test_part(tmp_path, memory_limit=memory_limit)


# --- sets that do not fit -------------------------------------------------------------------------------------


def test_a_large_set_is_decoded_when_it_is_needed(ten: Path) -> None:
    held, left = load(ten), load(ten, memory_limit=1000)
    assert held.patches == left.patches
    for part in ("train", "test"):
        one, other = getattr(held, part), getattr(left, part)
        assert isinstance(one.images, HeldImages)
        assert isinstance(other.images, FileImages)
        assert [one.size(i) for i in range(len(one))] == [other.size(i) for i in range(len(other))]
        for i in range(len(one)):
            assert all(map(torch.equal, one.pair(i), other.pair(i)))
    size = sum((12 + i) * 20 for i in range(10))
    assert isinstance(test_part(ten, memory_limit=size).images, HeldImages)
    assert isinstance(test_part(ten, memory_limit=size - 1).images, FileImages)
    assert isinstance(test_part(ten, memory_limit=size, channels=3).images, FileImages)


def test_an_image_that_is_gone_since(ten: Path) -> None:
    split = test_part(ten, memory_limit=0)
    (ten / "3.png").unlink()
    write(ten / "4.png", texture(50, 50))
    for name in ("3.png", "4.png"):
        with pytest.raises(ExciteError, match=f"The image {name} cannot be read: .*Mend or remove it"):
            split.clean(split.names.index(name))


def test_progress_counts_all_images(ten: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(ten, val_fraction=0.2, progress=lambda done, count: seen.append((done, count)))
    assert seen == [(i, 10) for i in range(1, 11)]


# --- the whole ------------------------------------------------------------------------------------------------


def test_what_a_network_is_told(ten: Path) -> None:
    for channels in (1, 3):
        data = load(ten, channels=channels, patch=9)
        preprocessing = data.preprocessing
        assert (preprocessing.size, preprocessing.channels) == (9, channels)
        assert (preprocessing.mean, preprocessing.std) == ((0.0,) * channels, (1.0,) * channels)
        assert (data.task, data.classes, data.channels) == ("denoising", (), channels)


def test_an_epoch_covers_each_image_once_at_each_scale(ten: Path) -> None:
    data = load(ten, patch=10, scales=(1, 0.7))
    assert data.train is not None
    sizes = [data.train.size(i) for i in range(len(data.train))]
    scaled = [
        (math.ceil(round(h * s, 6)), math.ceil(round(w * s, 6))) for (h, w), s in itertools.product(sizes, (1, 0.7))
    ]
    area = sum(h * w for h, w in scaled if min(h, w) >= 10)
    assert load(ten, patch=2, scales=(1,)).patches == sum(h * w for h, w in sizes) // 4
    assert data.patches == max(area // 100, 128) == 128
    assert load(ten, patches=7).patches == 7


def test_the_options_load_the_same_again(ten: Path) -> None:
    first = load(ten, val_fraction=0.2, degradation="gaussian:5.0-5,jpeg:5-99", scales=(0.5,), noise_seed=3)
    again = load_denoising(first.name, **first.options)
    assert again.options == first.options
    assert first.options["degradation"] == "gaussian:5,jpeg:5-99"
    for part in ("train", "val", "test"):
        assert getattr(again, part).key() == getattr(first, part).key()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1}, "val_fraction is 1"),
        ({"channels": 2}, "choose 1 for grey images or 3 for colour"),
        ({"patch": 0}, "patch is 0"),
        ({"patches": 1}, "an epoch has at least 2"),
        ({"scales": ()}, "scales is empty"),
        ({"scales": (1, 1.5)}, "scales is 1, 1.5"),
        ({"broken": "mend"}, "choose 'skip' or 'refuse'"),
        ({"degradation": "fog:3"}, "Unknown degradation 'fog'"),
    ],
)
def test_impossible_options(ten: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(ten, **options)


def test_wrong_paths(ten: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    for spec, message in (
        ("denoising:", "names no images to denoise: write 'denoising:PATH' or 'photographs'"),
        ("digits", "names no images to denoise"),
        (f"denoising:{ten}/nowhere", "There is no folder or tar"),
        (f"denoising:{ten}/0.png", "is an image: give the folder that it is in"),
        (f"denoising:{empty}", "holds no images"),
    ):
        with pytest.raises(UsageError, match=message):
            load_denoising(spec)
    (empty / "images.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ExciteError, match="is it a tar"):
        load_denoising(f"denoising:{empty}/images.tar")


# --- photographs ----------------------------------------------------------------------------------------------

OTHER_NAMES = {"motorcycle_left": "stereo_motorcycle", "ihc": "immunohistochemistry"}


@pytest.mark.parametrize("channels", [1, 3])
def test_the_photographs_of_scikit_image(channels: int) -> None:
    skimage_data = pytest.importorskip("skimage.data")
    data = load_denoising("photographs", channels=channels)
    assert data.train is not None
    assert data.test is not None
    assert not set(names(data.train)) & set(names(data.test))
    assert (len(data.train), len(data.test)) == ((8, 4) if channels == 1 else (4, 2))
    for split in (data.train, data.test):
        for i, name in enumerate(split.names):
            stem = Path(name).stem
            picture = getattr(skimage_data, OTHER_NAMES.get(stem, stem))()
            pixels = picture[0] if isinstance(picture, tuple) else picture
            assert split.size(i) == pixels.shape[:2]
            if channels == 3 or pixels.ndim == 2:
                assert np.array_equal(split.images[i].transpose(1, 2, 0).squeeze(), pixels)
    if channels == 3:  # no picture is grey
        for split in (data.train, data.test):
            assert all((split.images[i][0] != split.images[i][1]).mean() > 0.3 for i in range(len(split)))


def test_the_photographs_take_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'excite\[denoising\]'"):
        load_denoising("photographs")
    monkeypatch.undo()
    pytest.importorskip("skimage")
    with pytest.raises(UsageError, match="have their own test images"):
        load_denoising("photographs", test="elsewhere")

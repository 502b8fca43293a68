"""Picture files of every kind: what is read, what is given back, and what is refused."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin
from torchvision.io import ImageReadMode, decode_png

from excite.data import png
from excite.data.images import BrokenImageError
from excite.data.pictures import read_picture, write_picture
from excite.errors import ExciteError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # torchvision's, here another decoder
draw = np.random.default_rng(0)
TURNED = 6  # the orientation of a camera that was held upright


def noise(channels, dtype=np.uint8, height=13, width=21):
    if dtype == np.float32:
        return draw.random((height, width, channels), dtype=np.float32)
    return draw.integers(0, np.iinfo(dtype).max + 1, (height, width, channels)).astype(dtype)


def exif():
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = TURNED
    tags[ExifTags.Base.Make] = "Camera & Sons"
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] = 3200
    return tags


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(samples, depth, colour_type, *more):
    """A PNG written out by hand: samples (H, W·channels), packed into their bits; further chunks as they are."""
    height, across = samples.shape
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    header = struct.pack(">IIBBBBB", across // channels, height, depth, colour_type, 0, 0, 0)
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        places = np.unpackbits(samples.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in places]
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunks_of(path):
    content, at, found = path.read_bytes(), 8, []
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            content[at + 4 : at + 8 + length]
        )
        found.append((kind, content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def again(path):
    """The file read, written with other pixels, and read again: what was written and what came back."""
    picture = read_picture(path)
    white = 1 if picture.pixels.dtype == np.float32 else np.iinfo(picture.pixels.dtype).max
    other = white - picture.pixels
    out = path.with_name("again" + path.suffix)
    assert write_picture(out, picture, other) == out
    back = read_picture(out)
    assert (back.format, back.bits) == (picture.format, picture.bits)
    if picture.alpha is None:
        assert back.alpha is None
    else:
        np.testing.assert_array_equal(back.alpha, picture.alpha)
        assert back.alpha.dtype == picture.pixels.dtype
    return picture, other, back, out


# --- PNG -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize(("depth", "dtype"), [(8, np.uint8), (16, np.uint16)])
def test_png_of_every_type_comes_back_sample_by_sample(tmp_path, colour_type, channels, depth, dtype) -> None:
    samples = noise(channels, dtype)
    (tmp_path / "a.png").write_bytes(png_file(samples.reshape(13, -1), depth, colour_type))
    picture, other, back, out = again(tmp_path / "a.png")
    colours = channels - (channels + 1) % 2
    np.testing.assert_array_equal(picture.pixels, samples[..., :colours])
    if channels > colours:
        np.testing.assert_array_equal(picture.alpha, samples[..., -1])
    np.testing.assert_array_equal(back.pixels, other)
    # Another decoder reads the same from what was written.
    theirs = decode_png(torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    np.testing.assert_array_equal(theirs.numpy().transpose(1, 2, 0)[..., :colours], other)
    assert picture.note is None


def test_what_lies_around_the_pixels_of_a_png_is_carried_over_byte_by_byte(tmp_path) -> None:
    more = [
        chunk(b"gAMA", struct.pack(">I", 45455)),
        chunk(b"iCCP", b"odd profile\0\0" + zlib.compress(b"profile")),
        chunk(b"pHYs", struct.pack(">IIB", 11811, 11811, 1)),
        chunk(b"eXIf", exif().tobytes()[6:]),
        chunk(b"tEXt", b"Author\0someone"),
        chunk(b"bKGD", b"\0\1\0\2\0\3"),
    ]
    dropped = [chunk(b"tIME", b"\x07\xe9\1\1\1\1\1"), chunk(b"sBIT", b"\4\4\4"), chunk(b"prVT", b"?")]
    (tmp_path / "a.png").write_bytes(png_file(noise(3).reshape(13, -1), 8, 2, *more, *dropped, chunk(b"prVt", b"!")))
    _, _, _, out = again(tmp_path / "a.png")
    found = [chunk(*one) for one in chunks_of(out) if one[0] not in (b"IHDR", b"IDAT", b"IEND")]
    assert found == [*more, chunk(b"prVt", b"!")]
    with Image.open(out) as image:
        assert image.getexif()[ExifTags.Base.Orientation] == TURNED
        assert image.size == (21, 13)


@pytest.mark.parametrize("depth", [2, 4])
def test_a_png_of_few_bits_becomes_one_of_eight_and_says_so(tmp_path, depth) -> None:
    samples = draw.integers(0, 2**depth, (13, 20))
    (tmp_path / "a.png").write_bytes(png_file(samples, depth, 0, chunk(b"tRNS", b"\0\2")))
    picture, *_ = again(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.pixels[..., 0], samples * 255 // (2**depth - 1))
    np.testing.assert_array_equal(picture.alpha, np.where(samples == 2, 0, 255))
    assert picture.note == f"its {depth} bits have become 8"


@pytest.mark.parametrize(("depth", "dtype"), [(8, np.uint8), (16, np.uint16)])
def test_a_see_through_colour_becomes_alpha(tmp_path, depth, dtype) -> None:
    samples = noise(3, dtype)
    key = struct.pack(">3H", *samples[4, 5].tolist())
    (tmp_path / "a.png").write_bytes(png_file(samples.reshape(13, -1), depth, 2, chunk(b"tRNS", key)))
    picture, *_ = again(tmp_path / "a.png")
    expected = np.full((13, 21), np.iinfo(dtype).max, dtype)
    expected[4, 5] = 0
    np.testing.assert_array_equal(picture.alpha, expected)
    np.testing.assert_array_equal(picture.pixels, samples)


@pytest.mark.parametrize(("colours", "channels"), [([[9, 9, 9], [250, 250, 250]], 1), ([[9, 9, 9], [1, 2, 3]], 3)])
@pytest.mark.parametrize("see_through", [False, True])
def test_a_palette_becomes_plain_colours_or_grey(tmp_path, colours, channels, see_through) -> None:
    places = draw.integers(0, 2, (13, 21))
    more = [chunk(b"PLTE", np.array(colours, np.uint8).tobytes())]
    if see_through:
        more.append(chunk(b"tRNS", b"\x80\xff"))
    (tmp_path / "a.png").write_bytes(png_file(places, 8, 3, *more))
    picture, other, back, _ = again(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.pixels, np.array(colours)[places][..., :channels])
    np.testing.assert_array_equal(back.pixels, other)
    assert (picture.alpha is not None) == see_through
    assert picture.note == "its palette has become plain colours"
    if see_through:
        np.testing.assert_array_equal(picture.alpha, np.array([128, 255])[places])


def test_rows_are_filtered_so_that_a_photograph_is_as_small_as_elsewhere(tmp_path) -> None:
    ramp = np.add.outer(np.arange(200), np.arange(300))[..., None] // 3 + draw.integers(0, 3, (200, 300, 1))
    photo = np.concatenate((ramp, ramp + 9, ramp // 2), axis=2).astype(np.uint8)
    for pixels in (photo, photo[..., :1]):
        ours, theirs = io.BytesIO(), io.BytesIO()
        png.write(ours, pixels, [])
        Image.fromarray(pixels.squeeze()).save(theirs, "PNG")
        np.testing.assert_array_equal(np.asarray(Image.open(ours)), pixels.squeeze())
        assert len(ours.getvalue()) < 1.03 * len(theirs.getvalue())


def test_a_png_is_compressed_in_blocks_without_a_seam(tmp_path, monkeypatch) -> None:
    pixels = noise(3, np.uint16, 50, 31)
    monkeypatch.setattr(png, "_BLOCK", 1000)
    file = io.BytesIO()
    png.write(file, pixels, [])
    read = decode_png(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    np.testing.assert_array_equal(read.numpy().transpose(1, 2, 0), pixels)


# --- the other formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subsampling", "progressive"), [(0, False), (1, True), (2, False)])
def test_jpeg_keeps_its_subsampling_and_what_the_camera_noted(tmp_path, subsampling, progressive) -> None:
    smooth = np.add.outer(np.arange(40), 3 * np.arange(60)).astype(np.uint8)
    options = {"exif": exif(), "icc_profile": b"profile", "dpi": (72, 72), "comment": b"a comment"}
    Image.fromarray(np.stack((smooth, smooth // 2, 255 - smooth), 2)).save(
        tmp_path / "a.jpg", subsampling=subsampling, progressive=progressive, quality=80, **options
    )
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.pixels.shape == (40, 60, 3)  # not turned
    out = write_picture(tmp_path / "b.jpg", picture)
    from PIL.JpegImagePlugin import get_sampling

    with Image.open(tmp_path / "a.jpg") as first, Image.open(out) as second:
        assert get_sampling(second) == get_sampling(first) == subsampling
        assert second.getexif()[ExifTags.Base.Orientation] == TURNED
        assert second.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 3200
        for key in ("icc_profile", "dpi", "comment", "exif"):
            assert second.info[key] == first.info[key]
        assert ("progressive" in second.info) == progressive
        # Quality 95: the standard's table divided by 10.
        assert second.quantization[0][0] == 2
    assert np.abs(read_picture(out).pixels.astype(int) - picture.pixels).mean() < 1.5


def test_a_grey_jpeg_stays_grey(tmp_path) -> None:
    Image.fromarray(noise(1)[..., 0]).save(tmp_path / "a.jpg")
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.pixels.shape == (13, 21, 1)
    with Image.open(write_picture(tmp_path / "b.jpg", picture)) as image:
        assert image.mode == "L"


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (4, np.uint8), (1, np.uint16)])
def test_tiff_keeps_its_tags_and_its_compression(tmp_path, compression, channels, dtype) -> None:
    samples = noise(channels, dtype)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[274], tags[282], tags[283], tags[296] = "described", TURNED, 300.0, 300.0, 2
    tags.tagtype[33550], tags[33550] = 12, (0.5, 0.5, 0.0)  # GeoTIFF: the size of a pixel
    options = {"compression": compression} if compression else {}
    Image.fromarray(samples.squeeze()).save(tmp_path / "a.tif", tiffinfo=tags, icc_profile=b"profile", **options)
    picture, other, back, out = again(tmp_path / "a.tif")
    colours = channels - (channels + 1) % 2
    np.testing.assert_array_equal(picture.pixels, samples[..., :colours])  # as stored, not turned
    np.testing.assert_array_equal(back.pixels, other)
    if compression != "tiff_lzw":  # which tifffile does not know by itself
        np.testing.assert_array_equal(tifffile.imread(out).reshape(13, 21, -1)[..., :colours], other)
    with Image.open(out) as image:
        assert (image.tag_v2[270], image.tag_v2[274], image.tag_v2[33550]) == ("described", TURNED, (0.5, 0.5, 0.0))
        assert image.info["dpi"] == (300, 300)
        assert image.info["icc_profile"] == b"profile"
        assert image.info["compression"] == (compression or "raw")


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(("channels", "dtype"), [(3, np.uint16), (4, np.uint16), (3, np.float32), (1, np.float32)])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_of_deep_colour_and_of_floats(tmp_path, compression, channels, dtype, planar) -> None:
    samples = noise(channels, dtype)
    stored = np.moveaxis(samples, 2, 0) if planar == "separate" else samples
    tifffile.imwrite(
        tmp_path / "a.tif", stored.squeeze(), compression=compression, metadata=None, software="maker",
        photometric="rgb" if channels > 1 else "minisblack", resolution=(300, 300), resolutionunit=2,
        planarconfig=planar if channels > 1 else None, extrasamples=["unassalpha"] if channels == 4 else None,
        extratags=[(274, 3, 1, TURNED, True), (315, 2, 0, "someone", True)],
    )  # fmt: skip
    picture, other, back, out = again(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture.pixels, samples[..., : channels - (channels == 4)])
    np.testing.assert_array_equal(back.pixels, other)
    with tifffile.TiffFile(out) as file:
        tags = file.pages[0].tags
        assert (tags[274].value, tags[315].value, tags[305].value) == (TURNED, "someone", "maker")
        assert tags[282].value == (300, 1)
        assert (tags[259].value == 1) == (compression is None)


def test_exif_in_a_tiff_is_carried_over(tmp_path) -> None:
    Image.fromarray(noise(3)).save(tmp_path / "a.tif", exif=exif().tobytes())
    with Image.open(again(tmp_path / "a.tif")[3]) as image:
        assert image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] == 3200
        assert image.tag_v2[274] == TURNED


@pytest.mark.parametrize(("form", "suffix", "channels"), [("BMP", ".bmp", 1), ("BMP", ".bmp", 3), ("GIF", ".gif", 1)])
def test_bmp_and_grey_gif(tmp_path, form, suffix, channels) -> None:
    samples = noise(channels)
    Image.fromarray(samples.squeeze()).save(tmp_path / f"a{suffix}", form)
    picture, other, back, _ = again(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(picture.pixels, samples)
    np.testing.assert_array_equal(back.pixels, other)


@pytest.mark.parametrize("channels", [3, 4])
def test_webp_is_written_without_loss_where_it_was(tmp_path, channels) -> None:
    samples = noise(channels)
    Image.fromarray(samples).save(tmp_path / "a.webp", lossless=True, exact=True, exif=exif(), icc_profile=b"profile")
    _, other, back, out = again(tmp_path / "a.webp")
    np.testing.assert_array_equal(back.pixels, other)
    with Image.open(out) as image:
        assert image.getexif()[ExifTags.Base.Orientation] == TURNED
        assert image.info["icc_profile"] == b"profile"
    Image.fromarray(noise(3, height=64, width=64)).save(tmp_path / "b.webp")
    picture = read_picture(tmp_path / "b.webp")
    out = write_picture(tmp_path / "c.webp", picture)
    assert b"VP8L" not in out.read_bytes()[:64]


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (1, np.uint16), (3, np.uint16)])
def test_pgm_and_ppm_of_8_and_16_bits(tmp_path, channels, dtype) -> None:
    samples = noise(channels, dtype)
    magic, white = "P5" if channels == 1 else "P6", np.iinfo(dtype).max
    header = f"{magic}\n# a comment\n21 13\n{white}\n".encode()
    (tmp_path / "a.pnm").write_bytes(header + samples.astype(samples.dtype.newbyteorder(">")).tobytes())
    picture, other, back, _ = again(tmp_path / "a.pnm")
    np.testing.assert_array_equal(picture.pixels, samples)
    np.testing.assert_array_equal(back.pixels, other)


def test_of_a_cameras_file_with_previews_the_picture_is_taken(tmp_path) -> None:
    first, second = (Image.fromarray(noise(3, height=40, width=60)) for _ in range(2))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=95)
    picture = read_picture(tmp_path / "a.jpg")
    assert (picture.format, picture.note) == ("JPEG", "the previews behind the picture have been left out")
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(picture.pixels, np.asarray(image))


# --- refusals ----------------------------------------------------------------------------------------------------


def saved(samples, form, **options):
    file = io.BytesIO()
    Image.fromarray(samples).save(file, form, **options)
    return file.getvalue()


def frames(form, **options):
    file = io.BytesIO()
    first, *others = (Image.fromarray(noise(3)) for _ in range(3))
    first.save(file, form, save_all=True, append_images=others, **options)
    return file.getvalue()


def tiff(samples, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, samples, metadata=None, **options)
    return file.getvalue()


HUGE = png_file(np.zeros((1, 21)), 8, 0).replace(
    struct.pack(">II", 21, 1), struct.pack(">II", 40_000, 40_000)
)  # the checksum of its header is wrong, too
HUGE = HUGE[:29] + struct.pack(">I", zlib.crc32(HUGE[12:29])) + HUGE[33:]
PHOTO = noise(1, height=64, width=64)[..., 0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (b"words", "not a picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that can be read"),
        (frames("GIF"), "it has 3 frames"),
        (frames("WEBP"), "it has 3 frames"),
        (frames("PNG"), "it has 3 frames"),
        (frames("TIFF"), "it has 3 pages"),
        (saved(noise(1)[..., 0] > 99, "PNG"), "one bit a pixel"),
        (saved(noise(1)[..., 0] > 99, "TIFF"), "one bit a pixel"),
        (b"P4\n8 1\n\x0f", "one bit a pixel"),
        (saved(noise(3), "GIF"), "256 colours"),
        (HUGE, "40000 × 40000 pixels are more than the 1,000,000,000 allowed"),
        (saved(PHOTO, "PNG")[:200], "cut off"),
        (saved(PHOTO, "JPEG")[:-200], "cut off"),
        (png_file(noise(3, np.uint16).reshape(13, -1), 16, 2)[:-200], "cut off"),
        (b"P5\n21 13\n65535\n" + bytes(100), "cut off"),
        (b"P5\n2 2\n1023\n" + bytes(8), "its white is 1023"),
        (b"P2\n1 1\n255\n7\n", "kind P2"),
        (tiff(np.full((4, 5), np.nan, np.float32)), "not finite"),
        (tiff(np.full((4, 5), 255, np.float32)), "floats lie between 255 and 255: expected 0 .black. to 1 .white."),
        (tiff(np.zeros((4, 5), np.int32)), "32 bits .signed numbers. has no known white"),
        (tiff(np.zeros((4, 5), np.float64)), "64 bits .floats. has no known white"),
        (tiff(np.zeros((4, 5), np.uint32)), "32 bits"),
        (tiff(noise(4), photometric="separated"), "its colours are CMYK"),
        (tiff(noise(3, np.uint16), photometric="rgb")[:300], "cut off|cannot read it|truncated"),
    ],
)
def test_what_cannot_be_given_back_is_refused(tmp_path, content, sentence) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BrokenImageError, match=sentence) as refused:
        read_picture(tmp_path / "a")
    assert "\n" not in str(refused.value)


def test_cmyk_jpeg_and_missing_files(tmp_path) -> None:
    Image.fromarray(noise(4), "CMYK").save(tmp_path / "a.jpg")
    with pytest.raises(BrokenImageError, match="its colours are CMYK"):
        read_picture(tmp_path / "a.jpg")
    with pytest.raises(BrokenImageError, match="No such file"):
        read_picture(tmp_path / "none.png")


def test_pillows_own_bound_is_lifted_and_put_back(tmp_path, monkeypatch) -> None:
    Image.fromarray(noise(1)[..., 0]).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_picture(tmp_path / "a.png").pixels.shape == (13, 21, 1)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")


def test_without_tifffile_deep_colour_names_the_package(tmp_path, monkeypatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(3, np.uint16), photometric="rgb")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BrokenImageError, match=r"pip install 'excite\[denoising\]'"):
        read_picture(tmp_path / "a.tif")


def test_other_pixels_must_have_the_same_shape_and_type(tmp_path) -> None:
    info = PngImagePlugin.PngInfo()
    Image.fromarray(noise(3)).save(tmp_path / "a.png", pnginfo=info)
    picture = read_picture(tmp_path / "a.png")
    for wrong in (picture.pixels[1:], picture.pixels.astype(np.uint16), picture.pixels[..., :1]):
        with pytest.raises(UsageError, match=r"is to hold uint8 \(13, 21, 3\)"):
            write_picture(tmp_path / "b.png", picture, wrong)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExciteError, match="Cannot write"):
        write_picture(tmp_path / "file" / "b.png", picture)
    assert not (tmp_path / "b.png").exists()

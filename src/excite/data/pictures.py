"""Picture files whose pixels change and nothing else: read them, and write others of the same format.

Format, bit depth, alpha, EXIF with its orientation, colour profile, resolution and texts stay as they were. The
pixels are those that the file holds: the orientation noted by the camera is not applied, since it is noted again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from excite.data import png, tiff
from excite.data.images import BrokenImageError
from excite.errors import UsageError
from excite.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[Any]

MAX_PIXELS = 1_000_000_000
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM", "GIF")
JPEG_QUALITY = 95
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True, eq=False)
class Picture:
    """What a picture file holds.

    Attributes:
        pixels: uint8, uint16 or float32 (0 … 1), (H, W, C): C = 1 for grey, 3 for colour; as stored, not turned.
        alpha: of the same type, (H, W); None where nothing is see-through.
        format: ``PNG``, ``JPEG``, ``TIFF``, ``BMP``, ``WEBP``, ``PPM`` or ``GIF``.
        kept: what its writer puts around the pixels.
        note: what :func:`write_picture` will not write as it was, in a sentence; None for nothing.
        orientation: how the pixels are to be turned to be looked at, as EXIF has it, 1 … 8.
    """

    pixels: Pixels
    alpha: Pixels | None
    format: str
    kept: dict[str, Any] = field(default_factory=dict, repr=False)
    note: str | None = None
    orientation: int = 1

    @property
    def bits(self) -> int:
        """Of a sample: 8, 16, or 32 (floats)."""
        return 8 * self.pixels.dtype.itemsize


def read_picture(path: str | Path) -> Picture:
    """Read a picture file.

    A palette becomes grey or colour, fewer than 8 bits become 8, and of a camera's file with previews behind the
    picture (MPO) the picture is read.

    Raises:
        BrokenImageError: the file is empty, cut off, no picture, or one that cannot be given back as it was: several
            frames, one bit a pixel, print colours, numbers without a known white, more than ``MAX_PIXELS`` pixels.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise BrokenImageError("the file is empty")
        # From an open file: Pillow 13 mixes up the rows of an uncompressed TIFF that is turned and lies under a path.
        with _of_any_size(), open(path, "rb") as file:
            return _read(path, file)
    except BrokenImageError:
        raise
    except OSError as error:
        raise BrokenImageError(_reason(error)) from error
    except Exception as error:  # decoders raise nearly anything on bad input
        raise BrokenImageError(_reason(error)) from error


def write_picture(path: str | Path, picture: Picture, pixels: Pixels | None = None) -> Path:
    """Write a picture file like the one that was read, with other pixels; atomically.

    JPEG is written at quality 95 with the original's chroma subsampling, WebP without loss where it was without.

    Args:
        path: the file.
        picture: what was read.
        pixels: of the shape and type of ``picture.pixels``; by default those.

    Raises:
        UsageError: another shape or type.
        ExciteError: the file cannot be written; what was there is untouched.
    """
    pixels = picture.pixels if pixels is None else pixels
    if pixels.shape != picture.pixels.shape or pixels.dtype != picture.pixels.dtype:
        raise UsageError(
            f"{path} is to hold {picture.pixels.dtype} {picture.pixels.shape}, as was read, not {pixels.dtype} "
            f"{pixels.shape}."
        )
    if picture.alpha is not None:
        pixels = np.concatenate((pixels, picture.alpha[..., None]), axis=2)
    writer = _WRITERS[picture.format]
    return write_atomically(path, lambda file: writer(file, pixels, picture.kept))


# --- reading -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _of_any_size() -> Iterator[None]:
    """Lift Pillow's own bound, for which a large photograph is an attack: ours is checked in its place."""
    from PIL import Image

    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def _read(path: Path, file: IO[bytes]) -> Picture:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        if file.read(4) in tiff.MAGIC:  # of a kind that Pillow does not know
            return _read_tiff(path, None)
        expected = "expected PNG, JPEG, TIFF, BMP, WebP, PGM or PPM"
        raise BrokenImageError(f"not a picture that can be read: {expected}") from None
    if image.width * image.height > MAX_PIXELS:
        raise BrokenImageError(f"{image.width} × {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
    form = str(image.format)
    frames = int(getattr(image, "n_frames", 1))
    if frames > 1 and form != "MPO":
        what = "pages" if form == "TIFF" else "frames"
        raise BrokenImageError(f"it has {frames} {what}, and only single pictures are read: save each by itself")
    if image.mode == "1":
        raise BrokenImageError("it is black and white, one bit a pixel: there are no shades to change")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "P", "PA", "I", "F", *_DEEP):
        raise BrokenImageError(f"its colours are {image.mode}: expected grey or RGB")
    orientation = image.getexif().get(tiff.ORIENTATION, 1)  # before the pixels are read: a TIFF then loses it
    picture = _READERS[form](path, image)
    return replace(picture, orientation=orientation if orientation in range(1, 9) else 1)


def _read_png(path: Path, image: Image.Image) -> Picture:
    header, chunks = png.read_chunks(path)
    depth = header.depth
    # Of what is deeper than 8 bits, Pillow reads grey without alpha only.
    samples = png.read_deep(path) if depth == 16 else _samples(image)
    if header.colour_type == png.PALETTE:
        depth = 8
    elif (key := png.colour_key(header, chunks)) is not None:
        # Shades of fewer bits are spread over 8.
        wanted = np.array(key) * (255 // (2**depth - 1) if depth < 8 else 1)
        opaque = (samples != wanted.astype(samples.dtype)).any(2, keepdims=True)
        samples = np.concatenate((samples, opaque * samples.dtype.type(2 ** max(depth, 8) - 1)), axis=2)
    pixels, alpha = _apart(samples)
    note = None
    if header.colour_type == png.PALETTE:
        note = "its palette has become plain colours"
    elif depth < 8:
        note = f"its {depth} bits have become 8"
    kept = {"chunks": png.carried(header, chunks, pixels.shape[2], alpha is not None)}
    return Picture(pixels, alpha, "PNG", kept, note)


def _read_jpeg(path: Path, image: Image.Image) -> Picture:
    from PIL import JpegImagePlugin

    note = None
    if image.format == "MPO":
        note = "the previews behind the picture have been left out"
    kept = _common(image)
    if image.mode == "RGB":
        sampling = JpegImagePlugin.get_sampling(image)
        kept["subsampling"] = max(sampling, 0)  # one that Pillow has no name for: none
    kept["progressive"] = bool(image.info.get("progressive"))
    if comment := image.info.get("comment"):
        kept["comment"] = comment
    return Picture(_samples(image), None, "JPEG", kept, note)


def _read_tiff(path: Path, image: Image.Image | None) -> Picture:
    note = None
    if image is not None and image.mode in ("P", "PA"):
        kept, samples = tiff.kept_of(image), _samples(image)
        note = "its palette has become plain colours"
    else:
        samples, kept = tiff.read(path, image)
    if samples.dtype == np.float32:
        _check_floats(samples)
    if kept["compression"] == "jpeg":
        note = "it was compressed with loss, and is now without"
    elif kept["groups"] and samples.dtype != np.uint8 and samples.shape[2] > 1:
        note = "its EXIF tags have been left out, all but the orientation and the like"
    return Picture(*_apart(samples), "TIFF", kept, note)


def _read_webp(path: Path, image: Image.Image) -> Picture:
    with open(path, "rb") as file:
        lossless = b"VP8L" in file.read(4096)
    kept = _common(image) | {"lossless": True, "exact": True} if lossless else _common(image) | {"quality": 95}
    return Picture(*_apart(_samples(image)), "WEBP", kept)


def _read_ppm(path: Path, image: Image.Image) -> Picture:
    with open(path, "rb") as file:
        magic, head = file.read(2), file.read(4096)
    if magic not in (b"P5", b"P6"):
        raise BrokenImageError(f"it is of the kind {magic.decode(errors='replace')}: expected P5 (PGM) or P6 (PPM)")
    white, start = _header_of_ppm(head)
    if white == 255:
        return Picture(_samples(image), None, "PPM")
    if white != 65535:
        raise BrokenImageError(f"its white is {white}: expected 255 or 65535")
    channels = 1 if magic == b"P5" else 3
    count = image.width * image.height * channels
    values = np.fromfile(path, ">u2", count, offset=2 + start)
    if len(values) < count:
        raise BrokenImageError("the file is cut off")
    return Picture(values.astype(np.uint16).reshape(image.height, image.width, channels), None, "PPM")


def _header_of_ppm(head: bytes) -> tuple[int, int]:
    """White, and where the pixels begin: after width, height, white and a single blank; ``#`` begins a comment."""
    words: list[bytes] = []
    at = 0
    while len(words) < 3:
        while head[at : at + 1].isspace() or head[at : at + 1] == b"#":
            at = head.index(b"\n", at) + 1 if head[at : at + 1] == b"#" else at + 1
        end = at
        while head[end : end + 1].isdigit():
            end += 1
        words.append(head[at:end])
        at = end
        if not words[-1]:
            raise BrokenImageError("its header is damaged")
    return int(words[2]), at + 1


def _read_bmp(path: Path, image: Image.Image) -> Picture:
    samples = _samples(image)
    if samples.shape[2] in (2, 4):
        raise BrokenImageError("it is a BMP with alpha, which is read differently everywhere: save it as PNG")
    kept = {"dpi": image.info["dpi"]} if "dpi" in image.info else {}
    return Picture(samples, None, "BMP", kept, "its palette has become plain colours" if image.mode == "P" else None)


def _read_gif(path: Path, image: Image.Image) -> Picture:
    samples = _samples(image)
    if samples.shape[2] != 1:
        raise BrokenImageError("a GIF holds 256 colours, too few for what comes of it: save it as PNG")
    return Picture(samples, None, "GIF")


def _samples(image: Image.Image) -> Pixels:
    """8 bits as Pillow reads them, a palette in plain colours (grey where it is grey): uint8 (H, W, 1 … 4)."""
    if image.mode in ("P", "PA"):
        see_through = image.mode == "PA" or "transparency" in image.info
        pixels = np.asarray(image.convert("RGBA" if see_through else "RGB"))
        if (pixels[..., :1] == pixels[..., 1:3]).all():
            pixels = pixels[..., [0, 3] if see_through else [0]]
        return pixels
    if image.mode in ("I", "F", *_DEEP):
        raise BrokenImageError(f"pixels of mode {image.mode!r} have no known white: save 8 bits")
    pixels = tiff.array_of(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _apart(samples: Pixels) -> tuple[Pixels, Pixels | None]:
    """Pixels and alpha, which is the last of 2 or 4."""
    if samples.shape[2] in (1, 3):
        return samples, None
    if samples.shape[2] > 4:
        raise BrokenImageError(f"it has {samples.shape[2]} channels: expected grey or RGB")
    return samples[..., :-1], samples[..., -1]


def _common(image: Image.Image) -> dict[str, Any]:
    """What Pillow writes as it was read."""
    return {key: image.info[key] for key in ("exif", "icc_profile", "dpi", "xmp") if image.info.get(key)}


def _check_floats(samples: Pixels) -> None:
    low, high = float(samples.min()), float(samples.max())
    if not np.isfinite(low + high):
        raise BrokenImageError("some of its values are not finite numbers")
    if low < 0 or high > 1:
        raise BrokenImageError(f"its floats lie between {low:.6g} and {high:.6g}: expected 0 (black) to 1 (white)")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if "truncated" in str(error).lower():
        return "the file is cut off or damaged"
    return text[0] if text else type(error).__name__


# --- writing -------------------------------------------------------------------------------------------------------

Writer = Callable[[IO[bytes], Pixels, dict[str, Any]], object]


def _write_png(file: IO[bytes], pixels: Pixels, kept: dict[str, Any]) -> None:
    png.write(file, pixels, kept["chunks"])


def _write_ppm(file: IO[bytes], pixels: Pixels, kept: dict[str, Any]) -> None:
    height, width, channels = pixels.shape
    white = 255 if pixels.dtype == np.uint8 else 65535
    file.write(f"{'P5' if channels == 1 else 'P6'}\n{width} {height}\n{white}\n".encode())
    for top in range(0, height, 256):
        file.write(pixels[top : top + 256].astype(pixels.dtype.newbyteorder(">")).tobytes())


def _by_pillow(form: str, **more: Any) -> Writer:
    def write(file: IO[bytes], pixels: Pixels, kept: dict[str, Any]) -> None:
        from PIL import Image

        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
        image.save(file, form, **more, **kept)

    return write


_READERS: dict[str, Callable[[Path, Any], Picture]] = {
    "PNG": _read_png,
    "JPEG": _read_jpeg,
    "MPO": _read_jpeg,
    "TIFF": _read_tiff,
    "WEBP": _read_webp,
    "PPM": _read_ppm,
    "BMP": _read_bmp,
    "GIF": _read_gif,
}
_WRITERS: dict[str, Writer] = {
    "PNG": _write_png,
    "JPEG": _by_pillow("JPEG", quality=JPEG_QUALITY),
    "TIFF": tiff.write,
    "WEBP": _by_pillow("WEBP"),
    "PPM": _write_ppm,
    "BMP": _by_pillow("BMP"),
    "GIF": _by_pillow("GIF"),
}

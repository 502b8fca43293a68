from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from excite.data.degrade import Change, Degradation, Keyed, keyed, named, quantise
from excite.errors import UsageError


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(height: int, width: int, channels: int = 1) -> torch.Tensor:
    """Waves and an edge, at 8-bit levels."""
    y, x = np.mgrid[:height, :width]
    planes = [
        0.5 + 0.25 * np.sin(x / (3 + c)) * np.cos(y / 5) + 0.2 * (x > width / 2) - 0.1 * c for c in range(channels)
    ]
    return torch.from_numpy((np.rint(np.stack(planes) * 255) / 255).astype(np.float32))


# --- what is asked for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("gaussian:25", "gaussian:25"),
        ("gaussian:25.0-25", "gaussian:25"),
        ("gaussian:0-55", "gaussian:0-55"),
        ("poisson:0.5-1000000", "poisson:0.5-1000000"),
        ("jpeg:5-99", "jpeg:5-99"),
        (" gaussian : 0 - 55 , jpeg:5-99,bicubic:2 - 4", "gaussian:0-55,jpeg:5-99,bicubic:2-4"),
    ],
)
def test_a_degradation_reads_what_it_writes(text: str, canonical: str) -> None:
    degradation = Degradation.parse(text)
    assert str(degradation) == canonical
    assert Degradation.parse(canonical) == degradation


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("gaussian:25", (25, 25)),
        ("gaussian:0-55", (0, 55)),
        ("gaussian:15,gaussian:25-50", (15, 50)),
        ("gaussian:0-55,jpeg:5-99", None),
        ("poisson:30", None),
    ],
)
def test_levels_of_gaussian_noise(text: str, levels: tuple[float, float] | None) -> None:
    assert Degradation.parse(text).gaussian_levels == levels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gausian:25", "Unknown degradation 'gausian' in 'gausian:25': did you mean 'gaussian'"),
        ("", "known are gaussian, poisson, jpeg, bicubic"),
        ("gaussian", "has no strength that is a number or a range: after the colon comes σ"),
        ("gaussian:", "has no strength"),
        ("gaussian:much", "such as 'gaussian:25'"),
        ("gaussian:-5", "has no strength"),
        ("gaussian:nan", "has no strength"),
        ("gaussian:5-inf", "has no strength"),
        ("gaussian:0", "leaves every image as it is"),
        ("gaussian:300", "out of bounds: its strength is σ on the scale of 0 … 255, 0 … 255"),
        ("gaussian:50-15", "upside down"),
        ("poisson:0-30", "out of bounds: its strength is the number of photons at white"),
        ("jpeg:7.5", "whole numbers"),
        ("jpeg:0-99", "1 … 100"),
        ("bicubic:1", "2 … 16"),
        ("gaussian:25,", "Unknown degradation ''"),
    ],
)
def test_what_is_no_degradation(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Degradation.parse(text)
    assert message in str(caught.value)


# --- which strength -------------------------------------------------------------------------------------------


def test_noise_levels_are_drawn_uniformly() -> None:
    drawn = [Degradation.parse("gaussian:10-55").draw(generator(i)).strength for i in range(2000)]
    assert stats.kstest(drawn, stats.uniform(10, 45).cdf).pvalue > 0.01


@pytest.mark.parametrize(("text", "values"), [("jpeg:90-99", range(90, 100)), ("bicubic:2-4", range(2, 5))])
def test_whole_strengths_are_drawn_alike_with_both_ends(text: str, values: range) -> None:
    drawn = [Degradation.parse(text).draw(generator(i)).strength for i in range(2000)]
    found, counts = np.unique(drawn, return_counts=True)
    assert found.tolist() == list(values)
    assert stats.chisquare(counts).pvalue > 0.01


def test_kinds_are_drawn_alike() -> None:
    degradation = Degradation.parse("gaussian:25,jpeg:5-99,bicubic:2-4")
    kinds = [degradation.draw(generator(i)).kind for i in range(1500)]
    found, counts = np.unique(kinds, return_counts=True)
    assert set(found) == {"gaussian", "jpeg", "bicubic"}
    assert stats.chisquare(counts).pvalue > 0.01


# --- noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_gaussian_noise_is_normal_and_white_and_of_its_level(sigma: float) -> None:
    clean = torch.rand(3, 400, 400, generator=torch.Generator().manual_seed(0))
    noisy = Degradation.parse(f"gaussian:{sigma}").apply(clean, generator())
    assert noisy.dtype == torch.float32
    assert noisy.shape == clean.shape
    noise = 255 * (noisy - clean).double().numpy()
    assert noise.std() == pytest.approx(sigma, rel=0.01)
    assert abs(noise.mean()) < 4 * sigma / math.sqrt(noise.size)
    assert stats.kstest(noise.ravel()[::7], stats.norm(0, sigma).cdf).pvalue > 0.01
    pixels, white = noise / sigma, 4 / math.sqrt(noise.size)
    assert abs((pixels[:, :, 1:] * pixels[:, :, :-1]).mean()) < white
    assert abs((pixels[:, 1:] * pixels[:, :-1]).mean()) < white
    assert abs((pixels[0] * pixels[1]).mean()) < 2 * white


def test_noise_is_neither_clipped_nor_rounded() -> None:
    clean = torch.cat([torch.zeros(1, 64, 64), torch.ones(1, 64, 64)])
    noisy = Degradation.parse("gaussian:25").apply(clean, generator())
    assert 0.4 < (noisy[0] < 0).float().mean() < 0.6
    assert 0.4 < (noisy[1] > 1).float().mean() < 0.6
    assert len(torch.unique(noisy)) > 8000


def test_the_clean_image_stays_as_it_is() -> None:
    clean = picture(40, 48, 3)
    before = clean.clone()
    for text in ("gaussian:25", "poisson:30", "jpeg:10", "bicubic:3"):
        degraded = Degradation.parse(text).apply(clean, generator())
        assert degraded.dtype == torch.float32
        assert not torch.equal(degraded, clean)
        degraded.zero_()
        assert torch.equal(clean, before)


@pytest.mark.parametrize("level", [0.05, 0.5, 1.0])
def test_photons_are_counted(level: float) -> None:
    peak, size = 30, 200 * 200
    noisy = Degradation.parse(f"poisson:{peak}").apply(torch.full((1, 200, 200), level), generator(1))
    photons = noisy.double().numpy().ravel() * peak
    counts = np.rint(photons).astype(int)
    np.testing.assert_allclose(photons, counts, atol=1e-4)
    expected = stats.poisson(peak * level)
    spread = math.sqrt(peak * level / size)
    assert noisy.mean() == pytest.approx(level, abs=4 * spread / peak)
    assert noisy.double().var() == pytest.approx(level / peak, rel=0.05)
    values = np.arange(expected.ppf(0.001), expected.ppf(0.999))
    seen = np.array([(counts == value).sum() for value in values])
    wanted = expected.pmf(values)
    assert stats.chisquare(seen, wanted / wanted.sum() * seen.sum()).pvalue > 0.001


# --- compression and resolution -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [5, 60])
def test_jpeg_is_what_pillow_writes(channels: int, quality: int) -> None:
    clean = picture(45, 70, channels)
    stored = (clean * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(stored.squeeze()).save(buffer, format="JPEG", quality=quality)
    expected = torch.from_numpy(np.array(Image.open(buffer))).reshape(45, 70, channels).permute(2, 0, 1) / 255
    degraded = Degradation.parse(f"jpeg:{quality}").apply(clean, generator())
    torch.testing.assert_close(degraded, expected, rtol=0, atol=1e-7)


def test_jpeg_takes_values_out_of_range() -> None:
    clean = torch.tensor([-0.5, 1.5]).view(1, 1, 2).repeat(1, 8, 8)
    degraded = Degradation.parse("jpeg:100").apply(clean, generator())
    torch.testing.assert_close(degraded, clean.clamp(0, 1), rtol=0, atol=0.02)


def test_jpeg_of_five_channels() -> None:
    with pytest.raises(UsageError, match="1 or 3 channels, not 5"):
        Degradation.parse("jpeg:10").apply(torch.rand(5, 16, 16), generator())


def cubic(inputs: int, outputs: int) -> np.ndarray:
    """Keys' cubic (a = −1/2) as a matrix (outputs, inputs), widened where an image becomes smaller."""
    scale = max(inputs / outputs, 1)
    centres = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    t = np.abs(centres[:, None] - np.arange(inputs)) / scale
    weights = np.where(t <= 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_loss_of_resolution_by_its_matrices(factor: int) -> None:
    clean = picture(50, 61)
    small = math.ceil(50 / factor), math.ceil(61 / factor)
    image = clean[0].double().numpy() * 255
    for before, after in (((50, 61), small), (small, (50, 61))):
        image = cubic(before[0], after[0]) @ image @ cubic(before[1], after[1]).T
        image = np.clip(np.rint(image), 0, 255)
    degraded = 255 * Degradation.parse(f"bicubic:{factor}").apply(clean, generator())[0].double().numpy()
    np.testing.assert_allclose(degraded, np.rint(degraded), atol=1e-4)
    # A value in the middle of two levels may be rounded either way.
    assert np.abs(degraded - image).max() < 1.001
    assert (np.abs(degraded - image) > 0.5).mean() < 0.01
    assert np.abs(degraded - clean[0].numpy() * 255).max() > 5


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2)])
def test_tiny_images(shape: tuple[int, int]) -> None:
    for text in ("gaussian:25", "poisson:30", "jpeg:10", "bicubic:16"):
        assert Degradation.parse(text).apply(torch.rand(1, *shape), generator()).shape == (1, *shape)


@pytest.mark.parametrize(
    ("change", "channels"), [(Change("jpeg", 10), 1), (Change("jpeg", 10), 3), (Change("bicubic", 3), 1)]
)
def test_what_surrounds_a_patch_is_enough(change: Change, channels: int) -> None:
    clean = picture(144, 144, channels).numpy()
    whole = change.apply(clean, generator())
    margin, period = change.surroundings(channels)
    # A window that begins with a period, with the margin around what is compared.
    first, last = 2 * period, 2 * period + 3 * period + 4 * margin
    part = change.apply(np.ascontiguousarray(clean[:, first:last, first:last]), generator())
    inside = (
        slice(margin, last - first - margin) if channels == 1 else slice(2, -2)
    )  # colours are smoothed in between
    expected = whole[:, first:last, first:last][:, inside, inside]
    assert np.abs(part[:, inside, inside] - expected).max() < 1.5 / 255


# --- what it depends on ---------------------------------------------------------------------------------------


def test_an_image_is_degraded_by_its_name_and_the_seed_alone() -> None:
    clean = picture(32, 32)
    degradation = Degradation.parse("gaussian:0-55,jpeg:5-99")

    def of(name: str, seed: int) -> torch.Tensor:
        return degradation.apply(clean, named(name, seed))

    assert torch.equal(of("a.png", 0), of("a.png", 0))
    others = [of("b.png", 0), of("a.png", 1), of("sub/a.png", 0)]
    assert not any(torch.equal(of("a.png", 0), other) for other in others)


def test_one_generator_for_many_keys() -> None:
    many, keys = Keyed(), np.random.default_rng(0).integers(0, 2**64, (5, 2), dtype=np.uint64)
    for key in keys:
        alone, shared = keyed(key), many(key)
        for size in (3, 1, 7):  # an odd number of 32-bit draws leaves half of a 64-bit one over
            expected = alone.standard_normal(size, dtype=np.float32)
            assert np.array_equal(shared.standard_normal(size, dtype=np.float32), expected)
            assert shared.integers(100) == alone.integers(100)
            assert shared.uniform() == alone.uniform()


def test_quantised_as_a_file_would_hold_it() -> None:
    image = torch.tensor([[[-0.3, 0.0, 0.4999 / 255, 0.5001 / 255, 0.7, 1.0, 1.2]]])
    before = image.clone()
    levels = quantise(image) * 255
    torch.testing.assert_close(levels, torch.tensor([[[0.0, 0, 0, 1, 178, 255, 255]]]))
    assert torch.equal(image, before)
    eight_bit = torch.arange(256) / 255
    assert torch.equal(quantise(eight_bit), eight_bit)

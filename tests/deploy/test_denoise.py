"""A denoising network strip by strip against the same network on the whole image at once."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from excite.create import create
from excite.deploy import convolve, strips, winograd
from excite.deploy import denoise as module
from excite.deploy.denoise import Denoiser, denoise
from excite.errors import ExciteError, UsageError

SMALL = "dncnn_s:depth=6,channels=8"


def trained(spec, channels=None, scale=1.0):
    """With batch norms that have seen something, so that merging them matters, and an answer of the size of noise."""
    torch.manual_seed(0)
    network = create(spec, in_channels=channels)
    for child in network.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.3)
            child.running_var.uniform_(0.5, 2)
            nn.init.normal_(child.weight, 1, 0.2)
            nn.init.normal_(child.bias, 0, 0.2)
        elif isinstance(child, nn.Conv2d) and child.bias is not None:
            nn.init.normal_(child.bias, 0, 0.1)
    last = [child for child in network.children() if isinstance(child, nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight.mul_(0.02 * scale)
    return network.eval()


def whole(network, image):
    """The network on the image at once, in double precision, clipped."""
    with torch.no_grad():
        answer = network.double()(torch.as_tensor(image, dtype=torch.float64)[None])[0]
    network.float()
    return answer.clamp(0, 1).numpy()


def noisy(channels, height, width, seed=0):
    return np.random.default_rng(seed).uniform(-0.1, 1.1, (channels, height, width)).astype(np.float32)


# --- the same as at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 9), (50, 61)])
@pytest.mark.parametrize("strip", [1, 300, 1 << 20])
@pytest.mark.parametrize("tile", [None, 13, 40])
def test_strips_and_tiles_of_any_size(monkeypatch, size, strip, tile) -> None:
    monkeypatch.setattr(module, "STRIP", dict.fromkeys(module.STRIP, strip))
    network, image = trained(SMALL), noisy(1, *size)
    found = denoise(network, image, tile=tile)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, whole(network, image), atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "channels"),
    [
        ("dncnn_s:depth=4,channels=6,kernel=5", 1),
        ("dncnn_s:depth=4,channels=6,kernel=1", 1),
        ("dncnn_s:depth=5,channels=6,norm=none", 1),
        ("dncnn_s:depth=5,channels=6,residual=false", 1),
        ("dncnn_color:depth=4,channels=6", 3),
        ("dncnn_s:depth=3,channels=6", 3),
        ("dncnn_s:depth=5,channels=1", 1),
        ("dncnn_s:depth=5,channels=32", 1),
        ("dncnn_color:depth=4,channels=40", 3),
    ],
)
def test_networks_of_every_form(monkeypatch, spec, channels) -> None:
    monkeypatch.setattr(module, "STRIP", dict.fromkeys(module.STRIP, 400))
    network = trained(spec, channels, scale=20 if "residual" in spec else 1)
    image = noisy(channels, 45, 52)
    np.testing.assert_allclose(denoise(network, image, tile=40), whole(network, image), atol=2e-6)


@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 50])
@pytest.mark.parametrize("strip", [1, 5 * 33, 16 * 33, 1 << 20])
def test_rows_by_fours_whatever_the_height(monkeypatch, height, strip) -> None:
    """With many channels four rows are found at once; what is left over is found one by one, at the end only."""
    monkeypatch.setattr(module, "STRIP", dict.fromkeys(module.STRIP, strip))
    network, image = trained("dncnn_s:depth=4,channels=32"), noisy(1, height, 33)
    assert len(Denoiser(network)._layers[1].kernels) == 6
    np.testing.assert_allclose(denoise(network, image), whole(network, image), atol=2e-6)


@pytest.mark.parametrize("count", [4, 8, 20])
def test_a_convolution_with_half_of_the_multiplications(count) -> None:
    convolution = nn.Conv2d(32, 48, 3, padding=(0, 1))
    assert winograd.pays(convolution)
    torch.manual_seed(count)
    rows = torch.randn(1, 32, count + 2, 21).contiguous(memory_format=torch.channels_last)
    out = torch.empty(1, 48, count, 21).contiguous(memory_format=torch.channels_last)
    kernels = winograd.combined_kernels(convolution.weight)
    assert sum(kernel.numel() for kernel in kernels) == 2 * convolution.weight.numel()  # for four rows, not for one
    with torch.no_grad():
        winograd.convolve(rows, kernels, convolution.bias, out)
        expected = convolution.double()(rows.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_where_it_does_not_pay() -> None:
    for other in (
        nn.Conv2d(64, 64, 5),
        nn.Conv2d(64, 1, 3),
        nn.Conv2d(64, 64, 3, groups=2),
        nn.Conv2d(64, 64, 3, dilation=2),
    ):
        assert not winograd.pays(other)
    assert not winograd.pays(nn.Conv2d(64, 64, 3).bfloat16())


@pytest.mark.parametrize(("channels", "most"), [(8, 10 + 6), (32, 10 + 6 + 4 * 3)])
def test_no_row_is_computed_twice_and_none_is_kept(monkeypatch, channels, most) -> None:
    rows = []
    answer_of = strips._answer

    def counted(layer, given, spare):
        answer = answer_of(layer, given, spare)
        rows.append((id(layer), answer.shape[2] - 2 * spare))
        return answer

    monkeypatch.setattr(strips, "_answer", counted)
    monkeypatch.setattr(module, "STRIP", dict.fromkeys(module.STRIP, 10 * 30))
    denoise(trained(f"dncnn_s:depth=6,channels={channels}"), noisy(1, 203, 30))
    assert len(rows) > 100
    for layer in {layer for layer, _ in rows}:
        assert sum(count for one, count in rows if one == layer) == 203
    # No more rows at a time than a strip has, and at the end those that every convolution before has lagged behind.
    assert max(count for _, count in rows) <= most


def test_an_image_in_memory_is_read_where_it_lies_and_in_parts(tmp_path) -> None:
    stored = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.uint8, shape=(60, 70, 1))
    stored[...] = np.random.default_rng(0).integers(0, 256, stored.shape)
    stored.flush()
    read = np.load(tmp_path / "a.npy", mmap_mode="r").transpose(2, 0, 1)
    network, out = trained(SMALL), np.empty((60, 70, 1), np.uint8)
    assert Denoiser(network)(read, out=out.transpose(2, 0, 1)).base is not None
    expected = np.rint(255 * whole(network, read / 255)).astype(int)
    assert np.abs(out.transpose(2, 0, 1) - expected).max() <= 1  # where float rounding decides a half
    assert (out.transpose(2, 0, 1) == expected).mean() > 0.999


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float64, 1)])
def test_types_of_pixels(dtype, white) -> None:
    image = (noisy(1, 30, 31).clip(0, 1) * white).astype(dtype)
    network = trained(SMALL)
    np.testing.assert_allclose(denoise(network, image), whole(network, image / white), atol=1e-6)
    out = Denoiser(network)(image, out=np.empty_like(image))
    assert out.dtype == dtype
    np.testing.assert_allclose(out / white, whole(network, image / white), atol=0.51 / white + 1e-6)


def test_what_is_beyond_the_range_is_clipped() -> None:
    network, image = trained(SMALL, scale=50), noisy(1, 30, 31)
    with torch.no_grad():
        raw = network(torch.from_numpy(image)[None])[0]
    assert raw.min() < 0
    assert raw.max() > 1
    found = denoise(network, torch.from_numpy(image))
    assert (found.min(), found.max()) == (0, 1)
    np.testing.assert_allclose(found, raw.clamp(0, 1).numpy(), atol=1e-5)


def test_the_network_stays_as_it_was_and_progress_ends_at_all_pixels(monkeypatch) -> None:
    monkeypatch.setattr(module, "STRIP", dict.fromkeys(module.STRIP, 100))
    network = trained(SMALL).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen = []
    for precision in ("fp32", "bf16"):
        seen.clear()
        denoise(network, noisy(1, 40, 50), tile=20, precision=precision, progress=lambda *at: seen.append(at))
        assert seen == sorted(seen)
        assert seen[-1] == (2000, 2000)
        assert len(seen) > 5
    assert network.training
    for name, value in network.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


# --- bf16 ----------------------------------------------------------------------------------------------------------


def psnr(image, clean):
    return -10 * np.log10(np.mean((image - clean) ** 2, dtype=np.float64))


def set12(shared_data):
    with tarfile.open(shared_data / "denoising-images.tar") as tar:
        for number in ("01", "02", "03"):
            with Image.open(tar.extractfile(f"Set12/{number}.png")) as image:
                yield np.asarray(image)[None, 80:176, 80:176].astype(np.float32) / 255


def test_published_weights_lose_less_than_a_hundredth_of_a_decibel_in_bf16(shared_data) -> None:
    pytest.importorskip("h5py")
    network = create("dncnn_s", weights=shared_data / "dncnn-weights" / "matconvnet-sigma25.mat")
    network.eval()
    full, half = Denoiser(network), Denoiser(network, precision="bf16")
    lost, gained = [], []
    for number, clean in enumerate(set12(shared_data)):
        image = clean + np.random.default_rng(number).normal(0, 25 / 255, clean.shape).astype(np.float32)
        found = full(image)
        with torch.no_grad():
            at_once = network(torch.from_numpy(image)[None])[0].clamp(0, 1).numpy()
        np.testing.assert_allclose(found, at_once, atol=2e-6)
        gained.append(psnr(found, clean) - psnr(image, clean))
        lost.append(psnr(found, clean) - psnr(half(image), clean))
    assert min(gained) > 7
    assert np.mean(lost) < 0.01
    assert max(map(abs, lost)) < 0.02


def test_rounded_biases_change_nothing_but_where_the_rounding_is() -> None:
    network = trained("dncnn_s:depth=8,channels=16,norm=none")
    image = noisy(1, 30, 31)
    expected = whole(network, image)
    layers = strips.layers_of(network)
    biases = [layer.convolution.bias.clone() for layer in layers]
    module._round_biases(layers[1:])
    np.testing.assert_allclose(whole(network, image), expected, atol=1e-6)
    for layer, bias in list(zip(layers, biases, strict=True))[1:-1]:
        assert torch.equal(layer.convolution.bias, bias.bfloat16().float())
        assert not torch.equal(layer.convolution.bias, bias)


def test_bf16_of_a_network_without_residual() -> None:
    network, image = trained("dncnn_s:depth=4,channels=8,residual=false", scale=20), noisy(1, 40, 41)
    np.testing.assert_allclose(denoise(network, image, precision="bf16"), whole(network, image), atol=0.02)


# --- networks that look at the whole image ------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["+se", "+sk", "+se+sk", "+eca"])
@pytest.mark.parametrize(("precision", "atol"), [("fp32", 2e-6), ("bf16", 0.01)])
def test_attention_gets_the_image_at_once(units, precision, atol) -> None:
    network, image = trained(f"dncnn_s:depth=4,channels=16{units}"), noisy(1, 33, 70)
    denoiser = Denoiser(network, precision=precision, tile=20)
    assert denoiser.halo is None
    np.testing.assert_allclose(denoiser(image), whole(network, image), atol=atol)


def test_attention_on_a_large_image_is_refused_and_says_why(monkeypatch) -> None:
    monkeypatch.setattr(module, "MOST_AT_ONCE", 1000)
    network = trained(f"{SMALL}+se")
    assert denoise(network, noisy(1, 20, 50)).shape == (1, 20, 50)
    with pytest.raises(ExciteError, match=r"40 × 26 pixels is too large.* attention .*1,000 pixels are the most"):
        denoise(network, noisy(1, 40, 26))
    assert denoise(trained(SMALL), noisy(1, 40, 26)).shape == (1, 40, 26)


def test_any_other_module_is_asked_as_it_is() -> None:
    blur = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 2, 3))
    image = noisy(2, 12, 15)
    np.testing.assert_allclose(denoise(blur, image), whole(blur, image), atol=1e-6)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    network = trained(SMALL)
    with pytest.raises(UsageError, match="built for images of 1 channels, and this one has 3"):
        denoise(network, noisy(3, 20, 20))
    for shape in ((20, 20), (1, 0, 20), (1, 1, 20, 20)):
        with pytest.raises(UsageError, match=r"An image is \(C, H, W\)"):
            denoise(network, np.zeros(shape, np.float32))
    with pytest.raises(UsageError, match="int32 have no known white"):
        denoise(network, np.zeros((1, 20, 20), np.int32))
    with pytest.raises(UsageError, match=r"out has shape \(1, 20, 21\)"):
        Denoiser(network)(noisy(1, 20, 20), out=np.empty((1, 20, 21), np.float32))
    with pytest.raises(UsageError, match=r"tile is 12: .*more than 12 pixels wide"):
        Denoiser(network, tile=12)
    with pytest.raises(UsageError, match="unknown precision 'fp8'"):
        Denoiser(network, precision="fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fuses", [True, False])
def test_a_convolution_and_the_relu_after_it(monkeypatch, dtype, fuses) -> None:
    monkeypatch.setattr(convolve, "_fuses", lambda _: fuses)
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3, dilation=2, groups=2).to(dtype)
    values = torch.randn(1, 4, 9, 11, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        answer = convolve.convolve_relu(convolution, values, (4, 2))
        convolution.double().padding = (4, 2)
        expected = convolution(values.double()).relu()
    assert answer.dtype == dtype
    assert 0.2 < (answer == 0).float().mean() < 0.8
    torch.testing.assert_close(answer.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from excite.data.denoising import DenoisingSplit, load_denoising
from excite.errors import ExciteError, UsageError
from excite.tasks import task_named
from excite.tasks.denoising import DenoisingTask, psnr, score, ssim


def pictures(folder, sizes=((40, 52), (33, 47)), channels: int = 1) -> DenoisingSplit:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number, (height, width) in enumerate(sizes):
        rows, cols = np.mgrid[:height, :width] / 9
        values = (127 + 120 * np.sin(rows + number) * np.cos(cols)).astype(np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    data = load_denoising(f"denoising:{folder}", channels=channels, patch=16, all_for_test=True)
    assert data.test is not None
    return data.test


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_are_those_of_scikit_image(channels) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, channels, 37, 45, generator=generator)
    output = clean + 0.2 * torch.randn(clean.shape, generator=generator)  # well beyond 0 … 1
    for i in range(2):
        one, other = clean[i].double().numpy(), output[i].clamp(0, 1).double().numpy()
        assert psnr(output, clean)[i].item() == pytest.approx(peak_signal_noise_ratio(one, other, data_range=1.0))
        theirs = structural_similarity(
            one, other, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
        )
        assert ssim(output, clean)[i].item() == pytest.approx(theirs, abs=1e-6)


def test_an_exact_image_has_a_hundred_decibels() -> None:
    image = torch.rand(1, 1, 16, 16)
    assert psnr(image, image).item() == pytest.approx(100)
    assert ssim(image, image).item() == pytest.approx(1)


def test_the_loss_is_equation_1_of_the_paper() -> None:
    """The mean over N patches of half the squared norm of the error in the noise, R(y) - (y - x)."""
    clean, noisy, residual = (torch.randn(5, 1, 8, 8) for _ in range(3))
    expected = sum(float(((residual[i] - (noisy[i] - clean[i])) ** 2).sum()) for i in range(5)) / (2 * 5)
    assert DenoisingTask(nn.Identity()).loss(noisy - residual, clean).item() == pytest.approx(expected, rel=1e-5)


def test_a_step_says_the_loss_and_the_sum_of_the_scores() -> None:
    clean = torch.rand(3, 1, 12, 12)
    noisy = clean + 0.1
    step = DenoisingTask(nn.Identity()).one_batch((noisy, clean, torch.arange(3)))
    assert step["loss"].item() == pytest.approx(0.5 * 144 * 0.01, rel=1e-4)
    assert step["score"].item() == pytest.approx(psnr(noisy, clean).sum().item())


def test_a_network_that_does_nothing_scores_what_the_noise_leaves(tmp_path) -> None:
    split = pictures(tmp_path / "a")
    scored = score(nn.Identity(), split, None)
    assert scored.count == 2
    for i in range(2):
        noisy, clean = (image.double().numpy() for image in split.pair(i))
        expected = 10 * math.log10(1 / ((noisy.clip(0, 1) - clean) ** 2).mean())
        assert scored.details["psnr"][i] == pytest.approx(expected)
        assert scored.details["noisy_psnr"][i] == pytest.approx(expected)
        assert scored.scores[i] == pytest.approx(expected, rel=1e-6)
    assert scored.metrics["psnr"] == pytest.approx(np.mean(scored.details["psnr"]))
    assert scored.details["names"] == ["0.png", "1.png"]


def test_a_network_is_scored_in_evaluation_mode_and_left_as_it_was(tmp_path) -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = score(network, pictures(tmp_path / "a"), None)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert np.array_equal(first.scores, score(network, pictures(tmp_path / "a"), None).scores)


def test_what_cannot_be_scored_is_said(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"1\.png has 9×30 pixels, and SSIM looks at 11×11"):
        score(nn.Identity(), pictures(tmp_path / "small", ((30, 30), (9, 30))), None)

    class Broken(nn.Module):
        def forward(self, x):
            return x / 0

    with pytest.raises(ExciteError, match=r"output for 0\.png is not finite"):
        score(Broken(), pictures(tmp_path / "a"), None)


def test_the_task_refuses_what_is_of_classification(tmp_path) -> None:
    task = task_named("denoising")
    pictures(tmp_path / "a")
    data = load_denoising(f"denoising:{tmp_path / 'a'}", patch=16, all_for_test=True)
    assert task.options({"label_smoothing": 0.0, "class_weights": None}, data) == {}
    with pytest.raises(UsageError, match=r"task\.label_smoothing.*no classes"):
        task.options({"label_smoothing": 0.1, "class_weights": None}, data)
    with pytest.raises(UsageError, match=r"\(1, 10\).*image of the same shape"):
        task.expect(data, torch.zeros(1, 1, 16, 16), torch.zeros(1, 10))

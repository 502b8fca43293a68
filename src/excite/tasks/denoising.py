"""Denoising: the sum of squared errors while learning, PSNR and SSIM when scored.

Zhang, Zuo, Chen, Meng, Zhang, "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising", IEEE
TIP 26(7), 2017, arXiv 1608.03981 (Eq. 1); Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error
Visibility to Structural Similarity", IEEE TIP 13(4), 2004 (Eq. 13).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from excite.data.denoising import DenoisingData, DenoisingSplit
from excite.errors import ExciteError, UsageError
from excite.evaluation_mode import evaluation_mode
from excite.preprocessing import Preprocessing
from excite.processes import Processes
from excite.tasks.base import ALONE, Evaluation, Metric, Step, Task, TaskModule

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
LEAST_ERROR = 1e-10
"""Mean squared error below which an image counts as exact: 100 dB, far above what 16 bits can tell."""


class DenoisingTask(TaskModule):
    """Trains a network that gives an image of the shape of its input: the image without its noise."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Half the sum of squared errors of an image, mean over the batch (Eq. 1 of the paper: 1/2N).

        A network that subtracts what it finds from its input has the same error in the noise as in the image.
        """
        return (output.float() - target).square().sum() / (2 * len(target))

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum of the PSNRs of the batch's patches."""
        return psnr(output.float(), target).sum()


def psnr(output: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB: 10 · log10(1 / mean squared error).

    Args:
        output: ``(N, C, H, W)``; it is clipped to 0 … 1.
        clean: the same shape, 0 … 1.

    Returns:
        ``(N,)``, at most 100.
    """
    error = (output.clamp(0, 1).double() - clean.double()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=LEAST_ERROR).log10()


def ssim(output: Tensor, clean: Tensor) -> Tensor:
    """Structural similarity of each image, the mean over channels and over all places of an 11×11 Gaussian window
    (σ 1.5) that lie wholly within the image.

    Args:
        output: ``(N, C, H, W)``; it is clipped to 0 … 1.
        clean: the same shape, 0 … 1.

    Returns:
        ``(N,)``, at most 1.
    """
    _, places = structural_similarity_index_measure(
        output.clamp(0, 1).double(),
        clean.double(),
        gaussian_kernel=True,
        sigma=SSIM_SIGMA,
        kernel_size=SSIM_WINDOW,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    # torchmetrics goes on beyond the image's edge, mirrored; the paper's own code does not.
    edge = SSIM_WINDOW // 2
    return places[..., edge:-edge, edge:-edge].mean((1, 2, 3))


def score_pairs(
    denoise: Callable[[Tensor], Tensor],
    split: DenoisingSplit,
    *,
    step: Step | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Score what makes of each noisy image of a split a clean one.

    Args:
        denoise: from a noisy image ``(C, H, W)`` on the CPU, neither clipped nor rounded, to the same without noise.
        split: the images and their noise.
        step: is called with (images done, in all).
        processes: those that share the images.

    Returns:
        ``psnr`` in dB and ``ssim``, the means over the images; each image's own under ``details``, beside those of
        the noisy image as it was: ``names``, ``psnr``, ``ssim``, ``noisy_psnr``, ``noisy_ssim``.

    Raises:
        UsageError: an image that is smaller than the window of SSIM.
        ExciteError: no images, or an output that is not finite.
    """
    if not len(split):
        raise ExciteError("There are no images to evaluate on.")
    rows = {}
    for i in range(processes.rank, len(split), processes.count):
        noisy, clean = split.pair(i)
        if min(clean.shape[-2:]) < SSIM_WINDOW:
            height, width = clean.shape[-2:]
            raise UsageError(
                f"{split.names[i]} has {height}×{width} pixels, and SSIM looks at {SSIM_WINDOW}×{SSIM_WINDOW}: "
                "leave it out of the test images."
            )
        output = denoise(noisy)
        if not output.isfinite().all():
            raise ExciteError(f"The network's output for {split.names[i]} is not finite.")
        rows[i] = [(kind(image[None], clean[None]).item()) for image in (output, noisy) for kind in (psnr, ssim)]
        if step:
            step(i + 1, len(split))
    every = {i: row for share in processes.everyones(rows) for i, row in share.items()}
    columns = np.array([every[i] for i in range(len(split))])
    return Evaluation(
        metrics={"psnr": float(columns[:, 0].mean()), "ssim": float(columns[:, 1].mean())},
        scores=columns[:, 0].astype(np.float32),
        details={
            "names": list(split.names),
            "psnr": columns[:, 0],
            "ssim": columns[:, 1],
            "noisy_psnr": columns[:, 2],
            "noisy_ssim": columns[:, 3],
        },
    )


def score(
    network: nn.Module,
    split: DenoisingSplit,
    preprocessing: Preprocessing,
    device: torch.device | str = "cpu",
    *,
    workers: int = 0,
    step: Step | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Score a network in evaluation mode on whole images, one at a time; its mode is restored afterwards."""

    @torch.inference_mode()
    def denoise(noisy: Tensor) -> Tensor:
        output: Tensor = network(noisy[None].to(device))
        return output[0].float().cpu()

    with evaluation_mode(network, device):
        return score_pairs(denoise, split, step=step, processes=processes)


def options(settings: Mapping[str, Any], data: DenoisingData) -> dict[str, Any]:
    """The loss has none.

    Raises:
        UsageError: a setting of classification.
    """
    if given := [key for key in ("label_smoothing", "class_weights") if settings[key]]:
        raise UsageError(
            f"key 'task.{given[0]}' is for classification, and {data.name!r} has no classes: leave it out"
        )
    return {}


def expect(data: DenoisingData, inputs: Tensor, output: Tensor) -> None:
    """Refuse a network that does not give an image of its input's shape.

    Raises:
        UsageError: another shape.
    """
    if output.shape != inputs.shape:
        raise UsageError(
            f"the network makes of an image {tuple(inputs.shape)} an output {tuple(output.shape)}, but to denoise is "
            "to give an image of the same shape: take dncnn_s, or a network of your own that does"
        )


TASK = Task("denoising", Metric("psnr", "dB", higher_is_better=True), "images", DenoisingTask, options, expect, score)

"""The effective receptive field: which pixels have a say in what one unit of a map answers, and how much.

Source: Luo, Li, Urtasun & Zemel, "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks",
arXiv 1701.04128, Sect. 2 and 4: the gradient of the unit at the centre with respect to the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excite.errors import ExciteError, UsageError
from excite.evaluation_mode import evaluation_mode

Floats = NDArray[np.float64]


def effective_receptive_field(network: nn.Module, path: str, images: Tensor) -> Floats:
    """How much each pixel moves the centre of a module's map.

    The centre unit, in row H′ // 2 and column W′ // 2 of the map, is averaged over the channels; the absolute values
    of its gradient are summed over the input's channels and averaged over the images. Gates that look at the whole
    map spread some of it over the whole image.

    Args:
        network: it is run in evaluation mode and left as it was; its parameters get no gradients.
        path: of the module, as in ``network.named_modules()``. One that runs several times counts as it runs last.
        images: what the network takes, (N, C, H, W), N ≥ 1, on its device.

    Returns:
        (H, W), ≥ 0, with a sum of 1; all zero where no pixel has a say.

    Raises:
        UsageError: no such module, or one whose answer is no map (N, C, H′, W′).
        ExciteError: a gradient is not a number.
    """
    try:
        module = network.get_submodule(path)
    except AttributeError:
        raise UsageError(f"The network has no module '{path}': name one of network.named_modules().") from None
    centres: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, answer: Any) -> None:
        # Taken at once: what follows may work in place.
        if isinstance(answer, Tensor) and answer.dim() == 4:
            height, width = answer.shape[2:]
            centres[:] = [answer[:, :, height // 2, width // 2].float().mean(1).sum()]

    handle = module.register_forward_hook(keep)
    try:
        # Tensors from inference_mode cannot take part in gradients, and a caller may be inside it.
        with evaluation_mode(network), torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone().requires_grad_()
            network(images)
            if not centres:
                raise UsageError(f"'{path}' does not answer with a map (N, C, H, W): name a module that does.")
            if not centres[0].requires_grad:
                raise UsageError(f"'{path}' passes no gradient to the image: name a module that computes from it.")
            # The images do not touch each other in evaluation mode, so the sum's gradient holds each one's own.
            (gradient,) = torch.autograd.grad(centres[0], images, materialize_grads=True)
    finally:
        handle.remove()
    field: Floats = gradient.abs().double().sum(1).mean(0).cpu().numpy()
    total = field.sum()
    if not np.isfinite(total):
        raise ExciteError(
            f"The gradient at '{path}' is not a number: the network's weights or the image are damaged."
        )
    return field / total if total else field


def sides(field: Floats, shares: Sequence[float] = (0.5, 0.9)) -> list[int]:
    """How large a receptive field is: the side of the smallest square, anywhere in it, that holds a share of it.

    Args:
        field: (H, W), ≥ 0.
        shares: of its sum, in 0 … 1.

    Returns:
        One side for each share, in pixels: at most the larger side of the field, and 0 for a field of zeros.
    """
    height, width = field.shape
    total = float(field.sum())
    if not total:
        return [0 for _ in shares]
    # Sums over all squares at once, as differences of the sums from the corner on.
    sums = np.zeros((height + 1, width + 1))
    sums[1:, 1:] = field.cumsum(0).cumsum(1)

    def most(side: int) -> float:
        rows, columns = min(side, height), min(side, width)
        squares = sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
        return float(squares.max()) / total

    found = []
    for share in shares:
        low, high = 1, max(height, width)
        while low < high:
            middle = (low + high) // 2
            # The sums are rounded: the whole must count as holding all of it.
            if most(middle) >= share - 1e-9:
                high = middle
            else:
                low = middle + 1
        found.append(low)
    return found

"""Class activation maps: which places of an image speak for a class.

Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
arXiv 1610.02391, Eq. 1–2; computed by captum.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from excite.errors import UsageError
from excite.evaluation_mode import evaluation_mode

Floats = NDArray[np.float32]


def activation_map(network: nn.Module, images: Tensor, classes: Tensor, path: str | None = None) -> Floats:
    """Grad-CAM: the channels of a map, weighted with the mean gradient of the class's score, added up, if positive.

    Args:
        network: it is run in evaluation mode and left as it was. Its answers are scores (N, classes).
        images: what it takes, (N, C, H, W), on its device.
        classes: the number of each image's class, int64 (N,).
        path: of the module whose map is taken; by default that of :func:`last_map`.

    Returns:
        (N, H, W), ≥ 0: in the size of the images, between the map's own places interpolated linearly.

    Raises:
        UsageError: captum is not installed, no such module, or one whose answer is no map.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        raise UsageError("Class activation maps are made with captum: pip install 'excite[studio]'.") from None
    if path is None:
        path = last_map(network, images[:1])
    try:
        module = network.get_submodule(path)
    except AttributeError:
        raise UsageError(f"The network has no module '{path}': name one of network.named_modules().") from None
    with evaluation_mode(network), torch.inference_mode(False), torch.enable_grad():
        # A copy that wants gradients: captum would change the caller's.
        inputs = images.detach().clone().requires_grad_()
        found = LayerGradCam(network, module).attribute(inputs, target=classes, relu_attributions=True)
    if not isinstance(found, Tensor) or found.dim() != 4:
        raise UsageError(f"'{path}' does not answer with a map (N, C, H, W): name a module that does.")
    spread = F.interpolate(found.detach().float(), images.shape[2:], mode="bilinear", align_corners=False)
    result: Floats = spread[:, 0].cpu().numpy()
    return result


@torch.inference_mode()
def last_map(network: nn.Module, images: Tensor) -> str:
    """The path of the last module to answer with a map of more than one place, what the classifier goes by.

    Raises:
        UsageError: there is none.
    """
    last: list[str] = []

    def note(path: str) -> Any:
        def hook(module: nn.Module, arguments: Any, answer: Any) -> None:
            if isinstance(answer, Tensor) and answer.dim() == 4 and answer[0, 0].numel() > 1:
                last[:] = [path]

        return hook

    with evaluation_mode(network), ExitStack() as hooks:
        for path, module in network.named_modules():
            if module is not network:
                hooks.callback(module.register_forward_hook(note(path)).remove)
        network(images)
    if not last:
        raise UsageError("No module of the network answers with a map (N, C, H, W), so there are no places to show.")
    return last[0]

"""Anyone's DnCNN: a chain of convolutions from an image to an image, with or without batch norm, by its content.

The authors' own are MatConvNet's SimpleNN networks, their batch norms merged into the convolutions (Zhang et al.
2017, arXiv 1608.03981); others keep one ``nn.Sequential``, whose names count the layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from excite.networks.dncnn import DnCNN
from excite.preprocessing import Preprocessing
from excite.weights.base import Content, Converted

Tensors = Mapping[str, Tensor]

_IN_A_CHAIN = re.compile(r"(.+\.)?(0|[1-9]\d{0,5})\.(weight|bias|running_mean|running_var|num_batches_tracked)")
_OURS = re.compile(r"(conv|norm|act|se)([1-9]\d{0,5})\..+")
_NORM = frozenset(("weight", "bias", "running_mean", "running_var"))
_COUNT = "num_batches_tracked"
_LEAST_DEPTH = 3


@dataclass(frozen=True)
class ConvertedDnCNN(Converted):
    """The tensors of a DnCNN; ``form`` holds ``depth``, ``channels``, ``kernel`` and, where the file tells, ``norm``.

    Attributes:
        channels: of its images.
    """

    channels: int = 1


def dncnn_layout(content: Content) -> ConvertedDnCNN | None:
    """Chains of convolutions of one kernel, from 1 or 3 channels over maps of one width to as many channels.

    ``[PREFIX.]N.weight``, ``[PREFIX.]N.bias``, …, in the order of N, or excite's own names. There is a batch norm
    behind every hidden convolution or behind none. A bias in front of one goes into its running mean; where the first
    or the last convolution has none, it is zero.
    """
    return _of_a_chain(content) or _of_excite(content.tensors)


def expected_images(module: nn.Module) -> Preprocessing | None:
    """What a DnCNN is fed: values from 0 to 1, as they are. None for another network."""
    table = getattr(module, "table", None)
    if not isinstance(module, DnCNN) or table is None:
        return None
    channels = module.in_channels
    return Preprocessing(table.input_size, (0.0,) * channels, (1.0,) * channels, channels=channels)


# --- chains --------------------------------------------------------------------------------------------------------


def _of_a_chain(content: Content) -> ConvertedDnCNN | None:
    layers = _layers(content.tensors)
    if layers is None:
        return None
    convolutions = [layer for layer in layers if _is_convolution(layer)]
    widths = _widths([layer["weight"] for layer in convolutions])
    if widths is None:
        return None
    channels, width = widths
    normed = len(convolutions) < len(layers)
    pattern = [True, *([True, False] if normed else [True]) * (len(convolutions) - 2), True]
    if [_is_convolution(layer) for layer in layers] != pattern:
        return None
    if not all(_is_convolution(layer) or _is_norm(layer, width) for layer in layers):
        return None
    norms = [layer for layer in layers if not _is_convolution(layer)]
    return ConvertedDnCNN(
        "MatConvNet DnCNN" if content.format == "MatConvNet" else "a DnCNN in one chain of layers",
        _named(convolutions, norms),
        {
            "depth": str(len(convolutions)),
            "channels": str(width),
            "kernel": str(convolutions[0]["weight"].shape[-1]),
            "norm": "batch" if norms else "none",
        },
        channels=channels,
    )


def _layers(tensors: Tensors) -> list[dict[str, Tensor]] | None:
    """The tensors of each layer by their kinds, in order; None where the names are not those of one chain."""
    layers: dict[int, dict[str, Tensor]] = {}
    prefixes = set()
    for name, tensor in tensors.items():
        match = _IN_A_CHAIN.fullmatch(name)
        if match is None or not (tensor.is_floating_point() or match[3] == _COUNT):
            return None
        prefixes.add(match[1])
        layers.setdefault(int(match[2]), {})[match[3]] = tensor
    return [layers[number] for number in sorted(layers)] if len(prefixes) == 1 else None


def _is_convolution(layer: Tensors) -> bool:
    weight, bias = layer.get("weight"), layer.get("bias")
    if weight is None or weight.dim() != 4 or layer.keys() - {"weight", "bias"}:
        return False
    return bias is None or bias.shape == weight.shape[:1]


def _is_norm(layer: Tensors, width: int) -> bool:
    return layer.keys() - {_COUNT} == _NORM and all(layer[kind].shape == (width,) for kind in _NORM)


def _widths(kernels: list[Tensor]) -> tuple[int, int] | None:
    """Channels of the images and of the hidden maps; None where the kernels, (out, in, h, w), are not DnCNN's."""
    if len(kernels) < _LEAST_DEPTH:
        return None
    width, channels, height, _ = kernels[0].shape
    sides = (height, height)
    hidden = [(width, width, *sides)] * (len(kernels) - 2)
    expected = [(width, channels, *sides), *hidden, (channels, width, *sides)]
    if channels not in (1, 3) or height % 2 == 0 or [tuple(kernel.shape) for kernel in kernels] != expected:
        return None
    return channels, width


def _named(convolutions: list[dict[str, Tensor]], norms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    last = len(convolutions)
    for i, layer in enumerate(convolutions, start=1):
        weight, bias = layer["weight"], layer.get("bias")
        named[f"conv{i}.weight"] = weight
        norm = norms[i - 2] if norms and 1 < i < last else None
        if norm is None:
            named[f"conv{i}.bias"] = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias
            continue
        named |= {f"norm{i}.{kind}": tensor for kind, tensor in norm.items()}
        if bias is not None:
            named[f"norm{i}.running_mean"] = norm["running_mean"] - bias
    return named


# --- excite's own names --------------------------------------------------------------------------------------------


def _of_excite(tensors: Tensors) -> ConvertedDnCNN | None:
    """A DnCNN of excite's, units included; its tensors need no other names, and its form is read off them."""
    matches = [_OURS.fullmatch(name) for name in tensors]
    numbers = sorted({int(match[2]) for match in matches if match and match[1] == "conv"})
    depth = len(numbers)
    if not all(matches) or depth < _LEAST_DEPTH or numbers != list(range(1, depth + 1)):
        return None
    ends = [tensors.get(f"conv{i}.weight") for i in (1, depth)]
    first, last = ends
    if first is None or last is None or first.dim() != 4 or not {"conv1.bias", f"conv{depth}.bias"} <= tensors.keys():
        return None
    width, channels, kernel, _ = first.shape
    if tuple(last.shape) != (channels, width, kernel, kernel) or first.shape[3] != kernel:
        return None
    form = {"depth": str(depth), "channels": str(width), "kernel": str(kernel)}
    if any(match and match[1] == "norm" for match in matches):
        form["norm"] = "batch"
    elif any(f"conv{i}.bias" in tensors for i in range(2, depth)):
        form["norm"] = "none"
    return ConvertedDnCNN("excite's DnCNN", dict(tensors), form, channels=channels)

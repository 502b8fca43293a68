"""A chain of convolutions over an image that comes strip by strip, every row computed once.

Each convolution keeps the last rows of what it was given: those that the next rows of its answer look back to. A
strip therefore passes all convolutions while it still lies in the processor's caches, nothing is computed twice at
its upper and lower edge, and the memory that is needed does not grow with the height of the image. The answer lags
behind the input by the reach of the whole chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from excite.deploy import winograd
from excite.networks.dncnn import DnCNN


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution that keeps the size of its map, and what follows it position by position.

    Attributes:
        convolution: with a stride of 1, padded by zeros.
        after: batch norm, activations; modules that look at one position at a time.
        kernels: of the convolution in its quicker form (:mod:`excite.deploy.winograd`), where that pays.
    """

    convolution: nn.Conv2d
    after: tuple[nn.Module, ...]
    kernels: tuple[Tensor, ...] = ()

    @property
    def reach(self) -> tuple[int, int]:
        """How many rows and columns it looks up and to the left, and as many down and to the right."""
        (rows, cols), (down, right) = self.convolution.kernel_size, self.convolution.dilation
        return rows // 2 * down, cols // 2 * right


def layers_of(network: nn.Module) -> list[Layer] | None:
    """The body of a network as such a chain; None where it is none, or a unit in it looks at the whole image."""
    if not isinstance(network, DnCNN) or network.halo is None:
        return None
    convolutions: list[tuple[nn.Conv2d, list[nn.Module]]] = []
    for module in network.children():
        if isinstance(module, nn.Conv2d):
            convolutions.append((module, []))
        elif not isinstance(module, nn.Identity):
            convolutions[-1][1].append(module)
    layers = [Layer(convolution, tuple(after)) for convolution, after in convolutions]
    return layers if all(_keeps_size(layer) for layer in layers) else None


def quicker(layer: Layer) -> Layer:
    """The layer in the form that is quickest for its type and device."""
    if not winograd.pays(layer.convolution):
        return layer
    return replace(layer, kernels=winograd.combined_kernels(layer.convolution.weight))


def _keeps_size(layer: Layer) -> bool:
    convolution = layer.convolution
    return (
        convolution.stride == (1, 1)
        and convolution.padding == layer.reach
        and convolution.padding_mode == "zeros"
        and all(side % 2 for side in convolution.kernel_size)
    )


class Strips:
    """One pass of a chain over one image, from its first row to its last.

    Args:
        layers: the chain, in evaluation mode and on the device; float32 or bfloat16.
        height: the most rows of a strip.
        width: of the image.
    """

    def __init__(self, layers: Sequence[Layer], height: int, width: int) -> None:
        self.layers = layers
        # Every layer may hold rows back, for its reach and to answer several at once; the last strip brings them all.
        held = [layer.reach[0] + _rows_at_once(layer) - 1 for layer in layers]
        most = height + sum(held) + 3 * max(held)
        # All convolutions read from the same buffer, one after the other: hidden maps are large, and few stay cached.
        self._buffers = {_kind(layer): _empty(layer.convolution, most, width) for layer in layers}
        # Above the image lie zeros.
        self._kept = [_empty(layer.convolution, layer.reach[0], width).zero_() for layer in layers]

    def push(self, strip: Tensor, last: bool) -> Tensor | None:
        """The next rows.

        Args:
            strip: (1, C, rows, width), of any float type.
            last: whether the image ends with them.

        Returns:
            As many further rows of the answer as can be said by now, (1, C, rows, width); None where there are none.
        """
        answer = strip
        after: tuple[nn.Module, ...] = ()
        for number, layer in enumerate(self.layers):
            rows = self._put(number, answer, after, last)
            ready = max(rows - 2 * layer.reach[0], 0)
            if not last:
                ready -= ready % _rows_at_once(layer)
            buffer = self._buffers[_kind(layer)][:, :, :rows]
            self._kept[number] = buffer[:, :, ready:].clone()
            if not ready:
                return None
            answer, after = _convolve(layer, buffer[:, :, : ready + 2 * layer.reach[0]]), layer.after
        for module in after:
            answer = module(answer)
        return answer

    def _put(self, number: int, answer: Tensor, after: Sequence[nn.Module], last: bool) -> int:
        """Lay out what a layer is to see: kept rows, the answer of the layer before, zeros below the image.

        Returns:
            How many rows there are.
        """
        layer, kept = self.layers[number], self._kept[number]
        buffer = self._buffers[_kind(layer)]
        for module in after[:-1]:
            answer = module(answer)
        first, rows = kept.shape[2], kept.shape[2] + answer.shape[2]
        place = buffer[:, :, first:rows]
        # A ReLU writes its answer where the next convolution reads it.
        if after and isinstance(after[-1], nn.ReLU):
            torch.clamp_min(answer.to(place.dtype), 0, out=place)
        else:
            place.copy_(after[-1](answer) if after else answer)
        buffer[:, :, :first] = kept
        if last:
            buffer[:, :, rows : rows + layer.reach[0]] = 0
            rows += layer.reach[0]
        return rows


def _rows_at_once(layer: Layer) -> int:
    return winograd.ROWS if layer.kernels else 1


def _convolve(layer: Layer, rows: Tensor) -> Tensor:
    if not layer.kernels:
        return _convolve_directly(layer, rows)
    count = rows.shape[2] - 2
    at_once = count - count % winograd.ROWS
    answer = _rows(layer.convolution.weight, layer.convolution.out_channels, count, rows.shape[3])
    if at_once:
        winograd.convolve(rows[:, :, : at_once + 2], layer.kernels, layer.convolution.bias, answer[:, :, :at_once])
    if at_once < count:
        answer[:, :, at_once:] = _convolve_directly(layer, rows[:, :, at_once:])
    return answer


def _convolve_directly(layer: Layer, rows: Tensor) -> Tensor:
    convolution = layer.convolution
    return torch.conv2d(
        rows,
        convolution.weight,
        convolution.bias,
        padding=(0, layer.reach[1]),
        dilation=convolution.dilation,
        groups=convolution.groups,
    )


def _kind(layer: Layer) -> tuple[int, torch.dtype]:
    """Layers of a kind read from the same buffer."""
    return layer.convolution.in_channels, layer.convolution.weight.dtype


def _empty(convolution: nn.Conv2d, rows: int, cols: int) -> Tensor:
    """What a convolution reads."""
    return _rows(convolution.weight, convolution.in_channels, rows, cols)


def _rows(like: Tensor, channels: int, rows: int, cols: int) -> Tensor:
    """Rows of positions whose channels lie side by side, of the type and on the device of a tensor."""
    return torch.empty(1, rows, cols, channels, dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)

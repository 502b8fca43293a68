"""A chain of convolutions over an image that comes strip by strip, every row computed once.

Each convolution keeps the last rows of what it was given: those that the next rows of its answer look back to. A
strip therefore passes all convolutions while it still lies in the processor's caches, nothing is computed twice at
its upper and lower edge, and the memory that is needed does not grow with the height of the image. The answer lags
behind the input by the reach of the whole chain.

No row is copied on its way but those that are kept: a convolution is padded by as many rows as the next one kept, and
in the place of what it answers there, which means nothing, the kept rows are put.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from excite.deploy import winograd
from excite.deploy.convolve import convolve, convolve_relu
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
        width: of the image.
    """

    def __init__(self, layers: Sequence[Layer], width: int) -> None:
        self.layers = layers
        # In the same place from the first strip to the last: small tensors that are made anew between large ones
        # would leave gaps in memory that no large one fits in.
        self._room = [_empty(layer, 2 * layer.reach[0] + _rows_at_once(layer) - 1, width) for layer in layers]
        # Above the image lie zeros.
        self._kept = [room[:, :, : layer.reach[0]].zero_() for room, layer in zip(self._room, layers, strict=True)]

    def push(self, strip: Tensor, last: bool) -> Tensor | None:
        """The next rows.

        Args:
            strip: (1, C, rows, width), of any float type.
            last: whether the image ends with them.

        Returns:
            As many further rows of the answer as can be said by now, (1, C, rows, width); None where there are none.
        """
        first = self.layers[0]
        spare = self._spare(0)
        rows = _empty(first, spare + strip.shape[2] + spare, strip.shape[3])
        rows[:, :, spare : spare + strip.shape[2]] = strip
        for number, layer in enumerate(self.layers):
            # Around the new rows lie as many of no meaning: there is room for those kept, and for zeros below.
            kept, reach = self._kept[number], layer.reach[0]
            below = rows.shape[2] - spare
            rows[:, :, spare - kept.shape[2] : spare] = kept
            if last:
                rows[:, :, below : below + reach] = 0
                below += reach
            there = rows[:, :, spare - kept.shape[2] : below]
            ready = max(there.shape[2] - 2 * reach, 0)
            if not last:
                ready -= ready % _rows_at_once(layer)
            self._kept[number] = self._room[number][:, :, : there.shape[2] - ready].copy_(there[:, :, ready:])
            if not ready:
                return None
            spare = self._spare(number + 1)
            rows = _answer(layer, there[:, :, : ready + 2 * reach], spare)
            if number + 1 < len(self.layers):
                rows = rows.to(self.layers[number + 1].convolution.weight.dtype)
        return rows

    def _spare(self, number: int) -> int:
        """How many rows are to be free above and below what a layer is given."""
        if number == len(self.layers):
            return 0
        return max(self._kept[number].shape[2], self.layers[number].reach[0])


def _rows_at_once(layer: Layer) -> int:
    return winograd.ROWS if layer.kernels else 1


def _answer(layer: Layer, rows: Tensor, spare: int) -> Tensor:
    """What a layer makes of rows, with so many rows of no meaning above and below it."""
    after = layer.after
    if layer.kernels:
        answer = _quickly(layer, rows, spare)
    elif after and type(after[0]) is nn.ReLU:
        answer, after = convolve_relu(layer.convolution, rows, (spare, layer.reach[1])), after[1:]
    else:
        answer = convolve(layer.convolution, rows, (spare, layer.reach[1]))
    for module in after:
        answer = answer.relu_() if type(module) is nn.ReLU else module(answer)
    return answer


def _quickly(layer: Layer, rows: Tensor, spare: int) -> Tensor:
    convolution = layer.convolution
    count = rows.shape[2] - 2
    at_once = count - count % winograd.ROWS
    answer = _rows(convolution.weight, convolution.out_channels, spare + count + spare, rows.shape[3])
    below = spare + at_once
    if at_once:
        winograd.convolve(rows[:, :, : at_once + 2], layer.kernels, convolution.bias, answer[:, :, spare:below])
    if at_once < count:
        rest = convolve(convolution, rows[:, :, at_once:], (0, layer.reach[1]))
        answer[:, :, below : spare + count] = rest
    return answer


def _empty(layer: Layer, rows: int, cols: int) -> Tensor:
    """What a layer reads."""
    return _rows(layer.convolution.weight, layer.convolution.in_channels, rows, cols)


def _rows(like: Tensor, channels: int, rows: int, cols: int) -> Tensor:
    """Rows of positions whose channels lie side by side, of the type and on the device of a tensor."""
    return torch.empty(1, rows, cols, channels, dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)

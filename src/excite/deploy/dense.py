"""A classifier of windows, rewritten to be applied to a whole scene at once.

The windows of neighbouring pixels overlap almost entirely, and a network whose convolutions have a stride of 1 and no
padding computes the same numbers for each of them. Applied to the whole scene it computes each number once; its first
dense layer, which sees what the convolutions leave of a window, becomes a convolution with a kernel of that size, and
the later ones become 1×1 convolutions (Long, Shelhamer & Darrell 2015, arXiv 1411.4038, Sect. 3.1). Nothing is
approximated: the two ways differ only by the rounding of their sums.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.deploy.frequency import FrequencyConv2d, pays
from excite.errors import UsageError
from excite.networks.hybridsn import HybridSN, Spectral, Stack

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh,
)  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_PADS = "pads its windows: what it adds there differs from what the scene holds"
_STRIDES = "strides, so that neighbouring windows share nothing of what it computes"


class NotDenseError(UsageError):
    """The network cannot be applied to a whole scene at once; the message names the part that stands in the way."""


def to_dense(network: nn.Module, window: int, side: int = 160) -> nn.Sequential:
    """Rewrite a classifier of windows into the same classifier of all windows of a map.

    Args:
        network: a chain (`nn.Sequential`, nested ones too, or HybridSN) of convolutions with a stride of 1 and no
            padding (2-d, or 3-d over bands, rows and columns), batch norm, elementwise activations, dropout, pooling
            with a stride of 1 or over all that is left, flattening, and linear layers. It is read, not changed.
        window: the side of the windows that it classifies, in pixels.
        side: about how many windows lie side by side in a map; only the speed hangs on it.

    Returns:
        A new network in evaluation mode, on the same device, without dropout and with batch norm folded into the
        convolutions: from (1, K, H, W), H and W at least ``window``, to logits (1, classes, H − window + 1,
        W − window + 1), where [0, :, r, c] belongs to the window whose top left corner is (r, c).

    Raises:
        NotDenseError: a part looks at its whole window (such as a gate), pads, strides, or is not known here.
        UsageError: the network was built for windows of another size.
    """
    shape = network.input_shape if isinstance(network, HybridSN) else None
    if shape is not None and shape[1] != window:
        raise UsageError(f"The network was built for windows of {shape[1]} pixels, not of {window}.")
    dense = _Dense(window, side)
    for name, module in chain(network):
        dense.add(name, module)
    return dense.finish()


def chain(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The leaf modules of a chain in the order in which they are applied, with their names.

    Raises:
        NotDenseError: the network is no chain, or carries hooks.
    """
    if not is_chain(network):
        raise NotDenseError(f"{type(network).__name__} is no plain chain of layers, so it is applied to each window.")
    for name, child in network.named_children():
        if child._forward_hooks or child._forward_pre_hooks:
            raise NotDenseError(f"{name} carries hooks, which may look at the whole window.")
        if is_chain(child):
            yield from ((f"{name}.{inner}", module) for inner, module in chain(child))
        else:
            yield name, child


def is_chain(network: nn.Module) -> bool:
    """Whether a network does nothing but apply its children in turn."""
    return type(network) is HybridSN or (
        isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward
    )


class _Dense:
    """The chain as far as it is rewritten, and what its convolutions have left of a window."""

    def __init__(self, window: int, side: int) -> None:
        self.rows = self.cols = window
        self.side = side
        self.layers: list[nn.Module] = []
        self.flat = False
        self.fresh = False  # whether the last layer's answer is nobody else's, and may be overwritten
        self.banded = False  # whether the maps have an axis of bands
        self.maps = 0  # channels of the last convolution, where they have
        self.waiting: nn.Module | None = None  # a change of shape that the next convolution may take in

    def add(self, name: str, module: nn.Module) -> None:
        kind = type(module)
        if kind is nn.Identity or kind in DROPOUTS:
            return
        if kind in (nn.Conv2d, nn.Conv3d) and not self.flat:
            self._convolution(name, module)
            return
        self._release()
        if kind in ELEMENTWISE:
            if self._mixed() and isinstance(module, nn.PReLU) and module.num_parameters > 1:
                raise _refusal(name, module)
            made: Any = copy.deepcopy(module)
            if self.fresh and hasattr(made, "inplace"):
                made.inplace = True
            self.layers.append(made)
        elif kind in NORMS:
            self._norm(name, module)
        elif kind is nn.Linear:
            self._linear(name, module)
        elif self.flat:
            raise _refusal(name, module)
        elif kind in (nn.MaxPool2d, nn.AvgPool2d):
            self._pool(name, module)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and _pair(module.output_size) == (1, 1):
            self._put(nn.AvgPool2d((self.rows, self.cols), stride=1))
            self.rows = self.cols = 1
        elif kind is Spectral or (isinstance(module, nn.Unflatten) and module.dim == 1):
            self.waiting, self.banded = copy.deepcopy(module), True
        elif self.banded and (kind is Stack or _stacks(module)):
            self.waiting, self.banded = Stack(), False
        elif isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            self.flat = True
        else:
            raise _refusal(name, module)

    def finish(self) -> nn.Sequential:
        self._release()
        if (self.rows, self.cols) != (1, 1):
            raise NotDenseError(f"The network leaves {self.rows}×{self.cols} pixels of a window: it names no class.")
        return nn.Sequential(*self.layers).eval().requires_grad_(False)

    def _put(self, layer: nn.Module) -> None:
        self.layers.append(layer)
        self.fresh = True

    def _release(self) -> None:
        if self.waiting is not None:
            self.layers.append(self.waiting)
            self.waiting = None

    def _mixed(self) -> bool:
        """Whether what the network takes for channels now are those of several bands or pixels."""
        return self.flat and (self.banded or (self.rows, self.cols) != (1, 1))

    def _convolution(self, name: str, module: Any) -> None:
        *_, rows, cols = module.kernel_size
        padding = {"valid": (0, 0), "same": (rows - 1, cols - 1)}.get(module.padding, module.padding)
        if any(padding[-2:]):
            raise NotDenseError(f"{name} {_PADS}.")
        self._check_stride(name, module.stride)
        self._shrink(name, module.dilation[-2] * (rows - 1), module.dilation[-1] * (cols - 1))
        waiting, self.waiting = self.waiting, None
        if _adds_axis(waiting) and _slides_over_bands(module):
            self._put(_BandConvolution(module))
        elif isinstance(waiting, Stack) and self.maps and module.groups == 1:
            self._put(_StackedConvolution(module, self.maps))
        else:
            self.waiting = waiting
            self._release()
            self._put(_channels_last(copy.deepcopy(module)))
        self.maps = module.out_channels if self.banded else 0

    def _pool(self, name: str, module: Any) -> None:
        if any(_pair(module.padding)):
            raise NotDenseError(f"{name} {_PADS}.")
        self._check_stride(name, _pair(module.stride))
        (rows, cols), (down, right) = _pair(module.kernel_size), _pair(getattr(module, "dilation", 1))
        self._shrink(name, down * (rows - 1), right * (cols - 1))
        self._put(copy.deepcopy(module))

    def _linear(self, name: str, module: Any) -> None:
        if not self.flat and (self.rows, self.cols) != (1, 1):
            raise _refusal(name, module)
        weight: Tensor = module.weight.detach()
        if weight.shape[1] % (self.rows * self.cols):
            raise NotDenseError(
                f"{name} takes {weight.shape[1]} numbers, which are no multiple of the {self.rows}×{self.cols} "
                f"pixels that are left of a window."
            )
        kernel = weight.reshape(len(weight), -1, self.rows, self.cols)
        if self.banded:
            self.layers.append(Stack())
            self.banded = False
        outputs, channels = kernel.shape[:2]
        here = weight.device.type == "cpu" and weight.dtype == torch.float32
        if here and pays(channels, outputs, (self.rows, self.cols)):
            self._put(FrequencyConv2d(kernel, module.bias, self.side))
        else:
            made = nn.Conv2d(channels, outputs, (self.rows, self.cols), device="meta")
            made.weight = nn.Parameter(kernel.clone())
            made.bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone())
            self._put(_channels_last(made))
        self.rows = self.cols = 1

    def _norm(self, name: str, module: Any) -> None:
        if module.running_mean is None:
            raise NotDenseError(f"{name} normalises by the batch that it sees, in evaluation mode too.")
        if self._mixed():
            raise _refusal(name, module)
        scale = (module.running_var.double() + module.eps).rsqrt()
        shift = -module.running_mean.double() * scale
        if module.affine:
            gamma, beta = module.weight.detach().double(), module.bias.detach().double()
            scale, shift = gamma * scale, gamma * shift + beta
        last: Any = self.layers[-1] if self.layers else None
        if isinstance(last, (nn.Conv2d, nn.Conv3d)):
            last.weight.data = (last.weight.double() * scale.reshape(-1, *[1] * (last.weight.ndim - 1))).to(
                last.weight
            )
            bias = shift if last.bias is None else last.bias.detach().double() * scale + shift
            last.bias = nn.Parameter(bias.to(last.weight))
        else:
            self._put(_Affine(scale.float(), shift.float()))

    def _shrink(self, name: str, rows: int, cols: int) -> None:
        self.rows, self.cols = self.rows - rows, self.cols - cols
        if min(self.rows, self.cols) < 1:
            raise NotDenseError(f"{name} needs more pixels than are left of a window.")

    @staticmethod
    def _check_stride(name: str, stride: tuple[int, ...]) -> None:
        if any(step != 1 for step in stride[-2:]):
            raise NotDenseError(f"{name} {_STRIDES}.")


class _BandConvolution(nn.Conv2d):
    """A 3-d convolution over rows, columns and the bands of a one-channel map, (1, B, H, W) → (1, O, B′, H, W).

    It is a 2-d convolution of all runs of k neighbouring bands, which takes a tenth of the time of the 3-d one.
    """

    def __init__(self, module: nn.Conv3d) -> None:
        self.depth, *kernel = module.kernel_size
        super().__init__(self.depth, module.out_channels, (kernel[0], kernel[1]), device="meta")
        self.depth_stride = module.stride[0]
        self.dilation = (module.dilation[1], module.dilation[2])
        self.weight = nn.Parameter(module.weight.detach()[:, 0].clone(memory_format=torch.channels_last))
        self.bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        runs = x[0].unfold(0, self.depth, self.depth_stride).permute(0, 3, 1, 2)
        return super().forward(runs).transpose(0, 1)[None]


class _StackedConvolution(nn.Conv2d):
    """A 2-d convolution of stacked 3-d maps, (1, C, B, H, W) → (1, O, H, W), as a sum over a few bands at a time.

    Channels-last 3-d maps are stacked by copying them; so the copy is small.
    """

    def __init__(self, module: nn.Conv2d, maps: int) -> None:
        bands, kernel = module.in_channels // maps, (module.kernel_size[0], module.kernel_size[1])
        super().__init__(module.in_channels, module.out_channels, kernel, device="meta")
        self.dilation = module.dilation
        weight = module.weight.detach().reshape(module.out_channels, maps, bands, *kernel)
        weight = weight.transpose(1, 2).flatten(1, 2)  # band by band
        self.weight = nn.Parameter(weight.clone(memory_format=torch.channels_last))
        self.bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        maps, bands = x.shape[1:3]
        few = max(192 // maps, 1)
        y: Tensor | None = None
        for first in range(0, bands, few):
            stacked = x[:, :, first : first + few].permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)
            weight = self.weight[:, maps * first : maps * (first + few)]
            part = F.conv2d(stacked, weight, self.bias if y is None else None, dilation=self.dilation)
            y = part if y is None else y.add_(part)
        assert y is not None
        return y


class _Affine(nn.Module):
    """Scales and shifts each channel: batch norm in evaluation mode, where no convolution comes before it."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        ones = [1] * (x.ndim - 2)
        return torch.addcmul(self.shift.reshape(-1, *ones), x, self.scale.reshape(-1, *ones))


def _channels_last(convolution: Any) -> Any:
    """With its weights laid out so that it answers channels-last, which is quicker on a CPU."""
    layout = torch.channels_last_3d if isinstance(convolution, nn.Conv3d) else torch.channels_last
    return convolution.to(memory_format=layout)


def _adds_axis(module: nn.Module | None) -> bool:
    return isinstance(module, Spectral) or (
        isinstance(module, nn.Unflatten) and len(module.unflattened_size) == 2 and module.unflattened_size[0] == 1
    )


def _stacks(module: nn.Module) -> bool:
    return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, 2)


def _slides_over_bands(module: Any) -> bool:
    return (
        isinstance(module, nn.Conv3d)
        and module.in_channels == module.groups == module.dilation[0] == 1
        and module.padding in ("valid", (0, 0, 0))
    )


def _refusal(name: str, module: nn.Module) -> NotDenseError:
    return NotDenseError(f"{name} ({type(module).__name__}) may look at its whole window.")


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])

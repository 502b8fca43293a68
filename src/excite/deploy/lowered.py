"""The layers of an optimised network on a CPU: convolutions with what follows them in one pass, gates, scales.

All take and give channels-last maps. They say in which forms they can work (``forms``), one of which is chosen by
measuring (:mod:`excite.deploy.choose`); every form gives the same numbers but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from excite.native import passes
from excite.native.passes import Branch, Excitation

Activation = tuple[str, tuple[Any, ...], str]
"""What follows a convolution, as oneDNN wants to hear it: its name, its numbers, its algorithm."""

NOTHING: Activation = ("none", (), "")
RELU: Activation = ("relu", (), "")


class Lowered(nn.Module):
    """A layer that can work in several forms.

    Attributes:
        form: the one in which it works.
    """

    form = "onednn"

    def forms(self) -> tuple[str, ...]:
        """What there is to choose from; the first is what it does unasked."""
        return (self.form,)

    def told(self) -> str:
        """What the layer is, for the report and as a key of what was measured."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What ``print(network)`` shows."""
        return f"{self.told()}, form={self.form}"


class Convolution(Lowered):
    """A convolution and the activation that follows it.

    Args:
        weight: (C′, C / groups, rows, columns), in the precision to compute in.
        bias: (C′,) or None.
        stride, padding, dilation: for (rows, columns).
        groups: cardinality.
        activation: what follows.
        sides: (N, C, H, W) of the example, for which the weight is laid out.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        activation: Activation,
        sides: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.activation, self.sides = activation, sides
        self.shape = tuple(weight.shape)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.bias: Tensor | None
        self._packed: dict[int, Tensor] = {}
        self._matrix: Tensor | None = None

    def told(self) -> str:
        """Its kernel, channels and what it is applied to."""
        out, _, rows, columns = self.shape
        n, channels, height, width = self.sides
        text = f"{rows}×{columns}, {channels}→{out} on {n}×{height}×{width}, stride {self.stride[0]}"
        text += f", groups {self.groups}" if self.groups > 1 else ""
        return text + (f", dilation {self.dilation[0]}" if self.dilation[0] > 1 else "")

    def forms(self) -> tuple[str, ...]:
        """As a convolution, and where it looks at single positions, as a product of two matrices."""
        pointwise = self.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        return ("onednn", "linear") if pointwise and self.activation in (NOTHING, RELU) else ("onednn",)

    def linear(self, x: Tensor, activation: str) -> Tensor:
        """A 1×1 convolution as a linear layer over all positions: the same map in channels-last order."""
        n, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        if self._matrix is None:
            plain = self.weight.flatten(1).contiguous()
            self._matrix = torch.ops.mkldnn._reorder_linear_weight(plain, len(rows))
        y = torch.ops.mkldnn._linear_pointwise(rows, self._matrix, self.bias, activation, [], "")
        return y.view(n, height, width, -1).permute(0, 3, 1, 2)

    def packed(self, images: int | None = None) -> Tensor:
        """The weight in the order that oneDNN wants for so many images, made when it is first used."""
        count = self.sides[0] if images is None else images
        if count not in self._packed:
            self._packed[count] = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, self.groups, [count, *self.sides[1:]]
            )
        return self._packed[count]

    def forget(self) -> None:
        """Let go of weights in other orders, such as those for forms that were tried; they are made again."""
        self._packed.clear()
        self._matrix = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C′, H′, W′)."""
        name, numbers, algorithm = self.activation
        if self.form == "linear":
            return self.linear(x, name)
        return torch.ops.mkldnn._convolution_pointwise(
            x,
            self.packed(),
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            name,
            list(numbers),
            algorithm,
        )


class ConvolutionAdd(Convolution):
    """A convolution, plus another map, and perhaps ReLU, in one pass.

    Args:
        overwrites: write the answer over the other map: nothing else needs it any more.
    """

    def __init__(self, *args: Any, overwrites: bool) -> None:
        super().__init__(*args)
        self.overwrites = overwrites

    def forms(self) -> tuple[str, ...]:
        """Only one: oneDNN's product of matrices does not take a sum and ReLU together."""
        return ("onednn",)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        """convolution(x) + other."""
        return _convolve_add(self, x, other, self.packed(), self.bias, self.overwrites)


def _convolve_add(
    layer: Convolution, x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, overwrites: bool
) -> Tensor:
    name, numbers, algorithm = layer.activation
    rest = (layer.padding, layer.stride, layer.dilation, layer.groups, "add", 1.0)
    then = (None, [], None) if name == "none" else (name, list(numbers), algorithm)
    if overwrites:
        return torch.ops.mkldnn._convolution_pointwise_.binary(other, x, weight, bias, *rest, *then)
    return torch.ops.mkldnn._convolution_pointwise.binary(x, other, weight, bias, *rest, *then)


class ScaledConvolutionAdd(ConvolutionAdd):
    """The end of a bottleneck whose gate is known before: gate · (W h + b) + shortcut, and perhaps ReLU.

    * ``pass``: the convolution, then one pass for the rest.
    * ``pass:K``: the same for K images at a time, so that the pass finds in the caches what the convolution wrote.
    * ``linear``: as ``pass``, the convolution as a product of two matrices.
    * ``weights``: the gate goes into the weights, image by image; the rest is in the pass of the convolution. What
      that costs is C′·C an image, what it saves is C′·H·W.
    """

    form = "pass"

    def forms(self) -> tuple[str, ...]:
        """Those that can pay for maps of this size."""
        channels, rows, columns = self.shape[1:]
        n, _, height, width = self.sides
        few = tuple(f"pass:{count}" for count in (1, 2, 4) if count < n)
        linear = ("linear",) if "linear" in Convolution.forms(self) else ()
        weights = ("weights",) if channels * rows * columns < height * width else ()
        return ("pass", *linear, *few, *weights)

    def told(self) -> str:
        """The convolution."""
        return f"scaled {super().told()}"

    def forward(self, h: Tensor, gate: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        """h (N, C, H, W), gate (N, C′), other (N, C′, H, W) → (N, C′, H, W)."""
        relu = self.activation == RELU
        if self.form in ("pass", "linear"):
            u = self.linear(h, "none") if self.form == "linear" else self._convolved(h, None)
            return _scaled(u, gate, other, relu)
        answer = passes.laid_out(other)
        if answer is other and not self.overwrites:
            answer = other.clone()
        if self.form == "weights":
            for n in range(len(h)):
                factor = gate[n].to(self.weight.dtype)
                weight = self.weight * factor.view(-1, 1, 1, 1)
                bias = None if self.bias is None else self.bias * factor
                _convolve_add(self, h[n : n + 1], answer[n : n + 1], weight, bias, overwrites=True)
            return answer
        count = int(self.form.partition(":")[2])
        for n in range(0, len(h), count):
            part = slice(n, n + count)
            _scaled(self._convolved(h[part], count), gate[part], answer[part], relu, answer[part])
        return answer

    def _convolved(self, h: Tensor, images: int | None) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            h, self.packed(images), self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )


def _scaled(u: Tensor, gate: Tensor, shortcut: Tensor | None, relu: bool, answer: Tensor | None = None) -> Tensor:
    """Over u, which nothing else needs, or where it is told."""
    if passes.available(u.dtype) and u.shape[1] % passes.LANES == 0:
        u = passes.laid_out(u)
        other = None if shortcut is None else passes.laid_out(shortcut)
        return passes.scale(u, gate.float().contiguous(), other, relu, u if answer is None else answer)
    factor = gate.to(u.dtype)[:, :, None, None]
    scaled = u.mul_(factor) if shortcut is None else torch.addcmul(shortcut, u, factor, out=u)
    scaled = scaled.relu_() if relu else scaled
    return scaled if answer is None else answer.copy_(scaled)


class Scale(Lowered):
    """gate · u (+ shortcut), and perhaps ReLU, in one pass.

    Args:
        relu: whether a ReLU follows.
        overwrites: whether nothing else needs u.
    """

    form = "pass"

    def __init__(self, relu: bool, overwrites: bool) -> None:
        super().__init__()
        self.relu, self.overwrites = relu, overwrites

    def told(self) -> str:
        """Its name."""
        return "scale"

    def forward(self, u: Tensor, gate: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """u (N, C, H, W), gate (N, C) → (N, C, H, W)."""
        return _scaled(u if self.overwrites else u.clone(), gate, shortcut, self.relu)


class SelectTwo(Lowered):
    """v + gate · (u − v): the selection between two branches, in one pass, written over u."""

    form = "pass"

    def told(self) -> str:
        """Its name."""
        return "select"

    def forward(self, u: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """u, v (N, C, H, W), gate (N, C) → (N, C, H, W)."""
        if passes.available(u.dtype) and u.shape[1] % passes.LANES == 0:
            u = passes.laid_out(u)
            return passes.select_two(u, passes.laid_out(v), gate.float().contiguous(), u)
        return torch.lerp(v, u, gate.to(u.dtype)[:, :, None, None])


class Gates(nn.Module):
    """Squeeze and excitation, or what makes the attention of two selective kernels, in one call.

    Args:
        reduce, expand: weight (out, in) and bias of the two layers.
        activation, function, factor: as of :class:`Excitation`.
        dtype: of the maps, and so of the weights.
    """

    def __init__(
        self,
        reduce: tuple[Tensor, Tensor | None],
        activation: str,
        expand: tuple[Tensor, Tensor | None],
        function: str,
        factor: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        for name, layer in (("reduce", reduce), ("expand", expand)):
            weight, bias = passes.packed_layer(*layer, dtype)
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_bias", bias)
        self.activation, self.function, self.factor = activation, function, factor
        self.channels = reduce[0].shape[1], reduce[0].shape[0], expand[0].shape[0]

    def excitation(self) -> Excitation:
        """Its layers."""
        held: dict[str, Any] = self._buffers  # not by attribute: that takes longer
        return Excitation(
            held["reduce"],
            held["reduce_bias"],
            self.activation,
            held["expand"],
            held["expand_bias"],
            self.function,
            self.factor,
            *self.channels[1:],
        )

    def forward(self, *maps: Tensor) -> Tensor:
        """One map (N, C, H, W), or two of which the means add up → gates (N, C′), float32."""
        return passes.gates(maps, self.excitation())

    def extra_repr(self) -> str:
        """What ``print(network)`` shows."""
        return f"{'→'.join(map(str, self.channels))}, {self.activation}, {self.function}"


class GroupedConvolution(Convolution):
    """A grouped convolution with as many channels out as in, and perhaps ReLU.

    * ``lanes``: a pass of ours that fills vectors with several groups.
    * ``onednn``: PyTorch's.
    """

    form = "lanes"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("lanes", passes.packed_groups(self.weight, self.weight.dtype))
        self.register_buffer("lanes_bias", None if self.bias is None else self.bias.float())

    def forms(self) -> tuple[str, ...]:
        """Both."""
        return ("lanes", "onednn")

    def branch(self) -> Branch:
        """What the pass is told."""
        held: dict[str, Any] = self._buffers
        return Branch(
            held["lanes"],
            held["lanes_bias"],
            self.shape[1],
            self.shape[2:],  # type: ignore[arg-type]
            self.padding,
            self.stride[0],
            self.dilation[0],
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H′, W′)."""
        if self.form == "onednn":
            return super().forward(x)
        return passes.grouped(passes.laid_out(x), self.branch(), self.activation == RELU)


class SelectiveKernels(Lowered):
    """Two branches of grouped convolutions, and the selection between them.

    * ``together``: a few images at a time go through all of it, so that the selection finds in the caches what the
      branches answered.
    * ``apart``: branch after branch, gates, selection.

    Args:
        first, second: the branches, each with its ReLU.
        gates: from both to the share of the first.
    """

    form = "together"

    def __init__(self, first: GroupedConvolution, second: GroupedConvolution, gates: Gates) -> None:
        super().__init__()
        self.first, self.second, self.gates, self.select = first, second, gates, SelectTwo()

    def forms(self) -> tuple[str, ...]:
        """Both."""
        return ("together", "apart")

    def told(self) -> str:
        """Its branches."""
        return f"select between {self.first.told()} and {self.second.told()}"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H′, W′)."""
        if self.form == "together":
            branches = self.first.branch(), self.second.branch()
            return passes.selective(passes.laid_out(x), branches, self.gates.excitation())
        u, v = self.first(x), self.second(x)
        return self.select(u, v, self.gates(u, v))

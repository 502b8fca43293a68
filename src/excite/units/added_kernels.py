"""Selective kernels around a convolution that is there already.

Paper: Li, Wang, Hu, Yang, "Selective Kernel Networks", arXiv 1903.06586.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .parts import check_positive, mean_over_positions


class AddedKernels(nn.Module):
    """Gives a convolution of a network further kernels, and chooses between all of them per image and channel.

    It is :class:`SelectiveKernel` (Sect. 3.1) for a network that is not to be built anew: the convolution stays where
    it is and is the first branch. ::

        U₁        = the convolution's own output, U₂ … U_M = its input through the new kernels      split
        s         = mean of U₁ + … + U_M over all positions                                         fuse      Eq. 1–2
        z         = ReLU(BN(W s)), of width d = max(C/r, L)                                         fuse      Eq. 3–4
        a₁ … a_M  = softmax over the branches of A₁ z … A_M z, per channel                          select    Eq. 5
        V         = factor · (a₁ · U₁ + … + a_M · U_M)                                              select    Eq. 6

    V takes the place of U₁. No branch has a batch norm or an activation of its own: the network's follow V. This is
    the one difference to the paper's branches, besides `factor`, which is 1 until :meth:`start_as_identity`.

    A new branch is the convolution's twin of another kernel: of the same class (weight-standardised, padding as
    TensorFlow does), stride, groups, device and precision, without bias, padded so that its windows have the centres
    of the convolution's. The new kernels are initialised after He et al. (fan-out, ReLU), the linear layers as is
    PyTorch's default.

    Args:
        convolution: the convolution that is there, with C output channels. It is read here and not kept.
        branches: the new kernels, M − 1 pairs (kernel, dilation). The paper's 5×5 is 3×3 with dilation 2.
        reduction: r.
        min_width: L, the least width of z.

    The submodules are `branches` (U₂ … U_M), `reduce` (W), `norm` and `activation` (of z), `expand` (A₁ … A_M, one
    below the other) and `gate` (the softmax, from logits (N, M, C) to attention (N, M, C), which `factor` does not
    scale). A forward hook on `gate` reads the attention; the unit itself stores nothing.

    A batch of one cannot be trained on: `norm` sees one value per channel then, and PyTorch raises ValueError.

    Raises:
        ValueError: not a Conv2d, or one whose weight is computed from other parameters; no branch, a number below 1,
            or a kernel that no padding centres on the convolution's; in `forward`, an x and u that do not belong
            together.
    """

    factor: Tensor

    def __init__(
        self,
        convolution: nn.Conv2d,
        branches: Sequence[tuple[int, int]],
        reduction: int = 16,
        min_width: int = 32,
    ) -> None:
        super().__init__()
        _check_convolution(convolution)
        check_positive(reduction=reduction, min_width=min_width)
        _check_branches(branches)
        channels, count = convolution.out_channels, 1 + len(branches)
        width = max(min_width, channels // reduction)
        like: dict[str, Any] = {"device": convolution.weight.device, "dtype": convolution.weight.dtype}
        self.branches = nn.ModuleList(_twin(convolution, kernel, dilation) for kernel, dilation in branches)
        self.reduce = nn.Linear(channels, width, bias=False, **like)
        self.norm = nn.BatchNorm1d(width, **like)
        self.activation = nn.ReLU(inplace=True)
        self.expand = nn.Linear(width, count * channels, bias=False, **like)
        self.gate = nn.Softmax(dim=1)
        self.register_buffer("factor", torch.tensor(1.0, dtype=torch.float32, device=like["device"]))

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Returns V, of the shape of `u`.

        Args:
            x: the convolution's input, (N, in_channels, H, W).
            u: its output U₁, (N, C, H′, W′).
        """
        maps = [u, *(branch(x) for branch in self.branches)]
        s = mean_over_positions(u)
        for added in maps[1:]:
            _check_same_size(u, added)
            s = s + mean_over_positions(added)
        z = self.activation(self.norm(self.reduce(s)))
        attention = self.gate(self.expand(z).unflatten(1, (len(maps), -1)))
        # Under autocast the softmax may have answered in another precision than the maps'.
        weights = (attention * self.factor).to(u.dtype)[:, :, :, None, None].unbind(1)
        v = u * weights[0]
        for m in range(1, len(maps)):
            v = torch.addcmul(v, maps[m], weights[m])
        return v

    def start_as_identity(self) -> None:
        """Makes the unit one that answers V = U₁ and can learn.

        The new kernels are zero, A is zero, and so each branch has the attention 1/M; `factor` = M makes up for it.
        From there both learn: a new kernel is in V with the weight 1, and A sees that U₁ is not what the others are.
        A softmax that is pushed to choose U₁ alone would pass next to nothing to either, and a ReLU at the end of a
        branch would pass nothing to a kernel of zeros.

        A weight-standardised kernel would come back from zero at full size with the first step. Where the convolution
        has a factor on it, a parameter `gain`, it is that which starts at zero; where it has none, as in Big
        Transfer's networks, the start is exact but the first step is a leap.
        """
        nn.init.zeros_(self.expand.weight)
        for branch in self.branches:
            parameters = dict(branch.named_parameters(recurse=False))
            nn.init.zeros_(parameters.get("gain", parameters["weight"]))
        self.factor.fill_(1 + len(self.branches))


def _check_same_size(u: Tensor, added: Tensor) -> None:
    if added.shape != u.shape:
        raise ValueError(
            f"a new kernel answers in the shape {tuple(added.shape)}, the convolution in {tuple(u.shape)}: give the "
            "convolution's own input and output of one run"
        )


torch.fx.wrap("mean_over_positions")  # they look at shapes: each is one node to a tracer
torch.fx.wrap("_check_same_size")


# --- the twin of a convolution -----------------------------------------------------------------------------------


Pair = tuple[int, int]


def _twin(convolution: nn.Conv2d, kernel: int, dilation: int) -> nn.Conv2d:
    """A convolution of the same class with another kernel and without bias, hooks, or what was attached to it."""
    new = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        kernel,
        stride=cast(Pair, convolution.stride),
        padding=_padding(convolution, kernel, dilation),
        dilation=dilation,
        groups=convolution.groups,
        bias=False,
        padding_mode=convolution.padding_mode,
        device=convolution.weight.device,
        dtype=convolution.weight.dtype,
    )
    # PyTorch's kaiming_normal_ counts the outputs of all groups, which starves a depthwise convolution.
    fan_out = new.out_channels * kernel**2 / new.groups
    nn.init.normal_(new.weight, std=math.sqrt(2 / fan_out))

    # Everything that a plain convolution has, hooks among it, is the new one's; what a subclass adds is copied.
    twin: nn.Conv2d = object.__new__(type(convolution))
    memo: dict[int, object] = {id(convolution): twin}
    added = {name: value for name, value in vars(convolution).items() if name not in vars(new)}
    twin.__dict__.update(vars(new), **copy.deepcopy(added, memo))
    for name, parameter in convolution.named_parameters(recurse=False):
        if name not in ("weight", "bias"):
            twin.register_parameter(name, nn.Parameter(parameter.detach().clone()))
    for name, buffer in convolution.named_buffers(recurse=False):
        stored = name not in convolution._non_persistent_buffers_set
        twin.register_buffer(name, buffer.detach().clone(), persistent=stored)
    if not _is_plain(convolution):
        for name, child in convolution.named_children():
            if not hasattr(child, "start_as_identity"):  # that is a unit, put there and called by a hook
                twin.add_module(name, copy.deepcopy(child, memo))
    return twin


def _padding(convolution: nn.Conv2d, kernel: int, dilation: int) -> str | Pair:
    """The padding with which a kernel's windows have the centres of the convolution's."""
    if convolution.padding == "same" or _pads_by_itself(convolution):
        return cast(str | Pair, convolution.padding)
    paddings = []
    for own, size in zip(_numbers(convolution), _effective(convolution), strict=True):
        padding, uneven = divmod(2 * own + dilation * (kernel - 1) + 1 - size, 2)
        if uneven or padding < 0:
            kernels = "×".join(map(str, convolution.kernel_size))
            raise ValueError(
                f"a kernel {kernel} with dilation {dilation} cannot answer in the size of the convolution {kernels} "
                f"with padding {own}: it would take a padding of {padding + uneven / 2:g}"
            )
        paddings.append(padding)
    return paddings[0], paddings[1]


def _pads_by_itself(convolution: nn.Conv2d) -> bool:
    """Whether its `padding` does not explain the size of its answer, as in subclasses that pad as TensorFlow does."""
    if _is_plain(convolution):
        return False
    sizes = _effective(convolution)
    # On one more than a multiple of the stride any padding that keeps ⌈size / stride⌉ shows.
    sides = [stride * size + 1 for stride, size in zip(convolution.stride, sizes, strict=True)]
    explained = [
        (side + 2 * padding - size) // stride + 1
        for side, padding, size, stride in zip(sides, _numbers(convolution), sizes, convolution.stride, strict=True)
    ]
    with torch.no_grad():  # `forward` and not a call: nothing that hooks to the convolution is to see this
        answer = convolution.forward(convolution.weight.new_zeros(1, convolution.in_channels, *sides))
    return list(answer.shape[2:]) != explained


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether it computes what PyTorch's does, so that no child of it is its own."""
    kind = type(convolution)
    return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward


def _numbers(convolution: nn.Conv2d) -> tuple[int, ...]:
    return (0, 0) if isinstance(convolution.padding, str) else convolution.padding  # "valid"


def _effective(convolution: nn.Conv2d) -> list[int]:
    """What its kernel spans, (height, width)."""
    return [
        dilation * (kernel - 1) + 1
        for kernel, dilation in zip(convolution.kernel_size, convolution.dilation, strict=True)
    ]


def _check_convolution(convolution: nn.Conv2d) -> None:
    if not isinstance(convolution, nn.Conv2d):
        raise ValueError(f"kernels are added to an nn.Conv2d, got {type(convolution).__name__}")
    if "weight" not in dict(convolution.named_parameters(recurse=False)):
        raise ValueError(
            "the weight of this convolution is computed from other parameters (a parametrization, a weight norm or "
            "pruning): take that out first"
        )


def _check_branches(branches: Sequence[tuple[int, int]]) -> None:
    if not branches:
        raise ValueError("give at least one new kernel, such as branches=[(3, 2)]")
    for branch in branches:
        if not isinstance(branch, (tuple, list)) or len(branch) != 2:
            raise ValueError(f"every branch is a pair (kernel, dilation), got {branch!r}")
        check_positive(kernel=branch[0], dilation=branch[1])

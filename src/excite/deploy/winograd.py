"""3×3 convolutions with half of the multiplications.

Four rows of the answer hang on six rows of the input. Taken one by one they cost 4 · 3 multiplications of rows for
each column of the kernel; six combinations of the input's rows, each with one combination of the kernel's, give the
same four rows with 6 (Winograd's F(4, 3); Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks",
arXiv 1509.09308, Sect. 4.3). Along the rows only, not along the columns too: that loses little to rounding, and what
is left are convolutions with kernels of 1×3, which libraries are good at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ROWS = 4
"""Rows of the answer that are found together."""

_FEWEST_CHANNELS = 32  # with fewer, the combinations cost more than they save

# What becomes of the kernel's rows, G of Eq. 18 there; exact in double precision but for the rounding of its thirds.
_KERNEL_ROWS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def pays(convolution: nn.Conv2d) -> bool:
    """Whether a convolution is one that this is quicker for: 3×3, many channels, in fp32 on a CPU.

    Elsewhere bfloat16 would lose too much to the combinations, and GPUs have ways of their own.
    """
    weight = convolution.weight
    return (
        convolution.kernel_size == (3, 3)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and min(weight.shape[:2]) >= _FEWEST_CHANNELS
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def combined_kernels(weight: Tensor) -> tuple[Tensor, ...]:
    """The six combinations of a kernel's rows: (O, C, 3, 3) → six of (O, C, 1, 3)."""
    combine = torch.tensor(_KERNEL_ROWS, dtype=torch.float64)
    kernels = torch.einsum("jr,ocrk->jock", combine, weight.detach().double()).unsqueeze(3).float()
    return tuple(kernel.contiguous(memory_format=torch.channels_last) for kernel in kernels)


def convolve(rows: Tensor, kernels: Sequence[Tensor], bias: Tensor | None, out: Tensor) -> None:
    """The convolution, padded by zeros to the left and right and not above and below.

    Args:
        rows: (1, C, n + 2, W), channels last.
        kernels: of :func:`combined_kernels`.
        bias: (O,).
        out: where the answer goes, (1, O, n, W), n a multiple of ``ROWS``.
    """
    count = out.shape[2]
    d = [rows[:, :, first : first + count - ROWS + 1 : ROWS] for first in range(6)]
    # Bᵀ d of Eq. 18, with what its rows have in common.
    even, odd = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    v1, v2 = even + odd, even.sub_(odd)
    even, odd = torch.sub(d[4], d[2]), torch.sub(d[3], d[1])
    v3, v4 = torch.add(even, odd, alpha=2), torch.sub(even, odd, alpha=2)
    v0 = even.add_(torch.sub(d[0], d[2]), alpha=4)
    v5 = torch.sub(d[5], d[3]).sub_(odd, alpha=4)
    # The bias goes to the product that every row of the answer holds once.
    m0, m1, m2, m3, m4, m5 = (
        torch.conv2d(v, kernel, bias if number == 1 else None, padding=(0, 1))
        for number, (v, kernel) in enumerate(zip((v0, v1, v2, v3, v4, v5), kernels, strict=True))
    )
    # Aᵀ m.
    near, near_apart = m1 + m2, m1.sub_(m2)
    far, far_apart = m3 + m4, m3.sub_(m4)
    y0, y1, y2, y3 = (out[:, :, number::ROWS] for number in range(ROWS))
    torch.add(near_apart, far_apart, alpha=2, out=y1)
    torch.add(near, far, alpha=4, out=y2)
    torch.add(near.add_(far), m0, out=y0)
    torch.add(near_apart.add_(far_apart, alpha=8), m5, out=y3)

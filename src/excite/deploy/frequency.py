"""A convolution with a large kernel, done as products in the frequency domain.

The map is cut into blocks that overlap by the kernel less one ("overlap–save": Oppenheim & Schafer, "Discrete-Time
Signal Processing", Sect. 8.7.3); of each block the discrete Fourier transform is taken, multiplied by that of the
kernel, and taken back. The blocks are so small that the transforms are best done as matrix products: these leave the
numbers where the next product wants them, and compute of the way back only what is kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 32
"""About the side of what a block answers, in pixels."""


def pays(channels: int, outputs: int, kernel: tuple[int, int]) -> bool:
    """Whether a convolution is quicker in the frequency domain, judged by counts of multiply–adds per pixel."""
    size, cols = kernel
    if size != cols or size < 2:
        return False
    side = BLOCK + size - 1
    waves = side // 2 + 1
    products = 4 * side * waves * channels * outputs / BLOCK**2
    transforms = 6 * side * side * waves * (channels + outputs) / BLOCK**2
    return 2 * (products + transforms) < size * size * channels * outputs  # many small products are slower than one


class FrequencyConv2d(nn.Module):
    """A convolution with a stride of 1 and no padding, for inference.

    Args:
        weight: (O, C, k, k), float32.
        bias: (O,), or None.
        width: about how wide its answers will be: the blocks are chosen so that few of their pixels lie beyond.
    """

    columns: Tensor
    rows: Tensor
    rows_back: Tensor
    columns_back: Tensor
    kernel_rows: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, width: int = 5 * BLOCK) -> None:
        super().__init__()
        outputs, channels, kernel, _ = weight.shape
        self.kernel, self.block = kernel, -(-width // -(-width // BLOCK))
        self.side = side = self.block + kernel - 1
        waves = side // 2 + 1
        cosine, sine = _waves(waves, side, side)
        columns = torch.stack((cosine, -sine), 1)  # wave, re/im; column
        cosine, sine = _waves(side, side, side)
        rows = torch.stack((torch.stack((cosine, sine), 1), torch.stack((-sine, cosine), 1)), 1)
        cosine, sine = _waves(side, self.block, side)
        rows_back = torch.stack((torch.stack((cosine, -sine), 1), torch.stack((sine, cosine), 1))) / side
        # A block is real: the waves beyond the half are the conjugates of those before it.
        twins = torch.full((waves, 1), 2.0, dtype=torch.float64)
        twins[0] = 1
        if side % 2 == 0:
            twins[-1] = 1
        cosine, sine = _waves(waves, self.block, side)
        columns_back = torch.stack((cosine * twins, -sine * twins), 1) / side

        def keep(name: str, values: Tensor) -> None:
            self.register_buffer(name, values.to(weight))

        keep("columns", columns.reshape(2 * waves, side))
        # (wave, re/im) × (re/im, row)
        keep("rows", rows.reshape(2 * side, 2 * side))
        # (re/im, row) × (wave, re/im)
        keep("rows_back", rows_back.permute(0, 3, 1, 2).reshape(2 * self.block, 2 * side))
        keep("columns_back", columns_back.reshape(2 * waves, self.block).T.contiguous())
        # The network's convolution is a correlation: the transform of its kernel is conjugated. Only the half of it
        # along the columns is kept: the whole would be three times as large, 150 MB for HybridSN.
        conjugate = rows[..., :kernel] * torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None, None]
        keep("kernel_rows", conjugate.reshape(2 * side, 2 * kernel))
        pixels = weight.detach().permute(3, 2, 1, 0).reshape(kernel, -1)
        halfway = (self.columns[:, :kernel] @ pixels).view(waves, 2 * kernel, channels, outputs)
        self.register_buffer("weight", halfway)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, H, W) → (1, O, H − k + 1, W − k + 1), both channels-last."""
        _, channels, height, width = x.shape
        high, wide = height - self.kernel + 1, width - self.kernel + 1
        block, side, outputs = self.block, self.side, self.weight.shape[-1]
        down, across = -(-high // block), -(-wide // block)
        count = down * across
        blocks = F.pad(x[0], (0, across * block - wide, 0, down * block - high))
        blocks = blocks.unfold(1, side, block).unfold(2, side, block)  # C, down, across, row, column
        blocks = blocks.permute(4, 3, 1, 2, 0).reshape(side, -1)
        halfway = (self.columns @ blocks).view(-1, 2 * side, count * channels)
        answers = x.new_empty(len(halfway), 2 * block, count * outputs)
        for wave, answer in enumerate(answers):
            whole = (self.rows @ halfway[wave]).view(side, 2, count, channels)
            turned = torch.stack((-whole[:, 1], whole[:, 0]), 1)
            weight = (self.kernel_rows @ self.weight[wave].flatten(1)).view(side, 2, channels, outputs)
            product = torch.bmm(whole.flatten(1, 2), weight[:, 0])
            product.baddbmm_(turned.flatten(1, 2), weight[:, 1])
            torch.mm(self.rows_back, product.view(2 * side, count * outputs), out=answer)
        pieces = self.columns_back @ answers.view(len(self.columns), -1)
        pieces = pieces.view(block, block, down, across, outputs)
        y = torch.empty(high, wide, outputs, device=x.device, dtype=x.dtype)
        for i in range(down):
            for j in range(across):
                place = y[i * block : (i + 1) * block, j * block : (j + 1) * block]
                place.copy_(pieces[: place.shape[1], : place.shape[0], i, j].transpose(0, 1))
        if self.bias is not None:
            y += self.bias
        return y.permute(2, 0, 1)[None]


def _waves(waves: int, points: int, side: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first waves at the first points of a block, float64 (waves, points)."""
    turns = torch.outer(torch.arange(waves), torch.arange(points)) % side  # exact, in whole numbers
    angles = turns.double() * (2 * math.pi / side)
    return angles.cos(), angles.sin()

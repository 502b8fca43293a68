"""A denoising network on whole images of any size, in bounded memory.

A network that is a chain of convolutions is given the image in strips of rows (:mod:`excite.deploy.strips`); an
image that is wider than ``WIDEST`` is cut into parts side by side, each with as many pixels of its neighbours as the
network sees. At the image's own edge lies what lies there in one pass over the whole image, zeros in front of every
convolution, so that the answer is the same but for the rounding of sums. A network that looks at the whole image at
once, as attention does, cannot be given parts of it: it gets the image as it is, as long as it is not too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from excite.arguments import known
from excite.deploy.batch_norm import merge_batch_norm
from excite.deploy.strips import Layer, Strips, layers_of, quicker
from excite.errors import ExciteError, UsageError
from excite.memory_format import to_channels_last

Pixels = npt.NDArray[Any]
Step = Callable[[int, int], object]
"""Called with (pixels done, in all)."""
Precision = Literal["fp32", "bf16"]

WIDEST = 2048
"""How many columns of an image are worked on at once, at most."""

STRIP = {("cpu", "fp32"): 1 << 15, ("cpu", "bf16"): 1 << 17}
"""Pixels of a strip, as measured: what the caches hold of the hidden maps that are made of one layer."""

STRIP_ELSEWHERE = 1 << 20
"""Pixels of a strip that keep a GPU busy."""

MOST_AT_ONCE = 1 << 22
"""Pixels of the largest image for a network that looks at all of it: each of its hidden maps then takes 1 GiB."""

_WHITE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


def white_of(dtype: npt.DTypeLike) -> int:
    """The value of white in pixels of this type: 255, 65535, or 1 for floats.

    Raises:
        UsageError: it is another type.
    """
    dtype = np.dtype(dtype)
    if dtype in _WHITE:
        return _WHITE[dtype]
    if dtype in (np.float16, np.float32, np.float64):
        return 1
    raise UsageError(f"Pixels of type {dtype} have no known white: expected uint8, uint16, or floats from 0 to 1.")


class Denoiser:
    """A network made ready to denoise images: for evaluation, its batch norms merged, its weights laid out for speed.

    Args:
        network: noisy images (N, C, H, W) of values from 0 to 1 → denoised ones of the same shape. It is copied.
        device: where to compute.
        precision: ``fp32``, or ``bf16`` for half the memory and on many processors about twice the speed: the hidden
            maps are bfloat16 then, and what the network takes from the image is still taken in fp32.
        tile: how many columns are worked on at once, at most; by default ``WIDEST``. It must be more than twice the
            network's halo.

    Attributes:
        channels: C, where the network says so.
        halo: how many pixels an output pixel sees in each direction; None where it sees the whole image.

    Raises:
        UsageError: an unknown precision, or a tile that is too narrow.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        tile: int | None = None,
    ) -> None:
        known(precision, ["fp32", "bf16"], "precision")
        self.device = torch.device(device)
        self.precision = precision
        merged = merge_batch_norm(network).to(self.device)
        to_channels_last(merged)
        merged.requires_grad_(False)
        self.channels: int | None = getattr(merged, "in_channels", None)
        self.residual = bool(getattr(merged, "residual", False))
        self._network = merged
        layers = layers_of(merged)
        if layers is not None and precision == "bf16":
            _halve(layers)
        self._layers = None if layers is None else [quicker(layer) for layer in layers]
        self.halo = None if layers is None else sum(max(layer.reach) for layer in layers)
        self.tile = WIDEST if tile is None else tile
        if self.halo is not None and self.tile <= 2 * self.halo:
            raise UsageError(
                f"tile is {self.tile}: its pixels see {self.halo} pixels in each direction, so that it must be more "
                f"than {2 * self.halo} pixels wide."
            )

    @torch.inference_mode()
    def __call__(
        self, image: Pixels | Tensor, *, out: Pixels | None = None, progress: Step | None = None
    ) -> npt.NDArray[Any]:
        """Denoise one image.

        Args:
            image: (C, H, W): uint8, uint16, or floats of values from 0 to 1 (noise may lead beyond). A strip is read
                at a time: a memory map will do.
            out: where the answer goes, an array of the same shape, uint8 and uint16 rounded; not the image itself.
                By default a new one of float32.
            progress: called with (pixels done, in all).

        Returns:
            ``out``: values from 0 to white, clipped.

        Raises:
            UsageError: another number of channels or dimensions, another type, no pixels.
            ExciteError: the network looks at the whole image at once, and it is larger than ``MOST_AT_ONCE``.
        """
        pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
        self._check(pixels)
        if out is None:
            out = np.empty(pixels.shape, np.float32)
        elif out.shape != pixels.shape:
            raise UsageError(f"out has shape {out.shape}, but the image has {pixels.shape}.")
        white, white_out = white_of(pixels.dtype), white_of(out.dtype)
        height, width = pixels.shape[1:]
        done = 0
        parts = self._whole(pixels, white) if self._layers is None else self._in_strips(pixels, white)
        for top, left, answer in parts:
            values = answer.clamp_(0, 1).mul_(white_out)
            if white_out > 1:
                values = values.round_()
            rows, cols = values.shape[1:]
            out[:, top : top + rows, left : left + cols] = values.cpu().numpy()
            done += rows * cols
            if progress:
                progress(done, height * width)
        return out

    def _check(self, pixels: Pixels) -> None:
        if pixels.ndim != 3 or 0 in pixels.shape:
            raise UsageError(f"An image is (C, H, W) with at least one pixel, not {pixels.shape}.")
        if self.channels is not None and pixels.shape[0] != self.channels:
            raise UsageError(
                f"The network was built for images of {self.channels} channels, and this one has {pixels.shape[0]}."
            )

    def _whole(self, pixels: Pixels, white: int) -> Iterator[tuple[int, int, Tensor]]:
        height, width = pixels.shape[1:]
        if height * width > MOST_AT_ONCE:
            raise ExciteError(
                f"An image of {height} × {width} pixels is too large for a network whose attention looks at all of "
                f"it: it cannot be cut into parts with the same result, and {MOST_AT_ONCE:,} pixels are the most "
                "that are held in memory at once. Cut the image yourself, or take a network without attention."
            )
        image = self._values(pixels, white)[None].contiguous(memory_format=torch.channels_last)
        # Takes the noise from the image in fp32, since the image stays in it.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            answer = self._network(image)
        yield 0, 0, answer[0].float()

    def _in_strips(self, pixels: Pixels, white: int) -> Iterator[tuple[int, int, Tensor]]:
        """Top row, first column and values of what is finished, of the image clipped to none."""
        assert self._layers is not None
        assert self.halo is not None
        height, width = pixels.shape[1:]
        cuts = _cuts(width, self.tile, self.halo)
        # All parts are as wide as the widest with its halo, so that each finds the memory that the last one left.
        span = max(min(right + self.halo, width) - max(left - self.halo, 0) for left, right in cuts)
        for left, right in cuts:
            west = min(max(left - self.halo, 0), width - span)
            east = west + span
            most = STRIP.get((self.device.type, self.precision), STRIP_ELSEWHERE)
            strips_in_all = -(-height // max(1, most // (east - west)))
            rows = -(-height // strips_in_all)
            strips = Strips(self._layers, east - west)
            done = 0
            for top in range(0, height, rows):
                strip = self._values(pixels[:, top : top + rows, west:east], white)
                answer = strips.push(strip[None], last=top + rows >= height)
                if answer is None:
                    continue
                values = answer[0, :, :, left - west : right - west].float()
                bottom = done + values.shape[1]
                if self.residual:
                    values = self._values(pixels[:, done:bottom, left:right], white) - values
                yield done, left, values
                done = bottom

    def _values(self, pixels: Pixels, white: int) -> Tensor:
        """As float32 from 0 to 1, on the device."""
        values = pixels.astype(np.float32)
        return torch.from_numpy(values).to(self.device).mul_(1 / white)


def denoise(
    network: nn.Module,
    image: Pixels | Tensor,
    *,
    device: str | torch.device = "cpu",
    tile: int | None = None,
    precision: str = "fp32",
    progress: Step | None = None,
) -> npt.NDArray[np.float32]:
    """Denoise one image (C, H, W): float32 values from 0 to 1, clipped; arguments and errors as :class:`Denoiser`."""
    return Denoiser(network, device=device, precision=precision, tile=tile)(image, progress=progress)


def _halve(layers: list[Layer]) -> None:
    """Turn all layers but the first to bfloat16, in place.

    The first reads the image, whose rounding would be seen in the answer.
    """
    _round_biases(layers[1:])
    for layer in layers[1:]:
        for module in (layer.convolution, *layer.after):
            module.to(torch.bfloat16)


@torch.no_grad()
def _round_biases(layers: list[Layer]) -> None:
    """Scale channels so that their biases are bfloat16 numbers, in place; what the layers answer stays the same.

    A bias that is rounded is the same error at every position, and would weigh more than the rounding of kernels.
    Where a ReLU follows, a channel may be scaled by any positive number if the kernels that read it are scaled by its
    inverse.
    """
    for layer, following in pairwise(layers):
        convolution, bias = layer.convolution, layer.convolution.bias
        if bias is None or following.convolution.groups > 1 or any(type(m) is not nn.ReLU for m in layer.after):
            continue
        scale = bias.bfloat16().float() / bias
        scale[~scale.isfinite() | (scale <= 0)] = 1
        bias.copy_(bias.bfloat16())
        convolution.weight.mul_(scale.view(-1, 1, 1, 1))
        following.convolution.weight.div_(scale.view(1, -1, 1, 1))


def _cuts(width: int, most: int, halo: int) -> list[tuple[int, int]]:
    """Columns from … to …, as few and as equal as can be, each with its halo no wider than ``most``."""
    count = 1 if width <= most else -(-width // (most - 2 * halo))
    edges = [width * i // count for i in range(count + 1)]
    return list(pairwise(edges))

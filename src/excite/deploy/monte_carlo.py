"""Monte Carlo dropout: a network asked several times with dropout left on.

Source: Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation", arXiv 1506.02142. Only dropout works as in
training; batch norm stays in evaluation mode. What comes before the first dropout is the same in every pass and is
computed once.

Which numbers are dropped is a function of (seed, pass, pixel, layer) alone: it hangs neither on tiles, batches or the
device, nor on whether the network is applied to windows or to the whole scene.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from excite.data import draws
from excite.deploy.dense import is_chain
from excite.errors import UsageError

_ROWS = 4096  # pixels at a time, so that their numbers stay in the cache


class MonteCarlo:
    """The two parts of a network: before the first dropout, and from there on.

    Args:
        network: in evaluation mode; a chain is cut before its first dropout, any other network is asked whole.
        passes: how often to ask, at least 1.
        seed: of the draws.

    Attributes:
        before: what is computed once.

    Raises:
        UsageError: the network has no dropout.
    """

    def __init__(self, network: nn.Module, passes: int, seed: int) -> None:
        if passes < 1:
            raise UsageError(f"{passes} passes: Monte Carlo dropout takes at least one, and 20 or more to be of use.")
        self.passes, self.seed = passes, seed
        self.turn = 0
        self.pixels: npt.NDArray[np.int64] = np.empty(0, np.int64)
        found = [module for module in network.modules() if _drops(module)]
        if not found:
            raise UsageError("The network has no dropout: every pass would give the same answer.")
        self.before, self.after = _cut(network)
        for number, module in enumerate(found):
            module.register_forward_hook(self._hook(number))

    @torch.inference_mode()
    def probabilities(self, features: Tensor, pixels: npt.NDArray[np.int64]) -> Tensor:
        """The mean of the softmax over the passes.

        Args:
            features: what ``before`` answered, (N, …).
            pixels: a number for each of them, which its draws hang on, (N,).

        Returns:
            (N, classes).
        """
        parts = []
        for start in range(0, len(features), _ROWS):
            rows = features[start : start + _ROWS]
            self.pixels = pixels[start : start + _ROWS]
            total: Tensor | None = None
            for turn in range(self.passes):
                self.turn = turn
                shares = self.after(rows).float().softmax(1)
                total = shares if total is None else total.add_(shares)
            assert total is not None
            parts.append(total / self.passes)
        return torch.cat(parts)

    def _hook(self, number: int) -> Any:
        def drop(module: Any, _inputs: Any, output: Tensor) -> Tensor:
            # Dropout of whole channels leaves the same out at all positions.
            whole = type(module) is not nn.Dropout
            shape = output.shape[1:2] if whole else output.shape[1:]
            keep = _keep(self.seed, self.turn, self.pixels, f"dropout {number}", math.prod(shape), module.p)
            mask = torch.from_numpy(keep).to(output.device).reshape(len(output), *shape)
            mask = mask.reshape(*mask.shape, *[1] * (output.ndim - mask.ndim))
            return output * mask / (1 - module.p) if module.p < 1 else output * 0

        return drop


def _keep(
    seed: int, turn: int, pixels: npt.NDArray[np.int64], stream: str, count: int, p: float
) -> npt.NDArray[np.bool_]:
    """True where a number stays, (N, count): four draws of 16 bits from each of 64."""
    words = draws.bits(seed, turn, pixels, stream, -(-count // 4))
    return words.view(np.uint16)[:, :count] >= np.uint16(min(round(p * 65536), 65535))


def _drops(module: nn.Module) -> bool:
    return isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)) and module.p > 0


def _cut(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A chain before its first dropout, and the rest."""
    if not is_chain(network):
        return nn.Identity(), network
    parts = list(network.named_children())
    cut = next(i for i, (_, child) in enumerate(parts) if any(_drops(module) for module in child.modules()))
    return nn.Sequential(OrderedDict(parts[:cut])), nn.Sequential(OrderedDict(parts[cut:]))

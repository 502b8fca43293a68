"""Attention units: plain `torch.nn.Module`s, one file each, that import nothing else of excite."""

from .selective_kernel import SelectiveKernel
from .squeeze_excite import SqueezeExcite

__all__ = ["SelectiveKernel", "SqueezeExcite"]

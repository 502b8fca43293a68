"""Attention units: plain `torch.nn.Module`s, one file each, that import nothing else of excite."""

from .added_kernels import AddedKernels
from .cbam import ConvolutionalBlockAttention
from .efficient_channel import EfficientChannelAttention
from .parts import Scaled
from .selective_kernel import SelectiveKernel
from .squeeze_excite import SqueezeExcite

__all__ = [
    "AddedKernels",
    "ConvolutionalBlockAttention",
    "EfficientChannelAttention",
    "Scaled",
    "SelectiveKernel",
    "SqueezeExcite",
]

"""What a network costs on paper: parameters and multiply–adds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from excite.errors import UsageError


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply–adds (MACs) of one forward pass of one image.

    MACs are counted as the papers count them (their "GFLOPs" are GMACs): convolutions and matrix products, which
    is to say linear layers and attention; pooling, batch norm, activations and additions are left out.
    """

    parameters: int
    macs: int


def cost(module: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Count what a network costs, without doing its arithmetic.

    The forward pass is run in eval mode on a copy whose tensors have shapes but no contents (PyTorch's meta
    device). A network that cannot run so is run once for real, on its own device. Either way the module given stays
    as it was: its mode, its device, its parameters and buffers.

    Args:
        module: any network that takes one tensor.
        input_shape: of one input without the batch, such as (3, 224, 224).

    Raises:
        UsageError: the network does not take an input of that shape, or has not made its parameters yet.
    """
    shape = tuple(int(size) for size in input_shape)
    if not shape or min(shape) < 1:
        raise UsageError(f"An input shape is positive whole numbers such as (3, 224, 224), not {tuple(input_shape)}.")
    module = getattr(module, "_orig_mod", module)  # what torch.compile wrapped: nothing is to be compiled here
    if any(is_lazy(parameter) for parameter in module.parameters()):
        raise UsageError(f"{type(module).__name__} makes its parameters when it first runs: run it once, then ask.")
    parameters = sum(parameter.numel() for parameter in module.parameters())
    try:
        macs = _macs(hollow_copy(module).eval(), shape, torch.device("meta"))
    except Exception:  # whatever a foreign forward may raise on meta tensors; the real run says what is wrong
        macs = _macs_for_real(module, shape)
    return Cost(parameters, macs)


def macs_of(module: nn.Module, *shapes: Sequence[int]) -> int:
    """The multiply–adds of one call of a module with tensors of these shapes, batch included; as :func:`cost`."""
    return _count(hollow_copy(module).eval(), *(torch.empty(*shape, device="meta") for shape in shapes))


def hollow_copy(module: nn.Module) -> nn.Module:
    """The same modules with meta tensors for parameters and buffers: takes no memory worth speaking of."""
    hollow: dict[int, Tensor] = {}
    for parameter in module.parameters():
        hollow[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        hollow[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, dict(hollow))  # deepcopy takes what its memo already holds


def _macs_for_real(module: nn.Module, shape: tuple[int, ...]) -> int:
    device = next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    modes = {child: child.training for child in module.modules()}
    try:
        return _macs(module.eval(), shape, device)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{type(module).__name__} does not run on an input of shape {shape}: {reason}.") from error
    finally:
        for child, training in modes.items():
            child.training = training


def _macs(network: nn.Module, shape: tuple[int, ...], device: torch.device) -> int:
    floating = (tensor.dtype for tensor in network.parameters() if tensor.is_floating_point())
    return _count(network, torch.zeros(1, *shape, dtype=next(floating, torch.float32), device=device))


def _count(module: nn.Module, *inputs: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2  # a multiply–add is two floating-point operations

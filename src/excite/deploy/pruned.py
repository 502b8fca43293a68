"""What pruning did to a network, as plain data, and the same network built again from it.

A pruned network is that of no spec: it is that of a spec with some shortcuts, units and widths changed. Its record
says which, so that it can be built without the library that pruned it, and filled from a file of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from excite.deploy.constant_gates import place_constant_gates
from excite.deploy.routes import ChannelRoute, put_route
from excite.errors import ExciteError

Record = dict[str, Any]
"""``{"routes": paths of shortcuts, "units": see replace_constant_gates, "layers": {path: {attribute or tensor: its
width or shape}}, "kept": {group: the channels that stayed}}``."""

_WIDTHS = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels",
    "normalized_shape",
)  # fmt: skip

Widths = dict[str, dict[str, Any]]


def widths_of(network: nn.Module) -> Widths:
    """Of every module that has any: the numbers of channels that it knows of, and the shapes of its own tensors."""
    found: Widths = {}
    for path, module in network.named_modules():
        own = {name: getattr(module, name) for name in _WIDTHS if _is_number(getattr(module, name, None))}
        if isinstance(module, ChannelRoute):
            del own["out_channels"]  # which follows from its buffer
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        own |= {name: list(tensor.shape) for name, tensor in tensors.items()}
        if own:
            found[path] = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
    return found


def changed_widths(before: Widths, after: Widths) -> Widths:
    """What of the widths is not as it was."""
    return {path: own for path, own in after.items() if own != before.get(path)}


def rebuild(network: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Do to a network what a record says, in place; what is in its layers comes with the weights.

    Args:
        network: as the spec builds it, or after an earlier record.
        record: of one pruning.

    Raises:
        ExciteError: the record is of another network.
    """
    try:
        for path in record["routes"]:
            put_route(network, path)
        place_constant_gates(network, record["units"])
        for path, widths in record["layers"].items():
            _resize(network.get_submodule(path), widths)
    except (KeyError, AttributeError, AssertionError, TypeError) as error:
        raise ExciteError(
            f"The record of pruning is damaged, or of another network than {type(network).__name__}: it speaks of "
            f"{error}."
        ) from error
    return network


def _resize(module: nn.Module, widths: Mapping[str, Any]) -> None:
    for name, value in widths.items():
        held = getattr(module, name)
        if isinstance(held, nn.Parameter):
            setattr(module, name, nn.Parameter(torch.zeros(value, dtype=held.dtype), held.requires_grad))
        elif isinstance(held, torch.Tensor):
            setattr(module, name, torch.zeros(value, dtype=held.dtype))
        else:
            setattr(module, name, tuple(value) if isinstance(value, list) else value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(item, int) for item in value))

"""Parameters divided among processes (fully sharded data parallel), and whole again for a checkpoint.

A checkpoint holds whole tensors, so that it can be gone on with by another number of processes, or by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, mesh: Any) -> None:
    """Leave with each process a share of every parameter; the whole is put together part by part when it is needed.

    Args:
        network: changed in place. Its children come together one at a time, stages of blocks block by block.
        mesh: the processes.
    """
    for child in network.children():
        blocks = list(child.children()) if isinstance(child, nn.Sequential) else [child]
        for block in blocks:
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(state: Any) -> Any:
    """A state with every tensor that lies with several processes put together on the CPU; all have to call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    return state


def shared_out(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's whole state, every tensor of which is divided as the parameter that it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    divided = {}
    for number, values in state["state"].items():
        parameter = parameters[number]
        divided[number] = {
            key: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for key, value in values.items()
        }
    return {**state, "state": divided}

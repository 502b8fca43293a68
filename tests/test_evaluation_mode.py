"""A network that was asked something is afterwards as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from excite.evaluation_mode import evaluation_mode


def half_frozen() -> nn.Sequential:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(4)))
    network.train()
    network[1].eval()
    return network


def test_every_module_gets_its_own_mode_back() -> None:
    network = half_frozen()
    before = [module.training for module in network.modules()]
    assert len(set(before)) == 2
    with evaluation_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == before


def test_a_failure_inside_changes_nothing_of_it() -> None:
    network = half_frozen()
    with pytest.raises(RuntimeError), evaluation_mode(network, "cpu"):
        network(torch.zeros(1, 5, 8, 8))
    assert network.training
    assert not network[1].training


def test_one_without_tensors_can_be_asked() -> None:
    with evaluation_mode(nn.Identity(), "cpu"):
        pass


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator to move it to")
def test_it_is_where_it_was() -> None:
    network = half_frozen()
    accelerator = torch.accelerator.current_accelerator()
    with evaluation_mode(network, accelerator):
        assert network[0].weight.device.type == accelerator.type
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}

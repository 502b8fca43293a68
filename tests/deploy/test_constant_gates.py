import copy
import json

import pytest
import torch
from torch import nn

from excite.analysis.gates import find_gates
from excite.create import create
from excite.deploy.constant_gates import ConstantScale, place_constant_gates, replace_constant_gates
from excite.units.squeeze_excite import SqueezeExcite


def trained(spec, size=32):
    """A network whose batch norms are not the identity."""
    torch.manual_seed(0)
    network = create(spec, 10).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return network, torch.randn(4, 3, size, size)


def hold_constant(network, names, bias):
    """Make the gates of some units the same for all images; returns them by the unit's name."""
    constants = {}
    for name in names:
        unit = network.get_submodule(name)
        with torch.no_grad():
            unit.expand.weight.zero_()
            unit.expand.bias[:] = bias(len(unit.expand.bias))
            constants[name] = unit.gate(unit.expand.bias[None])[0].double()
    return constants


@pytest.mark.parametrize("spec", ["resnet20+se", "resnet20+se:init=paper", "resnet50+se"])
def test_a_gate_of_one_half_is_folded_and_every_bit_stays(spec):
    network, images = trained(spec)
    gates = find_gates(network, images)
    constants = hold_constant(network, [gate.name for gate in gates], torch.zeros)
    assert all((value == 0.5).all() for value in constants.values())
    with torch.inference_mode():
        before = network(images)
        records = replace_constant_gates(network, gates, constants, images)
        after = network(images)
    assert len(records) == len(gates)
    assert {record["how"] for record in records} == {"folded"}
    assert not any(isinstance(module, (SqueezeExcite, ConstantScale)) for module in network.modules())
    assert torch.equal(before, after)


def test_any_constant_gate_is_folded_up_to_rounding():
    network, images = trained("resnet20+se")
    gates = find_gates(network, images)
    constants = hold_constant(network, ["layer1.1.se", "layer3.2.se"], torch.randn)
    with torch.inference_mode():
        before = network(images)
        records = replace_constant_gates(network, gates, constants, images)
        after = network(images)
    assert [(record["unit"], record["how"], record["into"]) for record in records] == [
        ("layer1.1.se", "folded", "layer1.1.bn2"),
        ("layer3.2.se", "folded", "layer3.2.bn2"),
    ]
    assert len(find_gates(network, images)) == 7
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_unit_behind_an_activation_becomes_a_scale_and_every_bit_stays():
    network, images = trained("resnet20:branch=relu+se")
    gates = find_gates(network, images)
    constants = hold_constant(network, ["layer2.0.se"], torch.randn)
    with torch.inference_mode():
        before = network(images)
        (record,) = replace_constant_gates(network, gates, constants, images)
        after = network(images)
    assert (record["how"], record["into"]) == ("scaled", None)
    assert isinstance(network.layer2[0].se, ConstantScale)
    assert torch.equal(before, after)


class Gated(nn.Module):
    """A unit as many projects have it."""

    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(self.pool(x).flatten(1))[:, :, None, None]


class ReadTwice(nn.Module):
    """What the norm puts out is gated, and read as it is, too, or not."""

    def __init__(self, twice):
        super().__init__()
        self.conv, self.norm, self.se, self.twice = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Gated(8), twice

    def forward(self, x):
        u = self.norm(self.conv(x))
        return (self.se(u) + u if self.twice else self.se(u)).mean((2, 3))


@pytest.mark.parametrize(("twice", "how"), [(False, "folded"), (True, "scaled")])
def test_a_map_that_others_read_is_not_scaled_for_them(twice, how):
    network, images = ReadTwice(twice).eval(), torch.randn(4, 3, 9, 9)
    gates = find_gates(network, images)
    with torch.no_grad():
        network.se.fc[2].weight.zero_()
        before = network(images)
        constants = {"se": network.se.fc[2].bias.sigmoid()}
        weight = network.norm.weight.clone()
        (record,) = replace_constant_gates(network, gates, constants, images)
        torch.testing.assert_close(network(images), before)
    assert record["how"] == how
    assert torch.equal(network.norm.weight, weight) == twice


def test_a_convolution_without_a_norm_takes_the_scale_in():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Gated(8), nn.Flatten(), nn.LazyLinear(2)).eval()
    images = torch.randn(4, 3, 9, 9)
    network(images)
    gates = find_gates(network, images)
    with torch.no_grad():
        network[1].fc[2].weight.zero_()
        before = network(images)
        (record,) = replace_constant_gates(network, gates, {"1": network[1].fc[2].bias.sigmoid()}, images)
        torch.testing.assert_close(network(images), before)
    assert (record["how"], record["into"]) == ("folded", "0")
    assert isinstance(network[1], nn.Identity)


def test_a_batch_norm_without_weights_leaves_a_scale():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), Gated(8), nn.Flatten()).eval()
    images = torch.randn(4, 3, 9, 9)
    gates = find_gates(network, images)
    (record,) = replace_constant_gates(network, gates, {"2": torch.full((8,), 0.3)}, images)
    assert record["how"] == "scaled"
    torch.testing.assert_close(network(images), 0.3 * network[1](network[0](images)).flatten(1))


@pytest.mark.parametrize("spec", ["resnet20+se", "resnet20:branch=relu+se", "resnet20+se:init=identity"])
def test_the_record_does_the_same_to_a_new_network(spec):
    network, images = trained(spec)
    gates = find_gates(network, images)
    constants = {gate.name: torch.rand(gate.channels) for gate in gates[::2]}
    records = replace_constant_gates(network, gates, constants, images)
    new = create(spec, 10).eval()
    place_constant_gates(new, json.loads(json.dumps(records)))
    new.load_state_dict(network.state_dict())
    with torch.inference_mode():
        assert torch.equal(new(images), network(images))


def test_units_that_are_not_named_stay():
    network, images = trained("resnet20+se")
    untouched = copy.deepcopy(network.state_dict())
    assert replace_constant_gates(network, find_gates(network, images), {}, images) == []
    assert all(torch.equal(value, untouched[name]) for name, value in network.state_dict().items())


class GateInBlock(nn.Module):
    """Does more than to scale its map: it ends in a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1))
        self.gate = nn.Sigmoid()
        self.last = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return self.last(x * self.gate(self.squeeze(x)))


def test_a_module_that_does_more_than_to_scale_stays() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), GateInBlock(), nn.AdaptiveAvgPool2d(1)).eval()
    example = torch.randn(2, 3, 9, 9)
    (gate,) = find_gates(network, example)
    before = network(example)
    assert replace_constant_gates(network, [gate], {gate.name: torch.full((6,), 0.5)}, example) == []
    assert torch.equal(network(example), before)

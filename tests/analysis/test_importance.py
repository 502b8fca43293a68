import pytest
import torch
from torch import nn

from excite.analysis.gates import find_gates
from excite.analysis.importance import (
    GateStatistics,
    Group,
    Part,
    gate_statistics,
    mean_gates,
    scores,
    what_feeds,
)
from excite.create import create
from excite.errors import ExciteError, UsageError


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create("resnet20:width=0.5+se", 10).eval()


def test_statistics_of_gates_are_those_of_a_loop_over_the_images(network):
    images = torch.randn(23, 3, 16, 16)
    gates = find_gates(network, images[:2])
    found = gate_statistics(network, gates, images.split(5))
    unit = network.layer2[1].se
    kept = []
    unit.gate.register_forward_hook(lambda module, arguments, answer: kept.append(answer.double()))
    with torch.inference_mode():
        for image in images:
            network(image[None])
    every = torch.cat(kept)
    mine = found["layer2.1.se"]
    assert len(found) == 9
    torch.testing.assert_close(mine.mean, every.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(mine.deviation, every.std(0, correction=0), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(mine.low, every.amin(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(mine.high, every.amax(0), rtol=0, atol=1e-6)
    assert mine.spread == pytest.approx(float(every.var(0, correction=0).mean().sqrt()), rel=1e-3)


def test_the_constant_of_a_gate_that_never_varies_is_that_gate_to_the_last_bit():
    low, high = torch.tensor([1 / 3, 1 / 3]).double(), torch.tensor([1 / 3, 0.5]).double()
    statistics = GateStatistics(mean := low + 1e-16, torch.zeros(2).double(), low, high)
    assert statistics.constant[0] == low[0] != mean[0]
    assert statistics.constant[1] == mean[1]


def test_statistics_of_selective_kernels_keep_the_branches_apart():
    network = create("resnet20:width=0.5+sk", 10).eval()
    images = torch.randn(8, 3, 16, 16)
    gates = find_gates(network, images[:2])
    found = gate_statistics(network, gates, [images])
    mean = found[gates[0].name].mean
    assert mean.shape == (2, 8)
    torch.testing.assert_close(mean.sum(0), torch.ones(8).double(), rtol=0, atol=1e-6)


def test_a_gate_that_is_not_a_number_is_refused_by_the_unit_s_name(network):
    images = torch.randn(4, 3, 16, 16)
    gates = find_gates(network, images)
    with torch.no_grad():
        network.layer3[0].se.expand.bias[0] = torch.nan
    with pytest.raises(ExciteError, match=r"layer3\.0\.se"):
        gate_statistics(network, gates, [images])


def test_no_images_are_refused(network):
    gates = find_gates(network, torch.randn(2, 3, 16, 16))
    with pytest.raises(ExciteError, match="no images"):
        gate_statistics(network, gates, [])


def test_reading_leaves_the_mode_as_it_was(network):
    gates = find_gates(network, torch.randn(2, 3, 16, 16))
    network.train()
    gate_statistics(network, gates, [torch.randn(2, 3, 16, 16)])
    assert network.training


@pytest.mark.parametrize(
    ("spec", "unit", "layer", "shortcut"),
    [
        ("resnet20+se", "layer1.0.se", "layer1.0.bn2", True),
        ("resnet20:branch=relu+se", "layer1.0.se", None, True),  # a ReLU lies in between
        ("resnet20+se:init=identity", "layer1.0.act2.se", "layer1.0.bn2", False),
        ("torchvision:mobilenet_v3_small", "features.1.block.1", None, False),
    ],
)
def test_what_feeds_a_unit(spec, unit, layer, shortcut):
    network = create(spec, 10).eval()
    example = torch.randn(2, 3, 32, 32)
    fed = what_feeds(network, find_gates(network, example), example)
    assert (fed[unit].layer, fed[unit].shortcut) == (layer, shortcut)


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_layers():
    """Channels 0, 1, 2 of a group are 0, 1, 2 of the first layer and 2, 1, 0 of the second."""
    layers = nn.Sequential()
    layers.add_module("one", nn.Conv2d(1, 3, 1, bias=False))
    layers.add_module("norm1", nn.BatchNorm2d(3))
    layers.add_module("two", nn.Conv2d(3, 3, 1, bias=False))
    layers.add_module("norm2", nn.BatchNorm2d(3))
    with torch.no_grad():
        layers.one.weight[:] = torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1)
        layers.two.weight[:] = torch.tensor([[1.0, 0, 0], [-1, 1, 0], [4, -4, 4]]).view(3, 3, 1, 1)
        layers.norm1.weight[:] = torch.tensor([1.0, -2.0, 0.5])
        layers.norm2.weight[:] = torch.tensor([4.0, 1.0, -1.0])
    order, backwards = torch.arange(3), torch.tensor([2, 1, 0])
    parts = (
        Part("one", "output", order, order),
        Part("norm1", "norm", order, order),
        Part("two", "output", backwards, order),
        Part("norm2", "norm", backwards, order),
    )
    return layers, Group("one", 3, parts)


def test_l1_adds_up_the_filters_of_each_layer_as_shares_of_its_mean(two_layers):
    found = scores("l1", *two_layers)
    expected = [1 / 2 + 12 / 5, 2 / 2 + 2 / 5, 3 / 2 + 1 / 5]
    assert found.tolist() == pytest.approx(expected)


def test_channels_that_units_gate_count_by_gate_and_filters(two_layers):
    network, group = two_layers
    reader = nn.Conv2d(3, 1, 1, bias=False)
    with torch.no_grad():
        reader.weight[:] = torch.tensor([1.0, 1.0, 4.0]).view(1, 3, 1, 1)
    network.add_module("reader", reader)
    group = Group("one", 3, (*group.parts, Part("reader", "input", torch.arange(3), torch.arange(3))))
    gates = {"norm1": torch.tensor([0.5, 0.5, 0.25]), "norm2": torch.tensor([0.75, 0.5, 0.5])}
    filters = [1 / 2 + 12 / 5 + 1 / 2, 2 / 2 + 2 / 5 + 1 / 2, 3 / 2 + 1 / 5 + 4 / 2]
    mean = [(0.5 + 0.5) / 2, (0.5 + 0.5) / 2, (0.25 + 0.75) / 2]
    expected = [gate * size for gate, size in zip(mean, filters, strict=True)]
    assert scores("excitation", network, group, gates=gates).tolist() == pytest.approx(expected)


def test_channels_that_no_unit_gates_count_by_their_batch_norms(two_layers):
    assert scores("excitation", *two_layers).tolist() == pytest.approx([1 + 1, 2 + 1, 0.5 + 4])


def test_the_lot_is_the_same_for_a_seed_and_another_for_another(two_layers):
    first, again, other = (scores("random", *two_layers, seed=seed).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_an_unknown_method_is_refused(two_layers):
    with pytest.raises(UsageError, match="excitation, l1, random"):
        scores("size", *two_layers)


def test_the_gates_of_selective_kernels_belong_to_the_norms_of_their_branches():
    network = create("resnet20:width=0.5+sk", 10).eval()
    images = torch.randn(4, 3, 16, 16)
    gates = find_gates(network, images)
    statistics = gate_statistics(network, gates, [images])
    found = mean_gates(gates, statistics, {}, network)
    unit = gates[0].name
    assert torch.equal(found[f"{unit}.branches.0.1"], statistics[unit].mean[0])
    assert torch.equal(found[f"{unit}.branches.1.1"], statistics[unit].mean[1])

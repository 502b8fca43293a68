"""Batch norm merged into convolutions: the same answers to rounding, and nothing else touched."""

import copy

import pytest
import torch
from torch import nn

from excite import attach
from excite.create import create
from excite.deploy.batch_norm import merge_batch_norm

SMALL = "dncnn_s:depth=6,channels=8"


def images(*shape, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def trained(spec, **more):
    """A network in double precision, with the statistics, factors and biases that training may leave."""
    torch.manual_seed(0)
    network = create(spec, **more).double()
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.1, 2, generator=generator)
            module.weight.data.uniform_(-1.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return network


def norms(network):
    return [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]


def assert_same_answers(first, second, channels=1):
    x = images(2, channels, 13, 10)
    with torch.no_grad():
        torch.testing.assert_close(first(x), copy.deepcopy(second).eval()(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        f"{SMALL},kernel=5",
        f"{SMALL},residual=false",
        f"{SMALL},norm=none",
        f"{SMALL}+se",
        f"{SMALL}+se:stages=2-3+cbam:stages=1",
        f"{SMALL}+se:init=paper",
        "dncnn_color:depth=4,channels=5",
    ],
)
def test_answers_as_before_without_norms(spec):
    network = trained(spec)
    merged = merge_batch_norm(network)
    assert not norms(merged)
    assert not any(module.training for module in merged.modules())
    assert_same_answers(merged, network, network.in_channels)
    assert [name for name, _ in merged.named_children()] == [name for name, _ in network.named_children()]
    assert merged.halo == network.halo


def test_the_equation():
    """γ (w ∗ x − µ) / √(σ² + ε) + β, and what is left of it where the convolution has a bias of its own."""
    network = trained(SMALL)
    network.conv3.bias = nn.Parameter(images(8))
    merged = merge_batch_norm(network)
    for i in (2, 3):
        convolution, norm = network.get_submodule(f"conv{i}"), network.get_submodule(f"norm{i}")
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = 0 if convolution.bias is None else convolution.bias
        answer = merged.get_submodule(f"conv{i}")
        torch.testing.assert_close(answer.weight, convolution.weight * factor[:, None, None, None])
        torch.testing.assert_close(answer.bias, (bias - norm.running_mean) * factor + norm.bias)


def test_the_network_is_left_as_it_was():
    network = trained(f"{SMALL}+se")
    before = copy.deepcopy(network.state_dict())
    merge_batch_norm(network)
    assert network.training
    assert network.norm3.training
    assert (network.spec, network.table.norm) == (f"{SMALL}+se", "batch")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert len(norms(network)) == 4


def test_what_is_merged_can_be_saved_and_built_again(tmp_path):
    network = trained(f"{SMALL}+se:stages=2").float()
    merged = merge_batch_norm(network)
    assert merged.spec == "dncnn_s:depth=6,channels=8,norm=none+se:stages=2"
    torch.save(merged.state_dict(), tmp_path / "merged.pth")
    for spec in (merged.spec, "dncnn_s+se:stages=2"):
        again = create(spec, weights=tmp_path / "merged.pth").eval()
        assert again.table == merged.table
        x = images(1, 1, 9, 9, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(again(x), merged(x))


def test_twice_is_once():
    merged = merge_batch_norm(trained(SMALL))
    again = merge_batch_norm(merged)
    assert again.spec == merged.spec
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("spec", [f"{SMALL}+sk", f"{SMALL}+sk:stages=2-3+se"])
def test_units_keep_norms_of_their_own(spec):
    network = trained(spec)
    merged = merge_batch_norm(network)
    assert norms(merged) == [name for name in norms(network) if ".branches." in name] != []
    assert_same_answers(merged, network)


@pytest.mark.parametrize(
    ("unit", "where", "left"), [("sk", "conv3", ["norm3"]), ("se", "norm3", ["norm3"]), ("se", "act3", [])]
)
def test_attached_units_are_not_merged_away(unit, where, left):
    network = trained(SMALL)
    attach(network.float(), unit, where=where, init="paper")
    network.double()
    merged = merge_batch_norm(network)
    assert norms(merged) == [name for name in norms(network) if name in left or ".sk." in name]
    assert {name for name, _ in merged.named_modules() if f".{unit}" in name}
    assert merged.table.norm == ("batch" if left else "none")
    assert_same_answers(merged, network)


@pytest.mark.parametrize("name", ["conv3", "norm3"])
def test_a_hook_keeps_its_module(name):
    network = trained(SMALL)
    network.get_submodule(name).register_forward_hook(lambda _, __, y: 2 * y)
    merged = merge_batch_norm(network)
    assert norms(merged) == ["norm3"]
    assert_same_answers(merged, network)


def test_parametrised_kernels_stay():
    network = trained(SMALL)
    nn.utils.parametrizations.weight_norm(network.conv4)
    merged = merge_batch_norm(network)
    assert norms(merged) == ["norm4"]
    assert_same_answers(merged, network)


def test_a_norm_without_statistics_stays():
    network = trained(SMALL)
    network.norm4 = nn.BatchNorm2d(8, track_running_stats=False).double()
    merged = merge_batch_norm(network)
    assert norms(merged) == ["norm4"]
    assert_same_answers(merged, network)


@pytest.mark.parametrize("spec", ["resnet20+se:stages=1", "hybridsn:window=7"])
def test_other_networks_are_only_copied(spec):
    network = trained(spec, num_classes=4, in_channels=3)
    copied = merge_batch_norm(network)
    assert copied is not network
    assert not copied.training
    assert norms(copied) == norms(network)
    x = images(2, 3, 7, 7)
    with torch.no_grad():
        assert torch.equal(copied(x), network.eval()(x))


def test_published_weights_merged(shared_data):
    network = create("dncnn_s", weights=shared_data / "dncnn-weights" / "pytorch-dncnn-s-sigma25.pth").eval()
    merged = merge_batch_norm(network)
    assert not norms(merged)
    x = images(1, 1, 48, 40, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), network(x), rtol=0, atol=2e-6)

"""Inception-ResNet-v2 against timm's; its outputs from the same weights: tests/weights/test_cadene.py."""

import functools
import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from excite.cost import cost
from excite.networks.inception_resnet import POOLS, ResidualModule, Stage, adjusted, inception_resnet_v2
from excite.networks.site import plain_convolution, plain_join
from excite.networks.tables import INCEPTION_RESNET_V2
from excite.units.selective_kernel import SelectiveKernel
from excite.units.squeeze_excite import SqueezeExcite

NARROW = adjusted(INCEPTION_RESNET_V2, width=0.0625)
SHORT = replace(NARROW, rows=tuple(replace(row, depth=1) for row in NARROW.rows))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def se(site):
    # Not ReLU, with which the one or two hidden units of a narrow network may be dead.
    return SqueezeExcite(site.out_channels, 16, activation="silu")


def sk(site):
    unit = SelectiveKernel(site.in_channels, site.out_channels, site.stride, groups=1, min_width=4)
    return unit, nn.Identity(), nn.Identity()


# --- the table -------------------------------------------------------------------------------------------------


@functools.cache
def costs(join=plain_join):
    with torch.device("meta"):
        return cost(inception_resnet_v2(INCEPTION_RESNET_V2, join=join), (3, 299, 299))


def test_costs():
    assert costs().parameters == 55_843_464  # timm's
    assert costs().macs / 1e9 == pytest.approx(13.16, rel=0.001)


def test_same_names_and_shapes_as_timm():
    with torch.device("meta"):
        theirs, ours = timm.create_model("inception_resnet_v2"), inception_resnet_v2(INCEPTION_RESNET_V2)
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name.replace("classif.", "fc."): tensor.shape for name, tensor in theirs.state_dict().items()
    }


def test_what_se_adds_is_the_papers_formula():
    """Hu et al. 2018, Sect. 4: 2/r · Σ Nₛ · Cₛ² weights; their biases are C/r + C per module."""
    modules = {320: 1 + 10, 1088: 1 + 20, 2080: 1 + 9 + 1}
    weights = sum(count * 2 * channels * (channels // 16) for channels, count in modules.items())
    biases = sum(count * (channels // 16 + channels) for channels, count in modules.items())
    assert costs(se).parameters - costs().parameters == weights + biases
    assert costs(se).macs - costs().macs == weights


def test_places_for_units():
    joins, convolutions = [], []

    def join(site):
        joins.append(site)
        return plain_join(site)

    def convolution(site):
        convolutions.append(site)
        return plain_convolution(site)

    with torch.device("meta"):
        inception_resnet_v2(INCEPTION_RESNET_V2, join=join, convolution=convolution)
    assert [site.stage for site in joins] == [1] * 11 + [2] * 21 + [3] * 11
    assert [index for index, site in enumerate(joins) if not site.residual] == [0, 11, 32]  # mixed_5b, 6a, 7a
    assert [site.out_channels for site in joins] == [320] * 11 + [1088] * 21 + [2080] * 11
    assert {(site.activation, site.stride, site.input_size) for site in joins} == {("identity", 1, 299)}
    widths = [(site.stage, site.in_channels, site.out_channels) for site in convolutions]
    assert widths == [(1, 96, 96)] + [(1, 32, 32), (1, 48, 64)] * 10 + [(2, 256, 256)] + [(3, 256, 288)]
    assert {(site.activation, site.stride, site.groups) for site in convolutions} == {("relu", 1, 1)}


# --- the parts -------------------------------------------------------------------------------------------------


def test_batch_norms_have_the_releases_epsilon():
    network = inception_resnet_v2(NARROW, 5)
    assert {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}


def test_average_pooling_leaves_the_frame_out():
    torch.testing.assert_close(POOLS["average"]()(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 5, 5))


def test_residual_modules_are_scaled_and_the_last_one_is_not():
    network = inception_resnet_v2(NARROW, 5)
    modules = [module for module in network.modules() if isinstance(module, ResidualModule)]
    assert [module.scale for module in modules] == [0.17] * 10 + [0.10] * 20 + [0.20] * 9 + [1.0]
    assert [type(module.act) for module in modules] == [nn.ReLU] * 39 + [nn.Identity]
    assert all(module.conv2d.bias is not None for module in modules)


def test_se_rescales_the_scaled_branch_and_not_the_shortcut():
    seen = []

    class Recorder(nn.Module):
        def forward(self, u, shortcut):
            seen.append((u.clone(), shortcut.clone()))
            return u + shortcut

    stage = Stage(1, NARROW, plain_convolution, lambda site: Recorder())
    block = ResidualModule(20, NARROW.rows[0].residual, stage, 0.17, nn.ReLU()).eval()
    x = torch.randn(2, 20, 6, 6)
    with torch.no_grad():
        found = block(x)
        branch = block.conv2d(torch.cat([block.branch0(x), block.branch1(x), block.branch2(x)], 1))
    torch.testing.assert_close(seen[0][0], branch * 0.17)
    torch.testing.assert_close(seen[0][1], x)
    torch.testing.assert_close(found, (branch * 0.17 + x).relu())


def test_convolutions_start_as_he_says():
    for name, module in inception_resnet_v2(adjusted(INCEPTION_RESNET_V2, width=0.5)).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
            assert module.bias is None or not module.bias.any()


# --- with units ------------------------------------------------------------------------------------------------


def test_open_gates_change_nothing():
    plain, rescaled = inception_resnet_v2(SHORT, 5).eval(), inception_resnet_v2(SHORT, 5, join=se).eval()
    missing = rescaled.load_state_dict(plain.state_dict(), strict=False)
    assert all(".se." in name for name in missing.missing_keys)
    assert not missing.unexpected_keys
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        assert not torch.allclose(rescaled(images), plain(images), rtol=1e-2)
        for module in rescaled.modules():
            if isinstance(module, SqueezeExcite):
                module.expand.weight.zero_()
                module.expand.bias.fill_(30.0)
        torch.testing.assert_close(rescaled(images), plain(images))


def test_selective_kernels_have_a_place_in_every_stage():
    network = inception_resnet_v2(NARROW, 5, convolution=sk)
    units = [name for name, module in network.named_modules() if isinstance(module, SelectiveKernel)]
    blocks = [f"repeat.{index}.{branch}.conv" for index in range(10) for branch in ("branch1.1", "branch2.2")]
    assert units == ["mixed_5b.branch2.2.conv", *blocks, "mixed_6a.branch1.1.conv", "mixed_7a.branch2.1.conv"]


@pytest.mark.parametrize(("convolution", "join"), [(plain_convolution, plain_join), (sk, se)])
def test_every_parameter_learns(convolution, join):
    network = inception_resnet_v2(SHORT, 5, convolution=convolution, join=join)
    network(torch.randn(4, 3, 107, 107)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("join", [plain_join, se])
def test_gradients_pass_what_is_done_in_place(join):
    stage = Stage(1, NARROW, plain_convolution, join)
    block = ResidualModule(20, NARROW.rows[0].residual, stage, 0.17, nn.ReLU(inplace=True)).double().eval()
    x = torch.randn(1, 20, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x * 1.0), x, eps=1e-7, atol=1e-4, fast_mode=True)


# --- images, tools, width --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(75, 75), (96, 140)])
def test_images_of_other_sizes(size):
    network = inception_resnet_v2(SHORT, 5, in_channels=1, join=se).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 1, *size)).shape == (2, 5)


def test_can_be_traced_and_exported_whole():
    network = inception_resnet_v2(SHORT, 5, convolution=sk, join=se).eval()
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(torch.fx.symbolic_trace(network)(images), expected)
        torch.testing.assert_close(torch.export.export(network, (images,)).module()(images), expected)


def test_width():
    assert adjusted(INCEPTION_RESNET_V2, width=1.0) == INCEPTION_RESNET_V2
    with torch.device("meta"):
        half = inception_resnet_v2(adjusted(INCEPTION_RESNET_V2, width=0.5))
    assert (half.fc.in_features, half.mixed_5b.channels) == (768, 48 + 32 + 48 + 32)
    with pytest.raises(ValueError, match=r"between 0\.05 and 20"):
        adjusted(INCEPTION_RESNET_V2, width=50.0)

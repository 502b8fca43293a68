"""BN-Inception against the release's table and Caffe's pooling; its outputs: tests/weights/test_cadene.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from excite.cost import cost
from excite.networks.bn_inception import POOLS, InceptionModule, adjusted, bn_inception, halving_pool
from excite.networks.site import plain_convolution, plain_join
from excite.networks.tables import BN_INCEPTION
from excite.units.selective_kernel import SelectiveKernel
from excite.units.squeeze_excite import SqueezeExcite

MODULES = ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
NARROW = adjusted(BN_INCEPTION, width=0.125)


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


@pytest.mark.parametrize(
    ("join", "macs", "parameters"),
    # The multiply–adds: Hu et al. 2018, Table 2. The parameters: pretrainedmodels, without its biases; 11.29 + SE.
    [(plain_join, 2.03, 11.285), (se, 2.04, 11.932)],
)
def test_published_costs(join, macs, parameters):
    with torch.device("meta"):
        network = bn_inception(BN_INCEPTION, join=join)
    found = cost(network, (3, 224, 224))
    assert found.macs / 1e9 == pytest.approx(macs, rel=0.01)
    assert found.parameters / 1e6 == pytest.approx(parameters, rel=0.001)


def test_the_released_file_is_as_big_as_ours_would_be():
    """The SE authors' release page: 46 MB."""
    with torch.device("meta"):
        network = bn_inception(BN_INCEPTION, join=se)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) * 4 / 2**20 == pytest.approx(46, abs=0.5)


def test_se_units_as_in_the_release():
    """The numbers of models/SE-BN-Inception.prototxt: its Scale layers' channels and *_1x1_down's outputs."""
    with torch.device("meta"):
        network = bn_inception(BN_INCEPTION, join=se)
    units = {name: module for name, module in network.named_modules() if isinstance(module, SqueezeExcite)}
    assert list(units) == [f"inception_{name}.se" for name in MODULES]
    channels = (256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024)
    hidden = (16, 20, 36, 36, 36, 38, 38, 66, 64, 64)
    for unit, wide, narrow in zip(units.values(), channels, hidden, strict=True):
        assert (unit.reduce.in_features, unit.reduce.out_features, unit.expand.out_features) == (wide, narrow, wide)


def test_names():
    """What files of weights are converted to."""
    with torch.device("meta"):
        names = {name.rpartition(".")[0] for name in bn_inception(BN_INCEPTION, join=se).state_dict()}
    convolutions = {"conv1", "conv2_reduce", "conv2"}
    for module in MODULES:
        layers = ["b3x3_reduce", "b3x3", "double3x3_reduce", "double3x3a", "double3x3b"]
        layers += [] if module in ("3c", "4e") else ["b1x1", "pool_proj"]
        convolutions |= {f"inception_{module}.{layer}" for layer in layers}
    units = {f"inception_{module}.se.{layer}" for module in MODULES for layer in ("reduce", "expand")}
    assert names == {f"{name}.{kind}" for name in convolutions for kind in ("conv", "bn")} | units | {"fc"}


def test_places_for_units():
    joins, convolutions = [], []

    def join(site):
        joins.append(site)
        return plain_join(site)

    def convolution(site):
        convolutions.append(site)
        return plain_convolution(site)

    with torch.device("meta"):
        bn_inception(BN_INCEPTION, join=join, convolution=convolution)
    assert [site.stage for site in joins] == [1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert {(site.residual, site.activation, site.stride, site.input_size) for site in joins} == {
        (False, "identity", 1, 224)
    }
    assert [site.stage for site in convolutions] == [1] * 6 + [2] * 10 + [3] * 4  # two in each module
    assert [site.stride for site in convolutions[4:6]] == [2, 2]  # 3c
    assert sum(site.stride == 2 for site in convolutions) == 4
    assert {(site.activation, site.groups) for site in convolutions} == {("relu", 1)}
    widths = [(site.in_channels, site.out_channels) for site in convolutions[-2:]]
    assert widths == [(192, 320), (224, 224)]


# --- the parts -------------------------------------------------------------------------------------------------


def windows(length, kernel, stride, pad, ceil):
    """Caffe's pooling_layer: the first and last position of each window, clipped to the padded map."""
    count = (math.ceil if ceil else math.floor)((length + 2 * pad - kernel) / stride) + 1
    return [(start * stride - pad, min(start * stride - pad + kernel, length + pad)) for start in range(count)]


def caffe_pool(x, kind, stride, pad):
    rows = windows(x.shape[2], 3, stride, pad, ceil=True)
    columns = windows(x.shape[3], 3, stride, pad, ceil=True)
    out = np.zeros((*x.shape[:2], len(rows), len(columns)))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            window = x[:, :, max(top, 0) : bottom, max(left, 0) : right]
            if kind == "max":
                out[:, :, i, j] = window.max((2, 3))
            else:
                out[:, :, i, j] = window.sum((2, 3)) / ((bottom - top) * (right - left))
    return out


@pytest.mark.parametrize(
    ("pool", "kind", "stride", "pad"),
    [
        (POOLS["average"](), "average", 1, 1),
        (POOLS["max"](), "max", 1, 1),
        (halving_pool(), "max", 2, 0),
        (bn_inception(NARROW).pool1, "max", 2, 0),
    ],
)
@pytest.mark.parametrize("size", [(14, 28), (6, 2)])
def test_pools_as_caffe_does(pool, kind, stride, pad, size):
    x = np.random.default_rng(0).standard_normal((2, 3, *size)) - 2  # a maximum may well be negative
    found = pool(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, caffe_pool(x, kind, stride, pad), atol=1e-12)


@pytest.mark.parametrize("size", [7, 1, 15])
def test_pooling_of_odd_maps_goes_with_the_strided_convolutions(size):
    x = torch.randn(1, 2, size, size) - 2
    found = halving_pool()(x)
    assert found.shape[-1] == (size + 1) // 2 == nn.Conv2d(2, 2, 3, 2, 1)(x).shape[-1]
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[..., -1, -1], x[..., -1, -1])  # the last window sees the corner alone


def test_branches_are_concatenated_in_the_releases_order():
    module = bn_inception(NARROW).inception_4a.eval()
    x = torch.rand(1, module.b1x1.conv.in_channels, 5, 5)
    with torch.no_grad():
        found = module(x)
        expected = [
            module.b1x1(x),
            module.b3x3(module.b3x3_reduce(x)),
            module.double3x3b(module.double3x3a(module.double3x3_reduce(x))),
            module.pool_proj(module.pool(x)),
        ]
    torch.testing.assert_close(found, torch.cat(expected, 1))


def test_convolutions_start_as_he_says():
    for name, module in bn_inception(BN_INCEPTION).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
            assert module.bias is None


# --- with units ------------------------------------------------------------------------------------------------


def test_open_gates_change_nothing():
    plain, rescaled = bn_inception(NARROW, 5).eval(), bn_inception(NARROW, 5, join=se).eval()
    missing = rescaled.load_state_dict(plain.state_dict(), strict=False)
    assert all(".se." in name for name in missing.missing_keys)
    assert not missing.unexpected_keys
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(rescaled(images), plain(images), rtol=1e-2)
        for module in rescaled.modules():
            if isinstance(module, SqueezeExcite):
                module.expand.weight.zero_()
                module.expand.bias.fill_(30.0)
        torch.testing.assert_close(rescaled(images), plain(images))


def test_selective_kernels_stand_for_the_3x3_convolutions():
    network = bn_inception(NARROW, 5, convolution=sk)
    units = [name for name, module in network.named_modules() if isinstance(module, SelectiveKernel)]
    assert units == [f"inception_{name}.{layer}.conv" for name in MODULES for layer in ("b3x3", "double3x3b")]
    for name in units:
        part = network.get_submodule(name.removesuffix(".conv"))
        assert isinstance(part.bn, nn.Identity)
        assert isinstance(part.act, nn.Identity)


@pytest.mark.parametrize(("convolution", "join"), [(plain_convolution, plain_join), (sk, se)])
def test_every_parameter_learns(convolution, join):
    network = bn_inception(NARROW, 5, convolution=convolution, join=join)
    network(torch.randn(8, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("row", [NARROW.rows[0], NARROW.rows[2]])
def test_gradients_pass_what_is_done_in_place(row):
    module = InceptionModule(6, row, 224, plain_convolution, se).double().eval()
    x = torch.randn(1, 6, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x * 1.0), x, eps=1e-7, atol=1e-4, fast_mode=True)


# --- images, tools, width --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (47, 97), (112, 64)])
def test_images_of_other_sizes(size):
    network = bn_inception(NARROW, 5, in_channels=1, join=se).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 1, *size)).shape == (2, 5)


def test_can_be_traced_and_exported_whole():
    table = replace(NARROW, rows=NARROW.rows[1:3])
    network = bn_inception(table, 5, convolution=sk, join=se).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(torch.fx.symbolic_trace(network)(images), expected)
        torch.testing.assert_close(torch.export.export(network, (images,)).module()(images), expected)


def test_width():
    with torch.device("meta"):
        assert adjusted(BN_INCEPTION, width=1.0) == BN_INCEPTION
        twice = bn_inception(adjusted(BN_INCEPTION, width=2.0))
    assert twice.fc.in_features == 2048
    assert twice.inception_3c.b1x1 is None
    with pytest.raises(ValueError, match=r"between 0\.05 and 20"):
        adjusted(BN_INCEPTION, width=0.0)

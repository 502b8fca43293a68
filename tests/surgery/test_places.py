"""The places are those that one reads off the networks' code."""

import pytest
import torch
import torchvision
from small_networks import Concatenating, TinyResNet, plain
from torch import nn

import excite
from excite.errors import UsageError
from excite.surgery import places
from excite.surgery.record import record


def held(found):
    return [(place.name, place.how) for place in found.places]


def test_the_ends_of_residual_branches():
    found = places.before_additions(record(TinyResNet()))
    assert held(found) == [("one.bn2", "after"), ("two.bn2", "after"), ("three.bn2", "after")]
    assert [place.value.channels for place in found.places] == [8, 16, 16]
    assert not found.missed


def test_the_inputs_of_residual_branches():
    found = places.before_branches(record(TinyResNet()))
    assert held(found) == [("one.conv1", "before"), ("two.conv1", "before"), ("three.conv1", "before")]
    assert [place.value.channels for place in found.places] == [8, 8, 16]


def test_after_the_addition_is_after_its_activation():
    # The activation is called three times a block, so that only the block itself can hold what follows the sum.
    assert held(places.after_additions(record(TinyResNet()))) == [
        ("one", "after"),
        ("two", "after"),
        ("three", "after"),
    ]


def test_on_the_shortcut():
    # Only the second block's shortcut has modules; at the others the end of the branch stands in.
    found = places.on_shortcuts(record(TinyResNet()))
    assert held(found) == [("one.bn2", "shortcut"), ("two.project.1", "after"), ("three.bn2", "shortcut")]
    assert [place.value.channels for place in found.places] == [8, 16, 16]


def test_after_the_first_3x3_convolution():
    found = places.after_spatial_convolutions(record(TinyResNet()))
    assert held(found) == [("one.bn1", "after"), ("two.bn1", "after"), ("three.bn1", "after")]


def test_after_concatenations():
    assert held(places.after_concatenations(record(Concatenating()))) == [("first", "after"), ("second", "after")]


def test_the_ends_of_stages():
    found = places.at_stage_ends(record(plain(), torch.zeros(1, 3, 32, 32)))
    assert held(found) == [("0.1", "after"), ("0.4", "after"), ("0.7", "after")]


def test_kernels():
    # Of each branch the last one; the stem and the projection (1×1) stay.
    assert held(places.kernels(record(TinyResNet()))) == [
        ("one.conv2", "around"),
        ("two.conv2", "around"),
        ("three.conv2", "around"),
    ]
    assert held(places.kernels(record(plain(), torch.zeros(1, 3, 32, 32)))) == [("0.3", "around"), ("0.6", "around")]
    first = places.kernels(record(TinyResNet()), places.matching("conv1"))
    assert [place.name for place in first.places] == ["one.conv1", "two.conv1", "three.conv1"]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("bn1", ["one.bn1", "two.bn1", "three.bn1"]),
        ("two.*", [f"two.{name}" for name in ("conv1", "bn1", "relu", "conv2", "bn2", "project.1", "project.0")]),
        ("stem", ["stem"]),
        ("t*.conv?", ["two.conv1", "two.conv2", "three.conv1", "three.conv2"]),
    ],
)
def test_patterns_of_names(where, names):
    assert [unit.name.removesuffix(".se") for unit in excite.attach(TinyResNet(), where=where).units] == names


def test_predicates():
    attached = excite.attach(TinyResNet(), where=lambda name, module: isinstance(module, nn.Conv2d) and "1" in name)
    assert [unit.name for unit in attached.units] == ["one.conv1.se", "two.conv1.se", "three.conv1.se"]


# --- what is no residual branch --------------------------------------------------------------------------------


class Sums(nn.Module):
    """What adds, and what of it is residual, is for the tests to say."""

    def __init__(self, add):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, 2, 1)
        self.quarter = nn.Conv2d(4, 4, 3, padding=1)
        self.add = add

    def forward(self, x):
        return self.add(self, self.stem(x)).mean((2, 3))


def up(x):
    return nn.functional.interpolate(x, scale_factor=2.0)


@pytest.mark.parametrize(
    ("add", "count"),
    [
        (lambda net, x: x + net.b(net.a(x)), 1),
        (lambda net, x: net.b(net.a(x)) + x, 1),
        (lambda net, x: torch.add(net.a(x), x, alpha=0.5), 1),
        (lambda net, x: x.add_(net.a(x.clone())), 1),
        (lambda net, x: net.a(x) + net.b(net.b(net.a(x))), 1),  # a projection, of one convolution
        (lambda net, x: net.a(x) + net.b(x), 0),  # equals
        (lambda net, x: net.b(x) + up(net.a(net.down(x))), 0),  # a feature pyramid
        (lambda net, x: x + 1, 0),
        (lambda net, x: x + torch.ones(8, 1, 1), 0),
        (lambda net, x: x * net.a(x), 0),
        (lambda net, x: torch.cat([net.quarter(x[:, :4]) + x[:, 4:], x], 1), 0),  # a step within a Res2Net block
    ],
)
def test_which_additions_are_residual(add, count):
    network = Sums(add)
    # A place needs a module that is called once; here the additions are asked for, not the places.
    assert len(places.residuals(record(network, torch.zeros(1, 3, 32, 32)))) == count


def test_the_branch_is_told_from_the_shortcut():
    network = Sums(lambda net, x: net.b(net.a(x)) + x)
    (residual,) = places.residuals(record(network, torch.zeros(1, 3, 32, 32)))
    assert [operation.call.name for operation in residual.convolutions()] == ["a", "b"]
    assert residual.shortcut is residual.split


def test_a_shared_module_is_a_place_only_if_all_its_calls_are():
    class Shared(nn.Module):
        def __init__(self, also):
            super().__init__()
            self.stem, self.conv, self.also = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), also

        def forward(self, x):
            x = self.stem(x)
            x = x + self.conv(x)
            x = x + self.conv(x)
            return (self.conv(x) * 2 if self.also else x).mean((2, 3))

    example = torch.zeros(1, 3, 32, 32)
    assert held(places.before_additions(record(Shared(also=False), example))) == [("conv", "after")]
    found = places.before_additions(record(Shared(also=True), example))
    assert not found.places
    assert "no module" in found.missed[0]


def test_channels_last_blocks():
    # Its blocks compute on (N, H, W, C) inside: a unit would rescale rows if that went unnoticed.
    attached = excite.attach(torchvision.models.convnext_tiny(num_classes=5))
    assert [unit.channels for unit in attached.units] == [96] * 3 + [192] * 3 + [384] * 9 + [768] * 3


def test_transformers_have_no_feature_maps_but_the_patches():
    with pytest.raises(UsageError, match="Nothing attached to VisionTransformer"):
        excite.attach(torchvision.models.vit_b_16())


def test_stages_are_resolutions():
    attached = excite.attach(TinyResNet(), example=torch.zeros(1, 3, 32, 32))
    assert [(unit.stage, unit.size) for unit in attached.units] == [(1, (32, 32)), (2, (16, 16)), (2, (16, 16))]
    for stages in ("1", 1, [1], "1-1"):
        assert [unit.name for unit in excite.attach(TinyResNet(), stages=stages).units] == ["one.bn2.se"]
    for stages in ("3", 0, "2-1", [1, 3], "all"):
        with pytest.raises(UsageError, match="within 1-2"):
            excite.attach(TinyResNet(), stages=stages)


# --- recording -------------------------------------------------------------------------------------------------


def test_recording_leaves_the_network_as_it_was():
    network = TinyResNet().train()
    network.one.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    record(network)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training
    assert not network.one.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_network_whose_path_depends_on_values_is_run_for_real():
    class Looks(TinyResNet):
        def forward(self, x):
            if float(x.sum()) > 1e9:  # there is no telling without contents
                return x
            return super().forward(x)

    network = Looks()
    assert len(excite.attach(network).units) == 3
    network.eval()
    record(network)
    assert not network.training


def test_networks_in_one_and_three_dimensions():
    class Any(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.stem, self.inner = conv(2, 8, 3, padding=1), conv(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            return (x + self.inner(x)).flatten(2).mean(2)

    for conv, shape in ((nn.Conv1d, (2, 2, 50)), (nn.Conv3d, (2, 2, 6, 10, 10))):
        network, x = Any(conv).eval(), torch.randn(shape)
        before = network(x)
        assert [unit.name for unit in excite.attach(network, example=x).units] == ["inner.se"]
        assert torch.equal(network(x), before)


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (nn.Linear(3, 3), {}, "Linear has no module that convolves: give .* example="),
        (torch.compile(TinyResNet()), {}, "compiled by torch.compile.*attach to the network before that"),
        (nn.DataParallel(TinyResNet()), {}, "wrapped for parallel training"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), {}, "makes its parameters when it first runs"),
        (TinyResNet(), {"example": torch.zeros(1, 4, 32, 32)}, r"does not run on an input of shape \(1, 4, 32, 32\)"),
        (TinyResNet(), {"example": (1, 2)}, "does not run"),
        (TinyResNet(), {"where": "concat"}, "no concatenations of feature maps.*candidates.*stem, one.conv1"),
        (TinyResNet(), {"where": 3}, "where is a placement"),
        (TinyResNet(), {"unit": "se:where=after"}, "where is an argument of attach"),
        (TinyResNet(), {"unit": "sex"}, "unknown unit 'sex'; did you mean 'se'"),
    ],
)
def test_refusals(network, arguments, message):
    arguments = {"unit": "se"} | arguments
    with pytest.raises(UsageError, match=message):
        excite.attach(network, **arguments)
    assert not any(module._forward_hooks for module in network.modules())

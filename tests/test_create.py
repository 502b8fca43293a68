import sys
from importlib import import_module
from typing import Literal

import pytest
import torch
import torchvision
from torch import nn

import excite
from excite.create import create, networks, register_network
from excite.errors import UsageError
from excite.networks.catalog import CATALOG
from excite.spec import parse_spec
from excite.surgery import units as unit_registry
from excite.surgery.hooks import attached_units
from excite.surgery.units import register_unit, units
from excite.units.added_kernels import AddedKernels
from excite.units.cbam import ConvolutionalBlockAttention
from excite.units.efficient_channel import EfficientChannelAttention
from excite.units.selective_kernel import SelectiveKernel
from excite.units.squeeze_excite import SqueezeExcite

registry = import_module("excite.create")  # `excite.create`, the attribute, is the function


@pytest.fixture(autouse=True)
def _own_registrations(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(unit_registry, "_UNITS", dict(unit_registry._UNITS))
    monkeypatch.setattr(registry, "_registered_networks", {})


def found(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


def test_sizes_of_input_and_output():
    network = create("resnet20", num_classes=7, in_channels=5)
    assert network(torch.randn(2, 5, 32, 32)).shape == (2, 7)
    assert create("resnet20").fc.out_features == 1000
    assert network.training


@pytest.mark.parametrize(
    ("spec", "channels"),
    [("resnet20", 3), ("timm:resnet18", 3), ("hybridsn_2d", 30), ("dncnn_s", 1), ("dncnn_color", 3)],
)
def test_channels_are_those_that_a_network_was_drawn_for(spec, channels):
    with torch.device("meta"):
        network = create(spec)
    assert next(module for module in network.modules() if isinstance(module, nn.Conv2d)).in_channels == channels


def test_takes_a_parsed_spec():
    assert found(create(parse_spec("resnet20+se")), SqueezeExcite)


def test_networks_lists_what_create_builds():
    assert networks()[:2] == ["resnet18", "resnet34"]
    assert len(networks()) == len(set(networks())) == len(CATALOG)
    assert units() == ["se", "sk", "eca", "cbam"]


# --- units -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "widths"),
    [
        ("resnet20+se", [4, 4, 4]),  # r = 16 would leave 1, 2, 4
        ("resnet20+se:min_width=1", [1, 2, 4]),
        ("resnet20+se:reduction=4", [4, 8, 16]),
        ("resnet18+se", [4, 8, 16, 32]),
        ("se_resnet50", [16, 32, 64, 128]),
    ],
)
def test_se_bottlenecks(spec, widths):
    with torch.device("meta"):
        network = create(spec, 10)
    stages = [module for name, module in network.named_children() if name.startswith("layer")]
    assert [stage[0].se.reduce.out_features for stage in stages] == widths


@pytest.mark.parametrize(
    ("spec", "widths"),
    [
        ("resnet20+sk", [8, 8, 8]),
        ("resnet20+sk:min_width=32", [32, 32, 32]),
        ("resnet20+sk:reduction=2", [8, 16, 32]),
        ("sknet50", [32, 32, 32, 64]),
        ("resnext29_16x64d+sk", [64, 128, 256]),
    ],
)
def test_sk_bottlenecks(spec, widths):
    with torch.device("meta"):
        network = create(spec, 10)
    stages = [module for name, module in network.named_children() if name.startswith("layer")]
    assert [stage[0].conv2.reduce.out_features for stage in stages] == widths


def test_sk_takes_the_hosts_groups_unless_told():
    def groups(spec):
        return {conv.groups for unit in found(create(spec, 10), SelectiveKernel) for conv in found(unit, nn.Conv2d)}

    assert groups("resnet20+sk") == {1}
    assert groups("resnext50_32x4d+sk") == {32}
    assert groups("sknet29:width=0.25") == {16}
    assert groups("resnet20+sk:groups=8") == {8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3-3d2", [(3, 1), (3, 2)]), ("3-5-7", [(3, 1), (5, 1), (7, 1)]), ("1-3", [(1, 1), (3, 1)])],
)
def test_sk_branches(text, expected):
    unit = found(create(f"resnet20+sk:branches={text}", 10), SelectiveKernel)[0]
    assert [(branch[0].kernel_size[0], branch[0].dilation[0]) for branch in unit.branches] == expected


def test_se_parts():
    unit = found(create("resnet20+se:gate=hard_sigmoid,activation=silu,squeeze=max", 10), SqueezeExcite)[0]
    assert isinstance(unit.gate, nn.Hardsigmoid)
    assert isinstance(unit.activation, nn.SiLU)


@pytest.mark.parametrize(
    ("text", "stages"), [("1-2", [True, True, False]), ("3", [False, False, True]), ("1-3", [True, True, True])]
)
def test_stages(text, stages):
    network = create(f"resnet20+se:stages={text}+sk:stages={text}", 10)
    for stage, wanted in zip((network.layer1, network.layer2, network.layer3), stages, strict=True):
        assert bool(found(stage, SqueezeExcite)) == bool(found(stage, SelectiveKernel)) == wanted
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_same_unit_in_two_forms_for_different_stages():
    network = create("resnet20+se:stages=1,reduction=2+se:stages=3,reduction=8", 10)
    assert [unit.reduce.out_features for unit in found(network, SqueezeExcite)] == [8, 8, 8, 8, 8, 8]
    assert not found(network.layer2, SqueezeExcite)


def shapes(spec):
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in create(spec).state_dict().items()}


def test_paper_names_are_the_papers_networks():
    assert shapes("se_resnet50") == shapes("resnet50:stride_in=1x1+se")
    assert shapes("se_resnext50_32x4d") == shapes("resnext50_32x4d+se")
    assert shapes("sknet50") == shapes("resnext50_32x4d+sk")
    strides = create("se_resnet50", 10).layer2[0]
    assert (strides.conv1.stride, strides.conv2.stride) == ((2, 2), (1, 1))
    strides = create("resnet50+se", 10).layer2[0]
    assert (strides.conv1.stride, strides.conv2.stride) == ((1, 1), (2, 2))


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet21", "unknown network 'resnet21'; did you mean .*'resnet20'"),
        ("zzzzzz", "unknown network 'zzzzzz'"),
        ("resnet20+sse", "unknown unit 'sse'; did you mean 'se'"),
        ("resnet20+bam", "unknown unit 'bam'; did you mean 'cbam'"),
        ("resnet20:widht=2", "unknown argument 'widht' of the network resnet20; did you mean 'width'"),
        ("resnet20:stride_in=1x1", "stride_in is for bottlenecks"),
        ("resnet20:pool=ceil", "pool is for networks that pool in the stem"),
        ("shufflenet_v2_x1_0:width=2", "unknown argument 'width' of the network shufflenet_v2_x1_0; its arguments"),
        ("resnet20+se:redction=2", "unknown argument 'redction' of the unit se; did you mean 'reduction'"),
        ("resnet20+se:stage=2", "unknown argument 'stage' of the unit se; did you mean 'stages'"),
        ("resnet20:width=wide", "width=wide: expected a number"),
        ("resnet20:width=0", "width .* not 0.0"),
        ("resnet20:width=nan", "width .* not nan"),
        ("resnet50:stride_in=2x2", "stride_in=2x2: expected one of 3x3, 1x1"),
        ("resnet20+se:reduction=1.5", "reduction=1.5: expected a whole number"),
        ("resnet20+se:reduction=0", "reduction must be a whole number of at least 1"),
        ("resnet20+se:min_width=x", "min_width=x: expected a whole number"),
        ("resnet20+se:gate=softmax", "gate=softmax: expected one of sigmoid, hard_sigmoid, tanh"),
        ("resnet20+se:stages=4", "stages=4: .* within 1-3"),
        ("resnet20+se:stages=2-1", "stages=2-1"),
        ("resnet20+se:stages=0", "stages=0"),
        ("resnet20+se:stages=all", "stages=all"),
        ("resnet20+sk:branches=3x3", "branches=3x3: expected kernels"),
        ("resnet20+sk:branches=3", "two or more branches"),
        ("resnet20+sk:branches=3-4", "odd"),
        ("resnet20+sk:groups=3", "groups must divide the channels"),
        ("resnet20+se+se", "stage 1 was given two units for its branch"),
        ("se_resnet50+se", "stage 1 was given two units for its branch"),
        ("sknet50+sk:stages=4", "stage 4 was given two units for its convolution"),
        ("keras:resnet50", "unknown source 'keras'; there are torchvision, timm"),
        ("torchvison:resnet50", "unknown source 'torchvison'; did you mean 'torchvision'"),
        ("resnet20:width", "resnet20 is a network and not a source"),
        ("torchvision:resnet51", "unknown torchvision network 'resnet51'; did you mean .*'resnet50'"),
        ("torchvision:fcn_resnet50", "unknown torchvision network"),  # segments, does not classify
        ("timm:resnet51", "unknown timm network 'resnet51'; did you mean"),
        ("timm:resnet18.no_such_tag", "timm cannot build resnet18.no_such_tag"),
        ("torchvision:resnet18+bam", "unknown unit 'bam'; did you mean 'cbam'"),
        (
            "torchvision:resnet18+se:redction=2",
            "unknown argument 'redction' of the unit se; did you mean 'reduction'",
        ),
        ("torchvision:resnet18+se:stages=5", "stages=5: .* within 1-4"),
        ("torchvision:resnet18+se:init=zero", "init is identity or paper, not 'zero'"),
        ("torchvision:resnet18+se:gate=tanh,init=identity", "Cannot attach to layer1.0.bn2: .*start at 1"),
        ("torchvision:resnet18+sk:where=after", "a kernel unit stands around convolutions"),
        ("torchvision:resnet18+se:where=layer9", "modules whose name ends in 'layer9'.*candidates.*conv1"),
        ("torchvision:vgg11+se:where=before", "it has no residual branches"),
        ("timm:vit_tiny_patch16_224+se", "Nothing attached to VisionTransformer"),
        ("torchvision:resnet18:depth=3", "torchvision cannot build resnet18 with these arguments"),
        ("timm:resnet18:pretrained=true", "pretrained cannot be given in a spec"),
    ],
)
def test_refusals_say_what_was_wrong_and_what_would_do(spec, message):
    with pytest.raises(UsageError, match=message) as refusal:
        create(spec)
    assert repr(spec) in str(refusal.value)
    assert str(refusal.value).endswith((".", "?"))


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"in_channels": -1}, {"num_classes": "10"}])
def test_numbers_of_classes_and_channels(arguments):
    with pytest.raises(UsageError, match=f"{next(iter(arguments))} must be a whole number"):
        create("resnet20", **arguments)


# --- sources ---------------------------------------------------------------------------------------------------


def test_torchvision():
    network = create("torchvision:resnet18", num_classes=6)
    assert isinstance(network, torchvision.models.ResNet)
    assert network.fc.out_features == 6
    with pytest.raises(UsageError, match="3 channels"):
        create("torchvision:resnet18", in_channels=4)


def test_arguments_for_foreign_networks():
    network = create("torchvision:resnet18:width_per_group=64,zero_init_residual=true", num_classes=6)
    assert torch.all(network.layer1[0].bn2.weight == 0)


def test_timm():
    network = create("timm:resnet18:drop_rate=0.25", num_classes=6, in_channels=4)
    assert network.drop_rate == 0.25
    assert network.conv1.in_channels == 4
    assert network.get_classifier().out_features == 6
    assert create("timm:resnet18.a1_in1k", num_classes=6).fc.out_features == 6


def test_without_timm_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"excite\[timm\]"):
        create("timm:resnet18")


# --- one's own -------------------------------------------------------------------------------------------------


def test_register_network():
    def tiny(num_classes, in_channels, *, width: int = 8, act: Literal["relu", "silu"] = "relu", bias: bool = True):
        layers = nn.Linear(in_channels, width, bias=bias), {"relu": nn.ReLU, "silu": nn.SiLU}[act]()
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers, nn.Linear(width, num_classes))

    register_network("tiny", tiny)
    assert "tiny" in networks()
    network = create("tiny:width=3,act=silu,bias=false", num_classes=4)
    assert network[2].weight.shape == (3, 3)
    assert network[2].bias is None
    assert isinstance(network[3], nn.SiLU)
    with pytest.raises(UsageError, match="bias=perhaps: expected true or false"):
        create("tiny:bias=perhaps")


@pytest.mark.parametrize("name", ["resnet20", "a b", "", "x:y", "x+y", "../x"])
def test_names_that_cannot_be_registered(name):
    with pytest.raises(UsageError):
        register_network(name, nn.Identity)


class Halve(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, u, shortcut):
        return self.factor * u + shortcut


def test_register_unit_for_the_branch():
    register_unit("halve", lambda site, *, factor=0.5: Halve(float(factor)))
    network = create("resnet20+halve:factor=0.25,stages=2-3", 10)
    assert [type(block.se).__name__ for block in network.layer1] == ["Add"] * 3
    assert [block.se.factor for block in network.layer3] == [0.25] * 3
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_register_unit_for_the_convolution():
    sites = []

    def depthwise(site, *, kernel: int = 5) -> nn.Module:
        sites.append(site)
        groups = site.in_channels
        layer = nn.Conv2d(site.in_channels, site.out_channels, kernel, site.stride, kernel // 2, groups=groups)
        return nn.Sequential(layer, nn.BatchNorm2d(site.out_channels))

    register_unit("depthwise", depthwise, place="convolution")
    network = create("resnet50:width=0.25+depthwise:stages=2", 10)
    assert network.layer2[0].conv2[0].kernel_size == (5, 5)
    assert [site.stride for site in sites] == [2, 1, 1, 1]
    assert {site.activation for site in sites} == {"relu"}
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    with pytest.raises(UsageError, match="belongs to a unit"):
        register_unit("se", depthwise)
    with pytest.raises(UsageError, match="branch or convolution"):
        register_unit("other", depthwise, place="stem")


def test_eca_and_cbam_are_built_in_as_se_is():
    for unit, kind in (("eca", EfficientChannelAttention), ("cbam", ConvolutionalBlockAttention)):
        network = create(f"resnet20+{unit}:kernel=5", num_classes=6)
        assert len(found(network, kind)) == 9
        assert not names(network)
        network(torch.randn(2, 3, 32, 32)).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


# --- units that are attached -----------------------------------------------------------------------------------


def names(network):
    return [name for name, _ in attached_units(network)]


@pytest.mark.parametrize(
    ("spec", "first", "count"),
    [
        ("torchvision:resnet18+se", "layer1.0.bn2.se", 8),
        ("torchvision:resnet18+se:stages=1-3,reduction=8", "layer1.0.bn2.se", 6),
        ("torchvision:resnet18+se:where=after", "layer1.0.se", 8),
        ("torchvision:resnet18+se:where=before", "layer1.0.conv1.se", 8),
        ("torchvision:resnet18+eca:where=layer1.0.conv2", "layer1.0.conv2.eca", 1),
        ("timm:resnet18+sk", "layer1.0.conv2.sk", 8),
        ("resnet20+se:where=branch", "layer1.0.act2.se", 9),
        ("resnet20+sk:init=identity", "layer1.0.conv2.sk", 9),
        ("resnet20+se:where=identity", "layer1.0.downsample.se", 9),
    ],
)
def test_units_that_are_attached(spec, first, count):
    network = create(spec, num_classes=6)
    assert names(network)[0] == first
    assert len(names(network)) == count
    assert network.spec == spec
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 6)


def test_two_units_in_one_network():
    network = create("torchvision:resnet18+se+sk", num_classes=6)
    assert {name.rsplit(".", 1)[1] for name in names(network)} == {"se", "sk"}
    both = create("resnet20+se+sk:init=identity", num_classes=6)
    assert len(found(both, SqueezeExcite)) == len(found(both, AddedKernels)) == 9


def test_units_in_a_registered_network():
    class Plain(nn.Module):
        def __init__(self, num_classes, in_channels):
            super().__init__()
            self.first = nn.Conv2d(in_channels, 8, 3, 2, 1)
            self.second = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, num_classes)

        def forward(self, x):
            x = self.first(x).relu()
            return self.head((x + self.second(x)).mean((2, 3)))

    register_network("plain", Plain)
    assert names(create("plain+cbam", num_classes=3)) == ["second.cbam"]


def saved_host(spec, folder):
    """A network of six classes, and the file of its weights."""
    torch.manual_seed(0)
    host, file = create(spec, num_classes=6).eval(), folder / "host.pth"
    torch.save(host.state_dict(), file)
    return host, file


def test_without_weights_attached_units_are_drawn_and_with_weights_they_start_as_the_identity(tmp_path):
    host, file = saved_host("torchvision:resnet18", tmp_path)
    images = torch.randn(2, 3, 64, 64)
    network = create("torchvision:resnet18+se", num_classes=6, weights=file).eval()
    assert torch.equal(network(images), host(images))
    assert network.spec == "torchvision:resnet18+se:init=identity"
    assert network.origin.fresh == {name for name, _ in network.named_parameters() if ".se." in name}
    drawn = create("torchvision:resnet18+se:init=paper", num_classes=6, weights=file).eval()
    assert not torch.allclose(drawn(images), host(images), rtol=0.01)
    assert drawn.spec == "torchvision:resnet18+se:init=paper"
    assert torch.equal(drawn.layer1[0].conv1.weight, host.layer1[0].conv1.weight)


def test_a_file_of_the_whole_network_fills_the_units_too(tmp_path):
    network = create("torchvision:resnet18+se:init=identity", num_classes=6).eval()
    for name, parameter in network.named_parameters():
        if ".se." in name:
            nn.init.normal_(parameter)
    file = tmp_path / "whole.pth"
    torch.save(network.state_dict(), file)
    again = create("torchvision:resnet18+se", num_classes=6, weights=file).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), network(images))
    assert again.origin.fresh == frozenset()


def test_weights_of_the_host_of_an_own_network_have_its_units_attached(tmp_path):
    host, file = saved_host("resnet20", tmp_path)
    images = torch.randn(2, 3, 32, 32)
    for unit in ("se", "sk"):
        network = create(f"resnet20+{unit}", num_classes=6, weights=file).eval()
        assert network.spec == f"resnet20+{unit}:init=identity"
        assert torch.equal(network(images), host(images))
    built_in = create("resnet20+se", num_classes=6)
    torch.save(built_in.state_dict(), file)
    network = create("resnet20+se", num_classes=6, weights=file)
    assert network.spec == "resnet20+se"
    assert not names(network)


def test_the_hosts_weights_load_after_attaching_too(tmp_path):
    host, file = saved_host("torchvision:resnet18", tmp_path)
    network = create("torchvision:resnet18+se:init=identity", num_classes=6).eval()
    origin = excite.load_weights(network, file)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(images), host(images))
    assert all(".se." in name for name in origin.fresh)
    loaded = create("torchvision:resnet18", num_classes=6, weights=file)
    assert loaded.origin.fresh == frozenset()
    excite.attach(loaded)
    assert loaded.origin.fresh == origin.fresh
    cut = {name: tensor for name, tensor in network.state_dict().items() if name != "layer1.0.bn2.se.reduce.weight"}
    torch.save(cut, file)
    with pytest.raises(UsageError, match=r"1 missing: layer1\.0\.bn2\.se\.reduce\.weight"):
        excite.load_weights(network, file)

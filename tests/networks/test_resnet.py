"""The family against torchvision's and timm's networks, and its parts against their formulas."""

import math
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from excite.cost import cost
from excite.create import create
from excite.networks.catalog import CATALOG
from excite.networks.resnet import ZeroPadShortcut, resnet, widened
from excite.networks.site import Add
from excite.units.selective_kernel import SelectiveKernel
from excite.units.squeeze_excite import SqueezeExcite
from same_output import assert_same_output, shuffled_statistics


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# --- against torchvision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d"])
def test_same_output_as_torchvision_from_the_same_weights(name):
    theirs = shuffled_statistics(torchvision.models.get_model(name, weights=None, num_classes=10))
    ours = create(name, num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    assert_same_output(ours, theirs)


@pytest.mark.parametrize("name", ["resnet101", "resnet152"])
def test_same_names_and_shapes_as_torchvision(name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None)
        ours = create(name)
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == [
        (key, value.shape) for key, value in theirs.state_dict().items()
    ]


# --- against timm ----------------------------------------------------------------------------------------------


def our_name(timm_name):
    """timm's name of a tensor → ours; timm writes the unit's linear layers as 1×1 convolutions."""
    replacements = {
        "layer0.": "",
        "last_linear.": "fc.",
        ".se_module.": ".se.",
        ".fc1.": ".reduce.",
        ".fc2.": ".expand.",
        ".conv2.paths.": ".conv2.branches.",
        ".conv2.attn.fc_reduce.": ".conv2.reduce.",
        ".conv2.attn.bn.": ".conv2.norm.",
        ".conv2.attn.fc_select.": ".conv2.expand.",
    }
    name = timm_name
    for theirs, ours in replacements.items():
        name = name.replace(theirs, ours)
    if ".branches." in name:
        name = name.replace(".conv.", ".0.").replace(".bn.", ".1.")
    name = re.sub(r"\.conv(\d)\.conv\.", r".conv\1.", name)
    return re.sub(r"\.conv(\d)\.bn\.", r".bn\1.", name)


def from_timm(theirs, ours):
    state = {our_name(name): tensor for name, tensor in theirs.state_dict().items()}
    wanted = ours.state_dict()
    assert state.keys() == wanted.keys()
    ours.load_state_dict({name: state[name].reshape(wanted[name].shape) for name in wanted})
    return ours


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("resnet18+se:min_width=8", "seresnet18"),  # timm's hidden layers are never narrower than 8
        ("resnet50+se", "seresnet50"),
        ("se_resnext50_32x4d:pool=padded", "seresnext50_32x4d"),
        ("sknet50:pool=padded", "skresnext50_32x4d"),
    ],
)
def test_same_output_as_timm_from_the_same_weights(spec, name):
    theirs = shuffled_statistics(timm.create_model(name, num_classes=10))
    assert_same_output(from_timm(theirs, create(spec, 10)), theirs)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("se_resnet50", "legacy_seresnet50"),
        ("se_resnext50_32x4d", "legacy_seresnext50_32x4d"),
    ],
)
def test_same_output_as_the_se_authors_networks(spec, name):
    """timm's "legacy" networks are the authors', ported: the stride in the first 1×1, and Caffe's pooling."""
    theirs = shuffled_statistics(timm.create_model(name, num_classes=10))
    assert_same_output(from_timm(theirs, create(spec, 10)), theirs)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("se_resnet18", "legacy_seresnet18"),
        ("se_resnet34", "legacy_seresnet34"),
        ("se_resnet101", "legacy_seresnet101"),
        ("se_resnet152", "legacy_seresnet152"),
        ("se_resnext101_32x4d", "legacy_seresnext101_32x4d"),
        ("resnext101_32x4d", "resnext101_32x4d"),
    ],
)
def test_same_names_and_sizes_as_timm(spec, name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), create(spec)
    assert {our_name(key): value.numel() for key, value in theirs.state_dict().items()} == {
        key: value.numel() for key, value in ours.state_dict().items()
    }


# --- what SE adds, exactly -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "with_se", "blocks", "channels"),
    [
        ("resnet50:stride_in=1x1", "se_resnet50", (3, 4, 6, 3), (256, 512, 1024, 2048)),
        ("resnet101:stride_in=1x1", "se_resnet101", (3, 4, 23, 3), (256, 512, 1024, 2048)),
        ("resnet152:stride_in=1x1", "se_resnet152", (3, 8, 36, 3), (256, 512, 1024, 2048)),
        ("resnet18", "se_resnet18", (2, 2, 2, 2), (64, 128, 256, 512)),
        ("resnext50_32x4d", "se_resnext50_32x4d", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    ],
)
def test_what_se_adds_is_the_papers_formula(plain, with_se, blocks, channels):
    """Hu et al. 2018, Sect. 4: 2/r · Σ Nₛ · Cₛ² weights; their biases are C/r + C per block."""
    with torch.device("meta"):
        before, after = (cost(create(spec), (3, 224, 224)) for spec in (plain, with_se))
    r = 16
    weights = 2 * sum(n * c**2 for n, c in zip(blocks, channels, strict=True)) // r
    biases = sum(n * (c // r + c) for n, c in zip(blocks, channels, strict=True))
    assert after.parameters - before.parameters == weights + biases
    assert after.macs - before.macs == weights  # each weight is used once per image


def test_what_se_adds_to_a_cifar_network():
    """Never fewer than 4 hidden units: 3 blocks each of 16, 32 and 64 channels, all with 4."""
    before, after = (cost(create(spec, 10), (3, 32, 32)) for spec in ("resnet20", "resnet20+se"))
    assert after.parameters - before.parameters == sum(3 * (2 * c * 4 + 4 + c) for c in (16, 32, 64))


# --- the parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels_in", "channels_out", "size"), [(16, 32, 32), (4, 12, 7), (6, 6, 5)])
def test_option_a_shortcut(channels_in, channels_out, size):
    x = np.random.default_rng(0).standard_normal((2, channels_in, size, size)).astype(np.float32)
    expected = np.zeros((2, channels_out, math.ceil(size / 2), math.ceil(size / 2)), np.float32)
    for channel in range(channels_in):
        for row in range(expected.shape[2]):
            for column in range(expected.shape[3]):
                shifted = channel + (channels_out - channels_in) // 2
                expected[:, shifted, row, column] = x[:, channel, 2 * row, 2 * column]
    shortcut = ZeroPadShortcut(channels_in, channels_out, 2)
    assert not list(shortcut.parameters())
    np.testing.assert_array_equal(shortcut(torch.from_numpy(x)).numpy(), expected)


def test_cifar_shortcuts_have_no_parameters():
    assert not [name for name, _ in create("resnet20", 10).named_parameters() if "downsample" in name]


@pytest.mark.parametrize("spec", ["resnet20", "resnet20+se", "resnet20+sk", "resnet50", "sknet50"])
def test_convolutions_start_as_he_says(spec):
    for name, module in create(spec, 10).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
        if isinstance(module, nn.BatchNorm2d):
            assert torch.all(module.weight == 1), name
            assert torch.all(module.bias == 0), name


def test_the_same_seed_gives_the_same_network():
    first, second = (create("resnet20+se+sk", 10).state_dict() for _ in range(2) if torch.manual_seed(3))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_units_sit_where_the_papers_put_them():
    network = create("resnet50+se+sk")
    block = network.layer2[0]
    assert isinstance(block.se, SqueezeExcite)
    assert block.se.expand.out_features == 512
    assert isinstance(block.conv2, SelectiveKernel)
    assert isinstance(block.bn2, nn.Identity)
    assert [type(branch[-1]) for branch in block.conv2.branches] == [nn.ReLU, nn.ReLU]
    basic = create("resnet20+sk").layer2[0]
    assert isinstance(basic.conv1, nn.Conv2d)
    assert isinstance(basic.conv2, SelectiveKernel)
    # The basic block's second convolution adds before it rectifies: a branch that cannot go below 0 could only add.
    assert [type(branch[-1]) for branch in basic.conv2.branches] == [nn.Identity, nn.Identity]


def test_se_scales_the_branch_and_not_the_shortcut():
    block = create("resnet20+se").layer1[0].eval()
    x = torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        block.se.expand.weight.zero_()
        block.se.expand.bias.fill_(-100.0)  # gates of 0: only the shortcut is left, which is not negative here
        torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("spec", ["resnet20", "resnet20+se", "resnet20+sk", "resnet50:width=0.0625+se+sk"])
def test_gradients_pass_what_is_done_in_place(spec):
    """Against finite differences: the join and the activations overwrite their inputs."""
    network = create(spec, 3)
    block = network.layer2[0].double().eval()
    channels = network.layer1[-1].se(torch.zeros(1, block.conv1.in_channels, 1, 1).float(), torch.zeros(1)).shape[1]
    x = torch.randn(2, channels, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x * 1.0), x, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("spec", ["resnet20+se+sk", "sknet26:width=0.25"])
def test_can_be_traced_and_compiled_whole(spec):
    network = create(spec, 10).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
        traced = torch.fx.symbolic_trace(network)(images)
        compiled = torch.compile(network, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(traced, expected)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 8), (64, 40)])
def test_images_of_other_sizes(size):
    network = create("resnet20+se+sk", 10).eval()
    with torch.inference_mode():
        assert network(torch.randn(1, 3, *size)).shape == (1, 10)


def test_channels_last_and_bfloat16():
    network = create("resnet20+se+sk", 10).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = network(images)
        laid_out = network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(images)
    torch.testing.assert_close(laid_out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rough.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


# --- width -----------------------------------------------------------------------------------------------------


# One of each kind of table: the others differ in their depths.
KINDS = [
    *("resnet18", "resnet50", "resnext50_32x4d", "se_resnet18", "se_resnet50", "senet154"),
    *("sknet26", "resnet20", "resnext29_16x64d", "sknet29"),
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("width", [0.25, 0.8, 1.25, 1.9])
def test_width_scales_all_channels_and_still_builds(name, width):
    table = CATALOG[name].table
    wide = widened(table, width)
    for before, after in zip((*table.inner, *table.outer), (*wide.inner, *wide.outer), strict=True):
        assert abs(after - before * width) <= math.lcm(4, table.groups) / 2 + 1e-9
    assert all(channels % table.groups == 0 for channels in wide.inner)
    with torch.device("meta"), torch.no_grad():
        network = create(f"{name}:width={width}", 5).eval()
        size = CATALOG[name].input_size
        assert network(torch.empty(1, 3, size, size)).shape == (1, 5)


def test_width_one_changes_nothing():
    table = CATALOG["sknet29"].table
    assert widened(table, 1.0) == table


def test_wider_by_a_quarter():
    network = create("resnet20:width=1.25", 10)
    assert [network.layer1[0].conv1.out_channels, network.layer3[0].conv1.out_channels] == [20, 80]
    assert network.fc.in_features == 80


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf"), 1000])
def test_widths_that_make_no_network(width):
    with pytest.raises(ValueError, match="between"):
        widened(CATALOG["resnet20"].table, width)


def test_parts_can_be_passed_in():
    """The builder itself takes any join: here one that remembers where it was asked for."""
    asked = []

    def join(site):
        asked.append((site.stage, site.out_channels))
        return Add()

    resnet(CATALOG["resnet20"].table, join=join)
    assert asked == [(1, 16)] * 3 + [(2, 32)] * 3 + [(3, 64)] * 3

"""MobileNet V1 and V2: their tables, widths, forms for small images, and where units go."""

import pytest
import torch
from torch import nn

from excite.cost import cost
from excite.create import create
from excite.errors import UsageError
from excite.units import SelectiveKernel, SqueezeExcite


def maps(network, size):
    """Channels and side after every stage."""
    found = []
    hooks = [
        module.register_forward_hook(lambda _, __, y: found.append((y.shape[1], y.shape[2])))
        for name, module in network.named_children()
        if name.startswith("layer")
    ]
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return found


def test_stages_of_v1():
    """Howard et al. 2017, Table 1."""
    assert maps(create("mobilenet_v1"), 224) == [(64, 112), (128, 56), (256, 28), (512, 14), (1024, 7)]
    assert maps(create("mobilenet_v1_cifar", 10), 32) == [(64, 32), (128, 16), (256, 8), (512, 4), (1024, 2)]


def test_stages_of_v2():
    """Sandler et al. 2018, Table 2."""
    imagenet = [(16, 112), (24, 56), (32, 28), (64, 14), (96, 14), (160, 7), (320, 7)]
    assert maps(create("mobilenet_v2"), 224) == imagenet
    small = [(16, 32), (24, 32), (32, 16), (64, 8), (96, 8), (160, 4), (320, 4)]
    assert maps(create("mobilenet_v2_cifar", 10), 32) == small


def test_v2_adds_the_input_where_the_shape_stays():
    network = create("mobilenet_v2_cifar", 10)
    added = [[block.residual for block in network.get_submodule(f"layer{i}")] for i in range(1, 8)]
    assert added == [[False] + [True] * (depth - 1) for depth in (1, 2, 3, 4, 3, 3, 1)]


def test_v2_projects_linearly():
    """No activation after the last 1×1 convolution of a block: its output takes both signs."""
    torch.manual_seed(0)
    block = create("mobilenet_v2_cifar", 10).layer3[0]
    assert block(torch.randn(4, 24, 8, 8)).min() < -0.1


# The parameters of V1 at α are the paper's rule α·M and α·N worked out by hand: standard widths divide by 8.
@pytest.mark.parametrize("width", [0.25, 0.5, 0.75, 1.0])
def test_width_of_v1_against_the_formula(width):
    stem, rows = 32, [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    channels = int(stem * width)
    expected = 27 * channels + 2 * channels
    for wanted in (int(row * width) for row in rows):
        expected += 9 * channels + 2 * channels + channels * wanted + 2 * wanted
        channels = wanted
    expected += channels * 1000 + 1000
    assert cost(create(f"mobilenet_v1:width={width}"), (3, 224, 224)).parameters == expected


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.3, 1.4])
def test_width_of_v2_against_torchvision(width):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.mobilenet_v2(width_mult=width)
    ours = create(f"mobilenet_v2:width={width}")
    assert sorted(tuple(p.shape) for p in ours.parameters()) == sorted(tuple(p.shape) for p in theirs.parameters())


@pytest.mark.parametrize("width", ["0", "-1", "nan", "100"])
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_widths_that_make_no_network(name, width):
    with pytest.raises(UsageError, match="between"):
        create(f"{name}:width={width}")


@pytest.mark.parametrize("name", ["mobilenet_v1_cifar", "mobilenet_v2_cifar", "shufflenet_v2_x0_5"])
def test_where_units_go(name):
    blocks = {"mobilenet_v1_cifar": 13, "mobilenet_v2_cifar": 17, "shufflenet_v2_x0_5": 16}[name]
    with_se, with_sk = create(f"{name}+se", 10), create(f"{name}+sk", 10)
    assert sum(isinstance(module, SqueezeExcite) for module in with_se.modules()) == blocks
    kernels = [module for module in with_sk.modules() if isinstance(module, SelectiveKernel)]
    assert len(kernels) == blocks
    assert all(branch[0].groups == branch[0].in_channels for unit in kernels for branch in unit.branches)
    one_stage = create(f"{name}+se:stages=2", 10)
    assert {n.partition(".")[0] for n, m in one_stage.named_modules() if isinstance(m, SqueezeExcite)} == {"layer2"}


@pytest.mark.parametrize("name", ["mobilenet_v1_cifar", "mobilenet_v2_cifar", "shufflenet_v2_x0_5"])
# So many hidden units that some of each SE unit are awake.
@pytest.mark.parametrize("units", ["", "+se:reduction=1", "+sk", "+se:reduction=1+sk"])
def test_every_parameter_learns(name, units):
    torch.manual_seed(0)
    network = create(name + units, 5)
    loss = network(torch.randn(4, 3, 32, 32)).square().sum()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", ["mobilenet_v1_cifar", "mobilenet_v2_cifar", "shufflenet_v2_x0_5"])
def test_open_gates_change_nothing(name):
    """With s = 1 everywhere the network with SE is the plain one."""
    torch.manual_seed(0)
    plain, attended = create(name, 5).eval(), create(f"{name}+se", 5).eval()
    attended.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for module in attended.modules():
            if isinstance(module, SqueezeExcite):
                module.expand.weight.zero_()
                module.expand.bias.fill_(40.0)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(attended(images), plain(images))


def test_relu6_is_the_release_and_relu_the_paper():
    kinds = {type(module) for module in create("mobilenet_v1").modules() if "ReLU" in type(module).__name__}
    assert kinds == {nn.ReLU6}
    paper = {type(m) for m in create("mobilenet_v1:activation=relu").modules() if "ReLU" in type(m).__name__}
    assert paper == {nn.ReLU}

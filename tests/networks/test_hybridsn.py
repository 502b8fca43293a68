"""HybridSN against its paper's table, its layers against NumPy, and windows and bands of every size."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from excite import attach
from excite.cost import cost
from excite.create import create, for_window
from excite.errors import UsageError
from excite.networks.hybridsn import HybridSN, adjusted, hybridsn
from excite.networks.tables import HybridSNTable
from excite.spec import parse_spec
from excite.units import SelectiveKernel, SqueezeExcite

NAMES = ["hybridsn", "hybridsn_2d", "hybridsn_3d"]
SMALL = HybridSNTable(spectral=(3, 2), widths=(2, 3, 4), dense=(6, 5), norm="none", input_size=7)


def windows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(network, shape):
    """The shape of what each child answers, by name, for one window."""
    found = {}
    hooks = [
        child.register_forward_hook(lambda _, __, y, name=name: found.update({name: tuple(y.shape[1:])}))
        for name, child in network.named_children()
    ]
    with torch.no_grad():
        network.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return found


# --- the paper --------------------------------------------------------------------------------------------------


def test_the_papers_table():
    """Roy et al. 2020, Table I: the output of every layer (channels first here) and its parameters."""
    network = create("hybridsn:norm=none", 16, in_channels=30)
    rows = {
        "conv1": ((8, 24, 23, 23), 512),
        "conv2": ((16, 20, 21, 21), 5_776),
        "conv3": ((32, 18, 19, 19), 13_856),
        "stack": ((576, 19, 19), 0),
        "conv4": ((64, 17, 17), 331_840),
        "flatten": ((18_496,), 0),
        "fc1": ((256,), 4_735_232),
        "dropout1": ((256,), 0),
        "fc2": ((128,), 32_896),
        "dropout2": ((128,), 0),
        "fc": ((16,), 2_064),
    }
    found = outputs(network, (30, 25, 25))
    for name, (shape, parameters) in rows.items():
        assert found[name] == shape, name
        assert sum(p.numel() for p in network.get_submodule(name).parameters()) == parameters, name
    assert sum(parameter.numel() for parameter in network.parameters()) == 5_122_176


def test_batch_norm_takes_the_place_of_the_biases():
    plain, normed = (create(spec, 16, 30) for spec in ("hybridsn:norm=none", "hybridsn"))
    difference = sum(p.numel() for p in normed.parameters()) - sum(p.numel() for p in plain.parameters())
    assert difference == 8 + 16 + 32 + 64  # a bias each becomes a weight and a bias
    assert all(normed.get_submodule(f"conv{i}").bias is None for i in range(1, 5))


def test_the_children_in_order():
    stages = [[f"conv{i}", f"norm{i}", f"act{i}", f"se{i}"] for i in range(1, 5)]
    dense = ["flatten", "fc1", "act5", "dropout1", "fc2", "act6", "dropout2", "fc"]
    expected = {
        "hybridsn": ["spectral", *stages[0], *stages[1], *stages[2], "stack", *stages[3], *dense],
        "hybridsn_2d": [*stages[0], *stages[1], *stages[2], *stages[3], *dense],
        "hybridsn_3d": ["spectral", *stages[0], *stages[1], *stages[2], *stages[3], "stack", *dense],
    }
    for name, children in expected.items():
        network = create(name, 16, 30)
        assert [child for child, _ in network.named_children()] == children
        assert all(not list(child.children()) for child in network.children())


def test_the_counterparts_end_in_the_same_dense_layers():
    networks = [create(name, 16, 30) for name in NAMES]
    assert {outputs(network, (30, 25, 25))["flatten"] for network in networks} == {(18_496,)}
    macs = [cost(network, (30, 25, 25)).macs for network in networks]
    assert macs[1] == pytest.approx(macs[0], rel=0.05)


# --- the arithmetic ---------------------------------------------------------------------------------------------


def correlate(x, weight, bias):
    """A convolution without padding over all positions of x (C, *), tap by tap; weight (O, C, *)."""
    kernel = weight.shape[2:]
    sizes = [have - span + 1 for have, span in zip(x.shape[1:], kernel, strict=True)]
    out = np.zeros((weight.shape[0], *sizes))
    for position in itertools.product(*map(range, sizes)):
        patch = x[(slice(None), *(slice(p, p + k) for p, k in zip(position, kernel, strict=True)))]
        out[(slice(None), *position)] = (weight * patch).sum(axis=tuple(range(1, weight.ndim))) + bias
    return out


def by_hand(network, x, spectral):
    """The network in evaluation mode on one window (B, H, W), in NumPy."""
    number = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    maps = x[None] if spectral else x
    stages = sum(name.startswith("conv") for name, _ in network.named_children())
    for stage in range(1, stages + 1):
        weight = number[f"conv{stage}.weight"]
        maps = correlate(maps, weight, number.get(f"conv{stage}.bias", np.zeros(len(weight))))
        if f"norm{stage}.weight" in number:
            across = (-1, *[1] * (maps.ndim - 1))
            mean, variance = (number[f"norm{stage}.running_{what}"].reshape(across) for what in ("mean", "var"))
            maps = (maps - mean) / np.sqrt(variance + 1e-5)
            maps = maps * number[f"norm{stage}.weight"].reshape(across) + number[f"norm{stage}.bias"].reshape(across)
        maps = np.maximum(maps, 0)
        if stage == spectral:
            maps = maps.reshape(-1, *maps.shape[2:])
    hidden = maps.reshape(-1)
    for name in ("fc1", "fc2"):
        hidden = np.maximum(number[f"{name}.weight"] @ hidden + number[f"{name}.bias"], 0)
    return number["fc.weight"] @ hidden + number["fc.bias"]


def randomised(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in network.double().eval().modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if "bias" in name or "running_mean" in name:
                tensor.data.uniform_(-0.5, 0.5, generator=generator)
            elif "running_var" in name or (isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight"):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return network


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("spectral", [(), (3, 2), (3, 2, 2)])
def test_equals_numpy(spectral, norm):
    network = randomised(hybridsn(replace(SMALL, spectral=spectral, norm=norm), 4, 6))
    x = windows(2, 6, 7, 7).double()
    expected = [by_hand(network, window, len(spectral)) for window in x.numpy()]
    with torch.no_grad():
        np.testing.assert_allclose(network(x).numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("units", ["", "+se:reduction=1", "+sk"])
def test_gradients(units):
    torch.manual_seed(0)
    network = randomised(create(f"hybridsn:window=5,width=0.25,dropout=0{units}", 3, 4))
    chosen = {name: p for name, p in network.named_parameters() if name.startswith(("conv1", "conv4", "se2", "fc."))}
    names, values = zip(*chosen.items(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (x,))

    # Far fewer directions than entries: each checks them all at once.
    assert torch.autograd.gradcheck(run, (windows(2, 4, 5, 5).double().requires_grad_(), *values), fast_mode=True)


# --- windows, bands, classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["", "+se", "+sk", "+se+sk"])
@pytest.mark.parametrize("name", [*NAMES, "hybridsn:norm=none"])
@pytest.mark.parametrize(("window", "bands"), [(1, 1), (1, 40), (2, 5), (3, 7), (5, 1), (7, 12), (9, 8), (25, 3)])
def test_every_window_and_number_of_bands(name, window, bands, units):
    torch.manual_seed(0)
    network = create(for_window(name + units, window), 5, in_channels=bands)
    assert network.input_shape == (bands, window, window)
    logits = network(windows(3, bands, window, window))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_spans_what_is_left(name):
    shapes = outputs(create(f"{name}:window=6", 2, 9), (9, 6, 6))
    sides = [shapes[f"conv{stage}"][-1] for stage in range(1, 5)]
    assert sides == [4, 2, 1, 1]
    if name == "hybridsn_3d":
        assert [shapes[f"conv{stage}"][1] for stage in range(1, 5)] == [3, 1, 1, 1]


@pytest.mark.parametrize("units", ["", "+se", "+sk"])
@pytest.mark.parametrize("name", NAMES)
def test_in_half_precision(name, units):
    torch.manual_seed(0)
    network = create(f"{name}:window=9{units}", 4, 12)
    x = windows(4, 12, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x)
    half.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = network(x).float()
    with torch.no_grad():
        whole = network(x)
    assert (half - whole).abs().max() < 0.05 * whole.abs().max()


@pytest.mark.parametrize("units", ["", "+se", "+sk"])
def test_a_window_alone_is_as_in_a_batch(units):
    network = create(f"hybridsn:window=7{units}", 4, 9).eval()
    x = windows(5, 9, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([network(x[i : i + 1]) for i in range(5)]), network(x))


@pytest.mark.parametrize(
    "shape", [(2, 30, 9, 9), (2, 12, 25, 25), (30, 25, 25), (2, 30, 25, 24), (2, 1, 30, 25, 25)], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_other_windows_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"windows of 25×25 pixels with 30 bands, .* but got \(") as caught:
        create(name, 16, 30)(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_a_part_of_the_network_runs_alone():
    network = create("hybridsn:window=5", 4, 9).eval()
    x = windows(2, 9, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(network[5:](network[:5](x)), network(x))


def test_traces_and_compiles():
    network = create("hybridsn:window=5+se+sk", 4, 9).eval()
    x = windows(2, 9, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


# --- how it starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_start(name):
    torch.manual_seed(0)
    network = create(name, 16, 30)
    for child, module in network.named_children():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.weight.numel() > 500:
            variance = 2 / (module.in_channels * math.prod(module.kernel_size))
        elif child in ("fc1", "fc2"):
            variance = 2 / module.in_features
            assert not module.bias.any()
        else:
            continue
        assert module.weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.1), child
    assert type(network.conv1) in (nn.Conv2d, nn.Conv3d)


@pytest.mark.parametrize("name", [*NAMES, "hybridsn:norm=none"])
def test_logits_start_neither_still_nor_wild(name):
    torch.manual_seed(0)
    spread = create(name, 16, 30)(windows(8, 30, 25, 25)).std().item()
    assert 0.03 < spread < 3


# --- units --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_where_units_go(name):
    network = create(f"{name}+se+sk", 16, 30)
    for stage, channels in enumerate(network.table.widths, start=1):
        gate, kernels = network.get_submodule(f"se{stage}"), network.get_submodule(f"conv{stage}")
        assert isinstance(gate, SqueezeExcite)
        assert (gate.reduce.in_features, gate.reduce.out_features) == (channels, max(4, channels // 16))
        assert isinstance(kernels, SelectiveKernel)
        assert kernels.reduce.weight.shape == (32 if channels >= 128 else 8, channels)
        own, dilated = (branch[0] for branch in kernels.branches)
        assert (
            own.kernel_size == dilated.kernel_size == create(name, 16, 30).get_submodule(f"conv{stage}").kernel_size
        )
        assert set(own.dilation) == {1}
        assert set(dilated.dilation) == {2}
        assert isinstance(network.get_submodule(f"norm{stage}"), nn.Identity)
    one_stage = create(f"{name}+se:stages=2+sk:stages=4", 16, 30)
    units = {child for child, m in one_stage.named_modules() if isinstance(m, (SqueezeExcite, SelectiveKernel))}
    assert units == {"se2", "conv4"}


@pytest.mark.parametrize("units", ["+sk", "+se", "+eca"])
@pytest.mark.parametrize("name", NAMES)
def test_units_leave_every_map_its_size(name, units):
    plain, attended = (outputs(create(spec, 3, 30), (30, 25, 25)) for spec in (name, name + units))
    assert plain == attended


def test_a_kernel_over_the_whole_map_is_not_dilated():
    """The taps of a dilated one would see nothing but padding there."""
    network = create("hybridsn:window=5+sk", 3, 12)
    dilations = [network.get_submodule(f"conv{stage}").branches[1][0].dilation for stage in range(1, 5)]
    assert dilations == [(2, 2, 2), (2, 1, 1), (1, 1, 1), (1, 1)]


def test_open_gates_change_nothing():
    torch.manual_seed(0)
    plain, attended = (create(spec, 5, 12).eval() for spec in ("hybridsn:window=9", "hybridsn:window=9+se"))
    attended.load_state_dict(plain.state_dict(), strict=False)
    x = windows(2, 12, 9, 9)
    with torch.no_grad():
        for module in attended.modules():
            if isinstance(module, SqueezeExcite):
                module.expand.weight.zero_()
                module.expand.bias.fill_(40.0)
        torch.testing.assert_close(attended(x), plain(x))


def test_attention_to_the_own_kernel_alone_is_the_plain_network():
    torch.manual_seed(0)
    plain, attended = (create(spec, 5, 12) for spec in ("hybridsn:window=9", "hybridsn:window=9+sk"))
    names = {"conv": "branches.0.0", "norm": "branches.0.1"}
    state = attended.state_dict()
    for name, tensor in plain.state_dict().items():
        layer, _, rest = name.partition(".")
        kind, stage = layer.rstrip("0123456789"), layer[-1]
        state[f"conv{stage}.{names[kind]}.{rest}" if kind in names else name] = tensor
    attended.load_state_dict(state)
    for stage in range(1, 5):
        unit = attended.get_submodule(f"conv{stage}")
        unit.gate.register_forward_hook(lambda _, __, y: torch.cat((torch.ones_like(y[:, :1]), y[:, 1:] * 0), 1))
    x = windows(2, 12, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(attended.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hybridsn+cbam", r"cbam looks at maps of two dimensions, and those of stage 1 have 3: give stages="),
        ("hybridsn+sk:branches=3-5", r"branches begin with the kernel of stage 1, which is 7×3×3"),
        ("hybridsn+sk:branches=3d2-3,stages=4", r"branches begin with the kernel of stage 4, which is 3×3"),
        ("hybridsn+sk:branches=3-1,stages=4", r"spans 1 and the first 3"),
        ("hybridsn+se:stages=5", r"within 1-4"),
        ("hybridsn_3d+sk:init=identity", r"no 2-d convolutions with a square kernel"),
        ("hybridsn+cbam:init=identity", r"feature maps of images, \(N, C, H, W\)"),
        ("hybridsn:window=0", r"window is the side of a window in pixels, 1 to 128, not 0"),
        ("hybridsn:window=224", r"1 to 128, not 224"),
        ("hybridsn:window=big", r"window=big: expected a whole number"),
        ("hybridsn:dropout=1", r"at least 0 and below 1, not 1"),
        ("hybridsn:width=0", r"between 0.05 and 20"),
        ("hybridsn:norm=layer", r"one of batch, none"),
        ("hybridsn:blocks=3", r"its arguments are window, norm, dropout, width"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        create(spec, 16, 30)
    assert str(caught.value).startswith(f"Cannot build '{spec}'")


def test_units_of_other_kernels_in_the_2d_stages():
    network = create("hybridsn+sk:branches=3-5-3d3,stages=4+cbam:stages=4", 3, 30)
    assert [branch[0].padding for branch in network.conv4.branches] == [(0, 0), (1, 1), (2, 2)]
    assert outputs(network, (30, 25, 25))["conv4"] == (64, 17, 17)


@pytest.mark.parametrize(
    ("unit", "where", "places"),
    [
        ("se", "act?", ["act1.se", "act2.se", "act3.se", "act4.se"]),
        ("eca", "act?", ["act1.eca", "act2.eca", "act3.eca", "act4.eca"]),
        ("sk", "auto", ["conv4.sk"]),
        ("cbam", "act4", ["act4.cbam"]),
    ],
)
def test_units_are_attached_to_it(unit, where, places):
    torch.manual_seed(0)
    network = create("hybridsn:window=9", 5, 12).eval()
    x = windows(2, 12, 9, 9)
    with torch.no_grad():
        before = network(x)
        table = attach(network, unit, where=where)
        torch.testing.assert_close(network(x), before)
    assert [row.name for row in table.units] == places


# --- the spec for a window ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "window", "expected"),
    [
        ("hybridsn", 25, "hybridsn"),
        ("hybridsn", 9, "hybridsn:window=9"),
        ("hybridsn_2d:norm=none+se:reduction=4", 9, "hybridsn_2d:norm=none,window=9+se:reduction=4"),
        ("hybridsn:window=9", 9, "hybridsn:window=9"),
        ("hybridsn:window=25", 25, "hybridsn:window=25"),
        ("resnet20+se", 25, "resnet20+se"),
        ("torchvision:resnet18", 25, "torchvision:resnet18"),
        ("one-of-their-own", 25, "one-of-their-own"),
    ],
)
def test_for_window(spec, window, expected):
    assert str(for_window(spec, window)) == expected
    assert for_window(parse_spec(spec), window) == parse_spec(expected)


def test_for_window_refuses_another():
    with pytest.raises(UsageError, match=r"'hybridsn:window=9' is a network for windows of 9×9 pixels.* are 25×25"):
        for_window("hybridsn:window=9", 25)


def test_the_arguments_of_a_spec():
    table = HybridSNTable(spectral=(7,), widths=(8, 16))
    assert adjusted(table) == table
    assert adjusted(table, window=9, norm="none", dropout=0.0, width=0.5) == HybridSNTable(
        spectral=(7,), widths=(4, 8), dense=(128, 64), dropout=0.0, norm="none", input_size=9
    )
    network = create("hybridsn:dropout=0.25", 16, 30)
    assert isinstance(network, HybridSN)
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.25, 0.25]


def test_the_same_seed_gives_the_same_network():
    first, second = (create("hybridsn:window=5+se+sk", 4, 9).state_dict() for _ in range(2) if torch.manual_seed(3))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_copy_is_the_same():
    network = create("hybridsn:window=5", 4, 9).eval()
    x = windows(2, 9, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(network)(x), network(x))

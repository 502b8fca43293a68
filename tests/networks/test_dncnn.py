"""DnCNN against its paper's list of layers, a network in NumPy, and its own gradients; where units go in it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from excite import attach, detach
from excite.create import create
from excite.errors import UsageError
from excite.networks.dncnn import DnCNN, adjusted, dncnn
from excite.networks.tables import DnCNNTable
from excite.surgery import units as unit_registry
from excite.surgery.units import register_unit
from excite.units import SelectiveKernel, SqueezeExcite

SMALL = "dncnn_s:depth=5,channels=6"


def images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(network, seed=0):
    """In double precision and evaluation mode, with running statistics and biases of a trained network's kind."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.double().eval().modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if "bias" in name or "running_mean" in name:
                tensor.data.uniform_(-0.5, 0.5, generator=generator)
            elif "running_var" in name or (tensor.dim() == 1 and "num_batches" not in name):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return network


# --- the paper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "channels", "parameters"),
    [
        # Sect. III-A: (i) conv + ReLU, (ii) conv + batch norm + ReLU, 3×3×64, (iii) conv.
        ("dncnn_s", 17, 1, 640 + 15 * (36_864 + 128) + 577),
        ("dncnn_b", 20, 1, 640 + 18 * (36_864 + 128) + 577),
        ("dncnn_color", 20, 3, 1_792 + 18 * (36_864 + 128) + 1_731),
        ("dncnn_3", 20, 1, 640 + 18 * (36_864 + 128) + 577),
    ],
)
def test_the_papers_layers(name, depth, channels, parameters):
    network = create(name)
    kinds = [type(child) for child in network.children() if not isinstance(child, nn.Identity)]
    hidden = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [nn.Conv2d, nn.ReLU, *hidden * (depth - 2), nn.Conv2d]
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert (network.in_channels, network.depth, network.residual) == (channels, depth, True)
    # Sect. III-A: "the receptive field of DnCNN with depth of d should be (2d + 1) × (2d + 1)".
    assert network.receptive_field == 2 * depth + 1
    assert network.halo == depth
    biased = [f"conv{i}" for i in range(1, depth + 1) if network.get_submodule(f"conv{i}").bias is not None]
    assert biased == ["conv1", f"conv{depth}"]


def test_the_children_in_order():
    hidden = [name for i in (2, 3, 4) for name in (f"conv{i}", f"norm{i}", f"act{i}", f"se{i}")]
    expected = ["conv1", "act1", *hidden, "conv5"]
    for spec in (SMALL, f"{SMALL},norm=none", f"{SMALL}+se+sk"):
        assert [name for name, _ in create(spec).named_children()] == expected


def test_without_norm_every_convolution_has_a_bias():
    network = create(f"{SMALL},norm=none")
    convolutions = [child for child in network.children() if isinstance(child, nn.Conv2d)]
    assert len(convolutions) == 5
    assert all(child.bias is not None for child in convolutions)
    assert not any(isinstance(child, nn.BatchNorm2d) for child in network.children())


# --- the arithmetic -----------------------------------------------------------------------------------------------


def correlate(x, weight, bias):
    """A convolution with a frame of zeros over x (C, H, W), tap by tap; weight (O, C, k, k)."""
    kernel = weight.shape[-1]
    height, width = x.shape[1:]
    framed = np.pad(x, ((0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
    out = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for row in range(kernel):
        for col in range(kernel):
            out += np.einsum("oc,chw->ohw", weight[:, :, row, col], framed[:, row : row + height, col : col + width])
    return out


def by_hand(network, x, depth, residual):
    """The network in evaluation mode on one image (C, H, W), in NumPy."""
    number = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    maps = x
    for i in range(1, depth + 1):
        weight = number[f"conv{i}.weight"]
        maps = correlate(maps, weight, number.get(f"conv{i}.bias", np.zeros(len(weight))))
        if f"norm{i}.weight" in number:
            scale = number[f"norm{i}.weight"] / np.sqrt(number[f"norm{i}.running_var"] + 1e-5)
            shift = number[f"norm{i}.bias"] - scale * number[f"norm{i}.running_mean"]
            maps = maps * scale[:, None, None] + shift[:, None, None]
        if i < depth:
            maps = np.maximum(maps, 0)
    return x - maps if residual else maps


@pytest.mark.parametrize("shape", [(9, 12), (1, 1), (2, 7)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("arguments", "residual"),
    [("", True), ("norm=none", True), ("residual=false", False), ("kernel=5", True), ("kernel=1", True)],
)
def test_by_hand(arguments, residual, channels, shape):
    network = randomised(create(f"dncnn_s:depth=4,channels=5{arguments and ','}{arguments}", in_channels=channels))
    x = images(2, channels, *shape, dtype=torch.float64)
    with torch.no_grad():
        answer = network(x).numpy()
    expected = np.stack([by_hand(network, image, 4, residual) for image in x.numpy()])
    np.testing.assert_allclose(answer, expected, rtol=1e-10, atol=1e-12)


def test_the_body_is_what_is_taken_away():
    network = randomised(create(SMALL))
    x = images(1, 1, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), x - network.body(x))


def test_the_input_is_left_as_it_was():
    x = images(1, 1, 6, 5)
    before = x.clone()
    create(SMALL).eval()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (2, 2, 9, 9), (1, 9, 9), (9, 9)], ids=str)
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"images with 1 channel, \(N, 1, H, W\), but got \(") as caught:
        create(SMALL)(torch.zeros(shape))
    assert str(shape) in str(caught.value)


# --- how far it sees ----------------------------------------------------------------------------------------------


def seen(network, side=41):
    """The side of the square of input pixels that the centre of the answer hangs on, by its gradient."""
    for parameter in network.parameters():
        parameter.data.abs_()
    x = torch.ones(1, network.in_channels, side, side, requires_grad=True)
    network.eval()(x)[0, 0, side // 2, side // 2].backward()
    rows, cols = x.grad[0, 0].nonzero().unbind(1)
    assert rows.max() - rows.min() == cols.max() - cols.min()
    return int(rows.max() - rows.min()) + 1


@pytest.mark.parametrize("arguments", ["depth=3", "depth=6", "depth=5,kernel=5", "depth=4,kernel=1,norm=none"])
def test_the_receptive_field_is_what_the_gradient_reaches(arguments):
    network = create(f"dncnn_s:channels=3,{arguments}")
    assert seen(network) == network.receptive_field == 2 * network.halo + 1


def test_the_receptive_field_of_dilated_kernels():
    network = create("dncnn_s:depth=4,channels=4+sk")
    assert network.receptive_field == 2 * (1 + 2 + 2 + 1) + 1
    plain_gates = [module for module in network.modules() if isinstance(module, SelectiveKernel)]
    for unit in plain_gates:  # an even choice, whatever the image: what is left is what the convolutions see
        unit.gate.register_forward_hook(lambda _, __, y: torch.full_like(y, 0.5))
    assert seen(network) == network.receptive_field


@pytest.mark.parametrize("units", ["+se", "+sk", "+eca", "+cbam", "+se:stages=2", "+sk:stages=1"])
def test_a_unit_may_look_at_the_whole_image(units):
    assert create(SMALL + units).halo is None
    assert create(SMALL + units).receptive_field >= 11


@pytest.mark.parametrize("unit", ["se", "sk"])
def test_so_may_an_attached_one(unit):
    network = create(SMALL)
    attach(network, unit, where="conv3" if unit == "sk" else "act3")
    assert network.halo is None
    detach(network)
    assert network.halo == 5


def test_what_is_not_known_may_too(monkeypatch):
    monkeypatch.setattr(unit_registry, "_UNITS", dict(unit_registry._UNITS))
    register_unit("deep", lambda site: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1)), place="convolution")
    assert create(f"{SMALL}+deep:stages=1").halo is None


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SMALL, f"{SMALL},norm=none", f"{SMALL}+se", f"{SMALL}+sk", f"{SMALL}+se+sk"])
def test_learns_in_half_precision(spec):
    torch.manual_seed(0)
    network = create(spec)
    clean = nn.functional.interpolate(images(8, 1, 3, 3), size=16, mode="bilinear")
    noisy = clean + 0.3 * torch.randn(clean.shape)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16):
            answer = network(noisy)
        assert answer.dtype == torch.float32  # the noise is taken away in the image's own precision
        loss = (answer - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_start():
    torch.manual_seed(0)
    network = create("dncnn_color")
    for i in range(1, 21):
        convolution = network.get_submodule(f"conv{i}")
        assert type(convolution) is nn.Conv2d
        share = 0.01 if i == 20 else 1
        assert convolution.weight.std().item() == pytest.approx(share * math.sqrt(2 / (9 * 64)), rel=0.1), i
        assert convolution.bias is None or not convolution.bias.any()
    noisy = torch.rand(2, 3, 20, 20) + 0.1 * torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        assert (network(noisy) - noisy).std() < 0.01, "next to nothing is taken for noise yet"


def test_the_same_seed_gives_the_same_network():
    first, second = (create(f"{SMALL}+se+sk").state_dict() for _ in range(2) if torch.manual_seed(3))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("spec", [SMALL, f"{SMALL}+se+sk"])
def test_traces_compiles_and_copies(spec):
    network = randomised(create(spec))
    x = images(2, 1, 7, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), expected)
        torch.testing.assert_close(copy.deepcopy(network)(x), expected)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), expected)


# --- units --------------------------------------------------------------------------------------------------------


def test_where_units_go():
    network = create("dncnn_s+se+sk")
    for stage in range(1, 16):
        gate, kernels = network.get_submodule(f"se{stage + 1}"), network.get_submodule(f"conv{stage + 1}")
        assert isinstance(gate, SqueezeExcite)
        assert (gate.reduce.in_features, gate.reduce.out_features) == (64, 4)
        assert isinstance(kernels, SelectiveKernel)
        assert [branch[0].dilation for branch in kernels.branches] == [(1, 1), (2, 2)]
        assert isinstance(network.get_submodule(f"norm{stage + 1}"), nn.Identity)
    assert type(network.conv1) is type(network.conv17) is nn.Conv2d


def test_some_stages_only():
    network = create("dncnn_s+se:stages=8-15+sk:stages=2")
    units = [name for name, module in network.named_modules() if isinstance(module, (SqueezeExcite, SelectiveKernel))]
    assert units == ["conv3", *(f"se{i}" for i in range(9, 17))]


def test_open_gates_change_nothing():
    torch.manual_seed(0)
    plain, attended = create(SMALL).eval(), create(f"{SMALL}+se").eval()
    attended.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for module in attended.modules():
            if isinstance(module, SqueezeExcite):
                module.expand.weight.zero_()
                module.expand.bias.fill_(40.0)
        x = images(2, 1, 9, 7)
        torch.testing.assert_close(attended(x), plain(x))


@pytest.mark.parametrize(
    ("units", "places"),
    [
        ("+se:init=identity", [f"act{i}.se" for i in (2, 3, 4)]),
        ("+se:init=identity,stages=2-3", ["act3.se", "act4.se"]),
        ("+eca:init=paper,stages=1", ["act2.eca"]),
        ("+sk:init=identity", [f"conv{i}.sk" for i in (2, 3, 4)]),
        ("+sk:init=identity,stages=2", ["conv3.sk"]),
        ("+se:where=act1", ["act1.se"]),
    ],
)
def test_units_are_attached_where_they_are_built_in(units, places):
    network = create(SMALL + units)
    assert [row.name for table in network.attached for row in table.units] == places
    assert network.spec == SMALL + units
    assert network(images(2, 1, 12, 9)).shape == (2, 1, 12, 9)


# --- from a spec --------------------------------------------------------------------------------------------------


def test_channels_and_classes():
    assert create("dncnn_color:depth=3")(images(2, 3, 5, 6)).shape == (2, 3, 5, 6)
    assert create("dncnn_s:depth=3", in_channels=4)(images(2, 4, 5, 6)).shape == (2, 4, 5, 6)
    torch.manual_seed(0)
    first = create(SMALL, 10).state_dict()
    torch.manual_seed(0)
    second = create(SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_arguments_of_a_spec():
    table = DnCNNTable()
    assert adjusted(table) == table
    assert table.stages == 15
    expected = DnCNNTable(depth=9, channels=16, kernel=5, norm="none", residual=False)
    assert adjusted(table, depth=9, channels=16, kernel=5, norm="none", residual=False) == expected
    assert adjusted(expected, residual=True) == DnCNNTable(depth=9, channels=16, kernel=5, norm="none")
    assert isinstance(dncnn(expected), DnCNN)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dncnn_s:depth=2", r"depth is the number of convolutions, 3 to 200, not 2"),
        ("dncnn_s:depth=1000", r"3 to 200, not 1000"),
        ("dncnn_s:channels=0", r"1 to 4096, not 0"),
        ("dncnn_s:kernel=4", r"an odd number of 1 to 31, not 4"),
        ("dncnn_s:kernel=-3", r"an odd number of 1 to 31, not -3"),
        ("dncnn_s:channels=0.5", r"channels=0.5: expected a whole number"),
        ("dncnn_s:norm=layer", r"one of batch, none"),
        ("dncnn_s:residual=maybe", r"expected true or false"),
        ("dncnn_s:layers=3", r"its arguments are depth, channels, kernel, norm, residual, width"),
        ("dncnn_s+se:stages=16", r"within 1-15"),
        ("dncnn_s+se:init=identity,stages=16", r"within 1-15"),
        ("dncnn_c", r"unknown network 'dncnn_c'; did you mean"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        create(spec)
    assert str(caught.value).startswith(f"Cannot build '{spec}'")

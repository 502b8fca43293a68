"""SqueezeExcite against the paper's equations in NumPy, finite differences, timm and torchvision."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf, expit
from timm.layers import SEModule
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from excite.units import SqueezeExcite

SHAPES = {"1-d": (3, 8, 11), "2-d": (2, 8, 5, 7), "3-d": (2, 8, 3, 4, 5), "4-d": (2, 8, 2, 3, 2, 3)}
SQUEEZES = ("mean", "max", "both")
GATES = {"sigmoid": expit, "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1), "tanh": np.tanh}
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "identity": lambda x: x,
}


def excitation(unit, u, squeeze="mean", gate="sigmoid", activation="relu"):
    """s of Eq. 2 and 3 (and CBAM's Eq. 2 for "both"), from u in float64."""
    w1, b1, w2, b2 = (
        p.detach().double().numpy()
        for p in (unit.reduce.weight, unit.reduce.bias, unit.expand.weight, unit.expand.bias)
    )
    flat = u.detach().double().numpy().reshape(u.shape[0], u.shape[1], -1)
    descriptors = {"mean": [flat.mean(-1)], "max": [flat.max(-1)], "both": [flat.mean(-1), flat.max(-1)]}[squeeze]
    return GATES[gate](sum(ACTIVATIONS[activation](z @ w1.T + b1) @ w2.T + b2 for z in descriptors))


def scaled(u, s):
    return u.detach().double().numpy() * s.reshape(s.shape + (1,) * (u.dim() - 2))


def random_map(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- the equations ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("gate", GATES)
def test_equals_the_equations(shape, squeeze, gate):
    unit = SqueezeExcite(8, 2, squeeze=squeeze, gate=gate).double()
    u = random_map(*shape)
    np.testing.assert_allclose(
        unit(u).detach().numpy(), scaled(u, excitation(unit, u, squeeze, gate)), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_equations_with_every_activation(activation):
    unit = SqueezeExcite(8, 2, activation=activation).double()
    u = random_map(2, 8, 5, 7)
    np.testing.assert_allclose(
        unit(u).detach().numpy(), scaled(u, excitation(unit, u, activation=activation)), rtol=1e-12, atol=1e-14
    )


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    positions=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    reduction=st.integers(1, 20),
    min_width=st.integers(1, 6),
    squeeze=st.sampled_from(SQUEEZES),
    seed=st.integers(0, 1000),
)
def test_equals_the_equations_for_any_shape(batch, channels, positions, reduction, min_width, squeeze, seed):
    unit = SqueezeExcite(channels, reduction, min_width=min_width, squeeze=squeeze).double()
    u = random_map(batch, channels, *positions, seed=seed)
    x = unit(u)
    assert x.shape == u.shape
    np.testing.assert_allclose(x.detach().numpy(), scaled(u, excitation(unit, u, squeeze)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "reduction", "min_width", "width"),
    [
        (64, 16, 1, 4),
        (16, 16, 1, 1),
        (16, 16, 4, 4),
        (8, 16, 1, 1),
        (2048, 16, 1, 128),
        (110, 16, 1, 6),
        (4, 2, 8, 8),
    ],
)
def test_width_of_the_bottleneck(channels, reduction, min_width, width):
    unit = SqueezeExcite(channels, reduction, min_width=min_width)
    assert unit.reduce.weight.shape == (width, channels)
    assert unit.expand.weight.shape == (channels, width)
    # Sect. 4: two layers of C·C/r weights; both have biases.
    assert sum(p.numel() for p in unit.parameters()) == 2 * channels * width + width + channels


# ---- gradients ----


@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("gate", GATES)
def test_gradients(squeeze, gate):
    torch.manual_seed(1)
    unit = SqueezeExcite(6, 2, squeeze=squeeze, gate=gate).double()
    names, values = zip(*unit.named_parameters(), strict=True)

    def run(u: Tensor, shortcut: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(unit, dict(zip(names, parameters, strict=True)), (u, shortcut))

    u, shortcut = (random_map(2, 6, 3, 2, seed=seed).requires_grad_() for seed in (2, 3))
    assert torch.autograd.gradcheck(run, (u, shortcut, *values))


@pytest.mark.parametrize("positions", [(5,), (2, 3, 2)], ids=["1-d", "3-d"])
def test_gradients_in_other_dimensions(positions):
    unit = SqueezeExcite(4, 2, squeeze="both").double()
    assert torch.autograd.gradcheck(unit, (random_map(2, 4, *positions).requires_grad_(),))


def test_second_gradients():
    unit = SqueezeExcite(4, 2, activation="silu").double()
    assert torch.autograd.gradgradcheck(unit, (random_map(2, 4, 3, 2).requires_grad_(),))


# ---- the same unit elsewhere ----


def as_convolution(linear):
    return {"weight": linear.weight.detach()[:, :, None, None], "bias": linear.bias.detach()}


def load_linear(convolution, linear):
    convolution.load_state_dict(as_convolution(linear))


@pytest.mark.parametrize(("channels", "reduction"), [(64, 16), (48, 4)])
def test_equals_timm(channels, reduction):
    unit = SqueezeExcite(channels, reduction)
    theirs = SEModule(channels, rd_channels=channels // reduction)
    load_linear(theirs.fc1, unit.reduce)
    load_linear(theirs.fc2, unit.expand)
    u, v = (random_map(4, channels, 9, 6, dtype=torch.float32).requires_grad_() for _ in range(2))
    x, y = unit(u), theirs(v)
    torch.testing.assert_close(x, y)
    x.square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(u.grad, v.grad)
    torch.testing.assert_close(unit.reduce.weight.grad, theirs.fc1.weight.grad[:, :, 0, 0])


@pytest.mark.parametrize(
    ("gate", "activation", "parts"),
    [
        ("sigmoid", "relu", {}),
        ("hard_sigmoid", "silu", {"scale_activation": nn.Hardsigmoid, "activation": nn.SiLU}),
    ],
)
def test_equals_torchvision(gate, activation, parts):
    unit = SqueezeExcite(32, 4, gate=gate, activation=activation)
    theirs = SqueezeExcitation(32, 8, **parts)
    load_linear(theirs.fc1, unit.reduce)
    load_linear(theirs.fc2, unit.expand)
    u = random_map(4, 32, 9, 6, dtype=torch.float32)
    torch.testing.assert_close(unit(u), theirs(u))


# ---- the shortcut in the same pass ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adds_the_shortcut(shape):
    unit = SqueezeExcite(8, 2).double()
    u, shortcut = random_map(*shape), random_map(*shape, seed=1)
    expected = scaled(u, excitation(unit, u)) + shortcut.numpy()
    np.testing.assert_allclose(unit(u, shortcut).detach().numpy(), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(shortcut, random_map(*shape, seed=1)), "the shortcut itself is left as it was"


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_precision(dtype, squeeze):
    unit = SqueezeExcite(32, 4, squeeze=squeeze).to(dtype)
    u = random_map(3, 32, 8, 8, dtype=dtype)
    x = unit(u)
    assert x.dtype == dtype
    expected = scaled(u, excitation(unit, u, squeeze))
    assert np.abs(x.detach().double().numpy() - expected).max() < 4 * torch.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_autocast_keeps_the_precision_of_the_map(dtype, gate):
    unit = SqueezeExcite(32, 4, gate=gate)
    u, shortcut = random_map(3, 32, 8, 8, dtype=dtype), random_map(3, 32, 8, 8, seed=1, dtype=dtype)
    u.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        x, y = unit(u), unit(u, shortcut)
    y.sum().backward()
    assert x.dtype == y.dtype == u.grad.dtype == dtype
    expected = scaled(u, excitation(unit, u, gate=gate))
    tolerance = 4 * torch.finfo(torch.bfloat16).eps  # the excitation runs in bfloat16
    assert np.abs(x.detach().double().numpy() - expected).max() < tolerance * np.abs(expected).max()
    np.testing.assert_allclose(
        y.detach().double().numpy(), expected + shortcut.double().numpy(), atol=tolerance * np.abs(expected).max() * 2
    )


def test_a_gate_in_another_precision_leaves_the_map_in_its_own():
    class FloatSigmoid(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return torch.sigmoid(logits.float())

    unit = SqueezeExcite(8, 2, gate=FloatSigmoid()).bfloat16()
    u = random_map(2, 8, 3, 5, dtype=torch.bfloat16)
    assert unit(u).dtype == unit(u, u).dtype == torch.bfloat16


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_maps_neither_stall_nor_overflow_the_mean(dtype, memory_format):
    # Adding ones in bfloat16 stalls at 256, in float16 at 2048; a float16 sum of 90,000 ends in infinity.
    u = torch.ones(1, 4, 300, 300, dtype=dtype).contiguous(memory_format=memory_format)
    z = SqueezeExcite(4, 1).squeeze(u)
    torch.testing.assert_close(z, torch.ones(1, 4, dtype=dtype), rtol=torch.finfo(dtype).eps, atol=0)


# ---- memory layout ----


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 8, 5, 7), torch.channels_last), ((2, 8, 3, 4, 5), torch.channels_last_3d)],
    ids=["2-d", "3-d"],
)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_channels_last_stays_channels_last(shape, memory_format, squeeze):
    unit = SqueezeExcite(8, 2, squeeze=squeeze).double()
    u, shortcut = (random_map(*shape, seed=seed).contiguous(memory_format=memory_format) for seed in (0, 1))
    for arguments in ((u,), (u, shortcut)):
        v = u.detach().requires_grad_()
        x = unit(v, *arguments[1:])
        assert x.is_contiguous(memory_format=memory_format)
        (gradient,) = torch.autograd.grad(x, v, torch.ones_like(x))
        assert gradient.is_contiguous(memory_format=memory_format)
    np.testing.assert_allclose(
        unit(u).detach().numpy(), scaled(u, excitation(unit, u, squeeze)), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 8, 5, 7), torch.channels_last), ((2, 8, 3, 4, 5), torch.channels_last_3d)],
    ids=["2-d", "3-d"],
)
def test_gradient_of_the_squeeze_is_cheap_to_add(shape, memory_format):
    u = random_map(*shape).contiguous(memory_format=memory_format).requires_grad_()
    (of_mean,) = torch.autograd.grad(SqueezeExcite(8).squeeze(u).sum(), u)
    assert of_mean.untyped_storage().nbytes() < u.nbytes, "a view, not a map"
    (of_max,) = torch.autograd.grad(SqueezeExcite(8, squeeze="max").squeeze(u).sum(), u)
    assert of_max.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_maps_that_are_not_contiguous(squeeze):
    unit = SqueezeExcite(8, 2, squeeze=squeeze).double()
    u = random_map(2, 8, 9, 6)[:, :, ::2, 1:].transpose(2, 3)
    np.testing.assert_allclose(
        unit(u).detach().numpy(), scaled(u, excitation(unit, u, squeeze)), rtol=1e-12, atol=1e-14
    )


# ---- what is read from it and kept in it ----


def test_a_hook_on_the_gate_reads_s():
    unit = SqueezeExcite(8, 2).double()
    seen = []
    unit.gate.register_forward_hook(lambda module, inputs, output: seen.append(output))
    u = random_map(3, 8, 5, 7)
    unit(u)
    assert seen[0].shape == (3, 8)
    np.testing.assert_allclose(seen[0].detach().numpy(), excitation(unit, u), rtol=1e-12)


def contents(module):
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(child).items()}
        for name, child in module.named_modules()
    }


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_a_forward_pass_stores_nothing(squeeze):
    unit = SqueezeExcite(8, 2, squeeze=squeeze)
    before = contents(unit)
    u = random_map(2, 8, 4, 4, dtype=torch.float32)
    unit(u.requires_grad_(), u)
    after = contents(unit)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].keys() == after[name].keys()
        for key, value in before[name].items():
            assert after[name][key] is value or after[name][key] == value, (name, key)


def test_copies_and_state():
    unit = SqueezeExcite(8, 2, squeeze="both")
    assert list(unit.state_dict()) == ["reduce.weight", "reduce.bias", "expand.weight", "expand.bias"]
    u = random_map(2, 8, 4, 4, dtype=torch.float32)
    x = unit(u)
    twin = copy.deepcopy(unit)
    with torch.no_grad():
        unit.expand.bias.add_(5)
    torch.testing.assert_close(twin(u), x)
    assert not torch.allclose(unit(u), x)
    twin.load_state_dict(unit.state_dict())
    torch.testing.assert_close(twin(u), unit(u))


# ---- parts passed in ----


def test_modules_as_parts():
    class Median(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return u.flatten(2).median(-1).values

    unit = SqueezeExcite(8, 2, squeeze=Median(), gate=nn.Softsign(), activation=nn.Tanh()).double()
    u = random_map(2, 8, 3, 5)
    w1, b1, w2, b2 = (p.detach().numpy() for p in unit.parameters())
    z = np.median(u.numpy().reshape(2, 8, 15), axis=-1)
    logits = np.tanh(z @ w1.T + b1) @ w2.T + b2
    np.testing.assert_allclose(unit(u).detach().numpy(), scaled(u, logits / (1 + abs(logits))), rtol=1e-12)


# ---- wrong use ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"channels": -3}, "channels must be"),
        ({"channels": 8.0}, "channels must be"),
        ({"channels": 8, "reduction": 0}, "reduction must be"),
        ({"channels": 8, "reduction": 0.5}, "reduction must be"),
        ({"channels": 8, "min_width": 0}, "min_width must be"),
        ({"channels": 8, "min_width": True}, "min_width must be"),
        ({"channels": 8, "squeeze": "median"}, "unknown squeeze 'median': give one of mean, max, both, or"),
        ({"channels": 8, "gate": "Sigmoid"}, "unknown gate 'Sigmoid': give one of sigmoid, hard_sigmoid, tanh, or"),
        ({"channels": 8, "activation": None}, "unknown activation None: give one of relu, relu6, silu"),
        ({"channels": 8, "activation": nn.ReLU}, "or an nn.Module instance"),
    ],
)
def test_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SqueezeExcite(**arguments)


@pytest.mark.parametrize("shape", [(2, 9, 4, 4), (2, 7, 4), (2, 8), (8,), (2, 4, 4, 8)])
def test_refuses_maps_of_another_shape(shape):
    unit = SqueezeExcite(8)
    with pytest.raises(ValueError, match=r"maps of shape \(N, 8, …\), .* but got \(" + ", ".join(map(str, shape))):
        unit(torch.zeros(shape))


# ---- compiled and traced ----


def assert_same_and_same_gradients(ours, theirs, inputs):
    one, two = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
    x, y = ours(*one), theirs(*two)
    torch.testing.assert_close(x, y)
    x.square().sum().backward()
    y.square().sum().backward()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_compiles_without_graph_breaks(squeeze):
    torch.compiler.reset()
    unit = SqueezeExcite(8, 2, squeeze=squeeze)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    u = random_map(2, 8, 4, 5, dtype=torch.float32)
    assert_same_and_same_gradients(compiled, unit, (u,))
    assert_same_and_same_gradients(compiled, unit, (u.contiguous(memory_format=torch.channels_last), u))


def test_compiles_under_autocast():
    torch.compiler.reset()
    unit = SqueezeExcite(8, 2)
    u = random_map(2, 8, 4, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.compile(unit, fullgraph=True, backend="aot_eager")(u), unit(u))


def test_exports_with_any_batch_and_size():
    unit = SqueezeExcite(8, 2, squeeze="both").eval()
    any_size = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        unit,
        (random_map(2, 8, 4, 5, dtype=torch.float32),),
        dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},),
    )
    u = random_map(3, 8, 6, 7, dtype=torch.float32)
    torch.testing.assert_close(program.module()(u), unit(u))


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_traces_inside_a_network(squeeze):
    network = nn.Sequential(nn.Conv2d(3, 8, 1), SqueezeExcite(8, 2, squeeze=squeeze))
    traced = torch.fx.symbolic_trace(network)
    assert {"check_map", "scale_channels"} < {node.name for node in traced.graph.nodes}, "one node each"
    for size in (4, 6):
        x = random_map(2, 3, size, 5, dtype=torch.float32)
        torch.testing.assert_close(traced(x), network(x))


@pytest.mark.slow
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(squeeze, dynamic):
    torch.compiler.reset()
    unit = SqueezeExcite(16, 4, squeeze=squeeze)
    compiled = torch.compile(unit, fullgraph=True, dynamic=dynamic)
    u, shortcut = (random_map(4, 16, 9, 7, seed=seed, dtype=torch.float32) for seed in (0, 1))
    assert_same_and_same_gradients(compiled, unit, (u,))
    assert_same_and_same_gradients(compiled, unit, (u.contiguous(memory_format=torch.channels_last), shortcut))

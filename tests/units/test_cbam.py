"""ConvolutionalBlockAttention against the paper's equations in NumPy, finite differences and timm."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

from excite.units import ConvolutionalBlockAttention
from excite.units.cbam import SpatialAttention

GATES = {"sigmoid": expit, "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1), "tanh": np.tanh}


def random_map(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def numbers(tensor):
    return tensor.detach().double().numpy()


def paper(unit, u, gate="sigmoid"):
    """u″ of Eq. 1, M_c of Eq. 2 and M_s of Eq. 3."""
    mlp = unit.channel

    def perceptron(z):
        hidden = np.maximum(z @ numbers(mlp.reduce.weight).T + numbers(mlp.reduce.bias), 0)
        return hidden @ numbers(mlp.expand.weight).T + numbers(mlp.expand.bias)

    u = numbers(u)
    channel = GATES[gate](perceptron(u.mean((2, 3))) + perceptron(u.max((2, 3))))
    u = u * channel[:, :, None, None]
    weight = numbers(unit.spatial.convolution.weight)[0]
    margin = weight.shape[1] // 2
    stacked = np.pad(np.stack((u.mean(1), u.max(1)), 1), ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    logits = np.zeros((u.shape[0], 1, *u.shape[2:]))
    for i, j in itertools.product(*map(range, u.shape[2:])):
        window = stacked[:, :, i : i + weight.shape[1], j : j + weight.shape[1]]
        logits[:, 0, i, j] = (window * weight).sum((1, 2, 3))
    spatial = GATES[gate](logits)
    return u * spatial, channel, spatial


# ---- the equations ----


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_equals_the_equations(kernel, gate):
    unit = ConvolutionalBlockAttention(8, 2, kernel, gate=gate).double()
    seen = {}
    for name in ("channel", "spatial"):
        unit.get_submodule(f"{name}.gate").register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: numbers(output)})
        )
    u, shortcut = random_map(2, 8, 5, 6), random_map(2, 8, 5, 6, seed=1)
    expected, channel, spatial = paper(unit, u, gate)
    np.testing.assert_allclose(numbers(unit(u)), expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(seen["channel"], channel, rtol=1e-11)
    np.testing.assert_allclose(seen["spatial"], spatial, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(numbers(unit(u, shortcut)), expected + shortcut.numpy(), rtol=1e-11, atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 20),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    reduction=st.integers(1, 20),
    min_width=st.integers(1, 6),
    kernel=st.sampled_from([1, 3, 5, 7]),
)
def test_equals_the_equations_for_any_shape(batch, channels, height, width, reduction, min_width, kernel):
    unit = ConvolutionalBlockAttention(channels, reduction, kernel, min_width=min_width).double()
    assert unit.channel.reduce.out_features == max(min_width, channels // reduction)
    u = random_map(batch, channels, height, width)
    np.testing.assert_allclose(numbers(unit(u)), paper(unit, u)[0], rtol=1e-10, atol=1e-12)


def test_gradients():
    torch.manual_seed(0)
    unit = ConvolutionalBlockAttention(4, 2, 3).double()
    names, values = zip(*unit.named_parameters(), strict=True)

    def run(u: Tensor, shortcut: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(unit, dict(zip(names, parameters, strict=True)), (u, shortcut))

    u, shortcut = (random_map(2, 4, 3, 2, seed=seed).requires_grad_() for seed in (2, 3))
    assert torch.autograd.gradcheck(run, (u, shortcut, *values))


def test_equals_timm():
    unit = ConvolutionalBlockAttention(32, 16).double()
    theirs = CbamModule(32, rd_ratio=1 / 16, mlp_bias=True).double()
    theirs.spatial.conv.bn = nn.Identity()  # theirs alone; the paper's Eq. 3 has none
    for linear, convolution in ((unit.channel.reduce, theirs.channel.fc1), (unit.channel.expand, theirs.channel.fc2)):
        convolution.weight.data = linear.weight.data[:, :, None, None].clone()
        convolution.bias.data = linear.bias.data.clone()
    theirs.spatial.conv.conv.load_state_dict(unit.spatial.convolution.state_dict())
    x, y = (random_map(2, 32, 9, 8).requires_grad_() for _ in range(2))
    torch.testing.assert_close(unit(x), theirs(y))
    unit(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(unit.spatial.convolution.weight.grad, theirs.spatial.conv.conv.weight.grad)
    torch.testing.assert_close(unit.channel.expand.weight.grad, theirs.channel.fc2.weight.grad[:, :, 0, 0])


def test_a_gate_passed_in_is_copied_for_each_half():
    gate = nn.PReLU()
    unit = ConvolutionalBlockAttention(8, 2, gate=gate)
    assert len({id(gate), id(unit.channel.gate), id(unit.spatial.gate)}) == 3
    assert {"channel.gate.weight", "spatial.gate.weight"} < dict(unit.named_parameters()).keys()


# ---- precision and memory layout ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision(dtype):
    unit = ConvolutionalBlockAttention(32, 4).to(dtype)
    u = random_map(3, 32, 8, 8, dtype=dtype)
    x = unit(u)
    expected, *_ = paper(unit, u)
    assert x.dtype == dtype
    assert np.abs(numbers(x) - expected).max() < 6 * torch.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_precision_of_the_map(dtype):
    unit = ConvolutionalBlockAttention(32, 4)
    u, shortcut = (random_map(3, 32, 8, 8, seed=seed, dtype=dtype) for seed in (0, 1))
    u.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        x, y = unit(u), unit(u, shortcut)
    y.sum().backward()
    assert x.dtype == y.dtype == u.grad.dtype == dtype
    expected, *_ = paper(unit, u)
    tolerance = 6 * torch.finfo(torch.bfloat16).eps
    assert np.abs(numbers(x) - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_channels_neither_stall_nor_overflow_the_mean(dtype):
    # The mean of 2048 values of 60 is 60; their float16 sum would be infinite.
    unit = SpatialAttention(1, gate=nn.Identity()).to(dtype)
    unit.convolution.weight.data = torch.tensor([1.0, 0.0], dtype=dtype).view(1, 2, 1, 1)
    u = torch.full((1, 2048, 2, 2), 60.0, dtype=dtype)
    torch.testing.assert_close(unit(u), u * 60, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_gates_in_another_precision_leave_the_map_in_its_own():
    class FloatSigmoid(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return torch.sigmoid(logits.float())

    unit = ConvolutionalBlockAttention(8, 2, gate=FloatSigmoid()).bfloat16()
    u = random_map(2, 8, 3, 5, dtype=torch.bfloat16)
    assert unit(u).dtype == unit(u, u).dtype == torch.bfloat16


def test_channels_last_stays_channels_last():
    unit = ConvolutionalBlockAttention(8, 2)
    u = random_map(2, 8, 5, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    for arguments in ((u,), (u, u.detach())):
        x = unit(*arguments)
        (gradient,) = torch.autograd.grad(x, u, torch.ones_like(x))
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(unit(u), unit(u.contiguous()))


# ---- compiled and traced ----


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    unit = ConvolutionalBlockAttention(8, 2)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    u = random_map(2, 8, 4, 5, dtype=torch.float32)
    torch.testing.assert_close(compiled(u), unit(u))
    torch.testing.assert_close(compiled(u, u), unit(u, u))


def test_exports_with_any_batch_and_size():
    unit = ConvolutionalBlockAttention(8, 2).eval()
    any_size = torch.export.Dim.DYNAMIC
    example = random_map(2, 8, 4, 5, dtype=torch.float32)
    program = torch.export.export(unit, (example,), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},))
    u = random_map(3, 8, 6, 7, dtype=torch.float32)
    torch.testing.assert_close(program.module()(u), unit(u))


def test_traces_inside_a_network():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), ConvolutionalBlockAttention(8, 2))
    traced = torch.fx.symbolic_trace(network)
    for size in (4, 6):
        x = random_map(2, 3, size, 5, dtype=torch.float32)
        torch.testing.assert_close(traced(x), network(x))


# ---- wrong use ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"channels": 8, "reduction": 0}, "reduction must be"),
        ({"channels": 8, "min_width": 0}, "min_width must be"),
        ({"channels": 8, "kernel": 0}, "kernel must be a whole number"),
        ({"channels": 8, "kernel": 6}, "kernel must be odd, .* got 6"),
        ({"channels": 8, "gate": "relu"}, "unknown gate 'relu': give one of sigmoid, hard_sigmoid, tanh"),
    ],
)
def test_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvolutionalBlockAttention(**arguments)


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 8), (2, 8, 3, 4, 5)])
def test_refuses_maps_that_are_not_of_images(shape):
    for unit in (ConvolutionalBlockAttention(8), SpatialAttention()):
        with pytest.raises(ValueError, match=r"maps of images, \(N, C, H, W\), but got \(2, 8"):
            unit(torch.zeros(shape))


def test_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match=r"maps of shape \(N, 8, …\)"):
        ConvolutionalBlockAttention(8)(torch.zeros(2, 4, 5, 5))

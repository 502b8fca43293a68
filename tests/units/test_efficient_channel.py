"""EfficientChannelAttention against the paper's equations in NumPy, finite differences and timm."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from timm.layers import EcaModule
from torch import Tensor

from excite.units import EfficientChannelAttention

SHAPES = {"1-d": (3, 8, 11), "2-d": (2, 8, 5, 7), "3-d": (2, 8, 3, 4, 5)}
GATES = {"sigmoid": expit, "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1), "tanh": np.tanh}


def random_map(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def excitation(unit, u, gate="sigmoid"):
    """s, channel by channel: a weighted sum of the k means around it."""
    w = unit.convolution.weight.detach().double().numpy()[0, 0]
    z = u.detach().double().numpy().reshape(u.shape[0], u.shape[1], -1).mean(-1)
    logits = np.zeros_like(z)
    for c in range(z.shape[1]):
        for j, weight in enumerate(w):
            neighbour = c + j - len(w) // 2
            if 0 <= neighbour < z.shape[1]:
                logits[:, c] += weight * z[:, neighbour]
    return GATES[gate](logits)


def scaled(u, s):
    return u.detach().double().numpy() * s.reshape(s.shape + (1,) * (u.dim() - 2))


# ---- the equations ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gate", GATES)
def test_equals_the_equations(shape, gate):
    unit = EfficientChannelAttention(8, 5, gate=gate).double()
    u, shortcut = random_map(*shape), random_map(*shape, seed=1)
    expected = scaled(u, excitation(unit, u, gate))
    np.testing.assert_allclose(unit(u).detach().numpy(), expected, rtol=1e-12, atol=1e-14)
    with_shortcut = unit(u, shortcut).detach().numpy()
    np.testing.assert_allclose(with_shortcut, expected + shortcut.numpy(), rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    positions=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    kernel=st.sampled_from([None, 1, 3, 5, 9]),
    seed=st.integers(0, 1000),
)
def test_equals_the_equations_for_any_shape(batch, channels, positions, kernel, seed):
    unit = EfficientChannelAttention(channels, kernel).double()
    u = random_map(batch, channels, *positions, seed=seed)
    np.testing.assert_allclose(unit(u).detach().numpy(), scaled(u, excitation(unit, u)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "kernel"),  # Eq. 12 by hand: (log₂ C + 1) / 2 is 2.5 for 16, 3.5 for 64; 4 for 128: between 3 and 5
    [(1, 1), (8, 3), (16, 3), (32, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)],
)
def test_kernel_of_equation_12(channels, kernel):
    unit = EfficientChannelAttention(channels)
    assert unit.convolution.weight.shape == (1, 1, kernel)
    assert [name for name, _ in unit.named_parameters()] == ["convolution.weight"]


@given(channels=st.integers(1, 5000), gamma=st.integers(1, 4), beta=st.integers(1, 4))
def test_kernel_is_the_nearest_odd_number(channels, gamma, beta):
    kernel = EfficientChannelAttention(channels, gamma=gamma, beta=beta).convolution.kernel_size[0]
    t = abs(math.log2(channels) / gamma + beta / gamma)
    nearest = min(abs(t - odd) for odd in range(1, 99, 2))
    assert kernel % 2 == 1
    assert abs(t - kernel) == pytest.approx(nearest)


def test_gradients():
    torch.manual_seed(0)
    unit = EfficientChannelAttention(5, 3).double()

    def run(u: Tensor, shortcut: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(unit, {"convolution.weight": weight}, (u, shortcut))

    u, shortcut = (random_map(2, 5, 3, 2, seed=seed).requires_grad_() for seed in (2, 3))
    assert torch.autograd.gradcheck(run, (u, shortcut, unit.convolution.weight))


@pytest.mark.parametrize("channels", [16, 64, 128, 2048])
def test_equals_timm(channels):
    unit, theirs = EfficientChannelAttention(channels).double(), EcaModule(channels).double()
    theirs.conv.load_state_dict(unit.convolution.state_dict())  # fails where the kernels differ
    x, y = (random_map(2, channels, 3, 4).requires_grad_() for _ in range(2))
    torch.testing.assert_close(unit(x), theirs(y))
    unit(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(unit.convolution.weight.grad, theirs.conv.weight.grad)


# ---- precision and memory layout ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision(dtype):
    unit = EfficientChannelAttention(32).to(dtype)
    u = random_map(3, 32, 8, 8, dtype=dtype)
    x = unit(u)
    expected = scaled(u, excitation(unit, u))
    assert x.dtype == dtype
    assert np.abs(x.detach().double().numpy() - expected).max() < 4 * torch.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_precision_of_the_map(dtype):
    unit = EfficientChannelAttention(32)
    u, shortcut = (random_map(3, 32, 8, 8, seed=seed, dtype=dtype) for seed in (0, 1))
    u.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        x, y = unit(u), unit(u, shortcut)
    y.sum().backward()
    assert x.dtype == y.dtype == u.grad.dtype == dtype
    expected = scaled(u, excitation(unit, u))
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    assert np.abs(x.detach().double().numpy() - expected).max() < tolerance * np.abs(expected).max()


def test_channels_last_stays_channels_last():
    unit = EfficientChannelAttention(8)
    u = random_map(2, 8, 5, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    x = unit(u)
    (gradient,) = torch.autograd.grad(x, u, torch.ones_like(x))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_a_hook_on_the_gate_reads_s():
    unit = EfficientChannelAttention(8).double()
    seen = []
    unit.gate.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().numpy()))
    u = random_map(3, 8, 5, 7)
    unit(u)
    np.testing.assert_allclose(seen[0], excitation(unit, u), rtol=1e-12)


# ---- compiled and traced ----


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    unit = EfficientChannelAttention(8)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    u = random_map(2, 8, 4, 5, dtype=torch.float32)
    torch.testing.assert_close(compiled(u), unit(u))
    torch.testing.assert_close(compiled(u, u), unit(u, u))


def test_exports_with_any_batch_and_size():
    unit = EfficientChannelAttention(8).eval()
    any_size = torch.export.Dim.DYNAMIC
    example = random_map(2, 8, 4, 5, dtype=torch.float32)
    program = torch.export.export(unit, (example,), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},))
    u = random_map(3, 8, 6, 7, dtype=torch.float32)
    torch.testing.assert_close(program.module()(u), unit(u))


def test_traces_inside_a_network():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), EfficientChannelAttention(8))
    traced = torch.fx.symbolic_trace(network)
    assert {"check_map", "scale_channels"} < {node.name for node in traced.graph.nodes}, "one node each"
    for size in (4, 6):
        x = random_map(2, 3, size, 5, dtype=torch.float32)
        torch.testing.assert_close(traced(x), network(x))


# ---- wrong use ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"channels": 8, "kernel": 4}, "kernel must be odd, .* got 4"),
        ({"channels": 8, "kernel": 0}, "kernel must be a whole number of at least 1"),
        ({"channels": 8, "gamma": 0}, "gamma must be"),
        ({"channels": 8, "beta": -1}, "beta must be"),
        ({"channels": 8, "gate": "relu"}, "unknown gate 'relu': give one of sigmoid, hard_sigmoid, tanh"),
    ],
)
def test_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EfficientChannelAttention(**arguments)


@pytest.mark.parametrize("shape", [(2, 9, 4, 4), (2, 7, 4), (2, 8), (2, 4, 4, 8)])
def test_refuses_maps_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"maps of shape \(N, 8, …\), .* but got \(" + ", ".join(map(str, shape))):
        EfficientChannelAttention(8)(torch.zeros(shape))

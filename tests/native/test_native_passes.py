"""The passes in C against PyTorch's operators in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from excite.native import build, passes
from excite.native.passes import Branch, Excitation

pytestmark = pytest.mark.skipif(not passes.available(torch.float32), reason="no compiler, or no AVX-512")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
TYPES = (torch.float32, torch.bfloat16)


def a_map(n: int, channels: int, height: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Layers:
    """An excitation, and as it is packed for the passes."""

    reduce: Tensor
    reduce_bias: Tensor
    expand: Tensor
    expand_bias: Tensor
    function: str
    factor: float
    dtype: torch.dtype

    @property
    def packed(self) -> Excitation:
        first = passes.packed_layer(self.reduce, self.reduce_bias, self.dtype)
        second = passes.packed_layer(self.expand, self.expand_bias, self.dtype)
        return Excitation(*first, "relu", *second, self.function, self.factor, len(self.reduce), len(self.expand))

    def gates(self, mean: Tensor) -> Tensor:
        """Eq. 2 and 3 of arXiv 1709.01507 in float64."""
        functions = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid, "tanh": torch.tanh, "silu": F.silu}
        middle = F.relu(mean.double() @ self.reduce.double().T + self.reduce_bias.double())
        return self.factor * functions[self.function](middle @ self.expand.double().T + self.expand_bias.double())


def excitation(
    channels: int,
    hidden: int,
    out: int,
    dtype: torch.dtype,
    function: str = "sigmoid",
    factor: float = 1.0,
) -> Layers:
    draw = torch.Generator().manual_seed(1)
    sizes = ((hidden, channels), (hidden,), (out, hidden), (out,))
    reduce, reduce_bias, expand, expand_bias = (torch.randn(size, generator=draw) / size[-1] ** 0.5 for size in sizes)
    reduce, expand = reduce.to(dtype), expand.to(dtype)
    return Layers(reduce, reduce_bias, expand, expand_bias, function, factor, dtype)


def close(said: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    return bool((said.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("n", "channels", "hidden", "out", "size"), [(1, 64, 4, 256, 9), (3, 80, 7, 81, 5), (1, 512, 48, 16, 1)]
)
def test_gates_of_one_map_and_of_two(
    dtype: torch.dtype, n: int, channels: int, hidden: int, out: int, size: int
) -> None:
    u, v = (a_map(n, channels, size, size + 1, dtype, seed) for seed in (0, 1))
    for function, factor in (("sigmoid", 2.0), ("hard_sigmoid", 1.0), ("tanh", 1.0)):
        e = excitation(channels, hidden, out, dtype, function, factor)
        means = u.double().mean((2, 3)), v.double().mean((2, 3))
        assert close(passes.gates((u,), e.packed), e.gates(means[0]), torch.float32)
        assert close(passes.gates((u, v), e.packed), e.gates(means[0] + means[1]), torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
def test_scale_with_and_without_shortcut_and_relu(dtype: torch.dtype) -> None:
    u, x = (a_map(2, 48, 5, 3, dtype, seed) for seed in (0, 1))
    gate = torch.rand(2, 48)
    wanted = u.double() * gate.double()[:, :, None, None]
    assert close(passes.scale(u, gate, None, False, torch.empty_like(u)), wanted, dtype)
    assert close(passes.scale(u, gate, x, False, torch.empty_like(u)), wanted + x.double(), dtype)
    over = x.clone()
    assert close(passes.scale(u, gate, over, True, over), (wanted + x.double()).relu(), dtype)


def test_nan_goes_through_relu_as_in_pytorch() -> None:
    u = a_map(1, 16, 2, 2, torch.float32)
    u[0, 3, 1, 1] = float("nan")
    answer = passes.scale(u, torch.ones(1, 16), None, True, torch.empty_like(u))
    assert torch.equal(answer.isnan(), u.isnan())
    assert torch.equal(answer.nan_to_num(), u.relu().nan_to_num())


@pytest.mark.parametrize("dtype", TYPES)
def test_select(dtype: torch.dtype) -> None:
    u, v = (a_map(2, 32, 4, 7, dtype, seed) for seed in (0, 1))
    gate = torch.rand(2, 32)
    share = gate.double()[:, :, None, None]
    wanted = share * u.double() + (1 - share) * v.double()
    assert close(passes.select_two(u, v, gate, u), wanted, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [4, 8, 16, 32])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "padding"),
    [
        ((14, 14), (3, 3), 1, 1, (1, 1)),
        ((9, 13), (3, 3), 2, 1, (1, 1)),
        ((7, 7), (3, 3), 1, 2, (2, 2)),
        ((1, 2), (3, 3), 1, 2, (2, 2)),
        ((20, 33), (5, 3), 1, 1, (2, 1)),
        ((6, 5), (3, 3), 1, 1, (0, 0)),
        ((5, 40), (1, 1), 3, 1, (0, 0)),
    ],
)
def test_grouped_convolutions(
    dtype: torch.dtype,
    group: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    dilation: int,
    padding: tuple[int, int],
) -> None:
    if not passes.can_group(dtype):
        pytest.skip("the processor does not multiply bfloat16")
    channels = 64
    x = a_map(2, channels, *size, dtype)
    weight = torch.randn(channels, group, *kernel, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(channels)
    packed = passes.packed_groups(weight, dtype)
    branch = Branch(packed, bias, group, kernel, padding, stride, dilation)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation, groups=channels // group)
    assert close(passes.grouped(x, branch, relu=False), wanted, dtype)
    assert close(passes.grouped(x, branch, relu=True), wanted.relu(), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "size", "stride"), [(1, 8, 1), (5, 7, 2), (3, 60, 1)])
def test_selective_kernels_are_the_papers_equations(dtype: torch.dtype, n: int, size: int, stride: int) -> None:
    """Eq. 1 to 6 of arXiv 1903.06586 in float64."""
    if not passes.can_group(dtype):
        pytest.skip("the processor does not multiply bfloat16")
    channels, group = 64, 8
    x = a_map(n, channels, size, size, dtype)
    draw = torch.Generator().manual_seed(3)
    weights = [torch.randn(channels, group, k, k, generator=draw).to(dtype) for k in (3, 5)]
    biases = [torch.randn(channels, generator=draw) for _ in weights]
    e = excitation(channels, 32, channels, dtype)
    branches = [
        Branch(passes.packed_groups(weight, dtype), bias, group, (k, k), (k // 2, k // 2), stride, 1)
        for weight, bias, k in zip(weights, biases, (3, 5), strict=True)
    ]
    u, v = (
        F.conv2d(x.double(), w.double(), b.double(), stride, w.shape[2] // 2, groups=channels // group).relu()
        for w, b in zip(weights, biases, strict=True)
    )
    share = e.gates((u + v).mean((2, 3)))[:, :, None, None]
    wanted = share * u + (1 - share) * v
    said = passes.selective(x, (branches[0], branches[1]), e.packed)
    assert close(said, wanted, dtype)
    assert torch.equal(said, passes.selective(x, (branches[0], branches[1]), e.packed))


def test_threads_change_no_bit() -> None:
    x = a_map(3, 64, 17, 17, torch.float32)
    weight = passes.packed_groups(torch.randn(64, 4, 3, 3), torch.float32)
    branch = Branch(weight, None, 4, (3, 3), (1, 1), 1, 1)
    other = Branch(weight, None, 4, (3, 3), (2, 2), 1, 2)
    e = excitation(64, 8, 64, torch.float32)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append((passes.selective(x, (branch, other), e.packed), passes.gates((x[:1],), e.packed)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*answers, strict=True))


def test_turned_off_and_broken_compilers_are_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    build.kernels.cache_clear()
    try:
        with caplog.at_level("INFO", logger="excite"):
            monkeypatch.setenv("EXCITE_NATIVE", "0")
            assert not passes.available(torch.float32)
            build.kernels.cache_clear()
            monkeypatch.delenv("EXCITE_NATIVE")
            monkeypatch.setenv("EXCITE_CACHE", str(tmp_path))
            monkeypatch.setenv("CC", "false")  # a compiler that always fails
            assert not passes.available(torch.float32)
        assert "EXCITE_NATIVE is 0" in caplog.text
        assert "false failed" in caplog.text
    finally:
        build.kernels.cache_clear()

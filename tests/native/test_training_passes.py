"""The passes of the training forms against the same sums and products in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from excite.native import passes, training_passes
from excite.native.passes import Branch

pytestmark = pytest.mark.skipif(not training_passes.available(torch.float32), reason="no compiler, or no AVX-512")

TYPES = (torch.float32, torch.bfloat16)
# Whole sixteens of channels and not, an image in one piece and in several,
# fours of rows and a rest, one to three dimensions.
SHAPES = ((3, 20, 7, 7), (2, 64, 9, 30), (4, 5, 11), (2, 24, 3, 4, 5), (1, 48, 23, 23))


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def a_map(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    last = (shape[0], *shape[2:], shape[1])
    return values(*last, seed=seed, dtype=dtype).movedim(-1, 1)


def wide(vector: Tensor, c: Tensor) -> Tensor:
    """(C,) or (N, C), in float64, to be multiplied with maps."""
    return vector.double().view(*vector.shape[:-1], c.shape[1], *(1,) * (c.dim() - 2))


def summed(c: Tensor) -> Tensor:
    return c.flatten(2).sum(2)


def is_close(said: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> bool:
    return bool((said.double() - wanted).abs().max() <= tolerance * wanted.abs().max())


def stored(dtype: torch.dtype) -> float:
    """How far a map may be off that is stored in a type."""
    return 1e-6 if dtype == torch.float32 else 4e-3


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestEachPass:
    def test_moments_far_from_zero(self, shape, dtype):
        c = (100 + a_map(shape, torch.float32)).to(dtype)
        assert training_passes.is_laid_out(c)
        first, second, near = training_passes.moments(c)
        positions = c[0, 0].numel()
        exact = c.double()
        assert is_close(first / positions + near, exact.flatten(2).mean(2))
        m = shape[0] * positions
        variance = second.double().sum(0) / m - (first.double().sum(0) / m).square()
        assert is_close(variance, exact.transpose(0, 1).flatten(1).var(1, unbiased=False), 3e-6)

    def test_where_a_relu_is_on(self, shape, dtype):
        c, (a, b, mean) = a_map(shape, dtype), (values(shape[1], seed=k) for k in (1, 2, 3))
        count, away = training_passes.active(c, a, b, mean)
        on = wide(a, c) * c.double() + wide(b, c) > 0
        assert torch.equal(count.double(), summed(on.double()))
        assert is_close(away, summed(on * (c.double() - wide(mean, c))))

    def test_join_and_its_gradient(self, shape, dtype):
        c, shortcut, dy = (a_map(shape, dtype, seed) for seed in (0, 1, 2))
        p, q, mean = values(*shape[:2], seed=3), values(*shape[:2], seed=4), values(shape[1], seed=5)
        out = training_passes.join(c, shortcut, p, q)
        assert out.stride() == c.stride()
        assert is_close(out, F.relu(wide(p, c) * c.double() + wide(q, c) + shortcut.double()), stored(dtype))
        g, first, second = training_passes.join_backward(dy, out, c, mean)
        assert torch.equal(g, dy * (out > 0))
        assert is_close(first, summed(g.double()))
        assert is_close(second, summed(g.double() * (c.double() - wide(mean, c))))

    @pytest.mark.parametrize("relus", [(True, True), (False, True), (True, False, True)])
    def test_selection_and_its_sums(self, shape, dtype, relus):
        maps = [a_map(shape, dtype, m) for m in range(len(relus))]
        lines = [(values(shape[1], seed=10 + m), values(shape[1], seed=20 + m)) for m in range(len(relus))]
        means = [values(shape[1], seed=30 + m) for m in range(len(relus))]
        factors = [values(*shape[:2], seed=40 + m) for m in range(len(relus))]
        bits = sum(relu << m for m, relu in enumerate(relus))
        v, dv = training_passes.select(maps, lines, factors, bits), a_map(shape, dtype, 50)
        sums = training_passes.select_backward(dv, maps, lines, means, bits)
        expected = torch.zeros(shape, dtype=torch.float64)
        for c, (a, b), mean, factor, relu, (first, second) in zip(
            maps, lines, means, factors, relus, sums, strict=True
        ):
            u = wide(a, c) * c.double() + wide(b, c)
            expected += wide(factor, c) * (F.relu(u) if relu else u)
            g = dv.double() * (u > 0) if relu else dv.double()
            assert is_close(first, summed(g))
            assert is_close(second, summed(g * (c.double() - wide(mean, c))))
        assert is_close(v, expected, stored(dtype))

    @pytest.mark.parametrize("relu", [False, True])
    def test_through_the_norm(self, shape, dtype, relu):
        g, c = a_map(shape, dtype), a_map(shape, dtype, 1)
        p, q = values(*shape[:2], seed=2), values(*shape[:2], seed=3)
        r, t, a, b = (values(shape[1], seed=seed) for seed in (4, 5, 6, 7))
        dc = training_passes.through_norm(g, c, p, q, r, t, (a, b), relu)
        du = wide(p, c) * g.double() + wide(q, c)
        if relu:
            du = du * (wide(a, c) * c.double() + wide(b, c) > 0)
        assert is_close(dc, du + wide(r, c) * c.double() + wide(t, c), stored(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_threads_change_no_bit(dtype):
    shape = (3, 40, 21, 29)
    c, dy, out = (a_map(shape, dtype, seed) for seed in (0, 1, 2))
    a, b, mean = (values(40, seed=seed) for seed in (3, 4, 5))
    kernel = a_map((16, 4, 3, 3), dtype, 6)
    narrow, gradient = c[:, :16].contiguous(memory_format=torch.channels_last), a_map((3, 16, 21, 29), dtype, 7)
    branch = Branch(kernel, None, 4, (3, 3), (1, 1), 1, 1)

    def sums() -> list[Tensor]:
        lines = [(a, b), (b, a)]
        both = training_passes.select_backward(dy, [c, out], lines, [mean, mean], 3)
        return [
            *training_passes.moments(c)[:2],
            *training_passes.active(c, a, b, mean),
            *training_passes.join_backward(dy, out, c, mean),
            *both[0],
            *both[1],
            passes.grouped_weight(narrow, gradient, kernel, branch),
        ]

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sums())
    finally:
        torch.set_num_threads(before)
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_a_number_stays_so(dtype):
    """Where training goes wrong it has to show, as with PyTorch's operators."""
    shape = (2, 18, 5, 5)
    c, dy = a_map(shape, dtype), a_map(shape, dtype, 1)
    c[0, 3, 2, 2] = torch.nan
    c[1, 17, 0, 0] = torch.nan
    ones, line = torch.ones(2, 18), (torch.ones(18), torch.zeros(18))
    missing = c.isnan()
    assert torch.equal(training_passes.join(c, dy, ones, ones).isnan(), missing)
    assert torch.equal(training_passes.select([dy, c], [line, line], [ones, ones], 3).isnan(), missing)
    assert torch.equal(training_passes.through_norm(dy, c, ones, ones, *line, line, True).isnan(), missing)
    first, second, _ = training_passes.moments(c)
    assert first.isnan().sum() == second.isnan().sum() >= 2


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize(
    ("size", "rows", "stride", "dilation", "padding"),
    [((7, 9), 3, 1, 1, (1, 1)), ((28, 30), 3, 1, 2, (2, 2)), ((11, 8), 3, 2, 1, (1, 1)), ((6, 5), 1, 1, 1, (0, 1))],
)
def test_the_gradient_of_a_grouped_weight(dtype, group, size, rows, stride, dilation, padding):
    x, weight = a_map((3, 32, *size), dtype), a_map((32, group, rows, 3), dtype, 1)
    places = ([stride] * 2, list(padding), [dilation] * 2, False, [0, 0], 32 // group)
    exact = F.conv2d(x.double(), weight.double(), None, *places[:3], 32 // group)
    dy = a_map(tuple(exact.shape), dtype, 2)
    expected = torch.ops.aten.convolution_backward(
        dy.double(), x.double(), weight.double(), None, *places, [False, True, False]
    )[1]
    found = passes.grouped_weight(x, dy, weight, Branch(weight, None, group, (rows, 3), padding, stride, dilation))
    assert found.shape == weight.shape
    assert found.dtype == dtype
    assert is_close(found, expected, stored(dtype))

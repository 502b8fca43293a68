"""The branches' convolutions of one map against PyTorch's convolutions one by one, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from excite.units.split import split

# (kernel, stride, padding, dilation) of each branch: with and without positions that are not looked at, one that no
# padding keeps in size, one whose padding the dilation does not divide.
BRANCHES = {
    "plain": [(3, 1, 1, 1), (3, 1, 2, 2)],
    "strided": [(3, 2, 1, 1), (3, 2, 2, 2)],
    "every third": [(5, 3, 6, 3), (3, 3, 1, 1)],
    "only some": [(3, 2, 2, 2)],
    "no margin": [(3, 1, 0, 1), (3, 2, 1, 2)],
    "of two sizes": [((3, 1), (2, 1), (1, 0), (1, 1)), ((1, 3), (2, 2), (0, 2), (2, 2))],
    "too much margin": [(3, 1, 4, 1)],
}


def convolutions(name: str, channels: int, groups: int, out: int | None = None) -> nn.ModuleList:
    torch.manual_seed(0)
    steps = [
        nn.Conv2d(channels, out or channels, kernel, stride, padding, dilation, groups, bias=False)
        for kernel, stride, padding, dilation in BRANCHES[name]
    ]
    return nn.ModuleList(steps).to(memory_format=torch.channels_last)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.contiguous(memory_format=torch.channels_last)


def is_split(output: Tensor) -> bool:
    return output.grad_fn is not None and output.grad_fn.name() == "_SplitBackward"


def gradients(outputs: list[Tensor], x: Tensor, steps: nn.ModuleList) -> list[Tensor]:
    given = [drawn(*output.shape, seed=2).to(output.dtype) for output in outputs]
    return list(torch.autograd.grad(outputs, (x, *steps.parameters()), given))


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["whole", "of 8", "of 4"])
@pytest.mark.parametrize("kind", ["float64", "float32", "autocast"])
def test_it_equals_the_convolutions(name, groups, kind):
    exact = convolutions(name, 16, groups).double()
    x = drawn(2, 16, 13, 10).requires_grad_()
    expected = [step(x) for step in exact]
    wanted = [*expected, *gradients(expected, x, exact)]
    steps = copy.deepcopy(exact).to(torch.float64 if kind == "float64" else torch.float32)
    low = x.detach().to(steps[0].weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        outputs = split(low, steps)
    assert all(is_split(output) for output in outputs)
    found = [*outputs, *gradients(outputs, low, steps)]
    tolerance = {"float64": 1e-12, "float32": 3e-6, "autocast": 2e-2}[kind]
    for own, right in zip(found, wanted, strict=True):
        assert own.shape == right.shape
        assert (own.double() - right).norm() <= tolerance * right.norm()


def test_more_channels_out_than_in():
    steps = convolutions("strided", 16, 4, 32).double()
    x = drawn(2, 16, 9, 9).requires_grad_()
    for own, expected in zip(split(x, steps), [step(x) for step in steps], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["strided", "plain"])
def test_second_gradients(name):
    steps = convolutions(name, 4, 2).double()
    x = drawn(1, 4, 5, 4).requires_grad_()
    assert is_split(split(x, steps)[0])
    assert torch.autograd.gradgradcheck(lambda x: sum(u.pow(2).sum() for u in split(x, steps)), (x,))


def test_only_what_is_asked_for():
    """Neither a map nor a weight without a gradient gets one, and a branch that nobody uses gives none."""
    steps = convolutions("strided", 16, 4)
    steps[0].weight.requires_grad_(False)
    x = drawn(2, 16, 8, 8).float()
    used = split(x, steps)[1]
    used.sum().backward()
    assert x.grad is None
    assert steps[0].weight.grad is None
    assert steps[1].weight.grad is not None
    leaf = x.clone().requires_grad_()
    own = torch.autograd.grad(split(leaf, steps)[1].square().sum(), leaf)[0]
    expected = torch.autograd.grad(steps[1](leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(own, expected)


def test_a_repeat_gives_the_same_bits():
    steps, x = convolutions("plain", 32, 8), drawn(3, 32, 15, 15).float().requires_grad_()
    first, second = (gradients(split(x, steps), x, steps) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_convolutions_are_called_where_somebody_looks_or_it_cannot_act():
    steps, x = convolutions("plain", 16, 4), drawn(2, 16, 6, 6).float()
    assert is_split(split(x, steps)[0])
    assert not is_split(split(x.contiguous(), steps)[0]), "another layout"
    with torch.no_grad():
        assert split(x, steps)[0].grad_fn is None
    seen = []
    handle = steps[1].register_forward_hook(lambda module, arguments, output: seen.append(output))
    split(x, steps)
    handle.remove()
    assert len(seen) == 1
    biased = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1)])
    torch.testing.assert_close(split(x, biased)[0], biased[0](x))
    with torch.autocast("cpu", torch.float16):
        assert split(x, steps)[0].dtype == torch.float16

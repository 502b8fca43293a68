"""The training forms against the plain composition of their modules, finite differences, and float64."""

from __future__ import annotations

import copy
import pickle
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excite.create import create
from excite.native import build, training_passes
from excite.units import EfficientChannelAttention, SelectiveKernel, SqueezeExcite, training_forms
from excite.units.parts import scale_channels

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm_for(c: Tensor, seed: int = 5, **options: object) -> nn.Module:
    """A batch norm whose scales and shifts are drawn, and one scale 0, as where a branch starts at nothing."""
    norm = NORMS[c.dim() - 2](c.shape[1], **options).to(c.dtype)
    norm.weight.data, norm.bias.data = drawn(c.shape[1], seed=seed).to(c.dtype), drawn(c.shape[1], seed=6).to(c.dtype)
    norm.weight.data[0] = 0
    return norm


def plain(c: Tensor, norm: nn.Module, unit: nn.Module, shortcut: Tensor) -> Tensor:
    """The end of a branch written out, by the running code of nobody but PyTorch."""
    u = F.batch_norm(c, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    z = u.flatten(2).mean(2)
    return F.relu(scale_channels(u, unit.excitation(z), shortcut))


@contextmanager
def off() -> Iterator[None]:
    """Without the training forms: any hook on all modules turns them off."""
    handle = nn.modules.module.register_module_forward_hook(lambda module, arguments, output: None)
    try:
        yield
    finally:
        handle.remove()


def used(output: Tensor) -> set[str]:
    """The training forms in the graph of a tensor."""
    found, todo = set(), [output.grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(node.name())
        todo += [following for following, _ in node.next_functions]
    return {name.removesuffix("Backward") for name in found} & {"_Normalise", "_ScaleAdd", "_Select"}


# ---- squeeze-and-excitation ----


@pytest.mark.parametrize("unit", [SqueezeExcite(4, 2), EfficientChannelAttention(4)], ids=["se", "eca"])
@pytest.mark.parametrize("positions", [(6,), (3, 2), (2, 2, 2)], ids=["1-d", "2-d", "3-d"])
def test_the_end_of_a_branch_equals_its_equations(unit, positions):
    unit = copy.deepcopy(unit).double()
    c, shortcut = drawn(5, 4, *positions).requires_grad_(), drawn(5, 4, *positions, seed=1).requires_grad_()
    norm = norm_for(c)
    ours, theirs = training_forms.excited(c, norm, unit, shortcut), plain(c, norm, unit, shortcut)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    leaves = (c, shortcut, *norm.parameters(), *unit.parameters())
    dy = drawn(*ours.shape, seed=2)
    for own, expected in zip(
        torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


def of_branch_end(unit: nn.Module, *shape: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The end of a branch as a function of everything that has a gradient."""
    c = drawn(*shape)
    norm = norm_for(c)
    names = [name for name, _ in unit.named_parameters()]

    def run(c: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        with training_parameters(norm, (weight, bias)):
            given = copy.deepcopy(unit)
            for name, value in zip(names, parameters, strict=True):
                holder, _, last = name.rpartition(".")
                module = given.get_submodule(holder)
                del module._parameters[last]
                setattr(module, last, value)
            return training_forms.excited(c, norm, given, shortcut)

    values = (c, drawn(*shape, seed=1), norm.weight.data, norm.bias.data, *(p.data for p in unit.parameters()))
    return run, tuple(value.clone().requires_grad_() for value in values)


@contextmanager
def training_parameters(norm: nn.Module, values: tuple[Tensor, Tensor]) -> Iterator[None]:
    """With a tensor in the place of a norm's parameters, which gradcheck varies."""
    before = dict(norm._parameters)
    norm._parameters.update(weight=values[0], bias=values[1])
    try:
        yield
    finally:
        norm._parameters.update(before)


def test_gradients_of_the_end_of_a_branch():
    torch.manual_seed(0)
    run, values = of_branch_end(SqueezeExcite(4, 2).double(), 3, 4, 3, 2)
    assert used(run(*values)) == {"_Normalise", "_ScaleAdd"}
    assert torch.autograd.gradcheck(run, values)


def test_second_gradients_of_the_end_of_a_branch():
    torch.manual_seed(0)
    run, values = of_branch_end(SqueezeExcite(2, 2, activation="silu").double(), 2, 2, 3)
    assert torch.autograd.gradgradcheck(run, values)


def test_what_is_far_from_zero_keeps_its_digits():
    """A channel whose mean is many deviations away from 0: sums over it must not lose more than batch norm's do."""
    c = (10 + drawn(6, 8, 9, 9)).requires_grad_()
    shortcut, dy, unit = drawn(6, 8, 9, 9, seed=1), drawn(6, 8, 9, 9, seed=2), SqueezeExcite(8, 2).double()
    norm = norm_for(c)
    exact = torch.autograd.grad(plain(c, norm, unit, shortcut), (c, norm.weight), dy)
    low, norm, unit = c.detach().float().requires_grad_(), norm.float(), unit.float()
    both = [
        torch.autograd.grad(form(low, norm, unit, shortcut.float()), (low, norm.weight), dy.float())
        for form in (training_forms.excited, plain)
    ]
    for ours, theirs, right in zip(*both, exact, strict=True):
        assert (ours - right).norm() < 4 * (theirs - right).norm() + 1e-6 * right.norm()


def test_maps_in_several_parts_and_in_one_have_the_same_gradients(monkeypatch):
    unit, shortcut = SqueezeExcite(4, 2).double(), drawn(7, 4, 3, 3, seed=1)
    c = drawn(7, 4, 3, 3).requires_grad_()
    norm, dy = norm_for(c), drawn(7, 4, 3, 3, seed=2)
    expected = torch.autograd.grad(training_forms.excited(c, norm, unit, shortcut), c, dy)[0]
    monkeypatch.setattr(training_forms, "_CACHED", 2 * 36)  # two images at a time, and one at the end
    torch.testing.assert_close(
        torch.autograd.grad(training_forms.excited(c, norm, unit, shortcut), c, dy)[0], expected, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_statistics_move_as_the_norm_moves_them(momentum):
    c, shortcut, unit = drawn(4, 4, 3, 3).requires_grad_(), drawn(4, 4, 3, 3), SqueezeExcite(4, 2).double()
    norm = norm_for(c, momentum=momentum)
    other = copy.deepcopy(norm)
    for seed in range(3):
        given = drawn(4, 4, 3, 3, seed=seed).requires_grad_()
        training_forms.excited(given, norm, unit, shortcut)
        other(given)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name], rtol=1e-12, atol=0)


# ---- selective kernels ----


@pytest.mark.parametrize(
    ("branches", "activation"),
    [(((3, 1), (3, 2)), "relu"), (((3, 1), (3, 2)), "identity"), (((3, 1), (1, 1), (1, 1)), "identity")],
    ids=["two", "two-linear", "three-linear"],
)
def test_gradients_of_a_selective_kernel(branches, activation):
    torch.manual_seed(0)
    unit = SelectiveKernel(2, 2, branches=branches, groups=2, min_width=3, activation=activation).double()
    x = drawn(3, 2, 3, 2).requires_grad_()
    names = [name for name, _ in unit.named_parameters()]
    assert used(unit(x)) == {"_Normalise", "_Select"}

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        given = copy.deepcopy(unit)
        for name, value in zip(names, parameters, strict=True):
            holder, _, last = name.rpartition(".")
            module = given.get_submodule(holder)
            del module._parameters[last]
            setattr(module, last, value)
        return given(x)

    values = (x, *(p.data.clone().requires_grad_() for p in unit.parameters()))
    assert torch.autograd.gradcheck(run, values)
    if (
        activation == "identity" and len(branches) == 2
    ):  # behind a ReLU, finite differences of second order meet its kinks
        assert torch.autograd.gradgradcheck(lambda x: unit(x), (x,))


@pytest.mark.parametrize("solid", [False, True], ids=["2-d", "3-d"])
def test_a_selective_kernel_equals_its_plain_form(solid):
    sizes = [((3, 3, 3), (1, 1, 1)), ((3, 3, 3), (1, 2, 2))] if solid else [(3, 1), (3, 2)]
    torch.manual_seed(0)
    unit = SelectiveKernel(4, 8, branches=sizes, groups=2).double()
    other = copy.deepcopy(unit)
    x = drawn(3, 4, *((4, 5, 5) if solid else (6, 5))).requires_grad_()
    ours = unit(x)
    with off():
        theirs = other(x)
    assert used(ours)
    assert not used(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    dy = drawn(*ours.shape, seed=2)
    pairs = zip(
        torch.autograd.grad(ours, (x, *unit.parameters()), dy),
        torch.autograd.grad(theirs, (x, *other.parameters()), dy),
        strict=True,
    )
    for own, expected in pairs:
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


# ---- by the passes in C ----

in_c = pytest.mark.skipif(not training_passes.available(torch.float32), reason="no compiler, or no AVX-512")


def channels_last(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    last = (shape[0], *shape[2:], shape[1])
    return drawn(*last, seed=seed, dtype=dtype).movedim(-1, 1)


def norm_in_float32(channels: int, dimensions: int = 2) -> nn.Module:
    norm = NORMS[dimensions](channels)
    norm.weight.data, norm.bias.data = (drawn(channels, seed=seed).float() for seed in (5, 6))
    norm.weight.data[0] = 0
    return norm


def errors(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    """How far each is off, as a share of what is right."""
    assert all(own.shape == right.shape for own, right in zip(found, exact, strict=True))
    pairs = zip(found, exact, strict=True)
    return torch.stack([(own.double() - right).norm() / (right.norm() + 1e-3) for own, right in pairs])


@in_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eca", [False, True], ids=["se", "eca"])
@pytest.mark.parametrize("shape", [(4, 20, 7, 7), (3, 32, 9, 30), (5, 24, 11), (2, 16, 3, 4, 5)])
def test_the_end_of_a_branch_in_c(shape, eca, dtype):
    """Against its equations in float64: what comes out, all gradients, the statistics. dy is of another layout."""
    torch.manual_seed(0)
    unit = EfficientChannelAttention(shape[1]) if eca else SqueezeExcite(shape[1], 4)
    norm = norm_in_float32(shape[1], len(shape) - 2)
    c, shortcut = (channels_last(*shape, seed=seed, dtype=dtype) for seed in (0, 1))
    dy = drawn(*shape, seed=2, dtype=dtype)
    assert training_forms.Branch(c.requires_grad_(), copy.deepcopy(norm), relu=False).call.in_c

    def everything(form: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        own_norm, own_unit = copy.deepcopy(norm).to(kind), copy.deepcopy(unit).to(kind)
        maps = [
            value.detach().to(dtype if kind == torch.float32 else kind).requires_grad_() for value in (c, shortcut)
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=maps[0].dtype == torch.bfloat16):
            out = form(maps[0], own_norm, own_unit, maps[1])
        leaves = (*maps, *own_norm.parameters(), *own_unit.parameters())
        found = torch.autograd.grad(out, leaves, dy.to(maps[0].dtype))
        if form is training_forms.excited:
            assert out.stride() == found[0].stride() == maps[0].stride()
        return [out, *found, own_norm.running_mean, own_norm.running_var]

    def modules(c: Tensor, norm: nn.Module, unit: nn.Module, shortcut: Tensor) -> Tensor:
        return F.relu(unit(norm(c), shortcut))

    exact = everything(modules, torch.float64)
    ours = errors(everything(training_forms.excited, torch.float32), exact)
    if dtype == torch.float32:
        assert ours.max() < 2e-5
    else:  # what is rounded to bfloat16 moves a ReLU here and there, which gradients show
        assert ours[0] < 4e-3
        assert ours.max() < 1.5 * errors(everything(modules, torch.float32), exact).max() + 0.03


@in_c
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("branches", "activation"),
    [(((3, 1), (3, 2)), "relu"), (((3, 1), (5, 1)), "identity"), (((3, 1), (3, 2), (1, 1)), "relu")],
    ids=["two", "two-linear", "three"],
)
def test_a_selective_kernel_in_c(branches, activation, stride):
    torch.manual_seed(0)
    unit = SelectiveKernel(32, 32, stride, branches=branches, groups=8, activation=activation)
    unit = unit.to(memory_format=torch.channels_last)
    for branch in unit.branches:
        branch[1].weight.data, branch[1].bias.data = drawn(32, seed=3).float(), drawn(32, seed=4).float()
    exact = copy.deepcopy(unit).double()
    x = channels_last(4, 32, 9, 7).requires_grad_()
    right_x = x.detach().double().requires_grad_()
    v = unit(x)
    with off():
        right = exact(right_x)
    assert used(v) == {"_Normalise", "_Select"}
    assert v.stride() == channels_last(*v.shape).stride()
    dy = drawn(*v.shape, seed=2)
    found = torch.autograd.grad(v, (x, *unit.parameters()), dy.float())
    expected = torch.autograd.grad(right, (right_x, *exact.parameters()), dy)
    statistics = ([b for b in one.buffers() if b.is_floating_point()] for one in (unit, exact))
    own, theirs = statistics
    assert errors([v, *found, *own], [right, *expected, *theirs]).max() < 5e-5


@in_c
def test_the_gates_alone_have_a_gradient_in_c():
    """Where nothing comes back through the maps, and where nothing comes back through the gates."""
    norm, unit = norm_in_float32(16), SqueezeExcite(16, 4)
    c, shortcut = channels_last(3, 16, 5, 5).requires_grad_(), channels_last(3, 16, 5, 5, seed=1)
    branch = training_forms.Branch(c, norm, relu=False)
    weights = drawn(3, 16, seed=2).float()
    u = F.batch_norm(c, None, None, norm.weight, norm.bias, True)
    own, expected = (torch.autograd.grad((z * weights).sum(), c)[0] for z in (branch.z, u.mean((2, 3))))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)
    unit.expand.weight.data.zero_()  # the gates are constant
    for name in ("reduce", "expand"):
        getattr(unit, name).requires_grad_(False)
    unit.gate = Constant()
    own, expected = (
        torch.autograd.grad(form(c, norm, unit, shortcut).square().sum(), c)[0]
        for form in (training_forms.excited, plain)
    )
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


class Constant(nn.Module):
    """A gate that does not look."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, 0.5)


@in_c
@pytest.mark.parametrize("first_in_c", [True, False])
def test_branches_of_two_layouts(first_in_c):
    """One whose u is not there and one whose u is."""
    norms = [norm_in_float32(16), norm_in_float32(16)]
    maps = [channels_last(3, 16, 4, 5), drawn(3, 16, 4, 5, seed=1).float()][:: 1 if first_in_c else -1]
    maps = [c.requires_grad_() for c in maps]
    branches = [training_forms.Branch(c, norm, relu=True) for c, norm in zip(maps, norms, strict=True)]
    assert [branch.call.in_c for branch in branches] == [first_in_c, not first_in_c]
    attention = drawn(3, 2, 16, seed=2).float().softmax(1)
    v = training_forms.selected(branches, attention)
    us = [F.relu(F.batch_norm(c, None, None, n.weight, n.bias, True)) for c, n in zip(maps, norms, strict=True)]
    expected = sum(a[..., None, None] * u for a, u in zip(attention.unbind(1), us, strict=True))
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)
    dy = drawn(3, 16, 4, 5, seed=3).float()
    own, right = torch.autograd.grad(v, maps, dy), torch.autograd.grad(expected, maps, dy)
    torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5)


@in_c
@pytest.mark.parametrize("spec", ["resnet20:width=0.5+se", "resnet20:width=0.5+sk"])
def test_without_the_passes_a_network_trains_the_same(spec, monkeypatch):
    network, batches = small(spec, torch.float32), [channels_last(4, 3, 16, 16, seed=seed) for seed in range(5)]
    ours = [gradient(network, x) for x in batches]
    again = gradient(copy.deepcopy(network), batches[0])
    assert torch.equal(again, ours[0]), "a repeat gives the same bits"
    monkeypatch.setenv("EXCITE_NATIVE", "0")
    build.kernels.cache_clear()
    try:
        assert not training_passes.available(torch.float32)
        theirs = [gradient(network, x) for x in batches]
    finally:
        build.kernels.cache_clear()
    # Of some batches a number close to 0 comes out below it here and above it there, and a ReLU lets it pass or not.
    apart = [float((one - other).norm() / other.norm()) for one, other in zip(ours, theirs, strict=True)]
    assert statistics.median(apart) < 3e-5, apart
    assert max(apart) < 0.05, apart


# ---- in networks ----

SPECS = ("resnet20:width=0.5+se", "resnet20:width=0.5+sk", "resnet20:width=0.5+eca", "resnet20:width=0.5+se+sk")


def small(spec: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return create(spec, 10).to(dtype).to(memory_format=torch.channels_last)


def gradient(network: nn.Module, x: Tensor, lowered: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        loss = network(x).double().square().mean()
    network.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in network.parameters()])


@pytest.mark.parametrize("spec", SPECS)
def test_a_network_trains_as_its_plain_form(spec):
    network = small(spec)
    other = copy.deepcopy(network)
    x = drawn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    assert used(network(x)), "this network has a training form"
    with off():
        assert not used(other(x))
        expected = gradient(other, x)
    ours = gradient(network, x)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
    for own, buffer in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(own, buffer, rtol=1e-10, atol=1e-12)
    assert torch.equal(gradient(network, x), ours), "a repeat gives the same numbers"


@pytest.mark.parametrize("spec", SPECS[:2])
@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_in_lower_precision_it_is_no_worse_than_its_plain_form(spec, kind):
    exact = small(spec)
    x = drawn(16, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    right = gradient(exact, x)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    network = small(spec).to(dtype)
    ours = gradient(copy.deepcopy(network), x.to(dtype), kind == "autocast")
    with off():
        theirs = gradient(network, x.to(dtype), kind == "autocast")
    assert (ours - right).norm() < 1.5 * (theirs - right).norm() + 1e-6 * right.norm()


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("spec", "host", "limit"), [("resnet50+se", "resnet50", 1.03), ("sknet50", "resnext50_32x4d", 1.15)]
)
def test_what_is_kept_for_the_backward_pass(spec, host, limit):
    x = drawn(2, 3, 64, 64, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    ours, theirs = (saved_bytes(create(name, 10).to(memory_format=torch.channels_last), x) for name in (spec, host))
    assert theirs < ours < limit * theirs


def test_hooks_see_what_they_saw():
    """The gate's hook is fired by the training form; one on a module that it passes over turns it off."""
    network, x = small(SPECS[0]), drawn(4, 3, 16, 16)
    block = network.layer1[0]
    gates, maps = [], []
    block.se.gate.register_forward_hook(lambda module, arguments, s: gates.append(s))
    output = network(x)
    assert gates[0].shape == (4, 8)
    assert gates[0].requires_grad
    grown = torch.autograd.grad(gates[0].sum(), block.conv1.weight, retain_graph=True)[0]
    with off():
        network(x)
    expected = torch.autograd.grad(gates[1].sum(), block.conv1.weight)[0]
    torch.testing.assert_close(grown, expected, rtol=1e-9, atol=1e-12)
    before = sum(node == "_ScaleAdd" for node in names_in(output))
    block.bn2.register_forward_hook(lambda module, arguments, u: maps.append(u))
    assert sum(node == "_ScaleAdd" for node in names_in(network(x))) == before - 1
    assert len(maps) == 1


def names_in(output: Tensor) -> list[str]:
    found, todo, seen = [], [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node.name().removesuffix("Backward"))
            todo += [following for following, _ in node.next_functions]
    return found


def test_the_plain_form_is_kept_where_the_other_cannot_act():
    network, x = small(SPECS[0]), drawn(4, 3, 16, 16)
    with torch.no_grad():
        assert network(x).grad_fn is None
    assert not used(copy.deepcopy(network).eval()(x)), "evaluation"
    frozen = copy.deepcopy(network)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not used(frozen(x)), "batch norm that is held still"
    parameters = dict(network.named_parameters())
    buffers = dict(copy.deepcopy(network).named_buffers())

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network, (parameters, buffers), (x,)).square().mean()

    by_func = torch.func.grad(loss)(parameters, buffers)
    expected = gradient(network, x)
    torch.testing.assert_close(
        torch.cat([by_func[name].flatten() for name in parameters]), expected, rtol=1e-8, atol=1e-10
    )


def test_one_position_and_one_image_are_refused_as_batch_norm_refuses_them():
    norm, unit = nn.BatchNorm2d(4), SqueezeExcite(4, 2)
    c = torch.randn(1, 4, 1, 1, requires_grad=True)
    assert not training_forms.applies_to(c, norm)
    with pytest.raises(ValueError, match="more than 1 value"):
        unit(norm(c))


@pytest.mark.parametrize("spec", SPECS[:2])
def test_compiled_whole_and_traced(spec):
    network = small(spec, torch.float32).layer1[:1]
    x = drawn(4, 8, 6, 6, dtype=torch.float32)
    other = copy.deepcopy(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradient(compiled, x), gradient(network, x), rtol=1e-3, atol=1e-5)
    graph = torch.fx.symbolic_trace(network)
    torch.testing.assert_close(gradient(graph, x), gradient(network, x), rtol=1e-3, atol=1e-5)
    again = pickle.loads(pickle.dumps(network))
    assert torch.equal(gradient(again, x), gradient(copy.deepcopy(network), x))

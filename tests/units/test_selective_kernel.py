"""SelectiveKernel against the paper's Sect. 3.1 in NumPy, finite differences and timm."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SelectiveKernel as TimmSelectiveKernel
from torch import Tensor, nn

from excite.units import SelectiveKernel

TWO = ((3, 1), (3, 2))
THREE = ((3, 1), (5, 1), (1, 1))


def random_map(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomised(unit, seed=0):
    """The unit in float64 with batch norms that do something: random weights, biases and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    for module in unit.double().modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5, generator=generator)
    return unit


# ---- the paper in NumPy ----


def convolve(x, weight, stride, dilation, groups):
    """A grouped, dilated convolution, zero-padded so that stride 1 keeps the size; tap by tap."""
    (batch, _, height, width), (channels, per_group, kernel, _) = x.shape, weight.shape
    margin = dilation * (kernel - 1) // 2
    padded = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    out = np.zeros((batch, channels, -(-height // stride), -(-width // stride)))
    for n, c, i, j in itertools.product(*map(range, out.shape)):
        first = c // (channels // groups) * per_group  # the first input channel that this output channel sees
        for a, b in itertools.product(range(kernel), repeat=2):
            taps = padded[n, first : first + per_group, i * stride + a * dilation, j * stride + b * dilation]
            out[n, c, i, j] += taps @ weight[c, :, a, b]
    return out


def normalise(x, norm):
    """Batch norm, (N, C, *): by the batch in training, by the running statistics otherwise."""
    others = (0, *range(2, x.ndim))
    mean, variance = (
        (x.mean(others), x.var(others)) if norm.training else (norm.running_mean.numpy(), norm.running_var.numpy())
    )
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    scale = (weight / np.sqrt(variance + 1e-5)).reshape(-1, *[1] * (x.ndim - 2))
    return (x - mean.reshape(scale.shape)) * scale + bias.reshape(scale.shape)


def relu(x):
    return np.maximum(x, 0)


def paper(unit, x, branches, stride, groups, activation=relu):
    """V and the attention (N, M, C) of Eq. 1 to 6."""
    maps = [
        activation(normalise(convolve(x, parts[0].weight.detach().numpy(), stride, dilation, groups), parts[1]))
        for parts, (_, dilation) in zip(unit.branches, branches, strict=True)
    ]
    s = sum(maps).mean((2, 3))
    z = relu(normalise(s @ unit.reduce.weight.detach().numpy().T, unit.norm))
    matrices = np.split(unit.expand.weight.detach().numpy(), len(maps))  # A, B, …: one (C, d) per branch
    powers = np.exp([z @ matrix.T for matrix in matrices])
    attention = powers / powers.sum(0)
    v = sum(a[:, :, None, None] * u for a, u in zip(attention, maps, strict=True))
    return v, attention.swapaxes(0, 1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("branches", "stride", "groups"),
    [
        (TWO, 1, 1),
        (TWO, 1, 4),
        (TWO, 2, 2),
        (((1, 1), (3, 3)), 1, 2),
        (((5, 1), (3, 1)), 3, 1),
        (THREE, 1, 2),
        (THREE, 2, 4),
        (((3, 1), (3, 2), (3, 3), (5, 2)), 1, 4),
    ],
)
def test_equals_the_paper(branches, stride, groups, training):
    unit = randomised(SelectiveKernel(4, 8, stride, branches, groups, reduction=2, min_width=3)).train(training)
    x = random_map(3, 4, 6, 7)
    expected, attention = paper(unit, x.numpy(), branches, stride, groups)
    seen = []
    unit.gate.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().numpy()))
    v = unit(x).detach().numpy()
    np.testing.assert_allclose(v, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(seen[0], attention, rtol=1e-9)
    np.testing.assert_allclose(seen[0].sum(1), 1, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    stride=st.integers(1, 3),
    branches=st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.integers(1, 3)), min_size=2, max_size=4),
    groups=st.sampled_from([1, 2, 4]),
)
def test_size_of_the_output(height, width, stride, branches, groups):
    unit = SelectiveKernel(4, 8, stride, branches, groups).eval()
    v = unit(random_map(2, 4, height, width, dtype=torch.float32))
    assert v.shape == (2, 8, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize(
    ("channels", "reduction", "min_width", "width"),
    [(128, 16, 32, 32), (1024, 16, 32, 64), (64, 16, 32, 32), (256, 4, 32, 64), (64, 16, 1, 4)],
)
def test_width_of_z(channels, reduction, min_width, width):
    unit = SelectiveKernel(channels, channels, groups=32, reduction=reduction, min_width=min_width)
    assert unit.reduce.weight.shape == (width, channels)
    assert unit.expand.weight.shape == (2 * channels, width)
    convolutions = 2 * channels * (channels // 32) * 9
    norms = 2 * 2 * channels + 2 * width
    assert sum(p.numel() for p in unit.parameters()) == convolutions + norms + 3 * channels * width


def test_the_first_rows_of_expand_are_those_of_the_first_branch():
    unit = randomised(SelectiveKernel(4, 4, groups=1)).eval()
    x = random_map(2, 4, 5, 5)
    nn.init.zeros_(unit.expand.weight)
    nn.init.ones_(unit.expand.weight[:4])
    unit.norm.bias.data.fill_(100)  # z is large: the softmax is all or nothing
    torch.testing.assert_close(unit(x), unit.branches[0](x))
    unit.expand.weight.data.neg_()
    torch.testing.assert_close(unit(x), unit.branches[1](x))


def test_initialisation_keeps_the_variance():
    unit = SelectiveKernel(64, 256, branches=TWO, groups=1)
    for branch in unit.branches:  # He et al. 2015, Eq. 14: variance 2 / (kernel² · outputs)
        assert branch[0].weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)


# ---- maps of three dimensions, and kernels without padding ----


def convolve_anywhere(x, weight, dilation, stride, groups, padding):
    """A convolution over maps of any number of dimensions, tap by tap; `padding` on both sides of each."""
    channels, per_group, *kernel = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), *((margin, margin) for margin in padding)))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [(have - span) // stride + 1 for have, span in zip(padded.shape[2:], spans, strict=True)]
    out = np.zeros((len(x), channels, *sizes))
    for c, *position in itertools.product(range(channels), *map(range, sizes)):
        first = c // (channels // groups) * per_group  # the first input channel that this output channel sees
        for tap in itertools.product(*map(range, kernel)):
            place = tuple(p * stride + t * d for p, t, d in zip(position, tap, dilation, strict=True))
            seen = padded[(slice(None), slice(first, first + per_group), *place)]
            out[(slice(None), c, *position)] += seen @ weight[(c, slice(None), *tap)]
    return out


def paper_anywhere(unit, x, branches, paddings, stride, groups):
    """V of Eq. 1 to 6 for maps of any number of dimensions."""
    maps = []
    for parts, (_, dilation), padding in zip(unit.branches, branches, paddings, strict=True):
        weight = parts[0].weight.detach().numpy()
        maps.append(relu(normalise(convolve_anywhere(x, weight, dilation, stride, groups, padding), parts[1])))
    s = sum(maps).mean(tuple(range(2, x.ndim)))
    z = relu(normalise(s @ unit.reduce.weight.detach().numpy().T, unit.norm))
    powers = np.exp([z @ matrix.T for matrix in np.split(unit.expand.weight.detach().numpy(), len(maps))])
    attention = powers / powers.sum(0)
    across = (*attention.shape[1:], *[1] * (x.ndim - 2))
    return sum(a.reshape(across) * u for a, u in zip(attention, maps, strict=True))


SOLID = (((3, 2, 1), (1, 1, 1)), ((3, 2, 1), (2, 1, 1)), ((5, 2, 3), (1, 3, 1)))
VALID = {  # of the branches: what the paddings must be so that all answer for the same positions
    "spectral-spatial": ((((5, 3, 3), (1, 1, 1)), ((5, 3, 3), (2, 2, 2))), ((0, 0, 0), (2, 1, 1))),
    "uneven": (SOLID, ((0, 0, 0), (1, 0, 0), (1, 1, 1))),
    "square": (((3, 1), (3, 2), (5, 1)), ((0, 0), (1, 1), (1, 1))),
    "even": ((((4, 2), (1, 1)), ((2, 2), (3, 1))), ((0, 0), (0, 0))),
    "over the whole map": ((((6, 5), (1, 1)), ((6, 3), (1, 2))), ((0, 0), (0, 0))),
}


def spelled(branches, dimensions):
    return [tuple((size,) * dimensions if isinstance(size, int) else size for size in branch) for branch in branches]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("name", VALID)
def test_valid_equals_the_paper(name, stride, groups, training):
    branches, paddings = VALID[name]
    unit = SelectiveKernel(2, 4, stride, branches, groups, reduction=2, min_width=3, valid=True)
    unit = randomised(unit).train(training)
    x = random_map(3, 2, 6, 5, *([4] if len(paddings[0]) == 3 else []))
    expected = paper_anywhere(unit, x.numpy(), spelled(branches, len(paddings[0])), paddings, stride, groups)
    np.testing.assert_allclose(unit(x).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=60)
@given(
    depth=st.integers(1, 9),
    kernel=st.integers(1, 4),
    dilation=st.integers(1, 4),
    stride=st.sampled_from([1, 1, 2]),
    groups=st.sampled_from([1, 2]),
)
def test_the_quicker_way_is_the_same_convolution(depth, kernel, dilation, stride, groups):
    padding = dilation * (kernel - 1) // 2 + 1
    unit = SelectiveKernel(2, 4, stride, (((3, 3, 3), 1), ((3, 1, 3), 2)), groups)
    ours = type(unit.branches[0][0])(
        2, 4, (kernel, 2, 3), stride, (padding, 1, 0), (dilation, 2, 1), groups, bias=False
    ).double()
    x, y = (random_map(3, 2, depth, 5, 4).requires_grad_() for _ in range(2))
    ours_of_x, theirs_of_y = ours(x), nn.Conv3d.forward(ours, y)
    torch.testing.assert_close(ours_of_x, theirs_of_y)
    gradients = [
        torch.autograd.grad(u.square().sum(), (z, ours.weight)) for u, z in ((ours_of_x, x), (theirs_of_y, y))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("stride", [1, 2])
def test_three_dimensions_with_padding(stride):
    branches = [((3, 1, 3), (1, 1, 1)), ((3, 3, 5), (2, 1, 1))]
    unit = randomised(SelectiveKernel(2, 4, stride, branches, 2, min_width=3)).eval()
    x = random_map(2, 2, 5, 4, 6)
    v = unit(x).detach().numpy()
    assert v.shape[2:] == tuple(-(-size // stride) for size in (5, 4, 6))
    expected = paper_anywhere(unit, x.numpy(), branches, [(1, 0, 1), (2, 1, 2)], stride, 2)
    np.testing.assert_allclose(v, expected, rtol=1e-9, atol=1e-11)


def test_tuples_and_numbers_name_the_same_unit():
    torch.manual_seed(0)
    numbers = SelectiveKernel(4, 8, groups=2)
    torch.manual_seed(0)
    tuples = SelectiveKernel(4, 8, groups=2, branches=(((3, 3), 1), ((3, 3), (2, 2))))
    assert numbers.state_dict().keys() == tuples.state_dict().keys()
    x = random_map(2, 4, 5, 6, dtype=torch.float32)
    torch.testing.assert_close(tuples(x), numbers(x), rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    first=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    dilation=st.integers(1, 3),
    room=st.integers(0, 4),
    stride=st.integers(1, 3),
)
def test_size_of_a_valid_output(first, dilation, room, stride):
    """As of the first branch's convolution without padding, where the other one spans more by an even number."""
    own = tuple(first)
    spread = tuple(dilation if (dilation - 1) * (k - 1) % 2 == 0 else 1 for k in own)
    branches = ((own, (1,) * len(own)), (own, spread))
    unit = SelectiveKernel(1, 2, stride, branches, groups=1, valid=True).eval()
    v = unit(torch.zeros(1, 1, *(k + room for k in own)))
    assert v.shape == (1, 2, *[room // stride + 1] * len(own))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_in_three_dimensions(training):
    torch.manual_seed(0)
    branches = (((2, 3, 1), (1, 1, 1)), ((2, 3, 3), (1, 2, 1)))
    unit = randomised(SelectiveKernel(2, 2, 1, branches, 1, reduction=2, min_width=2, valid=True)).train(training)
    names, values = zip(*unit.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(unit, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (random_map(3, 2, 3, 4, 2).requires_grad_(), *values))


@pytest.mark.parametrize("branches", [SOLID[:2], SOLID], ids=["M=2", "M=3"])
def test_three_dimensions_in_half_precision_traced_and_compiled(branches):
    unit = randomised(SelectiveKernel(2, 4, 1, branches, 1, valid=True)).float()
    x = random_map(4, 2, 6, 5, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = unit(x)
    assert half.dtype == torch.bfloat16
    half.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in unit.parameters())
    unit.eval()
    expected = unit(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(unit)(x), expected)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(unit, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(unit, (x,)).module()(x), expected)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        (((5, 1), (3, 1)), "must span as much as the first branch's or more .* one spans 3 and the first 5"),
        (((3, 1), (4, 1)), "one spans 4 and the first 3"),
        ((((3, 3, 4), 1), ((3, 3, 2), 2)), "one spans 5×5×3 and the first 3×3×4"),
        ((((2, 2), 1), ((2, 2), 2)), "one spans 3 and the first 2"),
        ((((3, 3, 3), 1), ((3, 3), 2)), "for maps of two or of three dimensions"),
        ((((3,), 1), ((3,), 2)), "for maps of two or of three dimensions"),
        ((((3, 3), 1), ((3, 3), (2, 2, 2))), "for maps of two or of three dimensions"),
        ((((3, 0), 1), ((3, 3), 2)), "kernel must be a whole number of at least 1, got 0"),
        ((((3, 3), 1), ((3, 3), (1, -1))), "dilation must be"),
    ],
)
def test_valid_refuses_what_does_not_fit(branches, message):
    with pytest.raises(ValueError, match=message):
        SelectiveKernel(2, 4, 1, branches, 1, valid=True)


def test_padded_kernels_are_odd_in_every_dimension():
    with pytest.raises(ValueError, match=r"kernels must be odd, .* got 3×2×3"):
        SelectiveKernel(2, 4, 1, (((3, 2, 3), 1), ((3, 3, 3), 2)), 1)


# ---- gradients ----


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("branches", [TWO, THREE], ids=["M=2", "M=3"])
def test_gradients(branches, training):
    torch.manual_seed(0)
    unit = randomised(SelectiveKernel(2, 4, 2, branches, 2, reduction=2, min_width=2)).train(training)
    names, values = zip(*unit.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(unit, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (random_map(3, 2, 3, 4).requires_grad_(), *values))


# ---- the same unit elsewhere ----


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_timm(training):
    unit = randomised(SelectiveKernel(32, 64, 2, groups=8, min_width=16)).train(training)
    theirs = TimmSelectiveKernel(
        32, 64, kernel_size=[3, 5], stride=2, groups=8, rd_channels=16, keep_3x3=True, split_input=False
    )
    theirs = theirs.double().train(training)
    for path, branch in zip(theirs.paths, unit.branches, strict=True):
        path.conv.load_state_dict(branch[0].state_dict())
        path.bn.load_state_dict(branch[1].state_dict())
    theirs.attn.bn.load_state_dict(unit.norm.state_dict())
    theirs.attn.fc_reduce.weight.data = unit.reduce.weight.data[:, :, None, None].clone()
    theirs.attn.fc_select.weight.data = unit.expand.weight.data[:, :, None, None].clone()
    x, y = (random_map(4, 32, 9, 8).requires_grad_() for _ in range(2))
    v, w = unit(x), theirs(y)
    torch.testing.assert_close(v, w)
    v.square().sum().backward()
    w.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(unit.expand.weight.grad, theirs.attn.fc_select.weight.grad[:, :, 0, 0])
    torch.testing.assert_close(unit.branches[1][0].weight.grad, theirs.paths[1].conv.weight.grad)


# ---- the activation ----


@pytest.mark.parametrize(
    ("activation", "function"),
    [("identity", lambda x: x), (nn.Softsign(), lambda x: x / (1 + abs(x)))],
    ids=["by name", "module"],
)
def test_other_activations_end_the_branches_only(activation, function):
    unit = randomised(SelectiveKernel(4, 8, groups=2, min_width=3, activation=activation)).eval()
    x = random_map(2, 4, 5, 4)
    expected, _ = paper(unit, x.numpy(), TWO, 1, 2, function)
    v = unit(x).detach().numpy()
    np.testing.assert_allclose(v, expected, rtol=1e-9, atol=1e-11)
    assert v.min() < 0


def test_every_branch_has_its_own_activation():
    shared = nn.PReLU()
    unit = SelectiveKernel(4, 8, groups=2, activation=shared)
    modules = {id(branch[2]) for branch in unit.branches} | {id(shared)}
    assert len(modules) == 3
    assert {"branches.0.2.weight", "branches.1.2.weight"} < dict(unit.named_parameters()).keys()


# ---- precision and memory layout ----


@pytest.mark.parametrize("branches", [TWO, THREE], ids=["M=2", "M=3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_precision(dtype, branches):
    unit = randomised(SelectiveKernel(4, 8, 1, branches, 2)).eval()
    x = random_map(3, 4, 6, 6)
    expected, _ = paper(unit, x.numpy(), branches, 1, 2)
    v = unit.to(dtype)(x.to(dtype))
    assert v.dtype == dtype
    assert np.abs(v.detach().double().numpy() - expected).max() < 8 * torch.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("branches", [TWO, THREE], ids=["M=2", "M=3"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(branches, training):
    unit = randomised(SelectiveKernel(4, 8, 1, branches, 2)).train(training)
    x = random_map(8, 4, 6, 6)
    expected, _ = paper(unit, x.numpy(), branches, 1, 2)
    unit.float()
    x = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        v = unit(x)
    v.sum().backward()
    assert v.dtype == torch.bfloat16
    assert x.grad.isfinite().all()
    difference = np.abs(v.detach().double().numpy() - expected).max()
    assert difference < 8 * torch.finfo(torch.bfloat16).eps * np.abs(expected).max()


@pytest.mark.parametrize("branches", [TWO, THREE], ids=["M=2", "M=3"])
def test_attention_in_another_precision_leaves_the_maps_in_theirs(branches):
    # As autocast on a GPU does: it runs every softmax in float32.
    unit = SelectiveKernel(4, 8, 1, branches, 2).eval().bfloat16()
    unit.gate.register_forward_hook(lambda module, inputs, output: output.float())
    assert unit(random_map(2, 4, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("branches", [TWO, THREE], ids=["M=2", "M=3"])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_channels_last_stays_channels_last(branches, groups):
    unit = randomised(SelectiveKernel(8, 16, 1, branches, groups)).float().to(memory_format=torch.channels_last)
    x = random_map(2, 8, 5, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    v = unit(x)
    assert v.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(v, x, torch.ones_like(v))
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(v, unit(x.contiguous()))


# ---- what is kept in it ----


def contents(module):
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(child).items()}
        for name, child in module.named_modules()
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("branches", [TWO, THREE], ids=["M=2", "M=3"])
def test_a_forward_pass_stores_nothing(branches, training):
    unit = SelectiveKernel(4, 8, 1, branches, 2).train(training)
    before = contents(unit)
    unit(random_map(2, 4, 5, 5, dtype=torch.float32).requires_grad_())
    after = contents(unit)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].keys() == after[name].keys()
        for key, value in before[name].items():
            if key == "_buffers":  # the running statistics change in place
                assert value.keys() == after[name][key].keys()
            else:
                assert after[name][key] is value or after[name][key] == value, (name, key)


def test_copies_and_state():
    unit = randomised(SelectiveKernel(4, 8, groups=2)).eval()
    names = {name.rpartition(".")[0] for name in unit.state_dict()}
    assert names == {"branches.0.0", "branches.0.1", "branches.1.0", "branches.1.1", "reduce", "norm", "expand"}
    x = random_map(2, 4, 5, 5)
    v = unit(x)
    twin = copy.deepcopy(unit)
    with torch.no_grad():
        unit.branches[0][1].bias.add_(5)
    torch.testing.assert_close(twin(x), v)
    assert not torch.allclose(unit(x), v)
    twin.load_state_dict(unit.state_dict())
    torch.testing.assert_close(twin(x), unit(x))


# ---- wrong use ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 0}, "in_channels must be a whole number of at least 1, got 0"),
        ({"out_channels": -1}, "out_channels must be"),
        ({"stride": 0}, "stride must be"),
        ({"groups": 0}, "groups must be"),
        ({"reduction": 0}, "reduction must be"),
        ({"reduction": 0.5}, "reduction must be"),
        ({"min_width": 0}, "min_width must be"),
        ({"branches": ()}, "two or more branches, got 0"),
        ({"branches": ((3, 1),)}, "two or more branches, got 1"),
        ({"branches": ((3, 1), (4, 1))}, "kernels must be odd, .* got 4"),
        ({"branches": ((3, 1), (3, 0))}, "dilation must be"),
        ({"branches": ((3, 1), (-3, 1))}, "kernel must be"),
        ({"branches": (3, 5)}, r"every branch is a pair \(kernel, dilation\), got 3"),
        ({"branches": ((3, 1), (3, 1, 1))}, r"every branch is a pair \(kernel, dilation\), got \(3, 1, 1\)"),
        (
            {"groups": 3},
            "groups must divide the channels, but 3 does not divide both in_channels 8 and out_channels 16",
        ),
        ({"in_channels": 6, "groups": 4}, "4 does not divide both in_channels 6 and out_channels 16"),
        ({"activation": "elu"}, "unknown activation 'elu': give one of relu, relu6, silu"),
        ({"activation": nn.ReLU}, "or an nn.Module instance"),
    ],
)
def test_refuses_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        SelectiveKernel(**{"in_channels": 8, "out_channels": 16, "groups": 8} | changes)


def test_refuses_to_train_on_a_batch_of_one():
    unit = SelectiveKernel(4, 8, groups=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        unit(torch.zeros(1, 4, 6, 6))
    assert unit.eval()(torch.zeros(1, 4, 6, 6)).shape == (1, 8, 6, 6)


# ---- compiled and traced ----


def assert_same_and_same_gradients(ours, theirs, x):
    one, two = (x.detach().clone().requires_grad_() for _ in range(2))
    v, w = ours(one), theirs(two)
    torch.testing.assert_close(v, w)
    F.mse_loss(v, torch.ones_like(v)).backward()
    F.mse_loss(w, torch.ones_like(w)).backward()
    torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("branches", [TWO, THREE], ids=["M=2", "M=3"])
def test_compiles_without_graph_breaks(branches, training):
    torch.compiler.reset()
    unit = randomised(SelectiveKernel(4, 8, 2, branches, 2)).train(training)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    x = random_map(3, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    assert_same_and_same_gradients(compiled, unit, x)


@pytest.mark.parametrize("branches", [TWO, THREE], ids=["M=2", "M=3"])
def test_exports_and_traces(branches):
    unit = randomised(SelectiveKernel(4, 8, 2, branches, 2)).eval()
    any_size = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        unit, (random_map(2, 4, 6, 5),), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},)
    )
    traced = torch.fx.symbolic_trace(unit)
    x = random_map(3, 4, 9, 7)
    torch.testing.assert_close(program.module()(x), unit(x))
    torch.testing.assert_close(traced(x), unit(x))


@pytest.mark.slow
@pytest.mark.parametrize("branches", [TWO, THREE], ids=["M=2", "M=3"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inductor(branches, training):
    torch.compiler.reset()
    unit = randomised(SelectiveKernel(4, 8, 2, branches, 2)).train(training)
    compiled = torch.compile(unit, fullgraph=True)
    x = random_map(3, 4, 9, 7)
    assert_same_and_same_gradients(compiled, unit, x)
    assert_same_and_same_gradients(compiled, unit, x.contiguous(memory_format=torch.channels_last))

"""AddedKernels against the paper's Sect. 3.1 in NumPy, and its new kernels against convolutions built anew."""

import itertools
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame
from torch import Tensor, nn

from excite.units import AddedKernels, SelectiveKernel, SqueezeExcite

ONE, TWO = [(3, 2)], [(5, 1), (1, 1)]


def random_map(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomised(unit, seed=0):
    """The unit in float64 with a batch norm that does something, and a factor that is not 1."""
    generator = torch.Generator().manual_seed(seed)
    unit.double()
    for tensor in (unit.norm.weight.data, unit.norm.running_var):
        tensor.uniform_(0.5, 1.5, generator=generator)
    for tensor in (unit.norm.bias.data, unit.norm.running_mean):
        tensor.uniform_(-0.5, 0.5, generator=generator)
    unit.factor.fill_(1.75)
    return unit


def numbers(tensor):
    return tensor.detach().double().numpy()


# ---- the paper in NumPy ----


def convolve(x, weight, centre, stride, dilation, groups, size):
    """A convolution whose first window lies around `centre`; tap by tap, zero outside of the map."""
    channels, per_group, kernel, _ = weight.shape
    out = np.zeros((len(x), channels, *size))
    for n, c, i, j in itertools.product(*map(range, out.shape)):
        first = c // (channels // groups) * per_group
        for a, b in itertools.product(range(kernel), repeat=2):
            row = centre[0] + i * stride[0] + (a - kernel // 2) * dilation
            column = centre[1] + j * stride[1] + (b - kernel // 2) * dilation
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                out[n, c, i, j] += x[n, first : first + per_group, row, column] @ weight[c, :, a, b]
    return out


def paper(unit, convolution, branches, x, u):
    """V and the attention (N, M, C); the windows of the convolution lie around ((effective − 1) / 2 − padding)."""
    centre = [
        d * (k - 1) // 2 - p
        for k, d, p in zip(convolution.kernel_size, convolution.dilation, convolution.padding, strict=True)
    ]
    maps = [u] + [
        convolve(x, numbers(branch.weight), centre, convolution.stride, dilation, convolution.groups, u.shape[2:])
        for branch, (_, dilation) in zip(unit.branches, branches, strict=True)
    ]
    logits = sum(maps).mean((2, 3)) @ numbers(unit.reduce.weight).T
    norm = unit.norm
    mean, variance = (
        (logits.mean(0), logits.var(0)) if norm.training else (norm.running_mean.numpy(), norm.running_var.numpy())
    )
    normal = (logits - mean) / np.sqrt(variance + 1e-5) * numbers(norm.weight) + numbers(norm.bias)
    z = np.maximum(normal, 0)
    powers = np.exp([z @ matrix.T for matrix in np.split(numbers(unit.expand.weight), len(maps))])
    attention = powers / powers.sum(0)
    v = unit.factor.item() * sum(a[:, :, None, None] * m for a, m in zip(attention, maps, strict=True))
    return v, attention.swapaxes(0, 1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("settings", "branches"),
    [
        ({"kernel_size": 3, "padding": 1}, ONE),
        ({"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2}, TWO),
        ({"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4}, [(3, 1), (3, 3)]),
        ({"kernel_size": 5, "padding": 2, "stride": (2, 1), "bias": False}, [(3, 1)]),
        ({"kernel_size": (1, 7), "padding": (0, 3)}, [(3, 1), (5, 1), (1, 1)]),
        ({"kernel_size": 3}, [(5, 1), (3, 3)]),
    ],
    ids=["M=2", "stride and groups", "dilated", "narrower", "row", "no padding"],
)
def test_equals_the_paper(settings, branches, training):
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 8, **settings).double()
    unit = randomised(AddedKernels(convolution, branches, reduction=2, min_width=3)).train(training)
    x = random_map(3, 4, 7, 8)
    u = convolution(x)
    expected, attention = paper(unit, convolution, branches, x.numpy(), numbers(u))
    seen = []
    unit.gate.register_forward_hook(lambda module, inputs, output: seen.append(numbers(output)))
    np.testing.assert_allclose(numbers(unit(x, u)), expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(seen[0], attention, rtol=1e-9)


def test_equals_a_selective_kernel_without_norms_and_activations_in_its_branches():
    selective = SelectiveKernel(4, 8, 2, ((3, 1), (3, 2)), 2, min_width=4, activation="identity").eval().double()
    for branch in selective.branches:
        branch[1].eps = 1e-30  # with a mean of 0 and a variance of 1: nothing is left of it
    first, second = (branch[0] for branch in selective.branches)
    unit = AddedKernels(first, [(3, 2)], min_width=4).eval()
    unit.branches[0].load_state_dict(second.state_dict())
    for name in ("reduce", "norm", "expand"):
        unit.get_submodule(name).load_state_dict(selective.get_submodule(name).state_dict())
    x = random_map(2, 4, 9, 8)
    torch.testing.assert_close(unit(x, first(x)), selective(x))


@pytest.mark.parametrize("branches", [ONE, TWO], ids=["M=2", "M=3"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients(branches, training):
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
    unit = randomised(AddedKernels(convolution, branches, reduction=2, min_width=2)).train(training)
    names, values = zip(*unit.named_parameters(), strict=True)

    def run(x: Tensor, u: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(unit, dict(zip(names, parameters, strict=True)), (x, u))

    inputs = (random_map(3, 2, 3, 4).requires_grad_(), random_map(3, 4, 2, 2, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(run, (*inputs, *values))


# ---- the new kernels: where they look ----


@settings(deadline=None, max_examples=150)
@given(
    kernel=st.integers(1, 6),
    dilation=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 5),
    new_kernel=st.integers(1, 6),
    new_dilation=st.integers(1, 3),
)
def test_answers_in_the_same_size_and_place_or_refuses(kernel, dilation, stride, padding, new_kernel, new_dilation):
    convolution = nn.Conv2d(1, 1, kernel, stride, padding, dilation)
    wider = new_dilation * (new_kernel - 1) - dilation * (kernel - 1)
    if wider % 2 or padding + wider // 2 < 0:
        with pytest.raises(ValueError, match="cannot answer in the size of the convolution"):
            AddedKernels(convolution, [(new_kernel, new_dilation)])
        return
    (branch,) = AddedKernels(convolution, [(new_kernel, new_dilation)]).branches
    effective = max(new_dilation * (new_kernel - 1), dilation * (kernel - 1)) + 1
    for side in range(effective, effective + 3):
        x = random_map(1, 1, side, side, dtype=torch.float32)
        assert branch(x).shape == convolution(x).shape
    if kernel % 2 and new_kernel % 2:  # each reads the one pixel in the middle of its window
        for module in (convolution, branch):
            nn.init.zeros_(module.weight)
            module.weight.data[..., module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
        nn.init.zeros_(convolution.bias)
        assert torch.equal(branch(x), convolution(x))


@pytest.mark.parametrize(
    ("padding", "branch", "expected"),
    [("same", (5, 1), "same"), ("same", (3, 3), "same"), ("valid", (5, 1), (1, 1)), (2, (1, 1), (1, 1))],
)
def test_padding(padding, branch, expected):
    convolution = nn.Conv2d(2, 4, 3, padding=padding)
    (twin,) = AddedKernels(convolution, [branch]).branches
    assert twin.padding == expected
    x = random_map(1, 2, 9, 8, dtype=torch.float32)
    assert twin(x).shape == convolution(x).shape


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_keeps_the_padding_mode(mode, padding):
    convolution = nn.Conv2d(2, 4, 3, padding=padding, padding_mode=mode)
    (twin,) = AddedKernels(convolution, [(5, 1)]).branches
    x = random_map(1, 2, 9, 8, dtype=torch.float32)
    torch.testing.assert_close(twin(x), F.conv2d(F.pad(x, (2, 2, 2, 2), mode), twin.weight))


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("branch", [(3, 1), (5, 1), (3, 2), (7, 1)])
@pytest.mark.parametrize(
    "kind",
    [Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame],
    ids=lambda kind: kind.__name__,
)
def test_a_subclass_keeps_its_kind(kind, kernel, branch, stride):
    """The new branch computes what the class does when it is built with that kernel, and has the host's size."""
    torch.manual_seed(0)
    convolution = kind(8, 8, kernel, stride=stride, groups=4)
    (twin,) = AddedKernels(convolution, [branch]).branches
    assert type(twin) is kind
    anew = kind(8, 8, branch[0], stride=stride, dilation=branch[1], groups=4, bias=False)
    anew.load_state_dict(twin.state_dict())
    if hasattr(anew, "scale"):
        anew.scale = convolution.scale  # theirs goes with the kernel's size; a gain that learns makes up for it
    for side in (12, 13):
        x = random_map(2, 8, side, side, dtype=torch.float32)
        torch.testing.assert_close(twin(x), anew(x))
        assert twin(x).shape == convolution(x).shape


# ---- the new kernels: what they are ----


@pytest.mark.parametrize("groups", [1, 8, 64], ids=["dense", "grouped", "depthwise"])
def test_initialisation_keeps_the_variance(groups):
    torch.manual_seed(0)
    unit = AddedKernels(nn.Conv2d(64, 256, 3, padding=1, groups=groups), [(5, 1)] * 3)
    for branch in unit.branches:
        # He et al. 2015, Eq. 14: every input goes into 25 · 256 / groups outputs.
        expected = (2 / (25 * 256 / groups)) ** 0.5
        assert branch.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert abs(branch.weight.mean().item()) < 0.02 * expected
    assert not torch.equal(unit.branches[0].weight, unit.branches[1].weight)


@pytest.mark.parametrize(
    ("channels", "reduction", "min_width", "width"), [(128, 16, 32, 32), (1024, 16, 32, 64), (64, 16, 1, 4)]
)
def test_width_of_z_and_parameters(channels, reduction, min_width, width):
    unit = AddedKernels(nn.Conv2d(channels, channels, 3, padding=1, groups=32), ONE, reduction, min_width)
    kernels = channels * channels // 32 * 9
    assert sum(p.numel() for p in unit.parameters()) == kernels + 2 * width + 3 * channels * width


def test_state():
    convolution = nn.Conv2d(4, 8, 3, padding=1)
    unit = AddedKernels(convolution, TWO)
    assert set(unit.state_dict()) == {
        "branches.0.weight",
        "branches.1.weight",
        "reduce.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "expand.weight",
        "factor",
    }
    assert convolution not in set(unit.modules())
    assert unit.factor.item() == 1
    assert unit.factor.dtype == torch.float32


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame], ids=lambda kind: kind.__name__)
def test_takes_nothing_from_the_convolution_but_its_kind(kind):
    calls = []
    convolution = kind(4, 8, 3, padding=1)
    convolution.se = SqueezeExcite(8)
    if kind is nn.Conv2d:  # its forward knows of no child
        convolution.probe = nn.Linear(2, 2)
    convolution.note = {"from": "a checkpoint"}
    convolution.register_forward_hook(lambda module, inputs, output: calls.append("forward"))
    convolution.register_forward_pre_hook(lambda module, inputs: calls.append("pre"))
    convolution.register_full_backward_hook(lambda module, inputs, outputs: calls.append("backward"))
    convolution.register_state_dict_post_hook(lambda module, state, prefix, local: calls.append("state"))
    convolution.requires_grad_(False)
    before = {name: value.clone() for name, value in convolution.state_dict().items()}
    calls.clear()
    unit = AddedKernels(convolution, ONE)
    x = random_map(2, 4, 6, 6, dtype=torch.float32).requires_grad_()
    unit(x, random_map(2, 8, 6, 6, dtype=torch.float32)).sum().backward()
    unit.state_dict()
    assert not calls
    (branch,) = unit.branches
    assert [name for name, _ in branch.named_parameters()] == ["weight"]
    assert branch.weight.requires_grad, "the convolution may be frozen, a new kernel learns"
    assert branch.note == convolution.note
    assert branch.note is not convolution.note
    assert all(torch.equal(value, before[name]) for name, value in convolution.state_dict().items())


class Sharpened(nn.Conv2d):
    """A convolution with a child, a parameter and buffers of its own, and a reference to itself."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.blur = nn.AvgPool2d(3, 1, 1)
        self.amount = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("sign", torch.tensor(-1.0))
        self.register_buffer("scratch", torch.tensor(2.0), persistent=False)
        self.whoami = lambda: None
        self.owner = [self]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.sign * self.amount * self.scratch * self.blur(x))


def test_keeps_what_a_subclass_has_of_its_own():
    convolution = Sharpened(4, 8, 3, padding=1)
    convolution.se = SqueezeExcite(8)  # attached, and not the class's own
    convolution.amount.requires_grad_(False)
    (twin,) = AddedKernels(convolution, [(5, 1)]).branches
    assert set(twin.state_dict()) == {"weight", "amount", "sign"}
    assert [name for name, _ in twin.named_children()] == ["blur"]
    assert twin.owner[0] is twin
    assert twin.amount is not convolution.amount
    assert twin.amount.requires_grad
    x = random_map(1, 4, 9, 8, dtype=torch.float32)
    sharpened = x - F.avg_pool2d(x, 3, 1, 1)
    torch.testing.assert_close(twin(x), F.conv2d(sharpened, twin.weight, padding=2))


def test_a_forward_that_was_replaced_is_bound_to_the_new_kernel():
    def doubled(self, x: Tensor) -> Tensor:
        return 2 * F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    convolution = nn.Conv2d(4, 8, 3, padding=1)
    convolution.forward = types.MethodType(doubled, convolution)
    (twin,) = AddedKernels(convolution, [(5, 1)]).branches
    x = random_map(1, 4, 9, 8, dtype=torch.float32)
    torch.testing.assert_close(twin(x), 2 * F.conv2d(x, twin.weight, padding=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_is_made_in_the_precision_of_the_convolution(dtype):
    unit = AddedKernels(nn.Conv2d(4, 8, 3, padding=1, dtype=dtype), ONE)
    assert {parameter.dtype for parameter in unit.parameters()} == {dtype}
    x, u = random_map(2, 4, 5, 5, dtype=dtype), random_map(2, 8, 5, 5, dtype=dtype)
    assert unit(x, u).dtype == dtype


def test_is_made_where_the_convolution_is():
    with torch.device("meta"):
        convolution = Conv2dSame(4, 8, 3)
    unit = AddedKernels(convolution, ONE)
    unit.start_as_identity()
    assert {tensor.device.type for tensor in unit.state_dict().values()} == {"meta"}


# ---- weight standardisation ----


@pytest.mark.parametrize("kind", [ScaledStdConv2d, ScaledStdConv2dSame], ids=lambda kind: kind.__name__)
def test_a_scaled_standardised_kernel_starts_by_its_gain_and_moves_by_steps(kind):
    torch.manual_seed(0)
    convolution = kind(8, 8, 3)
    unit = AddedKernels(convolution, ONE)
    unit.start_as_identity()
    x, target = random_map(4, 8, 9, 10, dtype=torch.float32), random_map(4, 8, 9, 10, seed=1, dtype=torch.float32)
    with torch.no_grad():
        u = convolution(x)
        assert torch.equal(unit(x, u), u)
    optimizer = torch.optim.SGD(unit.parameters(), lr=1e-3)
    changes, weight = [], unit.branches[0].weight.detach().clone()
    for _ in range(3):
        v = unit(x, u)
        changes.append((v - u).abs().max().item())
        optimizer.zero_grad()
        (v - target).square().mean().backward()
        optimizer.step()
    assert 0 == changes[0] < changes[1] < changes[2] < 0.01 * u.abs().max().item()
    assert not torch.equal(unit.branches[0].weight, weight), "once there is a gain, its kernel learns too"


# ---- precision, memory layout, compiled and traced ----


@pytest.mark.parametrize("branches", [ONE, TWO], ids=["M=2", "M=3"])
def test_autocast(branches):
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 8, 3, padding=1)
    unit = AddedKernels(convolution, branches).train()
    x = random_map(8, 4, 6, 6, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        v = unit(x, convolution(x))
    v.sum().backward()
    assert v.dtype == torch.bfloat16
    assert x.grad.isfinite().all()
    expected = unit(x, convolution(x))
    difference = (v.float() - expected).abs().max()
    assert difference < 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_attention_in_another_precision_leaves_the_maps_in_theirs():
    # As autocast on a GPU does: it runs every softmax in float32.
    unit = AddedKernels(nn.Conv2d(4, 8, 3, padding=1), ONE).eval().bfloat16()
    unit.gate.register_forward_hook(lambda module, inputs, output: output.float())
    x, u = (random_map(2, channels, 5, 5, dtype=torch.bfloat16) for channels in (4, 8))
    assert unit(x, u).dtype == torch.bfloat16


@pytest.mark.parametrize("branches", [ONE, TWO], ids=["M=2", "M=3"])
def test_channels_last_stays_channels_last(branches):
    convolution = nn.Conv2d(8, 16, 3, padding=1)
    unit = AddedKernels(convolution, branches).eval()
    x = random_map(2, 8, 5, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    u = random_map(2, 16, 5, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    v = unit(x, u)
    assert v.is_contiguous(memory_format=torch.channels_last)
    for gradient in torch.autograd.grad(v, (x, u), torch.ones_like(v)):
        assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(v, unit(x.contiguous(), u.contiguous()))


class Block(nn.Module):
    """A convolution and the kernels added to it, as a hook would call them."""

    def __init__(self, branches):
        super().__init__()
        self.convolution = nn.Conv2d(4, 8, 3, padding=1)
        self.sk = AddedKernels(self.convolution, branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.sk(x, self.convolution(x))


@pytest.mark.parametrize("branches", [ONE, TWO], ids=["M=2", "M=3"])
def test_compiles_and_traces(branches):
    torch.compiler.reset()
    block = Block(branches).eval()
    traced = torch.fx.symbolic_trace(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for size in (5, 6):
        x = random_map(2, 4, size, 7, dtype=torch.float32)
        torch.testing.assert_close(traced(x), block(x))
        torch.testing.assert_close(compiled(x), block(x))


def test_exports_with_any_batch_and_size():
    block = Block(TWO).eval()
    any_size = torch.export.Dim.DYNAMIC
    example = random_map(2, 4, 8, 9, dtype=torch.float32)
    program = torch.export.export(block, (example,), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},))
    x = random_map(3, 4, 6, 7, dtype=torch.float32)
    torch.testing.assert_close(program.module()(x), block(x))


# ---- wrong use ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": []}, r"at least one new kernel, such as branches=\[\(3, 2\)\]"),
        ({"branches": [(3, 0)]}, "dilation must be"),
        ({"branches": [(0, 1)]}, "kernel must be"),
        ({"branches": [3]}, r"every branch is a pair \(kernel, dilation\), got 3"),
        ({"branches": [(3, 1, 1)]}, r"every branch is a pair \(kernel, dilation\), got \(3, 1, 1\)"),
        ({"branches": [(4, 1)]}, r"a kernel 4 with dilation 1 .* convolution 3×3 .* padding of 1\.5"),
        ({"reduction": 0}, "reduction must be"),
        ({"min_width": 0}, "min_width must be"),
        (
            {"convolution": nn.Conv2d(4, 8, 3), "branches": [(1, 1)]},
            r"a kernel 1 with dilation 1 cannot answer in the size of the convolution 3×3 with padding 0: .* of -1",
        ),
        ({"convolution": nn.Conv2d(4, 8, 3), "branches": [(2, 1)]}, r"padding of -0\.5"),
        ({"convolution": nn.Conv1d(4, 8, 3)}, "added to an nn.Conv2d, got Conv1d"),
        ({"convolution": nn.ConvTranspose2d(4, 8, 3)}, "added to an nn.Conv2d, got ConvTranspose2d"),
        (
            {"convolution": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3, padding=1))},
            "weight of this convolution is computed from other parameters",
        ),
        (
            {"convolution": nn.utils.spectral_norm(nn.Conv2d(4, 8, 3, padding=1))},
            "weight of this convolution is computed from other parameters",
        ),
    ],
)
def test_refuses_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        AddedKernels(**{"convolution": nn.Conv2d(4, 8, 3, padding=1), "branches": ONE} | changes)


def test_refuses_an_input_and_output_that_do_not_belong_together():
    unit = AddedKernels(nn.Conv2d(4, 8, 3, padding=1), ONE)
    # Without the check the 1×1 map would be spread over the other.
    for shape in ((2, 8, 1, 1), (2, 8, 5, 6), (1, 8, 5, 5)):
        with pytest.raises(ValueError, match=r"in the shape \(2, 8, 5, 5\), the convolution in \("):
            unit(torch.zeros(2, 4, 5, 5), torch.zeros(shape))

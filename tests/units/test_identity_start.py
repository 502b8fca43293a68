"""Units that start as the identity: the map comes out as it went in, and everything in the unit can learn."""

import pytest
import torch
from torch import nn

from excite.units import (
    AddedKernels,
    ConvolutionalBlockAttention,
    EfficientChannelAttention,
    Scaled,
    SqueezeExcite,
)

RESCALING = {
    "se": lambda gate: SqueezeExcite(8, 2, gate=gate),
    "se, max": lambda gate: SqueezeExcite(8, 2, squeeze="max", gate=gate),
    "se, both": lambda gate: SqueezeExcite(8, 2, squeeze="both", gate=gate),
    "eca": lambda gate: EfficientChannelAttention(8, gate=gate),
    "cbam": lambda gate: ConvolutionalBlockAttention(8, 2, gate=gate),
}
ZEROED = {
    "se": {"expand.weight", "expand.bias"},
    "se, max": {"expand.weight", "expand.bias"},
    "se, both": {"expand.weight", "expand.bias"},
    "eca": {"convolution.weight"},
    "cbam": {"channel.expand.weight", "channel.expand.bias", "spatial.convolution.weight"},
}
NEW = {"M=2": [(3, 2)], "M=3": [(3, 2), (5, 1)]}

every_rescaling_unit = pytest.mark.parametrize("name", RESCALING)
every_gate = pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
every_number_of_branches = pytest.mark.parametrize("branches", NEW.values(), ids=NEW)


def random_map(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def map_with_means(*shape):
    """As maps are: their channels differ in their means, else there would be nothing to squeeze."""
    return random_map(*shape) + random_map(*shape[:2], 1, 1, seed=2)


def gates(unit):
    return [module for name, module in unit.named_modules() if name.rpartition(".")[2] == "gate"]


def read(gate_modules, run):
    """What the gates answer during `run()`."""
    seen = []
    hooks = [gate.register_forward_hook(lambda m, i, output: seen.append(output.detach())) for gate in gate_modules]
    run()
    for hook in hooks:
        hook.remove()
    return seen


# ---- rescaling units ----


def started(name, gate="sigmoid"):
    torch.manual_seed(0)
    unit = RESCALING[name](Scaled(gate))
    unit.start_as_identity()
    return unit


@every_rescaling_unit
@every_gate
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_leaves_the_map_as_it_is(name, gate, dtype):
    unit = started(name, gate).to(dtype)
    u, shortcut = (random_map(2, 8, 5, 6, seed=seed).to(dtype) for seed in (0, 1))
    assert torch.equal(unit(u), u)
    assert torch.equal(unit(u, shortcut), u + shortcut)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unit(u), u)


@every_rescaling_unit
@every_gate
def test_everything_that_reaches_the_gate_learns_at_once(name, gate):
    unit = started(name, gate)
    u = map_with_means(4, 8, 5, 6)
    (unit(u) - random_map(4, 8, 5, 6, seed=1)).square().mean().backward()
    for key, parameter in unit.named_parameters():
        assert parameter.grad.isfinite().all()
        # What lies before a layer of zeros has its first gradient when that is no longer zero.
        assert bool((parameter.grad != 0).any()) == (key in ZEROED[name]), key


@every_rescaling_unit
@every_gate
def test_two_steps_later_every_gate_and_parameter_has_moved(name, gate):
    unit = started(name, gate)
    before = {key: value.detach().clone() for key, value in unit.named_parameters()}
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.01)
    u, target = map_with_means(4, 8, 5, 6), random_map(4, 8, 5, 6, seed=1)
    losses = []
    for _ in range(3):
        loss = (unit(u) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) < 3:
            optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    for answer in read(gates(unit), lambda: unit(u)):
        assert (answer != 1).float().mean() > 0.9
    for key, value in unit.named_parameters():
        assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize("shape", [(2, 8, 7), (2, 8, 3, 4, 5)], ids=["1-d", "3-d"])
@pytest.mark.parametrize("name", ["se", "se, both", "eca"])
def test_leaves_maps_of_other_dimensions_as_they_are(name, shape):
    u = random_map(*shape)
    assert torch.equal(started(name)(u), u)


@every_rescaling_unit
def test_other_gates_cannot_start_as_the_identity(name):
    unit = RESCALING[name]("sigmoid")
    before = {key: value.clone() for key, value in unit.state_dict().items()}
    with pytest.raises(ValueError, match=r'only a unit with a Scaled gate .* Sigmoid: .*gate=Scaled\("sigmoid"\)'):
        unit.start_as_identity()
    unit = RESCALING[name](Scaled("tanh"))
    with pytest.raises(ValueError, match="choose one that is neither 0 nor infinite"):
        unit.start_as_identity()
    # A refusal changes nothing.
    refused = RESCALING[name]("sigmoid")
    refused.load_state_dict(before)
    with pytest.raises(ValueError, match="Scaled"):
        refused.start_as_identity()
    assert all(torch.equal(value, before[key]) for key, value in refused.state_dict().items())


@every_rescaling_unit
def test_traces_and_compiles_with_a_scaled_gate(name):
    torch.compiler.reset()
    unit = started(name)
    u = random_map(2, 8, 5, 6)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(unit))(u), u)
    assert torch.equal(torch.compile(unit, fullgraph=True, backend="aot_eager")(u), u)


# ---- added kernels ----


@every_number_of_branches
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_added_kernels_leave_the_convolution_as_it_is(branches, training, groups):
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups)
    unit = AddedKernels(convolution, branches)
    unit.start_as_identity()
    unit.train(training)
    x = random_map(4, 8, 9, 10)
    u = convolution(x)
    v = unit(x, u)
    # With M = 3 the attention 1/3 has been rounded.
    torch.testing.assert_close(v, u, rtol=0 if len(branches) == 1 else 1e-6, atol=0)


@every_number_of_branches
def test_added_kernels_are_exact_in_other_precisions(branches):
    convolution = nn.Conv2d(8, 8, 3, padding=1)
    unit = AddedKernels(convolution, branches)
    unit.start_as_identity()
    x = random_map(4, 8, 9, 10)
    with torch.autocast("cpu", torch.bfloat16):
        u = convolution(x)
        assert u.dtype == torch.bfloat16
        assert torch.equal(unit(x, u), u)
    for dtype in (torch.bfloat16, torch.float64):
        x, convolution, unit = x.to(dtype), convolution.to(dtype), unit.to(dtype)
        u = convolution(x)
        torch.testing.assert_close(unit(x, u), u, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)


@every_number_of_branches
def test_both_the_choice_and_the_new_kernels_learn_at_once(branches):
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    unit = AddedKernels(convolution, branches)
    unit.start_as_identity()
    x, target = random_map(4, 8, 9, 10), random_map(4, 8, 9, 10, seed=1)
    (unit(x, convolution(x)) - target).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in unit.parameters())
    assert all((chunk != 0).all() for chunk in unit.expand.weight.grad.chunk(1 + len(branches))[0])
    assert all(chunk.abs().max() > 0 for chunk in unit.expand.weight.grad.chunk(1 + len(branches)))
    assert all((branch.weight.grad != 0).all() for branch in unit.branches)
    assert (convolution.weight.grad != 0).all()


@every_number_of_branches
def test_two_steps_later_the_attention_and_every_parameter_has_moved(branches):
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    unit = AddedKernels(convolution, branches)
    unit.start_as_identity()
    before = {key: value.detach().clone() for key, value in unit.named_parameters()}
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    x, target = random_map(4, 8, 9, 10), random_map(4, 8, 9, 10, seed=1)
    with torch.no_grad():
        u = convolution(x)
    losses = []
    for _ in range(3):
        loss = (unit(x, u) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) < 3:
            optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    (attention,) = read([unit.gate], lambda: unit(x, u))
    count = 1 + len(branches)
    torch.testing.assert_close(attention.sum(1), torch.ones(4, 8))
    assert ((attention - 1 / count).abs() > 1e-7).float().mean() > 0.9
    for key, value in unit.named_parameters():
        assert not torch.equal(value, before[key]), key

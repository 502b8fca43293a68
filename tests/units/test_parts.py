"""Scaled: a gate and a factor on it."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor, nn

from excite.units import Scaled, SqueezeExcite


def test_is_the_gate_until_the_factor_changes():
    logits = torch.linspace(-5, 5, 11, dtype=torch.float64)
    gate = Scaled().double()
    np.testing.assert_allclose(gate(logits).numpy(), expit(logits.numpy()), rtol=1e-14)
    gate.factor.fill_(3)
    np.testing.assert_allclose(gate(logits).numpy(), 3 * expit(logits.numpy()), rtol=1e-14)


@pytest.mark.parametrize(("name", "factor"), [("sigmoid", 2), ("hard_sigmoid", 2)])
def test_starts_at_one(name, factor):
    gate = Scaled(name)
    gate.start_at_one()
    assert gate.factor.item() == factor
    assert gate.factor.dtype == torch.float32
    assert gate.factor.shape == ()
    assert torch.equal(gate(torch.zeros(2, 3)), torch.ones(2, 3))
    gate.start_at_one()  # the factor is that of the gate alone, not on top of the one before
    assert gate.factor.item() == factor


@pytest.mark.parametrize(("gate", "factor"), [(nn.Softplus(), 1 / np.log(2)), (nn.LogSigmoid(), -1 / np.log(2))])
def test_starts_at_one_with_a_gate_of_ones_own(gate, factor):
    scaled = Scaled(gate)
    scaled.start_at_one()
    assert scaled.factor.item() == pytest.approx(factor)
    torch.testing.assert_close(scaled(torch.zeros(2, 3)), torch.ones(2, 3))


@pytest.mark.parametrize("gate", ["tanh", nn.ReLU()], ids=["tanh", "relu"])
def test_refuses_gates_that_are_zero_at_zero(gate):
    scaled = Scaled(gate)
    with pytest.raises(ValueError, match=r"no factor makes this gate start at 1, for at 0 it is 0\.0: choose"):
        scaled.start_at_one()
    assert scaled.factor.item() == 1


def test_refuses_gates_that_are_infinite_at_zero():
    class Reciprocal(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return 1 / logits

    with pytest.raises(ValueError, match="for at 0 it is inf"):
        Scaled(Reciprocal()).start_at_one()


def test_the_factor_is_stored_with_the_network():
    unit = SqueezeExcite(8, 2, gate=Scaled("sigmoid"))
    unit.start_as_identity()
    twin = SqueezeExcite(8, 2, gate=Scaled("sigmoid"))
    twin.load_state_dict(unit.state_dict())
    assert twin.gate.factor.item() == copy.deepcopy(unit).gate.factor.item() == 2
    assert list(unit.state_dict()) == ["reduce.weight", "reduce.bias", "expand.weight", "expand.bias", "gate.factor"]
    assert "gate.factor" not in dict(unit.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_factor_leaves_the_precision(dtype):
    gate = Scaled("sigmoid")
    gate.start_at_one()
    assert gate(torch.zeros(2, 3, dtype=dtype)).dtype == dtype  # a float32 factor, as under autocast
    assert gate.to(dtype)(torch.zeros(2, 3, dtype=dtype)).dtype == dtype


def test_starts_without_contents():
    with torch.device("meta"):
        unit = SqueezeExcite(8, 2, gate=Scaled("sigmoid"))
        unit.start_as_identity()
    assert unit(torch.empty(2, 8, 3, device="meta")).shape == (2, 8, 3)


def test_refuses_unknown_names():
    with pytest.raises(ValueError, match="unknown gate 'softmax': give one of sigmoid, hard_sigmoid, tanh"):
        Scaled("softmax")

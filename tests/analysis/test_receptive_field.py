"""The effective receptive field against convolutions whose field is known, and against finite differences."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from excite.analysis.receptive_field import effective_receptive_field, sides
from excite.errors import ExciteError, UsageError


def ones(*arguments, **named):
    """A convolution whose weights are all 1."""
    convolution = nn.Conv2d(*arguments, bias=False, **named)
    nn.init.ones_(convolution.weight)
    return convolution


def extent(field):
    """Rows and columns that the field spans."""
    return tuple(int(np.ptp(places)) + 1 for places in np.nonzero(field))


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_convolutions_of_ones_give_the_binomials_of_the_paper(layers) -> None:
    # n-fold convolution of [1, 1, 1] with itself, Luo et al. 2016, Sect. 2.2
    network = nn.Sequential(*(ones(1, 1, 3, padding=1) for _ in range(layers)))
    field = effective_receptive_field(network, str(layers - 1), torch.randn(2, 1, 21, 21))
    row = np.ones(1)
    for _ in range(layers):
        row = np.convolve(row, np.ones(3))
    expected = np.zeros((21, 21))
    expected[10 - layers : 11 + layers, 10 - layers : 11 + layers] = np.outer(row, row)
    np.testing.assert_allclose(field, expected / expected.sum(), rtol=1e-6, atol=1e-12)


def test_strides_and_dilations_widen_the_field_as_the_theory_says() -> None:
    network = nn.Sequential(
        ones(3, 4, 3, padding=1, stride=2), ones(4, 2, 3, padding=2, dilation=2), ones(2, 5, (5, 1), padding=(2, 0))
    )
    images = torch.randn(1, 3, 64, 64)
    spans = [3, 3 + 2 * 4, (3 + 2 * 4 + 2 * 4, 3 + 2 * 4)]
    for path, span in zip("012", spans, strict=True):
        assert extent(effective_receptive_field(network, path, images)) == (span if path == "2" else (span, span))
    assert effective_receptive_field(network, "2", images).sum() == pytest.approx(1)


def test_finite_differences_give_the_same() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Tanh(),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 3, 3, stride=2, padding=1),
        nn.SiLU(),
    ).double()
    network[2].running_mean.normal_()
    network[2].running_var.uniform_(0.5, 2)
    network.eval()
    images = torch.randn(3, 2, 6, 8, dtype=torch.float64)

    @torch.no_grad()
    def centres(batch):
        answer = network(batch)
        return answer[:, :, answer.shape[2] // 2, answer.shape[3] // 2].mean(1)

    expected, step = np.zeros((6, 8)), 1e-6
    for c, i, j in itertools.product(range(2), range(6), range(8)):
        moved = torch.zeros_like(images)
        moved[:, c, i, j] = step
        expected[i, j] += ((centres(images + moved) - centres(images - moved)) / (2 * step)).abs().mean()
    field = effective_receptive_field(network, "4", images)
    np.testing.assert_allclose(field, expected / expected.sum(), rtol=1e-5, atol=1e-8)


def test_what_works_in_place_behind_the_module_changes_nothing() -> None:
    convolution = ones(1, 1, 3, padding=1)
    images = -torch.ones(1, 1, 9, 9)  # the ReLU lets nothing of it through
    network = nn.Sequential(convolution, nn.ReLU(inplace=True))
    assert extent(effective_receptive_field(network, "0", images)) == (3, 3)
    assert not effective_receptive_field(network, "1", images).any()


def test_the_network_is_left_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(4, 1, 8, 8)
    with torch.inference_mode():
        first = effective_receptive_field(network, "2", images)
        made_there = effective_receptive_field(network, "2", images + 0)
    np.testing.assert_array_equal(first, made_there)
    assert network.training
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(not module._forward_hooks for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_makes_no_sense_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 6 * 6, 4))
    images = torch.randn(1, 1, 8, 8)
    with pytest.raises(UsageError, match="no module 'body'"):
        effective_receptive_field(network, "body", images)
    with pytest.raises(UsageError, match="'2' does not answer with a map"):
        effective_receptive_field(network, "2", images)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), Blank())
    with pytest.raises(UsageError, match="'1' passes no gradient"):
        effective_receptive_field(network, "1", images)
    nn.init.constant_(network[0].weight, float("nan"))
    with pytest.raises(ExciteError, match="not a number"):
        effective_receptive_field(network, "0", images)


class Blank(nn.Module):
    """Answers the same map to every image."""

    def forward(self, x):
        return torch.ones_like(x)


def smallest_side(field, share):
    """By trying all squares."""
    height, width = field.shape
    for side in range(1, max(height, width) + 1):
        for top in range(max(1, height - side + 1)):
            for left in range(max(1, width - side + 1)):
                if field[top : top + side, left : left + side].sum() >= share * field.sum() - 1e-9:
                    return side
    raise AssertionError


@pytest.mark.parametrize("shape", [(9, 9), (5, 11), (12, 4), (1, 7)])
def test_sides_are_those_of_the_smallest_squares(shape) -> None:
    draws = np.random.default_rng(sum(shape))
    shares = [0.01, 0.3, 0.5, 0.9, 0.999, 1.0]
    for _ in range(5):
        field = draws.random(shape) ** 4
        assert sides(field / field.sum(), shares) == [smallest_side(field, share) for share in shares]


def test_sides_of_fields_that_are_known() -> None:
    field = np.zeros((32, 32))
    assert sides(field) == [0, 0]
    field[3, 30] = 1
    assert sides(field) == [1, 1]
    assert sides(np.ones((10, 10)), [0.5, 0.81, 0.82]) == [8, 9, 10]

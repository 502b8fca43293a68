"""Class activation maps against Grad-CAM written out with autograd."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from excite.analysis.activation_map import activation_map, last_map
from excite.errors import UsageError


class Small(nn.Module):
    """Convolutions with a stride, batch norm, an in-place ReLU, and a classifier of two layers."""

    def __init__(self, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, stride, 1), nn.BatchNorm2d(5)
        )
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, x):
        return self.head(self.pool(self.relu(self.body(x))).flatten(1))


@pytest.fixture
def small():
    torch.manual_seed(3)
    network = Small(2)
    network.body[3].running_mean.normal_()
    network.body[3].weight.data.uniform_(0.5, 2)
    return network.eval()


def by_hand(network, images, classes):
    """Selvaraju et al., Eq. 1 and 2, of the map after the ReLU; (N, h, w)."""
    maps = network.relu(network.body(images)).detach().requires_grad_()
    scores = network.head(maps.mean((2, 3)))
    (gradients,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), maps)
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * maps).sum(1).clamp(min=0).detach().numpy()


def doubled(rows):
    """Twice as many places along the first axis, linear between the centres of the old ones and even beyond them."""
    places = np.clip((np.arange(2 * len(rows)) + 0.5) / 2 - 0.5, 0, len(rows) - 1)
    return np.stack([np.interp(places, range(len(rows)), column) for column in rows.T], 1)


def test_it_is_grad_cam(small) -> None:
    images, classes = torch.randn(3, 3, 8, 12), torch.tensor([0, 3, 1])
    maps = activation_map(small, images, classes)
    expected = [doubled(doubled(one).T).T for one in by_hand(small, images, classes)]
    assert maps.shape == (3, 8, 12)
    assert min(one.max() for one in expected) > 0
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-7)


def test_classes_have_maps_of_their_own(small) -> None:
    image = torch.randn(1, 3, 8, 8)
    maps = [activation_map(small, image, torch.tensor([number]), "relu")[0] for number in range(4)]
    assert not np.allclose(maps[0], maps[1])
    with torch.inference_mode():
        np.testing.assert_array_equal(activation_map(small, image, torch.tensor([2]), "relu")[0], maps[2])


def test_the_map_before_the_classifier_is_taken(small) -> None:
    assert last_map(small, torch.randn(1, 3, 8, 8)) == "relu"
    with pytest.raises(UsageError, match="No module"):
        last_map(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.randn(1, 3, 2, 2))


def test_the_network_is_left_as_it_was(small) -> None:
    small.train()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    activation_map(small, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    assert small.training
    assert all(parameter.grad is None for parameter in small.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_what_makes_no_sense_is_refused(small, monkeypatch) -> None:
    image, number = torch.randn(1, 3, 8, 8), torch.tensor([0])
    with pytest.raises(UsageError, match="no module 'tail'"):
        activation_map(small, image, number, "tail")
    with pytest.raises(UsageError, match="'head' does not answer with a map"):
        activation_map(small, image, number, "head")
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UsageError, match=r"pip install 'excite\[studio\]'"):
        activation_map(small, image, number)

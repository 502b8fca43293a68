"""The dense network against the same network on every window, cut out one by one."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from excite.create import create
from excite.deploy.dense import NotDenseError, to_dense
from excite.deploy.frequency import FrequencyConv2d
from excite.errors import UsageError


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(network):
    """With batch norm that has seen something, so that folding it matters."""
    for number, module in enumerate(network.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(0.3 * noise(module.num_features, seed=number))
            module.running_var.copy_(0.3 + noise(module.num_features, seed=number + 1).square())
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


def by_window(network, scene, window):
    """(1, K, H, W) → (1, classes, H − window + 1, W − window + 1), one window after the other."""
    rows, cols = (size - window + 1 for size in scene.shape[2:])
    with torch.no_grad():
        logits = [
            network(scene[:, :, row : row + window, col : col + window]) for row in range(rows) for col in range(cols)
        ]
    return torch.cat(logits).T.reshape(1, -1, rows, cols)


def check(network, window, channels, rows=4, cols=5):
    network = trained(network)
    scene = noise(1, channels, window + rows - 1, window + cols - 1)
    expected = by_window(network, scene, window)
    dense = to_dense(network, window)
    with torch.no_grad():
        torch.testing.assert_close(dense(scene), expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())
    return dense


@pytest.mark.parametrize("name", ["hybridsn", "hybridsn_2d", "hybridsn_3d", "hybridsn:norm=none"])
def test_the_networks_of_scenes(name) -> None:
    torch.manual_seed(0)
    check(create(f"{name}{',' if ':' in name else ':'}window=13", 5, in_channels=30), 13, 30)


@pytest.mark.parametrize(("window", "bands"), [(1, 30), (3, 7), (5, 1), (9, 12), (11, 40)])
def test_windows_and_bands_of_any_number(window, bands) -> None:
    torch.manual_seed(0)
    check(create(f"hybridsn:window={window}", 3, in_channels=bands), window, bands)


def test_the_paper_s_size() -> None:
    torch.manual_seed(0)
    dense = check(create("hybridsn", 16, in_channels=30), 25, 30, rows=2, cols=3)
    assert any(isinstance(layer, FrequencyConv2d) for layer in dense)


CHAINS = {
    "batch norm everywhere": lambda: nn.Sequential(
        nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(6, affine=False), nn.Flatten(),
        nn.Linear(6 * 25, 8), nn.BatchNorm1d(8), nn.PReLU(8), nn.Linear(8, 3),
    ),
    "dilation, groups, another activation": lambda: nn.Sequential(
        nn.Conv2d(4, 8, 3, dilation=2, groups=2), nn.GELU(), nn.Conv2d(8, 8, (2, 3), padding="valid"), nn.Flatten(),
        nn.Linear(8 * 2, 3, bias=False),
    ),
    "pooling": lambda: nn.Sequential(
        nn.MaxPool2d(2, stride=1), nn.Conv2d(4, 5, 3), nn.SiLU(), nn.AvgPool2d((2, 1), stride=1), nn.Conv2d(5, 6, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ),
    "pooling and a last convolution": lambda: nn.Sequential(
        nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(5, 3, 1), nn.Flatten(),
    ),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.Sequential(nn.Tanh(), nn.Identity())), nn.Dropout2d(0.5),
        nn.Sequential(nn.Flatten(), nn.Linear(5 * 25, 3)),
    ),
    "bands with strides, padding and dilation": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 3, (2, 3, 3), stride=(2, 1, 1)), nn.BatchNorm3d(3),
        nn.ReLU(inplace=True), nn.Conv3d(3, 4, (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1)), nn.Flatten(1, 2),
        nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 9, 3),
    ),
    "padded over bands at once": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 3, 3, padding=(1, 0, 0)), nn.Flatten(), nn.Linear(3 * 4 * 25, 3),
    ),
    "two channels unflattened": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, (2, 3, 3)), nn.Flatten(1, 2), nn.ReLU(), nn.Conv2d(3, 2, 3),
        nn.Flatten(), nn.Linear(2 * 9, 3),
    ),
    "kernels of one pixel": lambda: nn.Sequential(
        nn.Conv2d(4, 5, 1, padding="same"), nn.PReLU(5), nn.Conv2d(5, 3, 3), nn.Flatten(), nn.PReLU(),
        nn.Linear(3 * 25, 4), nn.PReLU(4), nn.Linear(4, 3),
    ),
    "nothing but a linear layer": lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_one_s_own(name) -> None:
    torch.manual_seed(0)
    check(CHAINS[name](), 7, 4)


def test_a_network_is_read_and_not_changed() -> None:
    torch.manual_seed(0)
    network = trained(create("hybridsn:window=9", 3, in_channels=9)).train()
    before = copy.deepcopy(network.state_dict())
    scene = noise(1, 9, 12, 12)
    kept = scene.clone()
    dense = to_dense(network, 9)
    with torch.no_grad():
        first = dense(scene)
        torch.testing.assert_close(dense(scene), first, rtol=0, atol=0)
    assert network.training
    assert not any(module.training for module in dense.modules())
    assert torch.equal(scene, kept)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        torch.testing.assert_close(dense(scene), first, rtol=0, atol=0)


def test_an_activation_does_not_overwrite_the_scene() -> None:
    scene = noise(1, 4, 9, 9)
    kept = scene.clone()
    to_dense(nn.Sequential(nn.Unflatten(1, (1, 4)), nn.ReLU(), nn.Flatten(), nn.Linear(196, 2)), 7)(scene)
    assert torch.equal(scene, kept)


def bands_flattened(layer):
    """A layer behind what leaves one pixel of a window of 9, but several bands."""
    return nn.Sequential(nn.Unflatten(1, (1, 9)), nn.Conv3d(1, 2, (5, 9, 9)), nn.Flatten(), layer, nn.Linear(10, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create("hybridsn:window=9+se", 3, in_channels=9), "se1"),
        (lambda: create("hybridsn:window=9+sk", 3, in_channels=9), "conv1"),
        (lambda: resnet18(), "ResNet is no plain chain"),
        (lambda: create("resnet20", 3, in_channels=9), "conv1 pads its windows"),
        (lambda: nn.Sequential(nn.Conv2d(9, 3, 3, padding=1), nn.Flatten()), "0 pads its windows"),
        (lambda: nn.Sequential(nn.Conv2d(9, 3, 3, padding="same"), nn.Flatten()), "0 pads its windows"),
        (lambda: nn.Sequential(nn.Conv2d(9, 3, 1, padding=1), nn.Flatten()), "0 pads its windows"),
        (lambda: nn.Sequential(nn.Conv2d(9, 3, (1, 3), padding="same"), nn.Flatten()), "0 pads its windows"),
        (lambda: nn.Sequential(nn.Conv2d(9, 3, 3, stride=2), nn.Flatten()), "0 strides"),
        (lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), "0 strides"),
        (lambda: nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), nn.Flatten()), "0 pads"),
        (lambda: nn.Sequential(nn.GroupNorm(3, 9)), r"0 \(GroupNorm\) may look at its whole window"),
        (lambda: nn.Sequential(nn.BatchNorm2d(9, track_running_stats=False)), "by the batch"),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2)), r"0 \(AdaptiveAvgPool2d\)"),
        (lambda: nn.Sequential(nn.Conv2d(9, 3, 11), nn.Flatten()), "more pixels than are left"),
        (lambda: nn.Sequential(nn.Conv2d(9, 3, 3)), "7×7 pixels"),
        (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(729)), r"1 \(BatchNorm1d\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.PReLU(729), nn.Linear(729, 3)), r"1 \(PReLU\)"),
        (lambda: bands_flattened(nn.PReLU(10)), r"3 \(PReLU\)"),
        (lambda: bands_flattened(nn.BatchNorm1d(10)), r"3 \(BatchNorm1d\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(9 * 80, 3)), "1 takes 720 numbers"),
        (lambda: nn.Sequential(nn.Linear(9, 3)), r"0 \(Linear\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(729, 4), nn.Unflatten(1, (2, 2))), r"2 \(Unflatten\)"),
    ],
)
def test_what_cannot_be_dense_is_named(make, message) -> None:
    with pytest.raises(NotDenseError, match=message):
        to_dense(make(), 9)


def test_a_hook_is_not_lost_in_silence() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten())
    network[0].register_forward_hook(lambda module, inputs, output: output * output.mean())
    with pytest.raises(NotDenseError, match="0 carries hooks"):
        to_dense(network, 3)


def test_another_window_than_the_network_was_built_for() -> None:
    with pytest.raises(UsageError, match="windows of 9 pixels, not of 11"):
        to_dense(create("hybridsn:window=9", 3, in_channels=9), 11)

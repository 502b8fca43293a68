"""Monte Carlo dropout against PyTorch's own dropout, and its draws against what they may hang on."""

import numpy as np
import pytest
import scipy.stats
import torch
from small_scenes import CLASSES, WINDOW, Watched, network, spectra, windows
from torch import nn

from excite.deploy.monte_carlo import MonteCarlo
from excite.deploy.scene_map import map_scene
from excite.errors import UsageError


class Wrapped(nn.Module):
    """Hides that a network is a chain, so that it is asked whole and window by window."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def asked(net, passes=3, seed=0, **options):
    return map_scene(net, Watched(12, 15).cube(), spectra(), WINDOW, passes=passes, seed=seed, **options)


def test_the_same_seed_gives_the_same_map_and_another_seed_another() -> None:
    first, second, other = asked(network()), asked(network()), asked(network(), seed=1)
    assert first.dense
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.confidence, second.confidence)
    np.testing.assert_array_equal(first.entropy, second.entropy)
    assert (first.confidence != other.confidence).mean() > 0.99


@pytest.mark.parametrize("units", ["", "+se"])
def test_what_is_dropped_hangs_neither_on_tiles_nor_on_how_the_network_is_applied(units) -> None:
    whole = asked(network(units))
    for other in (
        asked(network(units), tile=5),
        asked(network(units), dense=False, batch=7),
        asked(Wrapped(network(units)), batch=31),
    ):
        np.testing.assert_allclose(other.confidence, whole.confidence, atol=1e-5)
        np.testing.assert_allclose(other.entropy, whole.entropy, atol=1e-5)


def test_the_mean_of_many_passes_is_that_of_pytorch_s_dropout() -> None:
    net = network()
    few = windows(Watched(12, 15).values)[:4]
    for module in net.modules():
        module.train(isinstance(module, nn.Dropout))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = torch.stack([net(few).softmax(1) for _ in range(3000)])
    expected, spread = theirs.mean(0), theirs.std(0) / 3000**0.5
    parts = MonteCarlo(network(), 3000, 7)
    with torch.no_grad():
        found = parts.probabilities(parts.before(few), np.arange(4))
    assert ((found - expected).abs() < 5 * 2**0.5 * spread + 1e-6).all()


def test_dropout_alone_is_on() -> None:
    net = network().train()
    net.norm1.running_mean.fill_(0.5)
    before = net.norm1.running_mean.clone()
    asked(net)
    assert torch.equal(net.norm1.running_mean, before)
    assert net.training


def test_entropy_is_that_of_the_mean_answer() -> None:
    found = asked(network(), passes=4)
    parts = MonteCarlo(network(), 4, 0)
    with torch.no_grad():
        mean = parts.probabilities(parts.before(windows(Watched(12, 15).values)), np.arange(180)).numpy()
    np.testing.assert_allclose(found.entropy.ravel(), scipy.stats.entropy(mean, axis=1) / np.log(CLASSES), atol=1e-5)
    assert 0 <= found.entropy.min() <= found.entropy.max() <= 1


@pytest.mark.parametrize("p", [0.1, 0.4, 0.999, 1.0])
def test_the_share_that_stays(p) -> None:
    parts = MonteCarlo(nn.Sequential(nn.Dropout(p), Kept()).eval(), 1, 0)
    parts.probabilities(torch.ones(2000, 50), np.arange(2000))
    kept = parts.after[1].seen
    assert (kept != 0).float().mean() == pytest.approx(1 - p, abs=0.01)
    if p < 1:
        assert kept.max() == pytest.approx(1 / (1 - p))
    assert torch.corrcoef(kept[:, :2].T)[0, 1].abs() < 0.1 or p > 0.99


def test_channels_are_dropped_as_a_whole() -> None:
    parts = MonteCarlo(nn.Sequential(nn.Dropout2d(0.5), Kept()).eval(), 1, 0)
    parts.probabilities(torch.ones(50, 8, 3, 3), np.arange(50))
    kept = parts.after[1].seen
    assert (kept.amax((2, 3)) == kept.amin((2, 3))).all()
    assert 0.4 < (kept != 0).float().mean() < 0.6


class Kept(nn.Module):
    def forward(self, x):
        self.seen = x.clone()
        return x.flatten(1)


@pytest.mark.parametrize("net", [nn.Sequential(nn.Flatten(), nn.Linear(7 * 81, 3)), network(",dropout=0")])
def test_a_network_without_dropout(net) -> None:
    with pytest.raises(UsageError, match="no dropout"):
        asked(net)


def test_no_passes() -> None:
    with pytest.raises(UsageError, match="at least one"):
        MonteCarlo(network(), 0, 0)

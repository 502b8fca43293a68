"""Maps against the network asked window by window, the windows cut by NumPy."""

import copy

import numpy as np
import pytest
import torch
from small_scenes import BANDS, CLASSES, WINDOW, Watched, network, spectra, windows
from torch import nn

from excite.deploy.scene_map import logits_at, map_scene
from excite.errors import ExciteError, UsageError


def shares(net, scene):
    with torch.no_grad():
        return net(windows(scene)).double().softmax(1)


@pytest.mark.parametrize(
    ("units", "wanted", "dense"), [("", True, True), ("", False, False), ("+se", True, False), ("+sk", True, False)]
)
@pytest.mark.parametrize("tile", [160, 16])
def test_every_pixel_is_as_its_window_says(units, wanted, dense, tile) -> None:
    scene, net = Watched(29, 34), network(units)
    found = map_scene(net, scene.cube(), spectra(), WINDOW, dense=wanted, tile=tile, batch=50)
    expected = shares(net, scene.values)
    assert found.dense is dense
    np.testing.assert_array_equal(found.labels.ravel(), expected.argmax(1).numpy())
    np.testing.assert_allclose(found.confidence.ravel(), expected.amax(1).numpy(), atol=1e-5)
    assert (found.labels.dtype, found.confidence.dtype, found.entropy) == (np.uint8, np.float32, None)
    assert found.labels.shape == (29, 34)


def test_no_more_than_a_tile_with_its_halo_is_read() -> None:
    scene = Watched(90, 70)
    map_scene(network(), scene.cube(), spectra(), WINDOW, tile=20)
    assert scene.largest <= (20 + WINDOW - 1) ** 2


def test_a_scene_smaller_than_a_window() -> None:
    scene, net = Watched(3, 5), network()
    found = map_scene(net, scene.cube(), spectra(), WINDOW)
    np.testing.assert_array_equal(found.labels.ravel(), shares(net, scene.values).argmax(1).numpy())


def test_more_than_256_classes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(7, 300, 1), nn.Flatten())
    net[0].bias.data[299] = 100
    found = map_scene(net, Watched(3, 4).cube(), spectra(), 1)
    assert found.labels.dtype == np.int64
    assert (found.labels == 299).all()


def test_the_network_stays_as_it_was() -> None:
    net = network("+se").train()
    before = copy.deepcopy(net.state_dict())
    map_scene(net, Watched(4, 5).cube(), spectra(), WINDOW, passes=2)
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_the_same_map_bit_for_bit() -> None:
    first, second = (map_scene(network(), Watched(20, 20).cube(), spectra(), WINDOW, tile=9) for _ in range(2))
    np.testing.assert_array_equal(first.confidence, second.confidence)


@pytest.mark.parametrize("units", ["", "+se"])
def test_progress_ends_with_all_pixels(units) -> None:
    steps = []
    found = map_scene(
        network(units),
        Watched(13, 11).cube(),
        spectra(),
        WINDOW,
        tile=6,
        batch=7,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == sorted(steps)
    assert steps[-1] == (143, 143)
    assert found.dense or len(steps) > 20


def test_what_is_refused() -> None:
    scene = Watched(12, 12)
    with pytest.raises(UsageError, match="must be odd"):
        map_scene(network(), scene.cube(), spectra(), 8)
    with pytest.raises(UsageError, match="built for windows of 9 pixels, not of 7"):
        map_scene(network(), scene.cube(), spectra(), 7)
    scene.values[4, 3, 3] = np.nan
    with pytest.raises(ExciteError, match=r"small holds values that are not finite.*band 5"):
        map_scene(network(), scene.cube(), spectra(), WINDOW)
    scene.values = np.zeros((BANDS + 1, 12, 12), np.float32)
    with pytest.raises(UsageError, match=f"small has {BANDS + 1} bands"):
        map_scene(network(), scene.cube(), spectra(), WINDOW)


@pytest.mark.parametrize("units", ["", "+se"])
@pytest.mark.parametrize("count", [5, 300])
def test_logits_of_chosen_pixels(units, count) -> None:
    scene, net, own = Watched(30, 25), network(units), spectra()
    half = WINDOW // 2
    padded = nn.functional.pad(torch.from_numpy(own.apply(scene.values)), (half,) * 4)
    chosen = np.random.default_rng(0).choice(30 * 25, count, replace=False)
    positions = np.stack(np.divmod(chosen, 25), 1)
    steps = []
    found = logits_at(
        net, padded, positions, WINDOW, batch=40, progress=lambda done, total: steps.append((done, total))
    )
    with torch.no_grad():
        expected = net(windows(scene.values)[chosen])
    assert found.shape == (count, CLASSES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert steps[-1][0] == steps[-1][1]

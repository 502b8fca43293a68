"""What is said of one image, for a network whose gates and attention are set by hand."""

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from torch import nn

from excite.analysis.gates import find_gates
from excite.analysis.one_image import enlarged, look
from excite.errors import ExciteError, UsageError
from excite.preprocessing import Preprocessing
from excite.units.selective_kernel import SelectiveKernel
from excite.units.squeeze_excite import SqueezeExcite

PREPROCESSING = Preprocessing(16, (0.5,) * 3, (0.25,) * 3)
CLASSES = ("ant", "bee", "cow", "dog", "eel", "fox")
GATES = np.array([-2.0, 1.0, 0.25, -0.5, 3.0, 0.0, -1.0, 2.0])
ATTENTION = np.array([[1.0, -1.0, 0.5, 2.0, 0, 0, 0, 3.0], [0, 0, 0, 0, 1.0, 0.1, -1.0, 0], [-1.0] * 7 + [4.0]])
SCORES = np.array([0.5, 2.0, -1.0, 0.0, 1.0, 3.0])


@pytest.fixture
def network():
    """A selective kernel and a squeeze-and-excitation that answer the same whatever they see, then fixed scores."""
    torch.manual_seed(0)
    kernel = SelectiveKernel(3, 8, branches=((3, 1), (5, 1), (3, 3)), groups=1, min_width=4)
    nn.init.zeros_(kernel.reduce.weight)
    nn.init.ones_(kernel.norm.bias)  # z = ReLU(BN(0)) = 1
    kernel.expand.weight.data = torch.zeros(24, 4)
    kernel.expand.weight.data[:, 0] = torch.from_numpy(ATTENTION).float().flatten()
    excite = SqueezeExcite(8, reduction=2)
    nn.init.zeros_(excite.expand.weight)
    excite.expand.bias.data = torch.from_numpy(GATES).float()
    head = nn.Linear(8, len(CLASSES))
    nn.init.normal_(head.weight, std=1e-4)
    head.bias.data = torch.from_numpy(SCORES).float()
    return nn.Sequential(kernel, excite, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


@pytest.fixture
def gates(network):
    found = find_gates(network, torch.randn(2, 3, 16, 16))
    assert [(gate.name, gate.kind) for gate in found] == [("0", "sk"), ("1", "se")]
    return found


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 40, 50), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_predictions_are_the_likeliest_classes(network, gates, image) -> None:
    found = look(network, gates, image, PREPROCESSING, CLASSES)
    assert [row["class"] for row in found["predictions"]] == ["fox", "bee", "eel", "ant", "dog"]
    said = [row["probability"] for row in found["predictions"]]
    np.testing.assert_allclose(said, sorted(softmax(SCORES), reverse=True)[:5], rtol=0.01)
    assert (found["class"], found["target"], found["probability"]) == ("fox", 5, said[0])
    other = look(network, gates, image, PREPROCESSING, CLASSES, target=2)
    assert (other["class"], other["target"]) == ("cow", 2)
    assert other["probability"] == pytest.approx(softmax(SCORES)[2], rel=0.01)
    assert other["predictions"] == found["predictions"]


def test_gates_are_held_against_the_mean_of_the_class(network, gates, image) -> None:
    means = np.random.default_rng(0).random((len(CLASSES), 8))
    statistics = {"excitation/1/mean": means, "counts": np.array([9, 9, 0, 9, 9, 9])}
    gate = expit(GATES)
    for target, reference, against in [(None, means[5], "class"), (1, means[1], "class"), (2, gate.mean(), "unit")]:
        (unit,) = look(network, gates, image, PREPROCESSING, CLASSES, statistics, target=target)["excitation"]
        assert unit["against"] == against  # of cows there were none
        np.testing.assert_allclose(unit["gates"], gate, rtol=1e-5)
        np.testing.assert_allclose(unit["reference"], np.broadcast_to(reference, 8), rtol=1e-5)
        difference = gate - reference
        order = sorted(range(8), key=lambda c: difference[c])
        assert [row["channel"] for row in unit["down"]] == [c for c in order if difference[c] < 0][:5]
        assert [row["channel"] for row in unit["up"]] == [c for c in order[::-1] if difference[c] > 0][:5]
        for row in unit["up"] + unit["down"]:
            assert row["gate"] - row["reference"] == pytest.approx(difference[row["channel"]], abs=1e-6)


def test_without_statistics_gates_are_held_against_their_own_mean(network, gates, image) -> None:
    (unit,) = look(network, gates, image, PREPROCESSING, CLASSES)["excitation"]
    assert unit["against"] == "unit"
    np.testing.assert_allclose(unit["reference"], expit(GATES).mean(), rtol=1e-5)
    assert [row["channel"] for row in unit["up"]] == [4, 7, 1, 2]
    assert [row["channel"] for row in unit["down"]] == [0, 6, 3, 5]


def test_kernels_are_those_that_the_channels_chose(network, gates, image) -> None:
    (unit,) = look(network, gates, image, PREPROCESSING, CLASSES)["selection"]
    assert unit["kernels"] == ["3×3", "5×5", "3×3, dilation 3"]
    np.testing.assert_allclose(unit["attention"], softmax(ATTENTION, 0).mean(1), rtol=1e-5)
    # channels 0, 2 and 3 | 1 (0 is more than −1), 4 and 5 | 7; of channel 6 the first is the largest
    np.testing.assert_allclose(unit["chosen"], np.array([4, 3, 1]) / 8)


def test_the_receptive_field_is_that_of_the_last_unit(network, gates, image) -> None:
    found = look(network, gates, image, PREPROCESSING, CLASSES)["receptive_field"]
    assert found["unit"] == "1"
    # Gates that do not move pass no gradient on: the largest kernel spans 7.
    assert [int(np.ptp(places)) + 1 for places in np.nonzero(found["field"])] == [7, 7]
    assert found["field"].sum() == pytest.approx(1)
    assert 1 <= found["sides"]["0.5"] < found["sides"]["0.9"] <= 7
    only_kernel = look(network, gates[:1], image, PREPROCESSING, CLASSES)
    assert only_kernel["receptive_field"]["unit"] == "0"
    assert only_kernel["excitation"] == []


def test_the_activation_map_is_of_the_class(network, gates, image) -> None:
    one, other = (look(network, gates, image, PREPROCESSING, CLASSES, target=k)["activation"] for k in (0, 1))
    assert one["layer"] == "1"
    assert one["map"].shape == (16, 16)
    assert min(one["map"].min(), other["map"].min()) >= 0
    assert not np.allclose(one["map"], other["map"])


def test_the_centre_is_enlarged(network, gates) -> None:
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 24:40, 40:56] = 255  # 16 of 64 pixels, a quarter of the picture's height
    for scale, side in ((1.0, 4), (2.0, 8), (4.0, 16)):
        seen = look(network, gates, image, PREPROCESSING, CLASSES, scale=scale)["seen"]
        assert seen.shape == (3, 16, 16)
        expected = np.zeros((16, 16))
        expected[8 - side // 2 : 8 + side // 2, 8 - side // 2 : 8 + side // 2] = 255
        assert np.abs(seen[0] - expected).mean() < 12  # the edge is smoothed
        assert abs(float(seen[0].astype(float).sum()) / 255 - side**2) < 0.1 * side**2


@pytest.mark.parametrize("scale", [1.0, 1.3, 1.5, 2.0, 3.7])
def test_what_is_cut_out_lies_in_the_middle(scale) -> None:
    image = torch.arange(31 * 20).reshape(1, 31, 20)
    cut = enlarged(image, scale)
    assert cut.shape[1:] == (round(31 / scale), round(20 / scale))
    rows, columns = cut[0, :, 0] // 20, cut[0, 0] % 20
    assert abs(rows.double().mean() - 15) <= 0.5
    assert abs(columns.double().mean() - 9.5) <= 0.5
    assert torch.equal(rows.diff(), torch.ones(len(rows) - 1, dtype=rows.dtype))


def test_what_makes_no_sense_is_refused(network, gates, image) -> None:
    for scale in (0.5, float("nan"), float("inf"), -2.0):
        with pytest.raises(UsageError, match="expected 1 or more"):
            look(network, gates, image, PREPROCESSING, CLASSES, scale=scale)
    for target in (-1, 6):
        with pytest.raises(UsageError, match="tells 6 apart"):
            look(network, gates, image, PREPROCESSING, CLASSES, target=target)
    for statistics in ({}, {"excitation/1/mean": np.zeros((6, 9))}, {"excitation/1/mean": np.zeros((5, 8))}):
        with pytest.raises(UsageError, match=r"statistics are of another network: for 1 .* 6 classes × 8 channels"):
            look(network, gates, image, PREPROCESSING, CLASSES, statistics)
    nn.init.constant_(network[4].bias, float("nan"))
    with pytest.raises(ExciteError, match="not numbers"):
        look(network, gates, image, PREPROCESSING, CLASSES)

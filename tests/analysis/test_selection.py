"""Attention against object scale: enlarging, gathering, intervals, and a network whose selection is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from excite.analysis.gates import Gate, Kernel, find_gates, reading
from excite.analysis.observations import on_selection
from excite.analysis.selection import Selection, enlarged, scale_bins
from excite.errors import UsageError
from excite.units import SelectiveKernel

KERNELS = (Kernel("5×5", 5), Kernel("3×3", 3), Kernel("7×7", 7))
GATES = [
    Gate("a", "a.gate", "sk", 3, (8, 8), (0.0, 1.0), KERNELS),
    Gate("b", "b.gate", "sk", 2, (4, 4), (0.0, 1.0), KERNELS[:2]),
]


def attention(images: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        gate.name: torch.randn(images, len(gate.kernels), gate.channels, generator=random).softmax(1)
        for gate in GATES
    }


def gathered(paired: bool, images: int = 40) -> tuple[Selection, list[dict[str, Tensor]], Tensor]:
    labels = torch.arange(images) % 3
    selection = Selection(GATES, 4, 3)
    seen = [attention(images, seed) for seed in range(3)]
    for half in (slice(0, 17), slice(17, images)):
        rows = []
        for scale, values in enumerate(seen):
            part = {name: one[half] for name, one in values.items()}
            rows.append(selection.update(part, labels[half], torch.full((len(labels[half]),), scale)))
        if paired:
            selection.update_rise(rows[0], rows[-1])
    return selection, seen, labels


def test_differences_are_those_of_a_loop_over_images() -> None:
    selection, seen, labels = gathered(paired=True)
    arrays, figures = selection.arrays(), selection.figures()
    assert selection.counts.tolist() == [40, 40, 40]
    for gate, figure, (small, large) in zip(GATES, figures, [(1, 2), (1, 0)], strict=True):
        assert (figure["small"], figure["large"]) == (gate.kernels[small].name, gate.kernels[large].name)
        for scale, values in enumerate(seen):
            own = values[gate.name].double().numpy()
            np.testing.assert_allclose(arrays[f"selection/{gate.name}/attention"][scale], own.mean(0), rtol=1e-9)
            difference = own[:, large] - own[:, small]
            assert figure["overall"][scale] == pytest.approx(difference.mean())
            assert figure["deviation"][scale] == pytest.approx(difference.mean(1).std())
            for number in range(3):
                wanted = difference[labels == number]
                found = arrays[f"selection/{gate.name}/difference"][scale, number]
                np.testing.assert_allclose(found, wanted.mean(0), rtol=1e-9, atol=1e-12)
                assert figure["by_class"][number][scale] == pytest.approx(wanted.mean(), abs=1e-6)
        assert figure["by_class"][3] == [None] * 3
        assert np.isnan(arrays[f"selection/{gate.name}/difference"][:, 3]).all()


@pytest.mark.parametrize("paired", [True, False])
def test_the_rises_interval_is_scipys(paired) -> None:
    selection, seen, _ = gathered(paired)
    for gate, figure, (small, large) in zip(GATES, selection.figures(), [(1, 2), (1, 0)], strict=True):
        first, last = (
            (seen[at][gate.name][:, large] - seen[at][gate.name][:, small]).double().mean(1).numpy() for at in (0, -1)
        )
        test = stats.ttest_rel(last, first) if paired else stats.ttest_ind(last, first, equal_var=False)
        interval = test.confidence_interval(0.95)
        assert figure["rise"] == pytest.approx(last.mean() - first.mean())
        assert figure["rise_ci95"] == pytest.approx([interval.low, interval.high])


def test_a_constant_attention_has_no_rise_and_no_width() -> None:
    selection = Selection(GATES[1:], 1, 2)
    values = {"b": torch.tensor([[[0.25, 0.5], [0.75, 0.5]]]).repeat(6, 1, 1)}
    selection.update(values, torch.zeros(6, dtype=torch.int64), torch.arange(6) % 2)
    (figure,) = selection.figures()
    assert figure["overall"] == [-0.25, -0.25]
    assert (figure["rise"], figure["rise_ci95"]) == (0.0, [0.0, 0.0])


def test_two_parts_are_the_whole() -> None:
    whole, seen, labels = gathered(paired=True)
    parts = [Selection(GATES, 4, 3) for _ in range(2)]
    for part, here in zip(parts, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        rows = [
            part.update({name: one[here] for name, one in values.items()}, labels[here], torch.full((20,), scale))
            for scale, values in enumerate(seen)
        ]
        part.update_rise(rows[0], rows[-1])
    parts[0].merge(parts[1])
    for name, array in whole.arrays().items():
        np.testing.assert_allclose(parts[0].arrays()[name], array, rtol=1e-12, atol=1e-15)
    for one, other in zip(parts[0].figures(), whole.figures(), strict=True):
        assert one["rise_ci95"] == pytest.approx(other["rise_ci95"], rel=1e-9)


# --- enlarging -----------------------------------------------------------------------------------------------------


def test_the_centre_is_enlarged_as_pillow_does() -> None:
    from PIL import Image

    pixels = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = enlarged(pixels, 2)
    assert large.shape == pixels.shape
    assert large.dtype == torch.uint8
    for one, wanted in zip(large, pixels, strict=True):
        picture = Image.fromarray(wanted[:, 5:15, 6:18].permute(1, 2, 0).numpy())
        resized = np.asarray(picture.resize((24, 20), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(one.numpy().astype(int) - resized).max() <= 1
    floats = enlarged(pixels.float() / 255, 2)
    assert (255 * floats - large).abs().max() <= 0.51


def test_a_factor_of_one_changes_nothing_and_less_is_refused() -> None:
    images = torch.rand(1, 3, 8, 8)
    assert enlarged(images, 1) is images
    assert enlarged(images, 1000).unique().numel() <= 3, "one pixel of the centre is left"
    for factor in (0.5, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="1 or more"):
            enlarged(images, factor)


def test_bins_by_size_are_of_equal_counts() -> None:
    scales = torch.tensor([2.0, 0.5, 1.0, 0.6, 1.1, 1.9, 0.7, 1.2, 1.0])
    bins, medians = scale_bins(scales, 3)
    assert bins.bincount().tolist() == [3, 3, 3]
    assert medians == pytest.approx([0.6, 1.0, 1.9])
    assert scales[bins == 0].max() <= scales[bins == 1].min()
    assert scales[bins == 1].max() <= scales[bins == 2].min()


# --- a network whose selection is known ----------------------------------------------------------------------------


def chooser(sign: float) -> nn.Module:
    """Selective kernels that attend to the large kernel with the strength of what is in the image's mean, times 4.

    Both kernels only pass the middle pixel on, so the unit's squeeze is 2 · mean.
    """
    unit = SelectiveKernel(2, 2, groups=1, reduction=1, min_width=2, activation="identity").eval()
    with torch.no_grad():
        for branch in unit.branches:
            branch[0].weight.zero_()
            for channel in range(2):
                branch[0].weight[channel, channel, 1, 1] = 1
            branch[1].eps = 0
        unit.reduce.weight.copy_(torch.eye(2))
        unit.norm.eps = 0
        unit.expand.weight.zero_()
        unit.expand.weight[2:] = 2 * sign * torch.eye(2)  # of the second branch, the dilated one
    return unit


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_network_that_chooses_by_scale_is_found_to_do_so(sign) -> None:
    # An object of 1 in the centre of a ground of 0: enlarged, it fills more of the image.
    network = nn.Sequential(chooser(sign)).eval()
    strength = torch.rand(12, 1, 1, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    images = torch.zeros(12, 2, 16, 16)
    images[:, :, 6:10, 6:10] = strength
    gates = find_gates(network, images)
    selection = Selection(gates, 1, 3)
    labels = torch.zeros(12, dtype=torch.int64)
    factors = (1.0, 1.5, 2.0)
    rows = []
    with torch.no_grad(), reading(network, gates) as values:
        for scale, factor in enumerate(factors):
            network(enlarged(images, factor))
            rows.append(selection.update(values, labels, torch.full((12,), scale)))
    selection.update_rise(rows[0], rows[-1])
    (figure,) = selection.figures()
    for scale, factor in enumerate(factors):
        logits = sign * 4 * enlarged(images, factor).mean((1, 2, 3))
        wanted = torch.sigmoid(logits) - torch.sigmoid(-logits)
        assert figure["overall"][scale] == pytest.approx(wanted.mean().item(), abs=1e-6)
    low, high = figure["rise_ci95"]
    assert low <= figure["rise"] <= high
    assert sign * figure["rise"] > 0.2
    assert sign * low > 0
    assert sign * high > 0
    assert on_selection([figure], ["0"], factors)[0]["answer"] == ("yes" if sign > 0 else "no")


def rising(*rises: float) -> list[tuple[str, str]]:
    figures = [{"rise": rise, "rise_ci95": [rise - 0.01, rise + 0.01]} for rise in rises]
    names = [f"layer{number}" for number in range(len(rises))]
    observations = on_selection(figures, names, (1.0, 2.0))
    return [(one["answer"], one["sentence"]) for one in observations]


def test_where_the_rise_stops_is_said() -> None:
    (rises, first), (stops, second) = rising(0.05, 0.2, 0.1, 0.05, 0.0, -0.03)
    assert (rises, stops) == ("yes", "yes")
    assert "4 of 6 units and falls in 1" in first
    assert "layer1, by +0.200 (95 % interval 0.190 to 0.210)" in first
    assert "layer3, number 4 of 6" in second
    assert [answer for answer, _ in rising(0.1, 0.1, 0.1)] == ["yes", "no"]
    assert [answer for answer, _ in rising(-0.1, -0.1, 0.1)] == ["no", "unclear"]
    assert "−0.033" in rising(-0.1, -0.1, 0.1)[0][1]

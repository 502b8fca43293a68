"""Statistics of gates against a loop over images, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from excite.analysis.excitation import Excitation, spread_evenly, stage_of
from excite.analysis.gates import Gate
from excite.analysis.observations import on_excitation
from excite.errors import ExciteError

GATES = [
    Gate("layer1.0.se", "layer1.0.se.gate", "se", 4, (8, 8), (0.0, 1.0)),
    Gate("layer2.0.se", "layer2.0.se.gate", "se", 6, (4, 4), (0.0, 2.0)),
]


def values(images: int = 90) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (images,), generator=random)
    labels[labels == 1] = 3  # nothing of class 1
    first = torch.rand(images, 4, generator=random)
    first[:, 2] = 0.5
    second = 2 * torch.sigmoid(6 * torch.randn(images, 6, generator=random) + labels[:, None])
    return {"layer1.0.se": first, "layer2.0.se": second}, labels


def gathered(sizes: list[int]) -> Excitation:
    gates, labels = values()
    excitation = Excitation(GATES, 4)
    start = 0
    for size in sizes:
        here = slice(start, start + size)
        excitation.update({name: one[here] for name, one in gates.items()}, labels[here])
        start += size
    return excitation


def test_the_statistics_are_those_of_a_loop_over_all_images() -> None:
    excitation = gathered([32, 32, 26])
    arrays, figures = excitation.arrays(), excitation.figures(channels=3)
    gates, labels = values()
    assert excitation.counts.tolist() == [int((labels == number).sum()) for number in range(4)]
    for gate, figure in zip(GATES, figures, strict=True):
        own = gates[gate.name].double().numpy()
        low, high = gate.range
        prefix = f"excitation/{gate.name}"
        means = np.stack([own[labels == number].mean(0) if number != 1 else own[0] * np.nan for number in range(4)])
        np.testing.assert_allclose(arrays[f"{prefix}/mean"], means, rtol=1e-12)
        for number in (0, 2, 3):
            wanted = own[labels == number].std(0)
            np.testing.assert_allclose(arrays[f"{prefix}/deviation"][number], wanted, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(arrays[f"{prefix}/overall_deviation"], own.std(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(arrays[f"{prefix}/low"], (own <= low + 0.05).mean(0))
        np.testing.assert_allclose(arrays[f"{prefix}/high"], (own >= high - 0.05).mean(0))

        # One number at a time, as the definitions read.
        between = within = 0.0
        for image, label in zip(own, labels.tolist(), strict=True):
            for channel in range(gate.channels):
                between += (means[label, channel] - own[:, channel].mean()) ** 2 / own.size
                within += (image[channel] - means[label, channel]) ** 2 / own.size
        assert figure["between"] == pytest.approx(between**0.5)
        assert figure["within"] == pytest.approx(within**0.5)
        assert figure["class_share"] == pytest.approx(between / own.var(0).mean())
        assert figure["mean"] == pytest.approx(own.mean())
        assert figure["low"] == pytest.approx((own <= low + 0.05).mean())
        assert figure["high"] == pytest.approx((own >= high - 0.05).mean())
        assert figure["range"] == [low, high]
        last = gate.channels - 1
        assert figure["channels"] == [0, round(last / 2), last]
        assert figure["overall"] == pytest.approx(own.mean(0)[figure["channels"]], abs=1e-6)
        assert list(figure["by_class"]) == ["0", "1", "2", "3"]
        assert figure["by_class"]["1"] == [None] * 3
        assert figure["by_class"]["3"] == pytest.approx(means[3][figure["channels"]], abs=1e-6)
    assert [figure["constant"] for figure in figures] == [0.25, 0.0]


def test_two_halves_are_the_whole() -> None:
    gates, labels = values()
    whole, first, second = gathered([90]), gathered([37]), Excitation(GATES, 4)
    second.update({name: one[37:] for name, one in gates.items()}, labels[37:])
    first.merge(second)
    for name, array in whole.arrays().items():
        np.testing.assert_allclose(first.arrays()[name], array, rtol=1e-12, atol=1e-15)


def test_gates_that_are_no_numbers_are_told_with_their_unit() -> None:
    gates, labels = values()
    gates["layer2.0.se"][5, 1] = torch.nan
    with pytest.raises(ExciteError, match=r"layer2\.0\.se are not finite"):
        Excitation(GATES, 4).update(gates, labels)


def test_channels_are_spread_evenly() -> None:
    assert spread_evenly(4, 50) == [0, 1, 2, 3]
    assert spread_evenly(101, 5) == [0, 25, 50, 75, 100]
    assert spread_evenly(7, 1) == [0]


def test_stages_are_told_by_name() -> None:
    assert stage_of("layer3.2.act2.se") == 3
    assert stage_of("net.stage_2.block") == 2
    assert stage_of("features.4.block.2") is None
    assert stage_of("player1.se") is None


def unit(share: float, between: float = 0.1, saturated: float = 0.0, constant: float = 0.0) -> dict:
    return {
        "class_share": share,
        "between": between,
        "range": [0.0, 1.0],
        "low": saturated / 2,
        "high": saturated / 2,
        "constant": constant,
    }


def answers(figures: list[dict], images: int = 1000) -> list[str]:
    stages = [1 + number * 3 // len(figures) for number in range(len(figures))]
    units = [{"name": f"layer{stage}", "stage": stage, "size": [8, 8]} for stage in stages]
    observations = on_excitation(figures, units, [images // 10] * 10)
    for one in observations:
        begins = {"yes": "Yes: ", "no": "No: ", "unclear": "It is unclear: "}[one["answer"]]
        assert one["sentence"].startswith(begins)
        assert one["sentence"].endswith(".")
    return [one["answer"] for one in observations]


def test_a_network_like_the_papers_is_recognised() -> None:
    early, middle, late = unit(0.03, 0.01), unit(0.2), unit(0.7, saturated=0.8)
    assert answers([early, early, middle, middle, late, late]) == ["yes", "yes", "yes"]


def test_a_network_unlike_the_papers_is_recognised() -> None:
    assert answers([unit(0.6), unit(0.4), unit(0.05, saturated=0.01)]) == ["no", "no", "no"]
    assert answers([unit(0.15), unit(0.18), unit(0.2, saturated=0.3)]) == ["unclear", "unclear", "unclear"]


def test_few_images_make_a_class_seem_to_explain_something() -> None:
    # Of 40 images in 10 classes, chance alone gives the class 9/39 of the variance.
    assert answers([unit(0.3)] * 3, images=1000)[0] == "no"
    assert answers([unit(0.3)] * 3, images=40)[0] == "yes"


def test_one_unit_alone_has_no_depth() -> None:
    observations = on_excitation([unit(0.5)], [{"name": "se", "stage": None, "size": [8, 8]}], [50, 50])
    assert [one["answer"] for one in observations] == ["no", "no", "no"]
    assert "the only unit" in observations[0]["sentence"]

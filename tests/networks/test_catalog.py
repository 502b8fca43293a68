"""The catalogue's figures, held against the networks themselves."""

import functools

import pytest
import torch

from excite.cost import cost
from excite.create import create
from excite.networks.catalog import CATALOG

FIGURES = [
    pytest.param(figures.spec or entry.name, entry, figures, id=f"{figures.spec or entry.name}-{index}")
    for entry in CATALOG.values()
    for index, figures in enumerate(entry.figures)
    if figures.parameters or figures.macs
]


@functools.cache
def costs(spec, num_classes, size):
    with torch.device("meta"):
        return cost(create(spec, num_classes), (3, size, size))


@pytest.mark.parametrize(("spec", "entry", "figures"), FIGURES)
def test_published_figures(spec, entry, figures):
    num_classes = 1000 if "ImageNet" in figures.data else 10
    found = costs(spec, num_classes, entry.input_size)
    if figures.parameters:
        # A figure published with two digits (0.27 M, 1.7 M) is known to half its last one only.
        rounding = 0.005 if figures.parameters < 1 else 0.05
        assert found.parameters / 1e6 == pytest.approx(figures.parameters, rel=0.01, abs=rounding)
    if figures.macs:
        assert found.macs / 1e9 == pytest.approx(figures.macs, rel=0.01)


# Written out once more, from the papers and not from the catalogue: a slip there would otherwise be tested
# against itself. Parameters in millions, multiply–adds in 10⁹.
@pytest.mark.parametrize(
    ("spec", "parameters", "macs"),
    [
        ("resnet18", 11.69, 1.81),  # torchvision's documentation
        ("resnet34", 21.80, 3.66),
        ("resnet50", 25.56, 4.09),
        ("resnet101", 44.55, 7.80),
        ("resnet152", 60.19, 11.51),
        ("resnet50:stride_in=1x1", 25.56, 3.86),
        ("resnet101:stride_in=1x1", 44.55, 7.58),
        ("resnet152:stride_in=1x1", 60.19, 11.30),
        ("se_resnet50", 28.09, 3.87),
        ("se_resnet101", 49.33, 7.60),
        ("se_resnet152", 66.82, 11.32),
        ("resnext50_32x4d", 25.0, 4.24),
        ("resnext101_32x4d", 44.3, 7.99),
        ("se_resnext50_32x4d", 27.6, 4.25),
        ("se_resnext101_32x4d", 49.0, 8.00),
        ("sknet50", 27.5, 4.47),
        ("sknet101", 48.9, 8.46),
    ],
)
def test_imagenet_figures(spec, parameters, macs):
    found = costs(spec, 1000, 224)
    assert found.parameters / 1e6 == pytest.approx(parameters, rel=0.01)
    assert found.macs / 1e9 == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [("resnext29_16x64d", 68.1), ("sknet29", 27.7), ("resnet20", 0.27), ("resnet56", 0.853), ("resnet110", 1.728)],
)
def test_cifar_figures(spec, parameters):
    assert costs(spec, 10, 32).parameters / 1e6 == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", CATALOG)
def test_every_network_builds_and_answers_in_the_right_shape(name):
    entry = CATALOG[name]
    with torch.device("meta"):
        network = create(name, num_classes=7, in_channels=5).eval()
        images = torch.empty(2, 5, entry.input_size, entry.input_size)
    with torch.no_grad():
        assert network(images).shape == (2, 7)
    last_stage = network[-4]  # before pooling, flattening and the classifier
    strides = 32 if entry.table.stem == "imagenet" else 4
    with torch.no_grad():
        maps = torch.nn.Sequential(*network[:-3])(images)
    assert maps.shape == (2, entry.table.outer[-1], entry.input_size // strides, entry.input_size // strides)
    assert len(last_stage) == entry.table.depths[-1]


@pytest.mark.parametrize("name", CATALOG)
def test_names_say_the_depth(name):
    """The number in a name counts the layers with weights on the main path: convolutions and classifier."""
    entry = CATALOG[name]
    per_block = {"basic": 2, "bottleneck": 3}[entry.table.block]
    digits = name.split("_")[1] if name.startswith("se_") else name.split("_")[0]
    assert int("".join(filter(str.isdigit, digits))) == 2 + per_block * sum(entry.table.depths)

"""The catalogue's figures, held against the networks themselves."""

import functools

import pytest
import torch

from excite.cost import cost
from excite.create import create
from excite.networks.catalog import CATALOG
from excite.networks.tables import ResNetTable

FIGURES = [
    pytest.param(figures.spec or entry.name, entry, figures, id=f"{figures.spec or entry.name}-{index}")
    for entry in CATALOG.values()
    for index, figures in enumerate(entry.figures)
    if (figures.parameters or figures.macs) and not figures.note
]


@functools.cache
def costs(spec, num_classes, size, channels=3):
    with torch.device("meta"):
        return cost(create(spec, num_classes, channels), (channels, size, size))


@pytest.mark.parametrize(("spec", "entry", "figures"), FIGURES)
def test_published_figures(spec, entry, figures):
    found = costs(spec, entry.classes, entry.input_size, entry.in_channels)
    if figures.parameters:
        # A figure published with one or two digits (0.5 M, 0.27 M, 1.7 M) is known to half its last one only.
        rounding = 0.5 * 10.0 ** -len(str(figures.parameters).partition(".")[2])
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
        ("senet154", 115.0, 20.7),
        ("mobilenet_v1", 4.23, 0.569),
        ("mobilenet_v2", 3.50, 0.300),
        ("mobilenet_v2:width=1.4", 6.06, 0.582),  # the authors' release
        ("shufflenet_v2_x0_5", 1.367, 0.0405),  # torchvision's documentation
        ("shufflenet_v2_x1_0", 2.279, 0.146),
        ("shufflenet_v2_x1_5", 3.504, 0.296),
        ("shufflenet_v2_x2_0", 7.394, 0.583),
        ("resnext101_32x8d", 88.79, 16.41),
        ("resnext101_64x4d", 83.46, 15.46),
        ("wide_resnet50_2", 68.88, 11.40),
        ("wide_resnet101_2", 126.89, 22.75),
    ],
)
def test_imagenet_figures(spec, parameters, macs):
    found = costs(spec, 1000, 224)
    assert found.parameters / 1e6 == pytest.approx(parameters, rel=0.01)
    assert found.macs / 1e9 == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("entry", CATALOG.values(), ids=CATALOG)
def test_a_figure_with_a_note_differs_a_little(entry):
    """A note excuses a figure from the hundredth, but not from being of this network."""
    for figures in entry.figures:
        if figures.note:
            found = costs(figures.spec or entry.name, 1000, entry.input_size)
            off = [abs(found.macs / 1e9 / figures.macs - 1)] if figures.macs else []
            off += [abs(found.parameters / 1e6 / figures.parameters - 1)] if figures.parameters else []
            assert 0.01 < max(off) < 0.15


# Hu et al. 2018, Table 5: sizes in MB (of 2²⁰ bytes) of SE-ResNet-50 with other reductions, and without SE.
@pytest.mark.parametrize(
    ("spec", "mebibytes"),
    [
        ("resnet50:stride_in=1x1", 98),
        ("resnet50:stride_in=1x1,pool=ceil+se:reduction=4", 137),
        ("resnet50:stride_in=1x1,pool=ceil+se:reduction=8", 117),
        ("se_resnet50", 108),
        ("resnet50:stride_in=1x1,pool=ceil+se:reduction=32", 103),
    ],
)
def test_sizes_by_reduction(spec, mebibytes):
    """The paper's are of files, which hold the running statistics of the batch norms as well."""
    with torch.device("meta"):
        network = create(spec)
    stored = sum(tensor.numel() for name, tensor in network.state_dict().items() if "num_batches" not in name)
    assert 4 * stored / 2**20 == pytest.approx(mebibytes, rel=0.01)


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [("resnext29_16x64d", 68.1), ("sknet29", 27.7), ("resnet20", 0.27), ("resnet56", 0.853), ("resnet110", 1.728)],
)
def test_cifar_figures(spec, parameters):
    assert costs(spec, 10, 32).parameters / 1e6 == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", CATALOG)
def test_what_a_network_was_drawn_for(name):
    entry = CATALOG[name]
    expected = (30, 16) if name.startswith("hybridsn") else (3, 10 if entry.input_size == 32 else 1000)
    if name.startswith("dncnn"):
        expected = (3 if name == "dncnn_color" else 1, None)
    if name == "dscmr":
        expected = (4096 + 300, 10)  # an image's vector and a text's, as one pixel
    assert (entry.in_channels, entry.classes) == expected


@pytest.mark.parametrize("name", CATALOG)
def test_every_network_builds_and_answers_in_the_right_shape(name):
    entry = CATALOG[name]
    with torch.device("meta"):
        network = create(name, num_classes=7, in_channels=5).eval()
        channels = entry.in_channels if name == "dscmr" else 5
        images = torch.empty(2, channels, entry.input_size, entry.input_size)
    with torch.no_grad():
        answer = network(images)
    if name == "dscmr":
        assert [part.shape for part in answer] == [(2, 1024), (2, 1024), (2, 7), (2, 7)]
    else:
        assert answer.shape == (images.shape if entry.classes is None else (2, 7))


RESNETS = [name for name, entry in CATALOG.items() if isinstance(entry.table, ResNetTable)]


@pytest.mark.parametrize("name", RESNETS)
def test_the_stages_of_a_resnet(name):
    entry = CATALOG[name]
    with torch.device("meta"), torch.no_grad():
        network = create(name).eval()
        before_pooling = list(network.named_children())
        before_pooling = before_pooling[: [child for child, _ in before_pooling].index("avgpool")]
        images = torch.empty(2, 3, entry.input_size, entry.input_size)
        maps = torch.nn.Sequential(*(child for _, child in before_pooling))(images)
    strides = 4 if entry.table.stem == "cifar" else 32
    assert maps.shape == (2, entry.table.outer[-1], entry.input_size // strides, entry.input_size // strides)
    assert len(before_pooling[-1][1]) == entry.table.depths[-1]


@pytest.mark.parametrize("name", [name for name in RESNETS if name != "senet154"])
def test_names_say_the_depth(name):
    """The number in a name counts the layers with weights on the main path: convolutions and classifier."""
    entry = CATALOG[name]
    per_block = {"basic": 2, "bottleneck": 3}[entry.table.block]
    digits = name.removeprefix("se_").removeprefix("wide_").split("_")[0]
    assert int("".join(filter(str.isdigit, digits))) == 2 + per_block * sum(entry.table.depths)

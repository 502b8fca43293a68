"""DSCMR against its paper's layers and a network in NumPy; what it refuses."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from excite.cost import cost
from excite.create import create
from excite.errors import UsageError
from excite.networks.dscmr import DSCMR, adjusted, dscmr
from excite.networks.tables import DSCMRTable

SMALL = "dscmr:image_dim=7,text_dim=5,hidden=8x6,dim=4"


def pairs(count=3, image_dim=7, text_dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, image_dim, generator=generator), torch.randn(count, text_dim, generator=generator)


def test_the_papers_layers():
    with torch.device("meta"):
        network = create("dscmr", 10)
    layers = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert layers == {
        "image.0.weight": (2048, 4096),
        "image.0.bias": (2048,),
        "text.0.weight": (2048, 300),
        "text.0.bias": (2048,),
        "shared.weight": (1024, 2048),
        "shared.bias": (1024,),
        "classifier.weight": (10, 1024),
    }
    assert (network.image_dim, network.text_dim, network.dim) == (4096, 300, 1024)


def test_by_hand():
    network = create(SMALL, 3).double().eval()
    images, texts = (part.double() for part in pairs())
    number = {name: tensor.numpy() for name, tensor in network.state_dict().items()}

    def point(x, branch):
        for layer in (0, 3):
            x = np.maximum(x @ number[f"{branch}.{layer}.weight"].T + number[f"{branch}.{layer}.bias"], 0)
        return x @ number["shared.weight"].T + number["shared.bias"]

    u, v = point(images.numpy(), "image"), point(texts.numpy(), "text")
    expected = (u, v, u @ number["classifier.weight"].T, v @ number["classifier.weight"].T)
    with torch.no_grad():
        for answer, hand in zip(network((images, texts)), expected, strict=True):
            np.testing.assert_allclose(answer.numpy(), hand, rtol=1e-10)
        np.testing.assert_allclose(network.embed_images(images).numpy(), u, rtol=1e-10)
        np.testing.assert_allclose(network.embed_texts(texts).numpy(), v, rtol=1e-10)


def test_the_last_layer_and_the_classifier_learn_from_both():
    network = create(SMALL, 3)
    images, texts = pairs()
    gradients = []
    for chosen in (0, 1):
        network.zero_grad()
        network((images, texts))[2 + chosen].sum().backward()
        gradients.append({name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()})
    assert {name.split(".")[0] for name in gradients[0]} == {"image", "shared", "classifier"}
    assert {name.split(".")[0] for name in gradients[1]} == {"text", "shared", "classifier"}


@pytest.mark.parametrize("trailing", [(), (1, 1)], ids=str)
def test_a_pair_in_one_tensor(trailing):
    network = create(SMALL, 3).eval()
    images, texts = pairs()
    with torch.no_grad():
        together = network(torch.cat([images, texts], dim=1).reshape(3, 12, *trailing))
        for one, other in zip(together, network((images, texts)), strict=True):
            torch.testing.assert_close(one, other)


def test_cost():
    network = create(SMALL, 3)
    found = cost(network, network.input_shape)
    layers = [(7, 8), (8, 6), (5, 8), (8, 6), (6, 4), (6, 4), (4, 3), (4, 3)]
    assert found.macs == sum(one * other for one, other in layers)
    assert found.parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("argument", "shares"), [("dropout", [0, *[0.5] * 4]), ("input_dropout", [0.5, *[0] * 4])])
def test_dropout_is_of_training_alone(argument, shares):
    network = create(f"{SMALL},{argument}=0.5", 3)
    given = pairs()
    assert not torch.equal(network(given)[0], network(given)[0])
    assert not torch.equal(network(given)[1], network(given)[1])
    network.eval()
    assert torch.equal(network(given)[0], network(given)[0])
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == shares


def test_with_a_backbone_for_pictures():
    backbone = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    table = adjusted(DSCMRTable(), image_dim=7, text_dim=5, hidden="8", dim=4)
    network = dscmr(table, 3, image=backbone).eval()
    pictures, (_, texts) = torch.rand(2, 3, 9, 9), pairs(2)
    with torch.no_grad():
        u, v, pu, pv = network((pictures, texts))
        vectors = backbone(pictures)
        assert torch.equal(u, network.shared(network.image(vectors)))
    assert (u.shape, v.shape, pu.shape, pv.shape) == ((2, 4), (2, 4), (2, 3), (2, 3))
    assert network.input_shape is None
    with pytest.raises(ValueError, match=r"pictures and texts.*give \(images, texts\)"):
        network(torch.rand(2, 12))
    with pytest.raises(
        ValueError, match=r"images of 6 numbers, \(N, 6\), but got \(2, 7\): build it with image_dim="
    ):
        dscmr(adjusted(table, image_dim=6), 3, image=backbone)((pictures, texts))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (pairs(image_dim=6), r"images of 7 numbers, \(N, 7\), but got \(3, 6\): build it with image_dim="),
        (pairs(text_dim=6), r"texts of 5 numbers, \(N, 5\), but got \(3, 6\): build it with text_dim="),
        ((torch.zeros(3, 3, 8, 8), torch.zeros(3, 5)), r"but got \(3, 3, 8, 8\)"),
        (torch.zeros(3, 11), r"pairs of 7 and 5 numbers, side by side \(N, 12\), but got \(3, 11\)"),
    ],
)
def test_other_pairs_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        create(SMALL, 3)(given)


def test_the_arguments_of_a_spec():
    table = DSCMRTable()
    assert adjusted(table) == table
    expected = DSCMRTable(128, 100, (512, 256), 64, dropout=0.5, input_dropout=0.2)
    given = {"image_dim": 128, "text_dim": 100, "hidden": "512x256", "dim": 64, "dropout": 0.5, "input_dropout": 0.2}
    assert adjusted(table, **given) == expected
    assert adjusted(expected, dropout=0.0).dropout == 0
    assert isinstance(dscmr(expected), DSCMR)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dscmr:image_dim=0", r"image_dim is a number of dimensions, 1 to 65536, not 0"),
        ("dscmr:text_dim=-3", r"text_dim is a number of dimensions, 1 to 65536, not -3"),
        ("dscmr:dim=65537", r"dim is a number of dimensions, 1 to 65536, not 65537"),
        ("dscmr:dropout=1", r"at least 0 and below 1, not 1.0"),
        ("dscmr:input_dropout=-0.1", r"input_dropout is a share, at least 0 and below 1, not -0.1"),
        ("dscmr:hidden=wide", r"such as 2048 or 1024x512, not 'wide'"),
        ("dscmr:hidden=512x", r"such as 2048 or 1024x512, not '512x'"),
        ("dscmr:hidden=0", r"hidden is widths of 1 to 65536, not 0"),
        ("dscmr:hidden=99999", r"hidden is widths of 1 to 65536, not 99999"),
        ("dscmr:image_dim=0.5", r"image_dim=0.5: expected a whole number"),
        ("dscmr:units=3", r"its arguments are image_dim, text_dim, hidden, dim, dropout, input_dropout"),
        ("dscmr+se", r"put them into its image backbone"),
        ("dscmr+sk", r"put them into its image backbone"),
        ("dscmr+se:init=identity", r"put them into its image backbone"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        create(spec)
    assert str(caught.value).startswith(f"Cannot build '{spec}'")


def test_the_same_seed_gives_the_same_network():
    first, second = (create(SMALL, 3).state_dict() for _ in range(2) if torch.manual_seed(3))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_copies_and_compiles():
    network = create(SMALL, 3).eval()
    given = pairs()
    with torch.no_grad():
        expected = network(given)
        torch.testing.assert_close(copy.deepcopy(network)(given), expected)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(given), expected)

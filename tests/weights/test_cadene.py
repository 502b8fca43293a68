"""Cadene's names: the same weights give the same outputs in his networks (or timm's) and in ours.

The tests against ``pretrainedmodels`` itself are skipped where it is not installed.
"""

import importlib

import pytest
import timm
import torch
import torchvision
from torch import nn

from excite.create import create
from excite.errors import UsageError
from excite.networks.bn_inception import bn_inception
from excite.networks.inception_resnet import inception_resnet_v2
from excite.networks.tables import BN_INCEPTION, INCEPTION_RESNET_V2
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from excite.weights.base import Content
from excite.weights.cadene import cadene_layout

CLASSES = 10


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pretrainedmodels(file):
    pytest.importorskip("pretrainedmodels")
    return importlib.import_module(f"pretrainedmodels.models.{file}")


def shuffled(network):
    """Random batch norms: a fresh network's are all alike, and exchanged ones would go unseen."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return network.eval()


def convert(network):
    return cadene_layout(Content("PyTorch", network.state_dict()))


def load(theirs, ours):
    converted = convert(theirs)
    ours.load_state_dict(converted.tensors)
    return ours.eval(), converted


def difference(found, expected):
    """The greatest, of the greatest value."""
    assert torch.isfinite(expected).all()
    assert expected.std() > 1e-3
    assert found.shape == expected.shape == (2, CLASSES)
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def outputs(theirs, ours, size):
    images = torch.rand(2, 3, size, size)
    return ours(images), theirs(images)


# --- BN-Inception ----------------------------------------------------------------------------------------------


def bn_inceptions():
    theirs = shuffled(pretrainedmodels("bninception").BNInception(num_classes=CLASSES))
    ours, converted = load(theirs, bn_inception(BN_INCEPTION, CLASSES))
    return theirs, ours, converted.preprocessing


@torch.no_grad()
def bn_inception_outputs(theirs, ours, preprocessing):
    """Each fed as it wants to be: ours by the preprocessing that is said of it, his by what pretrainedmodels says."""
    pixels = torch.rand(2, 3, 224, 224)  # red, green, blue, 0 to 1
    said = pretrainedmodels("bninception").pretrained_settings["bninception"]["imagenet"]
    assert (said["input_space"], said["input_range"], said["std"]) == ("BGR", [0, 255], [1, 1, 1])
    blue_first = pixels.flip(1) * 255 - torch.tensor(said["mean"]).view(3, 1, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return ours((pixels - mean) / std), theirs(blue_first)


def test_bn_inception():
    theirs, ours, preprocessing = bn_inceptions()
    assert (preprocessing.size, preprocessing.resize, preprocessing.interpolation) == (224, 256, "bilinear")
    assert difference(*bn_inception_outputs(theirs, ours, preprocessing)) < 1e-4


def test_the_comparison_sees_an_epsilon():
    """It would not be worth much otherwise."""
    theirs, ours, preprocessing = bn_inceptions()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    with pytest.raises(AssertionError):
        assert difference(*bn_inception_outputs(theirs, ours, preprocessing)) < 1e-4


def test_bn_inception_for_something_else_than_colours():
    theirs = {"conv1_7x7_s2.weight": torch.empty(64, 10, 7, 7), "inception_3a_1x1.weight": torch.empty(64, 192, 1, 1)}
    assert cadene_layout(Content("PyTorch", theirs)) is None


# --- Inception-ResNet-v2 ---------------------------------------------------------------------------------------


def test_inception_resnet_of_cadene():
    theirs = shuffled(pretrainedmodels("inceptionresnetv2").InceptionResNetV2(num_classes=CLASSES))
    theirs.avgpool_1a = nn.AdaptiveAvgPool2d(1)  # his takes nothing but 299 pixels
    ours, converted = load(theirs, inception_resnet_v2(INCEPTION_RESNET_V2, CLASSES))
    assert converted.preprocessing == Preprocessing(299, (0.5,) * 3, (0.5,) * 3, resize=341)
    assert difference(*outputs(theirs, ours, 107)) < 1e-4


def test_inception_resnet_of_timm():
    theirs = shuffled(timm.create_model("inception_resnet_v2", num_classes=CLASSES))
    ours, converted = load(theirs, inception_resnet_v2(INCEPTION_RESNET_V2, CLASSES))
    said = timm.get_pretrained_cfg("inception_resnet_v2.tf_in1k")
    assert converted.preprocessing == Preprocessing(
        said.input_size[-1], said.mean, said.std, int(said.input_size[-1] / said.crop_pct), said.interpolation
    )
    assert difference(*outputs(theirs, ours, 107)) < 1e-4


def test_the_background_class_is_left_out():
    with torch.device("meta"):
        theirs = timm.create_model("inception_resnet_v2", num_classes=0).state_dict()
    head = {"last_linear.weight": torch.rand(1001, 1536), "last_linear.bias": torch.rand(1001)}
    converted = cadene_layout(Content("PyTorch", theirs | head))
    for kind in ("weight", "bias"):
        assert torch.equal(converted.tensors[f"fc.{kind}"], head[f"last_linear.{kind}"][1:])


# --- SE-ResNet, SE-ResNeXt, SENet-154 --------------------------------------------------------------------------

STRIDE_1X1 = {"stride_in": "1x1", "pool": "ceil"}
STRIDE_3X3 = {"stride_in": "3x3", "pool": "ceil"}


@pytest.mark.parametrize(
    ("name", "form"), [("se_resnet50", STRIDE_1X1), ("se_resnext50_32x4d", STRIDE_3X3), ("senet154", STRIDE_3X3)]
)
def test_se_networks_of_cadene(name, form):
    theirs = shuffled(getattr(pretrainedmodels("senet"), name)(num_classes=CLASSES, pretrained=None))
    theirs.avg_pool = nn.AdaptiveAvgPool2d(1)  # his takes nothing but 224 pixels
    ours, converted = load(theirs, create(name, CLASSES))
    assert converted.form == form
    assert converted.preprocessing == Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, resize=256)
    assert difference(*outputs(theirs, ours, 72)) < 1e-4


@pytest.mark.parametrize(("name", "form"), [("se_resnet50", STRIDE_1X1), ("se_resnext26_32x4d", STRIDE_3X3)])
def test_legacy_networks_of_timm(name, form):
    theirs = shuffled(timm.create_model("legacy_" + name.replace("se_", "se"), num_classes=CLASSES))
    ours, converted = load(theirs, create(name, CLASSES))
    assert converted.form == form
    assert difference(*outputs(theirs, ours, 72)) < 1e-4


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("se_resnet101", STRIDE_1X1),
        ("se_resnet152", STRIDE_1X1),
        ("se_resnext101_32x4d", STRIDE_3X3),
        ("senet154", STRIDE_3X3),
    ],
)
def test_the_deep_ones_have_our_names_and_shapes(name, form):
    with torch.device("meta"):
        theirs, ours = timm.create_model("legacy_" + name.replace("se_", "se")), create(name)
    converted = convert(theirs)
    assert converted.form == form
    assert {key: tensor.shape for key, tensor in converted.tensors.items()} == {
        key: tensor.shape for key, tensor in ours.state_dict().items()
    }


def test_the_form_is_the_right_one():
    """Another place of the stride, or another pooling, gives other outputs."""
    theirs = shuffled(timm.create_model("legacy_seresnet50", num_classes=CLASSES))
    for spec in ("se_resnet50:stride_in=3x3", "se_resnet50:pool=padded"):
        ours, _ = load(theirs, create(spec, CLASSES))
        assert difference(*outputs(theirs, ours, 72)) > 1e-2


def test_networks_that_rectify_before_se(tmp_path):
    """timm's shallow ones end each branch in a ReLU: a form of the network here, and refused by the others."""
    theirs = shuffled(timm.create_model("legacy_seresnet18", num_classes=CLASSES))
    ours, converted = load(theirs, create("se_resnet18:branch=relu", CLASSES))
    assert converted.form == {"pool": "ceil", "branch": "relu"}
    assert difference(*outputs(theirs, ours, 72)) < 1e-4
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match="pool=ceil,branch=relu"):
        create("se_resnet18", weights=tmp_path / "weights.pth")
    own = create("timm:legacy_seresnet18", weights=tmp_path / "weights.pth").eval()
    assert difference(*outputs(theirs, own, 72)) < 1e-4


# --- all of them -----------------------------------------------------------------------------------------------


def test_big_tensors_are_views():
    tensors = timm.create_model("legacy_seresnet50").state_dict()
    converted = cadene_layout(Content("PyTorch", tensors)).tensors
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert all(tensor.untyped_storage().data_ptr() in given for tensor in converted.values())


def test_bn_inception_copies_next_to_nothing():
    tensors = pretrainedmodels("bninception").BNInception().state_dict()
    converted = cadene_layout(Content("PyTorch", tensors)).tensors
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    copied = [tensor.numel() for tensor in converted.values() if tensor.untyped_storage().data_ptr() not in given]
    assert sum(copied) < 20_000  # the first convolution and the running means


@pytest.mark.parametrize(
    "network",
    [
        lambda: torchvision.models.resnet50(weights=None),
        lambda: torchvision.models.googlenet(weights=None, init_weights=False),
        lambda: timm.create_model("seresnet50"),
        lambda: timm.create_model("skresnext50_32x4d"),
        lambda: timm.create_model("inception_v4"),
        lambda: create("se_resnet50"),
        lambda: create("senet154"),
        lambda: bn_inception(BN_INCEPTION),
        lambda: inception_resnet_v2(INCEPTION_RESNET_V2),
    ],
)
def test_other_names_are_left_to_others(network):
    with torch.device("meta"):
        assert convert(network()) is None

"""Networks of torchvision and timm, saved with random weights and loaded into ours: the outputs are the same."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from excite.create import create
from excite.errors import UsageError
from excite.weights.load import load_weights
from same_output import assert_same_output, shuffled_statistics

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "mobilenet_v2",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
]
# Those as large as these only repeat the blocks of the smaller ones.
LARGE = {"resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2", "wide_resnet50_2"}


def marked(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in names]


@pytest.mark.parametrize("name", marked(TORCHVISION))
def test_torchvision(name, tmp_path):
    torch.manual_seed(0)
    theirs = shuffled_statistics(torchvision.models.get_model(name, weights=None))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    assert_same_output(create(name, weights=tmp_path / "weights.pth"), theirs)


@pytest.mark.parametrize("width", [0.5, 1.4])
def test_torchvision_mobilenet_of_other_widths(width, tmp_path):
    torch.manual_seed(0)
    theirs = shuffled_statistics(torchvision.models.mobilenet_v2(width_mult=width))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    assert_same_output(create(f"mobilenet_v2:width={width}", weights=tmp_path / "weights.pth"), theirs)


TIMM = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "resnext50_32x4d": "resnext50_32x4d",
    "seresnet18": "resnet18+se:min_width=8",  # timm's hidden layers are never narrower than 8
    "seresnet34": "resnet34+se:min_width=8",
    "seresnet50": "resnet50+se",
    "seresnext50_32x4d": "resnext50_32x4d+se",
    "skresnext50_32x4d": "sknet50:pool=padded",
    "mobilenetv1_100": "mobilenet_v1",
    "mobilenetv2_050": "mobilenet_v2:width=0.5",
    "mobilenetv2_100": "mobilenet_v2",
    "mobilenetv2_140": "mobilenet_v2:width=1.4",
}
TIMM_LARGE = {
    "resnext101_32x4d": "resnext101_32x4d",
    "resnext101_32x8d": "resnext101_32x8d",
    "resnext101_64x4d": "resnext101_64x4d",
    "seresnet101": "resnet101+se",
    "seresnet152": "resnet152+se",
    "seresnext101_32x4d": "resnext101_32x4d+se",
    "seresnext101_32x8d": "resnext101_32x8d+se",
    "seresnext101_64x4d": "resnext101_64x4d+se",
    "wide_resnet50_2": "wide_resnet50_2",
}


@pytest.mark.parametrize(
    ("name", "spec"),
    [*TIMM.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in TIMM_LARGE.items())],
)
def test_timm(name, spec, tmp_path):
    torch.manual_seed(0)
    theirs = shuffled_statistics(timm.create_model(name))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    assert_same_output(create(spec, weights=tmp_path / "model.safetensors"), theirs)


@pytest.mark.parametrize("name", ["skresnet18", "skresnet50"])
def test_sk_networks_that_ours_cannot_hold(name, tmp_path):
    """Their branches see half of the channels each."""
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"half of the channels|do not fit"):
        create("sknet50:pool=padded", weights=tmp_path / "weights.pth")


def test_weights_of_another_form_are_refused_with_the_form_they_need(tmp_path):
    """The names and shapes of timm's SE-ResNet-50 fit the paper's too, but there other convolutions stride."""
    torch.save(timm.create_model("seresnet50").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"stride_in=3x3,pool=padded"):
        create("se_resnet50", weights=tmp_path / "weights.pth")
    create("se_resnet50:stride_in=3x3,pool=padded", weights=tmp_path / "weights.pth")


def test_their_own_networks_take_their_own_files(tmp_path):
    torch.manual_seed(0)
    theirs = shuffled_statistics(torchvision.models.mobilenet_v2())
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    host = create("torchvision:mobilenet_v2", weights=tmp_path / "weights.pth")
    assert_same_output(host, theirs)


# --- classifiers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fc", "linear", "last_linear", "classifier", "head.fc"])
def test_classifiers_by_other_names(head, tmp_path):
    torch.manual_seed(0)
    donor = create("resnet20", 10)
    state = {name.replace("fc.", f"{head}."): tensor for name, tensor in donor.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    loaded = create("resnet20", weights=tmp_path / "weights.pth")  # as many outputs as the file's
    assert loaded.fc.out_features == 10
    assert torch.equal(loaded.fc.weight, donor.fc.weight)


def test_another_number_of_classes_keeps_the_rest(tmp_path):
    torch.manual_seed(0)
    theirs = shuffled_statistics(torchvision.models.resnet18())
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    network = create("resnet18", num_classes=7, weights=tmp_path / "weights.pth")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert network.eval()(images).shape == (2, 7)
        theirs.fc = network.fc
        torch.testing.assert_close(network(images), theirs(images))


def test_another_head_only_on_request(tmp_path):
    torch.save(create("resnet20", 100).state_dict(), tmp_path / "weights.pth")
    network = create("resnet20", 10)
    with pytest.raises(UsageError, match=r"fc\.weight \(expected \(10, 64\), found \(100, 64\)\)"):
        load_weights(network, tmp_path / "weights.pth")
    origin = load_weights(network, tmp_path / "weights.pth", replace_head=True)
    assert origin.file == str(tmp_path / "weights.pth")


def test_a_replaced_head_excuses_nothing_else(tmp_path):
    torch.save(create("resnet20:width=2", 100).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"layer1\.0\.conv1\.weight"):
        create("resnet20", 10, weights=tmp_path / "weights.pth")


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad, tmp_path):
    state = create("resnet20", 10).state_dict()
    state["layer2.1.bn1.running_var"][3] = bad
    torch.save(state, tmp_path / "weights.pth")
    network = create("resnet20", 10)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(Exception, match=r"layer2\.1\.bn1\.running_var"):
        load_weights(network, tmp_path / "weights.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_half_precision_files_fill_a_full_precision_network(tmp_path):
    donor = create("resnet20", 10)
    torch.save(
        {n: t.half() if t.is_floating_point() else t for n, t in donor.state_dict().items()}, tmp_path / "w.pth"
    )
    network = create("resnet20", weights=tmp_path / "w.pth")
    assert network.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(network.conv1.weight, donor.conv1.weight, rtol=1e-3, atol=1e-3)

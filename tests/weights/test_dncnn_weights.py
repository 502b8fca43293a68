"""Other people's DnCNNs: found by their content, converted exactly, and with the scores that were published."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import excite
from excite.create import create
from excite.errors import UsageError
from excite.networks.tables import DnCNNTable
from excite.preprocessing import Preprocessing
from excite.weights.base import Content
from excite.weights.dncnn import ConvertedDnCNN, dncnn_layout
from excite.weights.load import load_weights, read_weights

LONG = {"depth": "5", "channels": "6", "kernel": "3"}


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def chain(channels=1, width=6, depth=5, kernel=3, norm=True, ends=True, hidden=False):
    """DnCNN as others write it: one chain of layers that answers with the noise."""

    def conv(inputs, outputs, bias):
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    layers = [conv(channels, width, ends), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [conv(width, width, hidden), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
    network = nn.Sequential(*layers, conv(width, channels, ends))
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.5, 0.5, generator=generator)
    return network.eval()


def saved(network, folder, prefix="", drop=()):
    state = {prefix + name: t for name, t in network.state_dict().items() if not name.endswith(drop or ("\n",))}
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


# --- state dicts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.", "module.dncnn.", "net.body."])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"norm": False, "hidden": True},
        {"ends": False},
        {"hidden": True},
        {"norm": False, "ends": False},
        {"channels": 3, "kernel": 5, "width": 4, "depth": 4},
    ],
    ids=str,
)
def test_chains(tmp_path, form, prefix):
    theirs = chain(**form)
    ours = create("dncnn_s", weights=saved(theirs, tmp_path, prefix)).eval()
    x = images(2, form.get("channels", 1), 11, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), x - theirs(x))
    norm = "batch" if form.get("norm", True) else "none"
    depth, width, kernel = (form.get(key, default) for key, default in (("depth", 5), ("width", 6), ("kernel", 3)))
    assert ours.table == DnCNNTable(depth, width, kernel, norm=norm)
    assert ours.in_channels == form.get("channels", 1)
    assert ours.origin.layout == "a DnCNN in one chain of layers"
    assert ours.origin.fresh == frozenset()


def test_without_the_counts_of_batches(tmp_path):
    theirs = chain()
    path = saved(theirs, tmp_path, drop=("num_batches_tracked",))
    x = images(1, 1, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(create("dncnn_s", weights=path).eval()(x), x - theirs(x))


class Parametric(nn.Sequential):
    def __init__(self):
        super().__init__(*chain(norm=False, hidden=True))
        self[1] = nn.PReLU()


def swapped(network, index, layer):
    network[index] = layer
    return network


OTHERS = {
    "a VGG": lambda: torchvision.models.vgg11(num_classes=5).features,
    "a whole VGG": lambda: torchvision.models.vgg11_bn(num_classes=5),
    "a ResNet": lambda: create("resnet20", 10),
    "HybridSN": lambda: create("hybridsn:window=7", 3, 9),
    "BN-Inception": lambda: create("bn_inception:width=0.1", 3),
    "MobileNet": lambda: create("mobilenet_v1_cifar:width=0.1", 3),
    "two convolutions": lambda: chain(depth=2),
    "even kernels": lambda: chain(kernel=4),
    "four channels": lambda: chain(channels=4),
    "another last layer": lambda: swapped(chain(), 11, nn.Conv2d(6, 2, 3)),
    "another hidden width": lambda: swapped(chain(norm=False), 4, nn.Conv2d(6, 7, 3)),
    "another kernel": lambda: swapped(chain(norm=False), 4, nn.Conv2d(6, 6, 5)),
    "kernels that are not square": lambda: swapped(chain(norm=False), 4, nn.Conv2d(6, 6, (3, 5))),
    "a missing norm": lambda: swapped(chain(), 3, nn.Identity()),
    "a norm behind the first": lambda: swapped(chain(), 1, nn.BatchNorm2d(6)),
    "a norm behind the last": lambda: nn.Sequential(*chain(), nn.BatchNorm2d(1)),
    "another norm": lambda: swapped(chain(), 3, nn.GroupNorm(2, 6)),
    "norms without statistics": lambda: swapped(chain(), 3, nn.BatchNorm2d(6, track_running_stats=False)),
    "other activations": Parametric,
    "two chains": lambda: nn.ModuleDict({"a": chain(), "b": chain()}),
    "something else beside it": lambda: nn.Sequential(OrderedDict(chain=chain(), scale=nn.LayerNorm(6))),
    "in transposed convolutions": lambda: swapped(chain(norm=False), 0, nn.ConvTranspose2d(1, 6, 3)),
    "nothing": nn.Identity,
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_dncnn(what):
    assert dncnn_layout(Content("PyTorch", OTHERS[what]().state_dict())) is None


@pytest.mark.parametrize("name", ["9" * 5000 + ".weight", "01.weight", "conv" + "9" * 5000 + ".weight", "\n0.weight"])
def test_strange_names(name):
    tensors = chain().state_dict() | {name: torch.zeros(6, 6, 3, 3)}
    assert dncnn_layout(Content("PyTorch", tensors)) is None


def test_whole_numbers_are_no_weights():
    tensors = {name: tensor.int() for name, tensor in chain().state_dict().items()}
    assert dncnn_layout(Content("PyTorch", tensors)) is None


def test_a_chain_still_loads_into_the_network_that_it_is_from(tmp_path):
    theirs, again = chain(), chain()
    for parameter in again.parameters():
        parameter.data.zero_()
    origin = load_weights(again, saved(theirs, tmp_path))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert origin.preprocessing is None


# --- excite's own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        ("dncnn_s:depth=5,channels=6", LONG | {"norm": "batch"}),
        ("dncnn_s:depth=5,channels=6,norm=none", LONG | {"norm": "none"}),
        ("dncnn_s:depth=5,channels=6+se", LONG | {"norm": "batch"}),
        ("dncnn_s:depth=5,channels=6+sk", LONG),  # units with norms of their own
        ("dncnn_s:depth=5,channels=6+se:init=identity", LONG | {"norm": "batch"}),
    ],
)
def test_own_files_complete_the_spec_too(tmp_path, spec, form):
    torch.manual_seed(0)
    network = create(spec, in_channels=2).eval()
    path = saved(network, tmp_path)
    converted = read_weights(path).converted
    assert isinstance(converted, ConvertedDnCNN)
    assert (converted.form, converted.channels) == (form, 2)
    units = "+" + spec.partition("+")[2] if "+" in spec else ""
    again = create(f"dncnn_s{units}", weights=path).eval()
    x = images(2, 2, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(again(x), network(x))
    assert again.origin.layout == "the network's own names"
    assert again.origin.preprocessing == Preprocessing(40, (0, 0), (1, 1), channels=2)


def test_whats_missing_in_an_own_file_is_named(tmp_path):
    path = saved(create("dncnn_s:depth=5,channels=6"), tmp_path, drop=("norm3.running_mean",))
    with pytest.raises(UsageError, match=r"1 missing: norm3\.running_mean\. Nothing was loaded"):
        create("dncnn_s", weights=path)


# --- the spec and the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "completed"),
    [
        ("dncnn_s", "dncnn_s:depth=5,channels=6"),
        ("dncnn_b:channels=6", "dncnn_b:channels=6,depth=5"),
        ("dncnn_s:depth=5,channels=6,kernel=3,norm=batch", "dncnn_s:depth=5,channels=6,kernel=3,norm=batch"),
        ("dncnn_s:residual=false", "dncnn_s:residual=false,depth=5,channels=6"),
    ],
)
def test_the_spec_is_completed(tmp_path, spec, completed):
    network = create(spec, weights=saved(chain(), tmp_path))
    assert network.spec == completed
    fresh = create(network.spec, in_channels=network.in_channels)
    assert fresh.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("argument", "of_file"),
    [("depth=17", "depth=5"), ("channels=64", "channels=6"), ("kernel=5", "kernel=3"), ("norm=none", "norm=batch")],
)
def test_a_spec_that_says_otherwise_is_refused(tmp_path, argument, of_file):
    path = saved(chain(), tmp_path)
    with pytest.raises(UsageError) as caught:
        create(f"dncnn_s:{argument}", weights=path)
    assert f"it says {argument}, but the weights in {path} are of a network with {of_file}" in str(caught.value)


def test_other_channels_are_refused(tmp_path):
    path = saved(chain(), tmp_path)
    with pytest.raises(UsageError, match=r"in_channels is 3, but the weights in .* are for images with 1; leave"):
        create("dncnn_color", in_channels=3, weights=path)
    assert create("dncnn_color", weights=path).in_channels == 1
    assert create("dncnn_s", in_channels=1, weights=path).in_channels == 1


def test_a_network_of_another_form_is_told_which(tmp_path):
    network = create("dncnn_s:depth=5,channels=6,norm=none")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UsageError, match=r"another form of this network.*depth=5,channels=6,kernel=3,norm=batch"):
        load_weights(network, saved(chain(), tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_other_weights_are_refused(tmp_path):
    path = saved(create("resnet20", 10), tmp_path)
    with pytest.raises(UsageError, match=r"do not fit this network: .* missing"):
        create("dncnn_s", weights=path)
    with pytest.raises(UsageError, match=r"The file has 8 convolutions without names and this network 19"):
        create("resnet20", weights=saved(chain(), tmp_path))


@pytest.mark.parametrize("units", ["+se", "+sk", "+se:stages=2-3+cbam:init=identity,stages=1"])
def test_units_on_published_weights_start_as_the_identity(tmp_path, units):
    theirs = chain()
    network = create(f"dncnn_s{units}", weights=saved(theirs, tmp_path)).eval()
    x = images(2, 1, 12, 9)
    with torch.no_grad():
        torch.testing.assert_close(network(x), x - theirs(x))
    assert network.origin.fresh
    assert "init=identity" in network.spec
    assert network.halo is None


# --- the authors' and others' -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared_data):
    return shared_data / "dncnn-weights"


def as_matconvnet_writes_it(path):
    """The chain in a MatConvNet file, read with h5py alone: HDF5 holds (out, in, w, h)."""
    h5py = pytest.importorskip("h5py")
    layers = []
    with h5py.File(path, "r") as file:
        for (reference,) in file["net/layers"][()]:
            layer = file[reference]
            if "".join(map(chr, layer["type"][()].ravel())) == "relu":
                layers.append(nn.ReLU())
                continue
            kernels, bias = (np.asarray(file[inner]) for inner in layer["weights"][()].ravel())
            kernels = kernels.reshape((*(1,) * (4 - kernels.ndim), *kernels.shape)).transpose(0, 1, 3, 2)
            convolution = nn.Conv2d(kernels.shape[1], kernels.shape[0], 3, padding=1)
            convolution.weight.data = torch.from_numpy(kernels.copy())
            convolution.bias.data = torch.from_numpy(bias.ravel().copy())
            layers.append(convolution)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    ("name", "file", "spec"),
    [
        ("dncnn_s", "matconvnet-sigma15.mat", "dncnn_s:norm=none"),
        ("dncnn_s", "matconvnet-sigma25.mat", "dncnn_s:norm=none"),
        ("dncnn_s", "matconvnet-sigma50.mat", "dncnn_s:norm=none"),
        ("dncnn_b", "matconvnet-gray-blind.mat", "dncnn_b:norm=none"),
    ],
)
def test_the_authors_networks(published, name, file, spec):
    network = create(name, weights=published / file).eval()
    assert (network.spec, network.in_channels) == (spec, 1)
    assert network.origin.layout == "MatConvNet DnCNN"
    size = 40 if name == "dncnn_s" else 50
    assert network.origin.preprocessing == Preprocessing(size, (0.0,), (1.0,), channels=1)
    x = images(2, 1, 24, 33)
    with torch.no_grad():
        torch.testing.assert_close(network(x), x - as_matconvnet_writes_it(published / file)(x))


class Theirs(nn.Module):
    """The module that the third party's files are of, as their names say."""

    def __init__(self, depth):
        super().__init__()
        hidden = [
            layer
            for _ in range(depth - 2)
            for layer in (nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        ]
        first, last = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Conv2d(64, 1, 3, padding=1, bias=False)
        self.dncnn = nn.Sequential(first, nn.ReLU(), *hidden, last)


@pytest.mark.parametrize(
    ("name", "file", "depth"),
    [("dncnn_s", "pytorch-dncnn-s-sigma25.pth", 17), ("dncnn_b", "pytorch-dncnn-b.pth", 20)],
)
def test_a_third_partys_networks(published, name, file, depth):
    theirs = Theirs(depth).eval()
    state = torch.load(published / file, map_location="cpu", weights_only=True)
    counts = {key: tensor for key, tensor in theirs.state_dict().items() if key.endswith("num_batches_tracked")}
    theirs.load_state_dict({key.removeprefix("module."): tensor for key, tensor in state.items()} | counts)
    ours = create(name, weights=published / file).eval()
    assert ours.spec == name
    x = images(2, 1, 24, 33)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), x - theirs.dncnn(x))


def test_a_chain_without_names_still_goes_by_position_into_other_networks(published):
    pytest.importorskip("h5py")
    network = nn.Sequential(OrderedDict((f"layer{i}", layer) for i, layer in enumerate(chain(1, 64, 17, norm=False))))
    for layer in network[2:-1]:
        if isinstance(layer, nn.Conv2d):
            layer.bias = nn.Parameter(torch.zeros(64))
    origin = excite.load_weights(network, published / "matconvnet-sigma25.mat")
    assert origin.layout == "MatConvNet SimpleNN"
    x = images(1, 1, 16, 16)
    with torch.no_grad():
        expected = create("dncnn_s", weights=published / "matconvnet-sigma25.mat").eval()(x)
        torch.testing.assert_close(x - network(x), expected)


# --- their scores -------------------------------------------------------------------------------------------------

# Zhang et al. 2017, Table III: PSNR in dB at a noise level of 25, image by image.
SET12 = [30.18, 33.06, 30.87, 29.41, 30.28, 29.13, 29.43, 32.44, 30.00, 30.21, 30.10, 30.12]


def grey(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("L")).copy())[None, None].float() / 255


def psnr(network, clean, sigma, seed):
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        answer = network(clean + noise * sigma / 255).clamp(0, 1)
    return -10 * (answer - clean).square().mean().log10().item()


@pytest.fixture(scope="module")
def set12(shared_data, tmp_path_factory):
    import tarfile

    folder = tmp_path_factory.mktemp("images")
    with tarfile.open(shared_data / "denoising-images.tar") as archive:
        members = [member for member in archive.getmembers() if member.name.startswith("Set12/")]
        archive.extractall(folder, members, filter="data")
    files = sorted((folder / "Set12").glob("*.png"))
    assert len(files) == 12
    return files


def test_the_papers_scores_of_two_images(published, set12):
    pytest.importorskip("h5py")
    network = create("dncnn_s", weights=published / "matconvnet-sigma25.mat").eval()
    for index in (0, 1):
        assert psnr(network, grey(set12[index]), 25, index) == pytest.approx(SET12[index], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "file", "sigma", "published_psnr"),
    [
        ("dncnn_s", "matconvnet-sigma15.mat", 15, 32.859),
        ("dncnn_s", "matconvnet-sigma25.mat", 25, 30.436),
        ("dncnn_s", "matconvnet-sigma50.mat", 50, 27.178),
        ("dncnn_s", "pytorch-dncnn-s-sigma25.pth", 25, 30.404),
    ],
)
def test_the_papers_scores_of_set12(published, set12, spec, file, sigma, published_psnr):
    network = create(spec, weights=published / file).eval()
    scores = [psnr(network, grey(path), sigma, seed) for seed, path in enumerate(set12)]
    assert np.mean(scores) == pytest.approx(published_psnr, abs=0.03)

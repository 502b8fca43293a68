import contextlib
import io
import struct
import tarfile
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from excite.errors import ExciteError, UsageError
from excite.weights.base import Content
from excite.weights.matconvnet import is_mat, matconvnet_layout, read_mat

h5py = pytest.importorskip("h5py")


# --- files as MATLAB writes them -------------------------------------------------------------------------------


class MatFile:
    """A MATLAB 7.3 file in the making; arrays are given as in MATLAB and turn their axes round."""

    def __init__(self, path):
        self.path = path
        self.file = h5py.File(path, "w", userblock_size=512)
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        with open(self.path, "r+b") as file:
            file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116))

    def put(self, value, name=None, **how):
        """A dataset; a reference to it where it has no name of its own."""
        self.count += 1
        value = np.asarray(value)
        while value.ndim > 2 and value.shape[-1] == 1:  # MATLAB's arrays end so
            value = value[..., 0]
        made = self.file.create_dataset(name or f"#refs#/{self.count}", data=value.T, **how)
        return made if name else made.ref

    def text(self, text, name=None):
        return self.put(np.array([[ord(letter) for letter in text]], dtype=np.uint16), name)

    def cells(self, references, name=None):
        value = np.empty((1, len(references)), dtype=h5py.ref_dtype)
        for index, reference in enumerate(references):
            value[0, index] = reference
        self.count += 1
        made = self.file.create_dataset(name or f"#refs#/{self.count}", data=value.T, dtype=h5py.ref_dtype)
        return made if name else made.ref

    def layer(self, kind, *weights, field="weights", **how):
        self.count += 1
        group = self.file.create_group(f"#refs#/{self.count}")
        self.text(kind, f"{group.name}/type")
        if weights and field:
            self.cells([self.put(weight, **how) for weight in weights], f"{group.name}/{field}")
        elif weights:
            for name, weight in zip(("filters", "biases"), weights, strict=True):
                self.put(weight, f"{group.name}/{name}")
        return group.ref

    def empty(self, name):
        made = self.file.create_dataset(name, data=np.zeros(2, np.uint64))
        made.attrs["MATLAB_empty"] = np.uint8(1)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def chain(path, **how):
    """Three convolutions, (h, w, in, out); returns their weights and biases."""
    weights = [
        (random(3, 5, 2, 4), random(1, 4)),
        (random(1, 1, 4, 1), random(1, 1)),
        (random(3, 3, 1, 6), random(6, 1)),
    ]
    with MatFile(path) as mat:
        layers = [layer for pair in weights for layer in (mat.layer("conv", *pair, **how), mat.layer("relu"))]
        mat.cells(layers, "net/layers")
    return weights


# --- what they hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"compression": "gzip"},
        {"compression": "gzip", "shuffle": True},
        {"chunks": True},
        {"dtype": np.float64},
        {"field": None},
    ],
    ids=str,
)
def test_simplenn(tmp_path, how):
    path = tmp_path / "weights.anything"
    weights = chain(path, **how)
    assert is_mat(path)
    found = read_mat(path)
    assert list(found) == [f"{index}.{kind}" for index in range(3) for kind in ("weight", "bias")]
    for index, (kernels, bias) in enumerate(weights):
        assert torch.equal(found[f"{index}.weight"], torch.tensor(kernels.transpose(3, 2, 0, 1)))
        assert torch.equal(found[f"{index}.bias"], torch.tensor(bias.ravel()))
    converted = matconvnet_layout(Content("MatConvNet", found))
    assert converted.tensors == found
    assert converted.form == {}


def test_kernels_of_one_number_and_layers_without_weights(tmp_path):
    path = tmp_path / "small.mat"
    with MatFile(path) as mat:
        layers = [mat.layer("conv", np.float32([[7]])), mat.layer("relu"), mat.layer("dropout")]
        mat.empty(f"{mat.file[layers[2]].name}/weights")
        mat.cells(layers, "layers")  # save(…, '-struct', 'net'): no variable around it
    found = read_mat(path)
    assert list(found) == ["0.weight"]
    assert found["0.weight"].tolist() == [[[[7]]]]


@pytest.mark.parametrize("count", [1, 4])
def test_dagnn(tmp_path, count):
    params = {
        "conv1f": random(3, 5, 2, 4),
        "conv1b": random(4, 1),
        "bn1_moments": random(4, 2),
        "conv2f": random(3, 3, 8, 1),
    }
    params = dict(list(params.items())[:count])
    path = tmp_path / "dag.mat"
    with MatFile(path) as mat:
        if count == 1:
            mat.text("conv1f", "net/params/name")
            mat.put(params["conv1f"], "net/params/value")
        else:
            mat.cells([mat.text(name) for name in params], "net/params/name")
            mat.cells([mat.put(value) for value in params.values()], "net/params/value")
    found = read_mat(path)
    assert list(found) == list(params)
    assert torch.equal(found["conv1f"], torch.tensor(params["conv1f"].transpose(3, 2, 0, 1)))
    if count > 1:
        assert torch.equal(found["conv1b"], torch.tensor(params["conv1b"].ravel()))
        assert torch.equal(found["bn1_moments"], torch.tensor(params["bn1_moments"]))
        assert torch.equal(found["conv2f"], torch.tensor(params["conv2f"].transpose(3, 2, 0, 1)))
    assert matconvnet_layout(Content("MatConvNet", found)) is None


def test_other_contents_are_left_to_others():
    tensors = {"0.weight": torch.ones(1, 1, 1, 1)}
    assert matconvnet_layout(Content("PyTorch", tensors)) is None
    assert matconvnet_layout(Content("MatConvNet", {})) is None


def test_files_that_are_not_hdf5_are_not_taken_for_it(tmp_path):
    path = tmp_path / "file"
    for data in (
        b"",
        b"MATLAB 5.0 MAT-file".ljust(1000),
        b"PK\x03\x04",
        b"\x89HDF",
        b" " * 512 + b"\x89HDF\r\n\x1a\n",
    ):
        path.write_bytes(data)
        assert not is_mat(path)
    assert not is_mat(tmp_path)
    assert not is_mat(tmp_path / "nothing")
    h5py.File(path, "w").close()
    assert is_mat(path)


# --- files that are not as they should be -----------------------------------------------------------------------


def refused(path, reason, kind=ExciteError):
    with pytest.raises(kind, match=reason) as caught:
        read_mat(path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_wrong_usage(tmp_path, monkeypatch):
    refused(tmp_path, "is a folder", UsageError)
    refused(tmp_path / "nothing.mat", "does not exist", UsageError)
    path = tmp_path / "bnorm.mat"
    with MatFile(path) as mat:
        layers = [mat.layer("conv", random(1, 1, 1, 2)), mat.layer("bnorm", random(2), random(2), random(2, 2))]
        mat.cells(layers, "net/layers")
    refused(path, "Layer 2 .* 'bnorm' .* merge batch norm", UsageError)
    with MatFile(path) as mat:
        mat.cells([mat.layer("convt", random(2, 2, 3, 3), random(3))], "net/layers")
    refused(path, "Layer 1 .* 'convt'", UsageError)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    refused(path, r"pip install 'excite\[mat\]'", UsageError)


def test_damaged_files(tmp_path):
    path = tmp_path / "damaged.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(1000))
    refused(path, "-v7.3")
    chain(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: 512 + 13] + b"\4" + whole[512 + 14 :])
    refused(path, "addresses are not of 8 bytes")
    for length in (0, 100, 520, 1000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        refused(path, r"cut off|lacks a part|no \.mat file")
    h5py.File(path, "w").close()
    refused(path, "neither net.layers")
    with MatFile(path) as mat:
        mat.cells([mat.layer("relu")], "net/layers")
    refused(path, "no convolution")


@pytest.mark.parametrize("reserved", [0, 1])
def test_a_heap_whose_gaps_go_in_a_circle(tmp_path, reserved):
    path = tmp_path / "circle.mat"
    chain(path)
    data = bytearray(path.read_bytes())
    for heap in [at for at in range(len(data)) if data[at : at + 5] == b"HEAP\0"]:
        size, _, contents = struct.unpack_from("<QQQ", data, heap + 8)
        data[heap + 5] = reserved
        struct.pack_into("<Q", data, heap + 16, size - 16)
        struct.pack_into("<QQ", data, 512 + contents + size - 16, size - 16, 16)  # the next gap is the same one
    path.write_bytes(data)
    refused(path, "go in a circle")


def in_place_of_bias(path, put):
    """A chain whose second convolution has something else in the place of its bias."""
    with MatFile(path) as mat:
        first, second = mat.layer("conv", random(1, 1, 1, 2)), mat.layer("conv")
        weights = f"{mat.file[second].name}/weights"
        mat.cells([mat.put(random(3, 3, 2, 2)), put(mat)], weights)
        mat.cells([first, second], "net/layers")


def bomb(mat, size, claimed):
    """A chunk of packed zeros that unpacks to `size` numbers in a dataset of `claimed`."""
    made = mat.file.create_dataset("bomb", shape=(claimed,), dtype=np.float32, chunks=(claimed,), compression="gzip")
    made.id.write_direct_chunk((0,), zlib.compress(bytes(4 * size), 9))
    return made.ref


def virtual(mat):
    layout = h5py.VirtualLayout(shape=(4,), dtype=np.float32)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "secret", shape=(4,))
    return mat.file.create_virtual_dataset("virtual", layout).ref


def external(mat):
    place = str(mat.path.with_name("secret"))
    return mat.file.create_dataset("external", (4,), np.float32, external=[(place, 0, 16)]).ref


def sparse(mat):
    made = mat.file.create_dataset("sparse", (100,), np.float32, chunks=(10,))
    made[:10] = 1
    return made.ref


HOSTILE = {
    "huge": (lambda mat: mat.file.create_dataset("a", (10**12,), np.float32).ref, "far more than its"),
    "huge in chunks": (lambda mat: mat.file.create_dataset("a", (10**9,), "f4", chunks=(10**4,)).ref, "far more"),
    "huge chunk": (
        lambda mat: mat.file.create_dataset("a", (1,), "f4", chunks=(2**28,), maxshape=(None,)).ref,
        "far",
    ),
    "overflowing": (lambda mat: mat.file.create_dataset("a", (2**20,) * 3, np.float32).ref, "far more than its"),
    "nothing stored": (lambda mat: mat.file.create_dataset("a", (1000,), np.float32).ref, "lacks a part"),
    "some stored": (sparse, "lacks a part"),
    "bomb that says so": (lambda mat: bomb(mat, 5_000_000, 5_000_000), "far more than its"),
    "bomb that lies": (lambda mat: bomb(mat, 5_000_000, 1000), "does not unpack to its size"),
    "too short": (lambda mat: bomb(mat, 10, 1000), "does not unpack to its size"),
    "virtual": (virtual, "other files"),
    "external": (external, "other files"),
    "null": (lambda mat: h5py.Reference(), "leads nowhere"),
    "group": (lambda mat: mat.file.create_group("a").ref, "no array"),
    "scalar": (lambda mat: mat.file.create_dataset("a", data=1.0).ref, "no array"),
    "whole numbers": (lambda mat: mat.put(np.arange(4)), "of type int64"),
    "strings": (lambda mat: mat.file.create_dataset("a", data=["x"]).ref, "of type object"),
    "references": (lambda mat: mat.cells([mat.text("x")]), "of type object"),
    "half": (lambda mat: mat.put(np.ones(4, np.float16)), "of type float16"),
    "lzf": (lambda mat: mat.put(random(100), compression="lzf"), "packed in a way"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arrays(tmp_path, case):
    put, reason = HOSTILE[case]
    (tmp_path / "secret").write_bytes(bytes(16))
    path = tmp_path / "hostile.mat"
    in_place_of_bias(path, put)
    tracemalloc.start()
    try:
        refused(path, reason)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("link", [h5py.SoftLink("/real"), h5py.ExternalLink("other.mat", "/net")], ids=str)
def test_links_are_not_followed(tmp_path, link):
    chain(tmp_path / "other.mat")
    for name in ("net", "net/layers", "net/params"):
        path = tmp_path / "links.mat"
        with MatFile(path) as mat:
            mat.cells([mat.layer("conv", random(1, 1, 1, 2))], "real/layers")
            mat.file[name] = link
        refused(path, "is a link to somewhere else")


def test_many_references_to_one_array(tmp_path):
    path = tmp_path / "many.mat"
    with MatFile(path) as mat:
        layer = mat.layer("conv", random(10, 10, 100, 100))
        mat.cells([layer] * 1000, "net/layers")
    refused(path, "far more than its")
    with MatFile(path) as mat:
        mat.cells([mat.layer("relu")] * 20_000, "net/layers")
    refused(path, "20,000 layers")


def test_names(tmp_path):
    path = tmp_path / "names.mat"
    for names, reason in ((["a", "a"], "two parameters"), (["x" * 5000, "b"], "5,000 characters")):
        with MatFile(path) as mat:
            mat.cells([mat.text(name) for name in names], "net/params/name")
            mat.cells([mat.put(random(2)), mat.put(random(2))], "net/params/value")
        refused(path, reason)
    with MatFile(path) as mat:
        mat.cells([mat.text("a")], "net/params/name")
    refused(path, "no names or no values")


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mat") / "whole.mat"
    chain(path, compression="gzip")
    return path.read_bytes()


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_bytes_are_read_or_refused(whole_file, data):
    damaged = bytearray(whole_file)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.mat"
        path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
        is_mat(path)
        with contextlib.suppress(ExciteError):
            read_mat(path)


# --- the published networks -------------------------------------------------------------------------------------


def dncnn(path):
    """The authors' DnCNN with batch norm merged: convolutions with ReLU between them, which predict the noise."""
    tensors = matconvnet_layout(Content("MatConvNet", read_mat(path))).tensors
    steps = []
    for index in range(len(tensors) // 2):
        weight = tensors[f"{index}.weight"]
        convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        convolution.load_state_dict({"weight": weight, "bias": tensors[f"{index}.bias"]})
        steps += [convolution, nn.ReLU()]
    return nn.Sequential(*steps[:-1]).eval()


def psnr(network, images, sigma):
    generator = torch.Generator().manual_seed(0)
    for image in images:
        noisy = image + torch.randn(image.shape, generator=generator) * sigma / 255
        with torch.no_grad():
            clean = (noisy - network(noisy)).clamp(0, 1)
        yield -10 * ((clean - image) ** 2).mean().log10().item()


def set12(shared_data, *numbers):
    with tarfile.open(shared_data / "denoising-images.tar") as tar:
        for number in numbers:
            image = Image.open(io.BytesIO(tar.extractfile(f"Set12/{number:02}.png").read()))
            yield torch.from_numpy(np.array(image)).float()[None, None] / 255


@pytest.mark.parametrize(("name", "depth"), [("sigma15", 17), ("sigma25", 17), ("sigma50", 17), ("gray-blind", 20)])
def test_the_published_files_are_whole(shared_data, name, depth):
    path = shared_data / "dncnn-weights" / f"matconvnet-{name}.mat"
    assert is_mat(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in read_mat(path).items()}
    inputs, outputs = [1] + [64] * (depth - 1), [64] * (depth - 1) + [1]
    assert shapes == {
        name: shape
        for index in range(depth)
        for name, shape in (
            (f"{index}.weight", (outputs[index], inputs[index], 3, 3)),
            (f"{index}.bias", (outputs[index],)),
        )
    }


def test_the_published_network_denoises_house_as_published(shared_data):
    # Zhang et al. 2017, "Beyond a Gaussian Denoiser", Table III: DnCNN-S, σ = 25, House.
    network = dncnn(shared_data / "dncnn-weights" / "matconvnet-sigma25.mat")
    assert next(psnr(network, set12(shared_data, 2), 25)) == pytest.approx(
        33.06, abs=0.15
    )  # one image, one draw of the noise


@pytest.mark.slow
def test_the_published_network_reaches_the_published_psnr_on_set12(shared_data):
    network = dncnn(shared_data / "dncnn-weights" / "matconvnet-sigma25.mat")
    found = list(psnr(network, set12(shared_data, *range(1, 13)), 25))
    assert np.mean(found) == pytest.approx(30.436, abs=0.03)

import pickle
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from caffe_files import CaffeNet, bn_inception, caffe_image, caffemodel, net_parameter, resnet, senet, sknet
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from excite.create import create
from excite.errors import ExciteError, UsageError
from excite.weights.base import Content
from excite.weights.caffe import caffe_layout, is_caffemodel, read_caffemodel


def stored(tmp_path, data):
    path = tmp_path / "weights.anything"
    path.write_bytes(data)
    return path


def read(data):
    """What a file of these bytes holds."""
    with tempfile.TemporaryDirectory() as folder:
        return read_caffemodel(stored(Path(folder), data))


def random_blobs(seed=0):
    draw = np.random.default_rng(seed)
    shapes = {"conv1": [(4, 3, 7, 7)], "conv1/bn": [(4,), (4,), (1,)], "ip": [(5, 4), (5,)], "ö/x": [(2, 3, 1, 1)]}
    return {
        name: [draw.standard_normal(shape).astype(np.float32) for shape in shapes] for name, shapes in shapes.items()
    }


# --- the file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diff", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("old_shapes", [False, True])
@pytest.mark.parametrize("old_layers", [False, True])
def test_files_of_all_versions(tmp_path, old_layers, old_shapes, packed, double, diff):
    how = {"old_layers": old_layers, "old_shapes": old_shapes, "packed": packed, "double": double, "diff": diff}
    blobs = random_blobs()
    path = stored(tmp_path, caffemodel(blobs, **how))
    assert is_caffemodel(path)
    found = read_caffemodel(path)
    assert list(found) == [f"{name}:{index}" for name, arrays in blobs.items() for index in range(len(arrays))]
    for name, arrays in blobs.items():
        for index, array in enumerate(arrays):
            shape = (1,) * (4 - array.ndim) + array.shape if how["old_shapes"] else array.shape
            tensor = found[f"{name}:{index}"]
            assert tensor.shape == shape
            assert tensor.dtype == torch.float32
            assert np.array_equal(tensor.numpy().ravel(), array.ravel())


def test_what_surrounds_the_weights(tmp_path):
    net = net_parameter()(name="a net", input=["data"], input_dim=[1, 3, 224, 224], force_backward=True)
    net.state.phase = 1
    net.input_shape.add().dim.extend([1, 3])
    net.layer.add(name="data", type="Input")
    net.layer.add(name="relu")
    net.layer.add(name="relu")  # twice, but without weights
    net.layer.add(name="a scalar").blobs.add().data.append(3)
    both = net.layer.add(name="both").blobs.add()
    both.shape.dim.append(3)
    both.data.extend([0, 0, 0])
    both.double_data.extend([1, 2, 3])
    # An unknown field of each kind in front, and packed numbers in two pieces.
    data = varint_field(900, 5) + bytes_field(901, b"abc") + b"\xad\x08" + bytes(4) + b"\xa9\x08" + bytes(8)
    first, second = np.float32([1, 2]).tobytes(), np.float32([3]).tobytes()
    blob = bytes_field(7, varint_field(1, 3)) + bytes_field(5, first) + varint_field(99, 1) + bytes_field(5, second)
    data += net.SerializeToString() + bytes_field(100, bytes_field(1, b"pieces") + bytes_field(7, blob))
    found = read(data)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "a scalar:0": 3.0,
        "both:0": [1.0, 2.0, 3.0],
        "pieces:0": [1.0, 2.0, 3.0],
    }
    assert is_caffemodel(stored(tmp_path, net.SerializeToString()))


def test_the_numbers_stay_in_the_file(tmp_path):
    many = np.arange(4_000_000, dtype=np.float32)
    path = stored(tmp_path, caffemodel({"large": [many]}))
    before = path.read_bytes()
    tracemalloc.start()
    found = read_caffemodel(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    tensor = found.pop("large:0")
    assert np.array_equal(tensor.numpy(), many)
    tensor.zero_()  # neither refused nor written to the file
    assert path.read_bytes() == before


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def varint_field(number, value):
    return varint(number << 3) + varint(value)


def bytes_field(number, value):
    return varint(number << 3 | 2) + varint(len(value)) + value


def layer(blob, name=b"conv"):
    return bytes_field(100, bytes_field(1, name) + bytes_field(7, blob))


def blob(dims, numbers):
    return bytes_field(7, b"".join(varint_field(1, dim) for dim in dims)) + bytes_field(5, bytes(4 * numbers))


VALID = caffemodel(random_blobs())
DEEP = b"\x0a\x00"
for _ in range(2000):
    DEEP = bytes_field(7, DEEP)

BROKEN = {
    "empty": (b"", "empty"),
    "no weights": (bytes_field(1, b"net") + bytes_field(100, bytes_field(1, b"relu")), "no weights"),
    "text": (b'name: "net"\nlayer {\n  name: "conv1"\n}\n', "no kind"),
    "cut off": (VALID[:-7], "past the end"),
    "cut off in a length": (bytes_field(100, b"x" * 1000)[:3], "cut off"),
    "cut off in a key": (VALID + b"\xa2", "cut off"),
    "length past the message": (bytes_field(100, b"\x0a\x7fab"), "past the end"),
    "enormous length": (b"\xa2\x06" + varint(2**63), "past the end"),
    "long varint": (bytes_field(100, b"\x08" + b"\xff" * 10 + b"\x01"), "10 bytes"),
    "group": (b"\xa3\x06" + b"\xa4\x06", "no kind"),
    "wire type 6": (b"\x0e", "no kind"),
    "field 0": (b"\x00\x00", "no field"),
    "layer is a number": (varint_field(100, 5), "should hold a message"),
    "blob is a number": (bytes_field(100, varint_field(7, 5)), "should hold a message"),
    "name is a number": (bytes_field(100, varint_field(1, 5)), "should hold a name"),
    "name is not text": (layer(blob([1], 1), b"\xff\xfe"), "should hold a name"),
    "name is a megabyte": (layer(blob([1], 1), b"a" * 1_000_000), "should hold a name"),
    "data are varints": (layer(bytes_field(7, varint_field(1, 1)) + varint_field(5, 1)), "numbers of 4 bytes"),
    "data are doubles": (layer(b"\x29" + bytes(8)), "numbers of 4 bytes"),
    "data are 3 bytes": (layer(bytes_field(7, varint_field(1, 1)) + bytes_field(5, b"abc")), "numbers of 4 bytes"),
    "dims are floats": (layer(bytes_field(7, b"\x0d" + bytes(4)) + bytes_field(5, bytes(4))), "whole numbers"),
    "shape and data differ": (layer(blob([2, 3], 5)), r"\(2, 3\), but 5 numbers"),
    "no data": (layer(bytes_field(7, b"")), "0 numbers"),
    "empty shape": (layer(blob([0], 0)), "0 numbers"),
    "huge shape": (layer(blob([2**62, 2**62], 1)), "but 1 numbers"),
    "negative shape": (layer(blob([2**64 - 1, 2**64 - 1], 1)), "but 1 numbers"),
    "zero and huge": (layer(blob([2**62, 0], 1)), "but 1 numbers"),
    "many axes": (layer(blob([1] * 33, 1)), "32 axes"),
    "deep": (bytes_field(100, bytes_field(1, b"a") + bytes_field(7, DEEP)), "should hold whole numbers|0 numbers"),
    "same name": (layer(blob([1], 1)) * 2, "two layers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_one_sentence_and_little_memory(tmp_path, case):
    data, reason = BROKEN[case]
    path = stored(tmp_path, data)
    is_caffemodel(path)
    tracemalloc.start()
    try:
        with pytest.raises(ExciteError, match=reason) as caught:
            read_caffemodel(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000 + 100 * len(data)
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_no_file_can_hold_any_number_of_fields(monkeypatch):
    monkeypatch.setattr("excite.weights.protobuf._MOST_FIELDS", 1000)
    with pytest.raises(ExciteError, match="1,000 fields"):
        read(bytes_field(100, bytes_field(1, b"a")) + bytes_field(901, b"") * 1000)
    blobs = bytes_field(7, bytes_field(5, bytes(4))) * 1000
    with pytest.raises(ExciteError, match="1,000 fields"):
        read(bytes_field(100, bytes_field(1, b"a") + blobs))


def test_a_million_numbers_without_packing_are_one_field():
    numbers = np.arange(1_000_000, dtype=np.float32)
    found = read(caffemodel({"a": [numbers], "b": [numbers[:3]]}, packed=False))
    assert np.array_equal(found["a:0"].numpy(), numbers)
    assert found["b:0"].tolist() == [0, 1, 2]


def test_missing_files_are_wrong_usage(tmp_path):
    for path in (tmp_path / "nothing.caffemodel", tmp_path):
        with pytest.raises(UsageError, match=r"expected a \.caffemodel file"):
            read_caffemodel(path)
        assert not is_caffemodel(path)


def test_other_files_are_not_taken_for_caffe(tmp_path):
    tensors = {f"layer{index}.weight": torch.randn(3, 4) for index in range(40)}
    path = tmp_path / "other"
    for zipped in (True, False):
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        assert not is_caffemodel(path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for content in ({name: tensor.numpy() for name, tensor in tensors.items()}, [1.0], 5, "name", b"layer", None):
            assert not is_caffemodel(stored(tmp_path, pickle.dumps(content, protocol)))
    for note in range(256):  # all lengths of the header, which is how such a file begins
        save_file({"weight": torch.ones(1)}, path, metadata={"note": "x" * note})
        assert not is_caffemodel(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("layer", VALID)
    assert not is_caffemodel(path)
    np.save(path.with_suffix(".npy"), np.ones(3))
    assert not is_caffemodel(path.with_suffix(".npy"))
    for start in (
        b"\x89HDF\r\n\x1a\n",
        b"MATLAB 7.3 MAT-file",
        b"PK\x03\x04",
        b"\x89PNG\r\n",
        b"{}",
        b"\n",
        b"\x08\x07\x12",
    ):
        assert not is_caffemodel(stored(tmp_path, start + VALID[:200]))


def test_real_hdf5_and_pickles_are_not_taken_for_caffe(shared_data):
    for path in [*(shared_data / "dncnn-weights").iterdir(), shared_data / "resnet20-cifar10-published.th"]:
        assert not is_caffemodel(path)


def convert(data):
    return caffe_layout(Content("Caffe", read(data)))


SMALL_RELEASE = caffemodel(
    {
        "conv1/7x7_s2": [np.ones((2, 3, 1, 1))],
        "conv1/7x7_s2/bn": [np.ones(2), np.ones(2), np.ones(1)],
        "conv1/7x7_s2/bn/scale": [np.ones(2), np.ones(2)],
        "conv2_1_1x1_reduce": [np.ones((1, 2, 1, 1)), np.ones(1)],
        "conv2_1_1x1_reduce/bn": [np.ones(1)] * 4,
        "conv2_1_3x3": [np.ones((1, 1, 1, 1))],
        "conv2_1_1x1_down": [np.ones((1, 1, 1, 1)), np.ones(1)],
        "classifier": [np.ones((1, 2)), np.ones(1)],
    }
)


def only_refused(data):
    try:
        return convert(data)
    except ExciteError:
        return None


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300))
@example(VALID)
def test_arbitrary_bytes_are_read_or_refused(data):
    only_refused(data)
    with tempfile.TemporaryDirectory() as folder:
        is_caffemodel(stored(Path(folder), data))


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_damaged_files_are_read_or_refused(data):
    damaged = bytearray(SMALL_RELEASE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    only_refused(bytes(damaged))


def test_files_cut_off_anywhere_are_read_or_refused():
    assert only_refused(SMALL_RELEASE) is not None
    for length in range(len(SMALL_RELEASE)):
        only_refused(SMALL_RELEASE[:length])


# --- the names -------------------------------------------------------------------------------------------------


def parameters(network):
    return {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}


HE_MEAN = (103.063, 115.903, 123.152)


@pytest.mark.parametrize(
    ("graph", "spec", "bn", "mean"),
    [
        (senet, "se_resnet50", "caffe", None),
        (sknet, "sknet50", "cudnn", None),
        (resnet, "resnet50:stride_in=1x1,pool=ceil", "caffe", HE_MEAN),
        (bn_inception, "se_bn_inception", "caffe", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_loaded_network_answers_as_the_authors_graph(tmp_path, graph, spec, bn, mean):
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    net = CaffeNet(seed=0, bn=bn)
    expected = graph(net, caffe_image(image, mean) if mean else caffe_image(image))
    path = stored(tmp_path, caffemodel(net.blobs))
    converted = caffe_layout(Content("Caffe", read_caffemodel(path)))
    network = create(spec).eval()
    missing = network.load_state_dict(converted.tensors, strict=False)
    assert not missing.unexpected_keys
    assert all("num_batches" in name for name in missing.missing_keys)
    prepared = image.double() - torch.tensor(converted.preprocessing.mean).double()[:, None, None]
    with torch.no_grad():
        answer = network.double()(prepared)
    assert expected.std() > 0.2
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-3)


RESNETS = {"pool": "ceil", "stride_in": "1x1"}
GROUPS = {"pool": "ceil", "stride_in": "3x3"}
RELEASES = {
    "se_resnet50": (senet, {}, RESNETS),
    "se_resnet101": (senet, {"depths": (3, 4, 23, 3)}, RESNETS),
    "se_resnet152": (senet, {"depths": (3, 8, 36, 3)}, RESNETS),
    "se_resnext50_32x4d": (senet, {"inner": 128, "group": 32}, GROUPS),
    "se_resnext101_32x4d": (senet, {"inner": 128, "group": 32, "depths": (3, 4, 23, 3)}, GROUPS),
    "senet154": (senet, {"inner": 256, "group": 64, "depths": (3, 8, 36, 3), "deep": True}, GROUPS),
    "se_bn_inception": (bn_inception, {}, {}),
    "bn_inception": (bn_inception, {"squeeze_excite": False}, {}),
    "sknet50": (sknet, {}, GROUPS),
    "sknet101": (sknet, {"depths": (3, 4, 23, 3)}, GROUPS),
    "resnet50": (resnet, {}, RESNETS),
    "resnet101": (resnet, {"depths": (3, 4, 23, 3), "bias": False}, RESNETS),
    "resnet152": (resnet, {"depths": (3, 8, 36, 3), "bias": False}, RESNETS),
}


@pytest.mark.parametrize("name", RELEASES)
def test_every_release_fills_its_network(name):
    graph, arguments, form = RELEASES[name]
    net = CaffeNet(seed=None, bn="cudnn" if graph is sknet else "caffe")
    graph(net, torch.empty(1, 3, 64, 64, device="meta"), **arguments)
    blobs = {f"{layer}:{index}": blob for layer, blobs in net.blobs.items() for index, blob in enumerate(blobs)}
    converted = caffe_layout(Content("Caffe", blobs))
    with torch.device("meta"):
        wanted = parameters(create(name))
    assert {name: tensor.shape for name, tensor in converted.tensors.items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    assert converted.form == form
    assert converted.preprocessing.size == 224
    assert converted.preprocessing.resize == 256
    assert converted.preprocessing.std == (1, 1, 1)


def blobs_of(**layers):
    return {
        f"{name}:{index}": torch.tensor(blob, dtype=torch.float32)
        for name, blobs in layers.items()
        for index, blob in enumerate(blobs)
    }


STEM = blobs_of(**{"conv2_1_1x1_reduce": [[[[[2.0]]], [[[3.0]]]]], "conv1/7x7_s2": [[[[[1.0]], [[2.0]], [[4.0]]]]]})


def test_order_and_range_of_the_pixels_are_in_the_first_convolution():
    converted = caffe_layout(Content("Caffe", STEM))
    assert converted.tensors["conv1.weight"].flatten().tolist() == [4 * 255, 2 * 255, 255]
    assert converted.preprocessing.mean == pytest.approx((123 / 255, 117 / 255, 104 / 255))
    grey = STEM | blobs_of(**{"conv1/7x7_s2": [[[[[1.0]]]]]})
    assert caffe_layout(Content("Caffe", grey)).preprocessing is None


@pytest.mark.parametrize(("factor", "mean", "variance"), [(4.0, [0.5], [2.0]), (0.0, [0.0], [0.0])])
def test_statistics_are_sums_times_a_factor(factor, mean, variance):
    norm = {"conv1/7x7_s2/bn": [[2.0], [8.0], [factor]], "conv1/7x7_s2/bn/scale": [[5.0], [6.0]]}
    tensors = caffe_layout(Content("Caffe", STEM | blobs_of(**norm))).tensors
    found = {name: tensors[f"bn1.{name}"].tolist() for name in ("weight", "bias", "running_mean", "running_var")}
    assert found == {"weight": [5], "bias": [6], "running_mean": mean, "running_var": variance}


def test_a_bias_before_batch_norm_lowers_the_mean():
    stem = blobs_of(**{"conv1/7x7_s2": [[[[[1.0]], [[1.0]], [[1.0]]]], [0.5]]})
    norm = blobs_of(**{"conv1/7x7_s2/bn": [[[[[5.0]]]], [[[[6.0]]]], [[[[2.0]]]], [[[[9.0]]]]]})
    tensors = caffe_layout(Content("Caffe", STEM | stem | norm)).tensors
    assert "conv1.bias" not in tensors
    found = {name: tensors[f"bn1.{name}"].tolist() for name in ("weight", "bias", "running_mean", "running_var")}
    assert found == {"weight": [5], "bias": [6], "running_mean": [1.5], "running_var": [9]}


def test_linear_layers_are_views_of_convolutions_and_of_old_shapes():
    down = torch.randn(2, 4, 1, 1)
    old = torch.randn(1, 1, 10, 4)
    content = STEM | {"conv2_1_1x1_down:0": down, "conv2_1_1x1_down:1": torch.randn(1, 1, 1, 2), "classifier:0": old}
    tensors = caffe_layout(Content("Caffe", content)).tensors
    assert tensors["layer1.0.se.reduce.weight"].shape == (2, 4)
    assert tensors["layer1.0.se.reduce.weight"].data_ptr() == down.data_ptr()
    assert tensors["layer1.0.se.reduce.bias"].shape == (2,)
    assert torch.equal(tensors["fc.weight"], old[0, 0])
    assert tensors["layer1.0.conv1.weight"].shape == (2, 1, 1, 1)


def test_what_a_release_does_not_have_keeps_its_name():
    extra = blobs_of(**{"my_layer": [[1.0]], "conv2_1_5x5": [[1.0]], "conv1/7x7_s2/bn": [[1.0], [1.0]]})
    tensors = caffe_layout(Content("Caffe", STEM | extra)).tensors
    assert set(tensors) == {"conv1.weight", "layer1.0.conv1.weight", *extra}


def test_batch_norms_that_do_not_fit_are_refused():
    scale = {"conv1/7x7_s2/bn/scale": [[5.0], [6.0]]}
    with pytest.raises(ExciteError, match="one factor, not 2"):
        caffe_layout(Content("Caffe", STEM | blobs_of(**{"conv1/7x7_s2/bn": [[2.0], [8.0], [1.0, 2.0]]}, **scale)))
    biased = blobs_of(**{"conv1/7x7_s2": [[[[[1.0]], [[1.0]], [[1.0]]]], [0.5, 1.0]]})
    norm = blobs_of(**{"conv1/7x7_s2/bn": [[2.0], [8.0], [1.0]]}, **scale)
    with pytest.raises(ExciteError, match="2 biases"):
        caffe_layout(Content("Caffe", STEM | biased | norm))


def test_other_contents_are_left_to_others():
    assert caffe_layout(Content("PyTorch", STEM)) is None
    assert caffe_layout(Content("Caffe", blobs_of(conv1=[[1.0]]))) is None
    assert caffe_layout(Content("Caffe", {})) is None

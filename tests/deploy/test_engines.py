"""Networks by other engines and in 8 bits, against PyTorch on the same numbers."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from excite.deploy import engines, quantize
from excite.errors import ExciteError, UsageError
from excite.units.selective_kernel import SelectiveKernel
from excite.units.squeeze_excite import SqueezeExcite

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

MAKERS = {"openvino": engines.openvino_engine, "onnx": engines.onnx_engine}


class Small(nn.Module):
    """A few layers with both units: quick to convert, and every kind of operator is there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.sk = SelectiveKernel(8, 8, groups=2, min_width=4)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.se = SqueezeExcite(8, reduction=2)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        x = self.stem(images)
        x = torch.relu(self.se(self.conv(self.sk(x)), x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """With statistics and gates that differ from channel to channel."""
    torch.manual_seed(0)
    made = Small().train()
    with torch.no_grad():
        for _ in range(10):
            made(3 * torch.randn(16, 3, 16, 16) + 1)
    return made.eval()


@pytest.fixture(scope="module")
def in_onnx(network, images):
    return engines.onnx_model(network, images)


@pytest.fixture(scope="module")
def in_openvino(network, images):
    return engines.openvino_model(network, images)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def say(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network(images)


@pytest.mark.parametrize("name", MAKERS)
def test_an_engine_says_what_pytorch_says_for_any_number_of_images(name, network, images) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    run = MAKERS[name](network, images[:1], threads=1)
    for count in (1, 5):
        laid_out = images[:count].contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(run(laid_out), say(network, images[:count]), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_what_an_engine_said_is_not_written_over_by_what_it_says_next(network, images) -> None:
    run = engines.openvino_engine(network, images[:1], threads=1)
    first = run(images[:1])
    kept = first.clone()
    run(images[1:2])
    assert torch.equal(first, kept)


def test_bf16_is_near_and_is_not_float32(network, images) -> None:
    wanted = say(network, images)
    said = engines.openvino_engine(network, images, precision="bf16", threads=1)(images)
    assert 1e-5 < float((said - wanted).abs().max() / wanted.abs().max()) < 0.05
    with pytest.raises(UsageError, match="no bf16"):
        engines.onnx_engine(network, images, precision="bf16")
    with pytest.raises(UsageError, match="fp32 or bf16"):
        engines.openvino_engine(network, images, precision="fp16")


class FixedBatch(nn.Module):
    """A network whose code holds the number of images."""

    def forward(self, images):
        return images.view(2, 3, -1).sum(2)


def test_a_module_that_fixes_the_number_of_images_is_run_with_that_number(images) -> None:
    run = engines.onnx_engine(FixedBatch(), images[:2])
    torch.testing.assert_close(run(images[:2]), images[:2].sum((2, 3)))
    with pytest.raises(ExciteError, match="ONNX Runtime"):
        run(images[:3])


class ByValue(nn.Module):
    """A network whose path depends on what it is given."""

    def forward(self, images):
        return images.sum((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_what_cannot_be_traced_is_one_sentence(images) -> None:
    with pytest.raises(ExciteError, match=r"^torch\.export cannot trace this network"):
        engines.openvino_engine(ByValue(), images)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("openvino", engines.openvino_engine),
        ("onnxscript", engines.onnx_engine),
        ("onnxruntime", engines.onnx_engine),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, call, network, images, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(engines, "exported", lambda *_, **__: pytest.fail("it was told too late"))
    if package == "onnxruntime":
        monkeypatch.setattr(
            engines, "onnx_model", lambda *_: torch.onnx.ops and pytest.importorskip("onnx").ModelProto()
        )
    with pytest.raises(UsageError, match=r"pip install 'excite\[(openvino|onnx)\]'"):
        call(network, images)


def test_the_model_says_nothing_of_where_it_was_made(in_onnx) -> None:
    model = in_onnx.SerializeToString()
    assert b"/excite/" not in model
    assert b"test_engines" not in model
    assert b"stack_trace" not in model


# --- 8 bits --------------------------------------------------------------------------------------------------------


def decibels(said: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (said - wanted).square().sum()))


def test_the_operators_of_gates_are_found_and_no_others(in_onnx, in_openvino) -> None:
    found = quantize._gate_operators(quantize._onnx_graph(in_onnx))
    layers = {node.name for node in in_onnx.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    gates = {"se.reduce", "se.expand", "sk.reduce", "sk.expand"}
    assert layers == gates | {"stem.0", "sk.branches.0.0", "sk.branches.1.0", "conv", "head"}
    assert found & layers == gates
    kinds = {node.op_type for node in in_onnx.graph.node if node.name in found}
    assert {"Sigmoid", "Softmax"} <= kinds
    assert not kinds & {"Conv", "ReduceMean", "ReduceSum"}
    graph = quantize._openvino_graph(in_openvino)
    kept = quantize._gate_operators(graph)
    assert sum(graph[name].kind == "MatMul" for name in kept) == len(gates)
    assert {"Sigmoid", "Softmax"} <= {graph[name].kind for name in kept}
    assert not {graph[name].kind for name in kept} & {"Convolution", "ReduceMean", "ReduceSum"}


def test_a_sigmoid_of_a_map_is_no_gate(images) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = engines.onnx_model(network, images)
    assert any(node.op_type == "Sigmoid" for node in model.graph.node)
    assert quantize._gate_operators(quantize._onnx_graph(model)) == set()


def test_eight_bits_by_onnx_runtime_and_the_layer_that_loses_most(network, images, in_onnx) -> None:
    calibration = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2)).split(8)
    model = quantize.quantise_onnx(in_onnx, calibration)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") >= 5
    integers = [one for one in model.graph.initializer if one.data_type == 3 and len(one.dims) > 1]  # int8
    assert len(integers) == 5, "of four convolutions and the classifier; the gates' four layers stay in floats"
    run = engines.ONNXEngine(model.SerializeToString(), threads=1)
    assert 15 < decibels(run(images), say(network, images)) < 60
    worst = quantize.worst_layers_onnx(in_onnx, model, images, count=100)
    assert [one.decibels for one in worst] == sorted(one.decibels for one in worst)
    assert all(15 < one.decibels < 70 for one in worst)
    assert {one.layer for one in worst} == {"stem.0", "sk.branches.0.0", "sk.branches.1.0", "conv", "head"}


def test_without_images_there_are_no_eight_bits(in_onnx) -> None:
    with pytest.raises(UsageError, match="calibrate"):
        quantize.quantise_onnx(in_onnx, [])


def test_a_spoilt_layer_is_the_one_that_is_named() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        # Channel 0 of the second layer's input is large and hardly counts: the scale of the tensor is its scale, and
        # leaves the others, which count, few bits.
        network[0].weight[0] *= 100
        network[0].bias[0] = 50
        network[2].weight[:, 0] *= 1e-4
    images = torch.rand(16, 3, 12, 12)
    floats = engines.onnx_model(network, images)
    worst = quantize.worst_layers_onnx(floats, quantize.quantise_onnx(floats, images.split(8)), images)
    assert worst[0].layer == "2"
    assert worst[0].decibels < worst[1].decibels - 6


def test_eight_bits_by_nncf(network, images, in_openvino) -> None:
    pytest.importorskip("nncf")
    calibration = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2)).split(8)
    model = quantize.quantise_openvino(in_openvino, calibration)
    assert sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops()) >= 5
    run = engines.OpenVINOEngine(model, threads=1)
    assert 15 < decibels(run(images), say(network, images)) < 60
    worst = quantize.worst_layers_openvino(in_openvino, model, images, count=100)
    assert [one.decibels for one in worst] == sorted(one.decibels for one in worst)
    assert all(10 < one.decibels < 80 for one in worst)
    assert {"conv", "head"} <= {one.layer for one in worst}

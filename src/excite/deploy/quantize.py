"""Networks in 8 bits, after training: NNCF for OpenVINO, ONNX Runtime's own tool for ONNX.

Weights get a scale for each output channel, activations one for each tensor, by what they are on calibration images.
What lies between a squeeze and the gate that it makes stays in floats: these layers have a few values for each image,
so integers save no time there, and an error in a gate is an error in its whole channel.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excite.deploy.engines import (
    INPUT,
    ONNXEngine,
    OpenVINOEngine,
    import_onnx,
    import_onnxruntime,
    import_openvino,
    onnx_model,
    openvino_model,
    plain_errors,
)
from excite.deploy.quiet import loggers_at
from excite.errors import UsageError

if TYPE_CHECKING:
    import onnx
    import openvino

_GATES = {"Sigmoid", "HardSigmoid", "HSigmoid", "SoftMax", "Softmax", "Tanh", "Clamp", "Clip"}
_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "GlobalAveragePool", "GlobalMaxPool"}
_LAYERS = {"Convolution", "GroupConvolution", "MatMul", "Conv", "Gemm"}
_FARTHEST = 40
"""Between a squeeze and its gate lie no more operators than this."""
_SHORT = 16
"""So many images the layers are compared on."""


def int8_openvino(
    module: nn.Module, example: Tensor, calibration: Iterable[Tensor], *, threads: int | None = None
) -> OpenVINOEngine:
    """A network in 8 bits, run by OpenVINO.

    Args:
        module: stays as it is.
        example: what it takes, float32 (N, C, H, W).
        calibration: batches of such images, as they are in use: a few hundred images are enough.
        threads: of the processor; by default as many as PyTorch uses.

    Raises:
        UsageError: OpenVINO or NNCF is not installed, or there are no calibration images.
        ExciteError: the network cannot be converted or quantised.
    """
    model = quantise_openvino(openvino_model(module, example), calibration)
    return OpenVINOEngine(model, threads=threads)


def int8_onnx(
    module: nn.Module, example: Tensor, calibration: Iterable[Tensor], *, threads: int | None = None
) -> ONNXEngine:
    """A network in 8 bits, run by ONNX Runtime; arguments and errors as of :func:`int8_openvino`."""
    model = quantise_onnx(onnx_model(module, example), calibration)
    return ONNXEngine(model.SerializeToString(), threads=threads)


def quantise_openvino(model: openvino.Model, calibration: Iterable[Tensor]) -> openvino.Model:
    """A model of OpenVINO's in 8 bits, by NNCF; the arguments and errors are those of :func:`int8_openvino`."""
    nncf = _import_nncf()
    batches = _batches(calibration, _openvino_batch(model))
    graph = _openvino_graph(model)
    with plain_errors("NNCF cannot quantise this network"), _quiet():
        quantised: openvino.Model = nncf.quantize(
            model,
            nncf.Dataset([{0: batch} for batch in batches]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=sorted(_gate_operators(graph)), validate=False),
        )
    return quantised


def quantise_onnx(model: onnx.ModelProto, calibration: Iterable[Tensor]) -> onnx.ModelProto:
    """A model in ONNX in 8 bits, by ONNX Runtime; the arguments and errors are those of :func:`int8_openvino`."""
    package = import_onnx()
    import_onnxruntime()
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = _batches(calibration, _onnx_batch(model))
    with (
        tempfile.TemporaryDirectory() as folder,
        plain_errors("ONNX Runtime cannot quantise this network"),
        _quiet(),
    ):
        floats, prepared, written = (Path(folder) / f"{name}.onnx" for name in ("floats", "prepared", "int8"))
        floats.write_bytes(model.SerializeToString())
        quant_pre_process(str(floats), str(prepared), skip_symbolic_shape=True)
        ready = package.load(prepared)
        quantization.quantize_static(
            ready,
            str(written),
            _Reader(batches),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            # Without these instructions the sums of 8-bit products overflow 16 bits: one bit less then.
            reduce_range=not _has_vnni(),
            nodes_to_exclude=sorted(_gate_operators(_onnx_graph(ready))),
        )
        quantised: onnx.ModelProto = package.load(written)
    return quantised


# --- which operators make a gate -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operator:
    """One operator of either format: its kind, and the operators that its data inputs come from."""

    kind: str
    sources: tuple[str, ...]


def _gate_operators(graph: dict[str, _Operator]) -> set[str]:
    """The names of the operators between a squeeze and its gate, with the gate, without the squeeze.

    The squeeze reads the map that the scale reads as well: in integers that is a quarter of the bytes, and its mean
    is over so many values that their errors cancel. A gate is an activation that, followed back on every path, comes
    from reductions and constants alone: the sigmoid of a SiLU, which comes from a map, is none.
    """
    found: set[str] = set()
    for name, operator in graph.items():
        if operator.kind in _GATES:
            found |= _back_to_squeeze(graph, name) or set()
    return found


def _back_to_squeeze(graph: dict[str, _Operator], name: str) -> set[str] | None:
    """An operator and what lies between it and the reductions that it comes from; None where it comes from a map."""
    seen: set[str] = set()
    ahead, reduced = [name], False
    while ahead:
        name = ahead.pop()
        if name in seen:
            continue
        seen.add(name)
        operator = graph[name]
        if operator.kind in _REDUCTIONS:
            reduced = True
            seen.discard(name)
        elif len(seen) > _FARTHEST or operator.kind in ("Parameter", "Input"):
            return None
        else:
            ahead += operator.sources
    return seen if reduced else None


def _openvino_graph(model: openvino.Model) -> dict[str, _Operator]:
    graph = {}
    for node in model.get_ordered_ops():
        sources = [port.get_source_output().get_node() for port in node.inputs()]
        kept = tuple(source.get_friendly_name() for source in sources if not _is_constant(source))
        graph[node.get_friendly_name()] = _Operator(node.get_type_name(), kept)
    return graph


def _is_constant(node: openvino.Node) -> bool:
    """Whether it is a constant, or a shape worked out from the input's."""
    while node.get_type_name() in ("Convert", "Gather", "Concat", "Unsqueeze") and node.get_input_size():
        node = node.input(0).get_source_output().get_node()
    return node.get_type_name() in ("Constant", "ShapeOf")


def _onnx_graph(model: onnx.ModelProto) -> dict[str, _Operator]:
    made = {output: node for node in model.graph.node for output in node.output}
    inputs = {value.name for value in model.graph.input}
    graph = {name: _Operator("Input", ()) for name in inputs}
    for node in model.graph.node:
        sources = tuple(
            made[name].name if name in made else name for name in node.input if name in made.keys() | inputs
        )
        kind = "Constant" if node.op_type == "Shape" else node.op_type
        graph[node.name] = _Operator(kind, () if kind == "Constant" else sources)
    return graph


# --- which layers are to blame -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerError:
    """What 8 bits do to one layer.

    Attributes:
        layer: its name.
        decibels: the power of its output over the power of the error that its own integers put there, given the float
            network's input to it: 6 dB are one bit.
    """

    layer: str
    decibels: float


def worst_layers_openvino(
    model: openvino.Model, quantised: openvino.Model, images: Tensor, count: int = 5
) -> list[LayerError]:
    """The layers that lose most, worst first: each is given what the float network gives it, and compared with it.

    Args:
        model: in floats.
        quantised: what :func:`quantise_openvino` made of it.
        images: float32 (N, C, H, W).
        count: how many layers to name.
    """
    ov = import_openvino()
    core, config = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    floats = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    whole = quantised.clone()
    pairs = []
    for node in whole.get_ordered_ops():
        name = node.get_friendly_name()
        source = node.input(0).get_source_output().get_node() if node.get_type_name() in _LAYERS else None
        if source is not None and source.get_type_name() == "FakeQuantize" and name in floats:
            pairs.append((name, node, source))
    wanted = []
    for name, _, _ in pairs:
        wanted += [floats[name].input_value(0), floats[name].output(0)]
    both = ov.Model([ov.opset13.result(output) for output in wanted], model.get_parameters())
    pixels = images[: _openvino_batch(model) or _SHORT].contiguous().numpy()
    said = core.compile_model(both, "CPU", config)(pixels)
    values = [said[i] for i in range(len(wanted))]
    errors = []
    for i, (name, node, fake) in enumerate(pairs):
        given, right = values[2 * i], values[2 * i + 1]
        before = fake.input(0).get_source_output()
        alone = ov.opset13.parameter(list(given.shape), np.float32)
        fake.input(0).replace_source_output(alone.output(0))
        layer = ov.Model([ov.opset13.result(node.output(0))], [alone])
        answer = core.compile_model(layer, "CPU", config)(given)[0]
        fake.input(0).replace_source_output(before)
        errors.append(LayerError(name, _decibels(right, answer)))
    return sorted(errors, key=lambda error: error.decibels)[:count]


def worst_layers_onnx(
    model: onnx.ModelProto, quantised: onnx.ModelProto, images: Tensor, count: int = 5
) -> list[LayerError]:
    """The same of a model in ONNX."""
    package, runtime = import_onnx(), import_onnxruntime()
    from onnx.utils import Extractor

    # By their names: the tensor that a layer puts out may have another, where the activation behind it went into the
    # scale of that tensor.
    floats = {node.name: node for node in model.graph.node if node.op_type in _LAYERS}
    tensors = {INPUT, *(output for node in model.graph.node for output in node.output)}
    made = {output: node for node in quantised.graph.node for output in node.output}
    pairs = []
    for node in quantised.graph.node:
        behind = made.get(node.input[0]) if node.name in floats else None
        if behind is not None and behind.op_type == "DequantizeLinear":
            given = made[behind.input[0]].input[0]
            if given in tensors:
                pairs.append((node, floats[node.name].output[0], given))
    both = package.ModelProto()
    both.CopyFrom(model)
    wanted = sorted({name for _, right, given in pairs for name in (right, given)} - {INPUT})
    both.graph.output.extend(
        package.helper.make_tensor_value_info(name, package.TensorProto.FLOAT, None)
        for name in wanted
        if name not in {output.name for output in both.graph.output}
    )
    pixels = images[: _onnx_batch(model) or _SHORT].contiguous().numpy()
    run = runtime.InferenceSession(both.SerializeToString(), providers=["CPUExecutionProvider"]).run
    values = dict(zip(wanted, run(wanted, {INPUT: pixels}), strict=True)) | {INPUT: pixels}
    shaped = package.ModelProto()
    shaped.CopyFrom(quantised)
    known = {INPUT, *(value.name for value in (*shaped.graph.value_info, *shaped.graph.output))}
    needed = {name for node, _, given in pairs for name in (node.output[0], given)}
    shaped.graph.value_info.extend(
        package.helper.make_tensor_value_info(name, package.TensorProto.FLOAT, None) for name in needed - known
    )
    extractor = Extractor(shaped)
    errors = []
    for node, right, given in pairs:
        alone = extractor.extract_model([given], [node.output[0]])
        session = runtime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
        answer = session.run(None, {given: values[given]})[0]
        errors.append(LayerError(node.name, _decibels(values[right], answer)))
    return sorted(errors, key=lambda error: error.decibels)[:count]


def _decibels(right: NDArray[Any], answer: NDArray[Any]) -> float:
    error = float(np.square(right.astype(np.float64) - answer).sum())
    return 10 * float(np.log10(np.square(right.astype(np.float64)).sum() / max(error, 1e-30) + 1e-30))


# --- the rest ------------------------------------------------------------------------------------------------------


class _Reader:
    """Calibration batches as ONNX Runtime asks for them."""

    def __init__(self, batches: Sequence[NDArray[Any]]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._left, None)
        return None if batch is None else {INPUT: batch}


def _batches(calibration: Iterable[Tensor], size: int | None) -> list[NDArray[Any]]:
    """All images, in batches of the size that a model takes; None where it takes any."""
    # They are gone through more than once: statistics first, then the biases that they correct.
    parts = (part for batch in calibration for part in torch.split(batch, size or len(batch)))
    batches = [part.detach().contiguous().numpy() for part in parts if size is None or len(part) == size]
    if not batches:
        raise UsageError("There are no images to calibrate 8 bits on: give some of those that the network is for.")
    return batches


def _openvino_batch(model: openvino.Model) -> int | None:
    """How many images a model takes; None where it takes any number."""
    count = model.inputs[0].partial_shape[0]
    return None if count.is_dynamic else int(count.get_length())


def _onnx_batch(model: onnx.ModelProto) -> int | None:
    """Likewise."""
    return int(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value) or None


def _has_vnni() -> bool:
    """Whether the processor adds 8-bit products in 32 bits; where that is not known, it is taken to."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "vnni" in flags or "flags" not in flags


def _import_nncf() -> Any:
    import_openvino()
    try:
        with _quiet():
            import nncf
    except ImportError:
        raise UsageError("8 bits for OpenVINO are made by NNCF: pip install 'excite[openvino]' brings it.") from None
    return nncf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the packages' own bars and log lines."""
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with loggers_at(logging.ERROR, "nncf", "root"), out, err:
        yield

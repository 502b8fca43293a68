"""Networks run by OpenVINO and ONNX Runtime: converted in memory, or read from a file.

Both take what ``torch.export`` makes of a module, with the number of images left open. Both packages come with extras
(``excite[openvino]``, ``excite[onnx]``) and are imported where they are used.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excite.deploy.quiet import loggers_at
from excite.errors import ExciteError, UsageError

if TYPE_CHECKING:
    import onnx
    import openvino

log = logging.getLogger(__name__)

INPUT, OUTPUT = "images", "logits"
"""The names of a converted network's input and output."""
PRECISIONS = {"openvino": {"fp32": "f32", "bf16": "bf16"}, "onnx": {"fp32": "f32"}}
"""The precisions of floats that an engine computes in on a CPU, and its own word for each."""

Engine = Callable[[Tensor], Tensor]
"""From float32 (N, C, H, W) to float32 logits (N, classes)."""


def openvino_engine(
    module: nn.Module, example: Tensor, *, precision: str = "fp32", threads: int | None = None
) -> OpenVINOEngine:
    """A network run by OpenVINO on the CPU.

    Args:
        module: stays as it is; converted in evaluation mode.
        example: what it takes, float32 (N, C, H, W).
        precision: ``fp32`` or ``bf16``, in which convolutions and products are computed; images and answers are
            float32 either way.
        threads: of the processor; by default as many as PyTorch uses.

    Returns:
        From float32 images (N, C, H, W), of the example's C, H and W, to float32 logits. Each new N is compiled for
        when it first comes.

    Raises:
        UsageError: OpenVINO is not installed, or another precision.
        ExciteError: the module cannot be exported.
    """
    check_precision("openvino", precision)
    return OpenVINOEngine(openvino_model(module, example), precision=precision, threads=threads)


def onnx_engine(
    module: nn.Module, example: Tensor, *, precision: str = "fp32", threads: int | None = None
) -> ONNXEngine:
    """A network run by ONNX Runtime on the CPU; arguments, answer and errors as of :func:`openvino_engine`.

    There is no bf16: ONNX Runtime has no such convolutions for the CPU.
    """
    check_precision("onnx", precision)
    return ONNXEngine(onnx_model(module, example).SerializeToString(), threads=threads)


def check_precision(engine: str, precision: str) -> None:
    """Refuse a precision of floats that an engine does not compute in.

    Raises:
        UsageError: another precision, with the reason.
    """
    if precision in PRECISIONS[engine]:
        return
    if (engine, precision) == ("onnx", "bf16"):
        raise UsageError(
            "ONNX Runtime has no bf16 convolutions for the CPU: take openvino or torch, or fp32 or int8."
        )
    raise UsageError(f"precision is {precision!r}: for {engine} choose {' or '.join(PRECISIONS[engine])}.")


# --- the engines ---------------------------------------------------------------------------------------------------


class OpenVINOEngine:
    """A model of OpenVINO's on the CPU, compiled for each number of images that it is given.

    Fixed shapes are quicker than open ones: buffers are planned and kernels chosen once.

    Args:
        model: with one input (N, C, H, W) and one output, or the path of its ``.xml``.
        precision: ``fp32`` or ``bf16``; integer layers stay what they are.
        threads: of the processor; by default as many as PyTorch uses.

    Raises:
        UsageError: OpenVINO is not installed.
        ExciteError: the file cannot be read.
    """

    def __init__(
        self, model: openvino.Model | str | Path, *, precision: str = "fp32", threads: int | None = None
    ) -> None:
        self._openvino = import_openvino()
        self._core = self._openvino.Core()
        if isinstance(model, str | Path):
            with plain_errors(f"OpenVINO cannot read {model}"):
                model = self._core.read_model(model)
        self._model = model
        self._config = {
            # Left alone, OpenVINO computes in bf16 on a processor that has it.
            "INFERENCE_PRECISION_HINT": PRECISIONS["openvino"][precision],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads or torch.get_num_threads()),
        }
        self._requests: dict[tuple[int, ...], Any] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 or uint8 images, as the model takes them, → float32 logits."""
        return torch.from_numpy(self.run(images.detach().contiguous().numpy()))

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """The same of arrays."""
        request = self._request(images.shape)
        answer: NDArray[np.float32] = request.infer([images], share_inputs=True, share_outputs=True)[0]
        return answer.astype(np.float32, copy=True)

    def _request(self, shape: tuple[int, ...]) -> Any:
        if shape not in self._requests:
            fixed = self._model.clone()
            with plain_errors(f"The model does not take images of shape {shape}"):
                fixed.reshape(list(shape))
                compiled = self._core.compile_model(fixed, "CPU", self._config)
            self._requests[shape] = compiled.create_infer_request()
        return self._requests[shape]


class ONNXEngine:
    """A model in ONNX, run by ONNX Runtime on the CPU.

    Args:
        model: the serialised model, with one input (N, C, H, W), or its path.
        threads: of the processor; by default as many as PyTorch uses.

    Raises:
        UsageError: ONNX Runtime is not installed.
        ExciteError: the file cannot be read.
    """

    def __init__(self, model: bytes | str | Path, *, threads: int | None = None) -> None:
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with plain_errors("ONNX Runtime cannot read the model"):
            self._session = runtime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
            )
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 or uint8 images, as the model takes them, → float32 logits."""
        return torch.from_numpy(self.run(images.detach().contiguous().numpy()))

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """The same of arrays."""
        with plain_errors("ONNX Runtime failed"):
            answer: NDArray[np.float32] = self._session.run(None, {self._input: images})[0]
        return answer


# --- the conversions -----------------------------------------------------------------------------------------------


def openvino_model(module: nn.Module, example: Tensor, *, dynamic: bool = True) -> openvino.Model:
    """A module as a model of OpenVINO's.

    Args:
        module: stays as it is.
        example: what it takes, (N, C, H, W), of its own dtype.
        dynamic: leave the number of images open, where the module's code allows it; else it is the example's.

    Raises:
        UsageError: OpenVINO is not installed.
        ExciteError: the module cannot be converted.
    """
    ov = import_openvino()
    program, free = exported(module, example, dynamic=dynamic)
    with plain_errors("OpenVINO cannot convert this network"), quiet():
        model = ov.convert_model(program)
        shape = [-1 if free else len(example), *example.shape[1:]]
        model.reshape({model.inputs[0]: ov.PartialShape(shape)})
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    model.inputs[0].get_node().set_friendly_name(INPUT)
    labels = _layer_labels(program)
    for node in model.get_ops():
        if node.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            name = node.get_friendly_name()
            node.set_friendly_name(labels.pop(name.partition("/")[0], name))
    return model


def onnx_model(module: nn.Module, example: Tensor, *, dynamic: bool = True) -> onnx.ModelProto:
    """A module in ONNX, by PyTorch's exporter; arguments as of :func:`openvino_model`.

    Raises:
        UsageError: onnx or onnxscript is not installed.
        ExciteError: the module cannot be converted.
    """
    import_onnx()
    program, _ = exported(module, example, dynamic=dynamic)
    with plain_errors("This network cannot be converted to ONNX"), quiet():
        converted = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
        )
    assert converted is not None
    proto: onnx.ModelProto = converted.model_proto
    labels, taken = _layer_labels(program), set[str]()
    for node in proto.graph.node:
        # The exporter notes the source code that each operator came from, with its path on this machine.
        del node.metadata_props[:]
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            own = labels.pop(node.input[1], None) or labels.pop(node.name.removeprefix("node_"), None)
            node.name = own if own and own not in taken else node.name
            taken.add(node.name)
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    return proto


def exported(
    module: nn.Module, example: Tensor, *, dynamic: bool = True, decompose: bool = True
) -> tuple[torch.export.ExportedProgram, bool]:
    """A module as ``torch.export`` sees it in evaluation mode.

    Args:
        module: stays as it is.
        example: what it takes, (N, C, H, W), of its own dtype.
        dynamic: leave the number of images open, where the module's code allows it.
        decompose: into the core operators that engines have kernels for; PyTorch itself runs fewer, larger ones.

    Returns:
        The program, and whether the number of images is open.

    Raises:
        ExciteError: the module's path depends on values, or uses what cannot be traced.
    """
    module = copy.deepcopy(module).eval().to(memory_format=torch.contiguous_format)
    example = example.detach().contiguous()
    # With one image, torch.export takes the 1 for a constant.
    several = example if len(example) > 1 else example.repeat(2, 1, 1, 1)
    with torch.no_grad(), quiet():
        if dynamic:
            with contextlib.suppress(Exception):  # many kinds: guards on the number, operators without a rule for it
                batch = torch.export.Dim("batch", min=1)
                program = torch.export.export(module, (several,), dynamic_shapes=({0: batch},))
                return _plain_operators(program) if decompose else program, True
            log.info("This network's code fixes the number of images: it is exported for %d", len(example))
        with plain_errors("torch.export cannot trace this network"):
            program = torch.export.export(module, (example,))
            return _plain_operators(program) if decompose else program, False


def _plain_operators(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program in ATen's core operators, with ``lerp`` as one multiplication and two additions.

    PyTorch's own decomposition takes another formula on either side of a weight of one half, and so compares and
    selects whole maps; between 0 and 1 the simple one is as good.
    """
    table = torch.export.default_decompositions()
    table[torch.ops.aten.lerp.Tensor] = lambda start, end, weight: start + weight * (end - start)
    return program.run_decompositions(table)


def _layer_labels(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Names for layers that a person knows, by the name of their operator and of their weight.

    A layer has the name of its weight in the module; where a rewrite made the weight, its number and form.
    """
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    labels: dict[str, str] = {}
    count = 0
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in _LAYERS:
            continue
        count += 1
        place, kind = _LAYERS[node.target]
        weight = node.args[place]
        shape = "×".join(str(side) for side in weight.meta["val"].shape)
        while weight.op == "call_function" and weight.args:  # transposed, say
            weight = weight.args[0]
        name = stored.get(weight.name, "")
        generated = name.rpartition(".")[2].startswith("_")
        known = "" if generated else name.removeprefix("network.").removesuffix(".weight")
        labels[node.name] = known or f"{kind} {count} ({shape})"
        if name:
            labels[name] = labels[node.name]
    return labels


_LAYERS: dict[Any, tuple[int, str]] = {
    torch.ops.aten.convolution.default: (1, "convolution"),
    torch.ops.aten.conv2d.default: (1, "convolution"),
    torch.ops.aten.addmm.default: (2, "linear layer"),
    torch.ops.aten.mm.default: (1, "linear layer"),
    torch.ops.aten.linear.default: (1, "linear layer"),
}
"""The operators that have weights: at which argument, and what such a layer is called."""


# --- the packages --------------------------------------------------------------------------------------------------


def import_openvino() -> ModuleType:
    """The package openvino.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise UsageError("OpenVINO is not installed: pip install 'excite[openvino]' brings it.") from None
    module: ModuleType = openvino
    return module


def import_onnx() -> ModuleType:
    """The package onnx, with onnxscript for PyTorch's exporter.

    Raises:
        UsageError: one of them is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"Exporting to ONNX needs the package {error.name}: pip install 'excite[onnx]' brings it."
        ) from None
    module: ModuleType = onnx
    return module


def import_onnxruntime() -> ModuleType:
    """The package onnxruntime.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UsageError("ONNX Runtime is not installed: pip install 'excite[onnx]' brings it.") from None
    module: ModuleType = onnxruntime
    return module


@contextlib.contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """One sentence for whatever a package raises."""
    try:
        yield
    except ExciteError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ExciteError(f"{what}: {lines[0] if lines else type(error).__name__}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own chatter: deprecations within them, and progress on stdout."""
    names = ("torch.onnx", "torch.export", "torch.utils.cpp_extension", "onnxscript", "root")
    with loggers_at(logging.ERROR, *names), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield

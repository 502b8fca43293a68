"""A classifier of images as a file that runs without excite: ONNX, OpenVINO's IR, or a program of ``torch.export``.

Beside the file lies ``model.json``, which says all that one needs to use it: the classes, how an image becomes the
input, the names and shapes of input and output, and how far the file was found to answer from the original.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from excite.arguments import known
from excite.deploy import quantize
from excite.deploy.engines import (
    INPUT,
    OUTPUT,
    ONNXEngine,
    OpenVINOEngine,
    check_precision,
    exported,
    import_openvino,
    onnx_engine,
    onnx_model,
    openvino_engine,
    openvino_model,
    plain_errors,
    quiet,
)
from excite.deploy.optimize import optimize
from excite.deploy.rewrite import rewrite
from excite.errors import ExciteError, UsageError
from excite.files import check_writable, sha256, write_json
from excite.preprocessing import Preprocessing

log = logging.getLogger(__name__)

FORMATS = ("onnx", "openvino", "torch")
PRECISIONS = ("fp32", "bf16", "int8")
CARD = "model.json"
COMPILED = "model-compiled.pt2"
TOLERANCE = 1e-3
"""How far a float32 file may answer from the original, relative to the largest output."""

_PACKAGES = {"onnx": ("torch", "onnx", "onnxruntime"), "openvino": ("torch", "openvino", "nncf"), "torch": ("torch",)}


def check_wish(to: str, precision: str) -> None:
    """Refuse a format or precision that there is not, and what does not go together.

    Raises:
        UsageError: likewise.
    """
    known(to, list(FORMATS), "format")
    known(precision, list(PRECISIONS), "precision")
    if precision == "int8":
        if to == "torch":
            raise UsageError("8 bits are made for openvino and onnx; PyTorch computes such a network in floats.")
    elif to != "torch":
        check_precision(to, precision)


class Packed(nn.Module):
    """A network with what a file is to hold beside it.

    Args:
        network: takes float32 images (N, C, H, W), normalised.
        preprocessing: where the file is to normalise by itself: it then takes the pixels as they are, uint8.
        dtype: what the network computes in; images are cast to it, and its answers back to float32.
    """

    factor: Tensor
    offset: Tensor

    def __init__(
        self, network: nn.Module, preprocessing: Preprocessing | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.dtype, self.baked = dtype, preprocessing is not None
        if preprocessing is not None:
            mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
            std = torch.tensor(preprocessing.std).view(-1, 1, 1)
            self.register_buffer("factor", 1 / (255 * std))
            self.register_buffer("offset", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → float32 (N, classes)."""
        if self.baked:
            images = images.to(torch.float32) * self.factor + self.offset
        logits: Tensor = self.network(images.to(self.dtype))
        return logits.to(torch.float32)


@dataclasses.dataclass
class Package:
    """A network made ready to be written: the files come from :meth:`write`.

    Attributes:
        to: the format.
        precision: ``fp32``, ``bf16`` or ``int8``.
        dynamic: whether the number of images is open; else it is 1.
        rewritten: what :func:`excite.deploy.rewrite.rewrite` did.
        write: puts the files into a folder and names them, the one to open first.
        blame: the layers that lose most by 8 bits, given images; None in floats.
        notes: what a person should know.
    """

    to: str
    precision: str
    dynamic: bool
    rewritten: dict[str, Any]
    write: Callable[[Path], list[str]]
    blame: Callable[[Tensor], list[quantize.LayerError]] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def package(
    network: nn.Module,
    example: Tensor,
    to: str,
    *,
    precision: str = "fp32",
    dynamic: bool = False,
    calibration: Iterable[Tensor] = (),
    bake: Preprocessing | None = None,
) -> Package:
    """Rewrite a network, convert it and, for 8 bits, quantise it.

    Args:
        network: stays as it is.
        example: float32 (N, C, H, W), normalised images or random numbers.
        to: ``onnx``, ``openvino`` or ``torch``.
        precision: ``fp32``, ``bf16`` or ``int8``.
        dynamic: leave the number of images open; else the file takes one at a time.
        calibration: for 8 bits, batches of what the file is to take.
        bake: normalise inside the file, which then takes uint8 pixels.

    Raises:
        UsageError: format and precision do not go together, an extra is missing, there are no images to calibrate
            on, or the network fixes the number of images.
        ExciteError: the network cannot be converted.
    """
    check_wish(to, precision)
    made = rewrite(network, example)
    dtype = torch.bfloat16 if (to, precision) == ("torch", "bf16") else torch.float32
    # The copy of a program's module can be put into evaluation mode; the module itself refuses.
    module = Packed(copy.deepcopy(made), bake, dtype).eval()
    given = torch.zeros(example.shape, dtype=torch.uint8) if bake else torch.zeros(example.shape)
    given = given if dynamic else given[:1]
    done = Package(to, precision, dynamic, dict(made.meta.get("rewritten", {})), lambda folder: [])
    if to == "onnx":
        proto = onnx_model(module, given, dynamic=dynamic)
        if precision == "int8":
            floats, proto = proto, quantize.quantise_onnx(proto, calibration)
            done.blame = lambda images: quantize.worst_layers_onnx(floats, proto, images)
        done.write = lambda folder: _written(folder / "model.onnx", proto.SerializeToString())
        fixed = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    elif to == "openvino":
        model = openvino_model(module, given, dynamic=dynamic)
        if precision == "int8":
            plain, model = model, quantize.quantise_openvino(model, calibration)
            done.blame = lambda images: quantize.worst_layers_openvino(plain, model, images)
        model.set_rt_info("bf16" if precision == "bf16" else "f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
        done.write = lambda folder: _save_openvino(model, folder)
        fixed = 0 if model.inputs[0].partial_shape[0].is_dynamic else 1
    else:
        program, free = exported(module, given, dynamic=dynamic, decompose=False)
        done.write = lambda folder: _save_torch(program, folder, done.notes)
        fixed = 0 if free else 1
    if dynamic and fixed:
        raise UsageError("This network's code fixes the number of images: export it without a dynamic batch.")
    return done


def _written(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [path.name]


def _save_openvino(model: Any, folder: Path) -> list[str]:
    import_openvino().save_model(model, folder / "model.xml", compress_to_fp16=False)
    return ["model.xml", "model.bin"]


def _save_torch(program: torch.export.ExportedProgram, folder: Path, notes: list[str]) -> list[str]:
    for node in program.graph.nodes:
        # Where in the source each operator came from, with its path on this machine.
        for key in ("stack_trace", "nn_module_stack", "from_node"):
            node.meta.pop(key, None)
    compiled = _compile(program, folder / COMPILED, notes)
    program._example_inputs = None  # the compiler wants them; in the file they would be numbers without a use
    torch.export.save(program, folder / "model.pt2")
    return ["model.pt2", COMPILED] if compiled else ["model.pt2"]


def _compile(program: torch.export.ExportedProgram, path: Path, notes: list[str]) -> bool:
    """Write AOTInductor's machine code, or note why there is none."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++")):
        notes.append("No C++ compiler was found: the file is the plain program, without machine code.")
        return False
    try:
        with torch.no_grad(), quiet():
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                # Weights become constants that are laid out once as the convolutions want them.
                inductor_configs={"freezing": True},
            )
    except Exception as error:  # whatever the compiler says
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        notes.append(f"AOTInductor could not compile it ({why}): the file is the plain program.")
        return False
    notes.append(f"{COMPILED} is machine code for this kind of processor; model.pt2 runs wherever PyTorch does.")
    return True


# --- the folder ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A temporary folder in which files are made that are then moved into ``folder`` by :func:`settle`.

    Raises:
        ExciteError: the folder cannot be written.
    """
    check_writable(folder / CARD)
    made = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def settle(made: Path, folder: Path, names: Sequence[str], card: Mapping[str, Any]) -> None:
    """Move finished files into place, the card last: by its checksums half of an export is noticed."""
    with plain_errors(f"Cannot write {folder}"):
        for name in names:
            with open(made / name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(made / name, folder / name)
    write_json(folder / CARD, card)


def describe(
    done: Package,
    folder: Path,
    names: Sequence[str],
    *,
    source: str,
    spec: str,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    baked: bool,
) -> dict[str, Any]:
    """What ``model.json`` says of an export whose files lie in a folder, but for how it was verified."""
    size, channels = preprocessing.size, preprocessing.channels
    count = "N" if done.dynamic else 1
    order = {1: "grey", 3: "RGB"}.get(channels)
    return {
        "made_by": "excite export",
        "task": "classification",
        "format": done.to,
        "precision": done.precision,
        "source": source,
        "spec": spec,
        "classes": list(classes),
        "preprocessing": {
            **dataclasses.asdict(preprocessing),
            "channel_order": order,
            "value_range": [0, 255] if baked else [0.0, 1.0],
            "baked": baked,
        },
        "input": {"name": INPUT, "dtype": "uint8" if baked else "float32", "shape": [count, channels, size, size]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": [count, len(classes)], "values": "logits"},
        "rewritten": done.rewritten,
        "files": {name: sha256(folder / name) for name in names},
        "notes": done.notes,
        "versions": _versions(done.to),
    }


def _versions(to: str) -> dict[str, str]:
    found = {}
    for name in ("excite", *_PACKAGES[to]):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class Exported:
    """A folder that ``excite export`` made.

    Raises:
        UsageError: it holds no export.
        ExciteError: a file is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not is_export(folder):
            raise UsageError(f"{folder} is not an export: it has no {CARD} that says so.")
        self.card: dict[str, Any] = json.loads((self.folder / CARD).read_text())
        for name, checksum in self.card["files"].items():
            if not (self.folder / name).is_file() or sha256(self.folder / name) != checksum:
                raise ExciteError(
                    f"{self.folder / name} is missing or damaged: its checksum is not the one in {CARD}."
                )

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes what the network takes, whether or not the file does part of it."""
        fields = {field.name for field in dataclasses.fields(Preprocessing)}
        return Preprocessing(**{key: value for key, value in self.card["preprocessing"].items() if key in fields})

    @property
    def baked(self) -> bool:
        """Whether the file takes uint8 pixels and normalises them itself."""
        return bool(self.card["preprocessing"]["baked"])

    @property
    def dynamic(self) -> bool:
        """Whether it takes any number of images at once; else one."""
        return self.card["input"]["shape"][0] != 1

    def engine(self, threads: int | None = None) -> Callable[[Tensor], Tensor]:
        """Its files, ready to run: from (N, C, H, W) to float32 logits."""
        return engine(self.folder, list(self.card["files"]), self.card["format"], self.card["precision"], threads)


def is_export(folder: str | Path) -> bool:
    """Whether a folder holds what ``excite export`` made."""
    path = Path(folder) / CARD
    if not path.is_file() or (Path(folder) / "recipe.yaml").is_file():
        return False
    try:
        card = json.loads(path.read_text())
    except ValueError:
        raise ExciteError(f"{path} is damaged: it is not JSON.") from None
    return isinstance(card, dict) and card.get("made_by") == "excite export"


def engine(
    folder: Path, names: Sequence[str], to: str, precision: str, threads: int | None = None
) -> Callable[[Tensor], Tensor]:
    """The files of an export, ready to run.

    Args:
        folder: where they lie.
        names: as they were written, the one to open first.
        to: the format.
        precision: as exported.
        threads: of the processor; by default as many as PyTorch uses.

    Returns:
        From images (N, C, H, W), as the file takes them, to float32 logits.
    """
    if to == "onnx":
        return ONNXEngine(folder / names[0], threads=threads)
    if to == "openvino":
        return OpenVINOEngine(folder / names[0], precision="bf16" if precision == "bf16" else "fp32", threads=threads)
    if threads:
        torch.set_num_threads(threads)
    return _torch_engine(folder, names)


def _torch_engine(folder: Path, names: Sequence[str]) -> Callable[[Tensor], Tensor]:
    run: Any = None
    if COMPILED in names:
        try:
            run = torch._inductor.aoti_load_package(str(folder / COMPILED))
        except Exception as error:  # another processor, or another PyTorch
            log.info("%s does not load here (%s): model.pt2 is used", COMPILED, str(error).strip().splitlines()[0])
    if run is None:
        with plain_errors(f"PyTorch cannot read {folder / names[0]}"):
            run = torch.export.load(folder / names[0]).module()

    def call(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = run(images)
        return logits

    return call


def in_memory(
    network: nn.Module, example: Tensor, to: str, precision: str = "fp32", threads: int | None = None
) -> Callable[[Tensor], Tensor]:
    """A network rewritten and run by an engine, without a file.

    Args:
        network: stays as it is.
        example: what it takes, float32 (N, C, H, W).
        to: ``onnx``, ``openvino`` or ``torch``.
        precision: ``fp32`` or ``bf16``.
        threads: of the processor; by default as many as PyTorch uses.

    Raises:
        UsageError: the engine is not installed, or has no such precision.
        ExciteError: the network cannot be converted.
    """
    known(precision, ["fp32", "bf16"], "precision")
    check_wish(to, precision)
    if to == "torch":
        if threads:
            torch.set_num_threads(threads)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # Not the compiler: for a few images it would take longer than they do.
        optimised: Callable[[Tensor], Tensor] = optimize(network, example, dtype=dtype, engine="torch-direct")
        return optimised
    made = rewrite(network, example)
    make = openvino_engine if to == "openvino" else onnx_engine
    return make(made, example, precision=precision, threads=threads)

"""Weights from a file of any known format and with anyone's names, into a network: all of them or none."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from excite.errors import ExciteError, UsageError
from excite.networks.dncnn import DnCNN
from excite.preprocessing import Preprocessing
from excite.surgery.hooks import attached_units
from excite.weights.base import Content, Converted, Layout, Origin
from excite.weights.cadene import cadene_layout
from excite.weights.caffe import caffe_layout, is_caffemodel, read_caffemodel
from excite.weights.dncnn import ConvertedDnCNN, dncnn_layout, expected_images
from excite.weights.matconvnet import is_mat, matconvnet_layout, read_mat
from excite.weights.published import imagenet_classes, known_preprocessing
from excite.weights.state_dict import is_safetensors, read_safetensors, read_torch
from excite.weights.timm import timm_layout
from excite.weights.torchvision import torchvision_layout

logger = logging.getLogger("excite.weights")

LAYOUTS: tuple[Layout, ...] = (
    dncnn_layout,
    caffe_layout,
    matconvnet_layout,
    cadene_layout,
    timm_layout,
    torchvision_layout,
)
# What other authors call the classifier, which excite and torchvision's ResNets call fc.
_HEADS = ("fc", "linear", "last_linear", "classifier", "classifier.1", "head", "head.fc", "classif")


@dataclass(frozen=True)
class Weights:
    """The weights in a file, read but not yet in a network.

    Attributes:
        path: the file.
        tensors: by the file's own names.
        converted: by excite's, where the names are known ones.
        outputs: how many its classifier has, where one can be told.
        refusal: why networks of excite's cannot have these weights, though the network they are from can.
        by_position: a chain of convolutions that has DnCNN's form, for a network that is none.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    converted: Converted | None
    outputs: int | None
    refusal: str = ""
    by_position: Converted | None = None


def load_weights(module: nn.Module, path: str | Path, *, replace_head: bool = False) -> Origin:
    """Load a file of weights into a network, all of it or nothing.

    The format is found by the file's content: PyTorch's (zip or the older pickle, opened so that no code can run),
    safetensors, Caffe's ``.caffemodel``, MatConvNet's ``.mat`` (v7.3). The names may be excite's, torchvision's,
    timm's, Cadene's, those of the SE and SK authors' Caffe releases, or those of anyone's DnCNN; of a plain state
    dict any that the network itself has. A state dict may sit under a key such as ``state_dict`` beside other things,
    and its names may carry the ``module.`` prefix of a parallel wrapper.

    Args:
        module: the network. It stays on its device and in its precision.
        path: the file.
        replace_head: where the classifier has another number of outputs, leave the network's own in place.

    Returns:
        Where the weights came from and what images they expect.

    Raises:
        UsageError: the file is missing, or its tensors do not fit the network: the message names those that are
            missing, unexpected, or of another shape. The network is left as it was.
        ExciteError: the file is not a file of weights, is cut off, or would run code when opened.
    """
    return put(module, read_weights(path), replace_head=replace_head)


def read_weights(path: str | Path) -> Weights:
    """Read a file, without a network to put it into; errors as for :func:`load_weights`."""
    path = Path(path)
    content = _read(path)
    for name, tensor in content.tensors.items():
        if tensor.layout == torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ExciteError(
                f"Refused the weights in {path}: {name} claims the shape {tuple(tensor.shape)}, but holds less."
            )
    converted, refusal = None, ""
    try:
        converted = next((found for layout in LAYOUTS if (found := layout(content))), None)
    except UsageError as error:
        refusal = str(error)
    tensors = converted.tensors if converted else content.tensors
    heads = (tensors.get(f"{name}.weight") for name in _HEADS)
    outputs = next((head.shape[0] for head in heads if head is not None and head.ndim == 2), None)
    by_position = matconvnet_layout(content) if isinstance(converted, ConvertedDnCNN) else None
    return Weights(path, content.tensors, converted, outputs, refusal, by_position)


def put(
    module: nn.Module, weights: Weights, *, replace_head: bool = False, preprocessing: Preprocessing | None = None
) -> Origin:
    """Put weights that were read into a network; see :func:`load_weights`.

    Args:
        module: the network.
        weights: what was read.
        replace_head: see :func:`load_weights`.
        preprocessing: what the source of the file says, where it came from one.
    """
    path, wanted = weights.path, module.state_dict()
    own = _fits([*wanted.keys() - _units_not_in(weights.tensors, module)], weights.tensors)
    if weights.refusal and not own:
        raise UsageError(f"Cannot use the weights in {path}: {weights.refusal}.")
    converted = None if own else _suiting(weights, module)
    if converted and isinstance(module, DnCNN):
        _check_form(module, converted, path)  # of which each difference would be many tensors
    found = _fitting_names(dict(converted.tensors if converted else weights.tensors), wanted, module)
    new_head = set(_other_head(wanted, found)) if replace_head else set()
    if new_head:
        logger.info("%s: the classifier has another number of outputs and starts afresh", path)
    kept = new_head | _units_not_in(found, module)
    found = {name: tensor for name, tensor in found.items() if name not in kept}
    if problems := _mismatch({name: tensor for name, tensor in wanted.items() if name not in kept}, found):
        raise UsageError(f"The weights in {path} do not fit this network: {'; '.join(problems)}. Nothing was loaded.")
    if converted:
        _check_form(module, converted, path)
    _check_values(found, path)
    with torch.no_grad():
        for name, tensor in found.items():
            wanted[name].copy_(tensor)
    preprocessing = known_preprocessing(path) or preprocessing or (converted.preprocessing if converted else None)
    preprocessing = preprocessing or expected_images(module)
    classes = None
    if weights.outputs == 1000 and not new_head and preprocessing:
        classes = imagenet_classes()
    layout = converted.layout if converted else "the network's own names"
    fresh = frozenset(name for name, _ in module.named_parameters() if name in kept)
    return Origin(str(path), layout, preprocessing, classes, fresh)


# --- reading ---------------------------------------------------------------------------------------------------


def _read(path: Path) -> Content:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"The weights file {path} {what}; expected a .pth, .safetensors, .caffemodel or .mat file.")
    if not os.access(path, os.R_OK):
        raise ExciteError(f"The weights file {path} cannot be read: its permissions forbid it.")
    if is_safetensors(path):
        return Content("safetensors", read_safetensors(path))
    if is_mat(path):
        return Content("MatConvNet", read_mat(path))
    if is_caffemodel(path):
        return Content("Caffe", read_caffemodel(path))
    return Content("PyTorch", read_torch(path))


# --- names and shapes ------------------------------------------------------------------------------------------


def _suiting(weights: Weights, module: nn.Module) -> Converted | None:
    """A chain of convolutions has DnCNN's names for a DnCNN only; in any other network they are matched in order."""
    if isinstance(weights.converted, ConvertedDnCNN) and not isinstance(module, DnCNN):
        return weights.by_position
    return weights.converted


def _units_not_in(given: Mapping[str, Tensor], module: nn.Module) -> set[str]:
    """The names of attached units of which a file knows nothing: it is the host's, from before."""
    names: set[str] = set()
    for name, unit in attached_units(module, every_name=True):
        own = {f"{name}.{key}" for key in unit.state_dict()}
        if own.isdisjoint(given):
            names |= own
    return names


def _fits(wanted: Iterable[str], given: Mapping[str, Tensor]) -> bool:
    """Whether a file's own names are the network's, as for networks of torchvision and timm themselves."""
    return _countless(wanted) <= given.keys()


def _countless(tensors: Iterable[str]) -> set[str]:
    # Batch norm's count of batches only matters to networks trained without momentum, and many files lack it.
    return {name for name in tensors if not name.endswith("num_batches_tracked")}


def _fitting_names(given: dict[str, Tensor], wanted: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Rename the classifier, or where the file has no names, everything."""
    if given and all(name.partition(".")[0].isdigit() for name in given) and not given.keys() & wanted.keys():
        return _by_position(given, module)
    for head in _HEADS:
        for kind in ("weight", "bias"):
            if f"{head}.{kind}" in given and f"{head}.{kind}" not in wanted and f"fc.{kind}" in wanted:
                given.setdefault(f"fc.{kind}", given.pop(f"{head}.{kind}"))
    return {name: tensor for name, tensor in given.items() if not _spare_count(name, wanted)}


def _spare_count(name: str, wanted: Mapping[str, Tensor]) -> bool:
    return name.endswith("num_batches_tracked") and name not in wanted


def _by_position(given: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A file that only counts its convolutions: the first is the network's first, and so on."""
    ours = [name for name, child in module.named_modules() if isinstance(child, nn.Conv2d)]
    theirs = sorted({int(name.partition(".")[0]) for name in given})
    if len(ours) != len(theirs):
        raise UsageError(
            f"The file has {len(theirs)} convolutions without names and this network {len(ours)}: "
            "they can only be matched in order, and so must be as many. Nothing was loaded."
        )
    at = dict(zip(map(str, theirs), ours, strict=True))
    renamed = {}
    for name, tensor in given.items():
        index, _, kind = name.partition(".")
        renamed[f"{at[index]}.{kind}" if at[index] else kind] = tensor
    return renamed


def _check_form(module: nn.Module, converted: Converted, path: Path) -> None:
    """Refuse weights whose names fit but that were trained in another form of the network."""
    table = getattr(module, "table", None)
    other = {key: value for key, value in converted.form.items() if str(getattr(table, key, value)) != value}
    if other:
        arguments = ",".join(f"{key}={value}" for key, value in converted.form.items())
        raise UsageError(
            f"The weights in {path} ({converted.layout}) were trained in another form of this network: "
            f"give its spec the arguments {arguments}. Nothing was loaded."
        )


def _other_head(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """The classifier's tensors, where they differ in nothing but the number of outputs."""
    for head in _HEADS:
        names = [f"{head}.{kind}" for kind in ("weight", "bias") if f"{head}.{kind}" in wanted]
        if names and all(name in found and _same_but_outputs(found[name], wanted[name]) for name in names):
            return [name for name in names if found[name].shape != wanted[name].shape]
    return []


def _same_but_outputs(found: Tensor, wanted: Tensor) -> bool:
    return found.ndim == wanted.ndim and found.shape[1:] == wanted.shape[1:]


def _mismatch(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} (expected {tuple(wanted[name].shape)}, found {tuple(found[name].shape)})"
        for name in wanted
        if name in found and wanted[name].shape != found[name].shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of the wrong shape": shapes}
    return [f"{len(names)} {what}: {_listed(names)}" for what, names in groups.items() if names]


def _check_values(found: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise ExciteError(f"The tensor {name} in {path} is sparse, quantised or complex: expected plain numbers.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExciteError(f"The tensor {name} in {path} holds NaN or infinite values. Nothing was loaded.")


def _listed(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")

"""Weights from Caffe: ``.caffemodel`` files, and the layer names of the releases that came in them.

* Hu et al., hujie-frank/SENet: SE-ResNet, SE-ResNeXt, SENet-154, SE-BN-Inception.
* Li et al., implus/SKNet: SKNet-50, SKNet-101.
* He et al., KaimingHe/deep-residual-networks: ResNet-50, -101, -152.

Their networks take pixels from 0 to 255 in the order blue, green, red, less a mean; ours take red, green, blue from
0 to 1. Order and range go into the first convolution here. The mean cannot (the frame of zeros around an image is not
zero before it), so it is said as preprocessing.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from excite.errors import ExciteError, UsageError
from excite.preprocessing import Preprocessing
from excite.weights.base import Content, Converted
from excite.weights.protobuf import LENGTH, VARINT, Field, Wire, WireError

# --- the file --------------------------------------------------------------------------------------------------
# Numbers of fields in caffe.proto.

_LAYERS = {100: (1, 7), 2: (4, 6)}  # NetParameter.layer, .layers (before 2015): in each, the fields of name and blobs
_NAME, _INPUT, _INPUT_DIM, _BACKWARD, _STATE, _DEBUG, _INPUT_SHAPE = 1, 3, 4, 5, 6, 7, 8  # NetParameter's others
_OLD_SHAPE, _DATA, _SHAPE, _DOUBLE_DATA = (1, 2, 3, 4), 5, 7, 8  # BlobProto
_DIM = 1  # BlobShape

_MOST_AXES = 32  # Caffe's own limit
_LONGEST_NAME = 1024


def is_caffemodel(path: str | Path) -> bool:
    """Whether a file begins as a Caffe network does, up to the name of its first layer. Never raises for a file."""
    try:
        with open(path, "rb") as file:
            wire = Wire(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for field in wire.fields(0, len(wire.data)):
            if field.number in _LAYERS:
                name = next(wire.fields(field.start, field.stop), None)
                return field.wire_type == LENGTH and name is not None and _text(wire, name) != ""
            if not _stands_before_layers(wire, field):
                return False
    except (ValueError, OSError):  # ValueError: nothing to map, or no such message
        pass
    return False


def _stands_before_layers(wire: Wire, field: Field) -> bool:
    """Whether a field of the whole network other than its layers is as Caffe writes it."""
    if field.number in (_NAME, _INPUT):
        return _text(wire, field) != ""
    if field.number in (_BACKWARD, _DEBUG):
        return field.wire_type == VARINT and field.value <= 1
    if field.number in (_STATE, _INPUT_SHAPE):
        return field.wire_type == LENGTH and all(inner.number for inner in wire.fields(field.start, field.stop))
    return field.number == _INPUT_DIM and field.wire_type == VARINT


def read_caffemodel(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a ``.caffemodel``, by ``layer:blob`` such as ``conv1/7x7_s2:0``, in the file's shapes.

    They lie in the file, mapped into memory: what is read comes from the disk, what is written stays in this process.
    Numbers in double precision are rounded to single.

    Raises:
        UsageError: there is no such file.
        ExciteError: the file is no Caffe network, is cut off or damaged, or holds no weights.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            # A private copy, page by page as it is written to: torch has no read-only tensors.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"The weights file {path} {what}; expected a .caffemodel file.") from error
    except (ValueError, OSError) as error:  # ValueError: an empty file cannot be mapped
        reason = "it is empty" if isinstance(error, ValueError) else error.strerror
        raise ExciteError(f"Cannot read the Caffe file {path}: {reason}.") from error
    try:
        return _network(Wire(data))
    except WireError as error:
        raise ExciteError(
            f"Cannot read {path} as a Caffe network: {error}. Expected a whole .caffemodel file (binary, "
            "not the .prototxt)."
        ) from error


def _network(wire: Wire) -> dict[str, Tensor]:
    layers: dict[str, list[Tensor]] = {}
    for field in wire.fields(0, len(wire.data)):
        if field.number not in _LAYERS:
            continue
        name, blobs = _layer(wire, field)
        if name in layers and blobs:
            raise WireError(f"two layers with weights are called {name!r}")
        if blobs:
            layers[name] = blobs
    if not layers:
        raise WireError("it holds no weights")
    return {f"{name}:{index}": blob for name, blobs in layers.items() for index, blob in enumerate(blobs)}


def _layer(wire: Wire, layer: Field) -> tuple[str, list[Tensor]]:
    name_number, blobs_number = _LAYERS[layer.number]
    name, blobs = "", []
    for field in _inside(wire, layer):
        if field.number == name_number:
            name = _text(wire, field)
        elif field.number == blobs_number:
            blobs.append(field)
    return name, [_blob(wire, blob, f"{name}:{index}") for index, blob in enumerate(blobs)]


def _blob(wire: Wire, blob: Field, name: str) -> Tensor:
    old_shape: dict[int, int] = {}
    shape: list[int] | None = None
    singles, doubles = [], []
    for field in _inside(wire, blob):
        if field.number in _OLD_SHAPE and field.wire_type == VARINT:
            old_shape[field.number] = field.value
        elif field.number == _SHAPE:
            shape = _dims(wire, field, shape or [])
        elif field.number == _DATA:
            singles.append(wire.floats(field, 4))
        elif field.number == _DOUBLE_DATA:
            doubles.append(wire.floats(field, 8))
    parts = doubles or singles or [np.empty(0, np.float32)]
    numbers = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if old_shape:  # as Caffe does: it counts where there is one
        shape = [old_shape.get(number, 0) for number in _OLD_SHAPE]
    shape = shape or []  # no shape at all is that of a single number
    if len(numbers) == 0 or math.prod(shape) != len(numbers):
        raise WireError(f"{name!r} has the shape {tuple(shape)}, but {len(numbers):,} numbers")
    # Unaligned where the file's packing makes it so; torch copes, as it does with safetensors.
    return torch.from_numpy(numbers.astype(np.float32, copy=False).reshape(shape))


def _dims(wire: Wire, shape: Field, dims: list[int]) -> list[int]:
    for field in _inside(wire, shape):
        if field.number == _DIM:
            for dim in wire.varints(field):
                if len(dims) == _MOST_AXES:
                    raise WireError(f"the shape at byte {shape.start:,} has more than {_MOST_AXES} axes")
                dims.append(dim)
    return dims


def _inside(wire: Wire, field: Field) -> Iterator[Field]:
    if field.wire_type != LENGTH:
        raise WireError(f"field {field.number} at byte {field.start:,} should hold a message")
    return wire.fields(field.start, field.stop)


def _text(wire: Wire, field: Field) -> str:
    if field.wire_type == LENGTH and field.stop - field.start <= _LONGEST_NAME:
        try:
            text = wire.data[field.start : field.stop].decode()
        except UnicodeDecodeError:
            text = "\0"
        if text.isprintable():
            return text
    raise WireError(f"field {field.number} at byte {field.start:,} should hold a name")


# --- the names -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """How a release calls its layers.

    A place is where a layer goes in our network: (the convolution or linear layer, its batch norm or None).

    Attributes:
        layout: whose names they are.
        landmark: a layer that only this release has.
        first: the layer that sees the image, in each of the release's networks.
        mean: of the pixels, red, green, blue, 0 to 255.
        whole: places of layers outside of blocks.
        block: matches the layers in blocks; its last group is the part.
        prefix: from the match, where the block goes.
        parts: places in a block, by part.
        norm: from a layer's name, the names of its batch norm and of what scales that, where they are apart.
    """

    layout: str
    landmark: str
    first: tuple[str, ...]
    mean: tuple[float, float, float]
    whole: Mapping[str, tuple[str, str | None]]
    block: re.Pattern[str]
    prefix: Callable[[re.Match[str]], str]
    parts: Mapping[str, tuple[str, str | None]]
    norm: Callable[[str], tuple[str, str]]

    def place(self, layer: str) -> tuple[str, str | None] | None:
        """Where a layer goes; None for one that this release does not have."""
        if layer in self.whole:
            return self.whole[layer]
        match = self.block.fullmatch(layer)
        if match is None or match[match.re.groups] not in self.parts:
            return None
        prefix = self.prefix(match)
        target, norm = self.parts[match[match.re.groups]]
        return prefix + target, norm and prefix + norm


def _numbered(match: re.Match[str]) -> str:
    """``conv3_2…``: the papers count stages from 2 (1 is the stem), blocks from 1."""
    return f"layer{int(match[1]) - 1}.{int(match[2]) - 1}."


def _lettered(match: re.Match[str]) -> str:
    """``res3b…``, and in the deeper networks' long stages ``res3a``, ``res3b1``, ``res3b2``, …"""
    letter, number = match[2], match[3]
    return f"layer{int(match[1]) - 1}.{int(number) if number else ord(letter) - ord('a')}."


def _slash_norm(layer: str) -> tuple[str, str]:
    return f"{layer}/bn", f"{layer}/bn/scale"


def _prefix_norm(layer: str) -> tuple[str, str]:
    rest = layer.removeprefix("res") if layer.startswith("res") else f"_{layer}"
    return f"bn{rest}", f"scale{rest}"


_BOTTLENECK: dict[str, tuple[str, str | None]] = {
    "1x1_reduce": ("conv1", "bn1"),
    "3x3": ("conv2", "bn2"),
    "1x1_increase": ("conv3", "bn3"),
    "1x1_proj": ("downsample.0", "downsample.1"),
}
_SE: dict[str, tuple[str, str | None]] = {"1x1_down": ("se.reduce", None), "1x1_up": ("se.expand", None)}
_SK: dict[str, tuple[str, str | None]] = {
    "3x3g32": ("conv2.branches.0.0", "conv2.branches.0.1"),
    "3x3g32d2": ("conv2.branches.1.0", "conv2.branches.1.1"),
    "B_fc1": ("conv2.reduce", "conv2.norm"),
    "B_fc2": ("conv2.expand", None),
}
_INCEPTION: dict[str, tuple[str, str | None]] = {
    part: (f"{ours}.conv", f"{ours}.bn")
    for part, ours in {
        "1x1": "b1x1",
        "3x3_reduce": "b3x3_reduce",
        "3x3": "b3x3",
        "double3x3_reduce": "double3x3_reduce",
        "double3x3a": "double3x3a",
        "double3x3b": "double3x3b",
        "pool_proj": "pool_proj",
    }.items()
}
_MEAN = (123.0, 117.0, 104.0)

_RELEASES = (
    _Names(
        layout="the SENet authors' Caffe release",
        landmark="conv2_1_1x1_reduce",
        first=("conv1/7x7_s2", "conv1_1/3x3_s2"),
        mean=_MEAN,
        whole={
            "conv1/7x7_s2": ("conv1", "bn1"),
            "conv1_1/3x3_s2": ("conv1.0", "conv1.1"),  # SENet-154
            "conv1_2/3x3": ("conv1.3", "conv1.4"),
            "conv1_3/3x3": ("conv1.6", "bn1"),
            "classifier": ("fc", None),
        },
        block=re.compile(r"conv(\d)_(\d+)_(.+)"),
        prefix=_numbered,
        parts=_BOTTLENECK | _SE,
        norm=_slash_norm,
    ),
    _Names(
        layout="the SKNet authors' Caffe release",
        landmark="conv2_1/1x1_reduce",
        first=("conv1/7x7_s2",),
        mean=_MEAN,
        whole={"conv1/7x7_s2": ("conv1", "bn1"), "classifier": ("fc", None)},
        block=re.compile(r"conv(\d)_(\d+)/(.+)"),
        prefix=_numbered,
        parts=_BOTTLENECK | _SK,
        norm=_slash_norm,
    ),
    _Names(
        layout="the SENet authors' Caffe release",
        landmark="inception_3a/1x1",
        first=("conv1/7x7_s2",),
        mean=_MEAN,
        whole={
            "conv1/7x7_s2": ("conv1.conv", "conv1.bn"),
            "conv2/3x3_reduce": ("conv2_reduce.conv", "conv2_reduce.bn"),
            "conv2/3x3": ("conv2.conv", "conv2.bn"),
            "classifier": ("fc", None),
        },
        block=re.compile(r"(inception_\d[a-z])[/_](.+)"),
        prefix=lambda match: f"{match[1]}.",
        parts=_INCEPTION | _SE,
        norm=_slash_norm,
    ),
    _Names(
        layout="the ResNet authors' Caffe release",
        landmark="res2a_branch2a",
        first=("conv1",),
        mean=(123.152, 115.903, 103.063),  # the means over the positions of the authors' mean image
        whole={"conv1": ("conv1", "bn1"), "fc1000": ("fc", None)},
        block=re.compile(r"res(\d)([a-z])(\d*)_branch(.+)"),
        prefix=_lettered,
        parts={
            "2a": ("conv1", "bn1"),
            "2b": ("conv2", "bn2"),
            "2c": ("conv3", "bn3"),
            "1": ("downsample.0", "downsample.1"),
        },
        norm=_prefix_norm,
    ),
)


def caffe_layout(content: Content) -> Converted | None:
    """The layouts of the Caffe releases named at the top of this module.

    Layers that the release is not known to have keep their names, so that whoever loads the network can say so.

    Raises:
        ExciteError: a batch norm's blobs do not fit each other or their convolution.
    """
    if content.format != "Caffe":
        return None
    names = next((names for names in _RELEASES if f"{names.landmark}:0" in content.tensors), None)
    if names is None:
        return None
    tensors = _renamed(content.tensors, names)
    first = [content.tensors[f"{layer}:0"] for layer in names.first if f"{layer}:0" in content.tensors]
    in_color = len(first) == 1 and first[0].dim() == 4 and first[0].shape[1] == 3
    mean = tuple(value / 255 for value in names.mean)
    preprocessing = Preprocessing(224, mean, (1.0, 1.0, 1.0), resize=256) if in_color else None
    return Converted(names.layout, tensors, _form(tensors), preprocessing)


def _renamed(content: Mapping[str, Tensor], names: _Names) -> dict[str, Tensor]:
    left = dict(content)
    tensors = {}
    for layer in [name.removesuffix(":0") for name in content if name.endswith(":0")]:
        place = names.place(layer)
        if place is None:
            continue
        target, norm = place
        weight, bias = left.pop(f"{layer}:0"), left.pop(f"{layer}:1", None)
        if layer in names.first and weight.dim() == 4:
            weight = weight.flip(1) * 255
        tensors[f"{target}.weight"] = _matrix(weight) if target.endswith(_LINEAR) else weight
        statistics = norm and _batch_norm(left, *names.norm(layer), bias)
        if statistics:
            tensors |= {f"{norm}.{name}": tensor for name, tensor in statistics.items()}
        elif bias is not None:
            tensors[f"{target}.bias"] = bias.reshape(-1)
    return tensors | left


_LINEAR = ("fc", "reduce", "expand")


def _matrix(weight: Tensor) -> Tensor:
    """The weight of a linear layer, from a 1×1 convolution's or as old Caffe wrote it, (1, 1, outputs, inputs)."""
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        return weight.reshape(weight.shape[:2])
    if weight.dim() == 4 and weight.shape[:2] == (1, 1):
        return weight.reshape(weight.shape[2:])
    return weight


def _batch_norm(left: dict[str, Tensor], norm: str, scale: str, bias: Tensor | None) -> dict[str, Tensor]:
    """Takes the blobs of a batch norm out of ``left``; nothing where they are not all there.

    CuDNNBatchNorm has scale, bias, mean and variance. Caffe's own BatchNorm has mean and variance, both times a
    factor, and the factor; a layer of its own scales.
    """
    cudnn = [f"{norm}:{index}" for index in range(4)]
    caffe = [f"{scale}:0", f"{scale}:1", f"{norm}:0", f"{norm}:1"]
    sources = next((sources for sources in (cudnn, caffe) if all(source in left for source in sources)), None)
    if sources is None or (sources is caffe and f"{norm}:2" not in left):
        return {}
    weight, shift, mean, variance = (left.pop(source).reshape(-1) for source in sources)
    if sources is caffe:
        factor = left.pop(f"{norm}:2")
        if factor.numel() != 1:
            raise ExciteError(f"The batch norm {norm!r} should have one factor, not {factor.numel()}: damaged file?")
        times = 0.0 if float(factor) == 0 else 1 / float(factor)
        mean, variance = mean * times, variance * times
    if bias is not None:  # batch norm subtracts the mean: a bias before it is the same as a lower mean
        if bias.numel() != mean.numel():
            raise ExciteError(
                f"The batch norm {norm!r} is over {mean.numel()} channels, but the convolution before it has "
                f"{bias.numel()} biases: damaged file?"
            )
        mean = mean - bias.reshape(-1)
    return {"weight": weight, "bias": shift, "running_mean": mean, "running_var": variance}


def _form(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """How the ResNet family must be built for them; BN-Inception has one form only."""
    if "layer1.0.conv1.weight" not in tensors:
        return {}
    form = {"pool": "ceil"}
    if "layer1.0.conv3.weight" in tensors:
        # ResNet and SE-ResNet stride in the first 1×1; all releases with groups, and SKNet, do in the 3×3.
        reduce, inner = tensors["layer1.0.conv1.weight"], tensors.get("layer1.0.conv2.weight")
        plain = inner is not None and inner.shape[1:2] == reduce.shape[:1]
        form["stride_in"] = "1x1" if plain else "3x3"
    return form

"""The names of Cadene's ``pretrainedmodels``, which timm's ``legacy_`` networks and its Inception-ResNet-v2 kept.

Which networks: BN-Inception, Inception-ResNet-v2, SE-ResNet-50/101/152, SE-ResNeXt-50/101, SENet-154, and what timm
trained of the same code. The SE networks are the paper's authors', ported from Caffe: they pool in the stem as Caffe
does, and the bottlenecks without groups stride in the first 1×1 convolution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from excite.weights.base import Content, Converted
from excite.weights.names import renamed, with_linear_layers

Tensors = Mapping[str, Tensor]


def cadene_layout(content: Content) -> Converted | None:
    """Convert what ``pretrainedmodels`` saved; None for any other file.

    Big tensors come out as views of the file's.
    """
    tensors = content.tensors
    if {"conv1_7x7_s2.weight", "inception_3a_1x1.weight"} <= tensors.keys():
        # Others have the same names for networks that take something else than the three colours.
        return _bn_inception(tensors) if tensors["conv1_7x7_s2.weight"].shape[1] == 3 else None
    if {"conv2d_1a.conv.weight", "block8.conv2d.weight"} <= tensors.keys():
        return _inception_resnet(tensors)
    if {"layer0.conv1.weight", "layer1.0.se_module.fc1.weight"} <= tensors.keys():
        return _senet(tensors)
    return None


# --- BN-Inception ----------------------------------------------------------------------------------------------

_BN_INCEPTION_NAME = re.compile(r"(inception_\d[a-e]_)?(.+?)(_bn)?\.(\w+)")
_BN_INCEPTION_LAYERS = {
    "conv1_7x7_s2": "conv1",
    "conv2_3x3_reduce": "conv2_reduce",
    "conv2_3x3": "conv2",
    "1x1": "b1x1",
    "3x3_reduce": "b3x3_reduce",
    "3x3": "b3x3",
    "double_3x3_reduce": "double3x3_reduce",
    "double_3x3_1": "double3x3a",
    "double_3x3_2": "double3x3b",
}
_BLUE, _GREEN, _RED = 104, 117, 128  # subtracted from pixels of 0 to 255


def _bn_inception(tensors: Tensors) -> Converted:
    """Its convolutions have biases, and it takes pixels of 0 to 255, blue first: ours none, 0 to 1, red first."""
    converted = {}
    for name, tensor in tensors.items():
        match = _BN_INCEPTION_NAME.fullmatch(name)
        if match is None or match[2] == "last_linear":
            converted[name.replace("last_linear", "fc")] = tensor
            continue
        module, layer, batch_norm, kind = match.groups(default="")
        place = module.rstrip("_") + "." * bool(module) + _BN_INCEPTION_LAYERS.get(layer, layer)
        if batch_norm:
            if kind == "running_mean" and (bias := tensors.get(f"{module}{layer}.bias")) is not None:
                tensor = tensor - bias
            converted[f"{place}.bn.{kind}"] = tensor
        elif kind == "weight":
            converted[f"{place}.conv.weight"] = tensor
    converted["conv1.conv.weight"] = converted["conv1.conv.weight"].flip(1) * 255
    mean = (_RED / 255, _GREEN / 255, _BLUE / 255)
    return Converted(
        "Cadene's BN-Inception", converted, preprocessing=Preprocessing(224, mean, (1.0, 1.0, 1.0), resize=256)
    )


# --- Inception-ResNet-v2 ---------------------------------------------------------------------------------------


def _inception_resnet(tensors: Tensors) -> Converted | None:
    """All but the classifier is named as ours.

    pretrainedmodels crops 0.875 of the side, as of all its networks' (resize to 341), timm 0.8975 (333, bicubic).
    """
    half = (0.5, 0.5, 0.5)
    if "last_linear.weight" in tensors:
        converted = renamed(tensors, {r"^last_linear\.": "fc."})
        if len(converted["fc.weight"]) == 1001:  # the first class is the background, which ImageNet does not have
            converted |= {name: converted[name][1:] for name in ("fc.weight", "fc.bias")}
        return Converted(
            "Cadene's Inception-ResNet-v2", converted, preprocessing=Preprocessing(299, half, half, resize=341)
        )
    if "classif.weight" in tensors:
        return Converted(
            "timm's Inception-ResNet-v2",
            renamed(tensors, {r"^classif\.": "fc."}),
            preprocessing=Preprocessing(299, half, half, resize=333, interpolation="bicubic"),
        )
    return None


# --- SE-ResNet, SE-ResNeXt, SENet-154 --------------------------------------------------------------------------

_STEM = {r"^layer0\.": ""}
_DEEP_STEM = {
    r"^layer0\.conv1\.": "conv1.0.",
    r"^layer0\.bn1\.": "conv1.1.",
    r"^layer0\.conv2\.": "conv1.3.",
    r"^layer0\.bn2\.": "conv1.4.",
    r"^layer0\.conv3\.": "conv1.6.",
    r"^layer0\.bn3\.": "bn1.",
}
_SE = {r"\.se_module\.fc1\.": ".se.reduce.", r"\.se_module\.fc2\.": ".se.expand.", r"^last_linear\.": "fc."}


def _senet(tensors: Tensors) -> Converted:
    stem = _DEEP_STEM if "layer0.conv3.weight" in tensors else _STEM
    return Converted(
        "Cadene's SE networks",
        with_linear_layers(renamed(tensors, stem | _SE)),
        form=_form(tensors),
        preprocessing=Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, resize=256),
    )


def _form(tensors: Tensors) -> dict[str, str]:
    if "layer1.0.conv3.weight" not in tensors:  # timm's legacy_seresnet18 and 34 rectify the branch before SE
        return {"pool": "ceil", "branch": "relu"}
    grouped = tensors["layer1.0.conv2.weight"].shape[1] < tensors["layer1.0.conv1.weight"].shape[0]
    return {"stride_in": "3x3" if grouped else "1x1", "pool": "ceil"}

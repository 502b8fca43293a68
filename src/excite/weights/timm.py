"""timm's names: SE-ResNets and SE-ResNeXts, SK-ResNeXt, MobileNet V1 and V2.

Its plain ResNets have torchvision's names, which are excite's own; its ``legacy_`` networks have Cadene's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from excite.errors import UsageError
from excite.weights.base import Content, Converted
from excite.weights.names import renamed, with_linear_layers

TODAY = {"stride_in": "3x3", "pool": "padded"}


def timm_layout(content: Content) -> Converted | None:
    """The state dicts of ``seresnet*``, ``seresnext*``, ``skresnext50_32x4d``, ``mobilenetv1_*``, ``mobilenetv2_*``.

    Raises:
        UsageError: an SK-ResNet of timm's that no network of excite's can hold.
    """
    tensors = content.tensors
    if "conv_stem.weight" in tensors and "blocks.0.0.conv_dw.weight" in tensors:
        steps = _INVERTED if any(".conv_pwl." in name for name in tensors) else _SEPARABLE
        return Converted("timm MobileNet", {_mobilenet_name(name, steps): t for name, t in tensors.items()})
    if any(re.search(r"\.conv1\.paths\.", name) for name in tensors):
        raise UsageError(
            "these are the weights of timm's skresnet18, skresnet34 or skresnet50: there each branch of a selective "
            "kernel sees half of the channels, and excite has no such network; skresnext50_32x4d fits "
            "sknet50:pool=padded"
        )
    if any(re.search(r"layer\d\.\d+\.conv2\.paths\.", name) for name in tensors):
        return Converted("timm SK-ResNeXt", with_linear_layers(renamed(tensors, _SK)), TODAY)
    if any(re.fullmatch(r"layer\d\.\d+\.se\.fc1\.weight", name) for name in tensors):
        return Converted("timm SE-ResNet", with_linear_layers(renamed(tensors, _SE)), TODAY)
    return None


_SE = {r"\.se\.fc1\.": ".se.reduce.", r"\.se\.fc2\.": ".se.expand."}
_SK = {
    r"^(layer\d\.\d+)\.conv([13])\.conv\.": r"\1.conv\2.",
    r"^(layer\d\.\d+)\.conv([13])\.bn\.": r"\1.bn\2.",
    r"\.conv2\.paths\.(\d)\.conv\.": r".conv2.branches.\1.0.",
    r"\.conv2\.paths\.(\d)\.bn\.": r".conv2.branches.\1.1.",
    r"\.conv2\.attn\.fc_reduce\.": ".conv2.reduce.",
    r"\.conv2\.attn\.bn\.": ".conv2.norm.",
    r"\.conv2\.attn\.fc_select\.": ".conv2.expand.",
}


_SEPARABLE = {"conv_dw": "conv1", "bn1": "bn1", "conv_pw": "conv2", "bn2": "bn2"}
_INVERTED = {
    "conv_pw": "expand.conv",
    "bn1": "expand.bn",
    "conv_dw": "conv1",
    "bn2": "bn1",
    "conv_pwl": "conv2",
    "bn3": "bn2",
}
_ENDS = {"conv_stem": "conv1", "conv_head": "conv2", "classifier": "fc"}


def _mobilenet_name(name: str, steps: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)", module)
    if not match:
        return f"{_ENDS.get(module, module)}.{kind}"
    stage = int(match[1]) + 1
    # The first block of V2 has no expansion, and so V1's names.
    inside = _SEPARABLE if stage == 1 else steps
    return f"layer{stage}.{match[2]}.{inside.get(match[3], match[3])}.{kind}"

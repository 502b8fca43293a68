"""torchvision's names. Its ResNets have excite's own; its MobileNet V2 and ShuffleNet V2 count their layers."""

from __future__ import annotations

import re

from excite.networks.catalog import CATALOG
from excite.networks.tables import MobileNetV2Table
from excite.weights.base import Content, Converted


def torchvision_layout(content: Content) -> Converted | None:
    """MobileNet V2 and ShuffleNet V2 as in torchvision's state dicts."""
    tensors = content.tensors
    if "features.18.1.weight" in tensors:
        return Converted("torchvision MobileNet V2", {_mobilenet_name(key): t for key, t in tensors.items()})
    if "stage2.0.branch1.0.weight" in tensors:
        return Converted("torchvision ShuffleNet V2", {_shufflenet_name(key): t for key, t in tensors.items()})
    return None


def _mobilenet_blocks() -> list[str]:
    """The blocks of MobileNet V2 in order, such as ``layer2.0``; torchvision numbers them 1 to 17."""
    table = CATALOG["mobilenet_v2"].table
    assert isinstance(table, MobileNetV2Table)
    return [f"layer{stage}.{i}" for stage, row in enumerate(table.rows, start=1) for i in range(row[2])]


_BLOCKS = _mobilenet_blocks()
_FIRST_BLOCK = {"0.0": "conv1", "0.1": "bn1", "1": "conv2", "2": "bn2"}  # no expansion there
_BLOCK = {
    "0.0": "expand.conv",
    "0.1": "expand.bn",
    "1.0": "conv1",
    "1.1": "bn1",
    "2": "conv2",
    "3": "bn2",
}
_ENDS = {
    "features.0.0": "conv1",
    "features.0.1": "bn1",
    "features.18.0": "conv2",
    "features.18.1": "bn2",
    "classifier.1": "fc",
}


def _mobilenet_name(key: str) -> str:
    module, _, kind = key.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    match = re.fullmatch(r"features\.(\d+)\.conv\.([\d.]+)", module)
    steps = _FIRST_BLOCK if match and match[1] == "1" else _BLOCK
    if not match or not 1 <= int(match[1]) <= len(_BLOCKS) or match[2] not in steps:
        return key
    return f"{_BLOCKS[int(match[1]) - 1]}.{steps[match[2]]}.{kind}"


_BRANCHES = {
    "branch1.0": "shortcut.conv1",
    "branch1.1": "shortcut.bn1",
    "branch1.2": "shortcut.conv2",
    "branch1.3": "shortcut.bn2",
    "branch2.0": "conv1",
    "branch2.1": "bn1",
    "branch2.3": "conv2",
    "branch2.4": "bn2",
    "branch2.5": "conv3",
    "branch2.6": "bn3",
}
_STEPS = {"conv1.0": "conv1", "conv1.1": "bn1", "conv5.0": "conv2", "conv5.1": "bn2"}


def _shufflenet_name(key: str) -> str:
    module, _, kind = key.rpartition(".")
    match = re.fullmatch(r"stage(\d)\.(\d+)\.(branch\d\.\d)", module)
    if match and match[3] in _BRANCHES:
        return f"layer{int(match[1]) - 1}.{match[2]}.{_BRANCHES[match[3]]}.{kind}"
    return f"{_STEPS.get(module, module)}.{kind}"

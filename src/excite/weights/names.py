"""What layouts share: replacing parts of names, and 1×1 convolutions that are linear layers here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor


def renamed(tensors: Mapping[str, Tensor], replacements: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors, each name after all the replacements, from patterns to texts, in turn."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, text in replacements.items():
            name = re.sub(pattern, text, name)
        found[name] = tensor
    return found


def with_linear_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with the ``reduce`` and ``expand`` of units in two dimensions.

    Others write them as 1×1 convolutions on a map of one position, which are linear layers.
    """
    units = (".reduce.weight", ".expand.weight")
    return {
        name: tensor.flatten(1) if name.endswith(units) and tensor.dim() == 4 else tensor
        for name, tensor in tensors.items()
    }

"""Weights from plain state dicts: PyTorch's own files (zip or the older pickle) and safetensors.

The format is found by the content, not by the suffix. Pickles are opened with ``weights_only=True``, so a file
that would run code is refused.
"""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from excite.errors import ExciteError, UsageError

# Under these keys training scripts put the state dict, beside the optimiser and the rest; the first found counts.
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
# What wrappers of the network itself put in front of every name, such as DataParallel's.
_PREFIXES = ("module.", "_orig_mod.")
# Names that other authors gave to what torchvision (and we) call by another.
_ALIASES = {"linear.weight": "fc.weight", "linear.bias": "fc.bias"}


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a file of weights into a network, all of it or nothing.

    A state dict may sit under a key such as ``state_dict`` beside other things, and its names may carry the
    ``module.`` prefix of a parallel wrapper. ``linear.*`` is understood as the classifier ``fc.*`` where the
    network has no ``linear``.

    Raises:
        UsageError: the file is missing, or its tensors do not fit the network: the message names those that are
            missing, unexpected, or of another shape. The network is left as it was.
        ExciteError: the file is not a file of weights, is cut off, or would run code when opened.
    """
    path = Path(path)
    found = _our_names(read_state_dict(path), module)
    wanted = module.state_dict()
    problems = _mismatch(wanted, found)
    if problems:
        raise UsageError(f"The weights in {path} do not fit this network: {'; '.join(problems)}. Nothing was loaded.")
    module.load_state_dict({**wanted, **found})


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a file, on the CPU, by their names in the file (wrapping keys and prefixes removed).

    Raises:
        UsageError: there is no such file.
        ExciteError: as for :func:`load_weights`.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"The weights file {path} {what}; expected a .pth, .pt, .th or .safetensors file.")
    if not os.access(path, os.R_OK):
        raise ExciteError(f"The weights file {path} cannot be read: its permissions forbid it.")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    return _without_prefixes(_unwrapped(content, path))


def _is_safetensors(path: Path) -> bool:
    """A safetensors file opens with the length of a JSON header, 8 bytes, and that header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 100_000_000


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ExciteError(f"Cannot read the weights file {path}: it is cut off or damaged ({error}).") from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on old files; what matters becomes an error here
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a parser says of bytes it does not expect can be of any kind
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ExciteError(
                f"Refused to open the weights file {path}: it holds more than tensors and could run code; "
                "save the network's state_dict() alone, or as safetensors."
            ) from error
        raise ExciteError(
            f"Cannot read the weights file {path}: it is cut off, damaged, or no file of weights; "
            "expected a PyTorch state dict (.pth, .pt, .th) or safetensors."
        ) from error


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        if content and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
            return dict(content)
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    raise ExciteError(
        f"The weights file {path} holds no state dict: expected named tensors, alone or under one of the keys "
        f"{', '.join(_WRAPPERS)}."
    )


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        while all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _our_names(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    wanted = module.state_dict()
    renamed = {}
    for name, tensor in tensors.items():
        ours = _ALIASES.get(name, name)
        renamed[ours if name not in wanted and ours in wanted and ours not in tensors else name] = tensor
    return renamed


def _mismatch(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    # Batch norm's count of batches only matters to networks trained without momentum, and older files lack it.
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} (expected {tuple(wanted[name].shape)}, found {tuple(found[name].shape)})"
        for name in wanted
        if name in found and wanted[name].shape != found[name].shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of the wrong shape": shapes}
    return [f"{len(names)} {what}: {_listed(names)}" for what, names in groups.items() if names]


def _listed(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")

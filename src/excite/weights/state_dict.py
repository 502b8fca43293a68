"""PyTorch's own files (zip or the older pickle) and safetensors.

Pickles are opened with ``weights_only=True``, so a file that would run code is refused.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excite.errors import ExciteError

# Under these keys training scripts put the state dict, beside the optimiser and the rest; the first found counts.
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
# What wrappers of the network itself put in front of every name, such as DataParallel's.
_PREFIXES = ("module.", "_orig_mod.")


def is_safetensors(path: Path) -> bool:
    """Whether a file opens with the length of a JSON header, 8 bytes, and that header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 100_000_000


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file; they are views of the file where the system allows.

    Raises:
        ExciteError: the file is cut off or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _without_prefixes(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise ExciteError(f"Cannot read the weights file {path}: it is cut off or damaged ({error}).") from error


def read_torch(path: Path) -> dict[str, Tensor]:
    """The state dict in a PyTorch file, alone or under one of the usual keys, its wrappers' prefixes removed.

    Raises:
        ExciteError: the file is not a file of weights, is cut off, or would run code when opened.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as PyTorch itself tells
    if zipped:
        _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on old files; what matters becomes an error here
            if zipped:  # the tensors stay in the file until they are copied into the network
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                with _Bounded(io.FileIO(path)) as file:
                    content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a parser says of bytes it does not expect can be of any kind
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ExciteError(
                f"Refused to open the weights file {path}: it holds more than tensors and could run code; "
                "save the network's state_dict() alone, or as safetensors."
            ) from error
        raise ExciteError(_unreadable(path)) from error
    return _without_prefixes(_unwrapped(content, path))


class _Bounded(io.BufferedReader):
    """A file of which no more can be asked for than there is: a pickle may claim a text of gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def _check_zip(path: Path) -> None:
    """PyTorch never compresses what it saves; what is compressed may unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises nearly anything on bad input
        raise ExciteError(_unreadable(path)) from error
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ExciteError(
            f"Refused to open the weights file {path}: it unpacks to more than it holds, which no PyTorch file does."
        )


def _unreadable(path: Path) -> str:
    return (
        f"Cannot read the weights file {path}: it is cut off, damaged, or no file of weights; expected a "
        "PyTorch state dict (.pth, .pt, .th), safetensors, .caffemodel or MatConvNet's .mat."
    )


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
        while tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors

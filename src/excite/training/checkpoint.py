"""Checkpoints that survive ``kill -9``, a full disk and a flipped bit.

A checkpoint is one file of plain tensors and numbers (it loads with ``weights_only=True``) beside its SHA-256.
"""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from typing import Any

import torch

from excite.errors import ExciteError
from excite.files import sha256, write_atomically

log = logging.getLogger(__name__)


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``step-N.ckpt`` and its checksum, then remove all but the newest ``keep``.

    The old ones go only when the new one is safely on the disk.
    """
    path = write_atomically(folder / f"step-{step}.ckpt", lambda file: torch.save(state, file))
    write_atomically(_checksum(path), f"{sha256(path)}  {path.name}\n")
    for old in _all(folder)[keep:]:
        # The file first: a checksum without a file is harmless, a file without a checksum is not trusted.
        for leftover in (old, _checksum(old)):
            with contextlib.suppress(FileNotFoundError):
                leftover.unlink()
    return path


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None where there is none.

    A damaged one (its checksum differs or is missing) is passed over with a warning.

    Raises:
        ExciteError: there are checkpoints, but every one is damaged.
    """
    found = _all(folder)
    for path in found:
        checksum = _checksum(path)
        expected = checksum.read_text().split()[0] if checksum.is_file() and checksum.stat().st_size else None
        if expected == sha256(path):
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        log.warning("%s is damaged (its checksum does not fit); trying the one before", path)
    if found:
        raise ExciteError(f"Every checkpoint in {folder} is damaged: remove the folder to start afresh.")
    return None


def _all(folder: Path) -> list[Path]:
    steps = {path: re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in folder.glob("step-*.ckpt")}
    return sorted((p for p, m in steps.items() if m), key=lambda p: -int(p.stem.removeprefix("step-")))


def _checksum(path: Path) -> Path:
    return path.with_suffix(".ckpt.sha256")

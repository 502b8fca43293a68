from __future__ import annotations

import errno
import os

import pytest
import torch

from excite.errors import ExciteError
from excite.training import checkpoint


def _state(value: float) -> dict:
    return {"network": {"w": torch.full((3,), value)}, "position": {"step": int(value)}}


def test_the_newest_comes_back_and_old_ones_go(tmp_path) -> None:
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, _state(step), keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step-10.ckpt", "step-2.ckpt"]
    assert sorted(p.name for p in tmp_path.glob("*.sha256")) == ["step-10.ckpt.sha256", "step-2.ckpt.sha256"]
    newest = checkpoint.load_newest(tmp_path)
    assert newest is not None
    assert newest["position"]["step"] == 10
    assert torch.equal(newest["network"]["w"], torch.full((3,), 10.0))


@pytest.mark.parametrize("damage", ["flip", "cut", "no checksum", "empty checksum"])
def test_a_damaged_one_is_passed_over(tmp_path, damage) -> None:
    checkpoint.save(tmp_path, 1, _state(1), keep=3)
    path = checkpoint.save(tmp_path, 2, _state(2), keep=3)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "no checksum":
        path.with_suffix(".ckpt.sha256").unlink()
    else:
        path.with_suffix(".ckpt.sha256").write_bytes(b"")
    newest = checkpoint.load_newest(tmp_path)
    assert newest is not None
    assert newest["position"]["step"] == 1


def test_nothing_but_damage_is_an_error_and_nothing_is_nothing(tmp_path) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    checkpoint.save(tmp_path, 1, _state(1), keep=1).write_bytes(b"")
    with pytest.raises(ExciteError, match="damaged"):
        checkpoint.load_newest(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch) -> None:
    checkpoint.save(tmp_path, 1, _state(1), keep=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExciteError, match="disk is full"):
        checkpoint.save(tmp_path, 2, _state(2), keep=1)
    monkeypatch.undo()
    newest = checkpoint.load_newest(tmp_path)
    assert newest is not None
    assert newest["position"]["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1.ckpt", "step-1.ckpt.sha256"]

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from excite.errors import ExciteError
from excite.files import check_writable, sha256, write_atomically, write_json


def test_text_bytes_and_writers_arrive_whole(tmp_path) -> None:
    assert write_atomically(tmp_path / "a" / "b.txt", "ü").read_bytes() == "ü".encode()
    assert write_atomically(tmp_path / "c", b"\0\1").read_bytes() == b"\0\1"
    assert write_atomically(tmp_path / "d", lambda file: file.write(b"x" * 10)).read_bytes() == b"x" * 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c", "d"]


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_no_space_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch, fails) -> None:
    path = write_atomically(tmp_path / "file", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails == "write":
        content = lambda file: full()  # noqa: E731
    else:
        content = "new"
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(ExciteError, match="disk is full"):
        write_atomically(path, content)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path) -> None:
    path = write_atomically(tmp_path / "file", "old")

    def broken(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, broken)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExciteError, match="Cannot write"):
        write_atomically(tmp_path / "file" / "below", "x")


def test_what_can_be_written_is_known_before(tmp_path) -> None:
    check_writable(tmp_path / "a" / "b" / "map.png")
    path = write_atomically(tmp_path / "a" / "file", "old")
    check_writable(path)
    assert path.read_text() == "old"
    assert sorted(p.name for p in path.parent.iterdir()) == ["b", "file"]
    assert not list((path.parent / "b").iterdir())
    for wrong in (path / "below", path.parent, path.with_name("x" * 300)):
        with pytest.raises(ExciteError, match="Cannot write") as caught:
            check_writable(wrong)
        assert str(wrong) in str(caught.value)


def test_json_refuses_what_json_cannot_hold(tmp_path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_sha256_is_that_of_hashlib(tmp_path) -> None:
    content = os.urandom(3_000_000)
    assert sha256(write_atomically(tmp_path / "x", content)) == hashlib.sha256(content).hexdigest()

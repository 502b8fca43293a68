"""Fetching from a real HTTP server on this machine that speaks like the hub, and like a plain one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import safetensors.torch
import torch

from excite.errors import ExciteError, UsageError
from excite.preprocessing import Preprocessing
from excite.weights import fetch as fetching
from excite.weights.fetch import fetch, place, resolve
from excite.weights.published import ByHand, Hub, Published, Url, known_preprocessing

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = safetensors.torch.save({"fc.weight": torch.arange(300_000.0).reshape(10, -1)})
SHA = hashlib.sha256(CONTENT).hexdigest()
CONFIG = b'{"pretrained_cfg": {"input_size": [3, 160, 160], "crop_pct": 1.0, "interpolation": "bilinear"}}'
PHOTO = Preprocessing(224, (0.5,) * 3, (0.5,) * 3, 256)


@dataclass
class Answer:
    """What the server has at a path."""

    content: bytes
    sha: str | None = None  # what the hub says of it; by default what it is
    cut: int | None = None  # send only so many bytes
    announce: bool = True
    status: int = 200
    pause: float = 0.0  # between two halves


@dataclass
class Server:
    """A running server, what it has and what it was asked."""

    url: str
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, body: bool) -> None:
            running.asked.append(f"{self.command} {self.path}")
            path, answer = self.path, running.answers.get(self.path.replace(COMMIT, "main"))
            if answer is None or answer.status != 200:
                self.send_response(answer.status if answer else 404)
                self.send_header("Content-Length", "0")
                if "/resolve/" in path and answer is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                return
            sha = answer.sha or hashlib.sha256(answer.content).hexdigest()
            large = "/resolve/" in path and not path.endswith(".json")
            # Like the hub, which keeps large files elsewhere, under their SHA-256.
            self.send_response(302 if large else 200)
            if large:
                running.answers[f"/cdn/{sha}"] = answer
                self.send_header("Location", f"{running.url.replace('127.0.0.1', 'localhost')}/cdn/{sha}")
                self.send_header("X-Linked-Etag", f'"{sha}"')
                self.send_header("X-Linked-Size", str(len(answer.content)))
            if "/resolve/" in path:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", '"' + hashlib.sha1(answer.content).hexdigest() + '"')
            if large:
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if answer.announce:
                self.send_header("Content-Length", str(len(answer.content)))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            if body:
                content = answer.content[: answer.cut]
                half = len(content) // 2
                self.wfile.write(content[:half])
                self.wfile.flush()
                time.sleep(answer.pause)
                with contextlib.suppress(ConnectionError):  # whoever asked has gone
                    self.wfile.write(content[half:])
                if answer.cut is not None or not answer.announce:
                    self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    running = Server(f"http://127.0.0.1:{httpd.server_address[1]}")
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield running
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def caches(server, tmp_path, monkeypatch) -> Path:
    """The caches of excite and of the hub below ``tmp_path``, and the hub is our server."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("EXCITE_CACHE", str(tmp_path / "excite"))
    monkeypatch.setattr(hub, "ENDPOINT", server.url)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    return tmp_path


def _on_hub(server: Server, **answer: object) -> Published:
    server.answers["/timm/tiny.test/resolve/main/model.safetensors"] = Answer(CONTENT, **answer)
    return Published("resnet18", "imagenet", Hub("timm/tiny.test"), PHOTO)


def _at_address(server: Server, digits: str | None = SHA[:8], **answer: object) -> Published:
    name = f"/files/tiny-{digits}.pth" if digits else "/files/tiny.pth"
    server.answers[name] = Answer(CONTENT, **answer)
    return Published("resnet18", "imagenet", Url(server.url + name), PHOTO)


SOURCES = pytest.mark.parametrize("source", [_on_hub, _at_address], ids=["hub", "address"])


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".TAG")]


# --- what goes well ------------------------------------------------------------------------------------------------


@SOURCES
def test_a_file_is_fetched_once_and_then_used_without_any_request(server, source) -> None:
    published = source(server)
    path = fetch(published)
    assert path.read_bytes() == CONTENT
    assert server.asked
    server.asked.clear()
    fetching._sha256.cache_clear()
    assert fetch(published) == path
    assert server.asked == []


def test_the_hubs_configuration_comes_along_and_goes_before_ours(server) -> None:
    published = _on_hub(server)
    assert known_preprocessing(fetch(published)) is None
    other = Published("resnet18", "imagenet", Hub("timm/other.test"), PHOTO)
    server.answers["/timm/other.test/resolve/main/model.safetensors"] = Answer(CONTENT)
    server.answers["/timm/other.test/resolve/main/config.json"] = Answer(CONFIG)
    path = fetch(other)
    assert known_preprocessing(path).size == 160


def test_an_address_without_a_length_or_a_checksum_is_fetched_with_a_word(server, caplog) -> None:
    path = fetch(_at_address(server, announce=False))
    assert path.read_bytes() == CONTENT
    assert not caplog.records
    assert fetch(_at_address(server, digits=None)).read_bytes() == CONTENT
    assert "no checksum" in caplog.text


@SOURCES
def test_a_file_that_was_brought_by_hand_is_used(server, source) -> None:
    published = source(server)
    place(published).parent.mkdir(parents=True)
    place(published).write_bytes(CONTENT)
    assert fetch(published).read_bytes() == CONTENT
    assert server.asked == []


def test_a_path_goes_before_a_tag_and_an_unknown_one_is_told(server, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("imagenet").mkdir()  # a folder of data is in nobody's way
    published = _at_address(server)
    monkeypatch.setattr(fetching, "require", lambda spec, tag: published)
    assert resolve("resnet18", "imagenet") == (fetch(published), published)
    Path("mine").write_bytes(CONTENT)
    assert resolve("resnet18", "mine") == (Path("mine"), None)
    for missing in ("nowhere.pth", "no/where", Path("nowhere")):
        with pytest.raises(UsageError, match="does not exist"):
            resolve("resnet18", missing)
    with pytest.raises(UsageError, match="is a folder"):
        resolve("resnet18", Path("imagenet"))
    monkeypatch.undo()
    with pytest.raises(UsageError, match="did you mean 'imagenet'"):
        resolve("resnet18", "imagnet")


# --- what goes wrong -----------------------------------------------------------------------------------------------


@SOURCES
def test_another_content_is_refused_and_not_kept(server, source, caches) -> None:
    published = source(server)
    next(iter(server.answers.values())).sha = SHA
    next(iter(server.answers.values())).content = CONTENT[:-1] + b"x"
    with pytest.raises(ExciteError, match="SHA-256"):
        fetch(published)
    assert _files(caches / "excite") == []
    assert [path for path in _files(caches / "hub") if path.stat().st_size > 100] == []
    _on_hub(server)
    _at_address(server)
    assert fetch(published).read_bytes() == CONTENT, "tried again, the right one is taken"


@SOURCES
def test_a_body_that_breaks_off_is_told_and_not_kept(server, source, caches, monkeypatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the hub's client waits between its attempts
    with pytest.raises(ExciteError, match=r"Could not fetch .*Download http.* and put it at ") as caught:
        fetch(source(server, cut=1000))
    assert "\n" not in str(caught.value)
    assert [path for path in _files(caches) if path.stat().st_size > 100] == []


@SOURCES
@pytest.mark.parametrize("status", [404, 403, 503])
def test_an_answer_that_is_no_file_is_told(server, source, caches, status) -> None:
    with pytest.raises(ExciteError, match=f"the server answered {status}.*put it at {caches / 'excite'}"):
        fetch(source(server, status=status))


@SOURCES
def test_no_server_is_told_at_once(server, source, caches, monkeypatch) -> None:
    closed = "http://127.0.0.1:9"  # the port that discards, where nobody listens
    monkeypatch.setattr(hub, "ENDPOINT", closed)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/resolve/{revision}/{filename}")
    published = source(server)
    if isinstance(published.where, Url):
        published = Published("resnet18", "imagenet", Url(f"{closed}/tiny-{SHA[:8]}.pth"), PHOTO)
    begin = time.monotonic()
    with pytest.raises(ExciteError, match=r"refused.*put it at"):
        fetch(published)
    assert time.monotonic() - begin < 10


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(server, monkeypatch) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    with pytest.raises(ExciteError, match="no answer in time"):
        fetch(_at_address(server, pause=1.0))


def test_more_than_any_file_of_weights_is_refused(server, monkeypatch) -> None:
    monkeypatch.setattr(fetching, "LARGEST", 1000)
    for announce in (True, False):
        with pytest.raises(ExciteError, match="bytes"):
            fetch(_at_address(server, announce=announce))


def test_only_http_is_fetched(tmp_path) -> None:
    (tmp_path / f"tiny-{SHA[:8]}.pth").write_bytes(CONTENT)
    local = Url(f"file://{tmp_path}/tiny-{SHA[:8]}.pth")
    with pytest.raises(ExciteError, match="http"):
        fetch(Published("resnet18", "imagenet", local, PHOTO))


def test_offline_mode_is_obeyed(server, monkeypatch) -> None:
    published = _on_hub(server)
    path = fetch(published)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert fetch(published) == path
    other = Published("resnet18", "imagenet", Hub("timm/other.test"), PHOTO)
    with pytest.raises(ExciteError, match="offline"):
        fetch(other)


def test_what_can_only_be_had_by_hand_says_where(caches) -> None:
    published = Published("sknet50", "imagenet", ByHand("https://example.org/page", "sk.caffemodel"), PHOTO)
    with pytest.raises(ExciteError, match=f"https://example.org/page.*{caches / 'excite' / 'sk.caffemodel'}"):
        fetch(published)
    place(published).parent.mkdir()
    place(published).write_bytes(b"weights")
    assert fetch(published) == place(published)


def test_a_wrong_file_at_the_place_is_told_and_left(server) -> None:
    published = _at_address(server)
    place(published).parent.mkdir(parents=True)
    place(published).write_bytes(b"something else")
    with pytest.raises(ExciteError, match="is not the published file"):
        fetch(published)
    assert place(published).read_bytes() == b"something else"


def test_a_damaged_file_in_the_hubs_cache_is_fetched_anew(server) -> None:
    published = _on_hub(server)
    path = fetch(published)
    path.resolve().write_bytes(CONTENT[:-1] + b"x")
    assert fetch(published).read_bytes() == CONTENT


@SOURCES
def test_a_cache_that_cannot_be_written_is_told(server, source, caches) -> None:
    (caches / "excite").write_text("a file where the folder should be")
    (caches / "hub").write_text("likewise")
    with pytest.raises(ExciteError, match=r"(excite|hub)"):
        fetch(source(server))


def test_killed_in_the_middle_nothing_half_is_left(server, caches) -> None:
    published = _at_address(server, pause=30.0)
    script = (
        "import sys; from excite.weights.fetch import fetch; from excite.weights.published import Published, Url\n"
        "fetch(Published('resnet18', 'imagenet', Url(sys.argv[1]), None))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, published.where.url])
    deadline = time.monotonic() + 60
    while not (left := list((caches / "excite").glob(".*.tmp"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(left) == 1
    assert not place(published).exists()
    server.answers[f"/files/{published.where.file}"].pause = 0.0
    os.utime(left[0], (0, 0))  # as if it had been killed long ago
    assert fetch(published).read_bytes() == CONTENT
    assert _files(caches / "excite") == [place(published)]

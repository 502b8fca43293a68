"""The studio: what its server answers to good and bad uploads, and its page in a real browser."""

import io
import json
import socket
import struct
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import uvicorn
from attentive import CLASSES, SPEC, attentive_run, write_image, write_statistics
from fastapi.testclient import TestClient
from PIL import Image

from chromium import chromium
from excite.errors import UsageError
from excite.verbs import studio_app
from excite.verbs.explain_image import Viewer
from excite.verbs.studio import studio

HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = attentive_run(tmp_path_factory.mktemp("runs") / "attentive")
    write_statistics(run)
    return run


@pytest.fixture(scope="module")
def viewer(run):
    return Viewer(run.folder)


@pytest.fixture
def client(viewer):
    return TestClient(studio_app.studio_app(viewer), base_url=HERE)


@pytest.fixture
def content(tmp_path):
    return write_image(tmp_path / "picture.png").read_bytes()


# --- the server ----------------------------------------------------------------------------------------------------


def test_an_image_gets_its_answer(client, viewer, content) -> None:
    pixels = viewer.decode(content)
    assert client.post("/look", content=content).json() == viewer.look(pixels)
    for scale, target in ((1.5, 2), (2, 0), (1, None)):
        question = {"scale": scale} | ({} if target is None else {"target": target})
        answer = client.post("/look", params=question, content=content)
        assert answer.status_code == 200
        assert answer.json() == viewer.look(pixels, scale, target)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_images_of_every_kind_are_taken(client, content, kind) -> None:
    written = io.BytesIO()
    Image.open(io.BytesIO(content)).save(written, kind)
    assert client.post("/look", content=written.getvalue()).status_code == 200


def png(width, height, data=b""):
    """A PNG that claims a size, whatever it holds."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


BROKEN = {
    "empty": (b"", 415, "the file is empty"),
    "text": (b"this is no picture", 415, "expected PNG, JPEG"),
    "zeros": (bytes(1000), 415, "expected PNG, JPEG"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", 415, "expected PNG, JPEG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", 415, "expected PNG, JPEG"),
    "no pixels": (png(20, 20), 415, "no image that can be read"),
    "too many pixels": (png(8000, 8000), 413, "64 million pixels, more than the 50 million"),
    "a bomb": (png(60000, 60000), 413, "more than the 50 million"),
    "no size": (png(0, 10), 415, "no image that can be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_is_told_and_the_next_one_answered(client, content, name) -> None:
    body, status, sentence = BROKEN[name]
    answer = client.post("/look", content=body)
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text
    assert client.post("/look", content=content).status_code == 200


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_an_image_that_was_cut_off_is_told(client, tmp_path, share) -> None:
    whole = write_image(tmp_path / "whole.jpg", (400, 300)).read_bytes()
    answer = client.post("/look", content=whole[: int(share * len(whole))])
    assert answer.status_code == 415
    assert "no image that can be read" in answer.json()["error"]


def test_noise_never_ends_the_server(client, content) -> None:
    draws = np.random.default_rng(0)
    for _ in range(60):
        spoilt = bytearray(content)
        for place in draws.integers(0, len(spoilt), 3):
            spoilt[place] = draws.integers(256)
        assert client.post("/look", content=bytes(spoilt)).status_code in (200, 413, 415)
    assert client.post("/look", content=content).status_code == 200


@pytest.mark.parametrize("told", [True, False])
def test_a_large_upload_is_refused_before_it_is_held(client, content, told, monkeypatch) -> None:
    monkeypatch.setattr(studio_app, "MAX_BYTES", 10_000_000)
    taken = []

    def blocks():
        for _ in range(20):
            taken.append(1)
            yield bytes(1_000_000)

    body = bytes(10_000_001) if told else blocks()
    answer = client.post("/look", content=body)
    assert answer.status_code == 413
    assert "larger than the 10 MB" in answer.json()["error"]
    assert client.post("/look", content=content + bytes(10_000_000 - len(content))).status_code == 200


@pytest.mark.parametrize("question", ["scale=0.5", "scale=5", "scale=nan", "scale=x", "target=-1", "target=x"])
def test_questions_that_make_no_sense_are_refused(client, content, question) -> None:
    answer = client.post(f"/look?{question}", content=content)
    assert answer.status_code == 400
    assert "The scale goes from 1 to 4" in answer.json()["error"]


def test_a_class_that_is_not_there_is_refused(client, content) -> None:
    answer = client.post("/look?target=3", content=content)
    assert answer.status_code == 400
    assert "tells 3 apart" in answer.json()["error"]


def test_other_hosts_and_other_pages_are_refused(client, content) -> None:
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "10.0.0.3:8000",
        "",
        "localhost.evil:80",
    ):
        for answer in (client.get("/", headers={"host": host}), client.get("/explain", headers={"host": host})):
            assert answer.status_code == 403
            assert "on this machine alone" in answer.json()["error"]
    for host in ("127.0.0.1", "127.0.0.1:8000", "localhost:8000", "LOCALHOST:8000"):
        assert client.get("/", headers={"host": host}).status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1:8000"):
        answer = client.post("/look", content=content, headers={"origin": origin})
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert client.post("/look", content=content, headers={"origin": HERE}).status_code == 200
    asked = client.options(
        "/look", headers={"origin": "http://evil.example", "access-control-request-method": "POST"}
    )
    assert not [name for name in asked.headers if name.startswith("access-control")]


def test_what_is_not_there_is_not_answered(client) -> None:
    for path in ("/studio.py", "/..%2fpyproject.toml", "/docs", "/openapi.json", "/look/more", "/%00"):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]
    assert client.get("/look").status_code in (404, 405)


def test_every_answer_says_what_a_browser_may_do_with_it(client, content) -> None:
    for answer in (client.get("/"), client.get("/studio.js"), client.post("/look", content=content)):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_questions_at_the_same_time_do_not_mix(client, viewer, tmp_path) -> None:
    images = [write_image(tmp_path / f"{seed}.png", seed=seed).read_bytes() for seed in range(4)]
    alone = [viewer.look(viewer.decode(image)) for image in images]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: client.post("/look", content=images[i % 4]).json(), range(12)))
    assert all(answer == alone[i % 4] for i, answer in enumerate(answers))


def test_a_failure_is_told_and_the_next_image_answered(client, viewer, content, monkeypatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(viewer, "look", lambda *_: [][0])
        answer = client.post("/look", content=content)
    assert answer.status_code == 500
    assert "the terminal says why" in answer.json()["error"]
    assert client.post("/look", content=content).status_code == 200


def test_nothing_that_is_uploaded_is_written(client, run, content, tmp_path, monkeypatch) -> None:
    def files():
        return {path: path.stat().st_mtime_ns for folder in (run.folder, tmp_path) for path in folder.rglob("*")}

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = files()
    client.post("/look", content=content)
    client.post("/look", content=content + bytes(3_000_000))
    client.post("/look", content=b"no picture")
    assert files() == before


def test_the_page_knows_the_network_and_escapes_its_classes(client, viewer) -> None:
    page = client.get("/").text
    about = json.loads(page.partition('<script id="about" type="application/json">')[2].partition("</script>")[0])
    assert about["network"] == SPEC
    assert about["classes"] == list(CLASSES)
    assert [(unit["name"], unit["kind"]) for unit in about["units"]] == [(g.name, g.kind) for g in viewer.gates]
    assert "9 squeeze-and-excitation + 9 selective kernel" in page
    assert "<b>&amp;" not in page
    assert "excite explain" in page  # how the report that is not there is made


def test_the_report_of_the_run_is_shown_where_there_is_one(client, report) -> None:
    assert client.get("/explain").text == report.read_text()
    assert "<iframe" in client.get("/").text
    kept = report.rename(report.with_suffix(".kept"))
    assert client.get("/explain").status_code == 404
    assert "<iframe" not in client.get("/").text
    kept.rename(report)


def test_ports_that_cannot_be_had_are_refused(run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another, or 0"):
            studio(run.folder, port=taken.getsockname()[1], browser=False)
    with pytest.raises(UsageError, match="port is 70000"):
        studio(run.folder, port=70000, browser=False)


@pytest.mark.parametrize("package", ["captum", "uvicorn", "fastapi"])
def test_a_package_that_is_missing_is_named(run, monkeypatch, package) -> None:
    monkeypatch.delitem(sys.modules, "excite.verbs.studio_app")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"needs the package {package}: pip install 'excite\[studio\]'"):
        studio(run.folder, browser=False)


# --- in a real browser ---------------------------------------------------------------------------------------------


@pytest.fixture
def served(run, monkeypatch):
    """The address of a studio that runs as a user starts it."""
    servers, told, real = [], [], uvicorn.Server
    ready = threading.Event()

    def remembered(config):
        servers.append(real(config))
        return servers[-1]

    def tell(address):
        told.append(address)
        ready.set()

    monkeypatch.setattr(uvicorn, "Server", remembered)
    thread = threading.Thread(target=studio, args=(run.folder,), kwargs={"browser": False, "ready": tell})
    thread.start()
    assert ready.wait(60)
    assert told[0].startswith("http://127.0.0.1:")
    yield told[0]
    servers[0].should_exit = True
    thread.join(30)
    assert not thread.is_alive()


DONE = "document.documentElement.dataset.state === 'done'"


def text(browser, selector):
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def scaled(browser, scale):
    browser.run(f"""(() => {{ const slider = document.getElementById("scale");
        slider.value = "{scale}"; slider.dispatchEvent(new Event("input")); }})()""")
    browser.wait(DONE)


def test_a_dropped_image_gets_its_answer_and_clicks_change_the_figures(served, viewer, tmp_path) -> None:
    file = write_image(tmp_path / "picture.png")
    look = viewer.look(viewer.decode(file.read_bytes()))
    with chromium(tmp_path) as browser:
        browser.open(served)
        assert browser.run("document.getElementById('excitation').hidden")
        browser.drop("#drop", file)
        browser.wait(DONE)
        assert text(browser, "#sentence").startswith(f"Most likely {look['class']}, ")
        said = browser.run("[...document.querySelectorAll('#predictions .name')].map((name) => name.textContent)")
        assert said == [row["class"] for row in look["predictions"]]

        # the last unit is drawn first; a click draws another
        first, last = look["excitation"][0], look["excitation"][-1]
        assert last["unit"] in text(browser, "#se-caption")
        assert browser.run("document.querySelectorAll('#gates circle').length") == len(last["gates"])
        browser.click("#se-units button")
        assert first["unit"] in text(browser, "#se-caption")
        assert browser.run("document.querySelectorAll('#gates circle').length") == len(first["gates"])
        assert len(first["gates"]) != len(last["gates"])
        most = browser.run("document.querySelector('#up th')?.textContent || 'none'")
        assert most == (str(first["up"][0]["channel"]) if first["up"] else "none")
        browser.move("#gates")
        middle = len(first["gates"]) // 2
        assert text(browser, "#se-hover").startswith((f"Channel {middle} of", f"Channel {middle - 1} of"))

        # another class
        other = look["predictions"][1]
        browser.click(f"#predictions button[data-class='{other['index']}']")
        browser.wait(
            DONE + f" && document.getElementById('se-caption').textContent.includes({json.dumps(other['class'])})"
        )
        assert browser.run("document.querySelector('#predictions [aria-pressed=true]').dataset.class") == str(
            other["index"]
        )

        # layers over the picture
        pixels = "document.getElementById('canvas').toDataURL()"
        plain = browser.run(pixels)
        browser.click("input[value=activation] + span")
        activation = browser.run(pixels)
        browser.click("input[value=field] + span")
        assert len({plain, activation, browser.run(pixels)}) == 3

        # another scale
        rows = "[...document.querySelectorAll('#kernel-rows tr')].map((row) => row.textContent)"
        before = browser.run(rows)
        assert len(before) == 9
        scaled(browser, 2)
        assert text(browser, "#scale-said") == "2.0×"
        assert browser.run(rows) != before
        assert browser.run("[...document.querySelectorAll('#fields figure')].map((one) => one.dataset.scale)") == [
            "1",
            "2",
        ]

        assert browser.problems == []
        assert browser.run("document.querySelectorAll('main b b, #predictions b').length") == 0  # names are text
        assert all(url.startswith((served, "data:", "blob:")) for url in browser.requested), browser.requested


def test_the_page_survives_what_is_no_picture(served, tmp_path) -> None:
    good = write_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "large.png").write_bytes(bytes(21_000_000))
    with chromium(tmp_path) as browser:
        browser.open(served)
        browser.drop("#drop", tmp_path / "bad.png")
        browser.wait("!document.getElementById('problem').hidden")
        assert "no image that can be read" in text(browser, "#problem")
        browser.drop("body", tmp_path / "large.png")
        assert "21.0 MB, more than the 20 MB" in text(browser, "#problem")
        browser.choose("#file", good)
        browser.wait("document.getElementById('sentence').textContent.startsWith('Most likely')")
        assert browser.run("document.getElementById('problem').hidden")
        assert browser.run("location.pathname") == "/"
        assert all("415" in problem for problem in browser.problems)  # the browser's own note of the refusal


@pytest.fixture
def report(run):
    """A report in the run's folder."""
    path = run.folder / "reports" / "explain.html"
    path.write_text("<!doctype html><title>x</title><p>what it learned")
    yield path
    path.unlink()


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_telephone_nothing_sticks_out(served, report, tmp_path, dark) -> None:
    with chromium(tmp_path) as browser:
        browser.open(served, 390, 844, dark=dark)
        browser.choose("#file", write_image(tmp_path / "picture.png"))
        browser.wait(DONE)
        assert browser.run("document.documentElement.scrollWidth") == 390
        shade = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, shade[4:-1].split(","))) < 200) == dark
        browser.run(
            "void document.getElementById('report').addEventListener('load', () => { window.framed = true; })"
        )
        browser.click("#tab-all")
        assert browser.run("document.getElementById('one').hidden")
        browser.wait("window.framed")
        assert browser.requested[-1] == f"{served}explain"
        browser.click("#tab-one")
        assert not browser.run("document.getElementById('one').hidden")
        assert browser.problems == []

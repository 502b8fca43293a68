"""The page of a search: whole in one file, with what was found as pictures."""

import base64
import io
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from excite.report.search import SIDE, legible, search_page


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.said = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.said.append(data.strip())

    def pictures(self):
        """The images of the page, decoded, in order."""
        sources = [attributes["src"] for tag, attributes in self.elements if tag == "img"]
        assert all(source.startswith(("data:image/jpeg;base64,", "data:image/png;base64,")) for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def colour(image):
    return np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0).round().tolist()


@pytest.fixture
def result(tmp_path):
    """A picture that is large, one that is small, a text with its picture, a text of its own."""
    Image.new("RGB", (1200, 600), (200, 30, 30)).save(tmp_path / "large.png")
    Image.new("L", (20, 40), 90).save(tmp_path / "small.png")
    hits = [
        (0.9, "image", tmp_path / "large.png", "a wide red field"),
        (0.5, "image", tmp_path / "small.png", None),
        (0.25, "text", tmp_path / "large.png", "red as far as one sees"),
        (-0.125, "text", None, 'no picture <script>alert(1)</script> & "quotes"'),
    ]
    return {
        "index": str(tmp_path / "index"),
        "query": {"text": "<b>red</b>"},
        "among": ["image", "text"],
        "items": 1234,
        "hits": [
            {"rank": i + 1, "score": score, "kind": kind, "path": path and str(path), "text": text}
            for i, (score, kind, path, text) in enumerate(hits)
        ],
        "embed_ms": 3.0,
        "search_ms": 12.34,
    }


def test_hits_are_shown_in_order_with_their_pictures(result) -> None:
    page = Page(search_page(result))
    large, small, again = page.pictures()
    assert large.size == again.size == (SIDE, SIDE // 2)
    assert small.size == (20, 40)
    assert np.abs(np.subtract(colour(large), (200, 30, 30))).max() <= 3
    assert colour(small) == [90, 90, 90]
    said = [part for part in page.said if part]
    wanted = ["0.900", "a wide red field", "large.png", "0.500", "small.png", "red as far as one sees", "0.250"]
    places = [said.index(part) for part in wanted]
    assert places == sorted(places)
    assert "−0.125" in said
    assert {"1,234 images and texts", "12.3 ms", "4 nearest"} <= set(said)
    bars = [attributes["style"] for tag, attributes in page.elements if tag == "i"]
    assert bars == ["width: 90.0%", "width: 50.0%", "width: 25.0%", "width: 0.0%"]


def test_the_picture_that_was_asked_for_is_shown(result, tmp_path) -> None:
    Image.new("RGB", (64, 64), (10, 200, 10)).save(tmp_path / "query.png")
    page = Page(search_page(result | {"query": {"image": str(tmp_path / "query.png")}}))
    assert colour(page.pictures()[0]) == [10, 200, 10]
    assert len(page.pictures()) == 4
    assert "What is nearest to query.png" in page.said


def test_what_others_wrote_stays_text_and_nothing_is_fetched(result) -> None:
    text = search_page(result)
    page = Page(text)
    assert not [tag for tag, _ in page.elements if tag in ("script", "b", "link", "iframe")]
    assert "“<b>red</b>”" in page.said
    assert 'no picture <script>alert(1)</script> & "quotes"' in page.said
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_a_picture_that_cannot_be_shown_is_told(result, tmp_path) -> None:
    (tmp_path / "large.png").unlink()
    (tmp_path / "small.png").write_bytes(b"no image")
    page = Page(search_page(result))
    assert page.pictures() == []
    assert page.said.count("is not there any more") == 2
    assert "cannot be read: not an image that can be read" in page.said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_file_is_not_waited_for(result, tmp_path) -> None:
    (tmp_path / "small.png").unlink()
    os.mkfifo(tmp_path / "small.png")
    assert "is not a file" in Page(search_page(result)).said


def test_style_is_in_the_head_and_names_stay_text(result, tmp_path) -> None:
    name = '"><img src=x onerror=alert(1)>.png'
    (tmp_path / "small.png").rename(tmp_path / name)
    result["hits"][1]["path"] = str(tmp_path / name)
    text = search_page(result)
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("style") == 1
    assert tags.index("style") < tags.index("main")
    assert len(page.pictures()) == 3
    assert name in page.said
    assert not [one for _, one in page.elements if "onerror" in one]


def test_what_steers_a_terminal_is_taken_out() -> None:
    assert legible("a\x1b[31mb\x07\r\n\tc\x9b") == "a�[31mb��\n\tc�"


def test_no_hits_make_a_page(result) -> None:
    assert "0 nearest" in Page(search_page(result | {"hits": []})).said

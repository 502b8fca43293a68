"""``excite index`` and ``excite search``: their options, what they print, their exit codes."""

import json
import sys

import pytest

from colour_embedder import ColourEmbedder, paint
from excite.cli import main
from excite.errors import UsageError
from excite.verbs import index as module


@pytest.fixture
def excite(monkeypatch, capsys):
    """The command line without a process of its own: its exit code and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["excite", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three pictures, texts for two, and a run."""
    (tmp_path / "run").mkdir()

    def open_retrieval(run, device):
        if str(run) != str(tmp_path / "run"):
            raise UsageError(f"{run} is not a run")
        return ColourEmbedder()

    monkeypatch.setattr(module, "RunEmbedder", open_retrieval)
    for name in ("red", "green", "blue"):
        paint(tmp_path / "in" / f"[{name}].png", name)
    (tmp_path / "in" / "texts.csv").write_text("file,text\n[red].png,a [red] thing\n[green].png,green\n")
    return tmp_path


def test_an_index_is_made_searched_and_added_to(excite, place) -> None:
    code, printed, _ = excite("index", place / "run", place / "in" / "texts.csv", "--out", place / "i")
    assert code == 0
    assert "4 added in" in printed
    assert "2 images and 2 texts" in printed
    code, printed, told = excite("index", place / "run", place / "in", "--out", place / "i", "--json")
    assert code == 0
    assert json.loads(printed) | {"seconds": 0} == {
        "index": str(place / "i"), "dim": 16, "images": 3, "texts": 2, "added": 1, "replaced": 0, "known": 4,
        "errors": [], "seconds": 0,
    }  # fmt: skip

    code, printed, _ = excite("search", place / "i", "--text", "red and green", "--top", 2)
    assert code == 0
    assert printed.index("[red].png") < printed.index("[green].png")
    assert "a [red] thing" in printed
    assert "[blue].png" not in printed
    assert "3 images searched in" in printed

    page = place / "pages" / "hits.html"
    code, printed, _ = excite("search", place / "i", "--image", place / "in" / "[red].png", "--json", "--page", page)
    assert code == 0
    result = json.loads(printed)
    assert [hit["text"] for hit in result["hits"]] == ["a [red] thing", "green"]
    assert result["page"] == str(page)
    assert page.read_text().startswith("<!doctype html>")

    (place / "run").rename(place / "moved")
    code, _, told = excite("search", place / "i", "--text", "red")
    assert (code, "--run" in told) == (2, True)
    (place / "moved").rename(place / "run")
    code, printed, _ = excite(
        "search", place / "i", "--text", "red", "--run", place / "run", "--among", "all", "--json"
    )
    assert [hit["kind"] for hit in json.loads(printed)["hits"]].count("text") == 2


def test_the_index_is_in_the_run_unless_it_is_said_where(excite, place) -> None:
    assert excite("index", place / "run", place / "in", "--dtype", "float16")[0] == 0
    assert excite("search", place / "run" / "index", "--text", "blue")[0] == 0


def test_texts_and_names_are_printed_as_they_are(excite, place) -> None:
    (place / "in" / "[red].png").rename(place / "in" / ":cat:[b].png")
    (place / "in" / "texts.csv").write_text("file,text\n:cat:[b].png,red :smile: [bold]x[/bold] \x1b[31mend\n")
    assert excite("index", place / "run", place / "in" / "texts.csv", "--out", place / ":dog: i")[0] == 0
    for option, query in (("--text", "red"), ("--image", place / "in" / ":cat:[b].png")):
        code, printed, _ = excite("search", place / ":dog: i", option, query)
        assert code == 0
        assert ":cat:[b].png" in printed
        assert "red :smile: [bold]x[/bold] �[31mend" in printed
        assert "\x1b" not in printed
    (place / "lines.txt").write_text("nothing\x1b[2J\nred")
    code, printed, told = excite("index", place / "run", place / "lines.txt", "--out", place / ":dog: i")
    assert code == 1
    assert ":dog: i --text" in printed
    assert "\x1b" not in told


def test_what_failed_makes_the_exit_code_one(excite, place) -> None:
    (place / "in" / "cut.png").write_bytes((place / "in" / "[red].png").read_bytes()[:60])
    code, printed, told = excite("index", place / "run", place / "in")
    assert code == 1
    assert "5 added" in printed
    assert "cut.png" in told
    assert "1 could not be indexed" in told
    (place / "lines.txt").write_text("\n".join(["red", *(f"nothing {i}" for i in range(30))]))
    code, _, told = excite("index", place / "run", place / "lines.txt")
    assert code == 1
    assert "30 could not be indexed (10 more are not shown)" in told


def test_wrong_usage_makes_it_two(excite, place) -> None:
    excite("index", place / "run", place / "in")
    made = place / "run" / "index"
    for arguments, said in (
        (("search", made), "give one of the two"),
        (("search", made, "--text", "red", "--image", place / "in" / "[red].png"), "give one of the two"),
        (("search", made, "--text", "red", "--top", 0), "--top"),
        (("search", made, "--text", "red", "--top", -3), "--top"),
        (("search", made, "--text", ""), "The text to search for is empty"),
        (("search", made, "--image", ""), "There is no image file"),
        (("search", made, "--text", "red", "--among", "sound"), "--among"),
        (("search", made, "--text", "red", "--run", place), "is not a run"),
        (("search", place, "--text", "red"), "is not an index"),
        (("index", place / "in", place / "in"), "is not a run"),
        (("index", place / "run", place / "none"), "There is no"),
    ):
        code, printed, told = excite(*arguments)
        assert (code, printed) == (2, "")
        assert said in told

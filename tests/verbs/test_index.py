"""Indexes of pictures and texts: what is found, what is added, what survives."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from colour_embedder import COLOURS, ColourEmbedder, paint
from excite.errors import ExciteError, UsageError
from excite.verbs import index as module
from excite.verbs.index import index
from excite.verbs.index_folder import IndexFolder, locked
from excite.verbs.search import OpenIndex, search

PICTURES = {
    "red.png": ["red"], "green.png": ["green"], "flag.png": ["black", "red", "yellow"],
    "sea/[blue].png": ["blue", "blue", "white"], "cow.jpg": ["white", "brown", "green"],
}  # fmt: skip
TEXTS = {
    "red.png": "All of it is red.", "flag.png": "Black, red and yellow", "sea/[blue].png": "blue sea, \"white\" foam",
    "cow.jpg": "a brown and white cow on green",
}  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures, with a table of texts beside it."""
    folder = tmp_path / "photos"
    for name, colours in PICTURES.items():
        paint(folder / name, *colours)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.doc").write_bytes(b"")
    lines = ['"photos/{}","{}"'.format(name, text.replace('"', '""')) for name, text in TEXTS.items()]
    (tmp_path / "table.csv").write_text("\n".join(["File,TEXT", *lines, ""]), encoding="utf-8-sig")
    return folder


@pytest.fixture
def embedder():
    return ColourEmbedder()


def found(result):
    """What was found, in order: the names of pictures, the words of texts."""
    return [Path(hit["path"]).name if hit["kind"] == "image" else hit["text"] for hit in result["hits"]]


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# --- finding -------------------------------------------------------------------------------------------------------


def test_pictures_are_found_by_text_and_texts_by_picture(tmp_path, photos, embedder) -> None:
    made = index(embedder, photos.parent / "table.csv", tmp_path / "i")
    assert made | {"seconds": 0} == {
        "index": str(tmp_path / "i"), "dim": 16, "images": 4, "texts": 4, "added": 8, "replaced": 0, "known": 0,
        "errors": [], "seconds": 0,
    }  # fmt: skip
    for query, name in (("red", "red.png"), ("the white sea is blue", "[blue].png"), ("yellow on black", "flag.png")):
        result = search(tmp_path / "i", text=query, run=embedder)
        assert found(result)[0] == name
        assert (result["among"], result["items"], len(result["hits"])) == (["image"], 4, 4)
        wanted = embedder.embed_texts([query])[0]
        scores = {name: cosine(wanted, embedder.embed_image_file(photos / name)) for name in TEXTS}
        for hit in result["hits"]:
            name = str(Path(hit["path"]).relative_to(photos))
            assert hit["score"] == pytest.approx(scores[name], abs=2e-6)
            assert hit["text"] == TEXTS[name]
        assert [hit["score"] for hit in result["hits"]] == sorted(
            (hit["score"] for hit in result["hits"]), reverse=True
        )
        assert [hit["rank"] for hit in result["hits"]] == [1, 2, 3, 4]
    result = search(tmp_path / "i", image=photos / "cow.jpg", run=embedder, top=2)
    assert result["query"] == {"image": str(photos / "cow.jpg")}
    assert found(result)[0] == TEXTS["cow.jpg"]
    assert len(result["hits"]) == 2
    assert result["hits"][0]["path"] == str(photos / "cow.jpg")
    assert search(tmp_path / "i", image=photos / "red.png", among="image", run=embedder)["hits"][0]["score"] == 1
    both = search(tmp_path / "i", text="red", among="all", run=embedder)
    assert (both["items"], both["among"], len(both["hits"])) == (8, ["image", "text"], 8)
    assert {hit["kind"] for hit in both["hits"][:2]} == {"image", "text"}


def test_folders_pictures_and_lines_are_indexed_too(tmp_path, photos, embedder) -> None:
    assert index(embedder, photos, tmp_path / "i")["images"] == 5
    result = search(tmp_path / "i", image=photos / "green.png", run=embedder)
    assert (result["among"], found(result)[0]) == (["image"], "green.png")  # there are no texts
    (tmp_path / "lines.txt").write_text("a red line\n\n  blue \na red line\n", encoding="utf-8")
    made = index(embedder, tmp_path / "lines.txt", tmp_path / "i")
    assert (made["images"], made["texts"], made["added"]) == (5, 2, 2)
    assert found(search(tmp_path / "i", image=photos / "red.png", run=embedder)) == ["a red line", "blue"]
    one = paint(tmp_path / "one.png", "yellow")
    assert index(embedder, one, tmp_path / "i")["added"] == 1
    assert found(search(tmp_path / "i", text="yellow", run=embedder))[0] == "one.png"


def test_a_table_within_the_folder_brings_its_texts(tmp_path, photos, embedder, caplog) -> None:
    (photos / "pairs.csv").write_text("file,text\nred.png,All of it is red.\n,a yellow text alone\n")
    (photos / "scores.csv").write_text("name,score\nred.png,3\n")
    with caplog.at_level("INFO"):
        made = index(embedder, photos, tmp_path / "i")
    assert (made["images"], made["texts"], made["errors"]) == (5, 2, [])
    assert "scores.csv is left out" in caplog.text
    assert "pairs.csv" not in caplog.text
    hit = search(tmp_path / "i", text="red", run=embedder)["hits"][0]
    assert (Path(hit["path"]).name, hit["text"]) == ("red.png", "All of it is red.")
    assert found(search(tmp_path / "i", image=photos / "red.png", run=embedder))[0] == "All of it is red."
    for name in photos.rglob("*.[pj]*g"):
        name.unlink()
    (photos / "pairs.csv").write_text("text\na blue text\n")
    assert index(embedder, photos, tmp_path / "texts")["texts"] == 1


def test_an_open_index_answers_again_with_and_without_faiss(tmp_path, photos, embedder) -> None:
    pytest.importorskip("faiss")
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    opened = OpenIndex(tmp_path / "i", embedder)
    other = OpenIndex(tmp_path / "i", embedder, faiss=True)
    for text in ("red", "green", "black and white"):
        for among in (None, "text", "all"):
            assert (
                opened.search(text=text, among=among, top=3)["hits"]
                == other.search(text=text, among=among, top=3)["hits"]
            )


def test_half_precision_is_chosen_once(tmp_path, photos, embedder) -> None:
    index(embedder, photos, tmp_path / "i", dtype="float16")
    paint(photos / "new.png", "grey")
    index(embedder, photos, tmp_path / "i")
    for name in ("vectors-1.npy", "vectors-2.npy"):
        assert np.load(tmp_path / "i" / name).dtype == np.float16
    assert found(search(tmp_path / "i", text="grey", run=embedder))[0] == "new.png"
    with pytest.raises(UsageError, match="stores float16, not float32"):
        index(embedder, photos, tmp_path / "i", dtype="float32")


# --- adding --------------------------------------------------------------------------------------------------------


def test_only_what_is_new_is_embedded_and_nothing_old_is_touched(tmp_path, photos, embedder) -> None:
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    before = content(tmp_path / "i")
    assert len(embedder.asked) == 8
    again = index(embedder, photos.parent / "table.csv", tmp_path / "i")
    assert (again["added"], again["known"]) == (0, 8)
    paint(photos / "night.png", "black")
    more = index(embedder, photos, tmp_path / "i")
    assert (more["added"], more["known"], more["images"], more["texts"]) == (2, 4, 6, 4)
    assert embedder.asked[8:] == ["green.png", "night.png"]
    after = content(tmp_path / "i")
    assert {name: after[name] for name in before if name != "index.json"} == {
        name: kept for name, kept in before.items() if name != "index.json"
    }
    assert found(search(tmp_path / "i", text="black", run=embedder))[:2] == ["night.png", "flag.png"]
    fresh = tmp_path / "fresh"
    index(embedder, photos, fresh)
    for text in COLOURS:
        old, new = (
            {hit["path"]: hit["score"] for hit in search(at, text=text, run=embedder)["hits"]}
            for at in (tmp_path / "i", fresh)
        )
        assert old == new


def test_a_picture_that_has_changed_takes_the_place_of_what_it_was(tmp_path, photos, embedder) -> None:
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    paint(photos / "red.png", "blue", size=(30, 30))
    made = index(embedder, photos, tmp_path / "i")
    assert (made["replaced"], made["added"], made["images"], made["known"]) == (1, 1, 5, 3)
    for top in (1, 5, 50):
        names = found(search(tmp_path / "i", text="blue", run=embedder, top=top))
        assert names[0] == "red.png"
        assert len(names) == len(set(names)) == min(top, 5)
    paint(photos / "red.png", "green", size=(31, 30))
    index(embedder, photos, tmp_path / "i")
    assert found(search(tmp_path / "i", text="green", run=embedder, top=2)) == ["green.png", "red.png"]
    assert len(found(search(tmp_path / "i", text="blue", run=embedder, top=50))) == 5


def test_a_text_that_comes_later_is_shown_with_its_picture(tmp_path, photos, embedder) -> None:
    index(embedder, photos, tmp_path / "i")
    assert {hit["text"] for hit in search(tmp_path / "i", text="red", run=embedder)["hits"]} == {None}
    made = index(embedder, photos.parent / "table.csv", tmp_path / "i")
    assert (made["replaced"], made["added"], made["images"]) == (4, 4, 5)
    shown = {hit["text"] for hit in search(tmp_path / "i", text="red", run=embedder)["hits"]}
    assert shown == {None, *TEXTS.values()}
    assert index(embedder, photos, tmp_path / "i")["known"] == 5  # a folder without texts does not take them away


def test_work_goes_on_where_it_was_interrupted(tmp_path, photos, embedder, monkeypatch) -> None:
    monkeypatch.setattr(module, "PART", 2)
    real = embedder.embed_image_file

    def interrupted(path):
        if len(embedder.asked) == 4:
            raise KeyboardInterrupt
        return real(path)

    embedder.embed_image_file = interrupted
    with pytest.raises(KeyboardInterrupt):
        index(embedder, photos, tmp_path / "i")
    assert len(search(tmp_path / "i", text="red", run=ColourEmbedder())["hits"]) == 4
    embedder.embed_image_file, first = real, list(embedder.asked)
    made = index(embedder, photos, tmp_path / "i")
    assert (made["known"], made["added"]) == (4, 1)
    assert sorted(embedder.asked) == sorted(Path(name).name for name in PICTURES)
    assert embedder.asked[:4] == first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_the_old_or_the_new(tmp_path, photos, embedder, monkeypatch) -> None:
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    paint(photos / "red.png", "blue", size=(30, 30))
    (photos / "more.txt").write_text("yellow\n")
    real, results = os.replace, []
    for fatal in range(1, 9):  # each file is put in place by one call: before the first, the second …
        child = os.fork()
        if not child:
            calls = iter(range(1, 99))

            def replace(source, target, fatal=fatal, calls=calls):
                if next(calls) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(source, target)

            os.replace = replace
            index(embedder, photos, tmp_path / "i")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        opened = OpenIndex(tmp_path / "i", embedder)
        names = found(opened.search(text="blue", top=50))
        assert len(names) == len(set(names))
        results.append((names[0], len(names)))
        if not os.WIFSIGNALED(status):
            break
    assert results == [("[blue].png", 4)] * 3 + [("red.png", 5)]
    folder = IndexFolder.open(tmp_path / "i")
    used = {name for part in folder.parts for name in (part.vectors, part.items)}
    assert {path.name for path in (tmp_path / "i").iterdir()} == {*used, "index.json", ".lock"}


def test_two_do_not_add_at_once(tmp_path, photos, embedder) -> None:
    pytest.importorskip("fcntl")
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    with locked(tmp_path / "i"), pytest.raises(UsageError, match="Another process is adding"):
        index(embedder, photos, tmp_path / "i")
    assert index(embedder, photos, tmp_path / "i")["added"] == 1


# --- what is left out ----------------------------------------------------------------------------------------------


def test_what_cannot_be_embedded_is_told_and_the_rest_goes_on(tmp_path, photos, embedder) -> None:
    (photos / "cut.png").write_bytes((photos / "red.png").read_bytes()[:50])
    with open(photos.parent / "table.csv", "a") as file:
        file.write("photos/gone.png,a green thing\nphotos/cut.png,red and cut\nphotos/green.png,about nothing\n")
    made = index(embedder, photos.parent / "table.csv", tmp_path / "i")
    told = {row.get("file") or row["text"]: row["error"] for row in made["errors"]}
    assert told.keys() == {str(photos / "gone.png"), str(photos / "cut.png"), "about nothing"}
    assert told[str(photos / "gone.png")] == "no such file or directory"
    assert (made["images"], made["texts"], made["added"]) == (5, 6, 11)
    assert "about nothing" not in found(search(tmp_path / "i", image=photos / "red.png", run=embedder))
    again = index(embedder, photos.parent / "table.csv", tmp_path / "i")
    assert (len(again["errors"]), again["added"]) == (3, 0)
    paint(photos / "cut.png", "red", "white")  # mended
    assert index(embedder, photos.parent / "table.csv", tmp_path / "i")["added"] == 1


def test_a_network_without_pictures_is_told_from_a_picture_that_has_gone(tmp_path, photos, embedder) -> None:
    real = embedder.embed_image_file

    def gone(path):
        if path.endswith("red.png"):
            (photos / "red.png").unlink()
            raise UsageError(f"There is no image file {path}.")
        return real(path)

    embedder.embed_image_file = gone
    made = index(embedder, photos, tmp_path / "i")
    assert (made["images"], [row["file"] for row in made["errors"]]) == (4, [str(photos / "red.png")])

    def none(path):
        raise UsageError("It takes no pictures.")

    embedder.embed_image_file = none
    with pytest.raises(UsageError, match="takes no pictures"):
        index(embedder, photos, tmp_path / "j")


def test_nothing_at_all_is_an_error(tmp_path, photos, embedder) -> None:
    (tmp_path / "lines.txt").write_text("about\nnothing\n")
    with pytest.raises(ExciteError, match=r"Nothing in .*lines\.txt could be indexed: about: A text names no colour"):
        index(embedder, tmp_path / "lines.txt", tmp_path / "i")
    with pytest.raises(UsageError, match="is empty: add to it"):
        search(tmp_path / "i", text="red", run=embedder)
    assert index(embedder, photos, tmp_path / "i")["images"] == 5


def test_numbers_that_are_none_are_not_stored(tmp_path, photos, embedder) -> None:
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    before = content(tmp_path / "i")
    embedder.embed_image_file = lambda path: np.full(16, np.nan, np.float32)
    with pytest.raises(ExciteError, match=r"no finite numbers for .*green\.png, where 16 numbers are expected"):
        index(embedder, photos, tmp_path / "i")
    embedder.embed_image_file = lambda path: np.zeros(15, np.float32)
    with pytest.raises(ExciteError, match=r"\(15,\) for"):
        index(embedder, photos, tmp_path / "i")
    assert content(tmp_path / "i") == before


# --- wrong usage ---------------------------------------------------------------------------------------------------


def test_another_network_is_refused(tmp_path, photos, embedder) -> None:
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    before = content(tmp_path / "i")
    for other in (ColourEmbedder(seed=1), ColourEmbedder(dim=12)):
        for call in (
            lambda other=other: index(other, photos, tmp_path / "i"),
            lambda other=other: search(tmp_path / "i", text="red", run=other),
        ):
            with pytest.raises(UsageError, match="was made by another network") as error:
                call()
            assert embedder.checksum[:12] in str(error.value)
            assert other.checksum[:12] in str(error.value)
        assert not other.asked
    assert content(tmp_path / "i") == before
    with pytest.raises(UsageError, match="none of a run"):
        search(tmp_path / "i", text="red")


def test_the_run_is_found_again_and_may_move(tmp_path, photos, embedder, monkeypatch) -> None:
    opened = []

    def open_retrieval(run, device):
        opened.append(str(run))
        return embedder

    monkeypatch.setattr(module, "RunEmbedder", open_retrieval)
    run = tmp_path / "run"
    run.mkdir()
    assert index(run, photos)["index"] == str(run / "index")
    assert search(run / "index", text="red")["hits"]
    assert opened == [str(run)] * 2
    moved = tmp_path / "moved"
    run.rename(moved)
    with pytest.raises(UsageError, match="is not there any more"):
        search(moved / "index", text="red")
    assert search(moved / "index", text="red", run=moved)["hits"]
    index(moved, photos.parent / "table.csv", moved / "index")
    assert search(moved / "index", text="red")["hits"]


def test_wrong_inputs_are_named(tmp_path, photos, embedder) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "columns.csv").write_text("fiel,label\na,b\n")
    (tmp_path / "fields.csv").write_text("file,text\na.png,one,two\n")
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    (tmp_path / "semicolons.csv").write_text("file;text\na.png;red\n", encoding="utf-8-sig")
    (tmp_path / "tabs.csv").write_text("file\ttext\na.png\tred\n")
    (tmp_path / "quotes.csv").write_text('file,text\na.png,red\nb.png,"red" and blue\n')
    (tmp_path / "wide.csv").write_text("file,text\na.png,red\n", encoding="utf-16")
    (tmp_path / "other.bin").write_bytes(b"")
    for path, kind, said in (
        (tmp_path / "none", UsageError, "There is no"),
        (tmp_path / "empty", UsageError, "holds no images"),
        (tmp_path / "blank.txt", UsageError, "nothing to be indexed"),
        (tmp_path / "latin.txt", ExciteError, "not in UTF-8"),
        (tmp_path / "columns.csv", UsageError, "did you mean 'fiel'"),
        (tmp_path / "fields.csv", UsageError, "Line 2 .* into quotes"),
        (tmp_path / "twice.csv", UsageError, "one of each"),
        (tmp_path / "semicolons.csv", UsageError, "It seems to have ';' between its columns: save it with commas"),
        (tmp_path / "tabs.csv", UsageError, "It seems to have tabs between its columns"),
        (tmp_path / "quotes.csv", ExciteError, r"quotes\.csv, line 3: ',' expected"),
        (tmp_path / "wide.csv", ExciteError, "not in UTF-8"),
        (Path(500 * "x"), UsageError, "There is no"),
        (tmp_path / "other.bin", UsageError, "cannot be indexed"),
    ):
        with pytest.raises(kind, match=said):
            index(embedder, path, tmp_path / "i")
    assert not (tmp_path / "i").exists()
    for call, said in (
        (lambda: index(embedder, photos), "say with out"),
        (lambda: index(embedder, photos, photos), "holds other things"),
        (lambda: index(embedder, photos, tmp_path / "blank.txt"), "is a file"),
        (lambda: index(embedder, photos, tmp_path / "i", dtype="float64"), "choose float32 or float16"),
        (lambda: index(tmp_path / "empty", photos, tmp_path / "i"), "is not a run"),
        (lambda: search(photos, text="red", run=embedder), "is not an index"),
    ):
        with pytest.raises(UsageError, match=said):
            call()


def test_wrong_searches_are_named(tmp_path, photos, embedder) -> None:
    index(embedder, photos, tmp_path / "i")
    (tmp_path / "dir.html").mkdir()
    for options, kind, said in (
        ({}, UsageError, "give one of the two"),
        ({"text": "red", "image": photos / "red.png"}, UsageError, "give one of the two"),
        ({"text": "  "}, UsageError, "is empty"),
        ({"text": "nothing"}, UsageError, "names no colour"),
        ({"image": photos / "none.png"}, UsageError, "There is no image file"),
        ({"image": photos / "notes.doc"}, ExciteError, "the file is empty"),
        ({"text": "red", "top": 0}, UsageError, "top is 0"),
        ({"text": "red", "among": "text"}, UsageError, "holds no texts"),
        ({"text": "red", "among": "sound"}, UsageError, "choose image, text, all"),
        ({"text": "red", "page": tmp_path}, UsageError, r"ends in \.html"),
        ({"text": "red", "page": photos / "red.png"}, UsageError, r"red\.png is no name of a page"),
        ({"text": "red", "page": tmp_path / "dir.html"}, ExciteError, "Cannot write"),
        ({"image": "a picture of " + 100 * "red "}, UsageError, "There is no image file a picture of red"),
    ):
        with pytest.raises(kind, match=said):
            search(tmp_path / "i", run=embedder, **options)


def changed_items(good, change):
    lines = [json.loads(line) | change for line in good["items-1.jsonl"].decode().splitlines()]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def stored(vectors):
    content = io.BytesIO()
    np.save(content, vectors)
    return content.getvalue()


def test_damaged_indexes_are_told(tmp_path, photos, embedder) -> None:
    made = tmp_path / "i"
    index(embedder, photos, made)
    good = content(made)
    settings = json.loads(good["index.json"])
    for name, wrong, said in (
        ("index.json", good["index.json"][:60], "index.json is damaged"),
        ("index.json", b"[]", "index.json is damaged"),
        ("index.json", json.dumps(settings | {"format": 2}).encode(), "later version"),
        ("index.json", json.dumps(settings | {"dtype": "int8"}).encode(), "index.json is damaged"),
        ("index.json", good["index.json"].replace(b'"count": 5', b'"count": 6'), "are 5, but index.json says 6"),
        ("vectors-1.npy", None, "vectors-1.npy is missing"),
        ("vectors-1.npy", good["vectors-1.npy"][:-8], "cut off"),
        ("items-1.jsonl", None, "items-1.jsonl"),
        ("items-1.jsonl", good["items-1.jsonl"][:-30], "items-1.jsonl is damaged"),
        ("items-1.jsonl", b"\xff" + good["items-1.jsonl"], "items-1.jsonl is damaged"),
        *(
            ("index.json", json.dumps(settings | wrong).encode(), "index.json is damaged")
            for wrong in (
                {"dim": 0},
                {"dim": "x"},
                {"dim": float("inf")},
                {"network": {"run": 5, "sha256": embedder.checksum}},
                {"network": {"run": None, "sha256": 5}},
                {"parts": settings["parts"] * 2},
                *(
                    {"parts": [settings["parts"][0] | part]}
                    for part in (
                        {"count": 0},
                        {"count": -5},
                        {"replaced": [5]},
                        {"replaced": [-1]},
                        {"kind": "sound"},
                    )
                ),
            )
        ),
        ("index.json", b"[" * 100_000, "index.json is damaged"),
        *(
            ("items-1.jsonl", changed_items(good, change), "items-1.jsonl is damaged")
            for change in (
                {"path": 5},
                {"path": None},
                {"path": "../../etc/passwd"},
                {"path": "/a\0b"},
                {"text": 7},
                {"more": 1},
            )
        ),
        ("vectors-1.npy", stored(np.full((5, 16), np.nan, np.float32)), "vectors-1.npy is damaged: .* not finite"),
        ("vectors-1.npy", stored(np.full((5, 16), 9, np.float32)), "vectors-1.npy is damaged: .* not of length 1"),
    ):
        (made / name).unlink()
        if wrong is not None:
            (made / name).write_bytes(wrong)
        with pytest.raises(ExciteError, match=said):
            search(made, text="red", run=embedder)
        if name != "vectors-1.npy":
            with pytest.raises(ExciteError, match=said):
                index(embedder, photos, made)
        (made / name).write_bytes(good[name])
    assert search(made, text="red", run=embedder)["hits"]


def test_nothing_is_added_to_an_index_that_has_lost_some(tmp_path, photos, embedder) -> None:
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    (tmp_path / "i" / "vectors-1.npy").unlink()
    before = content(tmp_path / "i")
    with pytest.raises(ExciteError, match=r"vectors-1\.npy is missing"):
        index(embedder, photos, tmp_path / "i")
    assert content(tmp_path / "i") == before


def test_faiss_tells_of_damage_too(tmp_path, photos, embedder) -> None:
    pytest.importorskip("faiss")
    index(embedder, photos, tmp_path / "i")
    for wrong, said in ((np.nan, "not finite"), (9, "not of length 1")):
        vectors = np.load(tmp_path / "i" / "vectors-1.npy")
        vectors[1] = wrong
        (tmp_path / "i" / "vectors-1.npy").write_bytes(stored(vectors))
        with pytest.raises(ExciteError, match=rf"vectors-1\.npy is damaged: .* {said}"):
            search(tmp_path / "i", text="red", run=embedder, faiss=True)


def test_a_picture_that_has_changed_keeps_its_text(tmp_path, photos, embedder) -> None:
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    paint(photos / "red.png", "blue", size=(30, 30))
    index(embedder, photos, tmp_path / "i")  # which gives no text
    hits = search(tmp_path / "i", text="blue", run=embedder)["hits"]
    assert (Path(hits[0]["path"]).name, hits[0]["text"]) == ("red.png", TEXTS["red.png"])
    (photos.parent / "table.csv").write_text("file,text\nphotos/red.png,It has become blue.\n")
    index(embedder, photos.parent / "table.csv", tmp_path / "i")
    assert search(tmp_path / "i", text="blue", run=embedder)["hits"][0]["text"] == "It has become blue."


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_file_is_not_read(tmp_path, photos, embedder) -> None:
    os.mkfifo(photos / "pipe.png")  # to read it would be to wait for ever
    (tmp_path / "rows.csv").write_text("file,text\nphotos/pipe.png,red\nphotos,green\na\0b.png,blue\n")
    made = index(embedder, tmp_path / "rows.csv", tmp_path / "i")
    assert [(Path(row["file"]).name, row["error"]) for row in made["errors"]] == [
        ("pipe.png", "not a file"), ("photos", "not a file"), ("a\0b.png", "no name of a file"),
    ]  # fmt: skip
    assert (made["images"], made["texts"]) == (0, 3)
    assert index(embedder, photos, tmp_path / "i")["images"] == 5  # the pipe is passed over
    (photos / "loop").symlink_to("loop")
    with pytest.raises(ExciteError, match=r"Cannot read .*photos"):
        index(embedder, photos, tmp_path / "i")


def test_paths_that_lead_elsewhere_give_nothing_away(tmp_path, photos, embedder) -> None:
    (tmp_path / "secret.txt").write_text("the secret is red")
    rows = tmp_path / "tables" / "rows.csv"
    rows.parent.mkdir()
    rows.write_text("file,text\n../secret.txt,red\n../photos/red.png,red\n")
    made = index(embedder, rows, tmp_path / "i")
    assert [row["file"] for row in made["errors"]] == [str(tmp_path / "secret.txt")]
    assert "not an image" in made["errors"][0]["error"]
    assert index(embedder, photos, tmp_path / "i")["known"] == 1  # one picture, however it is written
    result = search(tmp_path / "i", text="red", run=embedder, among="all", page=tmp_path / "page.html")
    assert "secret is" not in json.dumps(result) + (tmp_path / "page.html").read_text()


def test_names_may_be_of_any_bytes(tmp_path, embedder) -> None:
    if sys.platform != "linux":
        pytest.skip("names are text here")
    name = os.fsdecode(b"caf\xe9 \n\xff.png")
    paint(tmp_path / "in" / "a.png", "red").rename(tmp_path / "in" / name)
    index(embedder, tmp_path / "in", tmp_path / "i")
    result = search(tmp_path / "i", text="red", run=embedder, page=tmp_path / "page.html")
    assert found(result) == [name]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "data:image/png" in page
    assert "caf? \n?.png" in page
    assert index(embedder, tmp_path / "in", tmp_path / "i")["known"] == 1

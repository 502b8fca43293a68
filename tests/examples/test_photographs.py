"""The example as its reader runs it: the pairs written, a small network trained, an index made and asked."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from excite.data.crossmodal import load_crossmodal
from excite.training.recipe import load
from excite.verbs.index import index
from excite.verbs.search import OpenIndex, search
from excite.verbs.train import train

pytest.importorskip("skimage")

SCRIPT = Path(__file__).parents[2] / "examples" / "photographs.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example") / "album"
    done = run(folder)
    assert (done.returncode, done.stdout) == (0, f"18 pairs: {folder / 'pairs.csv'}\n")
    return folder


def test_every_picture_has_a_sentence_of_its_own(album):
    rows = list(csv.DictReader((album / "pairs.csv").open()))
    assert len({row["file"] for row in rows}) == len({row["text"] for row in rows}) == len(rows) == 18
    assert {path.name for path in album.iterdir()} == {"pairs.csv", *(row["file"] for row in rows)}
    for row in rows:
        assert min(Image.open(album / row["file"]).size) >= 150
    assert run(album).returncode == 0, "it may be written again"
    data = load_crossmodal(f"crossmodal:{album}", image_size=16, val_fraction=0)
    assert data.train is not None
    assert (len(data.train), data.val, data.test) == (18, None, None)
    assert (data.train.labels.sum(dim=1) == 2).all(), "what it shows, and of which kind that is"


def test_photographs_are_searched_by_text_and_by_picture(album, tmp_path):
    recipe = load("dscmr").replace(
        {
            "data": {"path": f"crossmodal:{album}", "val_fraction": 0.0, "image_size": 24, "scaling": "alike,each"},
            "network": {"spec": "dscmr:hidden=64,dim=32,image_dim=32", "image": "resnet20:width=0.5+se"},
            "trainer": {"epochs": 40, "batch_size": 18, "threads": 1, "patience": None},
        }
    )
    train(recipe, out=tmp_path / "run")
    made = index(tmp_path / "run", album / "pairs.csv", tmp_path / "index")
    assert (made["images"], made["texts"], made["errors"]) == (18, 18, [])
    rows = list(csv.DictReader((album / "pairs.csv").open()))
    opened = OpenIndex(tmp_path / "index", device="cpu")
    by_text = [opened.search(text=row["text"], top=3)["hits"] for row in rows]
    by_picture = [opened.search(image=album / row["file"], top=3)["hits"] for row in rows]
    for found, kind in ((by_text, "image"), (by_picture, "text")):
        assert {hit["kind"] for hits in found for hit in hits} == {kind}
        named = [{Path(hit["path"]).name for hit in hits} for hits in found]
        right = [row["file"] in names for row, names in zip(rows, named, strict=True)]
        assert sum(right) >= 12, "by chance it would be 3"
    result = search(tmp_path / "index", text="coins on a dark ground", page=tmp_path / "hits.html")
    assert (tmp_path / "hits.html").read_text().count("data:image/") == len(result["hits"]) == 10


def test_wrong_use_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "file")
    assert (done.returncode, "photographs: " in done.stderr, "Traceback" in done.stderr) == (1, True, False)

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from excite.data import Loader, load_data
from excite.errors import UsageError
from excite.verbs.predict import predict


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Test digits as files of every kind, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    split = load_data("digits").test
    assert split is not None
    for i in range(40):
        pixels = split.images[i][0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    grey = np.asarray(Image.open(folder / "00.png").convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "40-deep.png")
    Image.open(folder / "00.png").convert("CMYK").save(folder / "41-print.jpg", quality=95)
    good = io.BytesIO()
    Image.open(folder / "00.png").save(good, "JPEG")
    (folder / "42-cut.jpg").write_bytes(good.getvalue()[: len(good.getvalue()) // 2])
    (folder / "43-empty.png").write_bytes(b"")
    (folder / "44-text.png").write_text("not an image")
    (folder / "notes.txt").write_text("ignored")
    return folder


def test_predictions_are_those_of_the_network_on_the_same_pixels(run, pictures) -> None:
    rows = list(predict(run.folder, [pictures], top=10))
    assert len(rows) == 45
    split = load_data("digits").test
    assert split is not None
    trained = run.load()
    images, _, _ = next(iter(Loader(split, trained.preprocessing, 40, seed=0)))
    with torch.inference_mode():
        expected = trained.network(images).softmax(1)
    for row, probabilities in zip(rows[:40], expected, strict=True):
        found = {guess["class"]: guess["probability"] for guess in row["predictions"]}
        assert [found[str(i)] for i in range(10)] == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert row["predictions"][0]["class"] == str(int(probabilities.argmax()))


def test_other_kinds_of_files_are_read_and_broken_ones_reported(run, pictures) -> None:
    rows = {Path(row["file"]).name: row for row in predict(run.folder, [pictures])}
    first = rows["00.png"]["predictions"][0]
    deep = rows["40-deep.png"]["predictions"]
    assert deep[0]["class"] == first["class"]
    assert deep[0]["probability"] == pytest.approx(first["probability"], abs=0.02)
    assert "predictions" in rows["41-print.jpg"]
    for name in ("42-cut.jpg", "43-empty.png", "44-text.png"):
        assert rows[name]["error"]
    assert "notes.txt" not in rows


def _cli(run, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "excite", "predict", str(run.folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_format_says_the_same_and_a_broken_file_makes_the_exit_code_one(run, pictures) -> None:
    files = [str(pictures / "00.png"), str(pictures / "43-empty.png"), str(pictures / "01.png")]
    lines = _cli(run, *files, "--top", "2", "--format", "jsonl")
    assert lines.returncode == 1
    rows = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [row["file"] for row in rows] == files
    assert "error" in rows[1]
    whole = _cli(run, *files, "--top", "2", "--json")
    assert json.loads(whole.stdout) == {"predictions": rows}
    table = list(csv.DictReader(io.StringIO(_cli(run, *files, "--top", "2", "--format", "csv").stdout)))
    assert [row["rank"] for row in table] == ["1", "2", "", "1", "2"]
    assert table[0]["class"] == rows[0]["predictions"][0]["class"]
    assert _cli(run, files[0]).returncode == 0


def test_what_is_not_there_is_told_before_anything_is_done(run, tmp_path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        list(predict(run.folder, [tmp_path / "none.png"]))
    with pytest.raises(UsageError, match="holds no images"):
        list(predict(run.folder, [tmp_path]))
    with pytest.raises(UsageError, match="not a run"):
        list(predict(tmp_path, [tmp_path]))

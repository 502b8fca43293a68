from __future__ import annotations

import errno
import io
import json
import os
import signal
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from excite.cli import app
from excite.data.images import decode
from excite.data.shards_index import read_index
from excite.data.shards_tar import check_shards, index_shards
from excite.errors import ExciteError, UsageError
from excite.verbs import pack as module
from excite.verbs.pack import pack, parse_size
from shard_sets import content, tree

COUNTS = {"cat": 9, "dog": 7, "emu": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("set") / "photos"
    tree(root / "train", COUNTS)
    tree(root / "val", {"cat": 2, "dog": 2}, suffix=".jpg")
    return root


def members(folder: Path) -> list[tuple[str, bytes]]:
    """All files of all tars in a folder, as Python's own reader has them."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:") as archive:
            for one in archive:
                file = archive.extractfile(one)
                assert file is not None
                assert (one.mtime, one.uid, one.uname, one.mode) == (0, 0, "", 0o644)
                found.append((one.name, file.read()))
    return found


def test_every_file_is_packed_once_with_its_class_in_a_shuffled_order(tmp_path, photos) -> None:
    result = pack(photos, tmp_path / "s", shard_size="30kB")
    assert result["broken"] == []
    assert set(result["splits"]) == {"train", "val"}
    said = result["splits"]["train"]
    assert (said["images"], said["classes"]) == (17, 3)
    shards = sorted((tmp_path / "s/train").glob("*.tar"))
    assert said["shards"] == len(shards) > 3
    assert shards[0].name == "shard-000000.tar"
    assert said["bytes"] == sum(path.stat().st_size for path in shards)
    assert max(path.stat().st_size for path in shards) <= 30_000

    files = members(tmp_path / "s/train")
    assert [name for name, _ in files] == [f"{i:06d}.{kind}" for i in range(17) for kind in ("png", "cls")]
    original = {path.read_bytes(): path for path in (photos / "train").rglob("*.png")}
    classes = sorted(COUNTS)
    packed = [original[image].parent.name for _, image in files[::2]]
    assert len({image for _, image in files[::2]}) == 17
    assert [classes[int(label)] for _, label in files[1::2]] == packed
    assert packed != sorted(packed)

    index = read_index((tmp_path / "s/train/index.safetensors").read_bytes(), "")
    assert [shard.samples for shard in index.shards] == [len(members_of(path)) // 2 for path in shards]
    assert index.classes == tuple(classes)
    shard = index.shard()
    for i, name in enumerate(index.names):
        place = int(index.offset[i])
        held = shards[shard[i]].read_bytes()[place : place + int(index.size[i])]
        assert held == (photos / name).read_bytes()
        assert classes[index.label[i]] == name.split("/")[1]


def members_of(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


def test_webdataset_reads_them(tmp_path, photos) -> None:
    wds = pytest.importorskip("webdataset")
    pack(photos, tmp_path / "s", shard_size="40kB")
    urls = [str(path) for path in sorted((tmp_path / "s/train").glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert len(samples) == 17
    expected: dict[bytes, int] = {}
    for path in (photos / "train").rglob("*.png"):
        expected[np.asarray(Image.open(path)).tobytes()] = sorted(COUNTS).index(path.parent.name)
    assert {np.ascontiguousarray(image).tobytes(): label for image, label in samples} == expected


def test_a_tar_is_packed_as_the_folder_that_it_was_made_of(tmp_path, photos) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for path in sorted(photos.rglob("*")):
            archive.add(path, path.relative_to(photos), recursive=False)
    pack(photos, tmp_path / "a", shard_size="30kB")
    pack(tmp_path / "photos.tar", tmp_path / "b", shard_size="30kB")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_without_splits_the_shards_lie_in_the_folder_itself(tmp_path, photos) -> None:
    assert set(pack(photos / "train", tmp_path / "s")["splits"]) == {""}
    assert {path.name for path in (tmp_path / "s").iterdir()} == {".lock", "index.safetensors", "shard-000000.tar"}


def test_resized_images_are_pillow_s_and_smaller_ones_stay_as_they_are(tmp_path) -> None:
    root = tree(tmp_path / "set", {"large": 2}, size=(120, 90))
    tree(root, {"small": 1}, size=(60, 40))
    Image.open(root / "large/0.png").convert("LA").save(root / "large/grey.png")
    pack(root, tmp_path / "s", resize=40, quality=75)
    index = read_index((tmp_path / "s/index.safetensors").read_bytes(), "")
    files = [(name, file) for name, file in members(tmp_path / "s") if not name.endswith(".cls")]
    for name, (packed, file) in zip(index.names, files, strict=True):
        if "small" in name:
            assert file == (root / name).read_bytes()
            continue
        assert packed.endswith(".jpg")
        original = Image.open(root / name).convert("RGB")
        size = (40, 53) if original.width < original.height else (53, 40)  # 120 · 40 / 90 = 53.3
        expected = io.BytesIO()
        original.resize(size, Image.Resampling.BICUBIC).save(expected, "JPEG", quality=75)
        assert (decode(file) == decode(expected.getvalue())).all()


# --- cut off, and what is in the way --------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_it_goes_on_and_the_result_is_the_same_to_the_byte(tmp_path, photos) -> None:
    (photos / "train/dog/broken.png").write_bytes(b"no image")
    options = {"shard_size": "60kB", "resize": 60}
    whole = pack(photos, tmp_path / "whole", **options)
    expected = content(tmp_path / "whole")
    real, kept = os.replace, set()
    for fatal in range(1, 99):  # each file is put in place by one call: killed before the first, the second …
        out = tmp_path / f"cut-{fatal}"
        child = os.fork()
        if not child:
            calls = iter(range(1, 99))

            def replace(source, target, fatal=fatal, calls=calls):
                if next(calls) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(source, target)

            os.replace = replace
            pack(photos, out, **options)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        again = pack(photos, out, **options)
        assert content(out) == expected
        assert again["broken"] == whole["broken"]
        kept.add(again["kept"])
        if not killed:
            break
    (photos / "train/dog/broken.png").unlink()
    shards = sum(one["shards"] for one in whole["splits"].values())
    assert fatal > 2 * shards
    assert kept == set(range(shards + 1))


def test_a_finished_shard_that_has_changed_since_is_made_anew(tmp_path, photos, monkeypatch) -> None:
    pack(photos, tmp_path / "whole", shard_size="30kB")

    class Stop(Exception):
        pass

    def stopped(parts, notes):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "joined", stopped)
        with pytest.raises(Stop):
            pack(photos, tmp_path / "s", shard_size="30kB")
    second = tmp_path / "s/train/shard-000001.tar"
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    pack(photos, tmp_path / "s", shard_size="30kB")
    assert content(tmp_path / "s") == content(tmp_path / "whole")


def test_a_full_disk_is_one_sentence_and_the_work_goes_on_after_it(tmp_path, photos, monkeypatch) -> None:
    pack(photos, tmp_path / "whole", shard_size="30kB")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ExciteError, match="The disk is full"):
            pack(photos, tmp_path / "s", shard_size="30kB")
    assert pack(photos, tmp_path / "s", shard_size="30kB")["kept"] > 0
    assert content(tmp_path / "s") == content(tmp_path / "whole")


def test_other_settings_or_what_is_there_already_are_not_overwritten(tmp_path, photos) -> None:
    pack(photos, tmp_path / "s")
    before = content(tmp_path / "s")
    assert pack(photos, tmp_path / "s")["kept"] == 2
    with pytest.raises(UsageError, match="other data or settings"):
        pack(photos, tmp_path / "s", resize=30)
    (tmp_path / "t/train").mkdir(parents=True)
    (tmp_path / "t/train/shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(UsageError, match="not from here"):
        pack(photos, tmp_path / "t")
    assert content(tmp_path / "s") == before


def test_two_do_not_pack_at_once(tmp_path, photos) -> None:
    pytest.importorskip("fcntl")
    with module._alone(tmp_path / "s"), pytest.raises(UsageError, match="Another process is packing"):
        pack(photos, tmp_path / "s")


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256 * 10**6), ("1GiB", 2**30), ("1.5 kB", 1500), (4096, 4096), ("7b", 7)]
)
def test_sizes(text, size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": "many"}, "'many'"),
        ({"shard_size": 0}, "size is 0"),
        ({"resize": 0}, "resize is 0"),
        ({"resize": 9, "quality": 101}, "quality is 101"),
        ({"quality": 80}, "give resize too"),
    ],
)
def test_wrong_usage(tmp_path, photos, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        pack(photos, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_a_folder_without_images_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images in class folders"):
        pack(tmp_path / "empty", tmp_path / "s")
    with pytest.raises(UsageError, match="no folder or tar"):
        pack(tmp_path / "nowhere", tmp_path / "s")


# --- shards that are checked, and shards of others ------------------------------------------------------------------


def test_check_names_what_has_changed(tmp_path, photos) -> None:
    pack(photos, tmp_path / "s", shard_size="30kB")
    assert check_shards(tmp_path / "s") == []
    first, second, third = (tmp_path / f"s/train/shard-{i:06d}.tar" for i in range(3))
    held = bytearray(first.read_bytes())
    held[700] ^= 1
    first.write_bytes(held)
    second.write_bytes(second.read_bytes()[:-600])
    third.unlink()
    found = {Path(row["file"]).name: row["error"] for row in check_shards(tmp_path / "s")}
    assert found.keys() == {first.name, second.name, third.name}
    assert "checksum" in found[first.name]
    assert "cut off" in found[second.name]
    assert "no such file" in found[third.name]


def foreign(path: Path, samples: list[dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i, sample in enumerate(samples):
            for suffix, held in sample.items():
                one = tarfile.TarInfo(f"n/{i:04d}.{suffix}")
                one.size = len(held)
                archive.addfile(one, io.BytesIO(held))


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (70, 70), (value, value, value)).save(out, "PNG")
    return out.getvalue()


def test_shards_of_others_get_an_index(tmp_path, caplog) -> None:
    foreign(
        tmp_path / "a.tar",
        [
            {"png": png(0), "cls": b"3"},
            {"json": json.dumps({"label": 10, "caption": "x"}).encode(), "PNG": png(1)},
            {"txt": b"no image", "cls": b"1"},
            {"png": png(9)},
        ],
    )
    foreign(tmp_path / "b.tar", [{"cls": b"0\n", "seg.png": b"no", "png": png(2)}])
    index = index_shards(tmp_path)[""]
    assert index.classes == tuple(f"{i:02d}" for i in range(11))
    assert index.label.tolist() == [3, 10, 0]
    assert list(index.names) == ["a/n/0000.png", "a/n/0001.PNG", "b/n/0000.png"]
    for i, shard in enumerate(["a", "a", "b"]):
        place = int(index.offset[i])
        held = (tmp_path / f"{shard}.tar").read_bytes()[place : place + int(index.size[i])]
        assert held == png(i)
    assert "1 (no image), 1 (no label)" in caplog.text
    again = read_index((tmp_path / "index.safetensors").read_bytes(), "")
    assert (again.offset == index.offset).all()
    assert again.shards == index.shards
    assert [shard.sha256 for shard in index_shards(tmp_path, checksums=True)[""].shards] != ["", ""]
    assert check_shards(tmp_path) == []


def test_classes_of_others_shards(tmp_path) -> None:
    foreign(tmp_path / "train/a.tar", [{"png": png(0), "cls": b"emu"}, {"png": png(1), "cls": b"cat"}])
    foreign(tmp_path / "val/a.tar", [{"png": png(0), "cls": b"dog"}])
    found = index_shards(tmp_path)
    assert {index.classes for index in found.values()} == {("cat", "dog", "emu")}
    assert found["train"].label.tolist() == [2, 0]
    with pytest.raises(UsageError, match="'dog', which is not among"):
        index_shards(tmp_path, classes=["cat", "emu"])
    foreign(tmp_path / "val/a.tar", [{"png": png(0), "cls": b"2"}])
    with pytest.raises(UsageError, match="some are names"):
        index_shards(tmp_path)
    foreign(tmp_path / "train/a.tar", [{"png": png(0), "cls": b"2"}])
    with pytest.raises(UsageError, match="labels from 2 to 2, but 2 classes"):
        index_shards(tmp_path, classes=["cat", "emu"])
    foreign(tmp_path / "train/a.tar", [{"png": png(0), "txt": b"2"}])
    with pytest.raises(ExciteError, match="no samples with an image and a label"):
        index_shards(tmp_path)
    (tmp_path / "train/a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ExciteError, match="Cannot read the tar"):
        index_shards(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="holds no shards"):
        index_shards(tmp_path / "none")


# --- as a user sees it ----------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, photos) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["data", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout

    code, text = run()
    assert (code, "shards:DIR" in text) == (0, True)
    assert any(row["spec"] == "digits" for row in json.loads(run("--json")[1])["data"])
    code, text = run("pack", photos, tmp_path / "s", "--shard-size", "30kB", "--json")
    assert (code, json.loads(text)["splits"]["val"]["images"]) == (0, 4)
    code, text = run("pack", photos, tmp_path / "s", "--shard-size", "30kB")
    assert (code, "train: 17 images of 3 classes" in text, "shards of it before" in text) == (0, True, True)
    assert run("check", tmp_path / "s")[0] == 0
    (tmp_path / "s/val/shard-000000.tar").unlink()
    code, text = run("check", tmp_path / "s", "--json")
    assert (code, len(json.loads(text)["broken"])) == (1, 1)
    (tmp_path / "names.txt").write_text("cat\ndog\nemu\n")
    (tmp_path / "s/train/index.safetensors").unlink()
    code, text = run("index", tmp_path / "s/train", "--classes", tmp_path / "names.txt")
    assert (code, text.startswith("17 images of 3 classes")) == (0, True)


def test_what_is_broken_is_named_and_left_out_or_refused(tmp_path) -> None:
    root = tree(tmp_path / "set", {"cat": 5, "dog": 5})
    (root / "cat/1.png").write_bytes(b"")
    held = (root / "dog/2.png").read_bytes()
    (root / "dog/2.png").write_bytes(held[: len(held) // 2])
    result = pack(root, tmp_path / "s", shard_size="30kB")
    assert {row["file"] for row in result["broken"]} == {"cat/1.png", "dog/2.png"}
    assert result["splits"][""]["images"] == 8
    assert len(members(tmp_path / "s")) == 16
    with pytest.raises(ExciteError, match=r"1 image is broken: (cat/1|dog/2)\.png"):
        pack(root, tmp_path / "t", refuse_broken=True)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ExciteError, match="None of the images"):
        pack(root, tmp_path / "u")

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from excite.data import load_data
from excite.data.cifar import default_root
from excite.errors import ExciteError

RNG = np.random.default_rng(0)
CLASSES = [f"class {i}" for i in range(10)]
PER_BATCH = 30


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """A small archive laid out as the published one, with torchvision's checksums replaced by its own."""
    rows = {
        name: RNG.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8)
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    }
    files = {
        name: pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(PER_BATCH)]})
        for name, pixels in rows.items()
    }
    files["batches.meta"] = pickle.dumps({"label_names": CLASSES})
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    def md5(content: bytes) -> str:
        return hashlib.md5(content).hexdigest()

    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "tgz_md5", md5(path.read_bytes()))
    monkeypatch.setattr(kind, "train_list", [[n, md5(files[n])] for n in files if n.startswith("data")])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(files["batches.meta"])})
    return tmp_path, rows


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("way", ["root", "spec"])
def test_a_local_archive_needs_no_network(archive: tuple[Path, dict[str, np.ndarray]], way: str) -> None:
    root, rows = archive
    data = load_data("cifar10", root=root) if way == "root" else load_data(f"cifar10:{root}")
    assert data.classes == tuple(CLASSES)
    assert data.train is not None
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (5 * PER_BATCH, PER_BATCH)
    image, label = data.train.images[PER_BATCH + 3]
    assert torch.equal(image, torch.from_numpy(rows["data_batch_2"][3].reshape(3, 32, 32)))
    assert label == 3
    assert data.preprocessing.mean == (0.4914, 0.4822, 0.4465)
    assert data.augmentation.crop == "pad"


@pytest.mark.usefixtures("offline")
def test_validation_is_taken_from_training(archive: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, rows = archive
    data = load_data("cifar10", root=root, val_fraction=0.2)
    assert data.train is not None
    assert data.val is not None
    assert torch.bincount(data.val.labels).tolist() == [3] * 10
    assert len(data.train) == 120
    everything = np.concatenate([rows[f"data_batch_{i}"] for i in range(1, 6)])
    for split in (data.train, data.val):
        for i in (0, len(split) - 1):
            place = int(split.names[i].removeprefix("cifar10-"))
            image, label = split.images[i]
            assert torch.equal(image, torch.from_numpy(everything[place].reshape(3, 32, 32)))
            assert label == place % 10 == int(split.labels[i])


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_offline_it_is_said_where_to_put_the_file(tmp_path: Path, name: str) -> None:
    expected = rf"{name} is not in .*no network.*kriz/cifar-{name[5:]}-python\.tar\.gz.*{name}:FOLDER"
    with pytest.raises(ExciteError, match=expected):
        load_data(name, root=tmp_path / "empty")


@pytest.mark.usefixtures("offline")
def test_a_damaged_archive(archive: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, _ = archive
    path = root / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExciteError, match="could not be downloaded"):
        load_data("cifar10", root=root)


def test_where_downloads_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXCITE_DATA", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("EXCITE_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "excite" / "data"

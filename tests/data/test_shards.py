from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from excite.data import Augmentation, Loader, load_data
from excite.data.encoded import EncodedImages
from excite.data.names import Names
from excite.data.remote import RemoteShards
from excite.data.shards import LocalShards, ShardFiles, open_shards
from excite.data.shards_index import BrokenShardError, Shard, ShardIndex, joined, read_index
from excite.errors import ExciteError, UsageError
from excite.verbs.pack import pack
from shard_sets import tree

COUNTS = {"cat": 20, "dog": 14, "emu": 3}
RESIZED = Augmentation(crop="resized", flip=0.5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("set") / "photos"
    tree(root / "train", COUNTS)
    tree(root / "test", {"cat": 2, "dog": 2})
    return root


@pytest.fixture(scope="module")
def packed(tmp_path_factory, photos) -> Path:
    out = tmp_path_factory.mktemp("packed") / "s"
    pack(photos, out, shard_size="40kB")
    return out


@pytest.fixture
def shards(tmp_path, packed) -> Path:
    """Shards that a test may damage."""
    import shutil

    return Path(shutil.copytree(packed, tmp_path / "s"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EXCITE_DATA", str(tmp_path / "cache"))


def load(spec: object, **options: Any):
    return load_data(str(spec), **({"image_size": 32, "memory_limit": 0} | options))


def by_name(data, **options: Any) -> dict[str, bytes]:
    seen: dict[str, bytes] = {}
    for x, _, index in Loader(data.train, data.preprocessing, 12, seed=0, **options):
        for image, i in zip(x, index.tolist(), strict=True):
            seen[data.train.names[i]] = image.numpy().tobytes()
    return seen


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [0, 1 << 30])
@pytest.mark.parametrize("val_fraction", [0.0, 0.3])
def test_shards_hold_the_images_of_the_folder(packed, photos, memory_limit, val_fraction) -> None:
    options = {"memory_limit": memory_limit, "val_fraction": val_fraction}
    ours, theirs = load(f"shards:{packed}", **options), load(photos, **options)
    assert ours.classes == theirs.classes == ("cat", "dog", "emu")
    assert ours.preprocessing == theirs.preprocessing
    for split in ("train", "val", "test"):
        a, b = getattr(ours, split), getattr(theirs, split)
        if b is None:
            assert a is None
            continue
        assert isinstance(a.images, EncodedImages) == (memory_limit == 0)
        place = {name: i for i, name in enumerate(a.names)}
        assert place.keys() == set(b.names)
        for i, name in enumerate(b.names):
            assert torch.equal(a.images[place[name]][0], b.images[i][0])
            assert a.labels[place[name]] == b.labels[i] == a.images[place[name]][1]
    assert by_name(ours) == by_name(theirs)


def test_shards_without_splits_hold_out_what_the_folder_would(tmp_path, photos) -> None:
    pack(photos / "train", tmp_path / "s")
    ours, theirs = load(f"shards:{tmp_path / 's'}"), load(photos / "train")
    assert set(ours.test.names) == set(theirs.test.names)
    apart = load(f"shards:{tmp_path / 's'}", test=photos / "test")
    assert (len(apart.train), len(apart.test)) == (37, 4)
    other = load(photos, test=f"shards:{tmp_path / 's'}")
    assert (len(other.train), len(other.test)) == (37, 37)


def test_read_from_threads_forked_and_spawned_processes(packed) -> None:
    files = open_shards(str(packed), 1.0)["train"]
    expected = [files.read(i) for i in range(37)]
    found: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda: found.append([files.read(i) for i in range(37)])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    copy = pickle.loads(pickle.dumps(files))
    assert [copy.read(i) for i in range(37)] == expected
    if hasattr(os, "fork"):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(files.read, range(37)) == expected


def test_few_open_files_are_enough(packed, monkeypatch) -> None:
    from excite.data import shards

    monkeypatch.setattr(shards, "_OPEN", 1)
    files = open_shards(str(packed), 1.0)["train"]
    assert len(files.index.shards) > 3
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert len({files.read(i) for i in np.random.default_rng(0).permutation(37)}) == 37
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


# --- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("balanced", [False, True])
def test_no_image_is_lost_or_seen_twice_wherever_an_epoch_is_cut(packed, workers, world_size, balanced) -> None:
    data = load(f"shards:{packed}")

    def loader(rank: int) -> Loader:
        made = Loader(
            data.train,
            data.preprocessing,
            4,
            seed=1,
            augment=RESIZED,
            shuffle=True,
            workers=workers,
            rank=rank,
            world_size=world_size,
            balanced=balanced,
        )
        made.set_epoch(2)
        return made

    ranks = [list(loader(rank)) for rank in range(world_size)]
    order = Loader(data.train, data.preprocessing, 4, seed=1, shuffle=True, balanced=balanced)
    order.set_epoch(2)
    expected = order.order() % 37
    # All ranks' steps together walk along the one order, up to what does not divide.
    walked = [i for step in zip(*ranks, strict=True) for _, _, index in step for i in index.tolist()]
    assert walked == expected[: len(walked)].tolist()
    assert len(walked) == 37 // world_size * world_size
    if not balanced:
        assert len(set(walked)) == len(walked)
    steps = len(ranks[0])
    for cut in range(steps + 1) if not workers else (2,):  # processes take their time to start
        for rank in range(world_size):
            first = loader(rank)
            begun = list(islice(first, cut))
            rest = loader(rank)
            rest.load_state_dict(first.state_dict())
            for one, other in zip([*begun, *rest], ranks[rank], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- shards that are broken -----------------------------------------------------------------------------------------


def test_a_missing_and_a_short_shard_are_named_once_and_their_images_left_out(shards, caplog) -> None:
    index = read_index((shards / "train/index.safetensors").read_bytes(), "")
    (shards / "train/shard-000001.tar").unlink()
    short = shards / "train/shard-000002.tar"
    short.write_bytes(short.read_bytes()[:3000])
    left = {name for name, shard in zip(index.names, index.shard(), strict=True) if shard not in (1, 2)}
    data = load(f"shards:{shards}")
    for workers in (0, 2):
        assert set(by_name(data, shuffle=True, augment=RESIZED, workers=workers)) == left
    assert caplog.text.count("2 shards are broken") == 1
    assert caplog.text.count("shard-000001.tar (no such file or directory; it holds") == 1
    assert caplog.text.count("shard-000002.tar (it has been cut off: 3,000 bytes instead of") == 1
    with pytest.raises(ExciteError, match=r"2 shards are broken: .*shard-000001\.tar"):
        load(f"shards:{shards}", broken="refuse")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_cut_off_while_training_is_named_once(shards, caplog, workers) -> None:
    data = load(f"shards:{shards}")
    os.truncate(shards / "train/shard-000001.tar", 0)
    index = data.train.images.listing.source.index
    with caplog.at_level(logging.WARNING, "excite.data"):
        loader = Loader(data.train, data.preprocessing, 12, seed=0, shuffle=True, workers=workers)
        for epoch in range(2):
            loader.set_epoch(epoch)
            assert sum(len(x) for x, _, _ in loader) == 37 - index.shards[1].samples
    assert caplog.text.count("1 shard is broken and skipped") == 1
    assert caplog.text.count("shard-000001.tar") == 1
    data.train.images.refuse = True
    with pytest.raises(ExciteError, match="1 shard is broken"):
        list(Loader(data.train, data.preprocessing, 12, seed=0, shuffle=True, workers=workers))


def test_a_byte_that_has_changed_costs_the_one_image(shards, caplog) -> None:
    data = load(f"shards:{shards}")
    index = data.train.images.listing.source.index
    path = shards / "train" / index.shards[0].name
    held = bytearray(path.read_bytes())
    held[int(index.offset[1]) + int(index.size[1]) // 2] ^= 4
    path.write_bytes(held)
    assert set(index.names) - set(by_name(data)) == {index.names[1]}
    assert "its bytes in shard-000000.tar have changed" in caplog.text


def test_all_shards_missing_is_one_sentence(shards) -> None:
    for path in (shards / "train").glob("*.tar"):
        path.unlink()
    with pytest.raises(UsageError, match="None of the images tried"):
        load(f"shards:{shards}")


# --- the index ------------------------------------------------------------------------------------------------------


def index_of(**changes: Any) -> ShardIndex:
    values: dict[str, Any] = {
        "shards": (Shard("a.tar", 5000, "", 1), Shard("b.tar", 5000, "", 1)),
        "classes": ("x", "y"),
        "offset": np.array([512, 512]),
        "size": np.array([10, 4488]),
        "label": np.array([0, 1]),
        "crc": np.array([1, 2**32 - 1], dtype=np.uint32),
        "names": Names.of(["x/ä.jpg", "y/\udcff.jpg"]),
    }
    return ShardIndex(**(values | changes))


def test_an_index_comes_back_as_it_was_written_and_always_the_same(tmp_path) -> None:
    index_of(notes={"b": 1, "a": [["x", "y"]]}).write(tmp_path / "i")
    index_of(notes={"a": [["x", "y"]], "b": 1}).write(tmp_path / "j")
    assert (tmp_path / "i").read_bytes() == (tmp_path / "j").read_bytes()
    again = read_index((tmp_path / "i").read_bytes(), "")
    assert list(again.names) == ["x/ä.jpg", "y/\udcff.jpg"]
    assert again.crc.tolist() == [1, 2**32 - 1]
    assert again.notes == {"a": [["x", "y"]], "b": 1}
    assert again.shards == index_of().shards
    both = joined([again, again], {})
    assert list(both.names) == list(again.names) * 2
    assert both.shard().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shards": (Shard("../a.tar", 5000, "", 1), Shard("b.tar", 5000, "", 1))}, "no shard '../a.tar'"),
        ({"shards": (Shard("/etc/a.tar", 5000, "", 1), Shard("b.tar", 5000, "", 1))}, "no shard"),
        ({"shards": (Shard("a.tar", 5000, "", 1), Shard("passwd", 5000, "", 1))}, "no shard 'passwd'"),
        ({"shards": (Shard("a.tar", 5000, "", 3), Shard("b.tar", 5000, "", -1))}, "no shard"),
        ({"shards": (Shard("a.tar", 5000, "", 1), Shard("a.tar", 5000, "", 1))}, "twice"),
        ({"size": np.array([10, 4489])}, "outside of its shard"),
        ({"offset": np.array([-1, 512])}, "outside of its shard"),
        ({"offset": np.array([512, 2**63 - 1])}, "outside of its shard"),
        ({"label": np.array([0, 2])}, "no class"),
        ({"label": np.array([-1, 0])}, "no class"),
        ({"label": np.array([0])}, "one length"),
        ({"names": Names.of(["x"])}, "one length"),
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused(tmp_path, changes, reason) -> None:
    index_of(**changes).write(tmp_path / "i")
    with pytest.raises(ExciteError, match=reason):
        read_index((tmp_path / "i").read_bytes(), "the index")


def test_an_index_with_any_byte_changed_is_refused(tmp_path) -> None:
    index_of().write(tmp_path / "i")
    held = (tmp_path / "i").read_bytes()
    for place in range(len(held)):
        changed = bytearray(held)
        changed[place] ^= 1
        with pytest.raises(ExciteError, match="is damaged"):
            read_index(bytes(changed), "the index")
    for end in range(0, len(held), 7):
        with pytest.raises(ExciteError, match="is damaged"):
            read_index(held[:end], "the index")


def test_names_are_a_sequence_of_strings() -> None:
    names = Names.of(["a", "", "long one", "é"])
    assert list(names) == ["a", "", "long one", "é"]
    assert names[-1] == "é"
    assert list(names[1:3]) == ["", "long one"]
    assert list(names.at(np.array([3, 0]))[::-1]) == ["a", "é"]
    with pytest.raises(IndexError):
        names[4]
    assert list(Names.of([])) == []


def test_what_is_no_set_of_shards_is_refused(tmp_path, photos) -> None:
    with pytest.raises(UsageError, match="no shards with an index"):
        load(f"shards:{photos}")
    with pytest.raises(UsageError, match="is not a folder"):
        load(f"shards:{tmp_path / 'none'}")
    with pytest.raises(UsageError, match="'shards' needs one"):
        load("shards:")
    with pytest.raises(UsageError, match="no address that fsspec knows"):
        load("shards:nothing://bucket/x")


# --- from object storage --------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(shards) -> Any:
    """The shards under an address that fsspec keeps in memory."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/bucket", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.tar"))


def total(bucket: Any) -> tuple[int, int]:
    sizes = [one["size"] for one in bucket.ls("/bucket/train", detail=True) if one["name"].endswith(".tar")]
    return sum(sizes), max(sizes)


def test_shards_are_fetched_once_where_all_fit(tmp_path, bucket, packed, monkeypatch) -> None:
    fetched: list[str] = []
    real = RemoteShards._copy

    def counted(self, shard, temporary):
        fetched.append(shard.name)
        real(self, shard, temporary)

    monkeypatch.setattr(RemoteShards, "_copy", counted)
    data = load("shards:memory://bucket")
    assert len(fetched) == 1  # to look at the images' sizes
    assert by_name(data, shuffle=True, augment=RESIZED) == by_name(
        load(f"shards:{packed}"), shuffle=True, augment=RESIZED
    )
    assert len(fetched) == len(set(fetched)) == len(data.train.images.listing.source.index.shards)
    by_name(load("shards:memory://bucket"), shuffle=True)  # of a new process, as it were
    assert len(fetched) == len(set(fetched))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_small_cache_is_not_exceeded_and_shards_are_not_fetched_over_and_over(
    tmp_path, bucket, workers, monkeypatch
) -> None:
    size, largest = total(bucket)
    limit = 4.1 * largest
    assert size > 1.5 * limit
    data = load("shards:memory://bucket", cache_gb=limit / 1e9)
    log = tmp_path / "fetched"
    real = RemoteShards._make_room

    def watched(self, need):
        real(self, need)
        held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.suffix in (".tar", ".tmp"))
        with open(log, "a") as file:
            file.write(f"{held + need}\n")

    monkeypatch.setattr(RemoteShards, "_make_room", watched)
    loader = Loader(data.train, data.preprocessing, 4, seed=0, shuffle=True, workers=workers)
    assert loader.state_dict()["shards together"] == 2
    for epoch in range(2):
        loader.set_epoch(epoch)
        seen = [i for _, _, index in loader for i in index.tolist()]
        assert sorted(seen) == list(range(37))
    held = [int(line) for line in log.read_text().split()]
    count = len(data.train.images.listing.source.index.shards)
    assert max(held) <= limit
    if not workers:  # which prepare batches ahead, and here that is more than a window
        assert len(held) <= 2 * count + 1  # each once in an epoch, and one to look at the images' sizes


def test_another_window_is_another_order_and_refused_on_resuming(bucket) -> None:
    size, largest = total(bucket)

    def loader(cache: float) -> Loader:
        data = load("shards:memory://bucket", cache_gb=cache / 1e9)
        return Loader(data.train, data.preprocessing, 4, seed=0, shuffle=True)

    with pytest.raises(UsageError, match="shards together 2, but here it is 1"):
        loader(2.5 * largest).load_state_dict(loader(4.1 * largest).state_dict())
    with pytest.raises(UsageError, match="shards together 2, but here it is None"):
        loader(size).load_state_dict(loader(4.1 * largest).state_dict())
    with pytest.raises(UsageError, match="at least two of them must fit"):
        loader(1.5 * largest)
    data = load("shards:memory://bucket", cache_gb=4.1 * largest / 1e9)
    with pytest.raises(UsageError, match=r"data\.balanced takes images from all shards"):
        Loader(data.train, data.preprocessing, 4, seed=0, shuffle=True, balanced=True)


def test_what_does_not_fit_its_checksum_is_not_used(bucket, caplog, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    held = bytearray(bucket.cat_file("/bucket/train/shard-000001.tar"))
    held[-1] ^= 1  # in the end mark, where no image would notice
    bucket.pipe_file("/bucket/train/shard-000001.tar", bytes(held))
    bucket.rm_file("/bucket/train/shard-000002.tar")
    data = load("shards:memory://bucket")
    index = data.train.images.listing.source.index
    seen = by_name(data)
    assert set(seen) == {n for n, s in zip(index.names, index.shard(), strict=True) if s not in (1, 2)}
    assert "memory://bucket/train/shard-000001.tar (its checksum is not the one" in caplog.text
    assert "memory://bucket/train/shard-000002.tar (it is not there" in caplog.text


def test_storage_that_refuses_now_and_then_is_asked_again(bucket, monkeypatch) -> None:
    from excite.data import remote

    monkeypatch.setattr("time.sleep", lambda _: None)
    real, calls = remote._blocks, []

    def now_and_then(address):
        calls.append(address)
        if len(calls) % 3:
            raise BrokenShardError(address, "busy")
        return real(address)

    monkeypatch.setattr(remote, "_blocks", now_and_then)
    assert len(by_name(load("shards:memory://bucket"))) == 37


def test_an_old_file_in_the_cache_is_not_taken_for_a_new_one(shards, tmp_path, photos) -> None:
    address = f"shards:file://{shards}"
    before = by_name(load(address))
    import shutil

    shutil.rmtree(shards)
    pack(photos, shards, shard_size="40kB", resize=40)
    after = by_name(load(address))
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


def fetch_all(address: str, seed: int) -> int:
    files = open_shards(address, 1.0)["train"]
    return sum(len(files.read(int(i))) for i in np.random.default_rng(seed).permutation(37))


def test_several_processes_share_a_cache(shards, tmp_path) -> None:
    address = f"file://{shards}"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sizes = pool.starmap(fetch_all, [(address, seed) for seed in range(4)])
    expected = ShardFiles(LocalShards(shards / "train"), open_shards(str(shards), 1.0)["train"].index)
    assert sizes == [sum(len(expected.read(i)) for i in range(37))] * 4
    names = [path.name for path in cached(tmp_path)]
    assert len(names) == len(set(names)) == len(expected.index.shards)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_recipe_passes_its_settings_on(packed) -> None:
    from excite.training.recipe import Recipe
    from excite.training.recipe_data import load_recipe_data, resolved, training_loader

    recipe = Recipe().replace({"data.path": f"shards:{packed}", "data.balanced": True, "trainer.batch_size": 4})
    data = load_recipe_data(recipe)
    assert data.name == f"shards:{packed}"
    loader = training_loader(recipe, data)
    assert json.loads(json.dumps(loader.state_dict()))["balanced"] is True
    assert resolved(recipe, data).data.cache_gb is None
    away = recipe.replace({"data.path": f"shards:file://{packed}"})
    assert resolved(away, load_recipe_data(away)).data.cache_gb == 10
    with pytest.raises(UsageError, match=r"data\.cache_gb.* is for shards"):
        load_recipe_data(Recipe().replace({"data.cache_gb": 3}))
    with pytest.raises(UsageError, match=r"data\.balanced.* is for images with classes"):
        load_recipe_data(Recipe().replace({"data.path": "digits-words", "data.balanced": True}))

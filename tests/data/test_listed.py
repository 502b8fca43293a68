"""Sets whose classes stand in a list. The images are made here; what the lists mean is checked by torchvision's
readers, or by what each image was made to show."""

from __future__ import annotations

import io
import logging
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Places365
from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive

from excite.data import Split, load_data
from excite.data.listed import list_file
from excite.errors import ExciteError, UsageError
from excite.verbs.pack import pack
from excite.weights.published import imagenet_synsets

COUNT = 30


def picture(number: int) -> bytes:
    """An image whose pixels say its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def shown(split: Split | None) -> list[int]:
    """The numbers of a split's images."""
    assert split is not None
    pixels = [split.images[i][0][:, 0, 0].tolist() for i in range(len(split))]
    return [256 * green + red for red, green, _ in pixels]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def image_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


@pytest.fixture(scope="module")
def synsets() -> list[str]:
    """The WordNet ids of ImageNet's classes, sorted."""
    found = imagenet_synsets()
    assert found is not None
    return list(found)


@pytest.fixture(scope="module")
def truth(synsets: list[str]) -> list[str]:
    """The class of each of the validation images 1 … COUNT."""
    return random.Random(3).choices(synsets, k=COUNT)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for number in range(1, COUNT + 1):
        write(tmp_path / "imagenet/val" / image_name(number), picture(number))
    return tmp_path / "imagenet/val"


def write_meta(path: Path, synsets: list[str]) -> dict[int, str]:
    """A ``meta.mat`` like the development kit's, with the classes in another order and groups of them behind."""
    leaves = random.Random(1).sample(synsets, len(synsets))
    groups = ["n00001740", "n00001930"]
    kind = np.dtype(
        [
            ("ILSVRC2012_ID", "O"),
            ("WNID", "O"),
            ("words", "O"),
            ("gloss", "O"),
            ("num_children", "O"),
            ("children", "O"),
        ]
    )
    rows = [(i, wnid, f"word {i}", "", 0, np.zeros((1, 0))) for i, wnid in enumerate(leaves, start=1)]
    rows += [(len(rows) + i, wnid, "group", "", 2, np.array([[1, 2]])) for i, wnid in enumerate(groups, start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)}, do_compression=True)
    return {i: wnid for i, wnid, *_ in rows}


def classes_of(split: Split | None, classes: tuple[str, ...]) -> dict[int, str]:
    """The class of each image by its number."""
    assert split is not None
    return {number: classes[label] for number, label in zip(shown(split), split.labels.tolist(), strict=True)}


def check_imagenet(data, truth: list[str], synsets: list[str] | None = None) -> None:
    assert data.train is None
    assert classes_of(data.test, data.classes) == dict(enumerate(truth, start=1))
    if synsets is not None:
        assert list(data.classes) == synsets
        assert data.test.labels.tolist() == [synsets.index(one) for one in truth]


# --- ImageNet's validation images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["imagenet", "imagenet/val", ""])
def test_caffes_list_counts_the_sorted_synsets(tmp_path, flat, truth, synsets, beside) -> None:
    lines = [f"{image_name(i)} {synsets.index(one)}" for i, one in enumerate(truth, start=1)]
    write(tmp_path / beside / "val.txt", "\n".join(lines))
    check_imagenet(load_data(flat), truth, synsets)
    check_imagenet(load_data(flat.parent), truth, synsets)
    if beside:
        check_imagenet(load_data(f"list:{tmp_path / beside / 'val.txt'}", all_for_test=True), truth, synsets)


def test_the_development_kit_is_read_as_torchvision_reads_it(tmp_path, flat, synsets, monkeypatch) -> None:
    kit = flat.parent / "ILSVRC2012_devkit_t12"
    write_meta(kit / "data/meta.mat", synsets)
    numbers = random.Random(2).choices(range(1, 1001), k=COUNT)
    write(kit / "data/ILSVRC2012_validation_ground_truth.txt", "".join(f"{n}\n" for n in numbers))
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(kit, kit.name)
    monkeypatch.setattr("torchvision.datasets.imagenet._verify_archive", lambda *_: None)
    parse_devkit_archive(tmp_path)
    truth = load_meta_file(tmp_path)[1]
    check_imagenet(load_data(flat), truth, synsets)
    check_imagenet(load_data(flat.parent), truth, synsets)
    ground_truth = kit / "data/ILSVRC2012_validation_ground_truth.txt"
    check_imagenet(load_data(f"list:{ground_truth}", all_for_test=True), truth, synsets)


def test_the_development_kits_numbers_say_nothing_without_its_table(flat) -> None:
    write(flat.parent / "ILSVRC2012_validation_ground_truth.txt", "490\n361\n")
    with pytest.raises(UsageError, match=r"order of its own.*meta\.mat"):
        load_data(flat)


@pytest.mark.parametrize("damage", ["cut off", "empty", "other"])
def test_a_damaged_table_is_told(flat, synsets, damage) -> None:
    meta = flat.parent / "meta.mat"
    write(flat.parent / "ILSVRC2012_validation_ground_truth.txt", "490\n361\n")
    write_meta(meta, synsets)
    if damage == "other":
        savemat(meta, {"nothing": np.zeros(3)})
    else:
        meta.write_bytes(meta.read_bytes()[: 3000 if damage == "cut off" else 0])
    with pytest.raises(ExciteError, match=r"meta\.mat"):
        load_data(flat)


def test_kaggles_list_and_folders(tmp_path, truth) -> None:
    root = tmp_path / "ILSVRC/Data/CLS-LOC"
    for number, wnid in enumerate(truth, start=1):
        write(root / "val" / image_name(number), picture(number))
        write(root / "train" / wnid / f"{wnid}_{number}.JPEG", picture(1000 + number))
        write(root / "test" / f"ILSVRC2012_test_{number:08d}.JPEG", picture(5))
    rows = [f"{image_name(i)[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for i, wnid in enumerate(truth, start=1)]
    write(tmp_path / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *reversed(rows)]))
    for place in (root, tmp_path / "ILSVRC"):
        data = load_data(place)
        assert data.classes == tuple(sorted(set(truth)))
        assert classes_of(data.test, data.classes) == dict(enumerate(truth, start=1))
        assert sorted(shown(data.train)) == list(range(1001, 1001 + COUNT))
    check_imagenet(load_data(root / "val"), truth)
    apart = load_data(root / "train", test=root / "val")
    assert classes_of(apart.test, apart.classes) == dict(enumerate(truth, start=1))
    assert classes_of(apart.train, apart.classes) == {1000 + i: one for i, one in enumerate(truth, start=1)}


def test_the_validation_tar_as_it_is_fetched(tmp_path, truth, synsets) -> None:
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in range(1, COUNT + 1):
            member = tarfile.TarInfo(image_name(number))
            member.size = len(content := picture(number))
            archive.addfile(member, io.BytesIO(content))
    lines = [f"{image_name(i)} {synsets.index(one)}" for i, one in enumerate(truth, start=1)]
    write(tmp_path / "val.txt", "\n".join(lines))
    check_imagenet(load_data(tmp_path / "ILSVRC2012_img_val.tar"), truth, synsets)


def test_no_list_at_all_is_refused_unless_there_are_training_images(flat, synsets, caplog) -> None:
    with pytest.raises(UsageError, match=r"nothing says their classes: put val\.txt"):
        load_data(flat)
    write(flat.parent / "val.txt", "other/1.jpg 3")  # some other set's
    with pytest.raises(UsageError, match="nothing says their classes"):
        load_data(flat)
    for wnid in synsets[:2]:
        for i in range(5):
            write(flat.parent / f"train/{wnid}/{i}.JPEG", picture(i))
    with caplog.at_level(logging.WARNING, "excite.data"):
        assert len(load_data(flat.parent).train) == 10
    assert "left out" in caplog.text


def test_class_folders_of_validation_images_are_class_folders(flat, synsets) -> None:
    for i, path in enumerate(sorted(flat.iterdir())):
        os.renames(path, flat / synsets[i % 3] / path.name)
    assert load_data(flat.parent).classes == tuple(synsets[:3])


def test_the_synsets_may_lie_beside(flat, synsets, monkeypatch) -> None:
    monkeypatch.setattr("excite.data.listed.imagenet_synsets", lambda: None)
    write(flat.parent / "val.txt", "".join(f"{image_name(i)} {i % 2}\n" for i in range(1, COUNT + 1)))
    with pytest.raises(UsageError, match=r"excite\[timm\]"):
        load_data(flat)
    write(flat.parent / "synset_words.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    data = load_data(flat)
    assert data.classes == ("n01440764", "n01443537")
    assert data.test is not None
    assert data.test.labels.tolist() == [i % 2 for i in shown(data.test)]


def test_missing_images_are_counted_or_refused(flat, synsets, caplog) -> None:
    write(flat.parent / "val.txt", "".join(f"{image_name(i)} {i}\n" for i in range(1, COUNT + 4)))
    with caplog.at_level(logging.WARNING, "excite.data"):
        assert len(load_data(flat).test) == COUNT
    assert f"3 of the {COUNT + 3} images" in caplog.text
    with pytest.raises(ExciteError, match=f"3 of the {COUNT + 3} images"):
        load_data(flat, broken="refuse")


# --- Places365 ----------------------------------------------------------------------------------------------------

CATEGORIES = ["/a/airfield", "/b/bakery/shop", "/f/field/wild", "/f/field_road"]


@pytest.fixture
def places(tmp_path: Path) -> Path:
    root = tmp_path / "places"
    write(root / "categories_places365.txt", "".join(f"{name} {i}\n" for i, name in enumerate(CATEGORIES)))
    train, val = [], []
    for number in range(12):
        label = number % 4
        name = f"{CATEGORIES[label]}/{number:08d}.jpg"
        write(root / f"data_256{name}", picture(number))
        train.append(f"{name} {label}")
        name = f"Places365_val_{number + 1:08d}.jpg"
        write(root / "val_256" / name, picture(100 + number))
        val.append(f"{name} {(number // 2) % 4}")
    write(root / "places365_train_standard.txt", "\n".join(train))
    write(root / "places365_val.txt", "\n".join(val))
    return root


def test_places365_as_it_comes(places: Path) -> None:
    data = load_data(places)
    assert data.classes == ("airfield", "bakery/shop", "field/wild", "field_road")
    assert classes_of(data.train, data.classes) == {i: data.classes[i % 4] for i in range(12)}
    assert classes_of(data.test, data.classes) == {100 + i: data.classes[i // 2 % 4] for i in range(12)}


def test_places365_as_torchvision_reads_it(places: Path, monkeypatch) -> None:
    monkeypatch.setattr("torchvision.datasets.places365.check_integrity", lambda *_, **__: True)
    (places / "data_256").rename(places / "data_256_standard")
    for split, ours in (("train-standard", load_data(places).train), ("val", load_data(places).test)):
        theirs = Places365(places, split=split, small=True)
        expected = {np.array(image)[0, 0, 0]: label for image, label in theirs}
        assert ours is not None
        assert dict(zip(shown(ours), ours.labels.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    "pair", [("data_256", "val_256"), ("list:places365_train_standard.txt", "list:places365_val.txt")]
)
def test_parts_of_places365_given_apart(places: Path, pair, monkeypatch) -> None:
    monkeypatch.chdir(places)
    data = load_data(pair[0], test=pair[1])
    whole = load_data(places)
    assert data.classes == whole.classes
    assert classes_of(data.train, data.classes) == classes_of(whole.train, whole.classes)
    assert classes_of(data.test, data.classes) == classes_of(whole.test, whole.classes)


def test_places365_needs_its_categories(places: Path) -> None:
    (places / "categories_places365.txt").unlink()
    with pytest.raises(UsageError, match=r"put categories_places365\.txt"):
        load_data(places)


# --- lists of one's own ---------------------------------------------------------------------------------------------


def own(root: Path, labels: list[str]) -> str:
    lines = []
    for number, label in enumerate(labels):
        write(root / f"pictures/no {number}.png", picture(number))
        lines.append(f"no {number}.png\t{label}" if number % 2 else f"no {number}.png {label}")
    write(root / "list.txt", "\n".join(lines) + "\n\n")
    return f"list:{root / 'list.txt'}"


def test_words_are_sorted_and_numbers_keep_their_order(tmp_path) -> None:
    words = load_data(own(tmp_path / "words", ["dog", "cat"] * 5), all_for_test=True)
    assert words.classes == ("cat", "dog")
    assert classes_of(words.test, words.classes) == {i: ("dog", "cat")[i % 2] for i in range(10)}
    numbers = load_data(own(tmp_path / "numbers", [str(i) for i in range(12)]), all_for_test=True)
    assert numbers.classes == tuple(map(str, range(12)))
    assert numbers.test is not None
    assert numbers.test.labels.tolist() == shown(numbers.test) == list(range(12))


def test_a_list_without_splits_is_split_like_a_folder(tmp_path) -> None:
    data = load_data(own(tmp_path, [str(8 + i % 3) for i in range(30)]))
    assert data.classes == ("8", "9", "10")
    assert (len(data.train), len(data.test)) == (24, 6)
    assert classes_of(data.test, data.classes) == {i: str(8 + i % 3) for i in shown(data.test)}
    assert set(shown(data.train)) | set(shown(data.test)) == set(range(30))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("../secret.png 1\nb.png 2", "must lie below"),
        ("/etc/secret.png 1", "must lie below"),
        ("a/../../secret.png 1", "must lie below"),
        ("alone\n", "path of an image and its class"),
        ("a.png 1\na.png 2", "a second time"),
        ("", "lists no images"),
        ("nowhere.png 1", "are not found"),
        (b"\xff\xfe\x00\x01", "no text"),
    ],
)
def test_other_lists_are_refused(tmp_path, text, said) -> None:
    write(tmp_path / "secret.png", picture(1))
    file = write(tmp_path / "set/list.txt", text)
    with pytest.raises(UsageError, match=said):
        load_data(f"list:{file}")


def test_a_list_reads_no_folder_that_it_does_not_name(tmp_path) -> None:
    name = own(tmp_path, ["a", "b", "a", "b"]).removeprefix("list:")
    write(tmp_path / "pictures/unlisted.png", picture(9))
    files, part = list_file(Path(name), refuse=True)
    assert files.names == [f"no {i}.png" for i in range(4)]
    assert part.classes == ["a", "b", "a", "b"]


def test_there_is_no_such_list(tmp_path) -> None:
    with pytest.raises(ExciteError, match="Cannot read"):
        load_data(f"list:{tmp_path / 'none.txt'}")


# --- in shards ------------------------------------------------------------------------------------------------------


def test_imagenet_as_it_comes_is_packed_with_its_flat_validation_images(tmp_path, flat, truth, synsets) -> None:
    for number, label in enumerate(synsets[::100]):
        write(tmp_path / f"imagenet/train/{label}/{label}_{number}.JPEG", picture(200 + number))
    lines = [f"{image_name(i)} {synsets.index(one)}" for i, one in enumerate(truth, start=1)]
    write(tmp_path / "imagenet/val.txt", "\n".join(lines))
    said = pack(flat.parent, tmp_path / "shards")
    assert {name: one["images"] for name, one in said["splits"].items()} == {"train": 10, "val": COUNT}
    data = load_data(f"shards:{tmp_path / 'shards'}", classes=tuple(synsets))
    assert classes_of(data.test, data.classes) == dict(enumerate(truth, start=1))
    assert classes_of(data.train, data.classes) == {200 + i: name for i, name in enumerate(synsets[::100])}


def test_validation_images_that_no_list_is_for_are_not_left_out_of_shards_in_silence(tmp_path, flat) -> None:
    with pytest.raises(UsageError, match="nothing says their classes"):
        pack(flat, tmp_path / "shards")


def test_places365_is_packed_in_the_order_of_its_numbers(places: Path, tmp_path) -> None:
    (places / "categories_places365.txt").write_text(
        "".join(f"{name} {i}\n" for i, name in enumerate(reversed(CATEGORIES)))
    )
    whole = load_data(places)
    pack(places, tmp_path / "shards")
    data = load_data(f"shards:{tmp_path / 'shards'}")
    assert data.classes == whole.classes == ("field_road", "field/wild", "bakery/shop", "airfield")
    assert classes_of(data.train, data.classes) == classes_of(whole.train, whole.classes)
    assert classes_of(data.test, data.classes) == classes_of(whole.test, whole.classes)


def test_a_list_of_ones_own_is_packed(tmp_path) -> None:
    spec = own(tmp_path, [str(8 + i % 3) for i in range(30)])
    pack(spec, tmp_path / "shards")
    listed, packed = (load_data(one, all_for_test=True) for one in (spec, f"shards:{tmp_path / 'shards'}"))
    assert packed.classes == listed.classes == ("8", "9", "10")
    assert classes_of(packed.test, packed.classes) == classes_of(listed.test, listed.classes)

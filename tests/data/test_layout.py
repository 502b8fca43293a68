from __future__ import annotations

import pytest

from excite.data.layout import read_layout


def found(files: list[str], folders: list[str] | None = None) -> dict[str, dict[str, list[str]]]:
    """{split: {class: [files]}} of a listing; the folders are those of the files unless given."""
    if folders is None:
        folders = sorted({"/".join(file.split("/")[:i]) for file in files for i in range(1, file.count("/") + 1)})
    layout = read_layout(files, folders)
    result: dict[str, dict[str, list[str]]] = {}
    for split, part in layout.parts.items():
        classes: dict[str, list[str]] = {name: [] for name in sorted(part.folders)}
        for position, name in zip(part.files, part.classes, strict=True):
            classes[name].append(files[position])
        result[split] = classes
    return result


PLAIN = ["cat/1.jpg", "cat/2.jpg", "dog/1.png"]


@pytest.mark.parametrize("wrapper", ["", "photos/", "sets/photos/"])
def test_class_folders(wrapper: str) -> None:
    files = [wrapper + name for name in PLAIN]
    assert found(files) == {"": {"cat": files[:2], "dog": files[2:]}}


@pytest.mark.parametrize("wrapper", ["", "photos/"])
def test_splits(wrapper: str) -> None:
    files = [f"{wrapper}{split}/{name}" for split in ("test", "train", "val") for name in PLAIN]
    expected = {
        split: {c: [f"{wrapper}{split}/{name}" for name in PLAIN if name.startswith(c)] for c in ("cat", "dog")}
        for split in ("test", "train", "val")
    }
    assert found(files) == expected


@pytest.mark.parametrize("split", ["train", "test", "val"])
def test_a_lone_top_folder_with_a_splits_name_is_a_split(split: str) -> None:
    assert set(found([f"{split}/{name}" for name in PLAIN])) == {split}


@pytest.mark.parametrize(("name", "split"), [("Training", "train"), ("TEST", "test"), ("validation", "val")])
def test_other_names_of_splits(name: str, split: str) -> None:
    assert set(found([f"{name}/{file}" for file in PLAIN])) == {split}


def test_train_beside_other_classes_is_a_class() -> None:
    files = ["bus/1.jpg", "plane/1.jpg", "train/1.jpg"]
    assert set(found(files)[""]) == {"bus", "plane", "train"}


def test_what_lies_beside_train_and_test_is_left_out() -> None:
    files = ["figures/plot/1.png", *(f"{split}/{name}" for split in ("test", "train") for name in PLAIN)]
    assert set(found(files)) == {"train", "test"}
    assert read_layout(files, []).ignored == {"in no class folder": 1}


def test_images_deeper_inside_a_class_belong_to_it() -> None:
    files = ["cat/a/1.jpg", "cat/b/c/2.jpg", "dog/1.jpg"]
    assert found(files)[""] == {"cat": files[:2], "dog": files[2:]}


def test_hidden_and_other_files_are_counted_not_used() -> None:
    files = [*PLAIN, ".DS_Store", "cat/._1.jpg", "__MACOSX/cat/1.jpg", "cat/notes.txt", "cover.jpg", "cat/UPPER.JPG"]
    layout = read_layout(files, ["cat", "dog", ".git", "__MACOSX", "__MACOSX/cat"])
    assert layout.ignored == {"hidden": 3, "not an image by its suffix": 1, "in no class folder": 1}
    assert set(found(files)[""]) == {"cat", "dog"}
    assert "cat/UPPER.JPG" in found(files)[""]["cat"]


def test_a_stray_image_beside_the_splits_of_a_wrapped_set() -> None:
    files = ["photos/cover.jpg", *(f"photos/{split}/{name}" for split in ("test", "train") for name in PLAIN)]
    assert set(found(files)) == {"train", "test"}


def test_an_empty_class_folder_is_noticed() -> None:
    layout = read_layout(["train/cat/1.jpg"], ["train", "train/cat", "train/dog"])
    assert layout.parts["train"].folders == {"cat", "dog"}
    assert layout.parts["train"].classes == ["cat"]


def test_files_come_sorted_by_class_whatever_the_order_of_the_listing() -> None:
    files = ["dog/1.jpg", "cat/2.jpg", "cat/1.jpg"]
    part = read_layout(files, []).parts[""]
    assert [files[i] for i in part.files] == ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"]


def test_nothing_at_all() -> None:
    assert read_layout([], []).parts == {}
    assert read_layout(["1.jpg", "2.jpg"], []).parts == {}

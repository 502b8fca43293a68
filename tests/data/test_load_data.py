from __future__ import annotations

import gzip
import io
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from excite.data import load_data
from excite.data.encoded import DecodedImages, EncodedImages
from excite.errors import ExciteError, UsageError

Tree = dict[str, bytes]


def png(value: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    """A grey square whose grey is ``value``, so that an image can be told from its pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def class_folders(per_class: int, prefix: str = "", size: tuple[int, int] = (8, 8)) -> Tree:
    return {
        f"{prefix}{name}/{i:02d}.png": png(100 * c + i, size)
        for c, name in enumerate(("cat", "dog"))
        for i in range(per_class)
    }


def write_folder(root: Path, tree: Tree) -> Path:
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, tree: Tree) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in tree.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def greys(split: object) -> list[int]:
    return [int(split.images[i][0][0, 0, 0]) for i in range(len(split))]  # type: ignore[attr-defined, arg-type]


@pytest.fixture(params=["folder", "tar", "tar.gz", "tar.xz"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Tree], Path]:
    def write_it(tree: Tree) -> Path:
        if request.param == "folder":
            return write_folder(tmp_path / "set", tree)
        path = write_tar(tmp_path / "set.tar", tree)
        if request.param == "tar":
            return path
        packed = tmp_path / f"set.{request.param}"
        if request.param == "tar.gz":
            packed.write_bytes(gzip.compress(path.read_bytes()))
        else:
            import lzma

            packed.write_bytes(lzma.compress(path.read_bytes()))
        return packed

    return write_it


def test_splits_inside(write: Callable[[Tree], Path]) -> None:
    data = load_data(write({**class_folders(3, "train/"), **class_folders(2, "test/"), **class_folders(1, "val/")}))
    assert data.classes == ("cat", "dog")
    assert data.task == "classification"
    assert data.train is not None
    assert data.val is not None
    assert data.test is not None
    assert greys(data.train) == [0, 1, 2, 100, 101, 102]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.labels.dtype == torch.int64
    assert list(data.train.names)[3] == "train/dog/00.png"
    assert (len(data.val), len(data.test)) == (2, 4)


def test_train_and_test_given_apart(tmp_path: Path) -> None:
    train = write_tar(tmp_path / "a.tar", class_folders(3, "train/"))
    for i, test in enumerate((class_folders(2), class_folders(2, "test/"), class_folders(2, "val/"))):
        data = load_data(train, test=write_folder(tmp_path / f"b{i}", test))
        assert data.train is not None
        assert data.test is not None
        assert (len(data.train), len(data.test)) == (6, 4)
        assert data.name == str(train)


def test_a_set_for_testing_only(write: Callable[[Tree], Path]) -> None:
    data = load_data(write(class_folders(2, "test/")))
    assert data.train is None
    assert data.val is None
    assert data.test is not None
    assert len(data.test) == 4


def test_a_set_for_training_only(write: Callable[[Tree], Path]) -> None:
    data = load_data(write(class_folders(2, "train/")))
    assert data.test is None
    assert data.train is not None


def test_val_is_the_test_where_there_is_no_other(tmp_path: Path) -> None:
    data = load_data(write_folder(tmp_path, {**class_folders(3, "train/"), **class_folders(2, "val/")}))
    assert data.val is None
    assert data.test is not None
    assert data.test.names[0].startswith("val/")


def test_one_folder_of_classes_is_split_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, class_folders(20))
    with caplog.at_level(logging.WARNING, "excite.data"):
        data = load_data(tmp_path)
    assert "no test split: 8 of its 40 images" in caplog.text
    assert data.train is not None
    assert data.test is not None
    assert torch.bincount(data.test.labels).tolist() == [4, 4]
    assert torch.bincount(data.train.labels).tolist() == [16, 16]
    assert sorted(greys(data.train) + greys(data.test)) == [*range(20), *range(100, 120)]
    # The test images are the same whatever the seed.
    again = load_data(tmp_path, seed=5).test
    assert again is not None
    assert list(again.names) == list(data.test.names)


def test_validation_is_taken_from_training_and_fixed_by_the_seed(tmp_path: Path) -> None:
    write_folder(tmp_path, {**class_folders(20, "train/"), **class_folders(2, "test/")})
    data, same, other = (load_data(tmp_path, val_fraction=0.25, seed=seed) for seed in (0, 0, 1))
    assert data.train is not None
    assert data.val is not None
    assert torch.bincount(data.val.labels).tolist() == [5, 5]
    assert torch.bincount(data.train.labels).tolist() == [15, 15]
    assert sorted([*data.train.names, *data.val.names]) == sorted(class_folders(20, "train/"))
    assert same.val is not None
    assert other.val is not None
    assert list(same.val.names) == list(data.val.names)
    assert list(other.val.names) != list(data.val.names)


def test_test_classes_may_be_fewer_and_keep_their_labels(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "a", class_folders(2, "train/"))
    test = write_folder(tmp_path / "b", {"dog/1.png": png(), "dog/2.png": png()})
    data = load_data(train, test=test)
    assert data.test is not None
    assert data.test.labels.tolist() == [1, 1]


def test_the_classes_of_a_network_rule_the_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, class_folders(2, "test/"))
    data = load_data(tmp_path, classes=["dog", "bird", "cat"])
    assert data.classes == ("dog", "bird", "cat")
    assert data.test is not None
    assert data.test.labels.tolist() == [2, 2, 0, 0]
    with pytest.raises(UsageError, match=r"class 'cat' in the test images .* is none of the 2 classes.*'cats'"):
        load_data(tmp_path, classes=["dog", "cats"])


# --- what is usual for the images' size ---------------------------------------------------------------------


def test_small_images_keep_their_size(tmp_path: Path) -> None:
    data = load_data(write_folder(tmp_path, class_folders(2, "train/", size=(28, 28))))
    assert data.preprocessing.size == 28
    assert data.preprocessing.resize is None
    assert data.preprocessing.mean == (0.4914, 0.4822, 0.4465)
    assert data.preprocessing.std == (0.2470, 0.2435, 0.2616)
    assert data.augmentation.crop == "pad"


def test_photos_get_the_usual_preprocessing(tmp_path: Path) -> None:
    data = load_data(write_folder(tmp_path, class_folders(2, "train/", size=(90, 70))))
    assert (data.preprocessing.size, data.preprocessing.resize) == (224, 256)
    assert data.preprocessing.mean == (0.485, 0.456, 0.406)
    assert data.augmentation.crop == "resized"
    assert data.train is not None
    assert isinstance(data.train.images, DecodedImages)
    assert data.train.images[0][0].shape == (3, 70, 90)


def test_what_does_not_fit_in_memory_stays_encoded(tmp_path: Path) -> None:
    write_folder(tmp_path, class_folders(2, "train/", size=(90, 70)))
    limit = 4 * 3 * 90 * 70
    inside, outside = (load_data(tmp_path, memory_limit=limit - less).train for less in (0, 1))
    assert inside is not None
    assert outside is not None
    assert isinstance(inside.images, DecodedImages)
    assert isinstance(outside.images, EncodedImages)
    for i in range(4):
        assert torch.equal(inside.images[i][0], outside.images[i][0])
        assert inside.images[i][1] == outside.images[i][1]


def test_own_size_mean_std_and_grey(tmp_path: Path) -> None:
    write_folder(tmp_path, class_folders(2, "train/", size=(28, 28)))
    data = load_data(tmp_path, image_size=16, mean=(0.1, 0.2, 0.3), std=(1, 1, 2))
    assert data.preprocessing.size == 16
    assert data.preprocessing.mean == (0.1, 0.2, 0.3)
    assert data.preprocessing.std == (1.0, 1.0, 2.0)
    assert data.train is not None
    assert data.train.images[0][0].shape == (3, 16, 16)
    grey = load_data(tmp_path, channels=1)
    assert grey.train is not None
    assert grey.train.images[0][0].shape == (1, 28, 28)
    assert len(grey.preprocessing.mean) == 1
    with pytest.raises(UsageError, match="mean has 1 values, but an image here has 3 channels"):
        load_data(tmp_path, mean=(0.5,))


def test_decoding_reports_its_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_data(
        write_folder(tmp_path, class_folders(3, "train/")), progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (6, 6)


# --- broken images ------------------------------------------------------------------------------------------

BROKEN = {
    "train/cat/cut.png": png(7)[:40],
    "train/dog/empty.jpg": b"",
    "train/dog/text.png": b"hello",
}


def test_broken_images_are_counted_named_and_skipped(
    write: Callable[[Tree], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "excite.data"):
        data = load_data(write({**class_folders(3, "train/"), **BROKEN}))
    assert "3 images are broken and skipped" in caplog.text
    assert "train/dog/empty.jpg (the file is empty)" in caplog.text
    assert data.train is not None
    assert data.train.broken == tuple(sorted(BROKEN))
    assert greys(data.train) == [0, 1, 2, 100, 101, 102]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(data.train.names) == 6


def test_broken_images_are_refused(write: Callable[[Tree], Path]) -> None:
    with pytest.raises(ExciteError, match=r"3 images are broken: train/cat/cut\.png .*Mend or remove") as caught:
        load_data(write({**class_folders(3, "train/"), **BROKEN}), broken="refuse")
    assert caught.value.exit_code == 1


def test_of_many_broken_images_the_first_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    many = {f"train/cat/x{i:02d}.png": b"" for i in range(20)}
    with caplog.at_level(logging.WARNING, "excite.data"):
        load_data(write_folder(tmp_path, {**class_folders(3, "train/"), **many}))
    assert "20 images are broken" in caplog.text
    assert "and 15 more" in caplog.text
    assert "x05" not in caplog.text


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_a_broken_image(tmp_path: Path) -> None:
    write_folder(tmp_path, class_folders(3, "train/"))
    (tmp_path / "train/cat/00.png").chmod(0)
    data = load_data(tmp_path)
    assert data.train is not None
    assert data.train.broken == ("train/cat/00.png",)


def test_a_class_with_broken_images_only(tmp_path: Path) -> None:
    tree = {**class_folders(3, "train/"), "train/owl/1.png": b"", "train/owl/2.png": b"?"}
    with pytest.raises(UsageError, match=r"No image of the class 'owl' .* can be read"):
        load_data(write_folder(tmp_path, tree))


def test_broken_images_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="None of the images"):
        load_data(write_folder(tmp_path, {"train/a/1.png": b"", "train/b/1.png": b""}))


# --- sets that are none -------------------------------------------------------------------------------------


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Unknown data 'cifr10': did you mean 'cifar10'"):
        load_data("cifr10")
    with pytest.raises(UsageError, match=r"Unknown data 'indian-pine': did you mean 'indian-pines'"):
        load_data("indian-pine")
    with pytest.raises(UsageError, match=r"Unknown data 'hyperspectral': did you mean 'hyperspectral:PATH'"):
        load_data("hyperspectral")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no/such/folder", "There is no folder or file no/such/folder"),
        ("gone.tar", "There is no folder or file gone.tar"),
        ("folder:gone", "gone is not a folder"),
        ("tar:gone", "gone is not a file"),
        ("digits:here", "'digits' takes no path"),
        ("tar:", "'tar' needs one"),
        ("indian-pines", "indian-pines names a hyperspectral scene, and not a set of images"),
        ("shapes:here", "Unknown data 'shapes:here'"),
    ],
)
def test_specs_that_lead_nowhere(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_data(spec)


def test_an_empty_class(tmp_path: Path) -> None:
    write_folder(tmp_path, class_folders(2, "train/"))
    (tmp_path / "train" / "owl").mkdir()
    with pytest.raises(UsageError, match=r"class folder 'owl' in the train images of .* has no images"):
        load_data(tmp_path)


def test_an_empty_class_in_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", class_folders(2))
    with tarfile.open(path, "a") as archive:
        folder = tarfile.TarInfo("owl")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.raises(UsageError, match="class folder 'owl'"):
        load_data(path)


@pytest.mark.parametrize("tree", [{}, {"notes/readme.txt": b"hello"}, {"1.png": png(), "2.png": png()}])
def test_no_images_in_class_folders(write: Callable[[Tree], Path], tree: Tree) -> None:
    path = write({**tree, "other.txt": b"."})
    with pytest.raises(UsageError, match="holds no images in class folders"):
        load_data(path)


def test_one_class_only(write: Callable[[Tree], Path]) -> None:
    with pytest.raises(UsageError, match="the one class 'cat'"):
        load_data(write({"cat/1.png": png(), "cat/2.png": png()}))


def test_a_test_class_that_was_never_trained(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "a", class_folders(2, "train/"))
    test = write_folder(tmp_path / "b", {"cat/1.png": png(), "dgo/1.png": png()})
    with pytest.raises(UsageError, match=r"class 'dgo' in the test images of .*did you mean 'dog'"):
        load_data(train, test=test)


def test_training_and_test_data_the_wrong_way_round(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "a", class_folders(2, "train/"))
    test = write_folder(tmp_path / "b", class_folders(2, "test/"))
    with pytest.raises(UsageError, match="holds no training images, only test/"):
        load_data(test, test=train)
    with pytest.raises(UsageError, match="given as test data, but holds only training images"):
        load_data(train, test=train)
    with pytest.raises(UsageError, match="must be the path"):
        load_data(train, test="digits")
    with pytest.raises(UsageError, match="digits has its own test images"):
        load_data("digits", test=str(test))


def test_validation_twice(tmp_path: Path) -> None:
    trees = [class_folders(2, f"{split}/") for split in ("train", "val", "test")]
    for tree in trees:
        write_folder(tmp_path, tree)
    with pytest.raises(UsageError, match="its own val/ folder"):
        load_data(tmp_path, val_fraction=0.5)


@pytest.mark.parametrize("options", [{"val_fraction": 1.0}, {"val_fraction": -0.1}, {"broken": "ignore"}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        load_data("digits", **options)  # type: ignore[arg-type]


# --- archives that mean harm, or are damaged -----------------------------------------------------------------


def test_members_that_lead_out_of_the_tar_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(66))
    path = write_tar(tmp_path / "a.tar", {**class_folders(2), "../cat/up.png": png(66), "/cat/root.png": png(66)})
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"cat/link{kind.decode()}.png")
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
        device = tarfile.TarInfo("cat/device.png")
        device.type = tarfile.CHRTYPE
        archive.addfile(device)
    with caplog.at_level(logging.WARNING, "excite.data"):
        data = load_data(path)
    assert "5 members left out" in caplog.text
    assert data.train is not None
    assert data.test is not None
    assert sorted(greys(data.train) + greys(data.test)) == [0, 1, 100, 101]


def test_a_name_that_comes_twice_counts_once_and_the_later_holds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", class_folders(2, "train/"))
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("./train/cat/00.png")
        member.size = len(png(55))
        archive.addfile(member, io.BytesIO(png(55)))
    data = load_data(path)
    assert data.train is not None
    assert greys(data.train) == [55, 1, 100, 101]


def test_a_tar_that_was_cut_off(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"cat/1.png": png() + b"\0" * 5000, "dog/1.png": png() + b"\0" * 5000})
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ExciteError, match=r"Cannot read the tar .*a\.tar"):
        load_data(path)


def test_a_tar_that_was_cut_off_between_two_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", class_folders(3))
    path.write_bytes(path.read_bytes()[: 1024 * 5])  # a header and a block of content per file
    with caplog.at_level(logging.WARNING, "excite.data"):
        load_data(path)
    assert "no end mark" in caplog.text


def test_a_compressed_tar_that_is_damaged(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", class_folders(3))
    packed = bytearray(gzip.compress(path.read_bytes()))
    for damaged in (packed[: len(packed) // 2], packed[:60] + bytes(40) + packed[100:]):
        path.write_bytes(damaged)
        with pytest.raises(ExciteError, match="Cannot read the tar"):
            load_data(path)


def test_a_compressed_tar_that_does_not_fit_in_memory(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {**class_folders(3), "cat/huge.bin": bytes(10_000)})
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ExciteError, match=r"more than 5,000 bytes .* decompress it"):
        load_data(path, memory_limit=5000)


def test_a_file_that_is_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(png())
    with pytest.raises(ExciteError, match="is it a tar"):
        load_data(path)


def test_links_in_a_folder(tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", {"1.png": png(1), "2.png": png(2)})
    root = write_folder(tmp_path / "set", {"train/dog/1.png": png(100), "train/dog/2.png": png(101)})
    (root / "train" / "cat").symlink_to(elsewhere)
    (root / "train" / "dog" / "3.png").symlink_to(elsewhere / "1.png")
    (root / "train" / "dog" / "round").symlink_to(root)  # must not be walked for ever
    (root / "train" / "dog" / "dead.png").symlink_to(root / "gone")
    data = load_data(root)
    assert data.train is not None
    assert greys(data.train) == [1, 2, 100, 101, 1]


# --- the real thing -------------------------------------------------------------------------------------------


def test_cifar10_test_tar(shared_data: Path) -> None:
    data = load_data(shared_data / "cifar10-jpeg-test.tar")
    expected = "airplane automobile bird cat deer dog frog horse ship truck"
    assert data.classes == tuple(expected.split())
    assert data.train is None
    assert data.test is not None
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.preprocessing.size == 32
    assert data.test.broken == ()
    # One image against Pillow, read through tarfile.
    with tarfile.open(shared_data / "cifar10-jpeg-test.tar") as archive:
        member = archive.extractfile("test/frog/0007.jpg")
        assert member is not None
        pixels = np.array(Image.open(io.BytesIO(member.read())).convert("RGB"))
    image, label = data.test.images[list(data.test.names).index("test/frog/0007.jpg")]
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert data.classes[label] == "frog"


@pytest.mark.slow
def test_cifar10_training_tar(shared_data: Path) -> None:
    data = load_data(
        shared_data / "cifar10-jpeg-train.tar", test=shared_data / "cifar10-jpeg-test.tar", val_fraction=0.1
    )
    assert data.train is not None
    assert data.val is not None
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (45_000, 5_000, 10_000)
    assert torch.bincount(data.val.labels).tolist() == [500] * 10

from __future__ import annotations

import csv
import dataclasses
import logging
import math
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.io
import scipy.sparse
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from excite.data.crossmodal import CrossmodalData, is_crossmodal, load_crossmodal
from excite.data.crossmodal_inputs import Inputs, fit_standardise
from excite.data.crossmodal_mat import named_arrays
from excite.data.crossmodal_pairs import Pairs, held_out
from excite.data.crossmodal_pictures import Pictures
from excite.data.digits import load_digits
from excite.data.digits_words import digits_words_pairs, read_out
from excite.data.text_vectors import LARGEST_VOCABULARY, fit_text_vectors
from excite.errors import ExciteError, UsageError
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

N, TRAIN, IMAGE, TEXT, CLASSES = 60, 45, 5, 7, 3


@dataclasses.dataclass
class Arrays:
    """A small set of vectors: rows are pairs, and the order is that of the file."""

    images: np.ndarray
    texts: np.ndarray
    classes: np.ndarray
    train: np.ndarray
    test: np.ndarray

    @property
    def hot(self) -> np.ndarray:
        return (self.classes[:, None] == np.arange(CLASSES)).astype(np.float64)


def arrays(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    order = rng.permutation(N)
    return Arrays(
        3 + 2 * rng.normal(size=(N, IMAGE)),
        rng.normal(size=(N, TEXT)) - 1,
        rng.permutation(np.arange(N) % CLASSES),
        np.sort(order[:TRAIN]),
        order[TRAIN:],
    )


def wikipedia_fields(a: Arrays, labels: Any = None) -> dict[str, Any]:
    split = {"ind_train": a.train[None] + 1, "ind_test": a.test[None] + 1}
    y = scipy.sparse.csc_matrix(a.hot.T) if labels is None else labels
    return {"X1": a.images.T, "X2": a.texts.T, "Y": y, "split": split}


def author_fields(a: Arrays) -> dict[str, np.ndarray]:
    found = {}
    for name, rows in (("train", a.train), ("test", a.test)):
        found[f"{name}_img"] = a.images[rows]
        found[f"{name}_txt"] = a.texts[rows]
        found[f"{name}_img_lab"] = a.classes[rows][:, None] + 1.0
    return found


def write_wikipedia(folder: Path, a: Arrays, packed: bool) -> Path:
    path = folder / "set.mat"
    scipy.io.savemat(path, {"note": "hello", "data": wikipedia_fields(a)}, do_compression=packed)
    return path


def write_flat(folder: Path, a: Arrays) -> Path:
    fields = wikipedia_fields(a, a.classes[None].astype(float) + 1)
    path = folder / "set.mat"
    scipy.io.savemat(path, {**fields, **fields.pop("split")})
    return path


def write_wikipedia_73(folder: Path, a: Arrays) -> Path:
    h5py = pytest.importorskip("h5py")
    path = folder / "set.mat"
    with h5py.File(path, "w") as file:

        def put(name: str, values: np.ndarray, kind: bytes = b"double") -> None:
            file.create_dataset(name, data=values.T, compression="gzip").attrs["MATLAB_class"] = np.bytes_(kind)

        put("data/X1", a.images.T)
        put("data/X2", a.texts.T)
        put("data/split/ind_train", a.train[None] + 1.0)
        put("data/split/ind_test", a.test[None] + 1.0)
        sparse = scipy.sparse.csc_matrix(a.hot.T)
        group = file.create_group("data/Y")
        group.attrs["MATLAB_sparse"] = np.uint64(CLASSES)
        group["data"], group["ir"] = sparse.data, sparse.indices.astype(np.uint64)
        group["jc"] = sparse.indptr.astype(np.uint64)
        file.create_group("#refs#")
    return path


def write_npz(folder: Path, a: Arrays) -> Path:
    path = folder / "set.npz"
    fields = wikipedia_fields(a, a.hot.T.astype(bool))
    np.savez_compressed(path, **{**fields, **fields.pop("split")})
    return path


def write_authors(folder: Path, a: Arrays) -> Path:
    path = folder / "set.mat"
    scipy.io.savemat(path, author_fields(a))
    return path


def write_authors_npz(folder: Path, a: Arrays) -> Path:
    path = folder / "set.npz"
    fields = author_fields(a)
    np.savez(path, **fields, train_txt_lab=fields["train_img_lab"])
    return path


def write_authors_apart(folder: Path, a: Arrays) -> Path:
    for name, values in author_fields(a).items():
        if name.endswith("txt"):
            np.save(folder / f"{name}.npy", values)
        else:
            scipy.io.savemat(folder / f"{name}.mat", {name if name.endswith("img") else "x": values})
    return folder


LAYOUTS: dict[str, Callable[[Path, Arrays], Path]] = {
    "wikipedia": lambda folder, a: write_wikipedia(folder, a, True),
    "wikipedia, unpacked": lambda folder, a: write_wikipedia(folder, a, False),
    "wikipedia, version 7.3": write_wikipedia_73,
    "wikipedia, no struct": write_flat,
    "wikipedia, npz": write_npz,
    "authors": write_authors,
    "authors, npz": write_authors_npz,
    "authors, a file for each": write_authors_apart,
}


def load(path: Path, **more: Any) -> CrossmodalData:
    return load_crossmodal(f"crossmodal:{path}", **more)


def rows_of(part: Any, a: Arrays) -> np.ndarray:
    """Which of the pairs of the set are in a split, by their images, which are as they are."""
    distance = np.abs(part.images.numpy()[:, None] - a.images[None]).max(axis=2)
    assert (distance.min(axis=1) < 1e-5).all()
    return np.asarray(distance.argmin(axis=1))


# --- vectors in files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pairs(layout: str, tmp_path: Path) -> None:
    a = arrays()
    data = load(LAYOUTS[layout](tmp_path, a), scaling="none", val_fraction=0)
    assert data.val is None
    assert data.train is not None
    assert data.test is not None
    assert (data.task, data.image_shape, data.text_dim) == ("retrieval", (IMAGE,), TEXT)
    assert data.classes == ("1", "2", "3")
    assert (data.preprocessing.size, data.preprocessing.channels) == (1, data.image_shape[0] + data.text_dim)
    assert data.texts is None
    for part, rows in ((data.train, a.train), (data.test, a.test)):
        assert len(part) == len(rows) == len(part.names) == len(set(part.names))
        for values, wanted in ((part.images, a.images), (part.texts, a.texts), (part.labels, a.hot)):
            assert isinstance(values, torch.Tensor)
            assert values.dtype == torch.float32
            np.testing.assert_allclose(values.numpy(), wanted[rows], rtol=1e-6)
        (images, texts), labels = part.batch([3, 1])
        assert torch.equal(images, part.images[[3, 1]])
        assert torch.equal(texts, part.texts[[3, 1]])
        assert torch.equal(labels, part.labels[[3, 1]])
        assert torch.equal(part.image(2), part.images[2])


def test_the_wikipedia_set(shared_data: Path) -> None:
    path = shared_data / "wikipedia-crossmodal.mat"
    truth = scipy.io.loadmat(path)["data"][0, 0]
    split = truth["split"][0, 0]
    train, test = (split[f"ind_{name}"].ravel().astype(int) - 1 for name in ("train", "test"))
    data = load(path, scaling="none")
    assert data.train is not None
    assert data.val is not None
    assert data.test is not None
    assert (len(train), len(test)) == (2173, 693)
    assert len(data.train) + len(data.val) == 2173
    assert abs(len(data.val) - 0.2 * 2173) <= 5
    for part, among in ((data.train, train), (data.val, train), (data.test, test)):
        rows = np.array([int(name.removeprefix("pair ")) - 1 for name in part.names])
        assert set(rows) <= set(among)
        np.testing.assert_array_equal(part.images.numpy(), truth["X1"].T[rows].astype(np.float32))
        np.testing.assert_array_equal(part.texts.numpy(), truth["X2"].T[rows].astype(np.float32))
        np.testing.assert_array_equal(part.labels.numpy(), truth["Y"].toarray().T[rows])
    assert not set(data.train.names) & set(data.val.names)
    for column, whole in zip(data.val.labels.T, truth["Y"].toarray()[:, train], strict=True):
        assert abs(column.sum() - 0.2 * whole.sum()) <= 0.5


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_in_structs_and_sparse_ones_are_those_that_scipy_wrote(
    packed: bool, order: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    sparse = scipy.sparse.random(13, 9, 0.2, "csc", rng=rng)
    inner = {
        "small": np.array([[3]], np.uint8),
        "three": np.asarray(rng.normal(size=(2, 3, 4)), order=order),  # type: ignore[call-overload]
        "a_name_of_many_letters": rng.integers(-5, 5, (4, 3)).astype(np.int16),
        "empty": np.empty((0, 3)),
        "text": "no numbers",
        "list": np.array([1, "a"], dtype=object),
        "complex": np.array([1j]),
    }
    content = {"top": rng.normal(size=(3, 2)), "s": {"deep": inner, "sparse": sparse}, "alone": sparse.astype(bool)}
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, content, do_compression=packed)
    found = {array.name: array for array in named_arrays(path)}
    numbers = {f"s.deep.{name}": inner[name] for name in ("small", "three", "a_name_of_many_letters", "empty")}
    wanted = {"top": content["top"], **numbers, "s.sparse": sparse.toarray(), "alone": sparse.toarray() != 0}
    assert set(wanted) == set(found)
    for name, values in wanted.items():
        assert found[name].shape == values.shape
        np.testing.assert_array_equal(found[name].read(), values)


@pytest.mark.parametrize("layout", ["wikipedia", "wikipedia, unpacked", "wikipedia, version 7.3", "wikipedia, npz"])
def test_a_damaged_file_is_told_of(layout: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path, arrays())
    whole = path.read_bytes()
    rng = np.random.default_rng(2)
    messages = []
    for trial in range(60):
        if trial % 2:
            damaged = whole[: int(rng.integers(len(whole)))]
        else:
            changed = bytearray(whole)
            for place in rng.integers(len(whole), size=3):
                changed[place] ^= 1 << int(rng.integers(8))
            damaged = bytes(changed)
        path.write_bytes(damaged)
        try:
            load(path)
        except ExciteError as error:  # nothing else may come out
            messages.append(str(error))
    assert len(messages) > 30
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize(
    ("rows", "starts", "shape"),
    [
        ((1, 5, 7, 2), (0, 1, 1, 3, 4), (7, 4)),  # a row that is not there
        ((1, 5, -6, 2), (0, 1, 1, 3, 4), (7, 4)),
        ((1, 5, 6, 2), (0, 3, 1, 3, 4), (7, 4)),  # a column that goes back
        ((1, 5, 6, 2), (1, 1, 1, 3, 4), (7, 4)),  # a number in no column
        ((1, 5, 6, 2), (0, 1, 1, 3, 5), (7, 4)),  # more numbers than there are
        ((1, 5, 6, 2), (0, 1, 1, 3, 4), (7, 5)),
        ((1, 5, 6, 2), (0, 1, 1, 3, 4), (2**31 - 1, 4)),
    ],
)
def test_a_sparse_matrix_that_does_not_fit_together(
    rows: tuple[int, ...], starts: tuple[int, ...], shape: tuple[int, ...], tmp_path: Path
) -> None:
    # SciPy would not write it: the arrays are changed in the file.
    path = tmp_path / "a.mat"
    good = ((1, 5, 6, 2), (0, 1, 1, 3, 4), (7, 4))
    scipy.io.savemat(path, {"s": scipy.sparse.csc_matrix((np.ones(4), *good[:2]), good[2])})
    assert named_arrays(path)[0].read().sum() == 4
    content = path.read_bytes()
    for before, now in zip(good, (rows, starts, shape), strict=True):
        old, new = (np.array(values, "<i4").tobytes() for values in (before, now))
        assert content.count(old) == 1
        content = content.replace(old, new)
    path.write_bytes(content)
    with pytest.raises(ExciteError, match="sparse matrix s"):
        named_arrays(path)


@pytest.mark.parametrize("layout", ["wikipedia", "authors"])
def test_vectors_are_standardised_by_the_training_pairs_alone(layout: str, tmp_path: Path) -> None:
    a = arrays()
    a.images[:, 2] = 4.2  # says nothing
    path = LAYOUTS[layout](tmp_path, a)
    raw, data = load(path, scaling="none"), load(path)
    for what, scale in (("images", data.images), ("texts", data.inputs.text_scale)):
        scaler = StandardScaler().fit(getattr(raw.train, what).numpy().astype(np.float64))
        np.testing.assert_allclose(scale.mean, scaler.mean_, rtol=1e-9, atol=1e-12)  # type: ignore[union-attr]
        for split in ("train", "val", "test"):
            wanted = scaler.transform(getattr(getattr(raw, split), what).numpy().astype(np.float64))
            found = getattr(getattr(data, split), what).numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_varies_by_rounding_alone_is_not_blown_up() -> None:
    values = np.full((50, 2), 4.2, np.float32)
    values[::2, 0] = np.nextafter(values[0, 0], np.float32(5))
    assert fit_standardise(values).apply(values).abs().max() < 1e-6


def test_large_sets_are_standardised_in_blocks() -> None:
    values = np.random.default_rng(0).normal(5, 3, (1700, 900)).astype(np.float32)  # three blocks
    scale = fit_standardise(values)
    np.testing.assert_allclose(scale.mean, values.mean(axis=0, dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(scale.std, values.std(axis=0, dtype=np.float64), rtol=1e-9)
    wanted = StandardScaler().fit_transform(values.astype(np.float64))
    np.testing.assert_allclose(scale.apply(values).numpy(), wanted, rtol=1e-4, atol=1e-6)
    alike = fit_standardise(values, alike=True)
    assert len(set(alike.std)) == 1
    assert alike.apply(values).var(dim=0, correction=0).mean().item() == pytest.approx(1, rel=1e-5)


# --- wrong vectors --------------------------------------------------------------------------------------------


def refused(tmp_path: Path, fields: dict[str, Any], match: str, kind: type[Exception] = UsageError) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, **fields)
    with pytest.raises(kind, match=match) as caught:
        load(path)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value)


def changed(name: str, change: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    fields = author_fields(arrays())
    return {**fields, name: change(fields[name])}


def put(value: float, *rows: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[list(rows)] = value
        return values

    return change


def test_images_and_texts_of_unequal_number(tmp_path: Path) -> None:
    refused(
        tmp_path, changed("train_txt", lambda v: v[:-1]), "train_img 45 and train_txt 44 vectors do not make pairs"
    )
    fields = wikipedia_fields(arrays(), arrays().hot.T)
    fields |= {**fields.pop("split"), "X1": fields["X1"][:, 1:]}
    refused(tmp_path, fields, "X1 59 and X2 60 vectors do not make pairs")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("train_img_lab", lambda v: v[:40], "train_img_lab in .* is of 40×1 numbers, but there are 45 pairs"),
        ("train_img_lab", put(np.nan, 6, 8), "has no label for 2 of 45 pairs, of which train pair 7 is the first"),
        ("train_img_lab", put(-1, 6), "has no label for 1 of 45 pairs"),
        ("train_img_lab", lambda v: np.tile([1, 0, 0], (45, 1)) * (v != v[0]), "has no label for"),
        ("train_img_lab", lambda v: np.tile([0.5, 1], (45, 1)), "other numbers than 0 and 1"),
        ("train_img_lab", put(1.5, 6), "whole numbers"),
        ("train_img_lab", lambda v: np.array(["a"] * 45), "is not of real numbers"),
        ("train_txt_lab", put(3, 0), "train_txt_lab and train_img_lab do not agree"),
        ("test_img", lambda v: v[:, 1:], "are of 4 and 7 and 5 and 7 numbers"),
        ("train_img", lambda v: v[:, 0], "expected are pairs × numbers"),
        ("test_img_lab", put(9, 0, 2), "class '9' .* is that of 2 test pairs, of which test pair 1 is the first"),
        ("train_img_lab", lambda v: np.ones_like(v), "The class '2' "),
    ],
)
def test_wrong_arrays(name: str, change: Callable[[np.ndarray], Any], match: str, tmp_path: Path) -> None:
    fields = author_fields(arrays())
    fields["train_img_lab"][0] = 1
    fields.setdefault("train_txt_lab", fields["train_img_lab"])
    fields[name] = change(fields[name])
    if name == "train_img_lab":
        del fields["train_txt_lab"]
    refused(tmp_path, fields, match)


def test_a_missing_array_and_one_class(tmp_path: Path) -> None:
    fields = author_fields(arrays())
    refused(tmp_path, {key: value for key, value in fields.items() if key != "test_txt"}, "no test_txt")
    refused(tmp_path, {"a": np.ones(3)}, r"holds a \(3\): expected are X1")
    one = {key: np.ones_like(value) if key.endswith("lab") else value for key, value in fields.items()}
    refused(tmp_path, one, "has the one class '1'")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_vectors_that_are_not_finite(value: float, tmp_path: Path) -> None:
    match = "train_img in .* in 2 of 45 vectors, of which number 4 is the first"
    refused(tmp_path, changed("train_img", put(value, 3, 7)), match, ExciteError)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("ind_test", put(99, 0), "whole numbers in 1 … 60"),
        ("ind_test", put(0, 0), "whole numbers in 1 … 60"),
        ("ind_test", lambda v: v + 0.5, "whole numbers in 1 … 60"),
        ("ind_test", lambda v: v[:0], "has no test pairs"),
        ("ind_test", lambda v: np.append(v, v[:1]), "is in ind_test and again in ind_test"),
        ("ind_train", lambda v: np.append(v, arrays().test[0] + 1), "is in ind_train and again in ind_test"),
    ],
)
def test_wrong_splits(name: str, change: Callable[[np.ndarray], Any], match: str, tmp_path: Path) -> None:
    fields = wikipedia_fields(arrays(), arrays().hot.T)
    fields |= {key: value.ravel() for key, value in fields.pop("split").items()}
    fields[name] = change(fields[name])
    refused(tmp_path, fields, match)


def test_python_objects_are_not_read(tmp_path: Path) -> None:
    refused(tmp_path, changed("train_img", lambda v: v.astype(object)), "train_img in .* is not of real numbers")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("crossmodal:", "names no pairs"),
        ("digits", "names no pairs"),
        ("crossmodal:/nowhere/at/all", "There is no file or folder /nowhere/at/all"),
        ("crossmodal:{}", "holds no pairs of images and texts"),
        ("crossmodal:/dev/null", "holds no pairs of images and texts"),
        ("crossmodal:/" + 500 * "x", "There is no file or folder"),
    ],
)
def test_wrong_specs(spec: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        load_crossmodal(spec.format(tmp_path))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"text": "words"}, "text is 'words'"),
        ({"text": "tfidf:9"}, "text is 'tfidf:9'"),
        ({"text": "sentence:"}, "text is 'sentence:'"),
        ({"text": "tfidf"}, "vectors already"),
        ({"text_dim": 20}, "vectors already"),
        ({"text_dim": 0}, "text_dim is 0"),
        ({"image_size": 32}, "are vectors"),
        ({"image_size": 0}, "image_size is 0"),
        ({"broken": "mend"}, "broken is 'mend'"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=match):
        load(write_authors(tmp_path, arrays()), **options)


def test_what_names_pairs() -> None:
    assert is_crossmodal("digits-words")
    assert is_crossmodal("crossmodal:/a/b.mat")
    assert not is_crossmodal("digits")
    assert not is_crossmodal("denoising:/a")


# --- splits ---------------------------------------------------------------------------------------------------


def test_validation_pairs_hang_on_their_seed(tmp_path: Path) -> None:
    a = arrays()
    path = write_wikipedia(tmp_path, a, True)
    found = {seed: load(path, split_seed=seed, scaling="none") for seed in (0, 1)}
    chosen = {}
    for seed, data in found.items():
        assert data.train is not None
        assert data.val is not None
        held, left = rows_of(data.val, a), rows_of(data.train, a)
        assert sorted([*held, *left]) == sorted(a.train)
        # A fifth of every class.
        for number in range(CLASSES):
            whole = int((a.classes[a.train] == number).sum())
            assert int((a.classes[held] == number).sum()) == round(0.2 * whole)
        chosen[seed] = set(held)
        assert data.test is not None
        np.testing.assert_array_equal(rows_of(data.test, a), a.test)
    assert chosen[0] != chosen[1]
    again = load(path, split_seed=1, scaling="none")
    assert again.val is not None
    assert set(rows_of(again.val, a)) == chosen[1]


def pairs_of(labels: np.ndarray, names: Sequence[str] | None = None) -> Pairs:
    count = len(labels)
    names = tuple(names or (f"pair {i}" for i in range(count)))
    vectors = np.zeros((count, 1), np.float32)
    return Pairs("a set", names, vectors, vectors, labels, tuple(map(str, range(labels.shape[1]))))


def test_pairs_of_several_classes_are_held_out_by_the_rarest() -> None:
    rng = np.random.default_rng(3)
    common, rare = np.ones(200, bool), np.arange(200) < 20
    labels = np.stack([common, rare, rng.random(200) < 0.5], axis=1)
    for seed in range(5):
        held = held_out(pairs_of(labels), 0.25, seed)
        assert held[rare].sum() == 5
        assert abs(held.sum() - 50) <= 2


def test_no_class_loses_all_its_pairs() -> None:
    # The pairs of the last class count for another each, so that both may be drawn.
    labels = np.zeros((6, 4), bool)
    labels[:, 0] = True
    labels[[0, 2], 1] = True
    labels[[1, 3], 2] = True
    labels[[0, 1], 3] = True
    for seed in range(40):
        held = held_out(pairs_of(labels), 0.5, seed)
        assert (labels[~held].sum(axis=0) > 0).all()
    assert not held_out(pairs_of(np.eye(3, dtype=bool)), 0.5, 0).any()


def test_pairs_of_one_name_stay_together() -> None:
    names = [f"{i // 5}.jpg" for i in range(200)]
    labels = np.array([int(name[:-4]) % 2 for name in names])[:, None] == np.arange(2)
    held = held_out(pairs_of(labels, names), 0.25, 0)
    assert held.sum() == 50
    assert not {name for name, one in zip(names, held, strict=True) if one} & {
        name for name, one in zip(names, held, strict=True) if not one
    }


def test_a_set_without_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a = arrays()
    fields = {"X1": a.images.T, "X2": a.texts.T, "Y": a.hot.T}
    np.savez(tmp_path / "a.npz", **fields)
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path / "a.npz", val_fraction=0, scaling="none")
    assert "has no test split: 12 of its 60 pairs, a fifth of every class, are held out for test" in caplog.text
    assert data.train is not None
    assert data.test is not None
    assert sorted([*rows_of(data.train, a), *rows_of(data.test, a)]) == list(range(N))
    assert data.test.labels.sum(dim=0).tolist() == [4, 4, 4]
    # The test pairs hang on no seed.
    again = load(tmp_path / "a.npz", split_seed=5)
    assert again.test is not None
    assert again.test.names == data.test.names
    whole = load(tmp_path / "a.npz", inputs=data.inputs, classes=data.classes, all_for_test=True)
    assert whole.train is None
    assert whole.test is not None
    np.testing.assert_array_equal(rows_of(whole.test, a), np.arange(N))
    with pytest.raises(UsageError, match="has no training pairs"):
        load(tmp_path / "a.npz", all_for_test=True)


def test_test_pairs_given_apart_and_own_validation_pairs(tmp_path: Path) -> None:
    a, other = arrays(), arrays(7)
    fields = author_fields(a)
    own = {name.replace("test", "val"): value for name, value in fields.items()}
    np.savez(tmp_path / "train.npz", **own)
    np.savez(tmp_path / "test.npz", X1=other.images.T, X2=other.texts.T, Y=other.classes + 1)
    data = load(tmp_path / "train.npz", test=str(tmp_path / "test.npz"), scaling="none")
    for part, whole, rows in (
        (data.train, a, a.train),
        (data.val, a, a.test),
        (data.test, other, np.arange(N)),
    ):
        assert part is not None
        np.testing.assert_array_equal(rows_of(part, whole), rows)
    # Without test pairs the validation pairs take their place.
    alone = load(tmp_path / "train.npz", val_fraction=0, scaling="none")
    assert alone.val is None
    assert alone.test is not None
    np.testing.assert_array_equal(rows_of(alone.test, a), a.test)
    np.savez(tmp_path / "no.npz", **{key: value for key, value in fields.items() if key.startswith("test")})
    with pytest.raises(UsageError, match="holds no training pairs"):
        load(tmp_path / "no.npz", test=str(tmp_path / "test.npz"))


def test_the_key_is_of_the_pairs_and_not_of_how_they_are_scaled(tmp_path: Path) -> None:
    a = arrays()
    (tmp_path / "b").mkdir()
    path, same = write_wikipedia(tmp_path, a, True), write_npz(tmp_path, a)
    first = load(path)
    assert first.test is not None
    assert first.train is not None
    scaled, elsewhere = load(path, scaling="none", split_seed=3), load(same)
    for other in (scaled, elsewhere):
        assert other.test is not None
        assert other.test.key() == first.test.key()
        assert first.train.key() != first.test.key()
    for what in ("images", "texts"):
        changed_set = arrays()
        getattr(changed_set, what)[a.test[0], 0] += 1
        other = load(write_wikipedia(tmp_path / "b", changed_set, True))
        assert other.test is not None
        assert other.test.key() != first.test.key()
    relabelled = arrays()
    relabelled.classes[a.test[0]] = (relabelled.classes[a.test[0]] + 1) % CLASSES
    other = load(write_wikipedia(tmp_path / "b", relabelled, True))
    assert other.test is not None
    assert other.test.key() != first.test.key()


# --- pictures and strings -------------------------------------------------------------------------------------

SUBJECTS = {
    "sea": "waves break at the long beach",
    "town": "people walk along a busy street",
    "wood": "sunlight falls between old trees",
}


def write_table(
    folder: Path, count: int = 30, split: bool = True, side: int = 40, rows: Sequence[dict[str, str]] | None = None
) -> Path:
    """Pictures and a CSV; every third picture has two labels."""
    rng = np.random.default_rng(0)
    names = list(SUBJECTS)
    made = []
    for i in range(count):
        image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        (folder / "pictures").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / "pictures" / f"{i:02d}.png")
        own = [names[i % 3]] + ([names[(i + 1) % 3]] if i % 3 == 2 else [])
        text = f"{SUBJECTS[own[0]]}, picture {'ab'[i % 2]}"
        row = {"file": f"pictures/{i:02d}.png", "text": text, "labels": "; ".join(own)}
        made.append({**row, **({"split": ("train", "train", "Valid", "test")[i // 3 % 4]} if split else {})})
    path = folder / "pairs.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(made[0]))
        writer.writeheader()
        writer.writerows([*made, *(rows or [])])
    return path


@pytest.mark.parametrize("memory_limit", [1 << 30, 10_000])
def test_a_folder_of_pictures_with_a_table(memory_limit: int, tmp_path: Path) -> None:
    write_table(tmp_path)
    seen = []
    data = load(
        tmp_path,
        image_size=40,
        memory_limit=memory_limit,
        progress=lambda done, count: seen.append((done, count)),
    )
    assert data.classes == ("sea", "town", "wood")
    assert data.image_shape == (3, 40, 40)
    assert data.preprocessing is not None
    assert (data.preprocessing.size, data.preprocessing.mean) == (40, IMAGENET_MEAN)
    parts = {"train": data.train, "val": data.val, "test": data.test}
    for split, part in parts.items():
        assert part is not None
        rows = [i for i in range(30) if ("train", "train", "val", "test")[i // 3 % 4] == split]
        assert part.names == tuple(f"pictures/{i:02d}.png" for i in rows)
        assert isinstance(part.images, Pictures)
        assert (part.images.pixels is None) == (memory_limit < 1 << 20)
        (images, texts), labels = part.batch(range(len(part)))
        assert (images.dtype, texts.dtype, labels.dtype) == (torch.float32,) * 3
        assert texts.shape == (len(rows), data.text_dim)
        for n, i in enumerate(rows):
            stored = np.asarray(Image.open(tmp_path / part.names[n])).astype(np.float64) / 255
            # Resized to 46, of which the middle 40 are used: the same mean, roughly, is all that is asked here.
            assert abs(images[n].mean() - ((stored - IMAGENET_MEAN) / IMAGENET_STD).mean()) < 0.1
            assert torch.equal(part.image(n), images[n])
            wanted = {i % 3} | ({(i + 1) % 3} if i % 3 == 2 else set())
            assert set(labels[n].nonzero().ravel().tolist()) == wanted
            assert part.strings is not None
            assert part.strings[n].startswith(SUBJECTS[data.classes[i % 3]])
    assert seen[-1][0] == seen[-1][1] == (30 if memory_limit > 1 << 20 else 12)


def test_pictures_that_are_decoded_when_needed_are_those_that_are_held(tmp_path: Path) -> None:
    write_table(tmp_path)
    held, late = (load(tmp_path, image_size=24, memory_limit=limit) for limit in (1 << 30, 0))
    for split in ("train", "val", "test"):
        a, b = (getattr(data, split) for data in (held, late))
        for one, other in zip(a.batch([0, 2, 1])[0], b.batch([0, 2, 1])[0], strict=True):
            assert torch.equal(one, other)
        assert a.key() == b.key()


def test_a_picture_is_cut_and_normalised(tmp_path: Path) -> None:
    write_table(tmp_path, side=256)
    data = load(tmp_path)
    assert data.test is not None
    stored = np.asarray(Image.open(tmp_path / data.test.names[1])).astype(np.float64) / 255
    wanted = (stored[16:240, 16:240] - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(data.test.image(1).numpy(), wanted.transpose(2, 0, 1), atol=1e-5)
    np.testing.assert_allclose(
        data.inputs.image_file(tmp_path / data.test.names[1])[0].numpy(), wanted.transpose(2, 0, 1), atol=1e-5
    )


def test_a_table_without_splits_keeps_the_rows_of_a_picture_together(tmp_path: Path) -> None:
    more = [
        {"file": f"pictures/{i:02d}.png", "text": "again, said in other words", "labels": list(SUBJECTS)[i % 3]}
        for i in range(30)
    ]
    write_table(tmp_path, split=False, rows=more)
    data = load(tmp_path, image_size=16)
    parts = [part for part in (data.train, data.val, data.test) if part is not None]
    assert sum(map(len, parts)) == 60
    counts = [Counter(part.names) for part in parts]
    assert all(set(count.values()) == {2} for count in counts)
    assert sum(len(count) for count in counts) == 30
    assert isinstance(parts[0].images, Pictures)
    assert parts[0].images.pixels is not None
    assert len(parts[0].images.pixels) == len(counts[0])


def test_a_picture_is_one_however_its_name_is_written(tmp_path: Path) -> None:
    more = [
        {"file": f"./pictures//{i:02d}.png", "text": "again, said in other words", "labels": list(SUBJECTS)[i % 3]}
        for i in range(30)
    ]
    write_table(tmp_path, split=False, rows=more)
    data = load(tmp_path, image_size=16)
    parts = [part for part in (data.train, data.val, data.test) if part is not None]
    assert [set(Counter(part.names).values()) for part in parts] == [{2}] * 3


@pytest.mark.parametrize("memory_limit", [1 << 30, 0])
def test_a_broken_picture(memory_limit: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table(tmp_path)
    (tmp_path / "pictures" / "09.png").write_bytes(b"\x89PNG and then nothing")  # of the test pairs
    with caplog.at_level(logging.WARNING):
        data = load(path, image_size=16, memory_limit=memory_limit)
    assert "1 image is broken and skipped: pictures/09.png" in caplog.text
    assert data.test is not None
    assert data.test.broken == ("pictures/09.png",)
    assert len(data.test) == 5
    assert "pictures/09.png" not in data.test.names
    good = Image.open(tmp_path / data.test.names[0]).resize((1, 1), Image.Resampling.BOX)
    wanted = (np.asarray(good)[0, 0] / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(data.test.image(0).mean(dim=(1, 2)).numpy(), wanted, atol=0.15)
    with pytest.raises(ExciteError, match="1 image is broken"):
        load(path, image_size=16, memory_limit=memory_limit, broken="refuse")
    for name in (tmp_path / "pictures").iterdir():
        name.write_bytes(b"")
    with pytest.raises(ExciteError, match=r"None of the \w+ pictures of .* can be read"):
        load(path, image_size=16, memory_limit=memory_limit)


def test_a_picture_that_breaks_later(tmp_path: Path) -> None:
    data = load(write_table(tmp_path), image_size=16, memory_limit=0)
    assert data.train is not None
    (tmp_path / data.train.names[1]).unlink()
    with pytest.raises(ExciteError, match=rf"image {data.train.names[1]} is broken"):
        data.train.batch([0, 1])
    (images, texts), labels, kept, broken = data.train.read(np.array([0, 1, 2]))
    assert list(broken) == [data.train.names[1]]
    assert kept.tolist() == [0, 2]
    assert len(images) == len(texts) == len(labels) == 2
    assert torch.equal(images[1], data.train.image(2))
    assert torch.equal(texts[1], data.train.texts[2])


def test_ready_vectors_beside_a_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table(tmp_path)
    values = np.random.default_rng(0).normal(size=(30, 6))
    np.save(tmp_path / "images.npy", values)
    for name in (tmp_path / "pictures").iterdir():
        name.unlink()  # nobody needs them now
    with caplog.at_level(logging.INFO):
        data = load(path, scaling="none")
    assert "images.npy take the place of its images" in caplog.text
    assert data.image_shape == (6,)
    assert data.test is not None
    rows = [int(name[-6:-4]) for name in data.test.names]
    assert isinstance(data.test.images, torch.Tensor)
    np.testing.assert_allclose(data.test.images.numpy(), values[rows], rtol=1e-6)
    np.save(tmp_path / "images.npy", values[1:])
    with pytest.raises(UsageError, match=r"29 vectors for 30 pairs"):
        load(path)
    np.save(tmp_path / "images.npy", values)
    np.save(tmp_path / "texts.npy", 2 * values)
    both = load(path, scaling="none")
    assert both.texts is None
    assert both.test is not None
    np.testing.assert_allclose(both.test.texts.numpy(), 2 * values[rows], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file,text\na.png,hello", "one column 'labels'"),
        ("file,caption,labels\na.png,hello,x", "one column 'text'"),
        ("", "one column 'file'"),
        ("file,text,labels\n", "holds no pairs"),
        ("file,text,labels\na.png,hello, world,x", "Line 2 .* has not the 3 fields"),
        ("file;text;labels\na.png;hello;x", "It seems to have ';' between its columns"),
        ("\ufefffile\ttext\tlabels\na.png\thello\tx", "It seems to have tabs between its columns"),
        ("file,text,labels\na.png,hello", "Line 2 .* has not the 3 fields"),
        ("file,text,labels\na.png,hello,x\nb.png,you,x", r"1 of 2 rows .* that does not exist: row 3 \(b.png\)"),
        ("file,text,labels\n" + 300 * "text " + ",a.png,x", "1 of 1 rows .* that does not exist"),
        ("file,text,labels\n,hello,x", "name no file: row 2"),
        ("file,text,labels\na.png,hello,x\na.png, ,y", "have an empty text: row 3"),
        ("file,text,labels\na.png,hello,;", "have no label: row 2"),
        ("file,text,labels,split\na.png,hello,x,held", "Row 2 .* has the split 'held'"),
        ("file,text,labels\na.png,hello,x\na.png,you,y", "too few pairs to hold some out"),
        ("file,text,labels,split\na.png,!?,x,train\na.png,--,y,train\na.png,a,y,test", "hold no words"),
    ],
)
def test_wrong_tables(text: str, match: str, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=match):
        load(path, val_fraction=0)


def test_a_table_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes("file,text,labels\na.png,Größe,x".encode("latin-1"))
    with pytest.raises(ExciteError, match="not in UTF-8"):
        load(path)
    path.write_text('file,text,labels\na.png,"hello,x')
    with pytest.raises(ExciteError, match=r"Cannot read .*pairs\.csv, line 2: unexpected end"):
        load(path)
    (tmp_path / "other.csv").write_text("")
    with pytest.raises(UsageError, match="holds several CSV files"):
        load(tmp_path)


def test_a_long_text_with_marks_of_all_kinds(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    before = csv.field_size_limit()
    long = "word " * 60_000 + "“Größe”, naïve;\n東京"
    assert len(long) > before
    with open(tmp_path / "pairs.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["File", " text", "LABELS", "Split"])
        writer.writerows([["a.png", text, name, "train"] for text, name in ((long, "x"), ("b c", "y"))])
    data = load(tmp_path, image_size=8, val_fraction=0)
    assert data.texts is not None
    assert set(data.texts.plain()["terms"]) == {"word", "größe", "naïve", "東京", "b", "c"}
    assert csv.field_size_limit() == before


# --- texts as vectors -----------------------------------------------------------------------------------------

TEXTS = ["The sea, the sea!", "A ship at sea", "old trees; old OLD ship", "the ship"]


def by_hand(texts: Sequence[str], training: Sequence[str], longest: int) -> tuple[list[str], np.ndarray]:
    """TF-IDF from its definition."""

    def terms(text: str) -> list[str]:
        words = re.findall(r"\w+", text.lower())
        return [" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)]

    vocabulary = sorted({term for text in training for term in terms(text)})
    rows = []
    for text in texts:
        row = []
        for term in vocabulary:
            count = terms(text).count(term)
            holding = sum(term in terms(other) for other in training)
            idf = math.log((1 + len(training)) / (1 + holding)) + 1
            row.append((1 + math.log(count)) * idf if count else 0.0)
        length = math.sqrt(sum(value**2 for value in row))
        rows.append([value / length if length else 0.0 for value in row])
    return vocabulary, np.array(rows)


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_tf_idf_from_its_definition(longest: int) -> None:
    vectors = fit_text_vectors("tfidf" if longest == 1 else f"tfidf:{longest}", TEXTS)
    new = ["the old sea of trees", "nothing known", "", *TEXTS]
    terms, wanted = by_hand(new, TEXTS, longest)
    assert vectors.plain()["terms"] == terms
    assert vectors.dim == len(terms)
    np.testing.assert_allclose(vectors(new), wanted, rtol=1e-6)
    assert vectors.known(new).tolist() == [True, False, False, True, True, True, True]
    assert vectors.spec == ("tfidf" if longest == 1 else f"tfidf:{longest}")


def test_the_most_frequent_terms_are_kept() -> None:
    vectors = fit_text_vectors("tfidf", TEXTS, 3)
    counts = Counter(word for text in TEXTS for word in re.findall(r"\w+", text.lower()))
    least = min(counts[term] for term in vectors.plain()["terms"])
    assert vectors.dim == 3
    assert all(count <= least for word, count in counts.items() if word not in vectors.plain()["terms"])


def test_many_texts_are_turned_in_blocks() -> None:
    texts = [f"{TEXTS[i % 4]} number {i}" for i in range(700)]
    vectors = fit_text_vectors("tfidf", TEXTS)
    whole = vectors(texts)
    for i in (0, 255, 256, 511, 699):
        np.testing.assert_array_equal(whole[i], vectors([texts[i]])[0])


def test_only_training_texts_are_fitted_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table(tmp_path)
    rows = list(csv.DictReader(path.open()))
    for row in rows:
        row["text"] += " " + row["split"].lower()
    rows[-1]["text"] = "unheard"
    rows[-1]["split"] = "test"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with caplog.at_level(logging.WARNING):
        data = load(path, image_size=8)
    assert data.texts is not None
    terms = set(data.texts.plain()["terms"])
    assert "train" in terms
    assert not {"valid", "test", "unheard"} & terms
    assert re.search(r"1 of \d+ test texts have no word of the training texts", caplog.text)
    # Texts are centred over the training pairs, and scaled alike.
    assert data.train is not None
    torch.testing.assert_close(data.train.texts.mean(dim=0), torch.zeros(data.text_dim), atol=1e-5, rtol=0)
    assert data.train.texts.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert data.train.strings is not None
    raw = data.texts(data.train.strings)
    ratio = (data.train.texts.numpy()[:, None] - data.train.texts.numpy()) @ np.ones(data.text_dim)
    np.testing.assert_allclose(
        ratio, (raw[:, None] - raw).sum(axis=2) / data.inputs.text_scale.std[0], rtol=1e-3, atol=1e-3
    )


class FakeSentences:
    """A model that counts letters."""

    def __init__(self, model: str) -> None:
        if model == "missing":
            raise OSError("no such model.\nAsk elsewhere.")
        self.width = 3 if model == "narrow" else 26
        self.damaged = model == "damaged"

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        assert options["normalize_embeddings"]
        counts = np.array([[text.lower().count(chr(97 + i)) for i in range(self.width)] for text in texts])
        if self.damaged:
            return counts * np.nan
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeSentences  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


@pytest.mark.usefixtures("sentences")
def test_vectors_of_a_sentence_model(tmp_path: Path) -> None:
    path = write_table(tmp_path)
    data = load(path, image_size=8, text="sentence:wide")
    assert data.text_dim == 26
    assert data.options["text"] == "sentence:wide"
    assert data.options["text_dim"] is None
    assert data.train is not None
    assert data.train.strings is not None
    raw = torch.from_numpy(FakeSentences("wide").encode(list(data.train.strings), normalize_embeddings=True))
    wanted = raw - raw.mean(dim=0)
    wanted = wanted / wanted.square().mean().sqrt()
    torch.testing.assert_close(data.train.texts.double(), wanted, atol=1e-5, rtol=0)
    again = Inputs.read(safetensors.torch.load(safetensors.torch.save(data.tensors())))
    assert torch.equal(again.text_vectors(data.train.strings), data.train.texts)
    with pytest.raises(UsageError, match="leave it out"):
        load(path, image_size=8, text="sentence:wide", text_dim=20)
    with pytest.raises(ExciteError, match="model damaged gives numbers that are not finite"):
        load(path, image_size=8, text="sentence:damaged")
    with pytest.raises(ExciteError, match="missing cannot be loaded: no such model"):
        load(path, image_size=8, text="sentence:missing")


def test_a_sentence_model_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'excite\[sentence\]'"):
        load(write_table(tmp_path), image_size=8, text="sentence:other")


# --- what a run keeps -----------------------------------------------------------------------------------------


def kept(data: CrossmodalData) -> Inputs:
    return CrossmodalData.read(safetensors.torch.load(safetensors.torch.save(data.tensors())))


def test_a_run_can_take_new_pairs(tmp_path: Path) -> None:
    data = load(write_table(tmp_path), image_size=24, text="tfidf:2", text_dim=30)
    assert data.test is not None
    assert data.test.strings is not None
    inputs = kept(data)
    assert inputs.image_shape == (3, 24, 24)
    assert inputs.text_dim == data.text_dim == 30
    assert torch.equal(inputs.text_vectors(data.test.strings), data.test.texts)
    assert torch.equal(inputs.image_file(tmp_path / data.test.names[2])[0], data.test.image(2))
    again = load(tmp_path, inputs=inputs, classes=data.classes)
    assert again.test is not None
    assert torch.equal(again.test.texts, data.test.texts)
    assert again.image_shape == (3, 24, 24)
    assert again.options["text"] == "tfidf:2"
    for text, match in (("", "is empty"), ("xylophones", "No word of the text 'xylophones'")):
        with pytest.raises(UsageError, match=match):
            inputs.text_vectors(["breaking waves at the beach", text])
    with pytest.raises(UsageError, match="There is no image file"):
        inputs.image_file(tmp_path / "none.png")
    with pytest.raises(ExciteError, match=r"pairs.csv cannot be read"):
        inputs.image_file(tmp_path / "pairs.csv")
    for call in (inputs.image_vectors, inputs.ready_texts):
        with pytest.raises(UsageError, match="not "):
            call(np.ones((2, 30)))


def test_a_run_on_vectors_can_take_new_ones(tmp_path: Path) -> None:
    a = arrays()
    path = write_wikipedia(tmp_path, a, True)
    data = load(path)
    assert data.test is not None
    inputs = kept(data)
    assert torch.equal(inputs.image_vectors(a.images[a.test].astype(np.float32)), data.test.images)
    assert torch.equal(inputs.ready_texts(a.texts[a.test].astype(np.float32)), data.test.texts)
    # The scale is the trained network's, whatever is left of the pairs.
    again = load(path, inputs=inputs, classes=data.classes, val_fraction=0)
    assert again.test is not None
    assert torch.equal(again.test.images, data.test.images)
    with pytest.raises(UsageError, match="60×4 numbers, but 5 for each are expected"):
        inputs.image_vectors(a.images[:, :4])
    with pytest.raises(UsageError, match="cannot take strings"):
        inputs.text_vectors(["hello"])
    with pytest.raises(UsageError, match="as vectors of 5 numbers"):
        inputs.image_file(path)


def test_data_that_do_not_fit_a_trained_network(tmp_path: Path) -> None:
    vectors = load(write_npz(tmp_path, arrays()))
    (tmp_path / "t").mkdir()
    table = write_table(tmp_path / "t")
    strings = load(table, image_size=8)
    with pytest.raises(UsageError, match=r"The images of .* are pictures, but those .* are vectors"):
        load(table, inputs=vectors.inputs)
    np.save(table.with_name("images.npy"), np.ones((30, IMAGE)))
    with pytest.raises(UsageError, match=r"The texts of .* are strings, but those .* are vectors"):
        load(table, inputs=vectors.inputs)
    with pytest.raises(UsageError, match=r"The images of .* are vectors, but those .* are pictures"):
        load(tmp_path / "set.npz", inputs=strings.inputs)
    a = arrays()
    a.images = a.images[:, 1:]
    with pytest.raises(UsageError, match=r"×4 numbers, but 5 for each"):
        load(write_npz(tmp_path, a), inputs=vectors.inputs)
    with pytest.raises(UsageError, match=r"class '3' .* no pair that the network was trained on has it"):
        load(write_npz(tmp_path, arrays()), inputs=vectors.inputs, classes=("1", "2"))
    # Classes are found by their names, in the network's order.
    other = load(write_npz(tmp_path, arrays()), inputs=vectors.inputs, classes=("9", "3", "2", "1"))
    assert other.test is not None
    assert vectors.test is not None
    assert torch.equal(other.test.labels[:, [3, 2, 1]], vectors.test.labels)


@pytest.mark.parametrize("name", ["plain", "text_mean", "image_std", "text_vectors.idf"])
def test_saved_inputs_that_are_damaged(name: str) -> None:
    data = load_crossmodal("digits-words", val_fraction=0)
    tensors = data.tensors()
    lacking = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(ExciteError, match="damaged"):
        Inputs.read(lacking)
    with pytest.raises(ExciteError, match="damaged"):
        Inputs.read({**tensors, name: tensors[name][:-1]})


def test_options_lead_to_the_same_data(tmp_path: Path) -> None:
    for spec, asked in (
        ("digits-words", {}),
        (f"crossmodal:{write_table(tmp_path, split=False)}", {"image_size": 12, "text_dim": 9, "split_seed": 4}),
    ):
        data = load_crossmodal(spec, **asked)  # type: ignore[arg-type]
        assert None not in (data.options["text"], data.options["text_dim"], data.options["val_fraction"])
        again = load_crossmodal(spec, **data.options)
        assert again.options == data.options
        for split in ("train", "val", "test"):
            one, other = getattr(data, split), getattr(again, split)
            assert one.key() == other.key()
            assert torch.equal(one.texts, other.texts)
    assert load_crossmodal("digits-words").options["text_dim"] == LARGEST_VOCABULARY


# --- digits in words ------------------------------------------------------------------------------------------


def test_a_digit_is_read_out_row_by_row() -> None:
    drawn = [
        "........",
        "...#....",
        "##......",
        "#......#",
        "..####..",
        ".....###",
        "########",
        "#.#.#..#",
    ]
    image = np.array([[8.0 if mark == "#" else 7.9 for mark in row] for row in drawn])
    assert read_out(image).split(", then ") == [
        "nothing",
        "dot middle",
        "short left",
        "dot left and dot right",
        "long middle",
        "short right",
        "long middle",
        "dot left and dot left and dot middle and dot right",
    ]


def test_digits_in_words_are_the_digits() -> None:
    data = load_crossmodal("digits-words", scaling="none")
    pixels = load_digits(0, Preprocessing(32, IMAGENET_MEAN, IMAGENET_STD), 0)
    assert pixels.test is not None
    assert data.test is not None
    assert data.train is not None
    assert data.val is not None
    assert data.test.names == tuple(pixels.test.names)
    assert data.test.labels.argmax(dim=1).tolist() == pixels.test.labels.tolist()
    assert len(data.train) + len(data.val) == 1347
    assert data.image_shape == (64,)
    assert isinstance(data.train.images, torch.Tensor)
    assert (data.train.images.min(), data.train.images.max()) == (0, 1)


def test_the_words_of_a_digit_are_not_its_class() -> None:
    found = digits_words_pairs()
    train, test = found["train"], found["test"]
    assert isinstance(train.texts, tuple)
    assert isinstance(test.texts, tuple)
    vectors = fit_text_vectors("tfidf:3", train.texts)
    known, wanted = (part.labels.argmax(axis=1) for part in (train, test))
    by_words = LogisticRegression(C=10, max_iter=1000).fit(vectors(train.texts), known)
    by_pixels = LogisticRegression(C=10, max_iter=1000).fit(train.images, known)
    # What the module says of it.
    assert by_words.score(vectors(test.texts), wanted) == pytest.approx(0.72, abs=0.01)
    assert by_pixels.score(test.images, wanted) == pytest.approx(0.98, abs=0.01)
    assert len(set(train.texts + test.texts)) == 1797 - 240


def test_images_and_texts_are_scaled_as_asked(tmp_path: Path) -> None:
    path = (
        LAYOUTS["npz"](tmp_path, arrays()) if "npz" in LAYOUTS else next(iter(LAYOUTS.values()))(tmp_path, arrays())
    )
    data = load(path, val_fraction=0, scaling="alike,each")
    assert data.train is not None
    images, texts = data.train.images, data.train.texts
    assert isinstance(images, torch.Tensor)
    torch.testing.assert_close(images.var(0, correction=0).mean(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    assert images.std(0).std() > 0.01, "wide ones stay wide"
    torch.testing.assert_close(texts.std(0, correction=0), torch.ones(texts.shape[1]), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="scaling is 'some': give each, alike or none"):
        load(path, scaling="some")

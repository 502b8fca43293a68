"""Sets whose classes stand in a list beside the images: ImageNet's validation images, Places365, lists of one's own.

A list names files; it is only ever looked up among the files that were found below the root, so that no line of it
leads anywhere else.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from excite.data.encoded import FileSource
from excite.data.layout import Part, read_layout
from excite.data.mat5 import mat5_arrays
from excite.errors import ExciteError, UsageError
from excite.weights.published import imagenet_synsets

logger = logging.getLogger("excite.data")

SYNSET = re.compile(r"n[0-9]{8}")
_IMAGENET = re.compile(r"ILSVRC2012_val_([0-9]{8})\.\w+")
_SYNSET_FILES = ("synsets.txt", "synset_words.txt", "LOC_synset_mapping.txt")
_CAFFE, _DEVKIT, _KAGGLE = "val.txt", "ILSVRC2012_validation_ground_truth.txt", "LOC_val_solution.csv"
_DEVKIT_FOLDERS = ("", "data", "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12/data")
_PLACES = {
    "places365_train_standard.txt": "train",
    "places365_train_challenge.txt": "train",
    "places365_val.txt": "val",
}
_CATEGORIES = "categories_places365.txt"
_LEVELS = 4  # folders above the images in which a list is looked for: Kaggle's lies beside ILSVRC/Data/CLS-LOC
_LONGEST_META = 1 << 26


@dataclass
class ListedPart(Part):
    """The images of one split whose classes stand in a list.

    Attributes:
        order: where the list numbers the classes, all of them in this order, with or without images; else empty.
    """

    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class _List:
    """What a list says: the class of each image by its name there, and the order of the classes, if it has one."""

    file: Path
    labels: Mapping[str, str]
    order: tuple[str, ...] = ()


def list_file(file: Path, refuse: bool) -> tuple[ListedFiles, ListedPart]:
    """The images that a list names; for ``list:FILE``.

    Its lines are ``path class``, the path relative to the list's folder, or to the nearest folder below or above it
    where such images are. The lists that come with ImageNet and Places365 are known by their names.

    Args:
        file: the list.
        refuse: whether an image that is not there ends the work; else it is left out, and told of.

    Raises:
        UsageError: it is no such list, or its images are not found.
        ExciteError: it cannot be read; an image is missing, and ``refuse`` is set.
    """
    if file.name in (_CAFFE, _DEVKIT, _KAGGLE) and (root := _root_of_imagenet(file)):
        files = ListedFiles(root, [name for name in _files_in(root) if _IMAGENET.fullmatch(name)])
        return files, _part(_imagenet_list(file), files.names, _stem, refuse)
    listed = _places_list(file) if file.name in _PLACES else _plain_list(file)
    files = ListedFiles(_root(listed), list(listed.labels))
    return files, _part(listed, files.names, _same, refuse)


class ListedFiles:
    """The files below a folder that a list names, by their position in :attr:`names`.

    Args:
        root: what the names are relative to.
        names: paths with ``/``.

    Attributes:
        names: those of them that are there, sorted.
        folders: none, for a list has no empty classes.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.folders: list[str] = []
        # Folder by folder: a set of a million images has a thousand of them.
        there = {folder: _files_in(root / folder) for folder in {name.rpartition("/")[0] for name in names}}
        self.names = sorted(name for name in names if name.rpartition("/")[2] in there[name.rpartition("/")[0]])

    def read(self, position: int) -> bytes:
        """The content of a file."""
        return (self.root / self.names[position]).read_bytes()


def parts_of(source: FileSource, where: Path, refuse: bool) -> dict[str, Part]:
    """The splits of a folder or tar, by its class folders and by the lists of ImageNet and Places365.

    Args:
        source: the files in it.
        where: the folder or tar itself.
        refuse: whether a listed image that is not there ends the work; else it is left out, and told of.

    Returns:
        ``train``, ``val`` and ``test``, as far as they are there, or ``""`` where there are no splits.

    Raises:
        UsageError: no images with classes are there, or ImageNet's validation images without a list of them.
        ExciteError: a list cannot be read; an image is missing, and ``refuse`` is set.
    """
    layout = read_layout(source.names, source.folders)
    if lists := _known_parts(source.names, where, "train" in layout.parts, refuse):
        return {name: part for name, part in layout.parts.items() if name in ("train", "test")} | lists
    if layout.ignored:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(layout.ignored.items()))
        logger.info("%s: files left out: %s", where, reasons)
    if not any(part.files for part in layout.parts.values()):
        raise UsageError(
            f"{where} holds no images in class folders: expected are files like 'train/cat/1.jpg' or 'cat/1.jpg'."
        )
    return layout.parts


def _known_parts(names: Sequence[str], where: Path, with_training: bool, refuse: bool) -> dict[str, Part]:
    """The splits that the lists of ImageNet and Places365 make, where the files are its images.

    Args:
        names: the files, relative to ``where``.
        where: the folder or tar itself.
        with_training: whether there are training images in class folders: then validation images without a list
            are left out, rather than refused.
        refuse: as for :func:`parts_of`.
    """
    parts: dict[str, Part] = {}
    flat = _flat_imagenet(names)
    if flat is not None:
        try:
            listed = _imagenet_list(_find_imagenet_list(where, flat))
        except UsageError as error:
            if not with_training:
                raise
            logger.warning("%s: the validation images are left out: %s", where, error)
        else:
            inside = [name if name.rpartition("/")[0] == flat else "" for name in names]
            parts["val"] = _part(listed, inside, _stem, refuse)
    return parts | _places_parts(names, where, refuse)


# --- any list -----------------------------------------------------------------------------------------------------


def _part(listed: _List, names: Sequence[str], key: Callable[[str], str], refuse: bool) -> ListedPart:
    """The images of a list, in its order.

    Args:
        listed: the list.
        names: the files that there are; empty for those that do not count.
        key: from a file's name to its name in the list.
        refuse: whether a missing image ends the work.
    """
    there = {key(name): position for position, name in enumerate(names) if name}
    missing = [name for name in listed.labels if name not in there]
    if len(missing) == len(listed.labels):
        raise UsageError(f"None of the images in {listed.file} is there: the first is {missing[0]}.")
    if missing:
        said = f"{len(missing):,} of the {len(listed.labels):,} images in {listed.file} are missing: {missing[0]}"
        said += ", …" if len(missing) > 1 else ""
        if refuse:
            raise ExciteError(f"{said}. Fetch them, or let them be skipped.")
        logger.warning("%s", said)
    found = [(there[name], label) for name, label in listed.labels.items() if name in there]
    if len(found) < len(there):
        logger.info("%s does not list %d of the images: they are left out", listed.file, len(there) - len(found))
    labels = [label for _, label in found]
    return ListedPart([position for position, _ in found], labels, set(labels), listed.order)


def _same(name: str) -> str:
    return name


def _plain_list(file: Path) -> _List:
    """Lines of ``path class``; the class is what comes after the last blank."""
    labels = dict(_pairs(file))
    if not all(label.isdecimal() for label in labels.values()):
        return _List(file, labels)
    if all(_IMAGENET.fullmatch(name.rpartition("/")[2]) for name in labels):
        return _numbered(file, labels, _synsets(file.parent))
    # Numbers in the order of numbers: as words, 10 would come before 2.
    numbers = sorted({int(label) for label in labels.values()})
    return _List(file, {name: str(int(label)) for name, label in labels.items()}, tuple(map(str, numbers)))


def _numbered(file: Path, labels: Mapping[str, str], classes: Sequence[str]) -> _List:
    """A list whose classes are counted from 0, with their names."""
    for name, label in labels.items():
        if not (label.isdecimal() and int(label) < len(classes)):
            raise UsageError(f"{file} gives {name} the class {label}: they count from 0 to {len(classes) - 1}.")
    return _List(file, {name: classes[int(label)] for name, label in labels.items()}, tuple(classes))


def _pairs(file: Path, rooted: bool = False) -> Iterator[tuple[str, str]]:
    """The lines ``path class`` of a list; ``rooted`` for paths that begin with a stroke, which means the root.

    Raises:
        UsageError: a line is another, names an image twice, or leads out of the root.
    """
    seen = set()
    for number, line in enumerate(_lines(file), start=1):
        name, _, label = line.replace("\t", " ").rpartition(" ")
        name = name.strip().removeprefix("/" if rooted else "").removeprefix("./")
        if not name:
            raise UsageError(
                f"Line {number} of {file} is {line[:80]!r}: expected is the path of an image and its class."
            )
        if PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            raise UsageError(
                f"Line {number} of {file} names {name!r}: paths must lie below the folder of the images."
            )
        if name in seen:
            raise UsageError(f"Line {number} of {file} names {name!r} a second time: take one of them out.")
        seen.add(name)
        yield name, label
    if not seen:
        raise UsageError(f"{file} lists no images.")


def _lines(file: Path) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8-sig") as text:
            yield from (line.strip() for line in text if line.strip())
    except OSError as error:
        raise ExciteError(f"Cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not a list: it is no text.") from None


def _root(listed: _List) -> Path:
    """The nearest folder below which the first images of a list are.

    Raises:
        UsageError: there is none.
    """
    own = listed.file.absolute().parent
    first = list(listed.labels)[:10]
    for root in (own, *_folders_in(own), *list(own.parents)[:_LEVELS]):
        if any((root / name).is_file() for name in first):
            return root
    raise UsageError(f"The images in {listed.file} are not found: there is no {own / first[0]}, and none near it.")


def _folders_in(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir())


def _files_in(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except OSError:
        return set()  # its images are missing, which is told


def _above(where: Path) -> list[Path]:
    """A folder or file, and the folders above it in which a list may lie."""
    return [where.absolute(), *list(where.absolute().parents)[:_LEVELS]]


# --- ImageNet's validation images ----------------------------------------------------------------------------------


def _flat_imagenet(names: Sequence[str]) -> str | None:
    """The one folder in which ImageNet's validation images lie; None where they are not, or are in class folders."""
    found = [name for name in names if name.rpartition("/")[2].startswith("ILSVRC2012_val_")]
    folders = {name.rpartition("/")[0] for name in found if _IMAGENET.fullmatch(name.rpartition("/")[2])}
    folder = folders.pop() if len(folders) == 1 else None
    return None if folder is None or SYNSET.fullmatch(folder.rpartition("/")[2]) else folder


def _find_imagenet_list(where: Path, flat: str) -> Path:
    """The list that says the classes of the validation images.

    Raises:
        UsageError: there is none.
    """
    wanted = [Path(_CAFFE), Path(_KAGGLE), *(Path(folder, _DEVKIT) for folder in _DEVKIT_FOLDERS)]
    for folder in _above(where / flat if where.is_dir() else where):
        for name in wanted:
            if (file := folder / name).is_file() and _is_for_imagenet(file):
                return file
    raise UsageError(
        f"{where} holds ImageNet's validation images in one folder, and nothing says their classes: put val.txt, "
        "LOC_val_solution.csv, or the folder ILSVRC2012_devkit_t12 beside it."
    )


def _is_for_imagenet(file: Path) -> bool:
    """Whether a list with a name as common as val.txt is ImageNet's."""
    return file.name != _CAFFE or _IMAGENET.match(next(_lines(file), "").rpartition("/")[2]) is not None


def _root_of_imagenet(file: Path) -> Path | None:
    """The nearest folder with validation images, around a list of them; None where there is none."""
    if not _is_for_imagenet(file):
        return None
    own, *above = _above(file)[1:]
    near = [
        folder / name for folder in (own, *above) for name in ("", "val", "ILSVRC2012_img_val", "Data/CLS-LOC/val")
    ]
    for root in (own, *_folders_in(own), *near):
        if any(_IMAGENET.fullmatch(name) for name in _files_in(root)):
            return root
    raise UsageError(f"{file} lists ImageNet's validation images, and there are none in {own} or near it.")


def _imagenet_list(file: Path) -> _List:
    """The synset of each validation image, by the image's name without its suffix."""
    if file.name == _DEVKIT:
        return _devkit_list(file)
    if file.name == _KAGGLE:
        return _List(file, dict(_kaggle_rows(file)))
    return _numbered(file, {_stem(name): label for name, label in _pairs(file)}, _synsets(file.parent))


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


def _synsets(folder: Path) -> Sequence[str]:
    """The WordNet ids of ImageNet's classes in their order, by a file beside a list, or by timm.

    Raises:
        UsageError: neither is there.
    """
    for name in _SYNSET_FILES:
        if (folder / name).is_file():
            ids = [line.split()[0] for line in _lines(folder / name)]
            if not all(SYNSET.fullmatch(one) for one in ids):
                raise UsageError(
                    f"{folder / name} must have a WordNet id such as n01440764 at the start of each line."
                )
            return ids
    if (ids_by_timm := imagenet_synsets()) is None:
        raise UsageError(
            f"The list in {folder} numbers ImageNet's classes, and only their WordNet ids say which is which: pip "
            "install 'excite[timm]', or put Caffe's synsets.txt beside it."
        )
    return ids_by_timm


def _kaggle_rows(file: Path) -> Iterator[tuple[str, str]]:
    """``ImageId,PredictionString``, where the latter begins with the WordNet id of the image's class."""
    rows = csv.reader(_lines(file))
    if next(rows, None) != ["ImageId", "PredictionString"]:
        raise UsageError(f"{file} must begin with the line ImageId,PredictionString.")
    for number, row in enumerate(rows, start=2):
        synset = row[1].split()[0] if len(row) == 2 and row[1].split() else ""
        if not SYNSET.fullmatch(synset):
            raise UsageError(f"Line {number} of {file} is no image's name and its class, such as n01440764 1 2 3 4.")
        yield row[0], synset


def _devkit_list(file: Path) -> _List:
    """The development kit's: one number a line, of a class in its own order, which only ``meta.mat`` tells."""
    candidates = [folder / name / "meta.mat" for folder in _above(file)[1:] for name in _DEVKIT_FOLDERS]
    meta = next((path for path in candidates if path.is_file()), None)
    if meta is None:
        raise UsageError(
            f"{file} numbers the classes in an order of its own, which only the development kit's meta.mat tells: "
            "put that beside it (ILSVRC2012_devkit_t12/data/meta.mat)."
        )
    synsets = _read_meta(meta)
    labels = {}
    for number, line in enumerate(_lines(file), start=1):
        if not line.isdecimal() or int(line) not in synsets:
            raise UsageError(f"Line {number} of {file} is {line[:80]!r}, and {meta} knows no such class.")
        labels[f"ILSVRC2012_val_{number:08d}"] = synsets[int(line)]
    if not labels:
        raise UsageError(f"{file} lists no images.")
    return _List(file, labels, tuple(sorted(synsets.values())))


def _read_meta(path: Path) -> dict[int, str]:
    """The WordNet ids of the classes by their number in the development kit.

    Its table also has the groups of classes, as nodes with children.

    Raises:
        ExciteError: it is damaged, or something else.
    """
    if path.stat().st_size > _LONGEST_META:
        raise ExciteError(f"{path} is too large for the development kit's meta.mat.")
    mat5_arrays(path)  # refuses what is cut off, on which SciPy may crash
    from scipy.io import loadmat

    try:
        table: Any = loadmat(path, squeeze_me=True)["synsets"]
        rows = zip(table["ILSVRC2012_ID"], table["WNID"], table["num_children"], strict=True)
        synsets = {int(number): str(synset) for number, synset, children in rows if int(children) == 0}
    except Exception as error:  # SciPy raises nearly anything on bad input
        raise ExciteError(f"{path} is damaged, or is not the development kit's meta.mat.") from error
    if not synsets or not all(SYNSET.fullmatch(one) for one in synsets.values()):
        raise ExciteError(f"{path} is damaged: it has no WordNet ids such as n01440764.")
    return synsets


# --- Places365 ----------------------------------------------------------------------------------------------------


def _places_parts(names: Sequence[str], where: Path, refuse: bool) -> dict[str, ListedPart]:
    """The splits by the lists of Places365 that lie in the folder, or in the one above it."""
    parts: dict[str, ListedPart] = {}
    for file_name, split in _PLACES.items():
        file = next((folder / file_name for folder in _above(where)[:2] if (folder / file_name).is_file()), None)
        if file is None or split in parts:
            continue
        # The images lie in data_256, data_large, val_256 …, whose files the list names from there.
        first = next(_pairs(file, rooted=True))[0]
        if (folder := _folder_of(first, names)) is not None:
            inside = [name.removeprefix(folder) if name.startswith(folder) else "" for name in names]
            parts[split] = _part(_places_list(file), inside, _same, refuse)
    return parts


def _folder_of(listed: str, names: Sequence[str]) -> str | None:
    """Where a listed file lies, as the beginning of its name; of several places the first by name."""
    found = (name for name in names if name == listed or name.endswith(f"/{listed}"))
    nearest = min(found, default=None)
    return None if nearest is None else nearest[: len(nearest) - len(listed)]


def _places_list(file: Path) -> _List:
    """Places365's numbers with the names of its categories.

    Raises:
        UsageError: there are no names beside it.
    """
    categories = file.parent / _CATEGORIES
    if not categories.is_file():
        raise UsageError(f"{file} numbers the classes: put {_CATEGORIES}, which names them, beside it.")
    numbers: dict[int, str] = {}
    for name, number in _pairs(categories, rooted=True):
        # /a/airfield: the first step is only the initial.
        numbers[int(number) if number.isdecimal() else -1] = name.partition("/")[2]
    if sorted(numbers) != list(range(len(numbers))) or not all(numbers.values()):
        raise UsageError(f"{categories} must have lines such as '/a/airfield 0', numbered from 0 on.")
    return _numbered(file, dict(_pairs(file, rooted=True)), [numbers[i] for i in range(len(numbers))])

"""From a data spec to images: ``digits``, ``cifar10``, ``PATH`` or ``kind:PATH``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from excite.data import digits
from excite.data.augment import PHOTOS, SMALL_IMAGES, Augmentation
from excite.data.base import (
    CIFAR_MEAN,
    CIFAR_STD,
    GREY_WEIGHTS,
    ImageData,
    Split,
    StackedImages,
)
from excite.data.cifar import MEAN_STD, load_cifar
from excite.data.cube import INDIAN_PINES, is_scene
from excite.data.cube import KIND as SCENES
from excite.data.draws import Indices, hold_out
from excite.data.encoded import (
    DecodedImages,
    FileSource,
    Listing,
    Progress,
    decode_apart,
    decode_stacked,
    left_encoded,
    probe_sizes,
)
from excite.data.folder import FolderFiles
from excite.data.layout import Part
from excite.data.listed import ListedPart, list_file, parts_of
from excite.data.remote import CACHE_GB
from excite.data.shards import ShardFiles, one_shard, open_shards, tell_missing
from excite.data.tar import TarFiles
from excite.errors import UsageError, nearest
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

logger = logging.getLogger("excite.data")

SMALL = 64  # pixels: sets of images no larger than this are used at their own size
OWN_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class _Options:
    """The arguments of :func:`load_data`."""

    name: str
    test: str | None
    val_fraction: float
    preprocessing: Preprocessing | None
    image_size: int | None
    resize: int | None
    interpolation: str | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    channels: int
    broken: str
    seed: int
    classes: tuple[str, ...] | None
    all_for_test: bool
    memory_limit: int
    cache_gb: float
    own_size: bool
    progress: Progress | None


def load_data(
    spec: str | Path,
    *,
    test: str | Path | None = None,
    val_fraction: float = 0.0,
    preprocessing: Preprocessing | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int = 3,
    broken: str = "skip",
    seed: int = 0,
    root: str | Path | None = None,
    classes: Sequence[str] | None = None,
    all_for_test: bool = False,
    memory_limit: int = 1 << 30,
    cache_gb: float = CACHE_GB,
    own_size: bool = False,
    progress: Progress | None = None,
) -> ImageData:
    """Load labelled images by their data spec.

    ``digits`` (built in), ``cifar10`` and ``cifar100`` (local copy or download), or the path of a folder or tar
    of class folders: ``cat/1.jpg``, or ``train/cat/1.jpg`` and ``test/cat/9.jpg``. Where a set has ``val/`` but
    no ``test/``, ``val/`` is the test split. Where it has neither splits nor ``test``, a fifth of every class is
    held out for test, chosen by the images' names, and a log line says so. ``folder:PATH``, ``tar:PATH`` and
    ``cifar10:FOLDER`` name the kind. ``shards:DIR`` reads what ``excite data pack`` has made of such a folder, from
    a folder or an address such as ``s3://bucket/prefix``.

    ``list:FILE`` takes the classes from a list, with lines of an image's path and its class. ImageNet's validation
    images in one folder and Places365 are read as they come, by the lists that lie beside them
    (:mod:`excite.data.listed`).

    Small sets (no image above 64 pixels) are used at their own size; of others the shorter side is resized to
    256 pixels and the central 224×224 are used. A set that takes at most ``memory_limit`` bytes is decoded
    once; a larger one each time an image is needed.

    Args:
        spec: the data spec.
        test: where the test images are, if they are not within ``spec``.
        val_fraction: share of the training images of every class that is set aside for validation, in [0, 1).
        preprocessing: a trained network's, instead of the usual for such images; the digits keep their canvas. What
            is given beside it goes before it.
        image_size: another input size, in pixels; what the shorter side is resized to changes in proportion.
        resize: what the shorter side is resized to, in pixels, before the centre is cropped.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        mean: per channel, of pixels scaled to [0, 1]; instead of the set's usual figures.
        std: likewise.
        channels: 3 for colour, 1 for grey; those of ``preprocessing`` where that is given.
        broken: ``"skip"`` or ``"refuse"`` images that cannot be decoded.
        seed: of the validation split.
        root: where downloaded sets are kept.
        classes: the classes of a trained network, in its order; by default those of the training images, sorted.
        all_for_test: take all of a set without splits for test, and nothing to train on.
        memory_limit: bytes that decoded images may take.
        cache_gb: gigabytes of shards from object storage that are kept on the local disk.
        own_size: keep every image at its own size, for views of it that are not those of the preprocessing.
        progress: called with (images done, images in all) while images are decoded.

    Raises:
        UsageError: the spec is unknown, a path is missing, or the set is not one to learn classes from.
        ExciteError: files cannot be read; an image is broken and ``broken`` is ``"refuse"``.
    """
    name = str(spec)
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction is {val_fraction}: a share of the training images lies in 0 … 1.")
    if broken not in ("skip", "refuse"):
        raise UsageError(f"broken is {broken!r}: choose 'skip' or 'refuse'.")
    options = _Options(
        name=name,
        test=None if test is None else str(test),
        val_fraction=val_fraction,
        preprocessing=preprocessing,
        image_size=image_size,
        resize=resize,
        interpolation=interpolation,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        channels=preprocessing.channels if preprocessing else channels,
        broken=broken,
        seed=seed,
        classes=None if classes is None else tuple(classes),
        all_for_test=all_for_test,
        memory_limit=memory_limit,
        cache_gb=cache_gb,
        own_size=own_size,
        progress=progress,
    )
    kind, path = _parse(name)
    if kind in _FILES:
        return _load_files(kind, path, options)
    if options.test is not None:
        raise UsageError(f"{kind} has its own test images: leave out the test data {options.test!r}.")
    data = _load_digits(options) if kind == "digits" else _load_cifar(kind, path or root, options)
    if options.classes is not None and options.classes != data.classes:
        raise UsageError(
            f"{kind} has the classes {_some(data.classes)}, but the network has {_some(options.classes)}."
        )
    return data


def adjusted(
    preprocessing: Preprocessing,
    *,
    image_size: int | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocessing:
    """A preprocessing with what was asked for; arguments as for :func:`load_data`.

    Raises:
        UsageError: the values do not make a preprocessing.
    """
    size = image_size or preprocessing.size
    if resize is None and preprocessing.resize is not None:
        resize = round(size * preprocessing.resize / preprocessing.size)
    return replace(
        preprocessing,
        size=size,
        resize=resize,
        interpolation=interpolation or preprocessing.interpolation,
        mean=preprocessing.mean if mean is None else tuple(mean),
        std=preprocessing.std if std is None else tuple(std),
    )


_KINDS: dict[str, str] = {
    "digits": "takes no path",
    "cifar10": "may have one",
    "cifar100": "may have one",
    "folder": "needs one",
    "tar": "needs one",
    "shards": "needs one",
    "list": "needs one",
}
_FILES = ("folder", "tar", "shards", "list")


def _parse(spec: str) -> tuple[str, str]:
    """Kind and path of a data spec."""
    kind, colon, path = spec.partition(":")
    if kind in _KINDS and (colon or _KINDS[kind] != "needs one"):
        if (_KINDS[kind] == "takes no path" and colon) or (colon and not path):
            raise UsageError(f"In the data spec {spec!r}, {kind!r} {_KINDS[kind]}.")
        return kind, path
    if Path(spec).is_dir():
        return "folder", spec
    if Path(spec).is_file():
        return "tar", spec
    if is_scene(spec):
        raise UsageError(f"{spec} names a hyperspectral scene, and not a set of images.")
    if "/" in spec or "\\" in spec or ".tar" in spec:
        raise UsageError(f"There is no folder or file {spec}.")
    kinds = [*_KINDS, INDIAN_PINES, f"{SCENES}:PATH"]
    hint = nearest(kind, kinds)
    known = f"{', '.join(kinds)}, and the path of a folder or tar of class folders or of a scene"
    raise UsageError(" ".join(filter(None, [f"Unknown data {spec!r}:", hint, f"known are {known}."])))


def _load_digits(options: _Options) -> ImageData:
    if options.image_size not in (None, digits.CANVAS) or options.resize not in (None, digits.CANVAS):
        raise UsageError(
            f"digits are drawn on {digits.CANVAS}×{digits.CANVAS} pixels: leave image_size and resize out."
        )
    preprocessing = replace(
        _preprocessing(digits.CANVAS, None, digits.MEAN, digits.STD, options), size=digits.CANVAS, resize=None
    )
    return digits.load_digits(options.val_fraction, preprocessing, options.seed)


def _load_cifar(kind: str, root: str | Path | None, options: _Options) -> ImageData:
    classes, train, test = load_cifar(kind, root)
    preprocessing = _preprocessing(32, None, *MEAN_STD[kind], options)
    val = None
    if options.val_fraction:
        held = hold_out(train.labels.numpy(), train.names, options.val_fraction, options.seed)
        train, val = _stacked_part(train, ~held), _stacked_part(train, held)
    if preprocessing.size == 32 and preprocessing.resize not in (None, 32):
        # Stacked images of the input's size are taken to be ready; these are still to be resized and cropped.
        train, val, test = _apart(train), val and _apart(val), _apart(test)
    return ImageData(options.name, classes, preprocessing, train, val, test, SMALL_IMAGES)


def _stacked_part(split: Split, chosen: np.ndarray) -> Split:
    assert isinstance(split.images, StackedImages)
    mask = torch.from_numpy(chosen)
    labels = split.labels[mask]
    names = [name for name, one in zip(split.names, chosen, strict=True) if one]
    return Split(StackedImages(split.images.pixels[mask], labels), labels, names, split.num_classes)


def _apart(split: Split) -> Split:
    assert isinstance(split.images, StackedImages)
    return replace(split, images=DecodedImages(list(split.images.pixels), split.labels))


def _load_files(kind: str, path: str, options: _Options) -> ImageData:
    """A folder or a tar: find the splits, the classes, the usual preprocessing, and decode."""
    found = _open(kind, path, options)
    if options.test is not None:
        found = {"train": _training_part(found, path), **_keep(found, "val"), "test": _test_part(options)}
    elif "" in found:
        found = {"test": found[""]} if options.all_for_test else _hold_out_test(found[""], path)
    elif "test" not in found and "val" in found:
        found = {**_keep(found, "train"), "test": found["val"]}
    if "val" in found and options.val_fraction:
        raise UsageError(f"{path} has its own val/ folder: leave val_fraction at 0.")

    classes = options.classes or found.get("train", found.get("test", _Found())).in_order("train" in found)
    listings = {split: part.listing(classes, split) for split, part in found.items()}
    if options.classes is None and len(classes) < 2:
        raise UsageError(
            f"{path} has the one class {classes[0]!r}: classification needs at least two class folders with images."
        )
    if options.val_fraction and "train" in listings:
        train = listings["train"]
        held = hold_out(train.labels, train.names(), options.val_fraction, options.seed)
        listings |= {"train": train.only(~held), "val": train.only(held)}

    main = listings.get("train") or listings["test"]
    preprocessing, make, augmentation = _plan(main, listings, len(classes), path, options)
    splits = {split: make(listing) for split, listing in listings.items()}
    if "train" in splits:
        missing = np.flatnonzero(np.bincount(splits["train"].labels.numpy(), minlength=len(classes)) == 0)
        if len(missing) and options.classes is None:
            raise UsageError(f"No image of the class {classes[missing[0]]!r} in {path} can be read for training.")
    return ImageData(
        options.name,
        classes,
        preprocessing,
        splits.get("train"),
        splits.get("val"),
        splits.get("test"),
        augmentation,
    )


class _Found:
    """One split as it was found: its source, and its files by class folder."""

    def __init__(self, source: FileSource | None = None, part: Part | None = None, path: str = "") -> None:
        self.source = source
        self.part = part or Part()
        self.path = path

    def classes(self) -> set[str]:
        return self.part.folders

    def in_order(self, training: bool) -> tuple[str, ...]:
        """The classes, sorted, or as a list numbers them: those without images only where nothing is learned."""
        order = self.part.order if isinstance(self.part, ListedPart) else ()
        there = self.classes()
        return tuple(name for name in order if name in there or not training) or tuple(sorted(there))

    def as_part(self) -> Part:
        return self.part

    def listing(self, classes: Sequence[str], split: str) -> Listing:
        """Files and class indices.

        Raises:
            UsageError: a class folder is empty, or is not among ``classes``.
        """
        where = f"the {split} images of {self.path}"
        if empty := sorted(self.part.folders - set(self.part.classes)):
            raise UsageError(f"The class folder {empty[0]!r} in {where} has no images: fill it or remove it.")
        number = _numbers(sorted(self.part.folders), classes, where)
        labels = np.array([number[name] for name in self.part.classes], dtype=np.int64)
        assert self.source is not None
        return Listing(self.source, np.array(self.part.files, dtype=np.int64), labels)


def _numbers(names: Sequence[str], classes: Sequence[str], where: str) -> dict[str, int]:
    """The number of each of ``classes``, once it is known that all names are among them."""
    number = {name: i for i, name in enumerate(classes)}
    for name in names:
        if name not in number:
            hint = nearest(name, list(classes))
            known = f"the {len(classes)} classes: {_some(classes)}"
            raise UsageError(f"The class {name!r} in {where} is none of {known}. {hint}".strip())
    return number


class _FoundShards(_Found):
    """A split in shards: its labels are the index's, as an array, and the order of the classes is, too."""

    def __init__(self, files: ShardFiles, path: str) -> None:
        super().__init__(files, None, path)
        labels = files.index.label
        there = np.unique(labels)
        self._names = [files.index.classes[label] for label in there]
        self._label = np.searchsorted(there, labels)
        self._order = files.index.classes

    def classes(self) -> set[str]:
        return set(self._names)

    def in_order(self, training: bool) -> tuple[str, ...]:
        return tuple(self._names) if training else self._order

    def listing(self, classes: Sequence[str], split: str) -> Listing:
        number = _numbers(self._names, classes, f"the {split} images of {self.path}")
        assert self.source is not None
        labels = np.array([number[name] for name in self._names], dtype=np.int64)[self._label]
        return Listing(self.source, np.arange(len(labels)), labels)

    def as_part(self) -> Part:
        """Its images as those of a folder are listed."""
        names = [self._names[i] for i in self._label]
        return ListedPart(list(range(len(names))), names, self.classes(), self._order)


def _open(kind: str, path: str, options: _Options) -> dict[str, _Found]:
    if kind == "shards":
        shards = open_shards(path, options.cache_gb)
        for files in shards.values():
            tell_missing(files, options.broken == "refuse")
        return {name: _FoundShards(files, path) for name, files in shards.items()}
    refuse = options.broken == "refuse"
    if kind == "list":
        listed_files, listed = list_file(Path(path), refuse)
        return {"": _Found(listed_files, listed, path)}
    source: FileSource = FolderFiles(path) if kind == "folder" else TarFiles(path, options.memory_limit)
    return {name: _Found(source, part, path) for name, part in parts_of(source, Path(path), refuse).items()}


def _keep(found: dict[str, _Found], name: str) -> dict[str, _Found]:
    return {name: found[name]} if name in found else {}


def _training_part(found: dict[str, _Found], path: str) -> _Found:
    if "test" in found and "train" in found:
        logger.info("%s: its own test/ is not used, as test data are given apart", path)
    for name in ("train", ""):
        if name in found:
            return found[name]
    raise UsageError(f"{path} holds no training images, only {', '.join(sorted(found))}/.")


def _test_part(options: _Options) -> _Found:
    assert options.test is not None
    kind, path = _parse(options.test)
    if kind not in _FILES:
        raise UsageError(
            f"The test data {options.test!r} must be the path of a folder or tar of class folders, shards:DIR, or "
            "list:FILE."
        )
    found = _open(kind, path, options)
    for name in ("test", "val", ""):
        if name in found:
            return found[name]
    raise UsageError(f"{path} is given as test data, but holds only training images (train/).")


def _hold_out_test(found: _Found, path: str) -> dict[str, _Found]:
    assert found.source is not None
    part = found.as_part()
    labels = np.unique(np.array(part.classes), return_inverse=True)[1].astype(np.int64)
    # Always the same images whatever the seed: runs with different seeds are to be scored on the same test.
    held = hold_out(labels, [found.source.names[i] for i in part.files], OWN_TEST_FRACTION, 0)
    logger.warning(
        "%s has no test split: %d of its %d images, a fifth of every class, are held out for test",
        path,
        held.sum(),
        len(held),
    )

    def half(chosen: Indices, folders: set[str]) -> _Found:
        classes = [part.classes[i] for i in chosen]
        order = part.order if isinstance(part, ListedPart) else ()
        own = ListedPart([part.files[i] for i in chosen], classes, folders or set(classes), order)
        return _Found(found.source, own, path)

    # An empty class folder is told of once, in training; a class of one image stays there.
    return {
        "train": half(np.flatnonzero(~held), set(part.folders)),
        "test": half(np.flatnonzero(held), set()),
    }


def _plan(
    main: Listing, listings: dict[str, Listing], num_classes: int, path: str, options: _Options
) -> tuple[Preprocessing, Callable[[Listing], Split], Augmentation]:
    """Look at the images' sizes: the preprocessing, how the splits are kept, and the usual augmentation."""
    sizes = probe_sizes(one_shard(main))
    if not len(sizes):
        raise UsageError(f"None of the images tried in {path} can be read.")
    total = sum(len(listing) for listing in listings.values())
    small = sizes.max() <= SMALL
    if small:
        sides, counts = np.unique(sizes.min(axis=1), return_counts=True)
        preprocessing = _preprocessing(int(sides[counts.argmax()]), None, CIFAR_MEAN, CIFAR_STD, options)
    else:
        preprocessing = _preprocessing(224, 256, IMAGENET_MEAN, IMAGENET_STD, options)
    size = preprocessing.size
    # Small images for a network of large ones stay as they are until they are needed.
    stacked = small and (size <= SMALL or options.preprocessing is None) and not options.own_size
    if small and (sizes != size).any() and not options.own_size:
        logger.info("%s: images are resized and cropped to %d×%d", path, size, size)
    bytes_each = float(options.channels * (size * size if stacked else sizes.prod(axis=1).mean()))

    def make(listing: Listing) -> Split:
        if total * bytes_each > options.memory_limit:
            return left_encoded(listing, num_classes, options.channels, options.broken)
        if stacked:
            return decode_stacked(listing, num_classes, preprocessing, options.broken, options.progress)
        return decode_apart(listing, num_classes, options.channels, options.broken, options.progress)

    return preprocessing, make, SMALL_IMAGES if small else PHOTOS


def _preprocessing(
    size: int, resize: int | None, mean: tuple[float, ...], std: tuple[float, ...], options: _Options
) -> Preprocessing:
    """The set's usual preprocessing, or the one given in its place, with what else was asked for."""
    if options.channels == 1:
        mean, std = ((sum(w * v for w, v in zip(GREY_WEIGHTS, three, strict=True)),) for three in (mean, std))
    usual = Preprocessing(size, mean, std, resize, channels=options.channels)
    return adjusted(
        options.preprocessing or usual,
        image_size=options.image_size,
        resize=options.resize,
        interpolation=options.interpolation,
        mean=options.mean,
        std=options.std,
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (", …" if len(names) > 5 else "")

"""Pairs of an image and a text for cross-modal retrieval: from a data spec to training, validation and test pairs.

A pair's image and text are vectors that were computed elsewhere, or a picture and a string. What turns them into a
network's input is fitted on the training pairs alone, after the validation pairs have been taken out of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from excite.data.crossmodal_find import KIND, find_pairs
from excite.data.crossmodal_inputs import Inputs, Standardise, as_they_are, fit_standardise
from excite.data.crossmodal_pairs import Files, Pairs
from excite.data.crossmodal_pictures import Pictures, read_pictures
from excite.data.digits_words import DIGITS_WORDS, TEXT
from excite.data.draws import Indices
from excite.data.encoded import Progress
from excite.data.load import adjusted
from excite.data.text_vectors import LARGEST_VOCABULARY, SENTENCE, TFIDF, TextVectors, check_text, fit_text_vectors
from excite.errors import ExciteError, UsageError
from excite.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

logger = logging.getLogger("excite.data")

IMAGE_SIZE, RESIZE = 224, 256
EACH, ALIKE, NONE = "each", "alike", "none"

ImagesAndTexts = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class CrossmodalSplit:
    """The training, validation or test pairs of a set.

    Attributes:
        images: standardised vectors, float32 (N, d), or pictures, which may be decoded only when they are needed.
        texts: float32 (N, t).
        labels: 1 for each class that a pair has, else 0: float32 (N, classes).
        names: of the pairs: the picture's file, or where the pair stands in its file.
        strings: the texts themselves, None where they are ready vectors.
        broken: names of the pairs that were skipped because their picture cannot be read.
        content: a checksum of the pairs as they are stored.
    """

    images: torch.Tensor | Pictures
    texts: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...]
    strings: tuple[str, ...] | None = None
    broken: tuple[str, ...] = ()
    content: bytes = b""

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> torch.Tensor:
        """The image of pair ``i`` as it is fed to the network: float32 (d,) or (C, H, W).

        Raises:
            ExciteError: its picture cannot be decoded, which was not seen before.
        """
        return self.images[i] if isinstance(self.images, torch.Tensor) else self.images.image(i)

    def batch(self, indices: Indices | Sequence[int]) -> tuple[ImagesAndTexts, torch.Tensor]:
        """Some pairs: ((images (n, …), texts (n, t)), labels (n, classes)), all float32.

        Raises:
            ExciteError: a picture cannot be decoded, which was not seen before.
        """
        pairs, labels, _, broken = self.read(np.asarray(indices, dtype=np.int64))
        for name, reason in broken.items():
            raise ExciteError(f"The image {name} is broken ({reason}): mend or remove it.")
        return pairs, labels

    def read(self, indices: Indices) -> tuple[ImagesAndTexts, torch.Tensor, Indices, dict[str, str]]:
        """As :meth:`batch`, without the pairs whose picture is broken; which are left, and why the others are not."""
        broken: dict[str, str] = {}
        if isinstance(self.images, torch.Tensor):
            images = self.images[torch.from_numpy(indices)]
        else:
            images, good, broken = self.images.read(indices)
            indices = indices[good]
        chosen = torch.from_numpy(indices)
        return (images, self.texts[chosen]), self.labels[chosen], indices, broken

    def key(self) -> bytes:
        """What scores on these pairs hang on, beside the network: which they are, and their labels."""
        return self.content


@dataclass(frozen=True, eq=False)
class CrossmodalData:
    """Pairs of images and texts, ready for a retrieval network.

    Attributes:
        name: the data spec that they came from.
        classes: class names, in the order of the labels.
        train: None where the set is for testing only.
        val: taken from the training pairs, or the set's own, or None.
        test: None where the set is for training only.
        inputs: how images and texts become a network's input.
        options: what :func:`load_crossmodal` was asked for, with its defaults, in plain values.
    """

    task: ClassVar[str] = "retrieval"

    name: str
    classes: tuple[str, ...]
    train: CrossmodalSplit | None
    val: CrossmodalSplit | None
    test: CrossmodalSplit | None
    inputs: Inputs
    options: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(d,)`` of vectors, ``(C, H, W)`` of pictures."""
        return self.inputs.image_shape

    @property
    def text_dim(self) -> int:
        """The length of a text's vector."""
        return self.inputs.text_dim

    @property
    def images(self) -> Standardise | Preprocessing:
        """How an image becomes input."""
        return self.inputs.images

    @property
    def texts(self) -> TextVectors | None:
        """What turns strings into vectors; None where texts are ready vectors."""
        return self.inputs.texts

    @property
    def preprocessing(self) -> Preprocessing:
        """Of pictures; where images are vectors, a pair's two vectors side by side as one pixel of many channels."""
        if isinstance(self.images, Preprocessing):
            return self.images
        length = self.image_shape[0] + self.text_dim
        return Preprocessing(1, (0.0,) * length, (1.0,) * length, channels=length)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a run has to keep to take new images and texts; :meth:`read` reads it."""
        return self.inputs.tensors()

    @staticmethod
    def read(tensors: Mapping[str, torch.Tensor]) -> Inputs:
        """What :meth:`tensors` gave.

        Raises:
            ExciteError: something is missing, or does not fit together.
        """
        return Inputs.read(tensors)


def is_crossmodal(spec: str) -> bool:
    """Whether a data spec names pairs of images and texts: ``crossmodal:PATH`` or ``digits-words``."""
    return spec == DIGITS_WORDS or spec.startswith(f"{KIND}:")


def load_crossmodal(
    spec: str,
    *,
    test: str | None = None,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    text: str | None = None,
    text_dim: int | None = None,
    scaling: str | None = None,
    image_size: int | None = None,
    broken: str = "skip",
    inputs: Inputs | None = None,
    classes: Sequence[str] | None = None,
    all_for_test: bool = False,
    memory_limit: int = 1 << 30,
    progress: Progress | None = None,
) -> CrossmodalData:
    """Find pairs of images and texts, divide them, and make them a network's input.

    ``crossmodal:PATH`` is

    * a ``.mat`` or ``.npz`` file, or a folder of such, whose arrays have the names of the Wikipedia set or those of
      DSCMR's authors; see :mod:`excite.data.crossmodal_arrays`;
    * a CSV file with the columns ``file,text,labels`` and perhaps ``split``, or the folder that it is in; see
      :mod:`excite.data.crossmodal_table`.

    ``digits-words`` are the digits that come with scikit-learn, and what they look like in words.

    Where a set says nothing of a test split, a fifth of the pairs of every class is held out for test, chosen by
    their names, and a log line says so. The set's own validation pairs are used where it has some; else they are
    taken out of the training pairs.

    Vectors are held in memory as float32. So are pictures that take at most ``memory_limit`` bytes at the network's
    size; of more, each is decoded when it is needed.

    Args:
        spec: the data spec.
        test: the path of the test pairs, if they are not within ``spec``.
        val_fraction: share of the training pairs of every class that is set aside for validation, in [0, 1).
        split_seed: of the choice of validation pairs.
        text: how strings become vectors: ``"tfidf"``, ``"tfidf:N"`` with runs of up to N words beside the words, or
            ``"sentence:MODEL"`` with a model of sentence-transformers; ``"tfidf"`` by default, and for
            ``digits-words`` ``"tfidf:3"``.
        text_dim: the most terms that TF-IDF counts, 5,000 by default.
        scaling: how vectors are scaled once they are centred, both by the training pairs: ``"each"`` number to
            variance 1, all ``"alike"`` to a mean variance of 1, or ``"none"``, which leaves them as they are. Two
            with a comma, ``"alike,each"``, are for images and for texts. By default each, and vectors of strings
            alike.
        image_size: side of a picture as the network sees it, in pixels: 224 by default, cut from the middle of 256.
        broken: ``"skip"`` or ``"refuse"`` pairs whose picture cannot be decoded.
        inputs: those of a trained network, which are then not fitted anew; ``text``, ``text_dim`` and ``scaling``
            do not count beside it.
        classes: the classes of a trained network, in its order.
        all_for_test: take all pairs of a set without splits for test, and none to train on.
        memory_limit: bytes that decoded pictures may take.
        progress: called with (pictures done, pictures in all) while pictures are decoded.

    Raises:
        UsageError: there are no such pairs, images and texts are not equally many, a pair has no label or an empty
            text, a picture's file is missing, the test pairs have a class that the training pairs do not have, an
            option does not fit the data, or the data do not fit ``inputs``.
        ExciteError: a file cannot be read, vectors hold values that are not finite numbers, no picture of a split can
            be read, or one is broken and ``broken`` is ``"refuse"``.
    """
    _check(val_fraction, text, text_dim, image_size, broken)
    _scalings(scaling)
    parts = find_pairs(spec, test, val_fraction, split_seed, all_for_test)
    main = parts.get("train") or parts["test"]
    names = tuple(classes) if classes is not None else _used(main)
    parts = {split: part.of_classes(names, split, classes is not None) for split, part in parts.items()}
    main = parts.get("train") or parts["test"]
    if len(names) < 2 and classes is None:
        raise UsageError(f"{main.where} has the one class {names[0]!r}: it takes at least two to tell pairs apart.")

    _check_kinds(parts, main, text, text_dim, image_size, inputs)
    preprocessing = _preprocessing(image_size, inputs) if isinstance(main.images, Files) else None
    pictures: dict[str, Pictures] = {}
    if preprocessing is not None:
        parts, pictures = read_pictures(parts, preprocessing, broken, memory_limit, progress)
        main = parts.get("train") or parts["test"]

    strings = isinstance(main.texts, tuple)
    options: dict[str, Any] = {
        "test": test,
        "val_fraction": val_fraction,
        "split_seed": split_seed,
        "text": _text(spec, text, inputs) if strings else None,
        "text_dim": text_dim,
        "scaling": scaling,
        "image_size": None if preprocessing is None else preprocessing.size,
        "broken": broken,
    }
    if strings and not options["text"].startswith(SENTENCE):
        options["text_dim"] = text_dim or LARGEST_VOCABULARY
    if inputs is None:
        if "train" not in parts:
            raise UsageError(f"{spec} has no training pairs, from which it is learned how pairs become input.")
        inputs = _fitted(main, preprocessing, options)
    elif preprocessing is not None:
        inputs = replace(inputs, images=preprocessing)
    splits = {split: _split(split, part, pictures.get(split), inputs) for split, part in parts.items()}
    return CrossmodalData(spec, names, splits.get("train"), splits.get("val"), splits.get("test"), inputs, options)


def _text(spec: str, asked: str | None, inputs: Inputs | None) -> str:
    if inputs is not None and inputs.texts is not None:
        return inputs.texts.spec
    return asked or (TEXT if spec == DIGITS_WORDS else TFIDF)


def _check(val_fraction: float, text: str | None, text_dim: int | None, image_size: int | None, broken: str) -> None:
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction is {val_fraction}: a share of the training pairs lies in 0 … 1.")
    if text is not None:
        check_text(text)
    if text_dim is not None and text_dim < 1:
        raise UsageError(f"text_dim is {text_dim}: a text needs at least one number.")
    if image_size is not None and image_size < 1:
        raise UsageError(f"image_size is {image_size}: a picture has at least 1 pixel on each side.")
    if broken not in ("skip", "refuse"):
        raise UsageError(f"broken is {broken!r}: choose 'skip' or 'refuse'.")


def _used(pairs: Pairs) -> tuple[str, ...]:
    """The classes that some pair has."""
    return tuple(name for name, column in zip(pairs.classes, pairs.labels.T, strict=True) if column.any())


def _check_kinds(
    parts: Mapping[str, Pairs],
    main: Pairs,
    text: str | None,
    text_dim: int | None,
    image_size: int | None,
    inputs: Inputs | None,
) -> None:
    """Refuse options that do not fit the data, and data that do not fit each other or the trained inputs."""
    pictures, strings = isinstance(main.images, Files), isinstance(main.texts, tuple)
    for part in parts.values():
        if isinstance(part.images, Files) != pictures or isinstance(part.texts, tuple) != strings:
            raise UsageError(
                f"{part.where} and {main.where} do not hold the same: images are pictures or vectors, and texts are "
                "strings or vectors, in all splits alike."
            )
    for key, value in (("text", text), ("text_dim", text_dim)):
        if value is not None and not strings:
            raise UsageError(f"{key} is {value!r}, but the texts of {main.where} are vectors already: leave it out.")
    if image_size is not None and not pictures:
        raise UsageError(f"image_size is {image_size}, but the images of {main.where} are vectors: leave it out.")
    if inputs is None:
        return
    for what, there, wanted, forms in (
        ("images", pictures, isinstance(inputs.images, Preprocessing), ("pictures", "vectors")),
        ("texts", strings, inputs.texts is not None, ("strings", "vectors")),
    ):
        if there != wanted:
            raise UsageError(
                f"The {what} of {main.where} are {forms[not there]}, but those that the network was trained on are "
                f"{forms[not wanted]}: give such."
            )


def _preprocessing(image_size: int | None, inputs: Inputs | None) -> Preprocessing:
    usual = inputs.images if inputs is not None else None
    if not isinstance(usual, Preprocessing):
        usual = Preprocessing(IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD, RESIZE)
    return usual if image_size is None else adjusted(usual, image_size=image_size)


def _fitted(train: Pairs, preprocessing: Preprocessing | None, options: Mapping[str, Any]) -> Inputs:
    """How pairs become input, learned from the training pairs."""
    of_images, of_texts = _scalings(options["scaling"])
    images: Standardise | Preprocessing
    if preprocessing is not None:
        images = preprocessing
    else:
        assert isinstance(train.images, np.ndarray)
        images = _scaled(train.images, of_images or EACH)
    if not isinstance(train.texts, tuple):
        return Inputs(images, None, _scaled(train.texts, of_texts or EACH))
    texts = fit_text_vectors(options["text"], train.texts, options["text_dim"])
    return Inputs(images, texts, _scaled(texts(train.texts), of_texts or ALIKE))


def _scaled(values: npt.NDArray[Any], how: str) -> Standardise:
    return as_they_are(values.shape[1]) if how == NONE else fit_standardise(values, alike=how == ALIKE)


def _scalings(text: str | None) -> tuple[str | None, str | None]:
    """How images and how texts are scaled; None for what is usual.

    Raises:
        UsageError: an unknown way, or more than two.
    """
    if text is None:
        return None, None
    ways = [way.strip() for way in text.split(",")]
    if len(ways) > 2 or not set(ways) <= {EACH, ALIKE, NONE}:
        raise UsageError(f"scaling is {text!r}: give {EACH}, {ALIKE} or {NONE}, or two of them as images,texts.")
    return ways[0], ways[-1]


def _split(split: str, pairs: Pairs, pictures: Pictures | None, inputs: Inputs) -> CrossmodalSplit:
    if isinstance(pairs.texts, tuple):
        assert inputs.texts is not None
        unknown = ~inputs.texts.known(pairs.texts)
        if unknown.any():
            logger.warning(
                "%s: %d of %d %s texts have no word of the training texts, such as that of %s",
                pairs.where,
                unknown.sum(),
                len(pairs),
                split,
                pairs.names[int(unknown.argmax())],
            )
        texts = inputs.text_scale.apply(inputs.texts(pairs.texts), f"The texts of {pairs.where}")
    else:
        texts = inputs.text_scale.apply(pairs.texts, f"The texts of {pairs.where}")
    images: torch.Tensor | Pictures
    if pictures is not None:
        images = pictures
    else:
        assert isinstance(pairs.images, np.ndarray)
        assert isinstance(inputs.images, Standardise)
        images = inputs.images.apply(pairs.images, f"The images of {pairs.where}")
    return CrossmodalSplit(
        images,
        texts,
        torch.from_numpy(pairs.labels.astype(np.float32)),
        pairs.names,
        pairs.texts if isinstance(pairs.texts, tuple) else None,
        pairs.broken,
        pairs.content(),
    )

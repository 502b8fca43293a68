"""Texts as vectors: counts of words weighted by how rare they are (TF-IDF), or those of a sentence-embedding model.

What is fitted is fitted on the training texts, and is kept in plain values and tensors, so that a trained network
can be given new texts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from excite.errors import ExciteError, UsageError

TFIDF, SENTENCE = "tfidf", "sentence"
LARGEST_VOCABULARY = 5000
LONGEST_RUN = 5

_WORD = r"(?u)\b\w+\b"
_BLOCK = 256  # texts of which sparse counts are made dense at a time
_HOW = (
    f"choose '{TFIDF}', '{TFIDF}:N' for runs of up to N = 2 … {LONGEST_RUN} words beside the words, or "
    f"'{SENTENCE}:MODEL' for a model of sentence-transformers"
)


class TextVectors(Protocol):
    """What turns strings into vectors."""

    @property
    def spec(self) -> str:
        """What it was asked for by, such as ``"tfidf"``."""
        ...

    @property
    def dim(self) -> int:
        """The length of a vector."""
        ...

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The vector of each text, float32 (N, dim)."""
        ...

    def known(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which texts say anything to it, (N,): those with a word of its vocabulary."""
        ...

    def plain(self) -> dict[str, Any]:
        """What it is, in plain values, but for :meth:`tensors`."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its numbers, for a file of weights."""
        ...


@dataclass(frozen=True, eq=False)
class TfIdf:
    """Counts c of words and runs of words as (1 + ln c) · idf, each text brought to length 1 (or 0 if it has none).

    It is scikit-learn's ``TfidfVectorizer`` with ``sublinear_tf=True`` and lower case; a word is a run of letters,
    digits and underscores.

    Attributes:
        terms: the words and runs of words that are counted, in the order of the vector.
        idf: ln((1 + n) / (1 + number of training texts that hold the term)) + 1 of each, float64 (dim,).
        longest: words in the longest run.
    """

    terms: tuple[str, ...]
    idf: npt.NDArray[np.float64]
    longest: int = 1

    @property
    def spec(self) -> str:
        """``tfidf`` or ``tfidf:N``."""
        return TFIDF if self.longest == 1 else f"{TFIDF}:{self.longest}"

    @property
    def dim(self) -> int:
        """How many terms are counted."""
        return len(self.terms)

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The vector of each text, float32 (N, dim)."""
        vectorizer = _vectorizer(self.longest, vocabulary=list(self.terms))
        vectorizer.idf_ = self.idf
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), _BLOCK):
            out[start : start + _BLOCK] = vectorizer.transform(texts[start : start + _BLOCK]).toarray()
        return out

    def known(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which texts hold one of the terms, (N,)."""
        words = {term for term in self.terms if " " not in term}
        analyse = _vectorizer(1).build_analyzer()
        return np.array([not words.isdisjoint(analyse(text)) for text in texts], dtype=bool)

    def plain(self) -> dict[str, Any]:
        """The terms and the longest run."""
        return {"kind": TFIDF, "longest": self.longest, "terms": list(self.terms)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights of the terms."""
        return {"idf": torch.from_numpy(self.idf.copy())}


@dataclass(frozen=True, eq=False)
class SentenceVectors:
    """Vectors of length 1 by a model of the package sentence-transformers.

    Attributes:
        model: its name on the Hugging Face Hub, or a folder.
        dim: the length of its vectors.
    """

    model: str
    dim: int

    @property
    def spec(self) -> str:
        """``sentence:MODEL``."""
        return f"{SENTENCE}:{self.model}"

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The vector of each text, float32 (N, dim).

        Raises:
            UsageError: sentence-transformers is not installed.
            ExciteError: the model cannot be loaded, or its vectors have another length than in training.
        """
        vectors = _encode(self.model, texts)
        if vectors.shape != (len(texts), self.dim):
            raise ExciteError(
                f"The sentence model {self.model} gives vectors of {vectors.shape[-1]} numbers, but {self.dim} are "
                "expected: it is no longer the model that the network was trained with."
            )
        return vectors

    def known(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Every text says something to a model that knows parts of words."""
        return np.ones(len(texts), dtype=bool)

    def plain(self) -> dict[str, Any]:
        """Which model."""
        return {"kind": SENTENCE, "model": self.model, "dim": self.dim}

    def tensors(self) -> dict[str, torch.Tensor]:
        """None: the model's weights are its own."""
        return {}


def check_text(text: str) -> None:
    """Refuse what is no way to turn texts into vectors.

    Raises:
        UsageError: it is not.
    """
    kind, colon, rest = text.partition(":")
    longest = rest.isdecimal() and 1 <= int(rest) <= LONGEST_RUN
    if not ((kind == TFIDF and (not colon or longest)) or (kind == SENTENCE and rest)):
        raise UsageError(f"text is {text!r}: {_HOW}.")


def fit_text_vectors(text: str, texts: Sequence[str], dim: int | None = None) -> TextVectors:
    """What turns texts into vectors, fitted on the training texts.

    Args:
        text: ``"tfidf"``, ``"tfidf:N"`` or ``"sentence:MODEL"``.
        texts: the training texts.
        dim: for TF-IDF the most terms that are counted, by default 5,000: those that occur most often.

    Raises:
        UsageError: ``text`` is none of these, no text holds a word, ``dim`` is given for a sentence model, or
            sentence-transformers is not installed.
        ExciteError: the sentence model cannot be loaded.
    """
    check_text(text)
    kind, _, rest = text.partition(":")
    if dim is not None and dim < 1:
        raise UsageError(f"text_dim is {dim}: a text needs at least one number.")
    if kind == SENTENCE:
        if dim is not None:
            raise UsageError(f"text_dim is {dim}, but a sentence model has its own length of vectors: leave it out.")
        return SentenceVectors(rest, _encode(rest, texts[:1]).shape[1])
    longest = int(rest or 1)
    vectorizer = _vectorizer(longest, max_features=dim or LARGEST_VOCABULARY)
    try:
        vectorizer.fit(texts)
    except ValueError as error:
        raise UsageError(f"The {len(texts)} training texts hold no words: {error}.") from error
    terms = tuple(str(term) for term in vectorizer.get_feature_names_out())
    return TfIdf(terms, np.asarray(vectorizer.idf_, dtype=np.float64), longest)


def read_text_vectors(plain: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> TextVectors:
    """What :meth:`TextVectors.plain` and :meth:`TextVectors.tensors` gave.

    Raises:
        ExciteError: something is missing, or does not fit together.
    """
    try:
        if plain["kind"] == SENTENCE:
            return SentenceVectors(str(plain["model"]), int(plain["dim"]))
        terms, idf = tuple(map(str, plain["terms"])), tensors["idf"].numpy().astype(np.float64)
        longest = int(plain["longest"])
        fits = plain["kind"] == TFIDF and idf.shape == (len(terms),) and len(set(terms)) == len(terms) > 0
    except (KeyError, TypeError, ValueError) as error:
        raise ExciteError(f"The saved text vectors lack {error}: the run's files are damaged.") from error
    if not fits:
        raise ExciteError("The saved text vectors do not fit together: the run's files are damaged.")
    return TfIdf(terms, idf, longest)


def _vectorizer(longest: int, **more: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, longest), token_pattern=_WORD, sublinear_tf=True, **more)


def _encode(model: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    vectors = _sentence_model(model).encode(
        list(texts), convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
    )
    vectors = np.asarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise ExciteError(f"The sentence model {model} gives numbers that are not finite: it is damaged.")
    return vectors


@functools.cache
def _sentence_model(model: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UsageError(
            f"Text vectors by the sentence model {model} take sentence-transformers: pip install 'excite[sentence]'."
        ) from error
    try:
        return SentenceTransformer(model)
    except Exception as error:  # a missing model, no network, a damaged file: of any kind
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExciteError(f"The sentence model {model} cannot be loaded: {lines[0].rstrip('.')}.") from error

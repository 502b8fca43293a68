"""Random numbers that depend on nothing but (seed, epoch, sample index, stream).

A generator with a state gives other numbers when a run is cut and resumed, when workers are added, or when
an image is skipped. Here a draw is a hash instead: the same four things always give the same number, in any
order and in any process. Each sample walks its own SplitMix64 sequence (Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators", section 4), vectorised over the samples of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: the step of the sequence
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def bits(seed: int, epoch: int, index: Indices, stream: str, count: int = 1) -> npt.NDArray[np.uint64]:
    """``count`` independent 64-bit draws for each sample.

    Args:
        seed: the run's seed, any integer.
        epoch: the epoch, counted from 0.
        index: the samples' indices, shape (N,).
        stream: what the draw is for (``"crop"``, ``"flip"``); different names give independent draws.
        count: draws per sample.

    Returns:
        Shape (N, count).
    """
    key = np.uint64(_hash(f"{seed}/{epoch}/{stream}"))
    start = _mix(key + _GOLDEN * (np.asarray(index).astype(np.uint64) + np.uint64(1)))
    steps = _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
    return _mix(start[:, None] + steps)


def uniform(seed: int, epoch: int, index: Indices, stream: str, count: int = 1) -> npt.NDArray[np.float64]:
    """Draws uniform in [0, 1), shape (N, count); the arguments are those of :func:`bits`."""
    # The upper 53 bits fill a double's mantissa exactly.
    return (bits(seed, epoch, index, stream, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, size: int, stream: str = "order") -> Indices:
    """The order in which the ``size`` samples are seen in an epoch: a uniform permutation, shape (size,)."""
    keys = bits(seed, epoch, np.arange(size), stream)[:, 0]
    return np.argsort(keys, kind="stable").astype(np.int64)


def windowed(seed: int, epoch: int, groups: Indices, together: int) -> Indices:
    """An order in which what lies together is seen together: the groups in a random order, so many at a time.

    The samples of ``together`` groups are permuted among each other, then those of the next. With as many groups as
    that or fewer this is :func:`permutation`.

    Args:
        seed: the run's seed.
        epoch: counted from 0.
        groups: which group each sample lies in, counted from 0, (N,).
        together: how many groups are at hand at once.

    Returns:
        Shape (N,).
    """
    place = np.argsort(permutation(seed, epoch, int(groups.max(initial=-1)) + 1, "groups"))
    keys = bits(seed, epoch, np.arange(len(groups)), "order")[:, 0]
    return np.lexsort((keys, place[groups] // together)).astype(np.int64)


def balanced(seed: int, epoch: int, labels: Indices) -> Indices:
    """An order that sees every class equally often: class-aware sampling (Shen, Lin & Huang 2016).

    After "Relay backpropagation for effective learning of deep convolutional neural networks", arXiv:1512.05830.
    There is a list of the classes, and of each class a list of its samples. Place p of the epoch takes the class at
    p in the list of classes, which is shuffled anew each time it is through, and the next sample in that class's
    list, which is shuffled anew likewise. So classes differ by at most one in how often they are seen, and so do the
    samples of a class.

    Args:
        seed: the run's seed.
        epoch: counted from 0; the lists begin anew in each.
        labels: class of each sample, (N,); a class without samples is left out.

    Returns:
        Shape (N,): sample ``i`` as ``i`` where it is seen for the first time, as ``i + N`` for the second time …
    """
    count = len(labels)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    members = [samples for samples in members if len(samples)]
    classes, rounds = len(members), -(-count // len(members))
    places = np.arange(rounds * classes)
    choice = np.argsort(bits(seed, epoch, places, "classes").reshape(rounds, classes), axis=1, kind="stable")
    lists = np.empty((classes, rounds), dtype=np.int64)
    for row, samples in zip(lists, members, strict=True):
        again = count * np.arange(-(-rounds // len(samples)))
        drawings = samples + again[:, None]
        keys = bits(seed, epoch, drawings.ravel(), "in class").reshape(drawings.shape)
        row[:] = np.take_along_axis(drawings, np.argsort(keys, axis=1, kind="stable"), 1).ravel()[:rounds]
    return lists[choice.ravel(), places // classes][:count]


def hold_out(labels: Indices, names: Sequence[str], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose a stratified part of a set: about ``fraction`` of every class.

    The choice hangs on the names, not on their positions, so that a file added to one class moves no more than
    one image of that class between the parts. A class of two or more images keeps at least one in each part.

    Args:
        labels: class of each image, shape (N,).
        names: name of each image.
        fraction: the share to hold out, in (0, 1).
        seed: another seed holds out other images.

    Returns:
        True where held out, shape (N,).
    """
    keys = np.array([_hash(f"{seed}/hold-out/{name}") for name in names], dtype=np.uint64)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[np.argsort(keys[members], kind="stable")[:count]]] = True
    return held


def _hash(text: str) -> int:
    # Not hash(): that differs from process to process.
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))

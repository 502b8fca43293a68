"""Where pairs of images and texts lie, and which of them are for training, validation and test."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from excite.data.crossmodal_arrays import array_pairs, holds_arrays
from excite.data.crossmodal_pairs import Pairs, held_out
from excite.data.crossmodal_table import find_table, table_pairs
from excite.data.digits_words import DIGITS_WORDS, digits_words_pairs
from excite.errors import UsageError

logger = logging.getLogger("excite.data")

KIND = "crossmodal"
OWN_TEST_FRACTION = 0.2


def find_pairs(spec: str, test: str | None, val_fraction: float, seed: int, all_for_test: bool) -> dict[str, Pairs]:
    """The pairs that a data spec names, by split; arguments as for :func:`excite.data.crossmodal.load_crossmodal`.

    Raises:
        UsageError: a path is missing, holds no pairs, or none of a kind that is needed; or a file's pairs are not
            what they should be.
        ExciteError: a file cannot be read.
    """
    found = _found(spec)
    if test is not None:
        found = {**_training_part(spec, found), "test": _test_part(spec, test)}
    elif "" in found:
        found = {"test": found[""]} if all_for_test else _hold_out_test(found[""], spec)
    elif "test" not in found and "val" in found:
        found = {**{split: part for split, part in found.items() if split == "train"}, "test": found["val"]}
    for split, part in found.items():
        if not len(part):
            raise UsageError(f"{spec} has no {split} pairs, though it says which they are.")
    if "train" in found and "val" in found:
        logger.info(
            "%s has its own %d validation pairs: none are taken from the training pairs", spec, len(found["val"])
        )
    elif "train" in found and val_fraction:
        train = found["train"]
        held = held_out(train, val_fraction, seed)
        if held.any():
            found = {**found, "train": train.only(~held), "val": train.only(held)}
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _training_part(spec: str, found: dict[str, Pairs]) -> dict[str, Pairs]:
    if "test" in found and "train" in found:
        logger.info("%s: its own test pairs are not used, as test data are given apart", spec)
    train = found.get("train") or found.get("")
    if train is None:
        raise UsageError(f"{spec} holds no training pairs, only those for {' and '.join(sorted(found))}.")
    return {"train": train, **({"val": found["val"]} if "val" in found else {})}


def _test_part(spec: str, test: str) -> Pairs:
    if DIGITS_WORDS in (spec, test):
        raise UsageError(f"{DIGITS_WORDS} have their own test pairs: leave out the test data {test!r}.")
    found = _found(test if test.startswith(f"{KIND}:") else f"{KIND}:{test}")
    for split in ("test", "val", ""):
        if split in found:
            return found[split]
    raise UsageError(f"{test} is given as test data, but holds only training pairs.")


def _hold_out_test(pairs: Pairs, spec: str) -> dict[str, Pairs]:
    # Always the same pairs whatever the seeds: runs are to be scored on the same test.
    held = held_out(pairs, OWN_TEST_FRACTION, 0)
    if not held.any():
        raise UsageError(f"{spec} has too few pairs to hold some out for test: each class needs at least two.")
    logger.warning(
        "%s has no test split: %d of its %d pairs, a fifth of every class, are held out for test",
        spec,
        held.sum(),
        len(held),
    )
    return {"train": pairs.only(~held), "test": pairs.only(held)}


def _found(spec: str) -> dict[str, Pairs]:
    if spec == DIGITS_WORDS:
        return digits_words_pairs()
    kind, _, given = spec.partition(":")
    if kind != KIND or not given:
        raise UsageError(f"{spec!r} names no pairs of images and texts: write '{KIND}:PATH' or '{DIGITS_WORDS}'.")
    path = Path(given)
    if not os.path.exists(path):  # which takes a name that is too long for one that is not there
        raise UsageError(f"There is no file or folder {path}.")
    table = find_table(path)
    if table is not None:
        return table_pairs(table)
    if holds_arrays(path):
        return array_pairs(path)
    raise UsageError(
        f"{path} holds no pairs of images and texts: expected is a CSV file with the columns file, text and labels, "
        "or a .mat or .npz file of vectors."
    )

"""What the tests of the verbs share."""

from __future__ import annotations

from excite.training.recipe import Recipe, load


def quick(**changes) -> Recipe:
    """A recipe that trains in a second or two."""
    settings = {"trainer.epochs": 1, "trainer.batch_size": 128, "trainer.threads": 1}
    return load("digits").replace(settings | changes)

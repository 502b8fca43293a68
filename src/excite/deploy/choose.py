"""The faster of several forms that give the same numbers, found by measuring, remembered, and written down."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from excite.deploy.lowered import Convolution, Lowered
from excite.files import write_atomically
from excite.native.build import cache_folder, processor

log = logging.getLogger(__name__)

ROUNDS = 9
ENOUGH = 0.98
"""Another form than the first is taken if it needs no more than this share of its time: less is noise."""

Choice = dict[str, Any]
"""``{"form": the one taken, "seconds": {form: the shortest of some calls}}``."""


class Choices:
    """What was measured on this machine before, in a file of the user's cache folder.

    One processor, one version of PyTorch and one number of threads have one file: with another of these another form
    may be faster.
    """

    def __init__(self) -> None:
        told = "\0".join((processor(), torch.__version__, str(torch.get_num_threads())))
        self.path = cache_folder() / f"choices-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
        self._new: dict[str, Choice] = {}

    def known(self, key: str) -> Choice | None:
        """What was chosen for this."""
        found = {**self._read(), **self._new}.get(key)
        return found if isinstance(found, dict) and "form" in found else None

    def learn(self, key: str, choice: Choice) -> None:
        """Remember a choice; nothing is written yet."""
        self._new[key] = choice

    def save(self) -> None:
        """Write what is new, beside what others wrote meanwhile. Where that fails, it is measured again next time."""
        if not self._new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps({**self._read(), **self._new}, indent=1, ensure_ascii=False))
            self._new.clear()
        except OSError as error:
            log.warning("What was measured could not be written to %s (%s).", self.path, error.strerror or error)

    def _read(self) -> dict[str, Choice]:
        with suppress(OSError, ValueError):
            read = json.loads(self.path.read_text())
            return read if isinstance(read, dict) else {}
        return {}


def fastest(calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> Choice:
    """Which of several calls takes the least time, called in turn (A B A B …) after one call each to warm up.

    Whatever else runs on a machine only ever adds to a time, so each call is judged by its shortest. The first is
    taken unless another is faster by more than the noise (``ENOUGH``).
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    shortest = {name: min(values) for name, values in seconds.items()}
    first, best = next(iter(shortest)), min(shortest, key=shortest.__getitem__)
    return {"form": best if shortest[best] < ENOUGH * shortest[first] else first, "seconds": shortest}


@torch.no_grad()
def choose_forms(lowered: fx.GraphModule, example: Tensor, choices: Choices) -> dict[str, Choice]:
    """Set each layer's form to the fastest on this machine, on what the layer is given when the network runs.

    Args:
        lowered: from :func:`excite.deploy.lower.lower`; its layers are changed.
        example: what it takes.
        choices: what is known already; what is measured is added.

    Returns:
        By what a layer is (:meth:`Lowered.told`), what was chosen.
    """
    made: dict[str, Choice] = {}
    undecided = []
    for layer in lowered.modules():
        if isinstance(layer, Lowered) and len(layer.forms()) > 1:
            key = _key(layer, example.dtype)
            choice = choices.known(key)
            if choice is not None and choice["form"] in layer.forms():
                made[layer.told()], layer.form = choice, choice["form"]
            else:
                undecided.append(layer)
    if undecided:
        _Measuring(lowered, choices, made).run(example)
        for layer in lowered.modules():
            if isinstance(layer, Convolution):
                layer.forget()
    return made


def _key(layer: Lowered, dtype: torch.dtype) -> str:
    return f"{layer.told()}, {dtype}".replace("torch.", "")


class _Measuring(fx.Interpreter):
    """Runs the network once, and stops at each layer that has a choice."""

    def __init__(self, lowered: fx.GraphModule, choices: Choices, made: dict[str, Choice]) -> None:
        super().__init__(lowered)
        self.choices, self.made = choices, made

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, Lowered) and len(layer.forms()) > 1 and layer.told() not in self.made:
            choice = self._measured(layer, args)
            self.made[layer.told()] = choice
            self.choices.learn(_key(layer, args[0].dtype), choice)
        if isinstance(layer, Lowered) and layer.told() in self.made:
            layer.form = self.made[layer.told()]["form"]
        return super().call_module(target, args, kwargs)

    @staticmethod
    def _measured(layer: Lowered, args: tuple[Any, ...]) -> Choice:
        # Some forms write over an input: they are given copies, which they may spoil.
        copies = [one.clone() if isinstance(one, Tensor) else one for one in args]

        def in_form(form: str) -> Callable[[], object]:
            def call() -> object:
                layer.form = form
                return layer(*copies)

            return call

        return fastest({form: in_form(form) for form in layer.forms()})

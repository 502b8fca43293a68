"""What ``bench`` times together: questions as groups of contestants that are driven in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from excite.verbs.bench_contestants import MODES, Contestant, refusal

_ALIKE = ("eager-cl",)
"""Modes that have to be asked for."""
_SECONDS = {"eager": 5, "eager-cl": 5, "compiled": 25, "onnx": 20, "openvino": 15}
"""Roughly what building takes, against each other; what is not here takes as long as ``compiled``."""


@dataclass(frozen=True)
class Question:
    """Networks that are held against each other.

    Args:
        specs: the first is the host.
        modes: kind of work → spec → the modes in which it is run; by default all in all.
    """

    specs: tuple[str, ...]
    modes: tuple[tuple[str, str, tuple[str, ...]], ...] = ()

    def asks(self, what: str, spec: str, mode: str) -> bool:
        """Whether this network is to be run in this mode."""
        chosen = [modes for kind, one, modes in self.modes if (kind, one) == (what, spec)]
        return mode in chosen[0] if chosen else True


def _attention(host: str, ours: str, timms: str) -> Question:
    """A host, excite's network and timm's: what attention costs, and who runs the network fastest."""
    return Question(
        (host, ours, timms),
        (
            ("inference", ours, ("eager", "excite", "excite-openvino")),
            ("inference", timms, ("eager", "compiled", "onnx", "openvino")),
            ("inference", host, ("eager", "compiled", "onnx", "openvino", "excite", "excite-openvino")),
            ("training", ours, ("eager", "compiled", "excite", "excite-compiled")),
            ("training", timms, ("eager", "compiled")),
        ),
    )


DEFAULT = (
    _attention("resnet50", "resnet50+se", "timm:seresnet50"),
    _attention("resnext50_32x4d", "sknet50", "timm:skresnext50_32x4d"),
)


@dataclass(frozen=True)
class Group:
    """Contestants that are driven in turn.

    Args:
        what: inference or training.
        precision: of all but the plain fp32 contestants that are there to be held against.
        batch: images in one call.
        specs: of the question; the first is the host.
        contestants: in the order of modes and specs.
        refused: contestants that cannot be, with the reason.
    """

    what: str
    precision: str
    batch: int
    specs: tuple[str, ...]
    contestants: tuple[Contestant, ...]
    refused: tuple[tuple[Contestant, str], ...]

    @property
    def title(self) -> str:
        """What all have in common."""
        images = "image" if self.batch == 1 else "images"
        work = "Inference" if self.what == "inference" else "Training step"
        return f"{work}, {self.precision}, {self.batch} {images}"

    def weight(self, settings: int) -> float:
        """Roughly how long it takes, against other groups, under so many allocator settings."""
        rounds = self.batch * settings * (4 if self.what == "training" else 1) * 0.5 + 3 * settings
        return sum(_SECONDS.get(one.mode, _SECONDS["compiled"]) + rounds for one in self.contestants)


def groups_of(
    questions: Sequence[Question],
    what: Sequence[str],
    precision: Sequence[str],
    batch: Sequence[int],
    modes: Sequence[str] | None,
    described: Callable[[str], tuple[Sequence[int], int | None]],
    threads: int,
    at_once: Callable[[Sequence[Contestant]], int],
) -> list[Group]:
    """All groups, the most telling first: the largest batch, inference before training, fp32 first.

    Args:
        questions: one after the other.
        what, precision, batch: every combination makes a group.
        modes: that were asked for; None for those that differ by more than the layout.
        described: a spec's input shape and its classes.
        threads: of every contestant.
        at_once: how many such contestants memory holds side by side. A group that is larger is split by modes; each
            part has the plain contestants that others are held against.
    """
    groups: list[Group] = []
    for question in questions:
        for images in sorted(set(batch), reverse=True):
            for kind in dict.fromkeys(what):
                own = [mode for mode in MODES[kind] if (mode in modes if modes else mode not in _ALIKE)]
                others = [mode for mode in modes or () if mode not in MODES[kind] and len(set(what)) == 1]
                if kind == "training" and images == 1 and len(set(batch)) > 1:
                    continue  # other batches answer it
                for one in dict.fromkeys(precision):
                    plain = ("eager",) if "eager" in own and "fp32" in precision else ()

                    def make(spec: str, mode: str, number: str, kind: str = kind, images: int = images) -> Contestant:
                        shape, classes = described(spec)
                        channels, height, width = shape
                        return Contestant(
                            spec, mode, number, images, kind, (channels, height, width), classes, threads
                        )

                    anchors = [make(spec, mode, "fp32") for mode in plain for spec in question.specs]
                    asked = [
                        [make(spec, mode, one) for spec in question.specs if question.asks(kind, spec, mode)]
                        for mode in (*own, *others)
                    ]
                    groups += _split(question, kind, one, images, anchors, asked, at_once)
    return groups


def _split(
    question: Question,
    what: str,
    precision: str,
    batch: int,
    anchors: list[Contestant],
    by_mode: list[list[Contestant]],
    at_once: Callable[[Sequence[Contestant]], int],
) -> list[Group]:
    """The contestants of one combination in as many groups as memory asks for."""
    refused: list[tuple[Contestant, str]] = []
    able: list[list[Contestant]] = []
    for members in by_mode:
        why = {one: refusal(one.what, one.mode, one.precision, one.batch) for one in members}
        refused += [(one, reason) for one, reason in why.items() if reason]
        able.append([one for one, reason in why.items() if not reason and one not in anchors])
    if not any(one.precision == precision for one in anchors) and not any(able):
        anchors = []  # there is nobody to be held against them
    able = [members for members in able if members]
    anchors = [one for one in anchors if refusal(one.what, one.mode, one.precision, one.batch) is None]
    limit = at_once([*anchors, *(one for members in able for one in members)]) if anchors or able else 0
    parts: list[list[Contestant]] = [list(anchors)]
    for members in able:
        if len(parts[-1]) + len(members) > limit and len(parts[-1]) > len(anchors):
            parts.append(list(anchors))
        parts[-1] += members
    return [
        Group(what, precision, batch, question.specs, tuple(part), tuple(refused) if number == 0 else ())
        for number, part in enumerate(parts)
        if part or (number == 0 and refused)
    ]

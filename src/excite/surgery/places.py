"""Where a unit can go in a recorded network: the papers' places, found by how the tensors flow.

A *residual branch* is what one operand of an addition goes through and the other does not. Of the two operands'
latest common source, the *split*, the one with fewer convolutions on the way is the shortcut (at most one
convolution: a projection), the other the branch. Sums of equals, as of an RepVGG block, and sums with something that
was enlarged, as in a feature pyramid, are none.

A place has to be reachable without touching the network's code: a module whose output is the tensor in question (or
whose input is), and which is called there and nowhere else. The activation that a ResNet block calls three times is
none; the block itself is called once.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from excite.surgery.record import Call, Operation, Record, Value

How = Literal["after", "before", "around", "shortcut"]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Place:
    """A module that can hold a unit.

    Attributes:
        call: of that module, where the unit will act. how: on the module's output, on its input, on both (a
        convolution's, for kernel units), or on a shortcut that no
            module makes, see :class:`excite.surgery.hooks.OnShortcut`.
        value: the feature map that the unit rescales, or that a convolution makes.
        block: for a shortcut, the call whose input it is.
    """

    call: Call
    how: How
    value: Value
    block: Call | None = None

    @property
    def name(self) -> str:
        """The module's name in the network."""
        return self.call.name


@dataclass(frozen=True)
class Found:
    """The places of one kind, and what was of that kind and could not be reached, with the reason."""

    places: list[Place]
    missed: list[str]


# --- residual branches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual:
    """A residual addition: its operands, and the value where their ways part."""

    addition: Operation
    split: Value
    branch: Value
    shortcut: Value
    inside: frozenset[Operation]  # the operations between the split and the branch's end

    @property
    def name(self) -> str:
        """The module that it happens in, in words."""
        call = self.addition.call
        return call.name if call and call.name else "the network"

    def convolutions(self) -> list[Operation]:
        """Those of the branch, in order."""
        return sorted((o for o in self.inside if "conv" in o.name), key=lambda o: o.number)


def residuals(record: Record) -> list[Residual]:
    """Every residual addition of feature maps, in order."""
    found = []
    for operation in record.operations:
        if operation.adds and all(value.is_map for value in operation.inputs[:2]):
            left, right = operation.inputs[:2]
            residual = _residual(operation, left, right) if left.shape == right.shape else None
            if residual:
                found.append(residual)
    return found


def _residual(addition: Operation, left: Value, right: Value) -> Residual | None:
    ways = {left: _ways_back(left), right: _ways_back(right)}
    common = ways[left].keys() & ways[right].keys()
    made = [value for value in common if value.producer is not None]
    if not made:
        return None  # nothing in common, or only the image: what adds to that is no block
    split = max(made, key=_made_at)
    shortcut, branch = sorted((left, right), key=lambda value: ways[value][split])
    if ways[shortcut][split] > 1 or ways[branch][split] == ways[shortcut][split]:
        return None
    if ways[shortcut][split] == 0 and split.is_map and split.channels > shortcut.channels:
        return None  # a slice of a map whose other slices go other ways: steps within a block (Res2Net)
    inside = {value.producer for value in ways[branch] if value.producer and _made_at(value) > _made_at(split)}
    reached = {split}
    for operation in sorted(inside, key=lambda operation: operation.number):
        if reached.intersection(operation.inputs):
            reached.update(operation.outputs)
    inside = {operation for operation in inside if reached.intersection(operation.outputs)}
    return Residual(addition, split, branch, shortcut, frozenset(inside))


def _ways_back(value: Value) -> dict[Value, int]:
    """Every value that this one is made from without an enlargement, with the fewest convolutions in between."""
    fewest: dict[Value, int] = {}
    waiting = [(0, 0, value)]
    count = 0
    while waiting:
        convolutions, _, here = heapq.heappop(waiting)
        if here in fewest:
            continue
        fewest[here] = convolutions
        operation = here.producer
        if operation is None or operation.enlarges:
            continue
        for source in operation.inputs:
            count += 1
            heapq.heappush(waiting, (convolutions + operation.convolves, count, source))
    return fewest


def _made_at(value: Value) -> int:
    return value.producer.number if value.producer else -1


# --- the places of units that rescale a map ------------------------------------------------------------------------


def before_additions(record: Record) -> Found:
    """The standard place: the end of each residual branch, just before its addition (Hu et al., Fig. 3)."""
    ends: list[tuple[str, Value | None]] = []
    for residual in residuals(record):
        ends.append((residual.name, _only_for(residual.branch, residual.addition)))
    return _outputs(record, ends, backwards=True)


def before_branches(record: Record) -> Found:
    """PRE: the input of each branch's first convolution; the shortcut is left as it is."""
    places, missed = [], []
    for residual in residuals(record):
        first = [op for op in residual.convolutions() if _is_first(op, residual)]
        if len(first) != 1:
            missed.append(f"{residual.name}: {len(first)} convolutions begin its branch")
        elif first[0].call is None or first[0].call.input is None:
            missed.append(f"{residual.name}: its first convolution is no module that is called with a tensor")
        else:
            places.append(Place(first[0].call, "before", first[0].call.input))
    return _called_once(record, places, missed)


def _is_first(convolution: Operation, residual: Residual) -> bool:
    waiting, seen = [convolution.inputs[0]], set[Value]()
    while waiting:
        here = waiting.pop()
        if here is residual.split:
            return True
        # Beyond a sum lies another block, which then begins the branch.
        if here not in seen and here.producer and not here.producer.convolves and not here.producer.adds:
            waiting += here.producer.inputs
        seen.add(here)
    return False


def after_additions(record: Record) -> Found:
    """POST: after each residual addition and the activation that follows it."""
    sums: list[tuple[str, Value | None]] = []
    for residual in residuals(record):
        total = residual.addition.outputs[0]
        follows = _sole_consumer(total)
        sums.append((residual.name, follows.outputs[0] if follows and follows.unary else total))
    return _outputs(record, sums)


def on_shortcuts(record: Record) -> Found:
    """Identity: the shortcut of each residual addition."""
    places: list[Place] = []
    missed: list[str] = []
    own: list[tuple[str, Value | None]] = []
    for residual in residuals(record):
        if residual.shortcut is not residual.split:
            own.append((residual.name, _only_for(residual.shortcut, residual.addition)))
            continue
        # No module makes this shortcut: it is the block's input. The end of the branch stands in for it.
        block = next((c for c in reversed(record.calls) if _is_block(c, residual)), None)
        end = _handle(record, [residual.branch], residual.branch)
        if residual.addition.overwrites and residual.addition.inputs[0] is residual.shortcut:
            missed.append(f"{residual.name}: the sum is written over its shortcut, which a unit there still needs")
        elif block is None or end is None or not end.call.within(block):
            missed.append(f"{residual.name}: no module makes its shortcut or holds the block")
        else:
            places.append(Place(end.call, "shortcut", residual.split, block))
    found = _outputs(record, own)
    order = {call: position for position, call in enumerate(record.calls)}
    return Found(sorted([*places, *found.places], key=lambda place: order[place.call]), [*missed, *found.missed])


def _is_block(call: Call, residual: Residual) -> bool:
    if call.input is not residual.split or residual.addition.call is None:
        return False
    return residual.addition.call.within(call)


def after_spatial_convolutions(record: Record) -> Found:
    """3×3: after the first convolution of each branch with a kernel of 3 or more, and its norm."""
    wanted: list[tuple[str, Value | None]] = []
    for residual in residuals(record):
        spatial = [op for op in residual.convolutions() if _kernel(op) >= 3]
        value = spatial[0].outputs[0] if spatial else None
        follows = _sole_consumer(value) if value else None
        wanted.append((residual.name, follows.outputs[0] if follows and follows.normalises else value))
    return _outputs(record, wanted)


def after_concatenations(record: Record) -> Found:
    """After each concatenation of feature maps, as of an Inception or a dense block; of nested ones the outer."""
    wanted: list[tuple[str, Value | None]] = []
    for operation in record.operations:
        maps = [value for value in operation.inputs if value.is_map]
        joined = operation.outputs[0]
        if operation.name == "cat" and len(maps) >= 2 and joined.is_map and joined.channels > maps[0].channels:
            follows = _sole_consumer(joined)
            if not (follows and follows.name == "cat"):
                name = operation.call.name if operation.call else ""
                wanted.append((name or "the network", joined))
    return _outputs(record, wanted, forwards=True)


def at_stage_ends(record: Record) -> Found:
    """The last feature map of each resolution that has convolutions."""
    convolved = {op.outputs[0].size for op in record.operations if "conv" in op.name and op.outputs[0].is_map}
    last: dict[tuple[int, ...], Value] = {}
    for value in record.values:
        area = math.prod(value.size)
        smaller = any(2 * math.prod(op.outputs[0].size) <= area for op in value.consumers if op.outputs)
        if value.is_map and value.producer and value.size in convolved and smaller:
            last[value.size] = value
    return _outputs(record, [(f"{'×'.join(map(str, size))}", value) for size, value in last.items()], backwards=True)


def after_named(record: Record, matches: Callable[[str, nn.Module], bool]) -> Found:
    """After every module that a predicate picks by its name or itself."""
    wanted: list[tuple[str, Value | None]] = []
    for call in record.calls:
        if call.name and matches(call.name, call.module):
            wanted.append((call.name, call.output if call.output and call.output.is_map else None))
    return _outputs(record, wanted)


def matching(pattern: str) -> Callable[[str, nn.Module], bool]:
    """Whether a module's name, or the end of it from a dot on, is as the pattern (``*`` and ``?`` as in a shell)."""
    return lambda name, _: fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


# --- the places of units that stand around a convolution -----------------------------------------------------------


def kernels(record: Record, matches: Callable[[str, nn.Module], bool] | None = None) -> Found:
    """Convolutions with a square kernel of 3 and more.

    By default the last of each residual branch, and all those on no branch or shortcut but a network's first one and
    what follows its last residual addition (a head, a feature pyramid); or those that ``matches`` picks.
    """
    convolutions = [op for op in record.operations if op.name == "convolution" and _is_square(op)]
    if matches is None:
        convolutions = _usual_kernels(record, convolutions)
    else:
        convolutions = [op for op in convolutions if op.call and matches(op.call.name, op.call.module)]
    places, missed = [], []
    for operation in convolutions:
        call = operation.call
        assert call is not None
        if call.input is not None and call.output is not None and call.output.is_map:
            places.append(Place(call, "around", call.output))
        else:
            missed.append(f"{call.name}: it is not called with a feature map as its first argument")
    return _called_once(record, places, missed)


def _usual_kernels(record: Record, convolutions: list[Operation]) -> list[Operation]:
    convolved: set[Value] = set()
    for operation in record.operations:
        if "conv" in operation.name or convolved.intersection(operation.inputs):
            convolved.update(operation.outputs)
    chosen = [op for op in convolutions if op.inputs[0] in convolved]
    additions = residuals(record)
    if additions:
        chosen = [op for op in chosen if op.number < additions[-1].addition.number]
    for residual in additions:
        # A skip around whole blocks has convolutions of its own, and those of the blocks are not its.
        inner = [other for other in additions if other.addition in residual.inside]
        nested = {op for other in inner for op in other.inside}
        spatial = [op for op in chosen if op in residual.inside and op not in nested]
        beside = set(_between(residual.split, residual.shortcut))
        left = {*spatial[:-1], *beside}
        chosen = [op for op in chosen if op not in left]
    return chosen


def _between(split: Value, value: Value) -> list[Operation]:
    passed = []
    while value is not split and value.producer is not None:
        passed.append(value.producer)
        value = value.producer.inputs[0]
    return passed


def _is_square(operation: Operation) -> bool:
    call = operation.call
    if call is None or not isinstance(call.module, nn.Conv2d) or operation.transposed:
        return False
    height, width = call.module.kernel_size
    return height == width >= 3


def _kernel(operation: Operation) -> int:
    size = getattr(operation.call.module, "kernel_size", 1) if operation.call else 1
    return max(size) if isinstance(size, tuple) else int(size)


# --- attention that is there already -------------------------------------------------------------------------------


def channel_gates(record: Record) -> list[str]:
    """The modules in which a feature map is multiplied by one number for each channel that was pooled from a map."""
    found: dict[str, None] = {}
    for operation in record.operations:
        if operation.name in ("mul", "addcmul") and any(value.is_map for value in operation.inputs):
            gates = [v for v in operation.inputs if v.pooled and math.prod(v.shape[2:]) == 1 and len(v.shape) >= 3]
            if gates:
                found[operation.call.name if operation.call else ""] = None
    return list(found)


# --- from a value to the module that holds it ----------------------------------------------------------------------


def _outputs(
    record: Record, wanted: list[tuple[str, Value | None]], backwards: bool = False, forwards: bool = False
) -> Found:
    """A module for each value; or for what it was made from, or what is made from it, position by position."""
    places, missed = [], []
    values = [value for _, value in wanted if value is not None]
    for name, value in wanted:
        place = None
        for here in _alternatives(value, backwards, forwards):
            place = _handle(record, [*values, here], here)
            if place:
                break
        if place:
            places.append(place)
        else:
            missed.append(f"{name}: no module of its own makes or takes that feature map")
    return _called_once(record, places, missed)


def _alternatives(value: Value | None, backwards: bool, forwards: bool) -> Iterable[Value]:
    here = value
    while here is not None:
        yield here
        operation = here.producer
        here = _only_for(operation.inputs[0], operation) if backwards and operation and operation.unary else None
    here = value
    while forwards and here is not None:
        following = _sole_consumer(here)
        here = following.outputs[0] if following and _moves(following) else None
        if here is not None and here.is_map and value and here.channels == value.channels:
            yield here


def _moves(operation: Operation) -> bool:
    """Whether it only moves values, or changes each by itself."""
    return operation.unary or operation.name in ("view", "_unsafe_view", "transpose", "permute", "clone", "reshape")


def _handle(record: Record, wanted: list[Value], value: Value) -> Place | None:
    """The innermost module whose output the value is, else the innermost whose input it alone is."""
    for call in reversed(record.calls):
        made_here = call.output is value and _holds(record, call)
        if made_here and all(other.output in wanted for other in record.calls_of(call.module)):
            return Place(call, "after", value)
    for call in reversed(record.calls):
        taken_here = call.input is value and _holds(record, call)
        alone = taken_here and all(op.call is not None and op.call.within(call) for op in value.consumers)
        if alone and all(other.input in wanted for other in record.calls_of(call.module)):
            return Place(call, "before", value)
    return None


def _holds(record: Record, call: Call) -> bool:
    # A container runs or iterates over its children: one more would change what it does.
    return bool(call.name) and not isinstance(call.module, _CONTAINERS) and call.module not in record.barred


def _called_once(record: Record, places: list[Place], missed: list[str]) -> Found:
    """One place for each module; none for a module that is also called elsewhere, or on maps of other widths."""
    kept: dict[tuple[nn.Module, How], list[Place]] = {}
    for place in places:
        kept.setdefault((place.call.module, place.how), []).append(place)
    found = []
    for (module, _), same in kept.items():
        calls = {place.call for place in same}
        if module in record.barred:
            missed.append(f"{same[0].name}: a unit there is not called as it is, or what it gives is not used")
        elif len(calls) == len(record.calls_of(module)) and len({place.value.channels for place in same}) == 1:
            found.append(same[0])
        else:
            missed.append(f"{same[0].name}: the same module is called elsewhere, too")
    return Found(found, missed)


def _sole_consumer(value: Value) -> Operation | None:
    return value.consumers[0] if len(value.consumers) == 1 else None


def _only_for(value: Value, operation: Operation) -> Value | None:
    """The value, if nothing else takes it: what is done to it is done to nothing else."""
    return value if value.consumers == [operation] else None

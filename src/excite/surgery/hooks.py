"""How a unit acts in a network whose code knows nothing of it.

The unit is a child of the module that it follows, so that its parameters have a name, move to the device, and are
saved with the rest; a forward hook of that module calls it. A hook knows its unit by the child's name and not by
reference: in a deep copy it calls the copy's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Hook:
    """Calls the child ``unit`` of the module that it belongs to."""

    def __init__(self, unit: str) -> None:
        self.unit = unit

    def of(self, module: nn.Module) -> nn.Module:
        """The unit."""
        unit = module._modules[self.unit]
        assert unit is not None
        return unit


class OnOutput(Hook):
    """The module's output, rescaled."""

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """The new output."""
        return self.of(module)(output)


class OnInput(Hook):
    """The module's input, rescaled."""

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The new arguments."""
        return self.of(module)(arguments[0]), *arguments[1:]


class Around(Hook):
    """What the unit makes of the module's input and output."""

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """The new output."""
        return self.of(module)(arguments[0], output)


class OnShortcut(Hook):
    """At the end of a branch: what the unit changes of the shortcut x, added to the branch.

    No module makes the shortcut where it is just the block's input, so it cannot be rescaled itself. But
    branch + (unit(x) − x) and x add up to branch + unit(x), and the difference is exactly 0 where unit(x) = x.
    """

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """The new output."""
        unit = self.of(module)
        x = getattr(unit, "shortcut", None)
        unit.__dict__["shortcut"] = None  # and no pop: torch.compile did not always follow it
        if x is None:
            raise RuntimeError(
                f"{type(module).__name__} was called outside of its block, whose input {self.unit!r} rescales: by "
                "torch.fx, which takes blocks apart, or by a checkpoint of the branch alone; checkpoint whole blocks"
            )
        return output + (unit(x) - x)


class KeepShortcut(Hook):
    """At the start of the block: hands its input on to :class:`OnShortcut`, which lets go of it.

    ``unit`` is the path from the block to the unit.
    """

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """The arguments stay."""
        unit = self.find(module)
        if unit is not None and isinstance(arguments[0], Tensor):  # and not what stands for one while torch.fx traces
            unit.__dict__["shortcut"] = arguments[0]

    def find(self, block: nn.Module) -> nn.Module | None:
        """The unit; None where the module that held it was replaced."""
        try:
            return block.get_submodule(self.unit)
        except AttributeError:
            return None


class DropShortcut(KeepShortcut):
    """At the end of the block: lets go of its input, should the branch not have been called."""

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any = None) -> None:
        """The output stays."""
        unit = self.find(module)
        if unit is not None:
            unit.__dict__["shortcut"] = None


def insert(module: nn.Module, name: str, unit: nn.Module, hook: type[Hook]) -> None:
    """Make the unit a child of the module, and have the hook call it."""
    module.add_module(name, unit)
    unit.__dict__["_attached"] = True  # tells it from the host's own children, also where its hook was lost
    # A state dict of the host alone has nothing for the unit, and is complete for all that.
    unit.register_load_state_dict_pre_hook(keep_if_absent)  # type: ignore[no-untyped-call]
    if hook is OnInput:
        module.register_forward_pre_hook(OnInput(name))
    else:
        module.register_forward_hook(hook(name))  # type: ignore[arg-type]


def keep_shortcut(block: nn.Module, unit: str) -> None:
    """Have a block hand its input on to the unit at that path within it."""
    block.register_forward_pre_hook(KeepShortcut(unit))
    block.register_forward_hook(DropShortcut(unit), always_call=True)


def keep_if_absent(unit: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: where a state dict holds nothing of a unit, the unit keeps what it has."""
    if not any(name.startswith(prefix) for name in state):
        state.update({prefix + name: value for name, value in unit.state_dict().items()})


def attached_units(network: nn.Module, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The attached units of a network by their names; by all of them where modules have several."""
    for name, module in network.named_modules(remove_duplicate=not every_name):
        for child, unit in module.named_children():
            if "_attached" in unit.__dict__:
                yield _joined(name, child), unit


def remove(network: nn.Module, only: set[str] | None = None) -> int:
    """Take out attached units and their hooks, all or those of the names given; returns how many units."""
    names = [name for name, _ in attached_units(network) if only is None or name in only]
    for prefix, module in network.named_modules():
        for held, number, hook in list(_hooks(module)):
            if only is None or _joined(prefix, hook.unit) in only:
                del held[number]
                module._forward_hooks_always_called.pop(number, None)
    for name in names:
        holder, _, child = name.rpartition(".")
        del network.get_submodule(holder)._modules[child]
    return len(names)


@contextmanager
def silenced(network: nn.Module) -> Iterator[None]:
    """For a while, the attached units of a network do not act."""
    before = []
    for module in network.modules():
        for held, number, _ in list(_hooks(module)):
            before.append((held, dict(held)))
            del held[number]
    try:
        yield
    finally:
        for held, hooks in reversed(before):
            held.clear()
            held.update(hooks)


def _joined(module: str, unit: str) -> str:
    return f"{module}.{unit}" if module else unit


def _hooks(module: nn.Module) -> Iterator[tuple[dict[int, Any], int, Hook]]:
    """Each hook of ours on a module, with the dictionary that holds it and its number there."""
    every: tuple[dict[int, Any], ...] = (module._forward_hooks, module._forward_pre_hooks)
    for held in every:
        for number, hook in list(held.items()):
            if isinstance(hook, Hook):
                yield held, number, hook

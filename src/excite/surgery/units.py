"""The units by their names in specs, and what each takes."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator
from torch import nn

from excite.arguments import known, typed
from excite.errors import UsageError
from excite.networks.site import Site
from excite.spec import Spec, UnitSpec, parse_spec
from excite.units.added_kernels import AddedKernels
from excite.units.cbam import ConvolutionalBlockAttention
from excite.units.efficient_channel import EfficientChannelAttention
from excite.units.parts import Scaled
from excite.units.selective_kernel import SelectiveKernel
from excite.units.squeeze_excite import SqueezeExcite

# A place in a block where a unit goes: at the end of the branch, where it also adds the shortcut if there is one, or
# instead of the 3×3 convolution with its batch norm and activation.
Location = Literal["branch", "convolution"]
UnitFactory = Callable[..., nn.Module]  # (site, *, arguments of the spec) -> unit
KernelFactory = Callable[..., nn.Module]  # (convolution, input size, *, arguments of the spec) -> unit


@dataclass(frozen=True)
class Unit:
    """What a name stands for.

    Attributes:
        factory: makes the unit for a place.
        location: the kind of place.
        around: makes the unit that stands around a convolution which is there already, for ``convolution``.
    """

    factory: UnitFactory
    location: Location
    around: KernelFactory | None = None


def units() -> list[str]:
    """The names of the units that a spec can add."""
    return list(_UNITS)


def unit(name: str) -> Unit:
    """The unit of that name.

    Raises:
        UsageError: there is none.
    """
    return _UNITS[known(name, units(), "unit")]


def register_unit(name: str, factory: UnitFactory, place: Location = "branch") -> None:
    """Give a unit of your own a name for specs and for :func:`excite.attach`.

    Args:
        name: letters, digits and ``_ . -``. A name registered before is replaced, one of excite's is refused.
        factory: ``factory(site, *, …)`` → module, called once per place with a
            :class:`~excite.networks.site.Site`. Its keyword-only parameters are the arguments a spec can give; their
            annotations (``int``, ``float``, ``bool``, ``str``, ``Literal``) are checked. ``stages``, ``where`` and
            ``init`` are every unit's and handled for it.
        place: ``branch``: the module ends the branch of a block, ``forward(u, shortcut)`` → (rescaled u) + shortcut,
            or where ``site.residual`` is false, as in a network that it is attached to, ``forward(u)`` → rescaled u.
            To be attached with ``init="identity"`` it needs a method ``start_as_identity()``, after which it gives
            back what it is given. ``convolution``: it stands for the 3×3 convolution, batch norm and activation,
            ``forward(x)``, in excite's own networks only. Where ``site.activation`` is ``identity``, the shortcut may
            be added to its output in place, so the output must not be one that its last step needs for the backward
            pass (a sigmoid's, a ReLU's).

    Raises:
        UsageError: the name cannot be one, or is taken.
    """
    if name in _OWN:
        raise UsageError(f"The name {name!r} belongs to a unit of excite's own; choose another.")
    check_name(name)
    if place not in typing.get_args(Location):
        raise UsageError(f"A unit's place is branch or convolution, not {place!r}.")
    _UNITS[name] = Unit(factory, place)


def check_name(name: str) -> None:
    """Refuse what a spec could not hold as a name."""
    if parse_spec(name) != Spec(name):
        raise UsageError(f"{name!r} cannot be a name: use letters, digits and _ . - only.")


EVERY_UNITS = ("stages", "where", "init")  # the arguments that are not the unit's own


def arguments_of(spec: UnitSpec, factory: Callable[..., nn.Module]) -> dict[str, Any]:
    """A unit's own arguments, typed.

    Raises:
        UsageError: one that the factory does not know, or a value that does not fit.
    """
    own = tuple((key, value) for key, value in spec.arguments if key not in EVERY_UNITS)
    return typed(factory, own, f"the unit {spec.name}", also=EVERY_UNITS)


def is_own(name: str) -> bool:
    """Whether a unit is one of excite's."""
    return name in _OWN


def he_initialise(built: nn.Module) -> None:
    """Draw a unit's weights as Hu et al. do for training from scratch: after He et al. 2015 (fan-in), biases zero."""
    for child in built.modules():
        if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


# --- excite's own --------------------------------------------------------------------------------------------------

Gate = Literal["sigmoid", "hard_sigmoid", "tanh"]


def _gate(site: Site, gate: str) -> str | nn.Module:
    # In a network that was there before, gates can start at 1, by a factor that is stored with them.
    return Scaled(gate) if site.attached else gate


def _squeeze_excite(
    site: Site,
    *,
    reduction: int = 16,
    min_width: int = 4,
    squeeze: Literal["mean", "max", "both"] = "mean",
    gate: Gate = "sigmoid",
    activation: Literal["relu", "silu", "gelu", "hard_swish", "identity"] = "relu",
) -> nn.Module:
    # Hu et al. have no least width, nor need one: their maps have 64 channels and more. On 16 channels r = 16 would
    # leave one hidden unit, which can only turn all channels up or down together.
    return SqueezeExcite(
        site.out_channels,
        reduction,
        min_width=min_width,
        squeeze=squeeze,
        gate=_gate(site, gate),
        activation=activation,
    )


def _efficient_channel(site: Site, *, kernel: int | None = None, gate: Gate = "sigmoid") -> nn.Module:
    return EfficientChannelAttention(site.out_channels, kernel, gate=_gate(site, gate))


def _block_attention(
    site: Site, *, reduction: int = 16, kernel: int = 7, min_width: int = 4, gate: Gate = "sigmoid"
) -> nn.Module:
    channels = site.out_channels
    if len(site.kernel) != 2:
        raise ValueError(
            f"cbam looks at maps of two dimensions, and those of stage {site.stage} have {len(site.kernel)}: give "
            "stages= with the 2-d ones, or se or eca"
        )
    return ConvolutionalBlockAttention(channels, reduction, kernel, min_width=min_width, gate=_gate(site, gate))


def _branches(text: str) -> tuple[tuple[int, int], ...]:
    """``3-3d2`` → ((3, 1), (3, 2)): kernels, each with an optional dilation."""
    matches = [re.fullmatch(r"(\d+)(?:d(\d+))?", branch) for branch in text.split("-")]
    if not all(matches):
        raise ValueError("kernels with an optional dilation, such as 3-3d2 or 3-5-7")
    return tuple((int(match[1]), int(match[2] or 1)) for match in matches if match)


Branches = Annotated[tuple[tuple[int, int], ...], PlainValidator(_branches)]


def _selective_kernel(
    site: Site,
    *,
    branches: Branches | None = None,
    groups: int | None = None,
    reduction: int = 16,
    min_width: int | None = None,
) -> nn.Module:
    return SelectiveKernel(
        site.in_channels,
        site.out_channels,
        site.stride,
        _kernels(site, branches),
        groups or site.groups,
        reduction,
        min_width or _least_width(site.out_channels, site.input_size),
        activation=site.activation,
        valid=site.size is not None,
    )


def _kernels(
    site: Site, branches: tuple[tuple[int, int], ...] | None
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The kernels to choose from, with dilations: by default the one that belongs there, and that dilated by 2."""
    dimensions = len(site.kernel)
    if branches is None:
        # Where a kernel spans the whole map, most taps of a dilated one would see nothing but padding.
        whole = [site.size is not None and site.size[axis] == own for axis, own in enumerate(site.kernel)]
        return [(site.kernel, (1,) * dimensions), (site.kernel, tuple(1 if all_of_it else 2 for all_of_it in whole))]
    if site.size is not None and {(own, 1) for own in site.kernel} != {branches[0]}:
        kernel = "×".join(map(str, site.kernel))
        raise ValueError(f"branches begin with the kernel of stage {site.stage}, which is {kernel}: leave them out")
    return [((kernel,) * dimensions, (dilation,) * dimensions) for kernel, dilation in branches]


def _added_kernels(
    convolution: nn.Conv2d,
    input_size: int,
    *,
    branches: Branches | None = None,
    reduction: int = 16,
    min_width: int | None = None,
) -> nn.Module:
    # The first branch is the convolution itself; the paper's second one is the same kernel, dilated by 2.
    kernel, dilation = convolution.kernel_size[0], convolution.dilation[0]
    if branches is not None and branches[0] != (kernel, dilation):
        raise ValueError(f"branches begin with the kernel that is there: {kernel}, dilated by {dilation}")
    added = branches[1:] if branches else ((kernel, 2 * dilation),)
    width = min_width or _least_width(convolution.out_channels, input_size)
    return AddedKernels(convolution, added, reduction, width)


def _least_width(channels: int, input_size: int) -> int:
    # Li et al.'s least width L = 32 is a quarter of the channels at most in their networks (128 and up). On the
    # 16 to 64 channels of a CIFAR ResNet it would be no bottleneck at all; 8 is half of them to an eighth.
    return 8 if input_size <= 64 and channels < 128 else 32


_OWN = {
    "se": Unit(_squeeze_excite, "branch"),
    "sk": Unit(_selective_kernel, "convolution", _added_kernels),
    "eca": Unit(_efficient_channel, "branch"),
    "cbam": Unit(_block_attention, "branch"),
}
_UNITS = dict(_OWN)

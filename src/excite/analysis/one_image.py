"""What the attention of a network does with one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from excite.analysis.activation_map import activation_map, last_map
from excite.analysis.gates import Gate, reading
from excite.analysis.receptive_field import effective_receptive_field, sides
from excite.data.images import fit, normalise
from excite.errors import ExciteError, UsageError
from excite.preprocessing import Preprocessing

Floats = NDArray[np.floating[Any]]

TOP = 5
"""How many classes are named, and how many channels a unit is said to have pushed up, and down."""
SHARES = (0.5, 0.9)
"""Of the receptive field, that a square is said to hold."""


def look(
    network: nn.Module,
    gates: Sequence[Gate],
    image: Tensor,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    statistics: Mapping[str, Floats] | None = None,
    *,
    scale: float = 1.0,
    target: int | None = None,
) -> dict[str, Any]:
    """Ask a network what it sees in an image, and its units what they did about it.

    Args:
        network: in evaluation mode, on any device; its answers are scores (1, classes).
        gates: its units, as :func:`excite.analysis.gates.find_gates` names them.
        image: uint8 (C, H, W), of any size.
        preprocessing: how it becomes the network's input.
        classes: the names of the network's outputs.
        statistics: of a set of images, ``excitation/UNIT/mean`` (classes, C) for each unit, and ``counts``, of images
            (classes,): what the gates are held against. Without them, and for a class without images, a unit's gates
            are held against their own mean over the channels.
        scale: ≥ 1: by how much the centre is enlarged, by cropping; see :func:`enlarged`.
        target: the class that the gates are held against and the activation map is made for; by default the one that
            the network takes the image for.

    Returns:
        * ``scale``, ``target`` (class number) and ``class`` (its name);
        * ``seen``: what the network was given, uint8 (C, size, size);
        * ``predictions``: ``[{"class", "index", "probability"}, …]``, the five likeliest, and ``probability`` of the
          target;
        * ``excitation``: of each squeeze-and-excitation unit ``unit``, ``range``, ``gates`` and ``reference`` (C,),
          ``against`` (``class`` or ``unit``), and ``up`` and ``down``: the five channels whose gates are farthest
          above and below the reference, ``[{"channel", "gate", "reference"}, …]``, the farthest first;
        * ``selection``: of each selective kernel ``unit``, ``kernels`` (names), ``attention`` (per kernel the mean
          over the channels) and ``chosen`` (share of the channels whose largest attention it has);
        * ``receptive_field``: of the last unit, whose name is ``unit``: ``field`` (H, W) with a sum of 1, and
          ``sides``, of the smallest squares that hold 50 % and 90 % of it, in pixels; None without units;
        * ``activation``: ``layer`` and ``map`` (H, W), ≥ 0, for the target.

    Raises:
        UsageError: no such class, a scale below 1, statistics of another network, or captum is not installed.
        ExciteError: what the network computes is not a number.
    """
    if target is not None and not 0 <= target < len(classes):
        raise UsageError(f"There is no class {target}: the network tells {len(classes)} apart, counted from 0.")
    seen = fit(enlarged(image, scale), preprocessing)
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    batch = normalise(seen[None], preprocessing).to(device)
    with torch.inference_mode(), reading(network, list(gates)) as values:
        likely = network(batch).float().softmax(1)[0].cpu().numpy()
    if not np.isfinite(likely).all():
        raise ExciteError("The network's scores of this image are not numbers: its weights are damaged.")
    best = [int(index) for index in np.argsort(-likely, kind="stable")[:TOP]]
    chosen = best[0] if target is None else target
    read = {name: value[0].cpu().numpy() for name, value in values.items()}
    layer = last_map(network, batch)
    return {
        "scale": scale,
        "target": chosen,
        "class": classes[chosen],
        "probability": float(likely[chosen]),
        "seen": seen.numpy(),
        "predictions": [
            {"class": classes[index], "index": index, "probability": float(likely[index])} for index in best
        ],
        "excitation": [
            _pushed(gate, read[gate.name], _reference(gate, statistics, len(classes), chosen))
            for gate in gates
            if gate.kind == "se"
        ],
        "selection": [_selected(gate, read[gate.name]) for gate in gates if gate.kind == "sk"],
        "receptive_field": _receptive_field(network, gates[-1].unit or layer, batch) if gates else None,
        "activation": {
            "layer": layer,
            "map": activation_map(network, batch, torch.tensor([chosen], device=device), layer)[0],
        },
    }


def enlarged(image: Tensor, scale: float) -> Tensor:
    """The centre of an image, (C, H / scale, W / scale): brought to the network's size, it is shown so much larger.

    Cut from the picture as it is, so that a large photograph stays sharp (Li et al. 2019, Sect. 4.4).

    Raises:
        UsageError: a scale below 1, or one that leaves no pixel.
    """
    if not 1 <= scale < float("inf"):
        raise UsageError(f"The centre is enlarged by {scale:g}: expected 1 or more.")
    height, width = (max(1, round(side / scale)) for side in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def check_statistics(statistics: Mapping[str, Floats], gates: Sequence[Gate], classes: int) -> None:
    """Refuse statistics that were taken of another network.

    Raises:
        UsageError: they lack a unit, or have it with other classes or channels.
    """
    for gate in gates:
        if gate.kind == "se":
            _reference(gate, statistics, classes, 0)


def _reference(gate: Gate, statistics: Mapping[str, Floats] | None, classes: int, target: int) -> Floats | None:
    """The mean gates of a class, (C,)."""
    if statistics is None:
        return None
    means = statistics.get(f"excitation/{gate.name}/mean")
    if means is None or means.shape != (classes, gate.channels):
        found = "do not know it" if means is None else f"are of {' × '.join(map(str, means.shape))}"
        raise UsageError(
            f"The statistics are of another network: for {gate.name} they should hold {classes} classes × "
            f"{gate.channels} channels, and they {found}. Make them anew with excite explain."
        )
    counts = statistics.get("counts")
    if counts is not None and not counts[target]:
        return None
    row: Floats = means[target]
    return row


def _pushed(gate: Gate, values: Floats, reference: Floats | None) -> dict[str, Any]:
    own = np.full_like(values, values.mean()) if reference is None else reference.astype(values.dtype)
    difference = values - own
    order = np.argsort(-difference, kind="stable")

    def told(channels: NDArray[np.intp], sign: int) -> list[dict[str, Any]]:
        return [
            {"channel": int(c), "gate": float(values[c]), "reference": float(own[c])}
            for c in channels[:TOP]
            if sign * difference[c] > 0
        ]

    return {
        "unit": gate.name,
        "range": list(gate.range),
        "against": "unit" if reference is None else "class",
        "gates": values,
        "reference": own,
        "up": told(order, 1),
        "down": told(order[::-1], -1),
    }


def _selected(gate: Gate, attention: Floats) -> dict[str, Any]:
    """Of attention (M, C)."""
    winners = np.bincount(attention.argmax(0), minlength=len(attention))
    return {
        "unit": gate.name,
        "kernels": [kernel.name for kernel in gate.kernels],
        "attention": attention.mean(1),
        "chosen": winners / attention.shape[1],
    }


def _receptive_field(network: nn.Module, path: str, batch: Tensor) -> dict[str, Any]:
    field = effective_receptive_field(network, path, batch)
    return {"unit": path, "field": field, "sides": dict(zip(map(str, SHARES), sides(field, SHARES), strict=True))}

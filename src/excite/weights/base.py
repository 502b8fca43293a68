"""What passes between the parts of this room: the content of a file, and the same in excite's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from excite.preprocessing import Preprocessing


@dataclass(frozen=True)
class Content:
    """The tensors in a file.

    Attributes:
        format: ``PyTorch``, ``safetensors``, ``Caffe`` or ``MatConvNet``.
        tensors: on the CPU, by the file's own names; of a Caffe file by ``layer:blob``, such as ``conv1/7x7_s2:0``.
    """

    format: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Converted:
    """The tensors of a file under the names, and in the shapes, of excite's networks.

    Attributes:
        layout: whose names they were, in words.
        tensors: by excite's names.
        form: what the network must be built as for these weights, such as ``{"stride_in": "1x1", "pool": "ceil"}``.
        preprocessing: what the network is to be fed, where the layout alone says so.
    """

    layout: str
    tensors: dict[str, Tensor]
    form: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None


Layout = Callable[[Content], Converted | None]
"""Converts the tensors of a file that follows it; None for any other file."""


@dataclass(frozen=True)
class Origin:
    """Where the weights of a network came from, and what they expect; ``create`` leaves it as ``network.origin``.

    Attributes:
        file: the file that was read.
        layout: whose names its tensors had.
        preprocessing: what the network was trained to be fed; None where nothing says.
        classes: the names of the classifier's outputs, where they are known and the classifier was loaded.
        fresh: the parameters of the network that did not come from the file: of new units, of a replaced classifier.
    """

    file: str
    layout: str
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    fresh: frozenset[str] = frozenset()

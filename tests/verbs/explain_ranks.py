"""What the tests of ``explain`` look at, and what each of several processes does of it.

Run as a script: ``explain_ranks.py OUT``, in as many processes as ``WORLD_SIZE`` says.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor, nn

from excite.create import create
from excite.data import ImageData, Preprocessing, Split
from excite.data.base import StackedImages
from excite.errors import ExciteError
from excite.verbs.explain import explain

BOTH = "resnet20:width=0.25+sk+se"


def random_images(count: int = 40, size: int = 16, classes: int = 4) -> ImageData:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=random)
    labels = torch.arange(count) * classes // count
    names = [str(number) for number in range(count)]
    split = Split(StackedImages(pixels, labels), labels, names, classes)
    preprocessing = Preprocessing(size, (0.5,) * 3, (0.25,) * 3)
    return ImageData("random", tuple("abcdefgh"[:classes]), preprocessing, None, None, split)


def network(spec: str = "resnet20:width=0.25+se", classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return create(spec, classes).eval()


class InDouble(nn.Module):
    """A network whose answers do not hang on what else is in a batch, as those in single precision do by 1e-8."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(BOTH).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.double())


def main() -> None:
    torch.set_num_threads(1)
    # Of 41 images the first process has one more.
    explain(InDouble(), random_images(41), out=sys.argv[1])
    spoiled = random_images(41)
    if os.environ["RANK"] == "1":
        assert spoiled.test is not None
        spoiled.test.labels[1] = 9  # an image of this process, and no output of the network
    try:
        explain(InDouble(), spoiled, out=sys.argv[1] + "-spoiled")
    except ExciteError as error:
        print(error)


if __name__ == "__main__":
    main()

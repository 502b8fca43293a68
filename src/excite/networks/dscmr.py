"""DSCMR: an image and a text → a point each in a space that they share.

Zhen, Hu, Wang, Peng, "Deep Supervised Cross-Modal Retrieval", CVPR 2019 (Sect. 3.2); the widths are those of the
authors' release.

Images and texts go through fully connected layers of their own, each with a ReLU, then through a last one that both
share. A linear classifier P of the points, also shared, is there for training.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

from torch import Tensor, nn

from excite.networks.site import Convolution, Join, Site, plain_convolution, plain_join
from excite.networks.tables import DSCMRTable

MOST = 65_536
"""Largest width of a layer."""

Pairs = tuple[Tensor, Tensor]
Points = tuple[Tensor, Tensor, Tensor, Tensor]


class DSCMR(nn.Module):
    """Pairs of images (N, image_dim) and texts (N, text_dim) → their points in the common space and their classes.

    Made by :func:`dscmr`.

    Args:
        image: images → (N, width), the branch of the images.
        text: texts → (N, width).
        shared: the last layer of both branches.
        classifier: P.
        backbone: pictures (N, C, H, W) → (N, image_dim); None where images are vectors.
        input_dropout: share of the numbers of both vectors that is left out in training.

    Attributes:
        image_dim, text_dim: the lengths of the vectors that the branches take.
        dim: of the common space.
        input_shape: of one pair whose two vectors stand side by side; None with a backbone.

    Raises:
        ValueError: in ``forward``, vectors of other lengths.
    """

    def __init__(
        self,
        image: nn.Sequential,
        text: nn.Sequential,
        shared: nn.Linear,
        classifier: nn.Linear,
        backbone: nn.Module | None = None,
        input_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.input_dropout = nn.Dropout(input_dropout)
        self.image, self.text, self.shared, self.classifier = image, text, shared, classifier
        self.image_dim, self.text_dim, self.dim = _length(image), _length(text), shared.out_features
        self.input_shape = (self.image_dim + self.text_dim, 1, 1) if backbone is None else None

    def embed_images(self, images: Tensor) -> Tensor:
        """u: (N, image_dim), or with a backbone pictures (N, C, H, W) → (N, dim)."""
        vectors = self.backbone(images) if self.backbone is not None else images
        return self._embed(self.image, vectors, self.image_dim, "images", "image_dim")

    def embed_texts(self, texts: Tensor) -> Tensor:
        """v: (N, text_dim) → (N, dim)."""
        return self._embed(self.text, texts, self.text_dim, "texts", "text_dim")

    def _embed(self, branch: nn.Sequential, vectors: Tensor, length: int, what: str, argument: str) -> Tensor:
        if vectors.dim() != 2 or vectors.shape[1] != length:
            raise ValueError(
                f"this network was built for {what} of {length} numbers, (N, {length}), but got "
                f"{tuple(vectors.shape)}: build it with {argument}= of the {what}"
            )
        points: Tensor = self.shared(branch(self.input_dropout(vectors)))
        return points

    def forward(self, pairs: Pairs | Tensor) -> Points:
        """The pairs' points and class scores.

        Args:
            pairs: images and texts. Or both vectors of each pair side by side in one tensor, (N, image_dim +
                text_dim) or of one pixel, (N, image_dim + text_dim, 1, 1), so that what drives any network of one
                input can drive this one.

        Returns:
            u and v, the points of images and texts, (N, dim), not at unit length; Pᵀu and Pᵀv, (N, classes).
        """
        images, texts = self._apart(pairs) if isinstance(pairs, Tensor) else pairs
        u, v = self.embed_images(images), self.embed_texts(texts)
        return u, v, self.classifier(u), self.classifier(v)

    def _apart(self, both: Tensor) -> Pairs:
        if self.backbone is not None:
            raise ValueError(
                "this network takes pictures and texts, which do not go into one tensor: give (images, texts)"
            )
        vectors = both.flatten(1)
        if vectors.shape[1] != self.image_dim + self.text_dim:
            raise ValueError(
                f"this network takes pairs of {self.image_dim} and {self.text_dim} numbers, side by side "
                f"(N, {self.image_dim + self.text_dim}), but got {tuple(both.shape)}: build it with image_dim= and "
                "text_dim= of the pairs"
            )
        return vectors[:, : self.image_dim], vectors[:, self.image_dim :]


def _length(branch: nn.Sequential) -> int:
    first = branch[0]
    assert isinstance(first, nn.Linear)
    return first.in_features


def dscmr(
    table: DSCMRTable,
    num_classes: int = 10,
    in_channels: int | None = None,
    *,
    convolution: Convolution = plain_convolution,
    join: Join = plain_join,
    image: nn.Module | None = None,
) -> DSCMR:
    """Build DSCMR from its table.

    Args:
        table: see :class:`~excite.networks.tables.DSCMRTable`.
        num_classes: columns of P.
        in_channels: means nothing here: the table says how long the vectors are.
        convolution, join: make the units of other networks; there is no place for one here.
        image: a backbone, pictures (N, C, H, W) → (N, ``table.image_dim``).

    Raises:
        ValueError: a unit.
    """
    site = Site(1, 64, 64, 1, 1, "relu", table.input_size, residual=False)
    if type(join(site)) is not nn.Identity or type(convolution(site)[0]) is not nn.Conv2d:
        place(1, is_kernel=False)
    width = table.hidden[-1]
    return DSCMR(
        _branch((table.image_dim, *table.hidden), table.dropout),
        _branch((table.text_dim, *table.hidden), table.dropout),
        nn.Linear(width, table.dim),
        nn.Linear(table.dim, num_classes, bias=False),
        image,
        table.input_dropout,
    )


def _branch(widths: tuple[int, ...], dropout: float) -> nn.Sequential:
    """A linear layer, a ReLU and dropout for each width after the first."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def place(stage: int, is_kernel: bool) -> str:
    """Where a unit goes: nowhere.

    Raises:
        ValueError: always.
    """
    raise ValueError("attention units are for maps, and this network has none: put them into its image backbone")


# --- arguments of a spec ---------------------------------------------------------------------------------------


def adjusted(
    table: DSCMRTable,
    *,
    image_dim: int | None = None,
    text_dim: int | None = None,
    hidden: str | None = None,
    dim: int | None = None,
    dropout: float | None = None,
    input_dropout: float | None = None,
) -> DSCMRTable:
    """The table with the arguments of a spec.

    Args:
        image_dim: length of an image's vector.
        text_dim: length of a text's vector.
        hidden: widths of the layers that each branch has of its own, such as ``2048`` or ``1024x512``.
        dim: of the common space.
        dropout: after each of them, at least 0 and below 1.
        input_dropout: of the numbers of both vectors, likewise.

    Raises:
        ValueError: something that is out of bounds.
    """
    for name, value in (("image_dim", image_dim), ("text_dim", text_dim), ("dim", dim)):
        if value is not None and not 1 <= value <= MOST:
            raise ValueError(f"{name} is a number of dimensions, 1 to {MOST}, not {value}")
    for name, share in (("dropout", dropout), ("input_dropout", input_dropout)):
        if share is not None and not 0 <= share < 1:
            raise ValueError(f"{name} is a share, at least 0 and below 1, not {share}")
    return replace(
        table,
        image_dim=image_dim or table.image_dim,
        text_dim=text_dim or table.text_dim,
        hidden=table.hidden if hidden is None else _widths(hidden),
        dim=dim or table.dim,
        dropout=table.dropout if dropout is None else dropout,
        input_dropout=table.input_dropout if input_dropout is None else input_dropout,
    )


def _widths(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,5}(x\d{1,5}){0,9}", text, flags=re.ASCII):
        raise ValueError(f"hidden is the widths of up to ten layers, such as 2048 or 1024x512, not {text!r}")
    widths = tuple(map(int, text.split("x")))
    if not all(1 <= width <= MOST for width in widths):
        raise ValueError(f"hidden is widths of 1 to {MOST}, not {text}")
    return widths

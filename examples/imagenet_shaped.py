"""A folder laid out like ImageNet, made of crops of two photographs: to rehearse a training before it costs money.

    python examples/imagenet_shaped.py rehearsal --images 3
    excite train senet-imagenet --data rehearsal/train --test-data rehearsal/val --devices 2 …

It has ImageNet's thousand WordNet folders under ``train/``, and the validation images flat in ``val/`` with their
classes in ``val.txt``, as the caffe list has them. A class is a tint and a turn of the crops: with a few images each
nothing worth knowing can be learned, but every file is read, every class is met and every process has its share.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = 1000


def synsets() -> list[str]:
    """ImageNet's WordNet ids in sorted order, by timm's list."""
    from timm.data.imagenet_info import ImageNetInfo

    return sorted(ImageNetInfo("imagenet-1k").label_names())


def picture(
    photographs: list[NDArray[np.uint8]], label: int, draw: np.random.Generator, size: tuple[int, int]
) -> Image.Image:
    """A crop of one of the photographs, tinted and turned by its class.

    Args:
        photographs: (H, W, 3) each.
        label: the class.
        draw: of the place and size of the crop.
        size: width and height of the picture in pixels.
    """
    whole = photographs[label % len(photographs)]
    share = draw.uniform(0.3, 1.0)
    height, width = (round(side * share) for side in whole.shape[:2])
    top, left = (
        int(draw.integers(0, side - part + 1)) for side, part in zip(whole.shape, (height, width), strict=False)
    )
    turns = label // 2 % 4
    crop = np.rot90(whole[top : top + height, left : left + width], turns)
    tint = 0.5 + 0.5 * np.array([label // 8 % 5, label // 40 % 5, label // 200 % 5]) / 4
    return Image.fromarray((crop * tint).astype(np.uint8)).resize(size)


def write(folder: Path, images: int, size: tuple[int, int], seed: int = 0) -> int:
    """Write the set; what is there is written over.

    Args:
        folder: made if missing.
        images: for training, of each class; one of each is for validation.
        size: width and height of the pictures in pixels.
        seed: of the crops.

    Returns:
        How many pictures were written.
    """
    photographs: list[NDArray[np.uint8]] = load_sample_images().images
    draw = np.random.default_rng(seed)
    names = synsets()
    (folder / "val").mkdir(parents=True, exist_ok=True)
    truth = []
    order = np.random.default_rng(seed).permutation(CLASSES)
    for number, label in enumerate(order, start=1):
        inside = folder / "train" / names[label]
        inside.mkdir(parents=True, exist_ok=True)
        for i in range(images):
            picture(photographs, int(label), draw, size).save(inside / f"{names[label]}_{i}.JPEG", quality=90)
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        picture(photographs, int(label), draw, size).save(folder / "val" / name, quality=90)
        truth.append(f"{name} {label}\n")
    (folder / "val.txt").write_text("".join(truth))
    return CLASSES * (images + 1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train/, val/ and val.txt go")
    parser.add_argument("--images", type=int, default=3, help="of each class, for training (3)")
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--height", type=int, default=150)
    asked = parser.parse_args()
    try:
        count = write(asked.folder, asked.images, (asked.width, asked.height))
    except ModuleNotFoundError:
        sys.exit("imagenet_shaped: the names of the classes are timm's: pip install 'excite[timm]'")
    except OSError as error:
        sys.exit(f"imagenet_shaped: {error}")
    print(f"{count} pictures: {asked.folder}")


if __name__ == "__main__":
    main()

"""The photographs that come with scikit-image, with a sentence each: a small set for cross-modal retrieval.

    python examples/photographs.py album          # takes scikit-image: pip install 'excite[denoising]'
    excite train dscmr --data crossmodal:album …  # the rest is in docs/retrieval.md

Writes the pictures and ``pairs.csv`` with the columns ``file,text,labels,split``. All pairs are for training: a set
of this size shows how things work, and nothing of how a network finds pictures that it has not seen.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import shutil
import sys
from pathlib import Path

PAIRS = (
    (
        "astronaut.png",
        "An astronaut in an orange suit smiles before a flag and a model of a rocket.",
        "astronaut;people",
    ),
    (
        "camera.png",
        "A photographer in a dark coat looks through a camera on a tripod in a field.",
        "photographer;people",
    ),
    ("chelsea.png", "A ginger cat with green eyes looks past the camera.", "cat;animals"),
    ("horse.png", "The black shape of a standing horse on a white ground.", "horse;animals"),
    ("coffee.png", "A cup of coffee with a spoon on a wooden table.", "coffee;things"),
    ("coins.png", "Rows of old coins on a dark ground.", "coins;things"),
    ("motorcycle_left.png", "A red motorcycle stands in a garage full of shelves.", "motorcycle;things"),
    ("page.png", "A page of printed text with a shadow over it.", "print;writing"),
    ("text.png", "Formulas written by hand on squared paper.", "handwriting;writing"),
    ("rocket.jpg", "A rocket stands on its launch pad after sunset.", "rocket;space"),
    ("moon.png", "The grey surface of the moon with its craters.", "moon;space"),
    ("hubble_deep_field.jpg", "Thousands of galaxies in a black sky.", "galaxies;space"),
    ("brick.png", "A wall of dark bricks with light joints.", "bricks;surfaces"),
    ("grass.png", "Grass on the ground, seen from above.", "grass;surfaces"),
    ("gravel.png", "Gravel, thousands of small grey stones side by side.", "gravel;surfaces"),
    ("retina.jpg", "The inside of an eye, red, with branching blood vessels.", "eye;medicine"),
    ("ihc.png", "Tissue under a microscope, stained brown and blue.", "tissue;medicine"),
    ("cell.png", "A single bright cell under a microscope.", "cell;medicine"),
)


def write(folder: Path) -> Path:
    """Copy the pictures and write the table.

    Args:
        folder: made if missing; files of the same names are written over.

    Returns:
        The table.

    Raises:
        FileNotFoundError: scikit-image is not installed, or comes without these pictures.
    """
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise FileNotFoundError("scikit-image is not installed: pip install 'excite[denoising]'")
    folder.mkdir(parents=True, exist_ok=True)
    for name, _, _ in PAIRS:
        shutil.copyfile(Path(package.origin).parent / "data" / name, folder / name)
    table = folder / "pairs.csv"
    with open(table, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file", "text", "labels", "split"))
        rows.writerows((*pair, "train") for pair in PAIRS)
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures and pairs.csv go")
    folder = parser.parse_args().folder
    try:
        table = write(folder)
    except OSError as error:
        sys.exit(f"photographs: {error}")
    print(f"{len(PAIRS)} pairs: {table}")


if __name__ == "__main__":
    main()

"""From JPEG files to batches: excite's loader against timm's and torchvision's, in images per second and core.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --images FOLDER --workers 1

One call is an epoch over a folder of class folders, in batches of 64 float32 inputs of 3 × 224 × 224, normalised. In
training a window of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3 is resized, and half of them are
mirrored; in evaluation the shorter side is resized to 256 and the centre is cut out. Everybody resizes bilinearly
with antialiasing. Each contestant runs in a process of its own, all pinned to the same core with one thread, first
with the system's allocator, then with freed buffers kept, as ``excite train`` has it. With ``--workers 1`` another
process prepares the batches, on the same core, with the system's allocator.

Without ``--images`` 320 pictures of 500 × 375 are made from the sample photographs of scikit-learn and scikit-image:
windows of them, mirrored or not, with a camera's noise, at quality 90. The mean file has about 95 kB; ImageNet's have
about 110. Written to ``benchmarks/results/input_pipeline.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from excite.allocator import keep_freed_buffers
from excite.files import write_json
from excite.timing import Call, Setting, Timings, time_under_settings

RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"
OURS = "excite"
SIZE, RESIZE, BATCH = 224, 256, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PICTURES = 320
DATA_SETS = ("astronaut", "coffee", "chelsea", "rocket")


@dataclass(frozen=True)
class Epoch:
    """A contestant: a whole epoch over the images of ``folder``.

    Args:
        way: whose loader.
        training: whether images are augmented, else they are prepared for evaluation.
    """

    way: str
    folder: str
    training: bool
    workers: int
    images: int

    def __call__(self) -> Call:
        warnings.simplefilter("ignore")  # torchvision's that its decoders are to go
        loader = {"excite": self._excite, "timm": self._timm}.get(self.way, self._torchvision)()
        epochs = count()

        def call() -> object:
            if self.way == OURS:
                loader.set_epoch(next(epochs))
            seen = 0
            for batch in loader:
                assert batch[0].shape[1:] == (3, SIZE, SIZE)
                assert batch[0].is_floating_point()
                seen += len(batch[0])
            assert seen == self.images
            return seen

        return call

    def _excite(self) -> Any:
        from excite.data import Loader, load_data
        from excite.data.augment import PHOTOS

        # As a set that does not fit in memory: decoded each time an image is needed.
        data = load_data(self.folder, all_for_test=True, memory_limit=0)
        assert data.test is not None
        augment = PHOTOS if self.training else None
        return Loader(
            data.test, data.preprocessing, BATCH, seed=0, augment=augment, shuffle=self.training, workers=self.workers
        )

    def _timm(self) -> Any:
        import torch

        timm: Any = import_module("timm.data")
        return timm.create_loader(
            timm.ImageDataset(self.folder),
            (3, SIZE, SIZE),
            BATCH,
            is_training=self.training,
            scale=(0.08, 1.0),
            ratio=(3 / 4, 4 / 3),
            hflip=0.5,
            color_jitter=None,
            interpolation="bilinear",
            crop_pct=SIZE / RESIZE,
            mean=MEAN,
            std=STD,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            device=torch.device("cpu"),
        )

    def _torchvision(self) -> Any:
        import torch
        from torch.utils.data import DataLoader
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        sized = (
            [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
            if self.training
            else [v2.Resize(RESIZE, antialias=True), v2.CenterCrop(SIZE)]
        )
        scaled = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        if self.way == "torchvision, decode_image":
            from torchvision.io import ImageReadMode, decode_image

            read = partial(decode_image, mode=ImageReadMode.RGB)
            dataset = ImageFolder(self.folder, v2.Compose([*sized, *scaled]), loader=read)
        else:
            dataset = ImageFolder(self.folder, v2.Compose([*sized, v2.PILToTensor(), *scaled]))
        return DataLoader(
            dataset, BATCH, shuffle=self.training, num_workers=self.workers, persistent_workers=self.workers > 0
        )


def make_pictures(folder: Path) -> None:
    """Write ``PICTURES`` JPEG files of 500 × 375 pixels to four class folders, the same ones each time."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    if find_spec("skimage"):
        from skimage import data

        photographs += [Image.fromarray(getattr(data, name)()) for name in DATA_SETS]
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        photograph = photographs[number % len(photographs)]
        width = min(photograph.width, photograph.height * 4 / 3) * rng.uniform(0.6, 1)
        left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - width * 3 / 4)
        box = (left, top, left + width, top + width * 3 / 4)
        pixels = np.asarray(photograph.resize((500, 375), Image.Resampling.BICUBIC, box=box)).astype(np.float32)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        # Mostly of the brightness, as it is left by a camera's filter mosaic.
        noise = rng.normal(0, rng.uniform(8, 22), (375, 500, 1)) + rng.normal(0, 2, pixels.shape)
        place = folder / f"class{number % 4}" / f"{number}.jpg"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(place, quality=90)


def measure(folder: Path, images: int, training: bool, workers: int, rounds: int) -> dict[str, Timings]:
    """Time all contestants that are installed, by what the allocator does."""
    ways = [OURS, "torchvision", "torchvision, decode_image", *(["timm"] if find_spec("timm") else [])]
    settings: dict[str, Setting | None] = {"default": None}
    if not workers:
        settings["kept"] = keep_freed_buffers
    return time_under_settings(
        {way: Epoch(way, str(folder), training, workers, images) for way in ways},
        settings,
        rounds=rounds,
        threads=1,
        max_seconds=90,
    )


def rows_of(timings: Timings, images: int, training: bool, workers: int, allocator: str) -> list[dict[str, Any]]:
    """What was measured, one row for each contestant."""
    rows = []
    for way in timings.samples:
        ratio = timings.ratio(way, OURS)
        rows.append(
            {
                "path": "training" if training else "evaluation",
                "workers": workers,
                "freed_buffers": allocator,
                "loader": way,
                "images_per_second": images / timings.median(way),
                "time_over_excite": [ratio.value, ratio.low, ratio.high],
                "running_peak_bytes": timings.running_peaks.get(way),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| path | workers | freed buffers | loader | images/s | time against excite |",
        "|---|--:|---|---|--:|--:|",
    ]
    for row in rows:
        value, low, high = row["time_over_excite"]
        against = "" if row["loader"] == OURS else f"{value:.2f} ({low:.2f}–{high:.2f})"
        cells = (row["path"], row["workers"], row["freed_buffers"], row["loader"])
        lines.append(f"| {' | '.join(map(str, cells))} | {row['images_per_second']:.0f} | {against} |")
    return "\n".join(lines)


def main() -> None:
    """Make the pictures, measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of class folders of JPEG files")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], choices=(0, 1))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.images or Path(made)
        if options.images is None:
            make_pictures(folder)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        rows: list[dict[str, Any]] = []
        for workers in options.workers:
            for training in (True, False):
                measured = measure(folder, len(sizes), training, workers, options.rounds)
                for allocator, timings in measured.items():
                    rows += rows_of(timings, len(sizes), training, workers, allocator)
    import PIL
    import torch
    import torchvision

    settings = {"images": len(sizes), "mean_bytes": sum(sizes) / len(sizes), "batch": BATCH, "size": SIZE}
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    write_json(options.out, settings | versions | {"results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()

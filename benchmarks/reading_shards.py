"""Images per second read from shards, against the same images read from their folder, and the memory that it takes.

    python benchmarks/reading_shards.py TAR

TAR: a tar of class folders, such as CIFAR-10 as JPEGs. It is unpacked and packed into a temporary folder. Both sides
read through ``excite.data.Loader`` in a shuffled order, in processes of their own, in turn. One call is an epoch,
decoded as in training, or the files' bytes alone. Written to ``benchmarks/results/reading_shards.json``.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from excite.files import write_json
from excite.timing import Build, Call, time_in_turn

RESULTS = Path(__file__).parent / "results" / "reading_shards.json"
BATCH = 128


@dataclass(frozen=True)
class Epoch:
    """An epoch of the training images of a set, decoded as they are needed."""

    spec: str

    def __call__(self) -> Call:
        loader = _loader(self.spec)

        def call() -> object:
            return sum(len(x) for x, _, _ in loader)

        return call


@dataclass(frozen=True)
class Bytes:
    """The same files in a shuffled order, read and not decoded."""

    spec: str

    def __call__(self) -> Call:
        from excite.data.encoded import EncodedImages

        loader = _loader(self.spec)
        images = loader.split.images
        assert isinstance(images, EncodedImages)
        positions = images.listing.files[loader.order()].tolist()
        read = images.listing.source.read

        def call() -> object:
            return sum(len(read(position)) for position in positions)

        return call


def _loader(spec: str) -> Any:
    import torch

    from excite.data import Loader, load_data

    torch.set_num_threads(1)
    data = load_data(spec, memory_limit=0, all_for_test=True)
    split = data.train or data.test
    assert split is not None
    return Loader(split, data.preprocessing, BATCH, seed=0, shuffle=True)


def memory_over_an_epoch(spec: str) -> list[int]:
    """The process's resident bytes at each tenth of an epoch, after one to warm up."""
    loader = _loader(spec)
    for _ in loader:
        pass
    loader.set_epoch(1)
    tenths = set(np.linspace(0, len(loader) - 1, 11).astype(int).tolist())
    return [psutil.Process().memory_info().rss for i, _ in enumerate(loader) if i in tenths]


def main() -> None:
    from excite.verbs.pack import pack

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tar", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to unpack and pack; kept, and used again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        if not (root / "folder").is_dir():
            with tarfile.open(arguments.tar) as archive:
                archive.extractall(root / "folder", filter="data")
        begin = time.perf_counter()
        packed = pack(root / "folder", root / "shards")
        seconds = time.perf_counter() - begin
        specs = {"folder": str(root / "folder"), "shards": f"shards:{root / 'shards'}", "tar": str(arguments.tar)}
        result: dict[str, Any] = {"packing": {"seconds": seconds, "splits": packed["splits"]}}
        for what, kind in (("decoded", Epoch), ("bytes", Bytes)):
            contestants: dict[str, Build] = {name: kind(spec) for name, spec in specs.items()}
            times = time_in_turn(contestants, rounds=arguments.rounds, threads=1, max_seconds=600)
            result[what] = {}
            for name in specs:
                ratio = times.ratio("folder", name)
                result[what][name] = {
                    "seconds": times.median(name),
                    "times as fast as the folder": [ratio.value, ratio.low, ratio.high],
                }
                print(
                    f"{what:8} {name:8} {times.median(name):7.3f} s an epoch, {ratio.value:.2f} × as fast as the "
                    f"folder ({ratio.low:.2f} … {ratio.high:.2f})"
                )
        result["resident bytes over an epoch"] = memory_over_an_epoch(specs["shards"])
        print(
            "resident MB over an epoch:", *(round(held / 1e6, 1) for held in result["resident bytes over an epoch"])
        )
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()

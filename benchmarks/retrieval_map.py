"""Mean average precision of many queries among many items: time, memory, and equality with scikit-learn.

    python benchmarks/retrieval_map.py [--threads N] [--sizes 10000x10000 …]

Vectors are random, of 64 dimensions, and so are their labels, one of 10 classes. Every size is measured in a new
process, and for 20 of its queries the average precision is compared with scikit-learn's ``average_precision_score``.
Written to ``benchmarks/results/retrieval_map.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from excite.analysis.retrieval import mean_average_precision
from excite.files import write_json

RESULTS = Path(__file__).parent / "results" / "retrieval_map.json"
SIZES = ("10000x10000", "20000x20000", "50000x50000", "100000x100000", "1000x1000000")
DIMENSIONS, CLASSES, TOP, COMPARED = 64, 10, (50,), 20


def measure(queries: int, items: int, threads: int) -> dict[str, Any]:
    """One size, in this process."""
    from sklearn.metrics import average_precision_score

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    vectors, labels = [], []
    for count in (queries, items):
        vectors.append(torch.randn(count, DIMENSIONS, generator=generator))
        labels.append(torch.eye(CLASSES)[torch.randint(CLASSES, (count,), generator=generator)])
    before = _peak()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    found = mean_average_precision(*vectors, *labels, top=TOP)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    peak = _peak()
    units = [F.normalize(part.double()).float() for part in vectors]
    differences = []
    for query in np.random.default_rng(0).choice(queries, COMPARED, replace=False):
        match = (labels[1] @ labels[0][query] > 0).numpy()
        expected = average_precision_score(match, (units[1] @ units[0][query]).numpy())
        differences.append(abs(expected - found.per_query[query]))
    return {
        "queries": queries,
        "items": items,
        "threads": threads,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "cpu_nanoseconds_per_pair": 1e9 * cpu_seconds / (queries * items),
        "map": found.map,
        "input_bytes": sum(4 * part.numel() for part in (*vectors, *labels)),
        "peak_bytes": peak,
        "peak_bytes_before": before,
        "largest_difference_from_scikit_learn": float(max(differences)),
    }


def _peak() -> int:
    """The most memory that this process has had, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="QUERIESxITEMS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--one", metavar="QUERIESxITEMS", help="measure one size in this process, and print its figures"
    )
    arguments = parser.parse_args()
    if arguments.one:
        queries, items = map(int, arguments.one.split("x"))
        print(json.dumps(measure(queries, items, arguments.threads)))
        return
    from excite.verbs.compare import environment

    rows = []
    print("| queries × items | seconds | CPU seconds | CPU ns per pair | memory added, MB | off scikit-learn by |")
    print("|---|--:|--:|--:|--:|--:|")
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--one", size, "--threads", str(arguments.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout)
        rows.append(row)
        print(
            f"| {row['queries']:,} × {row['items']:,} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} "
            f"| {row['cpu_nanoseconds_per_pair']:.1f} "
            f"| {(row['peak_bytes'] - row['peak_bytes_before']) / 1e6:.0f} "
            f"| {row['largest_difference_from_scikit_learn']:.0e} |",
            flush=True,
        )
    write_json(RESULTS, {"environment": environment(), "rows": rows})
    print(f"Written: {RESULTS}", file=sys.stderr)


if __name__ == "__main__":
    main()

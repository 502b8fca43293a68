"""Loading a file of 100 MB takes little more memory than the network itself."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from excite.create import create

MEASURE = """
import resource, sys
import psutil, torch
from excite.create import create
import excite.weights.load, safetensors.torch
create("resnet20", 10)  # what is imported and set up once is not the file's
before = psutil.Process().memory_info().rss
network = create(sys.argv[1], weights=sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak - before, network.origin.file)
"""


def zipped(state, path):
    torch.save(state, path)


def pickled(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [save_file, zipped, pytest.param(pickled, marks=pytest.mark.slow)])
def test_peak_memory(save, tmp_path):
    spec = "se_resnet50"
    path = tmp_path / "weights"
    torch.manual_seed(0)
    save(create(spec).state_dict(), path)
    size = path.stat().st_size
    assert size > 100e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, spec, str(path)], capture_output=True, text=True, timeout=300, check=True
    )
    extra = int(done.stdout.split()[0])
    assert 0.9 * size < extra < 2.5 * size  # at the least the network itself

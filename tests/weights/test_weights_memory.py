"""Loading a file of 100 MB takes little more memory than the network itself."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from excite.create import create

MEASURE = """
import sys
import torch
from excite.create import create
import excite.weights.load, safetensors.torch
create("resnet20", 10)  # what is imported and set up once is not the file's
def memory(kind):  # VmRSS is what there is now, VmHWM the most there was; ru_maxrss would count the parent's
    status = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))
before = memory("VmRSS")
network = create(sys.argv[1], weights=sys.argv[2])
print(memory("VmHWM") - before, network.origin.file)
"""


def zipped(state, path):
    torch.save(state, path)


def pickled(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")
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

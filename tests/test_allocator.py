from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

# 64 MiB: more than glibc ever raises its threshold for mmap to by itself.
SCRIPT = """
    import ctypes, json, resource
    from excite.allocator import can_keep_buffers, give_back, keep_buffers
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    SIZE = 64 * 2**20

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffer = libc.malloc(SIZE)
        libc.memset(buffer, 1, SIZE)
        libc.free(buffer)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    system = faults()
    could = can_keep_buffers()
    unchanged = faults()
    kept = keep_buffers()
    faults()
    again = faults()
    give_back()
    given_back = faults()
    print(json.dumps([system, could, unchanged, kept, again, given_back]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_kept_buffers_are_not_faulted_in_again() -> None:
    # Transparent huge pages would make few faults of many: they are counted against the first.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, check=True, timeout=60
    )
    system, could, unchanged, kept, again, given_back = json.loads(done.stdout)
    if not could:
        pytest.skip("another C library")
    assert kept
    assert system >= 32  # one for each 2 MiB at least
    assert unchanged >= system / 2
    assert again < system / 8
    assert given_back >= system / 2

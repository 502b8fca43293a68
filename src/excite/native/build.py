"""Compiles the passes in C for this processor, once, and loads them.

What is compiled is kept in the user's cache folder (``EXCITE_CACHE``, else ``$XDG_CACHE_HOME/excite``, else
``~/.cache/excite``) under a name made from the sources, the compiler, its options and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
# Not -ffast-math: sums keep their order, and NaN stays NaN.
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-fopenmp")
SIGNATURES = {
    "kernels.c": {
        "gate": "pplllpplipplifppl",
        "scale": "pppp" + "lll" + "i",
        "select_two": "pppp" + "lll",
        "has_grouped": "",
        "grouped": "pppp" + 13 * "l" + "i",
        "grouped_weight": "ppp" + 13 * "l",
        "selective": "pp" + 9 * "l" + 2 * "pplllll" + "ppli" + "ppif" + "pp",
    },
    "training.c": {
        "moments": "pppp" + "llll",
        "active": "pppppp" + "llll",
        "join": "ppppp" + "llll",
        "join_backward": "ppppppp" + "llll",
        "select_sum": "pppp" + "li" + "p" + "llll",
        "select_backward": "ppppp" + "li" + "pp" + "llll",
        "through_norm": "ppp" + "i" + "p" + "llll",
    },
}
"""The functions of each source, with the types of their arguments: p a pointer, l a long, i an int, f a float."""
_ANSWERING = ("grouped", "grouped_weight", "has_grouped", "selective")
_COMPILE_SECONDS = 120


def cache_folder() -> Path:
    """Where choices and compiled passes are kept between runs."""
    if own := os.environ.get("EXCITE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "excite"


@cache
def kernels(dtype: torch.dtype, source: str = "kernels.c") -> ctypes.CDLL | None:
    """The compiled passes for maps of float32 or bfloat16; None where they cannot be had, which is logged once.

    They need Linux, a C compiler (``CC``, else cc), a processor with AVX-512 and a PyTorch that runs its threads by
    GNU OpenMP, whose threads they share. ``EXCITE_NATIVE=0`` turns them off.

    Args:
        dtype: of the maps.
        source: a name in ``SIGNATURES``.
    """
    reason = _missing()
    if reason is None:
        try:
            return _declared(ctypes.CDLL(str(_compiled(dtype, source))), source)
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(error).strip().partition("\n")[0]
    log.info("The passes in C are not used (%s): PyTorch's operators are.", reason)
    return None


def _declared(library: ctypes.CDLL, source: str) -> ctypes.CDLL:
    """With the types of all arguments."""
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
    for name, arguments in SIGNATURES[source].items():
        function = getattr(library, name)
        function.argtypes = [kinds[one] for one in arguments]
        function.restype = ctypes.c_int if name in _ANSWERING else None
    return library


def _missing() -> str | None:
    if os.environ.get("EXCITE_NATIVE") == "0":
        return "EXCITE_NATIVE is 0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"{platform.system()} on {platform.machine()}"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "no AVX-512"
    if _compiler() is None:
        return "no C compiler"
    return None if _openmp() else "PyTorch does not run its threads by GNU OpenMP"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")


@cache
def _openmp() -> str | None:
    """The file of the OpenMP library that PyTorch has loaded: a second one would bring threads of its own."""
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
    # Other packages, such as scikit-learn, bring their own.
    own = {file for file in files if Path(torch.__file__).parent in Path(file).parents}
    own = own or {file for file in files if "site-packages" not in file}
    return own.pop() if len(own) == 1 else None


def _compiled(dtype: torch.dtype, source: str) -> Path:
    compiler, openmp = _compiler(), _openmp()
    assert compiler is not None
    assert openmp is not None
    options = (*OPTIONS, *(("-DEXCITE_BF16",) if dtype == torch.bfloat16 else ()))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30).stdout
    texts = [(_FOLDER / name).read_text() for name in ("maps.h", source)]
    made_from = "\0".join((*texts, compiler, version, *options, openmp, processor()))
    folder = cache_folder() / "native"
    built = folder / f"{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.so"
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made, unlinked = Path(scratch) / "passes.so", Path(scratch) / "passes.o"
        compile_only = [one for one in options if one != "-shared"]
        _run([compiler, *compile_only, "-c", str(_FOLDER / source), "-o", str(unlinked)])
        # Linked to the library itself, not by -fopenmp, which would name the compiler's own.
        _run([compiler, "-shared", str(unlinked), openmp, "-lm", "-o", str(made)])
        made.replace(built)
    return built


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    if done.returncode:
        raise OSError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-300:]}")


@cache
def processor() -> str:
    """What the processor calls itself, with what it can do."""
    try:
        with open("/proc/cpuinfo") as told:
            lines = [line.strip() for line in told]
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags")
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in wanted)

"""The build description: which files make the native backend, with which flags, and their fingerprint.

`setup.py` (ahead of time) and `jit.py` (just in time) both read it, so the two builds cannot drift apart. It needs
nothing but the standard library: `setup.py` loads it by path where neither torch nor this package is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
MODULE = "_native"
RECORD = "_native.json"  # lies beside a prebuilt binary and says which sources it was made from
FATBIN = "_kernels.fatbin"  # device code that `pip install` compiled, with such a record of its own

# No fast-math, no contraction, no -march=native: the same bits on every machine (docs/numerics.md). Instruction sets
# are chosen inside the files. The last two flags only drop errno and floating-point traps, which nobody reads.
UNIX_FLAGS = [
    "-O3",
    "-DNDEBUG",  # Python sets it, torch does not
    "-g0",  # Python's own flags ask for debug information: ten times the size, half as long again to build
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
MSVC_FLAGS = ["/O2", "/std:c++17", "/fp:precise"]
DEVICE_CODES = (75, 80, 90, 100, 120)  # compute capabilities; each serves the later ones of its major version too
# Of nvcc and NVRTC: no contraction, IEEE division and square root, denormals, as on the CPU.
DEVICE_FLAGS = ["-std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"]


def csrc() -> Path:
    """Returns the folder of the C++ sources: inside an installed package, beside it in a source tree."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def sources() -> list[Path]:
    """Returns every file to compile, in a fixed order."""
    return sorted(csrc().rglob("*.cpp"))


def headers() -> list[Path]:
    """Returns what else is in the folder: every header that those files may include, and the kernels for GPUs."""
    return sorted([*csrc().rglob("*.h"), *csrc().rglob("*.cu")])


def find_nvcc() -> str | None:
    """Returns the path of CUDA's compiler: of the toolkit that CUDA_HOME or CUDA_PATH names, else the first found."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [os.path.join(home, "bin")] if home else []
    places = [*folders, None, "/usr/local/cuda/bin"]  # None: the PATH
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def nvcc_command(nvcc: str, codes: list[int], target: Path) -> list[str]:
    """Returns the command that compiles the kernels: to a cubin for one GPU, to a fatbin with PTX for several."""
    if len(codes) == 1:
        what = ["-cubin", f"-arch=sm_{codes[0]}"]
    else:
        ptx = f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}"
        what = ["-fatbin", *(f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes), ptx, "--threads=0"]
    return [nvcc, *what, *DEVICE_FLAGS, f"-I{csrc()}", "-o", str(target), str(device_source())]


def device_source() -> Path:
    """Returns the file of all kernels for a GPU."""
    return csrc() / "cuda" / "kernels.cu"


def device_headers() -> list[Path]:
    """Returns every header that it may include."""
    return sorted((csrc() / "core").glob("*.h")) + sorted((csrc() / "cuda").glob("*.h"))


def compile_flags(*, msvc: bool = sys.platform == "win32") -> list[str]:
    """Returns the flags that every source file is compiled with."""
    return list(MSVC_FLAGS if msvc else UNIX_FLAGS)


def link_flags(*, msvc: bool = sys.platform == "win32") -> list[str]:
    """Returns the flags of the link step: torch's own OpenMP is looked up at run time, so little is needed."""
    if msvc or sys.platform == "darwin":
        return []
    # The standard library ahead of torch's, which export pieces of it and come with every just-in-time build.
    return ["-Wl,--as-needed", "-lstdc++", "-ldl", "-lpthread"]


def version() -> str:
    """Returns the version in `_version.py`, without importing the package."""
    scope: dict[str, str] = {}
    exec((PACKAGE / "_version.py").read_text(encoding="utf-8"), scope)
    return scope["__version__"]


def fingerprint() -> str:
    """Returns a digest of version, flags, sources and headers: a binary that has another one is not ours."""
    return _digest([compile_flags(), link_flags()], sources() + headers())


def device_fingerprint() -> str:
    """Returns such a digest for device code."""
    return _digest([DEVICE_FLAGS], [device_source(), *device_headers()])


def _digest(flags: list[list[str]], paths: list[Path]) -> str:
    digest = hashlib.sha256(json.dumps([version(), *flags]).encode())
    root = csrc()
    for path in paths:
        # Length-prefixed, so that no text can move from one file to its neighbour unnoticed.
        name, text = path.relative_to(root).as_posix().encode(), path.read_bytes()
        digest.update(b"%d %d " % (len(name), len(text)) + name + text)
    return digest.hexdigest()

"""The build description: which files make the native backend, with which flags, and their fingerprint.

`setup.py` (ahead of time) and `jit.py` (just in time) both read it, so that the two builds cannot differ. It needs only
the standard library, because `setup.py` loads it by path where neither torch nor this package is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
MODULE = "_native"
RECORD = "_native.json"  # file beside a prebuilt binary that holds the fingerprint of its sources
FATBIN = "_kernels.fatbin"  # device code that `pip install` compiled; "_kernels.json" holds its fingerprint

# Fast-math, contraction and -march=native would change bits between machines (docs/numerics.md), so none is used.
# Instruction sets are chosen inside the files. The last two flags drop only errno and floating-point traps, which the
# code does not use.
UNIX_FLAGS = [
    "-O3",
    "-DNDEBUG",  # drops assertions; Python's own flags have it, torch's have not
    "-g0",  # Python's own flags ask for debug information, which takes ten times the size and half as much time again
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
MSVC_FLAGS = ["/O2", "/std:c++17", "/fp:precise"]
DEVICE_CODES = (75, 80, 90, 100, 120)  # compute capabilities; code for one also runs on later ones of its major version
# The arithmetic of the CPU's kernels, for nvcc and NVRTC: no contraction, IEEE division and square root, denormals.
DEVICE_FLAGS = ["-std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"]


def csrc() -> Path:
    """Returns the folder of the C++ sources: inside the package if it is installed, else beside it."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def sources() -> list[Path]:
    """Returns every C++ file to compile, in a fixed order."""
    return sorted(csrc().rglob("*.cpp"))


def headers() -> list[Path]:
    """Returns the other files of the C++ sources: all headers, and the kernels for GPUs."""
    return sorted([*csrc().rglob("*.h"), *csrc().rglob("*.cu")])


def find_nvcc() -> str | None:
    """Returns the path of nvcc: from the folder in CUDA_HOME or CUDA_PATH, else the PATH, else /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [os.path.join(home, "bin")] if home else []
    places = [*folders, None, "/usr/local/cuda/bin"]  # None searches the PATH
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def listed_codes(listing: str) -> list[int]:
    """Returns the compute capabilities in what `nvcc --list-gpu-code` prints, such as 90 for sm_90."""
    return [int(code) for code in re.findall(r"\bsm_(\d+)\b", listing)]


def nvcc_command(nvcc: str, target: str, file: Path) -> list[str]:
    """Returns the command that compiles the kernels for one target.

    Args:
        nvcc: path of the compiler.
        target: "sm_90" for machine code, a cubin, for compute capability 9.0; "compute_90" for its PTX.
        file: file to write.
    """
    return [nvcc, "-cubin" if target.startswith("sm_") else "-ptx", f"-arch={target}", *_what_to_compile(file)]


def fatbin_command(nvcc: str, codes: list[int], file: Path) -> list[str]:
    """Returns the command that compiles the kernels for several GPUs into a fatbin.

    Machine code serves later GPUs of its major version alone. The driver compiles PTX for every later GPU: that of the
    first code for those between two major versions in `codes`, that of the last one for those that come after it.

    Args:
        nvcc: path of the compiler.
        codes: compute capabilities in ascending order, such as 90 for 9.0; at least one.
        file: file to write.
    """
    targets = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    targets += [f"-gencode=arch=compute_{code},code=compute_{code}" for code in sorted({codes[0], codes[-1]})]
    return [nvcc, "-fatbin", *targets, "--threads=0", *_what_to_compile(file)]


def _what_to_compile(file: Path) -> list[str]:
    return [*DEVICE_FLAGS, f"-I{csrc()}", "-o", str(file), str(device_source())]


def device_source() -> Path:
    """Returns the file of all kernels for a GPU."""
    return csrc() / "cuda" / "kernels.cu"


def device_headers() -> list[Path]:
    """Returns every header that the kernels for a GPU may include."""
    return sorted((csrc() / "core").glob("*.h")) + sorted((csrc() / "cuda").glob("*.h"))


def compile_flags(*, msvc: bool = sys.platform == "win32") -> list[str]:
    """Returns the flags that every source file is compiled with."""
    return list(MSVC_FLAGS if msvc else UNIX_FLAGS)


def link_flags(*, msvc: bool = sys.platform == "win32") -> list[str]:
    """Returns the flags of the link step; OpenMP is not among them, because the module finds torch's at run time."""
    if msvc or sys.platform == "darwin":
        return []
    # The standard library must come before torch's libraries, which a just-in-time build links and which export parts
    # of it.
    return ["-Wl,--as-needed", "-lstdc++", "-ldl", "-lpthread"]


def version() -> str:
    """Returns the version in `_version.py`, without importing the package."""
    scope: dict[str, str] = {}
    exec((PACKAGE / "_version.py").read_text(encoding="utf-8"), scope)
    return scope["__version__"]


def fingerprint() -> str:
    """Returns the digest of version, flags, sources and headers; a binary with another digest is not used."""
    return _digest([compile_flags(), link_flags()], sources() + headers())


def device_fingerprint() -> str:
    """Returns the digest of version, flags, kernels and headers of the device code."""
    return _digest([DEVICE_FLAGS], [device_source(), *device_headers()])


def _digest(flags: list[list[str]], paths: list[Path]) -> str:
    digest = hashlib.sha256(json.dumps([version(), *flags]).encode())
    root = csrc()
    for path in paths:
        # The lengths make the digest change if text moves from one file to the next.
        name, text = path.relative_to(root).as_posix().encode(), path.read_bytes()
        digest.update(b"%d %d " % (len(name), len(text)) + name + text)
    return digest.hexdigest()

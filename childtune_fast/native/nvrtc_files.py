"""Where NVRTC may be: in torch's wheels, in the process already, with torch or conda, in a toolkit, on the system."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

WINDOWS = sys.platform == "win32"
# Folders below site-packages/nvidia in NVIDIA's wheels, below sys.prefix in conda's packages, and below a toolkit's.
WHEELS = ("cu{major}/bin/x86_64", "cuda_nvrtc/bin") if WINDOWS else ("cu{major}/lib", "cuda_nvrtc/lib")
PREFIX = ("Library/bin", "Library/bin/x64") if WINDOWS else ("lib",)
TOOLKIT = ("bin/x64", "bin") if WINDOWS else ("lib64", "lib")
MAPS = Path("/proc/self/maps")


def wanted_majors() -> list[int]:
    """Returns the CUDA major versions whose NVRTC may be used: torch's own, which its driver knows.

    A torch without CUDA leads to no GPU; there the newest serves tests.
    """
    return [int(torch.version.cuda.partition(".")[0])] if torch.version.cuda else [13, 12]


def nvrtc_files() -> list[Path]:
    """Returns every NVRTC library of the wanted versions, the one to try first first; without a folder, a system's."""
    found: dict[str, Path] = {}
    for major in wanted_majors():
        name = re.compile(rf"nvrtc64_{major}\d_\d+\.dll" if WINDOWS else rf"libnvrtc(-[0-9a-f]+)?\.so\.{major}(\.\d+)*")
        in_wheels, elsewhere = _in_folders(_wheels(major), name), _in_folders(_others(), name)
        for path in [*in_wheels, *_loaded(name), *elsewhere, *_system(major)]:
            found.setdefault(os.path.realpath(path) if path.is_absolute() else str(path), path)
    return list(found.values())


def _in_folders(folders: list[Path], name: re.Pattern[str]) -> Iterator[Path]:
    for folder in folders:
        with contextlib.suppress(OSError):
            yield from sorted(folder / found for found in os.listdir(folder) if name.fullmatch(found))


def _wheels(major: int) -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    return [Path(root, folder.format(major=major)) for root in roots for folder in WHEELS]


def _loaded(name: re.Pattern[str]) -> Iterator[Path]:
    """Yields the libraries that this process has loaded already; only Linux lists them."""
    with contextlib.suppress(OSError):
        for line in MAPS.read_text(errors="surrogateescape").splitlines():
            file = line[line.find("/") :] if "/" in line else ""
            if name.fullmatch(os.path.basename(file)):
                yield Path(file)


def _others() -> list[Path]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), None if WINDOWS else "/usr/local/cuda"]
    return [
        Path(torch.__file__).parent / "lib",
        *(Path(sys.prefix, folder) for folder in PREFIX),
        *(Path(home, folder).absolute() for home in homes if home for folder in TOOLKIT),
    ]


def _system(major: int) -> Iterator[Path]:
    if not WINDOWS:
        yield Path(f"libnvrtc.so.{major}")  # the loader looks for it
    elif path := ctypes.util.find_library(f"nvrtc64_{major}0_0"):  # looks in the folders of PATH
        yield Path(path).absolute()

"""Device code for a GPU: prebuilt by `pip install`, else compiled now by NVRTC or nvcc, and cached on disk.

All three give the same kernels from `csrc/cuda/kernels.cu`. NVRTC comes with torch's CUDA wheels, so that it matches
torch and driver and needs neither a toolkit nor a host compiler; nvcc serves where it is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import _build, _nvrtc
from ._jit import cache_folder
from ._toolchain import PROBE_TIMEOUT, quoted, run
from .backend import BackendError

NVCC_TIMEOUT = 300.0  # seconds


def images(capability: tuple[int, int]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields the ways to device code for a GPU of this compute capability, best first: a name, and what makes it.

    The functions raise BackendError where a way does not lead there; a driver may still refuse what they return.
    """
    architecture = 10 * capability[0] + capability[1]
    yield "prebuilt", _prebuilt
    yield "compiled by NVRTC", lambda: _cached(architecture, *_nvrtc_compiler())
    yield "compiled by nvcc", lambda: _cached(architecture, *_nvcc_compiler())


def _prebuilt() -> bytes:
    """The fatbin that `pip install` made, if it was made from the very sources of this package."""
    path = _build.PACKAGE / _build.FATBIN
    try:
        recorded = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["fingerprint"]
        image = path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        raise BackendError("none is prebuilt") from None
    if recorded != _build.device_fingerprint():
        raise BackendError(f"{path} was made from other sources than this package's; run `pip install` again")
    return image


Compile = Callable[[int], bytes]  # from an architecture, such as 90 for compute capability 9.0, to a cubin


def _nvrtc_compiler() -> tuple[str, Compile]:
    """NVRTC's version, and the function that compiles with it."""
    wanted = (torch.version.cuda or "").partition(".")[0]
    libraries = sorted(_nvrtc.libraries(), key=lambda path: not path.name.endswith(f".{wanted}"))
    if not libraries:
        raise BackendError("there is no NVRTC; run `pip install nvidia-cuda-nvrtc`, of torch's CUDA version")
    nvrtc = _nvrtc.Nvrtc(libraries[0])
    return f"{libraries[0]} {nvrtc.version()}", lambda architecture: nvrtc.compile(
        *_nvrtc.kernel_source(), architecture
    )


def _nvcc_compiler() -> tuple[str, Compile]:
    """What nvcc says of its version, and the function that compiles with it."""
    path = _build.find_nvcc()
    if path is None:
        raise BackendError("there is no nvcc: install a CUDA toolkit, and set CUDA_HOME to its folder")
    status, banner = _run([path, "--version"], PROBE_TIMEOUT)
    if status:
        raise BackendError(f"{path} fails at --version: {banner.strip()}")
    return f"{path} {banner}", lambda architecture: _compile_with_nvcc(path, architecture)


def _compile_with_nvcc(path: str, architecture: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="childtune_fast-", ignore_cleanup_errors=True) as folder:
        cubin = Path(folder, "kernels.cubin")
        status, output = _run(_build.nvcc_command(path, [architecture], cubin), NVCC_TIMEOUT)
        if status:
            raise BackendError(f"{path} failed (status {status}); its last lines:{quoted(output)}")
        return cubin.read_bytes()


def _run(command: list[str], timeout: float) -> tuple[int, str]:
    try:
        return run(command, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise BackendError(f"{command[0]} was stopped after {timeout:.0f} s") from None
    except OSError as error:
        raise BackendError(f"{command[0]} cannot be run ({error})") from None


def _cached(architecture: int, compiler: str, compile_for: Compile) -> bytes:
    """The compiler's cubin, from the cache if it holds a whole one; a cache that cannot be written is done without."""
    facts = json.dumps([_build.device_fingerprint(), compiler, architecture])
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    cache = cache_folder()
    for path in sorted(cache.glob(f"{key}-*.cubin")):
        with contextlib.suppress(OSError):
            image = path.read_bytes()
            if path.stem == f"{key}-{_digest(image)}":
                return image
    image = compile_for(architecture)
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as private:
            written = Path(private, "cubin")
            written.write_bytes(image)
            os.replace(written, cache / f"{key}-{_digest(image)}.cubin")  # whole, or not there
    return image


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:32]

"""Device code for a GPU: prebuilt by `pip install`, else compiled now by NVRTC or nvcc, and cached on disk.

All three ways make the same kernels from `csrc/cuda/kernels.cu`. NVRTC comes with torch's CUDA wheels, so that its
version fits torch and the driver, and it needs no toolkit, no host compiler and no GPU. nvcc is used where NVRTC is
missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import hashlib
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import BackendError, build
from .jit import cache_folder
from .toolchain import PROBE_TIMEOUT, quoted, run

NVCC_TIMEOUT = 300.0  # seconds


def images(capability: tuple[int, int]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields the ways to make device code for a GPU of this compute capability, the best one first.

    Yields:
        The name of the way, and a function that returns the device code or raises BackendError. The driver may refuse
        the code later.
    """
    architecture = 10 * capability[0] + capability[1]
    yield "prebuilt", _prebuilt
    yield "compiled by NVRTC", lambda: _cached(architecture, *_nvrtc_compiler())
    yield "compiled by nvcc", lambda: _cached(architecture, *_nvcc_compiler())


def _prebuilt() -> bytes:
    """Returns the fatbin that `pip install` made.

    Raises:
        BackendError: there is none, or it was made from other sources than those of this package.
    """
    path = build.PACKAGE / build.FATBIN
    try:
        recorded = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["fingerprint"]
        image = path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        raise BackendError("none is prebuilt") from None
    if recorded != build.device_fingerprint():
        raise BackendError(f"{path} was made from other sources than this package's; run `pip install` again")
    return image


Compile = Callable[[int], bytes]  # compiles a cubin for an architecture, such as 90 for compute capability 9.0


def _nvrtc_compiler() -> tuple[str, Compile]:
    """Returns the path and version of NVRTC, and the function that compiles with it; raises BackendError if none."""
    wanted = (torch.version.cuda or "").partition(".")[0]
    libraries = sorted(nvrtc_libraries(), key=lambda path: not path.name.endswith(f".{wanted}"))
    if not libraries:
        raise BackendError("there is no NVRTC; run `pip install nvidia-cuda-nvrtc`, of torch's CUDA version")
    nvrtc = Nvrtc(libraries[0])
    return f"{libraries[0]} {nvrtc.version()}", lambda architecture: nvrtc.compile(*kernel_source(), architecture)


def _nvcc_compiler() -> tuple[str, Compile]:
    """Returns the path and version of nvcc, and the function that compiles with it; raises BackendError if none."""
    path = build.find_nvcc()
    if path is None:
        raise BackendError("there is no nvcc: install a CUDA toolkit, and set CUDA_HOME to its folder")
    status, banner = _run([path, "--version"], PROBE_TIMEOUT)
    if status:
        raise BackendError(f"{path} fails at --version: {banner.strip()}")
    return f"{path} {banner}", lambda architecture: _compile_with_nvcc(path, architecture)


def _compile_with_nvcc(path: str, architecture: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="childtune_fast-", ignore_cleanup_errors=True) as folder:
        cubin = Path(folder, "kernels.cubin")
        status, output = _run(build.nvcc_command(path, [architecture], cubin), NVCC_TIMEOUT)
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
    """Returns the compiler's cubin, from the cache if it holds a complete one.

    A new cubin is written to the cache, unless the folder cannot be written.

    Args:
        architecture: compute capability, such as 90 for 9.0.
        compiler: path and version of the compiler, on which the cached file depends.
        compile_for: function that compiles the cubin.
    """
    facts = json.dumps([build.device_fingerprint(), compiler, architecture])
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
            os.replace(written, cache / f"{key}-{_digest(image)}.cubin")  # renaming never leaves a part of a file
    return image


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:32]


# ---- NVRTC ---------------------------------------------------------------------------------------------------------

FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")  # where NVIDIA's wheels put NVRTC, below site-packages/nvidia
# NVRTC reads no files, so it is given the text of every header. The kernels include three headers of the standard
# library. NVRTC has their functions built in and lacks only the names of the integer types.
STANDARD_HEADERS = {
    "cstdint": """#pragma once
        typedef signed char int8_t; typedef unsigned char uint8_t;
        typedef short int16_t; typedef unsigned short uint16_t;
        typedef int int32_t; typedef unsigned int uint32_t;
        typedef long int64_t; typedef unsigned long uint64_t; typedef unsigned long uintptr_t;
        static_assert(sizeof(int64_t) == 8, "");
    """,
    "cmath": "",
    "cstring": "",
}


def nvrtc_libraries() -> list[Path]:
    """Returns the NVRTC libraries in the wheels that torch depends on, else the system's, else an empty list."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [path for root in roots for folder in FOLDERS for path in Path(root, folder).glob("libnvrtc.so.*")]
    if found:
        return sorted(found)
    system = ctypes.util.find_library("nvrtc")
    return [Path(system)] if system else []


def kernel_source() -> tuple[str, dict[str, str]]:
    """Returns the text of the kernels, and {name used in `#include`: text} of every header."""
    root = build.csrc()
    headers = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in build.device_headers()}
    return build.device_source().read_text(encoding="utf-8"), STANDARD_HEADERS | headers


class Nvrtc:
    """A loaded NVRTC library; raises BackendError if it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        try:
            # NVRTC opens its builtins by name alone when it compiles, and finds them beside itself only in releases
            # that have a run path (13.0 has none). Once loaded, they are found by that name.
            for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")) if path.is_absolute() else ():
                ctypes.CDLL(str(builtins))
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(f"NVRTC could not be loaded from {path} ({error})") from None
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def version(self) -> tuple[int, int]:
        """Returns major and minor version of the CUDA release that the library belongs to."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, source: str, headers: dict[str, str], architecture: int) -> bytes:
        """Returns the machine code, a cubin, of CUDA source code.

        Args:
            source: the text of the source file.
            headers: {name used in `#include`: text} of every header.
            architecture: compute capability of the GPU, such as 90 for 9.0.

        Raises:
            BackendError: the source does not compile; the message has NVRTC's log.
        """
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * len(headers))(*[name.encode() for name in headers])
        texts = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
        text = source.encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text, b"kernels.cu", len(headers), texts, names)
        try:
            flags = [flag.encode() for flag in [*build.DEVICE_FLAGS, f"--gpu-architecture=sm_{architecture}"]]
            status = self._library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
            if status:
                log = self._result("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
                raise BackendError(f"NVRTC {self.version()} does not compile the kernels for sm_{architecture}:\n{log}")
            return self._result("CUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _result(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise BackendError(f"{function} failed: {self._library.nvrtcGetErrorString(status).decode()}")

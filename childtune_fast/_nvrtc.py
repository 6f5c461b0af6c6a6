"""NVRTC, which compiles the CUDA kernels at run time: torch's CUDA wheels bring it, so no toolkit is needed, nor a GPU.

It reads no files: it gets every header by name, and of the standard library's three that the kernels include it knows
what they are for already, but for the names of integers.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
from pathlib import Path

from . import _build
from .backend import BackendError

FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")  # of NVIDIA's wheels, in site-packages/nvidia
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


def libraries() -> list[Path]:
    """Returns the NVRTC libraries that can be found: those of the wheels that torch brings, else the system's."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [path for root in roots for folder in FOLDERS for path in Path(root, folder).glob("libnvrtc.so.*")]
    if found:
        return sorted(found)
    system = ctypes.util.find_library("nvrtc")
    return [Path(system)] if system else []


def kernel_source() -> tuple[str, dict[str, str]]:
    """Returns the text of the kernels and of every header that they include, by the names they use."""
    root = _build.csrc()
    headers = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in _build.device_headers()}
    return _build.device_source().read_text(encoding="utf-8"), STANDARD_HEADERS | headers


class Nvrtc:
    """One NVRTC library."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(f"NVRTC could not be loaded from {path} ({error})") from None
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def version(self) -> tuple[int, int]:
        """Returns the version of CUDA that it belongs to."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, source: str, headers: dict[str, str], architecture: int) -> bytes:
        """Returns the machine code, a cubin, for GPUs of compute capability `architecture`, such as 90 for 9.0.

        Raises:
            BackendError: it does not compile; with what NVRTC says.
        """
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * len(headers))(*[name.encode() for name in headers])
        texts = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
        text = source.encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text, b"kernels.cu", len(headers), texts, names)
        try:
            flags = [flag.encode() for flag in [*_build.DEVICE_FLAGS, f"--gpu-architecture=sm_{architecture}"]]
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

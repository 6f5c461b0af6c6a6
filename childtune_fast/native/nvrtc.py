"""NVRTC, the compiler of CUDA as a library: it reads no files, and needs neither a toolkit nor a GPU."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from . import BackendError, build

# NVRTC is given the text of every header. The kernels include three headers of the standard library. NVRTC has their
# functions built in and lacks only the names of the integer types. `long` has 64 bits on Linux alone.
STANDARD_HEADERS = {
    "cstdint": """#pragma once
        typedef signed char int8_t; typedef unsigned char uint8_t;
        typedef short int16_t; typedef unsigned short uint16_t;
        typedef int int32_t; typedef unsigned int uint32_t;
        typedef long long int64_t; typedef unsigned long long uint64_t; typedef unsigned long long uintptr_t;
        static_assert(sizeof(int64_t) == 8 && sizeof(uintptr_t) == sizeof(void*), "");
    """,
    "cmath": "",
    "cstring": "",
}


def kernel_source() -> tuple[str, dict[str, str]]:
    """Returns the text of the kernels, and {name used in `#include`: text} of every header."""
    root = build.csrc()
    headers = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in build.device_headers()}
    return build.device_source().read_text(encoding="utf-8"), STANDARD_HEADERS | headers


class Nvrtc:
    """A loaded NVRTC library.

    Attributes:
        path: the file of the library, also if it was found by its name alone.
        version: major and minor version of the CUDA release that it belongs to.

    Raises:
        BackendError: it cannot be loaded, or is something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            self.path = _file_of(self._library, path)
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
            self.version = major.value, minor.value
            self._load_builtins()
        except (OSError, AttributeError) as error:
            raise BackendError(f"NVRTC could not be loaded from {path} ({error})") from None

    def _load_builtins(self) -> None:
        """Loads the library that NVRTC opens when it compiles.

        NVRTC opens it by its name, and finds it beside itself only in releases that have a run path (13.0 has none).
        Once loaded, it is found by that name from anywhere.
        """
        major, minor = self.version
        windows = f"nvrtc-builtins64_{major}{minor}.dll"
        name = windows if sys.platform == "win32" else f"libnvrtc-builtins.so.{major}.{minor}"
        for folder in (self.path.parent, self.path.resolve().parent):  # the file may be a link from another folder
            if (folder / name).exists():
                ctypes.CDLL(str(folder / name))
                return

    def architectures(self) -> list[int]:
        """Returns the compute capabilities that the library compiles for, such as 90 for 9.0."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(self, source: str, headers: dict[str, str], target: str) -> bytes:
        """Returns the device code of CUDA source code.

        Args:
            source: the text of the source file.
            headers: {name used in `#include`: text} of every header.
            target: "sm_90" for machine code, a cubin, for compute capability 9.0; "compute_90" for its PTX.

        Raises:
            BackendError: the source does not compile; the message has NVRTC's log.
        """
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * len(headers))(*[name.encode() for name in headers])
        texts = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
        text = source.encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text, b"kernels.cu", len(headers), texts, names)
        try:
            flags = [flag.encode() for flag in [*build.DEVICE_FLAGS, f"--gpu-architecture={target}"]]
            status = self._library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
            if status:
                log = self._result("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
                raise BackendError(f"NVRTC of {self.path} does not compile the kernels for {target}:\n{log}")
            return self._result("CUBIN" if target.startswith("sm_") else "PTX", program)
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


class _Found(ctypes.Structure):
    """What dladdr says of an address, Dl_info in <dlfcn.h>."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(library: ctypes.CDLL, path: Path) -> Path:
    """Returns the file that a library was loaded from, which the loader chose if `path` is a name alone."""
    if path.is_absolute():
        return path
    found = _Found()
    ctypes.CDLL(None).dladdr(library.nvrtcVersion, ctypes.byref(found))
    return Path(os.fsdecode(found.file))

"""Builds roof.cpp and calls it: what a step would take if it did nothing but move its bytes."""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from childtune_fast import _build

from .workloads import Workload

PIECE = 32768  # weights that a thread takes at a time


@functools.cache
def _library() -> ctypes.CDLL:
    sources = [Path(__file__).with_name("roof.cpp"), _build.csrc() / "cpu" / "parallel.cpp"]
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", f"-I{_build.csrc()}"]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "roof.so")
        subprocess.run([*compiler, *flags, *map(str, sources), "-o", str(binary), "-ldl", "-lpthread"], check=True)
        return ctypes.CDLL(str(binary))  # stays loaded after its file is gone


class _Piece(ctypes.Structure):
    _fields_ = [
        ("p", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    ]


def make_roof(work: Workload) -> Callable[[], None]:
    """Returns a function that reads and writes what our step would; all values stay as they are."""
    pieces, starts, filled = [], [0], 0
    for streams in zip(work.params, work.grads, work.exp_avgs, work.exp_avg_sqs, strict=True):
        numel = streams[0].numel()
        for begin in range(0, numel, PIECE):
            count = min(PIECE, numel - begin)
            pieces.append(_Piece(*(t.data_ptr() + begin * t.element_size() for t in streams), count))
            filled += count
            if filled >= PIECE:
                starts.append(len(pieces))
                filled = 0
    if filled:
        starts.append(len(pieces))
    slices = len(starts) - 1
    pieces = (_Piece * len(pieces))(*pieces)
    starts = (ctypes.c_int64 * len(starts))(*starts)
    weight_bytes = work.params[0].element_size()
    function = _library().roof
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32, ctypes.c_int]
    function.restype = None

    def roof() -> None:
        function(pieces, starts, slices, weight_bytes, 0, torch.get_num_threads())

    return roof

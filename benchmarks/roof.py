"""Builds and calls roof.cpp, which does nothing but move the bytes that a step moves: the roof of a step's speed.

It also reads memory alone and writes it alone: what a machine's memory gives, whatever the step.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from childtune_fast.native import build
from childtune_fast.ops.packed_mask import BLOCK, PackedMask

from .workloads import Workload

PIECE = 32768  # weights that a thread takes at a time; a multiple of a mask's block


@functools.cache
def _library() -> ctypes.CDLL:
    sources = [Path(__file__).with_name("roof.cpp"), build.csrc() / "cpu" / "parallel.cpp"]
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", f"-I{build.csrc()}"]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "roof.so")
        subprocess.run([*compiler, *flags, *map(str, sources), "-o", str(binary), "-ldl", "-lpthread"], check=True)
        return ctypes.CDLL(str(binary))  # stays loaded after its file is removed


class _Piece(ctypes.Structure):
    _fields_ = [
        ("p", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("kept", ctypes.c_int64),
    ]


def make_roof(work: Workload, masks: list[PackedMask] | None = None) -> Callable[[], None]:
    """Returns a function that reads and writes the bytes of a ChildAdamW step and changes no value.

    Args:
        work: the tensors. The caller must keep them, and `masks`, as long as it uses the function. Its state has four
            bytes a value, or one.
        masks: the masks of a child network, one for each parameter. The parameters must then be float32, and the state
            of the child network is the first values of the workload's state. None moves the bytes of plain AdamW
            (default: None).
    """
    pieces, starts, filled = [], [0], 0
    for i, param in enumerate(work.params):
        for begin in range(0, param.numel(), PIECE):
            count = min(PIECE, param.numel() - begin)
            pieces.append(_piece(work, i, None if masks is None else masks[i], begin, count))
            filled += count
            if filled >= PIECE:
                starts.append(len(pieces))
                filled = 0
    if filled:
        starts.append(len(pieces))
    slices = len(starts) - 1
    pieces = (_Piece * len(pieces))(*pieces)
    starts = (ctypes.c_int64 * len(starts))(*starts)
    sizes = work.params[0].element_size(), work.exp_avgs[0].element_size()
    function = _library().roof
    function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64, *[ctypes.c_int] * 2, ctypes.c_uint8, ctypes.c_int]
    function.restype = None

    def roof() -> None:
        function(pieces, starts, slices, *sizes, 0, torch.get_num_threads())

    return roof


def make_stream(words: torch.Tensor, write: bool) -> Callable[[], None]:
    """Returns a function that reads all of an int32 tensor, or writes it; the caller must keep the tensor."""
    function = _library().stream
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32, ctypes.c_int]
    function.restype = None
    return lambda: function(words.data_ptr(), words.numel(), write, 0, torch.get_num_threads())


def _piece(work: Workload, i: int, mask: PackedMask | None, begin: int, count: int) -> _Piece:
    """Returns the weights `begin` to `begin + count` of parameter `i`, with their state."""
    first, end, bits = begin, begin + count, None
    if mask is not None:
        first, end = (int(mask.offsets[-(-at // BLOCK)]) for at in (begin, end))
        bits = mask.bits.data_ptr() + begin // 8

    def address(tensor: torch.Tensor, at: int) -> int:
        return tensor.data_ptr() + at * tensor.element_size()

    weights = (address(tensors[i], begin) for tensors in (work.params, work.grads))
    states = (address(tensors[i], first) for tensors in (work.exp_avgs, work.exp_avg_sqs))
    return _Piece(*weights, *states, bits, count, end - first)

"""What must hold after every call, whatever was passed: it raised a sentence and wrote nothing, or wrote only its own.

The process must also live; the driver, fuzz.py, sees to that. Memory is compared as bytes of whole storages, by their
addresses, because torch itself crashes on a tensor whose storage was freed. So bytes between and beside tensors are
guard zones.
"""

import collections
import ctypes
import linecache
import math
import os
import struct

import numpy as np
import torch

import childtune_fast

TORCHS = (
    "ChildAdamW()",
    "add_param_group",
    "zero_grad",
)  # whose errors, where torch raises them, are torch's as they are
SENTENCES = (ValueError, TypeError, RuntimeError, OSError, ImportError)  # BackendError is a RuntimeError
PACKAGE = os.path.dirname(childtune_fast.__file__)
DRIVER = os.path.dirname(__file__)


class Mine(Exception):
    """Raised by what the fuzzer passes: a closure, a property, a selector. Whoever calls it lets it through."""


def place(tensor):
    """(address, bytes) of a tensor's storage; None if it has none that can be read."""
    try:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return None
        if tensor.device.type != "cpu":
            return None
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return None
    return (address, size) if address and size else None


class Memory:
    """The bytes of all storages of some tensors, and which of these bytes belong to the tensors `own`."""

    def __init__(self, tensors, own=()):
        self.held = [*tensors, *own]  # so that no address is used again
        self.bytes = {at: ctypes.string_at(*at) for at in {place(t) for t in self.held} if at is not None}
        self.views = [(at, _geometry(t)) for t in own if (at := place(t)) is not None]

    def changed(self):
        """The storages that have changed or are gone."""
        now = {place(t) for t in self.held}
        return [at for at, before in self.bytes.items() if at not in now or ctypes.string_at(*at) != before]

    def written_outside(self):
        """How many bytes have changed that belong to none of the tensors `own`."""
        return sum(self._outside(at) for at in self.changed())

    def _outside(self, at):
        now = np.frombuffer(ctypes.string_at(*at), dtype=np.uint8)
        differs = now != np.frombuffer(self.bytes[at], dtype=np.uint8)
        for where, (first, shape, strides, size) in self.views:
            if where == at:
                _elements(differs, first, shape, strides, size)[...] = False
        return int(differs.sum())


def _geometry(tensor):
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.element_size()


def _elements(flags, first, shape, strides, size):
    """The flags of the bytes of a tensor's elements, of those that lie in its storage."""
    begin, extent = first * size, 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 in shape or begin + extent * size > len(flags):
        return flags[:0]
    shape, strides = zip(
        *[(n, s * size) for n, s in zip(shape, strides, strict=True) if n > 1] or [(1, 0)], strict=True
    )
    return np.lib.stride_tricks.as_strided(flags[begin:], (*shape, size), (*strides, 1))


def number(tensor):
    """The value of a step count, read as bytes; None if it is no float on the CPU, or its memory is gone."""
    at = place(tensor)
    if at is None or tensor.dtype not in (torch.float32, torch.float64) or tensor.numel() != 1:
        return None
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    if first + size > at[1]:
        return None
    return struct.unpack("f" if size == 4 else "d", ctypes.string_at(at[0] + first, size))[0]


def shape_of(value, depth=3):
    """What identifies nested containers: their kinds, keys, and the identities of what is in them.

    An empty dict in a dict is none: reading the state of a parameter that has none yet leaves one.
    """
    if isinstance(value, dict) and depth:
        entries = [(k, v) for k, v in value.items() if not (isinstance(v, dict) and not v)]
        return dict, tuple((id(k) if isinstance(k, torch.Tensor) else k, shape_of(v, depth - 1)) for k, v in entries)
    if isinstance(value, (list, tuple)) and depth:
        return type(value), tuple(shape_of(v, depth - 1) for v in value)
    return value if isinstance(value, (str, int, float, type(None))) and value == value else id(value)


class Oracle:
    """Counts calls and refusals, and tells `report` of problems: (kind, what)."""

    def __init__(self, report):
        self.report = report
        self.counts = collections.Counter()

    def problem(self, kind, what):
        self.counts[kind] += 1
        self.report(kind, what)

    def call(self, name, function, *, watch=(), own=(), keeps=(), sentences=True, may_write=False):
        """Calls `function`; returns (whether it returned, what).

        Args:
            watch: tensors whose storages may not change.
            own: tensors that may be written if the call returns.
            keeps: containers that must be as before if the call raises.
            sentences: whether the call must raise a sentence, as the public API must.
            may_write: whether a call that raises may have written, as its documentation says.
        """
        self.counts["calls"] += 1
        before, kept = Memory(watch, own), [shape_of(value) for value in keeps]
        held = [list(value.values()) if isinstance(value, dict) else list(value) for value in keeps]
        try:
            result = function()
        except Mine:
            self.counts["refusals"] += 1
            return False, None
        except Exception as error:
            self.counts["refusals"] += 1
            self._check_error(name, error, sentences)
            if not may_write and before.changed():
                self.problem("raised but wrote", f"{name}: {_where(error)}")
            elif not may_write and kept != [shape_of(value) for value in keeps]:
                self.problem("raised but wrote", f"{name}, a container: {_where(error)}")
            del error, held
            return False, None
        if before.written_outside():
            self.problem("writes outside", name)
        return True, result

    def _check_error(self, name, error, sentences):
        if name in TORCHS and not _frames(error)[-1][0].startswith((PACKAGE, DRIVER)):
            return
        if isinstance(error, SystemError) or (sentences and not isinstance(error, SENTENCES)):
            self.problem("bare errors", f"{name}: {_where(error)}")
        elif sentences and not _is_raised_by_us(error):
            self.problem("foreign sentences", f"{name}: {_where(error)}")


def _frames(error):
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return frames


def _where(error):
    """The error, and the line of the package that it came through last."""
    ours = [f"{os.path.relpath(file, PACKAGE)}:{line}" for file, line in _frames(error) if file.startswith(PACKAGE)]
    text = " ".join(str(error).split())[:150]
    return f"{type(error).__name__} at {ours[-1] if ours else '-'}: {text}"


def _is_raised_by_us(error):
    """Whether the error comes from a `raise`, in this package or in torch's Python, rather than from an accident."""
    file, line = _frames(error)[-1]
    return (
        file.startswith(DRIVER) or "raise" in linecache.getline(file, line) or "refuse" in linecache.getline(file, line)
    )


def finite(value):
    return value is not None and math.isfinite(value)

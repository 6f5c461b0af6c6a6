"""What the stand-in for the CUDA driver is called with, and what a test can ask of it."""

import contextlib
import ctypes
import os

import torch

IMAGE = b"device code of the stand-in"
STREAM = 5
PRIMARY, GREEN, OF_ANOTHER_DEVICE = range(3)  # its contexts


def bytes_of_memory(count):
    return torch.full((count,), 255, dtype=torch.uint8)


def library():
    """The stand-in that this process has loaded, or will load, as its driver."""
    found = ctypes.CDLL("libcuda.so.1")
    found.standin_context.restype = found.standin_launched_in.restype = ctypes.c_void_p
    found.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    return found


def launched_in():
    """The number of the context in which a kernel was launched last."""
    return [library().standin_context(number) for number in range(3)].index(library().standin_launched_in())


@contextlib.contextmanager
def current(context):
    """Makes a context current; checks that it is current again in the end, however often another one was meanwhile."""
    ended = ctypes.c_void_p()
    library().cuCtxPushCurrent_v2(library().standin_context(context))
    yield
    library().cuCtxPopCurrent_v2(ctypes.byref(ended))
    assert ended.value == library().standin_context(context)


@contextlib.contextmanager
def failing(function, first, last, code):
    """Makes the calls of a function of the driver from the first to the last one, counted from 1, fail with a code."""
    os.environ["STANDIN_FAILS"] = f"{function} {first} {last} {code}"
    yield
    del os.environ["STANDIN_FAILS"]

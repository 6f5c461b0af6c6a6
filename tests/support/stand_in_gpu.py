"""GPUs that are the CPU: everything of `native.gpu` answered for them, and kernels launched on the stand-in driver.

The environment variable STAND_IN says, separated by commas, how the process that proves the kernels of GPU 0, 1, ...
fares: "tiny" runs the smallest cases, "all" runs all, and the others are what can go wrong. STAND_IN_LOG names a file
to which every such process adds a line.
"""

import contextlib
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import torch
from stand_in import IMAGE, STREAM, bytes_of_memory

from childtune_fast.native import device_code, gpu, load
from childtune_fast.ops import proof, step, trust

HERE = torch.device("cpu")


class OnGpu(torch.nn.Parameter):
    """A parameter that says it is on GPU 0."""

    is_cpu, is_cuda = False, True
    device = torch.device("cuda", 0)


def properties(device):
    other = fate(device) == "other GPU" and os.environ.get(proof.GUARD)
    return SimpleNamespace(name="stand-in", major=9, minor=0, uuid="GPU-other" if other else f"GPU-{device}")


def place(device):
    if fate(device) == "busy" and os.environ.get(proof.GUARD):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
    return HERE


def install():
    """Makes this process see the GPUs; in one that proves kernels, lets happen what STAND_IN says."""
    native = load.load_native()
    real = native.GpuKernels

    native.GpuKernels = lambda device, image: real(-1, image)
    gpu.properties, gpu.place, gpu.stream_of = properties, place, lambda device: STREAM
    gpu.memory, gpu.synchronize = lambda device, size: bytes_of_memory(size), lambda device: None
    gpu.side_stream, gpu.capture = lambda device: contextlib.nullcontext(), lambda device, work: work
    device_code.images = lambda capability: [("stand-in", lambda: IMAGE)]
    torch.version.cuda = "13.0"
    torch.cuda.device = lambda device: contextlib.nullcontext()
    gpu.is_capturing = lambda device: False
    step.check_group = lambda group: None  # it would find that state is on the CPU
    if os.environ.get(proof.GUARD):
        every = proof.cases
        proof.cases = lambda: cases(every)
        if log := os.environ.get("STAND_IN_LOG"):
            with open(log, "a") as file:
                file.write(f"proof RANK={os.environ.get('RANK')}\n")


def forget():
    """Makes this process one that has met no GPU yet."""
    for known in (trust._settled, trust._proofs, trust._failures, gpu._found):
        known.clear()
    load.warn_once.cache_clear()


def fate(device):
    fates = os.environ.get("STAND_IN", "tiny").split(",")
    return fates[min(device, len(fates) - 1)]


class Doomed:
    """A case in which what the name says happens."""

    def __init__(self, name):
        self.name = name

    def check(self, device):
        if self.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.name == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.name == "segmentation fault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.name == "hangs":
            time.sleep(1000)
        if self.name == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
        if self.name == "fault":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return "1 of 3 values differ, first at 2: 1.0, not 2.0" if self.name == "differs" else ""


def cases(every):
    """The cases of the GPU whose proof this process holds."""
    with open(sys.argv[1]) as job:
        of_gpu = fate(json.load(job)["device"])
    yield from every() if of_gpu == "all" else proof.trial_cases()
    if of_gpu not in ("all", "tiny"):
        yield Doomed(of_gpu)

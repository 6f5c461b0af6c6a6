"""Calls that do what the library must never do, by which the tests know that the fuzzer would see it."""

import ctypes

import torch
from odd_tensors import Buffers


def planted_case(rng, oracle):
    """One of the faults, or none."""
    buffers = Buffers(rng)
    param = buffers.parameter(torch.float32, (5,))
    watched = {"watch": [param], "own": [param]}

    def crash():
        ctypes.string_at(8)

    def bare():
        return {}["x"]

    def wrote():
        param.detach().fill_(1)
        raise ValueError("wrote before")

    def outside():
        param.untyped_storage()[0] = 7

    def dropped(container):
        container.clear()
        raise ValueError("dropped before")

    kept = {"x": param}
    rng.choice(
        (
            lambda: oracle.call("a crash", crash, **watched),
            lambda: oracle.call("a bare error", bare, **watched),
            lambda: oracle.call("a late error", wrote, **watched),
            lambda: oracle.call("a write beside", outside, **watched),
            lambda: oracle.call("a loss", lambda: dropped(kept), keeps=[kept], **watched),
            lambda: oracle.call("a write", lambda: param.detach().fill_(1), **watched),
        )
    )()

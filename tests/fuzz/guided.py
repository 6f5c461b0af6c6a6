"""Calls of the compiled module, chosen by libFuzzer so that they reach ever more of its code; `make fuzz-guided`.

libFuzzer comes with atheris. It grows bytes, which replace the random numbers in native_cases.py. A finding is
written to a file, and `python guided.py FILE` calls the same again.
"""

import random
import sys
import warnings

import atheris
import oracle
import torch
from native_cases import native_case

from childtune_fast.native import load


class FromBytes(random.Random):
    """Random numbers that bytes determine: zeros where they are used up."""

    def __new__(cls, data):
        return super().__new__(cls)

    def __init__(self, data):
        self.data, self.at = data, 0

    def seed(self, *_):
        """Has no state beside the bytes."""

    def getrandbits(self, k):
        size = -(-k // 8)
        taken, self.at = self.data[self.at : self.at + size], self.at + size
        return int.from_bytes(taken.ljust(size, b"\0"), "little") & ((1 << k) - 1)

    def _randbelow(self, n):  # random.Random's draws again until a number is small enough, forever among zeros
        return self.getrandbits(16 if n <= 1 << 16 else 64) % n

    def random(self):
        return self.getrandbits(16) / (1 << 16)


def refuse(kind, what):
    if kind != "foreign sentences":
        raise AssertionError(f"{kind}: {what}")


def one(data):
    native_case(FromBytes(data), oracle.Oracle(refuse))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    load.load_native()
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()

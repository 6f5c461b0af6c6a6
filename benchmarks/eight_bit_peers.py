"""AdamW with 8-bit state by others, contestants where they are installed: bitsandbytes' and torchao's."""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator

import torch

PEERS = {"bitsandbytes": "bitsandbytes.optim", "torchao": "torchao.optim"}  # the modules that have an AdamW8bit


@functools.cache
def load_peer(name: str) -> type | None:
    """Returns the class of optimizer; None if it is not installed, or if it takes no step on this CPU.

    Args:
        name: a key of PEERS.
    """
    with quietly():
        try:
            optimizer = importlib.import_module(PEERS[name]).AdamW8bit
            param = torch.nn.Parameter(torch.zeros(4096))
            param.grad = torch.ones(4096)
            optimizer([param]).step()
        except ImportError:
            return None
        except Exception as error:  # of whatever kind: a compiler or a kernel that is missing
            print(f"{name} is installed, but does not take part: {error}")
            return None
    return optimizer


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps these packages' warnings to themselves; the tests' configuration makes warnings errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""AdamW with 8-bit state by others, contestants where they are installed: bitsandbytes' and torchao's."""

import importlib
import warnings

import torch
from torch.nn import Parameter

PEERS = {"bitsandbytes": "bitsandbytes.optim", "torchao": "torchao.optim"}  # the modules that have an AdamW8bit


def make_peer(name: str, params: list[Parameter], **hyper: float) -> torch.optim.Optimizer | None:
    """Returns an optimizer after its first step; None if it is not installed, or if it does not step on this CPU.

    The first step makes its state. torchao's also compiles, which takes a minute for each dtype and shape.

    Args:
        name: a key of PEERS.
        params: the parameters, with gradients.
        hyper: hyper-parameters, by their names in torch.optim.AdamW.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of these packages; the tests' configuration makes warnings errors
        try:
            optimizer = importlib.import_module(PEERS[name]).AdamW8bit(params, **hyper)
            optimizer.step()
        except ImportError:
            return None
        except Exception as error:  # of whatever kind: a compiler or a kernel that is missing
            print(f"{name} is installed, but does not take part: {error}")
            return None
    return optimizer

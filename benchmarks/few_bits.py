"""How true optimizers with state in few bits stay to float32: `python -m benchmarks.few_bits`.

Prints two Markdown tables: of ChildAdamW's kinds of state, of torch's AdamW on bfloat16 weights, and of bitsandbytes
and torchao where they are installed. Each is beside torch.optim.AdamW in float32 with the same gradients.
"""

import functools

import torch
from torch.nn import Parameter

from childtune_fast import ChildAdamW

from .markdown import markdown

WEIGHTS = 1 << 14  # more than any of them leaves in float32
BLOCK = 128
LR = 1e-3


def ours(state):
    """Returns from a parameter to ChildAdamW that trains all weights, with this kind of state."""
    return lambda param: ChildAdamW([param], lr=LR, weight_decay=0.0, reserve_p=1.0, seed=0, state=state)


def reference(param):
    """Returns torch's AdamW."""
    return torch.optim.AdamW([param], lr=LR, weight_decay=0.0)


def peers():
    """Returns {name: from a parameter to an optimizer} of the 8-bit optimizers that are installed."""
    found = {}
    try:
        import bitsandbytes

        name = f"bitsandbytes {bitsandbytes.__version__}, AdamW8bit"
        found[name] = lambda param: bitsandbytes.optim.AdamW8bit([param], lr=LR, weight_decay=0.0)
    except ImportError:
        pass
    try:
        import torchao
        from torchao.optim import AdamW8bit

        found[f"torchao {torchao.__version__}, AdamW8bit"] = lambda param: AdamW8bit([param], lr=LR, weight_decay=0.0)
    except ImportError:
        pass
    return found


def way(make, gradients, dtype=torch.float32):
    """Returns how far weights that begin at 0 are after a step by each of the gradients, and the optimizer.

    Args:
        make: from a parameter to its optimizer.
        gradients: an iterable of float32 tensors of WEIGHTS elements.
        dtype: of the parameter (default: torch.float32).
    """
    param = Parameter(torch.zeros(WEIGHTS, dtype=dtype))
    optimizer = make(param)
    for gradient in gradients:
        param.grad = gradient.to(dtype)
        optimizer.step()
    return param.detach().float(), optimizer


def constant(steps):
    """Returns a gradient of 1e-3, so many times."""
    return (torch.full((WEIGHTS,), 1e-3) for _ in range(steps))


def small(steps):
    """Returns gradients that are 3e-4 of their block's largest, the first one: noise about a mean of their size."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.full((WEIGHTS,), 3e-7)
    scale[::BLOCK] = 1e-3
    return ((1 + torch.randn(WEIGHTS, generator=generator)) * scale for _ in range(steps))


def dense_second_moment(optimizer):
    """Returns the mean of an optimizer's average of squared gradients, decoded."""
    whole = optimizer.dense_state_dict() if isinstance(optimizer, ChildAdamW) else optimizer.state_dict()
    return whole["state"][0]["exp_avg_sq"].double().mean().item()


def main():
    """Prints the tables."""
    torch.set_num_threads(1)
    kinds = {f'ChildAdamW, state="{state}"': ours(state) for state in ("float32", "bfloat16", "8bit")}
    rows = []
    for name, make in kinds.items():
        rows.append([name, f"{dense_second_moment(way(make, constant(10_000))[1]) / 1e-6:.3f}"])
    for kind in ("fused", "foreach"):
        made = functools.partial(torch.optim.AdamW, **{kind: True})
        optimizer = way(lambda param, made=made: made([param]), constant(10_000), torch.bfloat16)[1]
        rows.append([f"torch AdamW, {kind}, on bfloat16 weights", f"{dense_second_moment(optimizer) / 1e-6:.3f}"])
    print(markdown(["gradient 1e-3, 10,000 steps", "exp_avg_sq of its limit"], rows) + "\n")

    true = way(reference, small(1000))[0]
    compared = torch.arange(WEIGHTS) % BLOCK != 0
    rows = []
    for name, make in {**kinds, **peers()}.items():
        got = way(make, small(1000))[0]
        share = (got[compared] / true[compared]).double()
        rows.append([name, f"{share.mean():.3f}", f"{share.std():.3f}"])
    print(
        markdown(
            ["gradients of 3e-4 of their block's largest, 1000 steps", "way, of float32's", "standard deviation"], rows
        )
    )


if __name__ == "__main__":
    main()

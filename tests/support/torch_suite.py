"""What torch ships for the tests of its AdamW: the inputs, the errors, and which of its tests a ChildAdamW has none of.

The tests themselves are not in the wheel. Those of test_torch_suite*.py bear their names and demand the same.
"""

import copy
import warnings

import pytest
import torch
from helpers import make_params

from childtune_fast import ChildAdamW, ChildNetwork

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ImportWarning)  # that hypothesis is not there
    from torch.testing._internal import common_optimizers as suite

INFO = next(info for info in suite.optim_db if info.optim_cls is torch.optim.AdamW)
GPUS = tuple(suite.CUDA_CONFIG_GPUS)
DEVICES = ("cpu", *GPUS, "mps")  # torch lists other inputs for each

# Inputs that are not run without a GPU: when, and what they are refused with; then why.
REFUSED = {
    "differentiable": (
        lambda options: options.get("differentiable"),
        r"^ChildAdamW cannot be differentiated through; use torch\.optim\.AdamW\(differentiable=True\)$",
        "the step is one pass that no graph records; AdamW has it",
    ),
    "capturable": (
        lambda options: options.get("capturable"),
        r"^ChildAdamW: capturable=True needs parameters that the compiled kernels step on a GPU",
        "needs a GPU: tests marked cuda run it there, and here the same input is run with capturable=False",
    ),
}

# Errors that are other ones than torch's: what is raised instead, and why.
OTHER_ERRORS = {
    "a param group cannot have duplicate parameters": (
        ValueError,
        "every parameter must be in the groups once",
        "torch warns, and would step the parameter twice; a ChildAdamW warns too, then refuses it",
    ),
    "`fused` does not support `differentiable`": (
        ValueError,
        "cannot be differentiated through",
        "differentiable is refused with and without fused",
    ),
}

# Tests of torch's that have no counterpart in test_torch_suite*.py, and why.
NO_COUNTERPART = {
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "of torch's list, not of an optimizer",
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs",
    "test_rosenbrock_sparse": "only for optimizers that take sparse gradients; AdamW does not",
    "test_fused_error_on_params_on_meta": "`fused` chooses nothing; they are stepped as by AdamW's loop",
    "test_foreach_large_tensor": "needs a GPU of 72 GB",
    "test_fused_large_tensor": "needs 64 GB",
    "test_peak_memory_foreach": "needs a GPU; tests/ops/test_foreach.py counts the memory of the fallback",
    "test_cpu_load_state_dict": "needs a GPU; tests/gpu loads checkpoints of one device on the other",
    "test_state_dict_with_cuda_params": "needs a GPU; tests/gpu loads checkpoints of one device on the other",
    "test_fused_cpu_matches_cuda": "needs a GPU; tests/gpu demands the same bits of both",
    "test_defaults_changed_to_foreach": "of torch's choice between its own implementations; `backend` chooses here",
    "test_second_order_optims_return_consistent_types": "of LBFGS",
    "test_step_iteration": "of LBFGS",
}


def _distinct(options):
    return tuple(sorted((key, repr(value)) for key, value in options.items() if value is not False))


def _named(found):
    named = dict(found.values())
    assert len(named) == len(found), "two inputs have one description"
    return named


def _inputs():
    """{description: options} of all devices, each input once: with foreach, fused, differentiable, and with none."""
    found = {}
    for device in DEVICES:
        for given in suite._get_optim_inputs_including_global_cliquey_kwargs(device, None, INFO):
            found.setdefault(_distinct(given.kwargs), (given.desc, given.kwargs))
    return _named(found)


def refusal(options):
    """The name of the row of REFUSED for these options; None if there is none."""
    return next((name for name, (applies, *_) in REFUSED.items() if applies(options)), None)


def _run():
    """{description: options} of the inputs that are run, those with capturable=True without it.

    AdamW takes foreach with a tensor as lr only together with it.
    """
    run = {}
    for name, options in INPUTS.items():
        if options.get("capturable"):
            name, options = f"{name}, not captured", {**options, "capturable": False, "foreach": False}
        if not refusal(options):
            run.setdefault(_distinct(options), (name, options))
    return _named(run)


INPUTS = _inputs()
RUN = _run()


def options_of(name):
    """A copy of an input's options, whose tensors a scheduler may write to."""
    return copy.deepcopy(RUN[name])


every_input = pytest.mark.parametrize("name", RUN)
every_loop = pytest.mark.parametrize(  # where torch has the flag decided by the test, or by none
    "name", [name for name, options in RUN.items() if not options.get("foreach") and not options.get("fused")]
)
every_kind = pytest.mark.parametrize("kind", ["plain", "F", "D"])


def make(kind, model, backend, params=None, **options):
    """A ChildAdamW as plain AdamW, with random masks, or with a child network of half of each parameter's weights."""
    if kind == "plain":
        options["reserve_p"] = 1
    if kind == "D":
        generator = torch.Generator().manual_seed(0)
        masks = {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()}
        options["child"] = ChildNetwork.from_masks(model, masks)
    return ChildAdamW(model.parameters() if params is None else params, seed=7, backend=backend, **options)


class Regression(torch.nn.Module):
    """A weight and a bias, whose best values are easily found: the loss is their output's square."""

    def __init__(self, contiguous=True):
        super().__init__()
        weight, bias, x = make_params(((10, 5), (10,), (5,)))
        if not contiguous:
            weight, bias = (torch.stack([p.detach()] * 2, -1)[..., 0] for p in (weight, bias))
        self.weight, self.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
        self.register_buffer("x", x.detach())

    def forward(self):
        return (self.weight.mv(self.x) + self.bias).square().sum()

    def train_with(self, optimizer, steps, schedulers=()):
        """Takes steps; returns whether the loss has become smaller."""
        before = self().item()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self()
            loss.backward()
            optimizer.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([loss.detach()] if plateau else []))
        return self().item() < before


def assert_close(ours, theirs, steps):
    """Asserts that two lists of tensors are equal up to the rounding of some steps.

    One ulp of the largest element per step is what our error may have beyond torch's, which has about one itself. With
    16 bits torch rounds its state too.
    """
    for a, b in zip(ours, theirs, strict=True):
        kind = torch.finfo(b.dtype)
        atol = 2 * steps * kind.eps * max(b.abs().max().item(), kind.smallest_normal)
        torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=atol)

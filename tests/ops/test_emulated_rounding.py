"""Steps that round, by the stand-in for a GPU, as test_emulated_step.py has the others: they have the CPU's bits."""

import itertools

import pytest
import torch
from child_models import Model, child_adamw, params_of
from helpers import assert_same_run, make_params, set_grads
from processes import in_a_process_with
from stand_in import IMAGE, STREAM, bytes_of_memory
from test_emulated_step import assert_written, counted_on_gpu, groups_of

from childtune_fast import ChildAdamW
from childtune_fast.native import load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(70, 70), (129,), (), (0,), (4097,), *[(4096,)] * 40]  # more of 4096 elements than one small table holds
LOW = [
    {"state": "8bit"},
    {"state": "8bit", "rounding": "stochastic", "amsgrad": True},
    {"state": "bfloat16", "rounding": "stochastic"},
    {"state": "float32", "rounding": "stochastic"},
]


def step_as_a_gpu(kernels, optimizer, counted):
    groups = groups_of(optimizer)
    if counted:
        kernels.counted_step(counted_on_gpu(groups), STREAM, bytes_of_memory, None, None)
    else:
        kernels.step(groups, STREAM)
    return groups


def check_steps():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    for dtype, low, counted in itertools.product(DTYPES, LOW, (False, True)):
        runs = []
        for _ in range(2):
            params = make_params(SHAPES, dtype)
            groups = [{"params": params[::2]}, {"params": params[1::2], "reserve_p": 1.0, "lr": 0.1}]
            runs.append(ChildAdamW(groups, lr=1e-2, seed=7, backend="native", **low))
        for step in range(3):
            for run in runs:
                set_grads([p for group in run.param_groups for p in group["params"]], step)
            groups = step_as_a_gpu(kernels, runs[0], counted)
            stored = {exp_avg.dtype for group in groups for exp_avg in group.exp_avgs}
            assert {"8bit": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}[low["state"]] in stored
            runs[1].step()
        assert_same_run(*runs)
        assert_written(runs[0], times=3)


def check_child_steps():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    shapes = ((70, 70), (129,), (), (0,), (5, 1030), (4097,))
    for dtype, low, decay in itertools.product(DTYPES, LOW, ("child", "all")):
        runs = [child_adamw(Model(dtype, shapes), backend="native", decay=decay, **low) for _ in range(2)]
        for step in range(3):
            for run in runs:
                set_grads(params_of(run), step)
            assert any(group.child_bits for group in step_as_a_gpu(kernels, runs[0], decay == "all"))
            runs[1].step()
        assert_same_run(*runs)


def check_addresses():
    """Codes and scales at addresses at which no vector begins have the same bits."""
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    runs = [ChildAdamW(make_params([(4097,)]), seed=7, backend="native", state="8bit") for _ in range(2)]
    for step in range(2):
        for run in runs:
            set_grads(params_of(run), step)
        groups = groups_of(runs[0])
        places = [*groups[0].exp_avgs, *groups[0].exp_avg_sqs, *groups[0].exp_avg_scales, *groups[0].exp_avg_sq_scales]
        for tensor in places:
            tensor.data = torch.cat([tensor.new_zeros(1), tensor])[1:]
        kernels.step(groups, STREAM)
        runs[1].step()
    assert_same_run(*runs)


def check_refusals():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    run = ChildAdamW(make_params([(4100,)]), seed=7, backend="native", state="8bit")
    before = [p.clone() for p in params_of(run)]
    broken = {
        "scales must hold a uint8": lambda group: group.exp_avg_scales.__setitem__(0, group.exp_avg_scales[0][:-1]),
        "codes must be contiguous": lambda group: group.exp_avgs.__setitem__(0, group.exp_avgs[0].repeat(2)[::2]),
        "all of the state one dtype": lambda group: group.exp_avg_sqs.__setitem__(0, group.exp_avg_sqs[0].bfloat16()),
        "begins at a multiple of 128": lambda group: setattr(group, "slices", [(64, 4100, 0)]),
    }
    for message, damage in broken.items():
        set_grads(params_of(run), 0)
        groups = groups_of(run)
        damage(groups[0])
        with pytest.raises(ValueError, match=message):
            kernels.step(groups, STREAM)
        assert all(map(torch.equal, before, params_of(run)))


@pytest.mark.parametrize("check", [check_steps, check_child_steps, check_addresses, check_refusals])
def test_steps_that_round_have_the_same_bits_or_are_refused(check, driver):
    in_a_process_with(driver, check)

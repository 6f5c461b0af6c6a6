"""On a GPU: a step with state in fewer bits, or one that rounds stochastically, has the bits that it has on the CPU."""

import copy

import pytest
import torch
from gpu_runs import DEVICE, assert_replays_as_steps, assert_same_bits, train
from helpers import both_backends
from low_bit import every_mode, model_of, optimizer_of

pytestmark = pytest.mark.cuda
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
OPTIONS = {
    "8bit": {"state": "8bit", "max_grad_norm": 1e-2},
    "8bit, amsgrad": {"state": "8bit", "amsgrad": True, "rounding": "stochastic"},
    "bfloat16": {"state": "bfloat16", "rounding": "stochastic", "variant": "hf"},
    "bfloat16, amsgrad": {"state": "bfloat16", "amsgrad": True, "weight_decay": 0.5},
    "stochastic": {"rounding": "stochastic"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def run_on(device, mode, dtype=torch.float32, **options):
    """A model and its optimizer. The child network is the same on every device: its masks are drawn on the CPU."""
    model = model_of(dtype).to(device)
    model.masks = {name: mask.to(device) for name, mask in model.masks.items()}
    return model, optimizer_of(mode, model, **options)


@both_backends
@every_mode
@every_option
@every_dtype
def test_a_step_has_the_same_bits(dtype, options, mode, backend):
    runs = [run_on(DEVICE, mode, dtype, backend=backend, **options), run_on("cpu", mode, dtype, **options)]
    for run in runs:
        train(*run, range(20))
    assert_same_bits(*runs)


@every_mode
@every_option
def test_a_captured_step_replays_as_steps(options, mode):
    captured = run_on(DEVICE, mode, torch.bfloat16, capturable=True, backend="native", **options)
    assert_replays_as_steps(captured, run_on("cpu", mode, torch.bfloat16, **options))


@both_backends
@every_mode
@every_option
def test_a_checkpoint_continues_on_the_other_device(options, mode, backend):
    for first, then in ((DEVICE, "cpu"), ("cpu", DEVICE)):
        saved, resumed = (run_on(device, mode, backend=backend, **options) for device in (first, then))
        train(*saved, range(3))
        resumed[0].load_state_dict(saved[0].state_dict())
        resumed[1].load_state_dict(copy.deepcopy(saved[1].state_dict()))
        for run in (saved, resumed):
            train(*run, range(3, 6))
        assert_same_bits(saved, resumed)

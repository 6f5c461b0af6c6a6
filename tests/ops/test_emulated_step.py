"""The step on a GPU without one: the compiled module drives a stand-in for the CUDA driver, which runs the kernels in
loops on the CPU.
"""

import contextlib
import itertools
import os

import pytest
import torch
from child_models import OPTIONS as CHILD_OPTIONS
from child_models import Model, child_adamw, params_of
from helpers import assert_same_run, make_params, set_grads
from processes import in_a_process_with
from stand_in import GREEN, IMAGE, OF_ANOTHER_DEVICE, PRIMARY, STREAM, bytes_of_memory, current, failing, launched_in

from childtune_fast import ChildAdamW
from childtune_fast.native import CudaError, load
from childtune_fast.ops.step import StepKernels
from childtune_fast.optimizer.collect import collect

SHAPES = [(40, 70), (129,), (), (0,), (4097,), *[(33,)] * 300]  # more than one small table holds


def step_as_a_gpu(kernels, optimizer):
    """`optimizer.step()`, all of it by the kernels of a GPU."""
    kernels.step(groups_of(optimizer), STREAM)


def assert_written(optimizer, times):
    """Asserts that autograd knows how often a parameter and its averages were written to."""
    param, state = next((param, state) for param, state in optimizer.state.items() if param.numel() > 0)
    assert {t._version for t in (param, *state.values()) if t is not state["step"]} == {times}


def groups_of(optimizer):
    """What a step of the optimizer is of, all of it for kernels."""
    groups = collect(optimizer.param_groups, optimizer.state, optimizer._masks(), StepKernels.find("native"), {})
    assert list(groups) == ["cpu"]
    return groups["cpu"]


def check_steps():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    options = [{}, {"reserve_p": 1.0}, {"amsgrad": True, "variant": "torch"}, {"variant": "hf", "weight_decay": 0.5}]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for option in options:
            runs = []
            for _ in range(2):
                params = make_params(SHAPES, dtype)
                groups = [{"params": params[::2]}, {"params": params[1::2], "reserve_p": 0.5, "lr": 0.1}]
                runs.append(ChildAdamW(groups, lr=1e-2, seed=7, backend="native", **option))
            for step in range(3):
                for run in runs:
                    set_grads([p for group in run.param_groups for p in group["params"]], step)
                step_as_a_gpu(kernels, runs[0])
                runs[1].step()
            assert_same_run(*runs)
            assert_written(runs[0], times=3)


SCALE, FOUND_INF, LR = torch.tensor(3.0), torch.tensor(0.0), torch.tensor(0.1)
COUNTED = {  # options, a GradScaler's scale and what it found, the learning rate
    "counting": ({}, None, None, None),
    "amsgrad": ({"amsgrad": True, "maximize": True}, None, None, None),
    "hf, lr": ({"variant": "hf"}, None, None, LR),
    "float64 lr": ({}, None, None, LR.double()),
    "scaler": ({}, SCALE, FOUND_INF, None),
    "clipping": ({"max_grad_norm": 1e-2}, None, None, None),
    "everything": ({"max_grad_norm": 1e-2, "reserve_p": 1.0}, SCALE, FOUND_INF, LR),
}


def counted_on_gpu(groups):
    """The groups, with their step counts as a GPU that counts them has them."""
    for count in itertools.chain.from_iterable(group.steps for group in groups):
        count.data = count.double()
    return groups


def check_counted_steps():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for options, grad_scale, found_inf, lr in COUNTED.values():
            runs = []
            for _ in range(2):
                params = make_params(SHAPES, dtype)
                runs.append(ChildAdamW(params, seed=7, backend="native", **{"lr": 1e-2, **options}))
            for _ in range(3):
                for run in runs:
                    set_grads(run.param_groups[0]["params"], 1)
                on_native = counted_on_gpu(groups_of(runs[0]))
                on_native[0].lr_on_device = lr
                kernels.counted_step(on_native, STREAM, bytes_of_memory, grad_scale, found_inf)
                if lr is not None:
                    runs[1].param_groups[0]["lr"] = lr.item()
                if grad_scale is not None:
                    runs[1].grad_scale, runs[1].found_inf = grad_scale, found_inf
                runs[1].step()
            assert_same_run(*runs)
            assert_written(runs[0], times=3)


def check_child_steps():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for options in CHILD_OPTIONS.values():
            for counted in {"max_grad_norm" in options, True}:
                runs = [child_adamw(Model(dtype), backend="native", **options) for _ in range(2)]
                for step in range(3):
                    for run in runs:
                        set_grads(params_of(run), step)
                    groups = groups_of(runs[0])
                    assert any(group.child_bits for group in groups)
                    if counted:
                        kernels.counted_step(counted_on_gpu(groups), STREAM, bytes_of_memory, None, None)
                    else:
                        kernels.step(groups, STREAM)
                    runs[1].step()
                assert_same_run(*runs)


def check_refusals_of_child_steps():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    run = child_adamw(Model(shapes=((3000,), (3,))), backend="native")
    before = [p.clone() for p in params_of(run)]

    def misaligned(group):
        group.child_bits[0] = torch.cat([torch.zeros(1, dtype=torch.uint8), group.child_bits[0]])[1:]

    broken = {
        "child_bits must hold 128 bytes": lambda group: group.child_bits.__setitem__(0, group.child_bits[0][:-1]),
        "child_bits aligned to 16 bytes": misaligned,
        "child_offsets must hold": lambda group: group.child_offsets.__setitem__(0, group.child_offsets[0][:-1]),
        "child_offsets must count": lambda group: group.child_counts.__setitem__(0, 3001),
        "state of a child network must": lambda group: group.exp_avgs.__setitem__(0, group.exp_avgs[0][:-1]),
    }
    for message, damage in broken.items():
        set_grads(params_of(run), 0)
        groups = groups_of(run)
        damage(next(group for group in groups if group.child_bits))
        with pytest.raises(ValueError, match=message):
            kernels.step(groups, STREAM)
        assert all(map(torch.equal, before, params_of(run)))


def check_a_step_that_is_not_taken():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    runs = [ChildAdamW(make_params(), seed=7, backend="native") for _ in range(2)]
    for run in runs:
        set_grads(run.param_groups[0]["params"], 0)
        run.step()
    on_native = counted_on_gpu(groups_of(runs[0]))
    for found_inf in (1.0, float("inf"), float("nan")):
        kernels.counted_step(on_native, STREAM, bytes_of_memory, None, torch.tensor(found_inf))
    assert_same_run(*runs)


def check_refusals_of_counted_steps():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    run = ChildAdamW([torch.nn.Parameter(torch.ones(4, 6))], backend="native")
    param = run.param_groups[0]["params"][0]
    good = {"memory_of": bytes_of_memory, "grad_scale": None, "found_inf": None}
    broken = [
        ({"memory_of": lambda count: bytes_of_memory(count - 1)}, "memory_of must return uint8 memory"),
        ({"memory_of": lambda count: bytes_of_memory(count).float()}, "memory_of must return uint8 memory"),
        ({"memory_of": lambda count: bytes_of_memory(count + 1)[1:]}, "memory_of must return uint8 memory"),
        ({"memory_of": lambda count: bytes_of_memory(2 * count)[::2]}, "memory_of must return uint8 memory"),
        ({"grad_scale": torch.ones(2)}, "grad_scale must be one number"),
        ({"grad_scale": torch.tensor(1.0, dtype=torch.float64)}, "grad_scale must be one number"),
        ({"found_inf": torch.tensor(1)}, "found_inf must be one number"),
        ({"lr": torch.tensor(1.0, dtype=torch.bfloat16)}, "lr must be one number"),
        ({"step": torch.tensor(0)}, "step must be one float64"),
        ({"step": torch.tensor(0.0)}, "step must be one float64"),
    ]
    for wrong, message in broken:
        param.grad = torch.ones(4, 6)
        on_native = counted_on_gpu(groups_of(run))
        on_native[0].lr_on_device = wrong.pop("lr", None)
        if "step" in wrong:
            on_native[0].steps[0] = wrong.pop("step")
        with pytest.raises(ValueError, match=message):
            kernels.counted_step(on_native, STREAM, **{**good, **wrong})
        assert torch.equal(param, torch.ones(4, 6))


def check_refusals():
    native = load.load_native()
    with pytest.raises(RuntimeError, match=r"^cuModuleLoadData failed: device kernel image is invalid \(.* 200\)"):
        native.GpuKernels(-1, b"of another architecture")
    with pytest.raises(RuntimeError, match=r"^cuDeviceGet failed: .* \(CUDA error 101\)$"):
        native.GpuKernels(3, IMAGE)
    kernels = native.GpuKernels(-1, IMAGE)
    assert native.cuda_driver_version() == 13000
    for broken in ("strided", "dtype", "stream"):
        param = torch.nn.Parameter(torch.ones(4, 6))
        param.grad = torch.ones(6, 4).T if broken == "strided" else torch.ones(4, 6)
        optimizer = ChildAdamW([param], backend="native")
        on_native = groups_of(optimizer)
        if broken == "dtype":
            on_native[0].exp_avgs[0] = torch.ones(4, 6, dtype=torch.float64)
        with pytest.raises(RuntimeError if broken == "stream" else ValueError):
            kernels.step(on_native, STREAM + (broken == "stream"))
        assert torch.equal(param, torch.ones(4, 6))
        assert optimizer.state[param]["step"] == 0


def stepped_as_a_gpu(kernels):
    """A parameter of ones after a step of AdamW by the kernels of a GPU."""
    param = torch.nn.Parameter(torch.ones(4, 6))
    param.grad = torch.ones(4, 6)
    step_as_a_gpu(kernels, ChildAdamW([param], lr=0.5, weight_decay=0.0, reserve_p=1.0, backend="native"))
    return param


def check_launches():
    check_contexts()
    check_a_launch_that_fails()
    check_a_driver_of_cuda_12_0()


def check_contexts():
    with current(GREEN):
        kernels = load.load_native().GpuKernels(-1, IMAGE)  # loads into the primary context all the same
    expected = torch.full((4, 6), 0.5)
    for context, where in ((None, PRIMARY), (PRIMARY, PRIMARY), (GREEN, GREEN), (OF_ANOTHER_DEVICE, PRIMARY)):
        with current(context) if context is not None else contextlib.nullcontext():
            torch.testing.assert_close(stepped_as_a_gpu(kernels).detach(), expected)
        assert launched_in() == where


def check_codes():
    native = load.load_native()
    with (
        failing("cuInit", 1, 1, 999),
        pytest.raises(CudaError, match=r"^cuInit failed: .* \(CUDA error 999\)$") as caught,
    ):
        native.GpuKernels(-1, IMAGE)
    assert caught.value.code == 999


def check_a_launch_that_fails():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    for first, counted in ((1, False), (2, False), (1, True), (2, True)):
        params = make_params([(9,)], torch.float32) + make_params([(9,)], torch.float64)
        set_grads(params, 0)
        optimizer = ChildAdamW(params, backend="native")
        groups = counted_on_gpu(groups_of(optimizer)) if counted else groups_of(optimizer)
        step, more = (kernels.counted_step, (bytes_of_memory, None, None)) if counted else (kernels.step, ())
        with failing("cuLaunchKernel", first, first, 700), pytest.raises(CudaError, match="illegal memory") as caught:
            step(groups, STREAM, *more)
        assert (caught.value.code, caught.value.begun) == (700, first == 2)


def check_a_driver_of_cuda_12_0():
    os.environ["STANDIN_VERSION"] = "12000"
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    runs = [ChildAdamW(make_params([(3,)] * 300), seed=7, backend="native") for _ in range(2)]
    for run in runs:
        set_grads(run.param_groups[0]["params"], 0)
    step_as_a_gpu(kernels, runs[0])
    runs[1].step()
    assert_same_run(*runs)


@pytest.mark.parametrize("check", [check_launches, check_codes])
def test_what_the_driver_is_asked_and_answers(check, driver):
    in_a_process_with(driver, check)


def test_the_modules_launches_have_the_bits_of_the_cpus_step(driver):
    in_a_process_with(driver, check_steps)


def test_steps_that_the_gpu_counts_have_the_same_bits(driver):
    in_a_process_with(driver, check_counted_steps)


def test_a_child_networks_steps_have_the_same_bits(driver):
    in_a_process_with(driver, check_child_steps)


def test_a_child_networks_tensors_must_fit(driver):
    in_a_process_with(driver, check_refusals_of_child_steps)


def test_a_gpu_does_not_take_a_step_with_infinite_gradients(driver):
    in_a_process_with(driver, check_a_step_that_is_not_taken)


def test_the_drivers_refusals_are_told(driver):
    in_a_process_with(driver, check_refusals)


def test_steps_that_the_gpu_counts_need_memory_and_numbers(driver):
    in_a_process_with(driver, check_refusals_of_counted_steps)

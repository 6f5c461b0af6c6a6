"""On a GPU: a step, clipping and checkpoints have the bits that they have on the CPU. test_child_on_gpu.py has D."""

import copy

import pytest
import torch
from child_models import Model
from gpu_runs import DEVICE, assert_same_bits, model_on, no_waiting, optimizer_of, set_cpu_grads, train
from helpers import both_backends, every_dtype

from childtune_fast import bernoulli_mask

pytestmark = pytest.mark.cuda
SHAPES = ((40, 70), (129,), (), (0,), (3, 1030), (4097,))
MANY = (*SHAPES, *[(33,)] * 400, (1 << 22,))  # more than a small table holds, and many blocks
OPTIONS = {
    "F": {},
    "plain": {"reserve_p": 1.0, "maximize": True},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.5},
    "hf": {"variant": "hf", "weight_decay": 0.5},
    "clipped": {"max_grad_norm": 1e-2},
}


@both_backends
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_dtype
def test_a_step_has_the_same_bits(dtype, options, backend):
    runs = []
    for device in (DEVICE, "cpu"):
        model = model_on(device, dtype, shapes=SHAPES)
        runs.append((model, optimizer_of(model, backend=backend, **options)))
        train(*runs[-1], range(100))
    assert_same_bits(*runs)


@every_dtype
def test_many_tensors_and_large_ones_have_the_same_bits(dtype):
    runs = []
    for device in (DEVICE, "cpu"):
        model = model_on(device, dtype, shapes=MANY)
        runs.append((model, optimizer_of(model, backend="native")))
        train(*runs[-1], range(2))
    assert_same_bits(*runs)


def test_the_kernels_run_on_the_current_stream():
    """A step on a side stream, after work there that takes long, sees its result."""
    runs, stream = [], torch.cuda.Stream()
    for device in (DEVICE, "cpu"):
        model = model_on(device, shapes=((1 << 22,),))
        runs.append((model, optimizer_of(model, backend="native")))
        model.p0.grad = torch.zeros_like(model.p0)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        runs[0][0].p0.grad.fill_(0.5)
        runs[0][1].step()
    stream.synchronize()
    runs[1][0].p0.grad.fill_(0.5)
    runs[1][1].step()
    assert_same_bits(*runs)


@both_backends
def test_one_optimizer_over_both_devices(backend):
    runs = []
    for device in (DEVICE, "cpu"):
        model = Model(shapes=SHAPES)
        for name in ("p0", "p4"):
            setattr(model, name, torch.nn.Parameter(getattr(model, name).detach().to(device)))
        runs.append((model, optimizer_of(model, max_grad_norm=1e-2, backend=backend)))
        train(*runs[-1], range(5))
    assert_same_bits(*runs)


@both_backends
def test_strides_do_not_matter(backend):
    runs = []
    for device in (DEVICE, "cpu"):
        model = model_on(device, shapes=((40, 70, 9), (3, 4)))
        model.p0 = torch.nn.Parameter(model.p0.detach().permute(2, 0, 1))
        runs.append((model, optimizer_of(model, backend=backend)))
        train(*runs[-1], range(3))
    assert_same_bits(*runs)


@both_backends
def test_a_grad_scaler_unscales_and_skips(backend):
    runs = []
    for device in (DEVICE, "cpu"):
        model = model_on(device)
        optimizer, scaler = (
            optimizer_of(model, backend=backend),
            torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=1000),
        )
        for step in range(3):
            optimizer.zero_grad()
            loss = sum((p.double() ** 2).sum() for p in model.parameters()) * (float("inf") if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[model.p0]["step"].item() == 2
        runs.append((model, optimizer))
    assert_same_bits(*runs)


@pytest.mark.parametrize("lr_on_gpu", [False, True])
@every_dtype
def test_a_captured_step_replays_as_steps(dtype, lr_on_gpu):
    """A CUDA graph of one step, replayed with other gradients and learning rates, counts on as steps do."""
    on_gpu, on_cpu = model_on(DEVICE, dtype, shapes=SHAPES), model_on("cpu", dtype, shapes=SHAPES)
    lr = torch.tensor(2.0**-6, device=DEVICE) if lr_on_gpu else 2.0**-6
    captured = optimizer_of(on_gpu, lr=lr, max_grad_norm=1e-2, capturable=True, backend="native")
    plain = optimizer_of(on_cpu, lr=2.0**-6, max_grad_norm=1e-2)
    train(on_gpu, captured, [0])
    train(on_cpu, plain, [0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 5):
        if lr_on_gpu:
            lr.fill_(2.0 ** -(6 + step))
            plain.param_groups[0]["lr"] = 2.0 ** -(6 + step)
        train(on_cpu, plain, [step])
        for p, q in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
    assert_same_bits((on_gpu, captured), (on_cpu, plain))


def test_a_step_that_a_graph_could_not_replay_is_not_captured():
    model = model_on(DEVICE)
    optimizer = optimizer_of(model, backend="native")
    train(model, optimizer, [0])
    with pytest.raises(RuntimeError, match="needs capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()


@pytest.mark.parametrize("max_grad_norm", [None, 1e-2])
def test_scaling_skipping_and_clipping_do_not_wait_for_the_gpu(max_grad_norm):
    runs = []
    for device in (DEVICE, "cpu"):
        model = model_on(device, shapes=SHAPES)
        optimizer = optimizer_of(model, max_grad_norm=max_grad_norm, backend="native")
        for step, found_inf in enumerate((0.0, 1.0, 0.0)):
            optimizer.grad_scale = torch.tensor(3.0, device=device)
            optimizer.found_inf = torch.tensor(found_inf, device=device)
            if step == 0 or device == "cpu":  # the first one moves the counts
                train(model, optimizer, [step])
                continue
            set_cpu_grads(model, step)
            with no_waiting():
                optimizer.step()
        runs.append((model, optimizer))
    assert_same_bits(*runs)


def test_a_checkpoint_of_counts_on_the_gpu_continues():
    """Saved with counts there, loaded where the host counts, and back."""
    runs = [model_on(DEVICE) for _ in range(2)]
    counting = optimizer_of(runs[0], max_grad_norm=1e-2, backend="native")
    train(runs[0], counting, range(3))
    resumed = optimizer_of(runs[1], backend="native")
    runs[1].load_state_dict(runs[0].state_dict())
    resumed.load_state_dict(copy.deepcopy(counting.state_dict()))
    assert counting.state[runs[0].p0]["step"].is_cuda
    assert resumed.state[runs[1].p0]["step"].is_cpu
    for model, optimizer in zip(runs, (counting, resumed), strict=True):
        train(model, optimizer, range(3, 5))
    assert_same_bits((runs[0], counting), (runs[1], resumed))


def test_the_mask_is_the_same():
    options = {"seed": 2**63 + 5, "step": 3, "param_index": 2, "offset": 2**33 + 77}
    on_gpu, on_cpu = (bernoulli_mask((1000, 77), 0.3, device=device, **options) for device in (DEVICE, "cpu"))
    assert torch.equal(on_gpu.cpu(), on_cpu)

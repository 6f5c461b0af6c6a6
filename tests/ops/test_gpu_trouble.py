"""What may go wrong around kernels on a GPU: memory, refusals of the driver, ranks. Without a GPU."""

import contextlib
import copy

import pytest
import test_who_steps
import torch
from helpers import make_params, set_grads, train
from test_who_steps import on_gpu

from childtune_fast import ChildAdamW
from childtune_fast.native import CudaError
from childtune_fast.native import gpu as gpu_kernels
from childtune_fast.ops import foreach
from childtune_fast.ops import step as op
from childtune_fast.ops.on_gpu import _memory_of

gpu = test_who_steps.gpu  # the fixture


def test_memory_is_a_streams_or_a_graphs(gpu, monkeypatch):
    """A graph keeps the address: nobody else may have that memory, whoever needs more or steps on another stream."""
    memory, capturing = {}, [False]
    monkeypatch.setattr(gpu_kernels, "is_capturing", lambda device: capturing[0])
    first = _memory_of(memory, 1, 1001, 100)
    assert _memory_of(memory, 1, 1001, 50) is first
    others = [_memory_of(memory, 1, 1002, 50), _memory_of(memory, 2, 1001, 50)]
    capturing[0] = True
    others += [_memory_of(memory, 1, 1001, 50) for _ in range(2)]
    capturing[0] = False
    assert len({tensor.data_ptr() for tensor in (first, *others)}) == 5
    assert _memory_of(memory, 1, 1001, 100) is first
    assert _memory_of(memory, 1, 1001, 101).numel() == 101


@pytest.fixture
def refusing(gpu, monkeypatch):
    """What a GPU's kernels raise at their next step."""
    errors = []
    kernels = gpu_kernels.find(1).kernels
    step = kernels.step

    def refusing_step(*arguments):
        if errors:
            raise errors.pop()
        return step(*arguments)

    monkeypatch.setattr(kernels, "step", refusing_step)
    return errors


def test_a_drivers_error_comes_as_it_is(refusing, monkeypatch):
    """Looking for a better explanation would wait for a GPU that has failed, and raise other words."""
    monkeypatch.setattr(op, "check_group", lambda group: pytest.fail("it was looked for"))
    params = [on_gpu(p) for p in make_params()]
    run = ChildAdamW(params, seed=7, backend="native")
    refusing.append(CudaError("cuLaunchKernel failed: out of resources (CUDA error 701)", 701))
    set_grads(params, 0)
    with pytest.raises(CudaError, match=r"^cuLaunchKernel failed: out of resources"):
        run.step()
    assert len(run.state) == 0
    run.step()
    assert all(run.state[p]["step"] == 1 for p in params)


@pytest.mark.parametrize("beside", [False, True])
def test_after_a_step_taken_in_part_a_checkpoint_is_needed(beside, refusing):
    """A driver that stops between two launches, or after the CPU has stepped its parameters."""
    params = [on_gpu(p) for p in make_params()] + (make_params() if beside else [])
    run = ChildAdamW(params, seed=7, backend="native")
    saved = copy.deepcopy(run.state_dict())
    train(run, [0])
    refusing.append(CudaError("cuLaunchKernel failed: illegal memory access", 700, begun=not beside))
    with pytest.raises(op.StepInterrupted, match=r"taken in part \(cuLaunchKernel failed: illegal .*load the model's"):
        train(run, [1])
    for each in (run, copy.deepcopy(run)):
        with pytest.raises(RuntimeError, match=r"an earlier step was taken in part, .*, by load_state_dict, before"):
            each.step()
    run.load_state_dict(saved)
    train(run, [1])
    assert all(run.state[p]["step"] == 1 for p in params)


@pytest.mark.parametrize("where", [on_gpu, torch.nn.Parameter])
def test_ranks_agree_by_the_gpu_of_the_parameters(where, gpu, monkeypatch):
    """A script that never calls torch.cuda.set_device has GPU 0 as the current one on all ranks."""
    current, during = [0], []

    @contextlib.contextmanager
    def device(wanted):
        current[0] = wanted.index
        yield
        current[0] = 0

    def broadcast(objects, src):
        during.append(("broadcast", current[0]))
        objects[0] += 1

    def gather(objects, mine):
        during.append(("gather", current[0]))
        objects[:] = [mine] * len(objects)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    params = [torch.nn.Parameter(torch.ones(2)), where(torch.ones(2))]
    run = ChildAdamW([{"params": [param], "lr": 0.1} for param in params], seed=7, backend="native")
    assert during == [(name, 1 if where is on_gpu else 0) for name in ("broadcast", "gather")]
    assert [run.seed, run.defaults["seed"], *(group["seed"] for group in run.param_groups)] == [8] * 4


@pytest.mark.parametrize("after", [0, 1])
def test_memory_that_ends_within_a_step_in_torch_interrupts_it(monkeypatch, after):
    """Before the first chunk is written nothing has happened; after it, a step was taken in part."""
    monkeypatch.setattr("childtune_fast.ops.foreach._CHUNK_BYTES", 1 << 10)
    params = make_params(((1000,), (1000,)))
    optimizer = ChildAdamW(params, backend="torch")
    set_grads(params, 0)
    calls, step_chunk = [], foreach._step_chunk

    def fails(*arguments):
        if len(calls) == after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        calls.append(step_chunk(*arguments))

    monkeypatch.setattr(foreach, "_step_chunk", fails)
    with pytest.raises(op.StepInterrupted if after else torch.OutOfMemoryError, match="CUDA out of memory"):
        optimizer.step()

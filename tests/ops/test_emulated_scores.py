"""Fisher scores and selection by the stand-in for a GPU, as test_emulated_step.py has the step: the CPU's bits."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from processes import in_a_process_with
from scores import KINDS, SIZES, random_tensor, tensors
from stand_in import IMAGE, STREAM, bytes_of_memory

from childtune_fast import ChildNetwork, FisherAccumulator
from childtune_fast.native import gpu, load
from childtune_fast.ops import radix, select, trust
from childtune_fast.ops.squares import SquareKernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def stand_in(kernels):
    """Has the CPU's tensors served by the stand-in's kernels, where they could be a GPU's; returns how many were."""
    served = []

    def accumulate_squares(*arguments):
        served.append(arguments)
        kernels.accumulate_squares(*arguments)

    noting = SimpleNamespace(accumulate_squares=accumulate_squares)
    of_cpu = torch.zeros(()).get_device()
    SquareKernels.find = lambda devices: SquareKernels(load.load_native(), {of_cpu: noting})
    gpu.load_kernels = lambda device: kernels
    gpu.stream_of, gpu.memory = lambda device: STREAM, lambda device, size: bytes_of_memory(size)
    gpu.place = lambda device: torch.device("cpu")
    return served


def model_with_grads(dtype, damage=None):
    model = torch.nn.ParameterList([torch.nn.Parameter(random_tensor((n,), dtype)) for n in [*SIZES, 10]])
    for param in model:
        param.grad = random_tensor(param.shape, dtype, 1)
    model[-1].grad = torch.cat([model[-1].grad[:, None]] * 2, dim=1)[:, 0]  # strided: not for the kernels
    if damage is not None:
        model[damage].grad[-1] = float("nan")
    return model


def check_fisher():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    of_cpu = SquareKernels.find
    for dtype, grad_clip in itertools.product(DTYPES, (None, 1e-2)):
        model = model_with_grads(dtype)
        scores = []
        for on_gpu in (False, True):
            SquareKernels.find = of_cpu
            served = stand_in(kernels) if on_gpu else []
            fisher = FisherAccumulator(model, grad_clip=grad_clip)
            for weight in (1.0, 0.3):
                fisher.update(weight=weight, grad_scale=2.0)
            scores.append(fisher.scores())
        assert len(served) == 2 * len(SIZES)
        assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


def check_what_is_not_finite():
    stand_in(load.load_native().GpuKernels(-1, IMAGE))
    for dtype in DTYPES:
        for damage in (1, len(SIZES) - 1, len(SIZES)):
            fisher = FisherAccumulator(model_with_grads(dtype, damage))
            with pytest.raises(ValueError, match=rf"gradient of '{damage}' must be finite"):
                fisher.update()


def check_selection():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    stand_in(kernels)
    for kind, largest in itertools.product(KINDS, (True, False)):
        scores = tensors(kind)
        total = sum(tensor.numel() for tensor in scores.values())
        for k in (0, 1, round(0.3 * total), total):
            expected = select.top_k(scores, k, largest=largest)
            for kinds in ([radix.OnGpu], [radix.OnGpu, radix.InTorch, radix.OnGpu]):
                parts = [
                    kind(
                        -1 if kind is radix.OnGpu else torch.device("cpu"),
                        dict(list(enumerate(scores.values()))[i :: len(kinds)]),
                        largest,
                    )
                    for i, kind in enumerate(kinds)
                ]
                bits = radix.select_in_parts(parts, k)
                assert all(torch.equal(bits[i], mask.bits) for i, mask in enumerate(expected.values()))


def check_selection_on_ranks():
    """As over several GPUs: on one rank the passes are the same."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from childtune_fast.ops import select_on_ranks

    stand_in(load.load_native().GpuKernels(-1, IMAGE))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for kind, largest in itertools.product(("few values", "infinities and extremes"), (True, False)):
        scores = tensors(kind, (1000, 1, 0, 5001, 1024))
        cut = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in scores.items()}
        part_of = partial(lambda largest, _, own: radix.OnGpu(-1, own, largest), largest)
        for k in (0, 2000, 7026):
            expected = select.top_k(scores, k, largest=largest)
            found = select_on_ranks.select(cut, k, largest, lambda _, own: own, part_of)
            assert all(torch.equal(found[name].bits, mask.bits) for name, mask in expected.items())
    dist.destroy_process_group()


def check_selection_from_a_model():
    """As a user calls it, on tensors that say they are on a GPU."""
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    stand_in(kernels)
    model = torch.nn.Sequential(torch.nn.Linear(40, 70), torch.nn.Linear(70, 3))
    scores = {name: random_tensor(p.shape, torch.float32).square() for name, p in model.named_parameters()}
    expected = ChildNetwork.from_scores(model, scores, reserve_p=0.3, maskable="weight")
    calls = []
    on_gpu = select.OnGpu
    select.OnGpu = lambda *args: calls.append(args) or on_gpu(*args)
    torch.Tensor.is_cuda, torch.Tensor.is_cpu = True, False
    trust.kernels_of = lambda device, choice: kernels
    kept = sum(mask.count for mask in expected.packed.values())
    found = select.top_k({name: scores[name] for name in expected.packed}, kept)
    broken = {"good": torch.zeros(3), "bad": torch.tensor([1.0, float("nan")])}
    with pytest.raises(ValueError, match="one or more for 'bad'"):
        select.top_k(broken, 1)
    assert len(calls) == 2
    del torch.Tensor.is_cuda, torch.Tensor.is_cpu
    assert expected.packed.keys() == found.keys()
    assert all(torch.equal(mask.bits, found[name].bits) for name, mask in expected.packed.items())


def check_refusals():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    score, grad, finite = torch.zeros(8), torch.ones(8), torch.ones((), dtype=torch.uint8)
    good = {"score": score, "grad": grad, "finite": finite, "weight": 1.0, "grad_factor": 1.0, "grad_clip": None}
    good |= {"stream": STREAM, "memory_of": bytes_of_memory}
    for wrong, message in [
        ({"grad": torch.ones(8, 2)[:, 0]}, "grad must be contiguous"),
        ({"grad": torch.ones(7)}, "one shape"),
        ({"grad": torch.ones(8, dtype=torch.int32)}, "must be float32, float64"),
        ({"score": torch.zeros(8, dtype=torch.float64)}, "score must be contiguous"),
        ({"finite": torch.ones((), dtype=torch.bool)}, "finite must be contiguous"),
        ({"finite": torch.ones(2, dtype=torch.uint8)}, "finite must be contiguous"),
        ({"grad_clip": 1.0, "memory_of": lambda size: bytes_of_memory(size - 1)}, "memory_of must return"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernels.accumulate_squares(**{**good, **wrong})
    assert torch.equal(score, torch.zeros(8))
    counts, scores, bits = torch.zeros(2048, dtype=torch.int64), [torch.ones(9)], [torch.zeros(128, dtype=torch.uint8)]
    nan = torch.zeros(1, dtype=torch.uint8)
    for shifts in ((32, 20), (33, 22), (11, -1), (5, 5)):
        with pytest.raises(ValueError, match="a digit must have from 1 to 11"):
            kernels.count_digits(scores, True, 0, *shifts, counts, nan, STREAM)
    with pytest.raises(ValueError, match="counts must be"):
        kernels.count_digits(scores, True, 0, 32, 21, counts[:-1], nan, STREAM)
    with pytest.raises(ValueError, match="nan must be"):
        kernels.count_digits(scores, True, 0, 32, 21, counts, torch.zeros(2), STREAM)
    with pytest.raises(ValueError, match="scores must be"):
        kernels.count_digits([torch.ones(9).double()], True, 0, 32, 21, counts, nan, STREAM)
    ties = torch.zeros(kernels.tie_counts(9), dtype=torch.int32)
    for wrong_bits, wrong_ties, message in [
        ([], ties, "each tensor of scores must have its bits"),
        ([bits[0][:-1]], ties, "bits must be contiguous"),
        ([torch.zeros(129, dtype=torch.uint8)[1:]], ties, "bits must be aligned"),
        (bits, ties[:-1], "ties must be"),
    ]:
        for kernel in (kernels.write_above, kernels.add_ties):
            with pytest.raises(ValueError, match=message):
                kernel(scores, True, 0, wrong_bits, wrong_ties, STREAM)


def check_nonsense():
    kernels = load.load_native().GpuKernels(-1, IMAGE)
    things = [None, 1, -1, 1 << 70, "x", [], (), object(), torch, torch.ones(0), torch.ones(8, device="meta")]
    things += [torch.ones(8).to_sparse(), torch.ones(8, dtype=torch.cfloat), [torch.ones(8)], [None], [1, 2]]
    score, flag = torch.zeros(8), torch.ones(1, dtype=torch.uint8)
    bits, ties = [torch.zeros(128, dtype=torch.uint8)], torch.zeros(kernels.tie_counts(8), dtype=torch.int32)
    calls = {
        kernels.accumulate_squares: (score, torch.ones(8), 1.0, 1.0, 1.0, flag, STREAM, bytes_of_memory),
        kernels.count_digits: ([score], True, 0, 32, 21, torch.zeros(2048, dtype=torch.int64), flag, STREAM),
        kernels.write_above: ([score], True, 0, bits, ties, STREAM),
        kernels.add_ties: ([score], True, 0, bits, ties, STREAM),
    }
    refused = 0
    for function, good in calls.items():
        function(*good)
        for place, thing in itertools.product(range(len(good)), things):
            refused += refuses(function, *good[:place], thing, *good[place + 1 :])
    assert refused > 300, refused


def refuses(function, *arguments):
    try:
        function(*arguments)
    except (TypeError, ValueError, RuntimeError, BufferError):
        return True
    return False


def test_nonsense_does_not_crash(driver):
    in_a_process_with(driver, check_nonsense)


def test_squared_gradients_have_the_cpus_bits(driver):
    in_a_process_with(driver, check_fisher)


def test_gradients_that_are_not_finite_are_named(driver):
    in_a_process_with(driver, check_what_is_not_finite)


def test_gpus_select_what_the_cpu_does(driver):
    in_a_process_with(driver, check_selection)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed with gloo")
def test_gpus_of_ranks_select_what_the_cpu_does(driver):
    in_a_process_with(driver, check_selection_on_ranks)


def test_selection_takes_the_kernels_where_they_are_asked_for(driver):
    in_a_process_with(driver, check_selection_from_a_model)


def test_the_kernels_arguments_must_fit(driver):
    in_a_process_with(driver, check_refusals)

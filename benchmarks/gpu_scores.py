"""Measures scores on a GPU: adding squares, the choice of a child network, and the memory of state and mask."""

from collections.abc import Iterator

import torch
from torch.nn import Parameter, ParameterList

from childtune_fast import ChildAdamW
from childtune_fast.fisher.sums import SquareSums
from childtune_fast.ops.select import top_k

from .contestants import HYPER, Contestant, random_child
from .gpu_race import Clock, race
from .markdown import markdown
from .race import spread
from .workloads import GPU_WORKLOADS, make_workload

SCORES, TENSORS = (1024, 4096), 72  # 302 M scores
SQUARES_BYTES = 12  # bytes moved per float32 weight: gradient and score are read, the score is written
TITLES = {
    "ours": "FisherAccumulator",
    "addcmul": "`F.addcmul_(g, g)`",
    "select": "choice of 30 %, masks included",
    "sort": "`torch.sort` of all scores alone",
}


def measure(clock: Clock, device: str, rounds: int, scale: int) -> dict:
    """Returns each contestant's milliseconds in each round, the numbers of weights and scores, and bytes of memory."""
    data = _squares(clock, device, rounds, scale) | _selection(clock, device, rounds, scale)
    return data | {"state_bytes_per_weight": _state_bytes(device, scale)}


def _squares(clock: Clock, device: str, rounds: int, scale: int) -> dict:
    shapes = [tuple(max(1, size // scale) for size in shape) for shape in GPU_WORKLOADS["bert-large"]]
    work = make_workload(shapes, torch.float32, device)
    scores = SquareSums(ParameterList([Parameter(tensor) for tensor in work.params]))
    kernels = scores.kernels()
    sums = [torch.zeros_like(grad) for grad in work.grads]

    @torch.no_grad()
    def ours() -> None:
        for i, grad in enumerate(work.grads):  # tensor by tensor, as hooks do it
            scores.add(kernels, str(i), grad)

    def addcmul() -> None:
        for total, grad in zip(sums, work.grads, strict=True):
            total.addcmul_(grad, grad)

    samples = race({"ours": Contestant(ours), "addcmul": Contestant(addcmul)}, clock, rounds)
    return {"squared_weights": work.weights, "samples_ms": samples}


def _selection(clock: Clock, device: str, rounds: int, scale: int) -> dict:
    shape = tuple(size // scale for size in SCORES)
    generator = torch.Generator(device).manual_seed(0)
    scores = {
        str(i): torch.randn(shape, generator=generator, device=device).mul_(3).sub_(20).exp_() for i in range(TENSORS)
    }
    total = sum(tensor.numel() for tensor in scores.values())
    flat = torch.cat([tensor.view(-1) for tensor in scores.values()])

    def select() -> dict:
        return top_k(scores, round(0.3 * total))

    found = race({"select": Contestant(select), "sort": Contestant(flat.sort)}, clock, max(rounds // 5, 1))
    del flat
    extra = float("nan")
    if clock.on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        masks = select()
        kept = sum(mask.bits.nbytes + mask.offsets.nbytes for mask in masks.values())
        extra = torch.cuda.max_memory_allocated(device) - before - kept
    return {"scores": total, "selection_ms": found, "selection_extra_bytes": extra}


def _state_bytes(device: str, scale: int) -> float:
    """Returns the bytes of state and mask that D keeps for each maskable weight at p = 0.3."""
    params = [Parameter(torch.zeros(tuple(size // scale for size in SCORES), device=device)) for _ in range(4)]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = ChildAdamW(params, **HYPER, child=random_child(params, 0.3), backend="native")
    optimizer.step()
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors += [tensor for mask in optimizer.child_masks.values() for tensor in (mask.bits, mask.offsets)]
    return sum(tensor.nbytes for tensor in tensors) / sum(param.numel() for param in params)


def targets(data: dict, rate: float) -> Iterator[tuple[str, str, str, bool]]:
    """Yields for each promise its title, the measured value, the bound, and whether the promise is met."""
    share = _share_of_copy(data, "ours", rate)
    yield "Fisher accumulation, share of copy bandwidth", f"{share:.2f}", "at least 0.85", share >= 0.85
    milliseconds = _median(data["selection_ms"]["select"])
    yield f"selection over {data['scores'] / 1e6:.0f} M scores", f"{milliseconds:.3g} ms", "20 ms", milliseconds <= 20
    extra = data["selection_extra_bytes"]
    yield "its memory beside scores and masks", f"{extra / 1e6:.1f} MB", "64 MB", extra <= 64e6
    state = data["state_bytes_per_weight"]
    yield "D at p = 0.3, kept per maskable weight", f"{state:.2f} bytes", "2.60 bytes", state <= 2.6


def table(data: dict, rate: float) -> str:
    """Returns the tables of squares and of selection, as Markdown."""
    rows = [
        [TITLES[name], f"{_median(samples):.3g}", f"{_share_of_copy(data, name, rate):.2f}"]
        for name, samples in data["samples_ms"].items()
    ]
    squares = f"## Squares of {data['squared_weights'] / 1e6:.0f} M gradients, float32\n\n"
    squares += markdown(["", "ms", "of copy"], rows)
    rows = [[TITLES[name], f"{_median(samples):.3g}"] for name, samples in data["selection_ms"].items()]
    return f"{squares}\n\n## Selection among {data['scores'] / 1e6:.0f} M scores\n\n{markdown(['', 'ms'], rows)}"


def _median(samples: list) -> float:
    return spread([sample[0] for sample in samples if sample])["median"]


def _share_of_copy(data: dict, name: str, rate: float) -> float:
    return SQUARES_BYTES * data["squared_weights"] / (1e-3 * _median(data["samples_ms"][name])) / rate

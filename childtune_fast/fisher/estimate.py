"""estimate_fisher: how much each weight matters to a task, as the mean of its squared gradient."""

import itertools
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..arguments import Selector, check_model, check_type, shown
from ..ops.fsdp import accumulates, fsdp_modules
from .estimation import Estimation, LossFn, OnNonfinite
from .examples import map_tensors
from .loss import explaining_backward, loss_of_output
from .restore import leaving_as_it_was
from .scored import inner_model
from .sums import Offload, SquareSums
from .zeros import refuse_zeros


def estimate_fisher(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    per_example: bool = False,
    grad_clip: float | None = None,
    names: Selector = None,
    train_mode: bool = False,
    offload: Offload | None = None,
    on_nonfinite: OnNonfinite = "raise",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Estimates the diagonal of the Fisher information: Child-Tuning_D's scores (Xu, Luo et al., EMNLP 2021, sec. 2.3).

    By default, a score is the mean over batches of the squared gradient of the batch's loss. With `per_example`, it is
    the mean over examples of the squared gradient of each example's loss, which is the paper's formula. Each gradient
    is squared and freed as soon as the backward pass has computed it, so that a full set of gradients is not in memory,
    except in `vmap` (see `per_example`), and of what a backward pass computes that begins within ours, as those of
    reentrant checkpointing do. Gradients that the loss itself takes by `backward()` are left to it.

    Afterwards everything is what it was, also when this function raises: weights, buffers, gradients and attributes of
    the modules (the same objects, with the same bits), the random states of torch, Python and numpy, and the DataLoader
    with the generators that it, its samplers, dataset and collate_fn hold, so that training sees the data in the order
    in which it would have seen them. Weights that the loss writes are copied before the first write. If it writes some
    in a later batch only, or past torch's operations (numpy, fused kernels of torch.compile), a ValueError at the end
    names them. An iterator that is passed as `dataloader` is used up.

    Of a model that is cut over ranks (fully_shard, HSDP, tensor parallelism), every rank of its meshes must call this,
    with its own part of the data as in training. Under fully_shard a batch is then that of all ranks, whose gradient is
    the mean of theirs; a parameter that is whole beside sharded ones has the gradient of the rank's own batch. Ranks
    raise together, also if only one of them has a loader that fails or ends early, a wrong batch, or a loss or gradient
    that is not finite. An error inside of the model's own forward or backward pass is raised by that rank alone.

    Of a DistributedDataParallel model, the model inside is taken, under its own names: each rank squares the gradients
    of its own data, and no rank waits for another one. `FisherAccumulator.all_reduce` gives the mean over the ranks. A
    forward pass of the wrapper that has a graph must have had its backward pass before, since it awaits gradients.

    Args:
        model: torch.nn.Module with float32, float64, bfloat16 or float16 parameters, on any device, whole or DTensors.
            Frozen parameters are left out, and may be of any kind. A tied parameter is scored once, under its first
            name.
        dataloader: yields batches: tensors in any nesting of mappings, lists and tuples, which are moved to the
            model's device.
        loss_fn: function of (model, batch) that returns the loss, a tensor of one number. None takes the `loss` of
            `model(**batch)`, or the first element of a tuple, as Trainer does; the batch must be a mapping with
            `labels` (default: None).
        max_batches: number of batches to use at most; None uses all (default: None).
        per_example: squares each example's gradient instead of each batch's. Examples are split along dimension 0 of
            every tensor in the batch; values that are no tensors are passed with each of them. One forward and one
            backward pass of the batch then give the gradients of all its examples. The loss function is called for the
            batch, and for each example with modules that answer from the batch's pass. This is tried on the first three
            examples: if a gradient is not that of a pass with this example alone, a warning tells, and examples of
            small models go through `torch.func.vmap` in chunks whose gradients take up to 256 MiB, those of larger
            models, or of models that vmap cannot run, one at a time; so do those of models that are cut over ranks.
            Under fully_shard, which has no gradients of single examples, it is refused (default: False).
        grad_clip: scales the gradient of each tensor, on its own, by `min(1, grad_clip / (norm + 1e-6))`; None does not
            clip (default: None). The published code's recipe is `grad_clip=1.0, train_mode=True`. The norm of a sharded
            tensor is over all ranks: its gradient is kept until the backward pass has ended.
        names: selects the parameters to score: a predicate over names, or a regular expression that is searched in
            them; None scores all (default: None).
        train_mode: puts the model into training mode, so that dropout is on; False uses evaluation mode
            (default: False).
        offload: "cpu" keeps the scores in the CPU's memory and squares there, for a model that leaves no room for its
            scores on a GPU; each gradient is then copied. None keeps the scores on the parameters' devices
            (default: None). Of a sharded parameter, the score is then a DTensor on the parameter's mesh with values on
            the CPU, as parameters are under FSDP2's CPUOffloadPolicy: to gather it by `full_tensor()`, the process
            group needs a backend for the CPU, such as "cpu:gloo,cuda:nccl".
        on_nonfinite: "raise" raises at the first loss or gradient that is not finite. "skip" leaves that batch out, or
            with `per_example` that example, and tells by a warning which ones; the mean is over the others. It takes
            another 4 bytes for each scored weight, and a pass over the scores for each batch (default: "raise").
        progress: shows a progress bar (default: True).

    Returns:
        {parameter name: float32 tensor of the parameter's shape}, on the parameter's device, or with `offload="cpu"` on
        the CPU; for a DTensor a DTensor, placed as it is. A parameter that received no gradient scores 0.

    Raises:
        ValueError: a loss or a gradient is not finite (the message has the index of the batch and the example, from 0),
            all scores are 0, there is no batch, ranks have different numbers of batches, a parameter has a
            post-accumulate-grad hook, a parameter to score is not dense or has no values (on the meta device, or lazy),
            gradients are being accumulated under fully_shard, the model computes its loss in training mode only,
            weights were written or a buffer is of a kind (nested) that cannot be restored, or an argument cannot be
            honoured.
        TypeError: an argument has a wrong type, a batch is not collated, or `loss_fn` is None and a batch or the
            model's output has no loss.
        RuntimeError: a backward pass within ours reached a parameter after its gradient was complete; a recurrent layer
            on a GPU is in evaluation mode; or another rank raised an error that is neither a ValueError nor a
            TypeError.
    """
    if max_batches is not None and not (isinstance(max_batches, int) and max_batches >= 1):
        raise ValueError(
            f"estimate_fisher: max_batches must be a whole number above 0, or None for all (got {shown(max_batches)})"
        )
    check_model(model)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of model and batch, or None (got {type(loss_fn).__name__})")
    if on_nonfinite not in get_args(OnNonfinite):
        raise ValueError(f"estimate_fisher: on_nonfinite must be 'raise' or 'skip' (got {shown(on_nonfinite)})")
    check_type("dataloader", dataloader, Iterable, "an iterable of batches")
    model = inner_model(model)
    _check_no_hooks(model)
    _check_fsdp(model, per_example)
    sums = SquareSums(model, grad_clip=grad_clip, names=names, offload=offload)
    estimate = Estimation(model, loss_fn or loss_of_output, sums, on_nonfinite)
    take = estimate.examples if per_example else estimate.whole
    with (
        leaving_as_it_was(model, dataloader) as weights,
        torch.inference_mode(False),
        torch.enable_grad(),
        estimate.hooks(),
    ):
        model.train(train_mode)
        with sums.ranks.agreeing():
            batches = _shown(itertools.islice(dataloader, max_batches), dataloader, max_batches, progress)
            moved = (map_tensors(batch, lambda tensor: tensor.to(estimate.device)) for batch in batches)
        for index, batch in enumerate(sums.ranks.batches(moved)):
            with weights.watched(), explaining_backward(model, f"batch {index}"):
                take(index, batch)
    with sums.ranks.agreeing():
        weights.check()
    estimate.check_count()
    return refuse_zeros(sums.take_means(), sums.ranks, per_example)


def _check_no_hooks(model: nn.Module) -> None:
    """Raises ValueError if a parameter has a post-accumulate-grad hook, which may step an optimizer."""
    for name, param in model.named_parameters():
        if param._post_accumulate_grad_hooks:
            raise ValueError(
                f"estimate_fisher: parameters must have no post-accumulate-grad hooks (got one on '{name}'), for they "
                "may change weights; remove them for the estimation"
            )


def _check_fsdp(model: nn.Module, per_example: bool) -> None:
    """Raises ValueError if fully_shard keeps a backward pass from giving the gradients that are to be squared."""
    modules = fsdp_modules(model)
    if per_example and modules:
        raise ValueError(
            "estimate_fisher: with per_example=True each example must have a gradient of its own (got a model under "
            "fully_shard(), which takes the mean over the ranks); pass per_example=False, or estimate before "
            "fully_shard()"
        )
    if any(map(accumulates, modules)):
        raise ValueError(
            "estimate_fisher: under fully_shard() each backward pass must reduce the gradients (got a model that "
            "accumulates them); call model.set_requires_gradient_sync(True) and model.set_is_last_backward(True), and "
            "end the accumulation by a backward pass"
        )


def _shown(batches: Iterable[Any], dataloader: Iterable[Any], max_batches: int | None, progress: bool) -> Iterable[Any]:
    """Returns the batches, under a progress bar if `progress` is true."""
    if not progress:
        return batches
    from tqdm import tqdm  # imported only when needed, to keep `import childtune_fast` fast

    known = [count for count in (_length(dataloader), max_batches) if count is not None]
    return tqdm(batches, total=min(known, default=None), desc="Fisher", unit="batch")


def _length(dataloader: Iterable[Any]) -> int | None:
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # an iterable dataset or a sampler has no length
        return None

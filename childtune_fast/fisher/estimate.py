"""estimate_fisher: how much each weight matters to a task, as the mean of its squared gradient."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import Selector, check_model, check_type, is_sharded
from ..ops.fsdp import accumulates, fsdp_modules
from .examples import PerExampleGrads, examples_in, map_tensors, tensors_of, with_tensors
from .restore import leaving_as_it_was
from .sums import Offload, SquareSums, inner_model

LossFn = Callable[[nn.Module, Any], Tensor]


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
    progress: bool = True,
) -> dict[str, Tensor]:
    """Estimates the diagonal of the Fisher information: Child-Tuning_D's scores (Xu, Luo et al., EMNLP 2021, sec. 2.3).

    By default, a score is the mean over batches of the squared gradient of the batch's loss. With `per_example`, it is
    the mean over examples of the squared gradient of each example's loss, which is the paper's formula. Except
    in `vmap` (see `per_example`), each gradient is squared and freed as soon as the backward pass has computed it, so
    that a full set of gradients is never in memory. Training flags, buffers, gradients, hooks and the random states of
    torch, Python and numpy are restored afterwards, also when this function raises.

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
        loss_fn: function of (model, batch) that returns the loss, a tensor of one number. None takes
            `model(**batch).loss`, which transformers' models compute if the batch is a mapping with `labels`
            (default: None).
        max_batches: number of batches to use at most; None uses all (default: None).
        per_example: squares each example's gradient instead of each batch's. Examples are split along dimension 0 of
            every tensor in the batch; values that are no tensors are passed with each of them. Examples of small models
            go through `torch.func.vmap` in chunks whose gradients take up to 256 MiB. Examples of larger models, and of
            models that vmap cannot run, or that are cut over ranks, are taken one at a time. Under fully_shard, which
            has no gradients of single examples, it is refused (default: False).
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
        progress: shows a progress bar (default: True).

    Returns:
        {parameter name: float32 tensor of the parameter's shape}, on the parameter's device, or with `offload="cpu"` on
        the CPU; for a DTensor a DTensor, placed as it is. A parameter that received no gradient scores 0.

    Raises:
        ValueError: a loss or a gradient is not finite (the message has the index of the batch, from 0), there is no
            batch, ranks have different numbers of batches, a parameter has a post-accumulate-grad hook, a parameter to
            score is not dense or has no values (on the meta device), gradients are being accumulated under fully_shard,
            a buffer could not be restored (a nested tensor), or an argument cannot be honoured.
        TypeError: an argument has a wrong type, or `loss_fn` is None and a batch or the model's output has no loss.
        RuntimeError: the backward pass reached a parameter twice, as it does with reentrant checkpointing of shared
            weights; or another rank raised an error that is neither a ValueError nor a TypeError.
    """
    if max_batches is not None and not (isinstance(max_batches, int) and max_batches >= 1):
        raise ValueError(
            f"estimate_fisher: max_batches must be a whole number above 0, or None for all (got {max_batches!r})"
        )
    check_model(model)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of model and batch, or None (got {type(loss_fn).__name__})")
    check_type("dataloader", dataloader, Iterable, "an iterable of batches")
    model = inner_model(model)
    _check_no_hooks(model)
    _check_fsdp(model, per_example)
    sums = SquareSums(model, grad_clip=grad_clip, names=names, offload=offload)
    estimate = _Estimate(model, loss_fn or _loss_of_output, sums)
    take = estimate.examples if per_example else estimate.whole
    with leaving_as_it_was(model), torch.inference_mode(False), torch.enable_grad(), estimate.hooks():
        model.train(train_mode)
        with sums.ranks.agreeing():
            shown = _shown(itertools.islice(dataloader, max_batches), dataloader, max_batches, progress)
            moved = (map_tensors(batch, lambda tensor: tensor.to(estimate.device)) for batch in shown)
        for index, batch in enumerate(sums.ranks.batches(moved)):
            take(index, batch)
    if estimate.count == 0:
        raise ValueError("estimate_fisher: dataloader must yield at least one batch (got none)")
    return sums.take_means()


class _Estimate:
    """Adds up the squared gradients of one estimation, through hooks on the parameters.

    Attributes:
        finite: {parameter name: whether its gradient was finite}, of the present backward pass.
        count: number of batches or examples whose gradients have been squared.
    """

    def __init__(self, model: nn.Module, loss: LossFn, sums: SquareSums) -> None:
        self.model = model
        self.loss = loss
        self.sums = sums
        self.kernels = sums.kernels()  # found once for the whole estimation, not for each gradient
        self.names = {param: name for name, param in sums.params.items()}
        self.device = _device_of(next(iter(self.names)))
        self.per_example = PerExampleGrads(model, sums.params, loss)
        self.finite: dict[str, bool | Tensor] = {}
        self.count = 0

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Registers hooks that free every gradient as soon as it is complete, after squaring the scored ones."""
        handles = [
            param.register_post_accumulate_grad_hook(self._take)
            for param in self.model.parameters()
            if param.requires_grad
        ]
        handles += self.sums.ranks.hooks(self.model)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, param: nn.Parameter) -> None:
        name = self.names.get(param)
        grad = None if name is None else self.sums.gradient(name)
        param.grad = None
        if name is None or grad is None:
            return
        if name in self.finite:  # the first part of its gradient is already squared and freed
            raise RuntimeError(
                f"estimate_fisher: backward must reach each parameter once (it reached '{name}' twice, as reentrant "
                "activation checkpointing of shared weights makes it); use checkpointing with use_reentrant=False"
            )
        with torch.no_grad():
            self.finite[name] = self.sums.add(self.kernels, name, grad)

    def whole(self, index: int, batch: Any) -> None:
        """Adds the squared gradient of one loss: that of batch number `index`, or of one example in it."""
        loss = self.sums.ranks.loss(partial(self._loss_of, index, batch))
        self.finite = {}
        loss.backward()
        self._close(index)

    def _loss_of(self, index: int, batch: Any) -> Tensor:
        loss = self.loss(self.model, batch)
        _check_loss(loss, index)
        return loss

    def examples(self, index: int, batch: Any) -> None:
        """Adds the squared gradient of the loss of each example in batch number `index`."""
        tensors, done = tensors_of(batch), 0
        with self.sums.ranks.agreeing():
            total = examples_in(tensors, index)
        if self.per_example.worthwhile and not self.sums.ranks.meshes:  # vmap does not run DTensors
            for losses, grads in self.per_example.of_batch(batch, tensors):
                _check_finite(losses, index)
                for of_one in grads:
                    self.finite = {name: self.sums.add(self.kernels, name, grad) for name, grad in of_one.items()}
                    self._close(index)
                done += len(grads)
        for i in range(done, total):
            self.whole(index, with_tensors(batch, [tensor[i : i + 1] for tensor in tensors]))

    def _close(self, index: int) -> None:
        self.sums.close(self.finite, 1.0, f"estimate_fisher: batch {index}: ")
        self.count += 1


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


def _device_of(param: Any) -> Any:
    """Returns the device that computes with a parameter; under FSDP2's CPU offload not the one that holds it."""
    if is_sharded(param) and param.device.type != param.device_mesh.device_type:
        return torch.device(param.device_mesh.device_type)
    return param.device


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


# ---- The loss of a batch -------------------------------------------------------------------------------------------


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """Returns the loss that a transformers model computes from a batch with labels.

    Raises:
        TypeError: the batch is no mapping with `labels`, or the model's output has no loss.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        got = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            f"estimate_fisher: without loss_fn a batch must be a mapping with 'labels' (got {got}); pass "
            "loss_fn=lambda model, batch: ..., which returns the loss"
        )
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise TypeError(
            f"estimate_fisher: without loss_fn the model must return an output with a loss (got "
            f"{type(output).__name__}); pass loss_fn=lambda model, batch: ..., which returns the loss"
        )
    return loss


def _check_loss(loss: Any, index: int) -> None:
    """Raises ValueError unless the loss of batch number `index` is one finite number with a graph."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"shape {tuple(loss.shape)}, {loss.requires_grad=}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"estimate_fisher: batch {index}: the loss must be a tensor of one number with a graph (got {got}); reduce "
            "it by .mean(), and do not detach it"
        )
    loss = loss.detach()
    _check_finite(loss.to_local() if is_sharded(loss) else loss, index)


def _check_finite(losses: Tensor, index: int) -> None:
    """Raises ValueError if a loss of batch number `index` is not finite."""
    if not torch.isfinite(losses).all():
        raise ValueError(
            f"estimate_fisher: batch {index}: the loss must be finite (got {losses.flatten().tolist()}); look for the "
            "cause in that batch"
        )

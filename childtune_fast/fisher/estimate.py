"""estimate_fisher: how much each weight matters to a task, as the mean of its squared gradient."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import Selector, check_model, check_type
from .examples import PerExampleGrads, examples_in, map_tensors, tensors_of, with_tensors
from .restore import leaving_as_it_was
from .sums import Offload, SquareSums

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

    Args:
        model: torch.nn.Module with float32, float64, bfloat16 or float16 parameters, on any device. Frozen parameters
            are left out, and may be of any kind. A tied parameter is scored once, under its first name.
        dataloader: yields batches: tensors in any nesting of mappings, lists and tuples, which are moved to the
            model's device.
        loss_fn: function of (model, batch) that returns the loss, a tensor of one number. None takes
            `model(**batch).loss`, which transformers' models compute if the batch is a mapping with `labels`
            (default: None).
        max_batches: number of batches to use at most; None uses all (default: None).
        per_example: squares each example's gradient instead of each batch's. Examples are split along dimension 0 of
            every tensor in the batch; values that are no tensors are passed with each of them. Examples of small models
            go through `torch.func.vmap` in chunks whose gradients take up to 256 MiB. Examples of larger models, and of
            models that vmap cannot run, are taken one at a time (default: False).
        grad_clip: scales the gradient of each tensor, on its own, by `min(1, grad_clip / (norm + 1e-6))`; None does not
            clip (default: None). The published code's recipe is `grad_clip=1.0, train_mode=True`.
        names: selects the parameters to score: a predicate over names, or a regular expression that is searched in
            them; None scores all (default: None).
        train_mode: puts the model into training mode, so that dropout is on; False uses evaluation mode
            (default: False).
        offload: "cpu" keeps the scores in the CPU's memory and squares there, for a model that leaves no room for its
            scores on a GPU; each gradient is then copied. None keeps the scores on the parameters' devices
            (default: None).
        progress: shows a progress bar (default: True).

    Returns:
        {parameter name: float32 tensor of the parameter's shape}, on the parameter's device, or with `offload="cpu"` on
        the CPU. A parameter that received no gradient scores 0.

    Raises:
        ValueError: a loss or a gradient is not finite (the message has the index of the batch, from 0), there is no
            batch, a parameter has a post-accumulate-grad hook, a parameter to score is not dense or has no values (on
            the meta device), a buffer could not be restored (a nested tensor), or an argument cannot be honoured.
        TypeError: an argument has a wrong type, or `loss_fn` is None and a batch or the model's output has no loss.
        RuntimeError: the backward pass reached a parameter twice, as it does with reentrant checkpointing of shared
            weights.
    """
    if max_batches is not None and not (isinstance(max_batches, int) and max_batches >= 1):
        raise ValueError(
            f"estimate_fisher: max_batches must be a whole number above 0, or None for all (got {max_batches!r})"
        )
    check_model(model)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of model and batch, or None (got {type(loss_fn).__name__})")
    check_type("dataloader", dataloader, Iterable, "an iterable of batches")
    _check_no_hooks(model)
    sums = SquareSums(model, grad_clip=grad_clip, names=names, offload=offload)
    estimate = _Estimate(model, loss_fn or _loss_of_output, sums)
    take = estimate.examples if per_example else estimate.whole
    with leaving_as_it_was(model), torch.inference_mode(False), torch.enable_grad(), estimate.hooks():
        model.train(train_mode)
        for index, batch in enumerate(
            _shown(itertools.islice(dataloader, max_batches), dataloader, max_batches, progress)
        ):
            take(index, map_tensors(batch, lambda tensor: tensor.to(estimate.device)))
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
        self.device = next(iter(self.names)).device
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
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, param: nn.Parameter) -> None:
        grad, param.grad = param.grad, None
        name = self.names.get(param)
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
        loss = self.loss(self.model, batch)
        _check_loss(loss, index)
        self.finite = {}
        loss.backward()
        self._close(index)

    def examples(self, index: int, batch: Any) -> None:
        """Adds the squared gradient of the loss of each example in batch number `index`."""
        tensors = tensors_of(batch)
        total, done = examples_in(tensors, index), 0
        if self.per_example.worthwhile:
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
    _check_finite(loss.detach(), index)


def _check_finite(losses: Tensor, index: int) -> None:
    """Raises ValueError if a loss of batch number `index` is not finite."""
    if not torch.isfinite(losses).all():
        raise ValueError(
            f"estimate_fisher: batch {index}: the loss must be finite (got {losses.flatten().tolist()}); look for the "
            "cause in that batch"
        )

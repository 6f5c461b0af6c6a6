"""The loss of a batch: what estimate_fisher takes without `loss_fn`, requires of every loss, and explains.

Most errors of a loss are raised by the model, or by torch, and name no remedy. The contexts here add one that is known.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import is_sharded
from .examples import tensors_of
from .together import NotFiniteError

_RNN = "RNN backward can only be called in training mode"  # what torch says of cuDNN's layers, and of MIOpen's
_OURS, _OF_OTHERS = "estimate_fisher: ", "Fisher scores: "  # how errors begin that say what is wrong; see Together
_COLLATOR = "a collate_fn such as transformers' DataCollatorWithPadding(tokenizer)"


def loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """Returns the loss that a transformers model computes from a batch with labels.

    As in Trainer, it is the output's entry or attribute "loss", or the first element of a tuple; that must be a number.

    Raises:
        TypeError: the batch is no mapping with `labels`, or not collated, or the model's output has no loss.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        fault = "" if isinstance(batch, Mapping) and tensors_of(batch) else _not_collated(batch)
        if fault:
            raise TypeError(f"{_OURS}{fault}")
        got = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            f"estimate_fisher: without loss_fn a batch must be a mapping with 'labels' (got {got}); pass "
            "loss_fn=lambda model, batch: ..., which returns the loss"
        )
    output = model(**batch)
    loss = _loss_in(output)
    if loss is None:
        got, code = _losses_in(output, "model(**batch)")
        raise TypeError(
            f"estimate_fisher: without loss_fn the model must return an output with a loss (got {got}); pass "
            f"loss_fn=lambda model, batch: {code or '...'}, which returns the loss"
        )
    return loss


def _loss_in(output: Any) -> Any:
    if isinstance(output, (tuple, list)) and not hasattr(output, "loss"):
        first = output[0] if output else None
        return first if isinstance(first, Tensor) and first.dim() == 0 else None  # and not the logits
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def _losses_in(output: Any, code: str) -> tuple[str, str]:
    """Returns what an output is, in words, and the code for the sum of the numbers in it, or "" if there are none."""
    kind, values = type(output).__name__, dict(output) if isinstance(output, Mapping) else {}
    names = [str(name) for name, value in values.items() if isinstance(value, Tensor) and value.dim() == 0]
    if not names:
        return kind, ""
    if len(names) == 1:
        return f"{kind} with {names[0]}", f"{code}[{names[0]!r}]"
    every = f"{code}.values()" if len(names) == len(values) else f"{code}[name] for name in {names}"
    return f"{kind} with {_listed(names)}", f"sum({every})"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def check_loss(loss: Any, where: str) -> None:
    """Raises ValueError unless the loss of a batch is one number with a graph."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return
    if isinstance(loss, Tensor):
        got, code = f"shape {tuple(loss.shape)}, {loss.requires_grad=}", ""
    else:
        got, code = _losses_in(loss, "output")
    remedy = f"return {code}" if code else "reduce it by .mean(), and do not detach it"
    raise ValueError(
        f"estimate_fisher: {where}: the loss must be a tensor of one number with a graph (got {got}); {remedy}"
    )


def check_finite(losses: Tensor, batch: Any, where: str) -> None:
    """Raises NotFiniteError if a loss of a batch is not finite; `where` names the batch."""
    losses = losses.detach()
    losses = losses.to_local() if is_sharded(losses) else losses
    if not torch.isfinite(losses).all():
        cause = "its labels are all -100, which losses leave out" if _all_ignored(batch) else "look for the cause there"
        raise NotFiniteError(
            f"estimate_fisher: {where}: the loss must be finite (got {losses.flatten().tolist()}); {cause}, or pass "
            "on_nonfinite='skip' to leave it out"
        )


def _all_ignored(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.numel() > 0 and bool((labels == -100).all())


# ---- What went wrong -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explaining_loss(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, where: str
) -> Iterator[None]:
    """Adds the remedy to an error that the loss of a batch raises, or `check_loss` for it.

    If the model was in evaluation mode, the loss is computed once more in training mode, to see whether it is then one.

    Raises:
        TypeError: the batch is not collated, as far as can be told.
        ValueError: the model computes its loss in training mode only.
        RuntimeError: a recurrent layer must be in training mode.
    """
    try:
        yield
    except Exception as error:
        _explain_rnn(error, model, where)
        fault = "" if str(error).startswith((_OURS, _OF_OTHERS)) else _not_collated(batch, error)
        if fault:
            raise TypeError(f"{_OURS}{where}: {fault}") from error
        if not model.training and not isinstance(error, torch.OutOfMemoryError):
            _explain_mode(error, model, loss_fn, batch, where)
        raise


@contextlib.contextmanager
def explaining_backward(model: nn.Module, where: str) -> Iterator[None]:
    """Adds the remedy to an error of the backward pass of a batch.

    Raises:
        RuntimeError: a recurrent layer must be in training mode.
    """
    try:
        yield
    except RuntimeError as error:
        _explain_rnn(error, model, where)
        raise


def _explain_rnn(error: Exception, model: nn.Module, where: str) -> None:
    if _RNN not in str(error):
        return
    remedy = "estimate inside of `with torch.backends.cudnn.flags(enabled=False):`"
    if not model.training:  # else the layer is in evaluation mode by itself, and stays so
        remedy = f"pass train_mode=True, or, without dropout, {remedy}"
    raise RuntimeError(
        f"estimate_fisher: {where}: recurrent layers on a GPU must be in training mode for a backward pass, also "
        f"frozen ones (got one in evaluation mode); {remedy}"
    ) from error


def _explain_mode(
    error: Exception, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, where: str
) -> None:
    if any(map(is_sharded, model.parameters())):  # other ranks may not compute the loss again
        if str(error).startswith(_OURS):
            remedy = "or train_mode=True, if the model computes its loss in training mode only"
            raise type(error)(f"{error}; {remedy}") from error
        return
    model.train()
    try:
        check_loss(loss_fn(model, batch), where)
    except Exception:
        return
    finally:
        model.eval()  # who catches the error may go on with the model
    raise ValueError(
        f"estimate_fisher: {where}: in evaluation mode the model must compute its loss (got "
        f"{type(error).__name__}, and a loss in training mode only); pass train_mode=True"
    ) from error


def _not_collated(batch: Any, error: Exception | None = None) -> str:
    """Returns a sentence on a batch that its data loader should have put into tensors, or "" if it has.

    Args:
        batch: the batch.
        error: what it has led to, of which another kind speaks for another cause; None if it cannot be right
            (default: None).
    """
    got, signs = "", [TypeError, AttributeError]
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(one, Mapping) for one in batch):
        got, signs = f"a {type(batch).__name__} of {len(batch)} mappings", [*signs, ValueError]
        remedy = f"give the DataLoader {_COLLATOR}"
    elif isinstance(batch, Mapping) and _is_example(batch):
        got, signs = "labels without dimensions, as of one example", [*signs, ValueError, IndexError]
        remedy = f"pass a DataLoader with {_COLLATOR}"
    elif isinstance(batch, Mapping):
        got, remedy = _plain_values(batch)
    if not got or not (error is None or isinstance(error, tuple(signs))):
        return ""
    cause = "" if error is None else f"{type(error).__name__}; "
    return f"a batch must hold the tensors of several examples ({cause}got {got}); {remedy}"


def _is_example(batch: Mapping[Any, Any]) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and labels.dim() == 0 and any(tensor.dim() for tensor in tensors_of(batch))


def _plain_values(batch: Mapping[Any, Any]) -> tuple[str, str]:
    """Returns which values of a batch are strings, numbers or lists, also of tensors, and the remedy; "" if none is."""
    texts, lists, plain = (
        [str(name) for name, value in batch.items() if not isinstance(value, Tensor) and _holds(value, kinds)]
        for kinds in ((str, bytes), Tensor, (int, float, str, bytes))
    )
    if plain and not tensors_of(batch):
        return f"no tensors, but plain {_listed(plain)}", f"pass a DataLoader with {_COLLATOR}"
    if texts:
        return f"strings in {_listed(texts)}", "tokenize them, and leave them out by the data set's remove_columns()"
    if lists or plain:
        got = f"lists of tensors in {_listed(lists)}" if lists else f"plain {_listed(plain)}"
        return got, f"give the DataLoader {_COLLATOR}, which makes one tensor of each"
    return "", ""


def _holds(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Returns whether a value, or the first one in a list, at any depth, is of some classes."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, kinds)

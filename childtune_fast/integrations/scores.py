"""The Fisher scores of ChildTuningTrainer: of its training set, with the loss and in the precision of its training."""

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, set_seed

from ..arguments import is_sharded
from ..child.maskable import maskable_parameters
from ..fisher import estimate_fisher
from ..fisher.restore import leaving_random_states
from .config import ChildTuningConfig
from .records import in_copies

_DATA = ("train_dataset", "eval_dataset")  # attributes of a trainer that may be long lists


def fisher_scores(trainer: Trainer, config: ChildTuningConfig, epoch: int) -> dict[str, Tensor]:
    """Returns {parameter name: Fisher scores} of the maskable weights of a trainer's model, of all processes' data.

    They depend only on the weights, the data, the seed and the epoch. Those of whole parameters are the mean over all
    processes. Those of sharded parameters are DTensors of squares of gradients that are means over all processes.
    """
    model: Any = trainer.model  # which Trainer's annotations allow to be None
    with leaving_random_states(trainer, without=model), in_copies(trainer, _DATA):
        set_seed(trainer.args.seed + epoch)  # a resumed run has another random state here than an uninterrupted one
        batches: Any = trainer.get_train_dataloader()
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        try:
            scores = estimate_fisher(
                model,
                batches,
                loss_fn=lambda model, batch: _loss(trainer, model, batch),
                max_batches=config.fisher_batches,
                per_example=config.per_example,
                grad_clip=config.grad_clip,
                names=maskable_parameters(model, config.maskable).__contains__,
                train_mode=config.train_mode,
                on_nonfinite=config.on_nonfinite,
                progress=trainer.is_local_process_zero() and not trainer.args.disable_tqdm,
            )
        finally:
            if trainer.accelerator.gradient_state.active_dataloader is batches:
                batches.end()  # after max_batches or an error, accelerate would still take it for active
    if trainer.args.world_size == 1:
        return scores
    own = {name: tensor for name, tensor in scores.items() if not is_sharded(tensor)}
    return {**scores, **trainer.accelerator.reduce(own, reduction="mean")}


def _loss(trainer: Trainer, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Returns the loss of one batch that Trainer would train with, in the precision of its forward pass.

    With fp16 the precision is float32, because the estimation has no GradScaler. Under FSDP2 the model itself casts.
    """
    counts = {}
    if trainer.compute_loss_func is not None and "labels" in batch:
        # Trainer multiplies such a loss by the number of processes, since in training it counts the labels of all.
        processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
        counts["num_items_in_batch"] = (batch["labels"] != -100).sum() * processes
    as_it_is = trainer.args.fp16 or is_fsdp2(trainer)
    autocast = contextlib.nullcontext() if as_it_is else trainer.accelerator.autocast()
    with trainer.compute_loss_context_manager(), autocast:
        loss: Any = trainer.compute_loss(model, dict(batch), **counts)  # a copy, because labels may be popped
    return loss


def is_fsdp2(trainer: Trainer) -> bool:
    """Returns whether accelerate shards the model by FSDP2, which `train` does once the optimizer has been made."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 2

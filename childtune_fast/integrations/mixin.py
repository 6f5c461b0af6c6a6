"""ChildTuning: what makes a transformers.Trainer, of any subclass, train a child network of the weights."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, has_length
from transformers.utils import logging

from ..arguments import FilePath
from ..child import ChildNetwork
from ..optimizer import ChildAdamW
from .config import CHILD_FILE, ChildTuningConfig
from .metrics import clip_factor, metrics_of_choice
from .moments import Moments
from .scores import fisher_scores, is_fsdp2
from .search import Searched, check_arguments

logger = logging.get_logger(__name__)


class ChildTuning(Searched):
    """Mixin that gives a Trainer ChildAdamW instead of AdamW (Child-Tuning; Xu, Luo et al., EMNLP 2021, section 2).

    `ChildTuningTrainer` is transformers.Trainer with it. Any subclass of Trainer takes it as its first base:

        class ChildTuningSFTTrainer(ChildTuning, SFTTrainer): pass

    In mode "D" it estimates the Fisher scores on the training set before the first step, with the loss that it trains
    with, and chooses the child network. It then restores the random states, so that training has the same data order
    and dropout as in mode "F" and in Trainer. Every checkpoint and saved model contains the child network in
    `child.safetensors`, and a resumed run loads it from there. With several processes, the scores are the mean over all
    processes. With FSDP2, which mode "D" needs if parameters are sharded, they are estimated on the shards: they are
    then of gradients that are means over all processes, as if these had one larger batch.

    With `refresh_every="epoch"`, the child network is chosen again at the start of each later epoch. The state of the
    parameters that it masks then begins again, step count included: else weights that enter would have empty averages
    and an old step count, which does not correct their bias, and would move by several times the learning rate. Weights
    that leave keep their value. `load_best_model_at_end=True` loads the best checkpoint's again.

    In `hyperparameter_search`, `hp_space` may name options of ChildTuningConfig beside those of TrainingArguments; each
    trial has them in `child_tuning`, which is afterwards what it was. `seed` is that of TrainingArguments. A name that
    neither has raises, unless `model_init` or `child_tuning` is a function of the trial, which may read it.

    Args:
        args, kwargs: arguments of the Trainer. `optimizers` and `optimizer_cls_and_kwargs` must be left out, and
            `optim` of the TrainingArguments must be one of torch's AdamW, whose learning rate, betas and epsilon are
            used.
        child_tuning: ChildTuningConfig with the options of Child-Tuning; or a function that returns one for a trial of
            `hyperparameter_search`, and for None, which stands for no trial, as in `model_init`.

    Attributes:
        child_tuning: the present ChildTuningConfig; another one holds from the next call of `train` on.
        child_network: in mode "D", the present ChildNetwork, from the start of `train` on; otherwise None.

    Raises:
        ImportError: transformers 4.47 or newer, or accelerate, is not installed (when this module is imported).
        ValueError: an argument or a combination of arguments cannot be honoured.
        TypeError: `child_tuning` is no ChildTuningConfig, or does not return one.
    """

    model: Any  # which Trainer's annotations allow to be None

    def __init__(
        self, *args: Any, child_tuning: ChildTuningConfig | Callable[[Any], ChildTuningConfig], **kwargs: Any
    ) -> None:
        super().__init__(*args, child_tuning=child_tuning, **kwargs)
        self.child_network: ChildNetwork | None = None
        self._checkpoint: FilePath | None = None  # the checkpoint that the present training resumes from
        self._made_with: ChildTuningConfig | None = None  # what the optimizer was made with
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                "ChildTuning: optimizers and optimizer_cls_and_kwargs must be left out, for it makes its own "
                "ChildAdamW (got one of them); use Trainer with optimizer_cls_and_kwargs=(ChildAdamW, {...}) instead"
            )
        self._check_supported()
        self._moments = Moments(self)
        self.add_callback(self._moments)

    def _check_supported(self) -> None:
        sharded, config = is_fsdp2(self), self.child_tuning
        if config.mode == "F":
            return
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not sharded):
            raise ValueError(
                "ChildTuning: mode='D' needs whole parameters or FSDP2's shards (got "
                f"{'DeepSpeed' if self.is_deepspeed_enabled else 'FSDP version 1'}, which flattens parameters); use "
                "FSDP2, by TrainingArguments(fsdp=True, fsdp_config={'version': 2}) or accelerate's fsdp_version: 2"
            )
        if sharded and config.per_example:
            raise ValueError(
                "ChildTuning: per_example must be False under FSDP2 (got True), whose gradients are means over "
                "all processes; leave it out"
            )
        if self.args.fp16 and (sharded or config.refresh_every is not None):
            raise ValueError(
                "ChildTuning: fp16 must be False with FSDP2 in mode='D', and with refresh_every (got True), for "
                "squares of unscaled float16 gradients underflow; use bf16=True"
            )

    # ---- What Trainer calls ----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, and returns what Trainer.train returns.

        Args:
            resume_from_checkpoint: folder of a checkpoint to resume from, or True for the last one in the output
                folder; None begins a new training (default: None).
            *args: further positional arguments of Trainer.train.
            **kwargs: further keyword arguments of Trainer.train.

        Raises:
            ValueError: the checkpoint is of another mode, or an option of ChildTuningConfig is in TrainingArguments.
        """
        check_arguments(self.args)
        if resume_from_checkpoint is True:  # stays True if there is no checkpoint, for which Trainer has an error
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        self._checkpoint = None if isinstance(resume_from_checkpoint, bool) else resume_from_checkpoint
        if self._checkpoint is not None or self._made_with != replace(self.child_tuning, log_every=None):
            self.optimizer = None  # one of an earlier call may have another child network, or other options
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._moments.end()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Returns the ChildAdamW over Trainer's parameter groups; chooses the child network first in mode "D".

        With FSDP2 the child network is chosen at the beginning of the training instead, when the model is sharded.

        Raises:
            ValueError: `optim` of the TrainingArguments is not one of torch's AdamW, or options cannot be honoured.
        """
        if self.optimizer is None:
            self._check_supported()  # options and arguments may have changed since the trainer was made
            try:
                optimizer_cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            except ImportError:  # of another optimizer's package
                optimizer_cls, options = None, {}
            if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.AdamW)):
                raise ValueError(
                    "ChildTuning: TrainingArguments(optim=) must be one of torch's AdamW, which ChildAdamW takes the "
                    f"place of (got {self.args.optim!r}); leave it out; for 8 bits, ChildTuningConfig(state='8bit')"
                )
            self._made_with = replace(self.child_tuning, log_every=None)
            self.child_network = self._first_child()
            self.optimizer_cls_and_kwargs = ChildAdamW, {**options, **self._child_options()}
        return super().create_optimizer(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what Trainer.compute_loss returns; explains the error of a model that returns no loss.

        Raises:
            ValueError: the model cannot compute a loss because the batch has no labels, or returns several losses.
        """
        keys = list(inputs)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        except ValueError as error:
            returned = str(error).partition("following keys: ")[2].partition(". For reference")[0]  # Trainer's words
            if "loss" in returned:
                raise ValueError(
                    f"ChildTuning: the model must return one loss, named loss (got {returned}); override "
                    "compute_loss, and return the sum of the losses"
                ) from error
            if any(name in keys for name in self.label_names):
                raise
            raise ValueError(
                f"ChildTuning: batches must have labels, under the name {self.label_names or ['labels']}, for "
                f"the model to compute a loss (got {', '.join(keys)}); add them to the data, or rename their column"
            ) from error

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Saves the model as Trainer does, and beside it `child.safetensors`; mode "F" removes that of an earlier run.

        Args:
            output_dir: folder to write to; None takes `TrainingArguments.output_dir` (default: None).
            *args: further positional arguments of Trainer.save_model.
            **kwargs: further keyword arguments of Trainer.save_model.
        """
        path = Path(str(self.args.output_dir if output_dir is None else output_dir), CHILD_FILE)
        if self.child_network is not None and self.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.child_network.save(path)
        elif self.child_tuning.mode == "F" and self.args.should_save:
            path.unlink(missing_ok=True)  # that of an earlier run in this folder
        super().save_model(output_dir, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as Trainer does; with `log_every` also `child/clip_factor`, which follows from its `grad_norm`."""
        if self.child_tuning.log_every is not None and "grad_norm" in logs and (self.args.max_grad_norm or 0) > 0:
            logs = {**logs, "child/clip_factor": clip_factor(logs["grad_norm"], self.args.max_grad_norm)}
        super().log(logs, *args, **kwargs)

    # ---- The child network -----------------------------------------------------------------------------------------

    def _child_options(self) -> dict[str, Any]:
        """Returns the arguments of ChildAdamW that AdamW does not have."""
        config = self.child_tuning
        options: dict[str, Any] = {n: getattr(config, n) for n in ("decay", "variant", "state", "rounding")}
        if config.mode == "D" and self.child_network is None:  # it comes later, and with it "auto" becomes "child"
            return {**options, "decay": "all" if config.decay == "all" else "auto", "reserve_p": 1.0}
        if config.mode == "D":
            return {**options, "child": self.child_network}
        seed = self.args.seed if config.seed is None else config.seed
        return {**options, "reserve_p": config.reserve_p, "seed": seed}

    def _first_child(self) -> ChildNetwork | None:
        """Returns the first child network: None in mode "F", else that of the checkpoint, else one that it chooses.

        With FSDP2 it returns None instead of choosing: see `begin_child`.
        """
        path = None if self._checkpoint is None else os.path.join(self._checkpoint, CHILD_FILE)
        found = path is not None and os.path.isfile(path)
        if self.child_tuning.mode == "F":
            if found:
                raise ValueError(
                    f"ChildTuning: mode='F' must resume from a checkpoint without a child network (got "
                    f"'{path}'); resume with mode='D', or begin a new run from the checkpoint's model"
                )
            return None
        if path is None:
            return None if is_fsdp2(self) else self._chosen_child(epoch=0)
        if not found:
            raise ValueError(
                f"ChildTuning: mode='D' must resume from a checkpoint with its child network (got no '{path}'), "
                "for one that is chosen now would be another; resume with the mode that saved it, or begin a new run "
                "from the checkpoint's model"
            )
        return ChildNetwork.load(path, self.model)

    def _chosen_child(self, epoch: int) -> ChildNetwork:
        """Returns a child network chosen by scores of the present weights."""
        config = self.child_tuning
        if config.refresh_every is not None and not has_length(self.train_dataset):
            raise ValueError(
                "ChildTuning: refresh_every='epoch' needs a training set with a length, whose epochs are known "
                f"(got {type(self.train_dataset).__name__}); leave it None"
            )
        scores = fisher_scores(self, config, epoch)
        child = ChildNetwork.from_scores(
            self.model, scores, reserve_p=config.reserve_p, scope=config.scope, maskable=config.maskable
        )
        logger.info(f"Child network of epoch {epoch}: {child!r}")
        return child

    def begin_child(self) -> None:
        """Chooses the first child network if that had to wait until the model was sharded, and logs the first one.

        Trainer makes the optimizer before, and then one process may not have memory, or weights, for the whole model.
        """
        if self.child_tuning.mode == "D" and self.child_network is None:
            self._replace_child(self._chosen_child(epoch=0))
        if self.child_network is not None:
            self.log_child(metrics_of_choice(self.child_network))

    def refresh_child(self) -> None:
        """Chooses the child network again if a later epoch begins, but not if one continues after a resume."""
        epoch = self.state.epoch or 0
        if self.child_tuning.refresh_every is not None and epoch and epoch == int(epoch):
            before = self.child_network
            child = self._chosen_child(int(epoch))
            self._replace_child(child)
            self.log_child(metrics_of_choice(child, before))

    def take_best_child(self) -> None:
        """Takes the child network of the best checkpoint, whose weights Trainer has loaded by now.

        The optimizer needs the same one on every process, so the present one stays unless each of them finds the file.
        """
        best, present = self.state.best_model_checkpoint, self.child_network
        path = os.path.join(best or "", CHILD_FILE)
        found = torch.tensor([best is not None and os.path.isfile(path)], device=self.accelerator.device)
        if self.accelerator.gather(found).all():
            child = ChildNetwork.load(path, self.model)
            if present is None or child.fingerprint != present.fingerprint:  # else the optimizer keeps its state
                self._replace_child(child)
        elif best is not None:
            logger.warning(f"Not every process finds '{path}', so that the child network stays that of the last step")

    def log_child(self, numbers: dict[str, float]) -> None:
        """Logs through Trainer's loggers, past a subclass: SFTTrainer's `log` begins new means at each call."""
        due = self.control.should_log  # which Trainer takes for done with any log
        Trainer.log(self, numbers)
        self.control.should_log = due

    def _replace_child(self, child: ChildNetwork) -> None:
        self.child_network = child
        self.child_optimizer.replace_child(child)

    @property
    def child_optimizer(self) -> ChildAdamW:
        """The optimizer, once the training has begun, without what accelerate wraps it in."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

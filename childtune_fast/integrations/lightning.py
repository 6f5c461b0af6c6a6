"""ChildTuningCallback: Child-Tuning_D in Lightning's Trainer. Child-Tuning_F needs no more than the optimizer."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        f"childtune_fast.integrations.lightning needs lightning 2.2 or newer (got: {error}); pip install "
        "'childtune-fast[lightning]'"
    ) from error

from ..arguments import Selector, is_sharded
from ..child import ChildNetwork
from ..child.choice import Scope
from ..child.maskable import maskable_parameters
from ..fisher import estimate_fisher
from ..fisher.estimation import OnNonfinite
from ..ops.packed_mask import PackedMask
from ..optimizer import ChildAdamW
from .config import ChildTuningConfig
from .metrics import StepLog, metrics_of_choice
from .records import in_copies

__all__ = ["ChildTuningCallback"]


class ChildTuningCallback(Callback):
    """Chooses the child network of Child-Tuning_D (Xu, Luo et al., EMNLP 2021) when Lightning's Trainer begins to fit.

    `configure_optimizers` returns a ChildAdamW without a child network; this gives it one before the first step. The
    Fisher scores are of the loss that `training_step` returns, over the training data, in evaluation mode unless
    `train_mode`, and in the precision of the training, or in float32 where that is "16-mixed". What the step logs and
    collects in the module's lists and dicts meanwhile is dropped, torchmetrics are reset, and weights, buffers and
    random states are afterwards what they were.

    Checkpoints hold the child network, and a fit that resumes by `ckpt_path` has it from there. With several processes,
    the scores are the mean over all of them. Loggers get the density by layer, as `metrics_of_choice` has it.

        trainer = lightning.Trainer(callbacks=[ChildTuningCallback(reserve_p=0.3)])

    Args:
        reserve_p: share of the maskable weights in the child network, in (0, 1] (default: 0.3).
        fisher_batches: number of training batches to estimate the scores on; None takes all of an epoch
            (default: None).
        per_example: squares each example's gradient, as in the paper's formula; False squares each batch's
            (default: False).
        grad_clip: limit of each tensor's gradient norm, to which the gradient is scaled before it is squared; None does
            not clip (default: None).
        train_mode: estimates the scores with dropout on (default: False).
        on_nonfinite: "skip" leaves batches, or examples, whose loss or gradient is not finite out of the scores, with a
            warning; "raise" raises a ValueError (default: "raise").
        scope: "global" chooses among all maskable weights together; "tensor" keeps the share in each tensor
            (default: "global").
        maskable: selects the maskable parameters: a predicate over names, which are those of the LightningModule, or a
            regular expression that is searched in them; None takes the weights of the repeated transformer blocks
            (default: None).
        log_every: number of steps from one log of what a step does to the next, as `StepLog` has it; None logs none
            (default: None).

    Attributes:
        child_network: the ChildNetwork, once it has been chosen or restored; before None.

    Raises:
        ImportError: lightning is not installed (when this module is imported).
        ValueError: an argument is out of its range; or, when the fit begins, the module cannot be trained so.
        TypeError: an argument has a wrong type.
    """

    def __init__(
        self,
        *,
        reserve_p: float = 0.3,
        fisher_batches: int | None = None,
        per_example: bool = False,
        grad_clip: float | None = None,
        train_mode: bool = False,
        on_nonfinite: OnNonfinite = "raise",
        scope: Scope = "global",
        maskable: Selector = None,
        log_every: int | None = None,
    ) -> None:
        self._config = ChildTuningConfig(
            mode="D",
            reserve_p=reserve_p,
            fisher_batches=fisher_batches,
            per_example=per_example,
            grad_clip=grad_clip,
            train_mode=train_mode,
            on_nonfinite=on_nonfinite,
            scope=scope,
            maskable=maskable,
            log_every=log_every,
        )
        self._steps: list[StepLog] = []
        self.child_network: ChildNetwork | None = None
        self._trainer: Trainer | None = None  # while it fits, from the moment at which it has its optimizers
        self._missing = False  # whether the present fit resumes from a checkpoint that this callback did not write to
        self._restored: dict[str, Any] | None = None  # what a checkpoint had of the present fit's child network

    # ---- What Lightning calls --------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins a fit without anything of an earlier one, whose checkpoint is not read yet."""
        if stage == "fit":
            self._end()
            self.child_network = None
            self._missing = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the trainer, and with it the fit that has ended."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Does what `teardown` does, which Lightning does not call then."""
        self._end()

    def _end(self) -> None:
        for steps in self._steps:
            steps.remove()
        self._steps, self._trainer, self._restored = [], None, None

    def state_dict(self) -> dict[str, Any]:
        """Returns the child network, for a checkpoint: the bits of its masks and their shapes, by parameter name."""
        packed = {} if self.child_network is None else self.child_network.packed
        bits = {name: mask.bits.cpu() for name, mask in packed.items()}
        return {"bits": bits, "shapes": {name: list(mask.shape) for name, mask in packed.items()}}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes a checkpoint that this callback did not write to; those of Lightning's finders it did."""
        self._missing = self.state_key not in checkpoint["callbacks"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the child network of a checkpoint; its optimizer state is read afterwards, and must find the masks.

        Lightning calls it before there are optimizers, under some strategies afterwards.
        """
        self._restored = state_dict if state_dict["bits"] else None
        if self._trainer is not None:
            self._put_back(self._trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives a new optimizer the child network of the checkpoint, before its state is read.

        Raises:
            ValueError: no optimizer is a ChildAdamW, or the checkpoint is of another model.
        """
        _optimizers(trainer)
        self._trainer = trainer
        self._put_back(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the child network, unless a checkpoint had one.

        Raises:
            ValueError: the checkpoint has no child network; the module optimizes by itself, or there is not one loader
                of batches; and what `estimate_fisher` and `ChildNetwork.from_scores` raise.
        """
        if self._missing:
            raise ValueError(
                "ChildTuningCallback: a fit must resume from a checkpoint with its child network (got none in "
                f"'{trainer.ckpt_path}'), for one that is chosen now would be another; resume with the callbacks that "
                "saved it, or load the weights alone and begin a new fit"
            )
        if self._restored is None:
            scores = self._scores(trainer, pl_module)
            config = self._config
            child = ChildNetwork.from_scores(
                pl_module, scores, reserve_p=config.reserve_p, scope=config.scope, maskable=config.maskable
            )
            self._give(trainer, child)
        if self.child_network is not None:
            self._log(trainer, metrics_of_choice(self.child_network), trainer.global_step)
        if self._config.log_every is not None:
            begun = trainer.global_step
            self._steps = [
                StepLog(
                    optimizer,
                    lambda numbers, step: self._log(trainer, numbers, begun + step - 1),
                    every=self._config.log_every,
                )
                for optimizer in _optimizers(trainer)
            ]

    def _log(self, trainer: Trainer, numbers: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)

    # ---- The child network -----------------------------------------------------------------------------------------

    def _put_back(self, trainer: Trainer) -> None:
        if self._restored is None:
            return
        bits, shapes = self._restored["bits"], self._restored["shapes"]
        masks = {name: PackedMask(shapes[name], bits[name]).unpack() for name in bits}
        self._give(trainer, ChildNetwork.from_masks(trainer.lightning_module, masks))

    def _give(self, trainer: Trainer, child: ChildNetwork) -> None:
        for optimizer in _optimizers(trainer):
            optimizer.replace_child(child)
        self.child_network = child

    def _scores(self, trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
        """Returns {parameter name: Fisher scores} of the maskable weights, of all processes' data."""
        config = self._config
        loader: Any = trainer.train_dataloader
        if not module.automatic_optimization:
            raise ValueError(
                "ChildTuningCallback: the module must leave the optimization to Lightning, so that training_step "
                "returns a loss (got automatic_optimization=False); choose the child network yourself, and give it to "
                "ChildAdamW(child=...) in configure_optimizers"
            )
        if isinstance(loader, (dict, list, tuple)):
            raise ValueError(
                f"ChildTuningCallback: there must be one loader of training batches (got a {type(loader).__name__} of "
                "them); choose the child network yourself, and give it to ChildAdamW(child=...) in configure_optimizers"
            )
        if config.fisher_batches is None and trainer.num_training_batches == float("inf"):
            raise ValueError(
                "ChildTuningCallback: fisher_batches must say how many batches to score where the training data has no "
                "length (got None)"
            )
        with _apart(trainer, module):
            scores = estimate_fisher(
                module,
                loader,
                loss_fn=lambda module, batch: _loss(trainer, module, batch),
                max_batches=config.fisher_batches or int(trainer.num_training_batches),
                per_example=config.per_example,
                grad_clip=config.grad_clip,
                names=maskable_parameters(module, config.maskable).__contains__,
                train_mode=config.train_mode,
                on_nonfinite=config.on_nonfinite,
                progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            )
        whole = {name: tensor for name, tensor in scores.items() if not is_sharded(tensor)}
        return {**scores, **{name: trainer.strategy.reduce(tensor, reduce_op="mean") for name, tensor in whole.items()}}


def _optimizers(trainer: Trainer) -> list[ChildAdamW]:
    found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, ChildAdamW)]
    if not found:
        got = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "no optimizer"
        raise ValueError(f"ChildTuningCallback: configure_optimizers must return a ChildAdamW (got {got})")
    return found


def _loss(trainer: Trainer, module: Any, batch: Any) -> Tensor:
    """Returns the loss of one batch that Lightning would train with, in the precision of its forward pass."""
    plugin, step = trainer.precision_plugin, module.training_step
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        raise ValueError("ChildTuningCallback: training_step must take a batch (got one that takes dataloader_iter)")
    batch = trainer.strategy.batch_to_device(plugin.convert_input(batch), dataloader_idx=0)
    index = (0,) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()
    # "16-mixed" scales the loss so that gradients do not underflow, which squares of them would all the more.
    context = contextlib.nullcontext() if plugin.precision == "16-mixed" else plugin.train_step_context()
    with context:
        output = step(batch, *index)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"ChildTuningCallback: training_step must return a loss for every batch (got {type(loss).__name__}); use "
            "on_nonfinite='skip' and a loss that is not finite to leave one out"
        )
    return loss


@contextlib.contextmanager
def _apart(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Drops what a module logs and collects meanwhile, and resets its metrics in the end.

    Lightning allows `log` in its own loops only.
    """

    def drop(*args: Any, **kwargs: Any) -> None:
        pass

    loggers = trainer.loggers
    with in_copies(module, without=vars(LightningModule())):
        vars(module).update(log=drop, log_dict=drop)
        trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            trainer.loggers = loggers
            for part in module.modules():
                if isinstance(part, Metric):
                    part.reset()

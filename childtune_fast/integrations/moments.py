"""What ChildTuning does at certain moments of a training."""

from typing import Any

from transformers import TrainerCallback

from .metrics import StepLog


class Moments(TrainerCallback):
    """Tells a trainer when its child network may have to become another, and logs what steps do."""

    def __init__(self, trainer: Any) -> None:
        """Holds the trainer, which is a `ChildTuning`."""
        self._trainer = trainer
        self._steps: StepLog | None = None
        self._numbers: dict[str, float] = {}  # of a step that the trainer has not counted yet

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Chooses the first child network, where that could not be done before."""
        self.end()
        trainer = self._trainer
        trainer.begin_child()
        if trainer.child_tuning.log_every is not None:
            self._steps = StepLog(
                trainer.child_optimizer,
                # Trainer logs the norm itself, and has clipped the gradients by now.
                lambda numbers, step: self._numbers.update({"child/moved": numbers["child/moved"]}),
                every=trainer.child_tuning.log_every,
            )

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Logs the numbers of a step under the step's own number."""
        if self._numbers:
            numbers, self._numbers = self._numbers, {}
            self._trainer.log_child(numbers)

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Chooses the child network again, if that was asked for."""
        self._trainer.refresh_child()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Takes the child network of the best checkpoint, if its weights were loaded."""
        trainer = self._trainer
        if trainer.child_tuning.mode == "D" and trainer.args.load_best_model_at_end:
            trainer.take_best_child()

    def end(self) -> None:
        """Ends the logging of steps, also of a training that has been interrupted."""
        if self._steps is not None:
            self._steps.remove()
        self._steps, self._numbers = None, {}

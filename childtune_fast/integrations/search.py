"""Options of Child-Tuning among the hyperparameters that Trainer.hyperparameter_search tries."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments
from transformers.trainer_utils import number_of_arguments

from ..arguments import check_type, shown
from .config import ChildTuningConfig

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the class that has ChildTuning for its first base has the Trainer as its second

_OF_BACKENDS = ("wandb", "_wandb")  # which W&B and Ray add to the dict of a trial
_OPTIONS = tuple(field.name for field in fields(ChildTuningConfig))


def _split(
    params: Mapping[str, Any], args: TrainingArguments, *, any_key: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of Child-Tuning among a trial's hyperparameters, and the others.

    Args:
        params: {name: value}, what `hp_space` gave.
        args: Trainer's arguments. A name that they have is theirs: `seed` is.
        any_key: allows names that neither has, because a function of the trial may read them.

    Raises:
        ValueError: neither the arguments nor ChildTuningConfig has a name.
    """
    ours = {name: value for name, value in params.items() if name in _OPTIONS and not hasattr(args, name)}
    others = {name: value for name, value in params.items() if name not in ours}
    unknown = [name for name in others if not hasattr(args, name) and name not in _OF_BACKENDS]
    if unknown and not any_key:
        raise ValueError(
            "ChildTuning: hp_space must name fields of TrainingArguments, or of ChildTuningConfig, which are "
            f"{', '.join(_OPTIONS)} (got {', '.join(map(shown, unknown))}, which would change nothing)"
        )
    return ours, others


def check_arguments(args: TrainingArguments) -> None:
    """Refuses an option of Child-Tuning that was set on Trainer's arguments, as one does with the best trial's.

    Raises:
        ValueError: the arguments have such an attribute, and their class does not.
    """
    own = {field.name for field in fields(args)}
    for name in _OPTIONS:
        if name not in own and hasattr(args, name):
            raise ValueError(
                f"ChildTuning: TrainingArguments has no {name}, so that it would change nothing (got "
                f"{shown(getattr(args, name))}); remove it, and write trainer.child_tuning = "
                f"dataclasses.replace(trainer.child_tuning, {name}=...)"
            )


def _checked(config: Any) -> ChildTuningConfig:
    noun = "a ChildTuningConfig, or a function that returns one"
    check_type("ChildTuning: child_tuning", config, ChildTuningConfig, noun)
    return config


class Searched(_Trainer):
    """Base of `ChildTuning`, which documents it: the options, which the trials of a search may change."""

    def __init__(
        self, *args: Any, child_tuning: ChildTuningConfig | Callable[[Any], ChildTuningConfig], **kwargs: Any
    ) -> None:
        self._config_of_trial: Callable[[Any], ChildTuningConfig] | None = None
        if callable(child_tuning) and not isinstance(child_tuning, type):
            self._config_of_trial, child_tuning = child_tuning, child_tuning(None)
        self.child_tuning = _checked(child_tuning)
        super().__init__(*args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what Trainer.hyperparameter_search returns; trials may differ in options of Child-Tuning, too.

        Args:
            *args: positional arguments of Trainer.hyperparameter_search.
            **kwargs: keyword arguments of Trainer.hyperparameter_search. `hp_space` may also give options of
                ChildTuningConfig.

        Raises:
            ValueError: `hp_space` gives a name that is no hyperparameter, or a value that an option cannot have.
        """
        self._without_trial = self.child_tuning
        try:
            return super().hyperparameter_search(*args, **kwargs)
        finally:
            self.child_tuning = self._without_trial

    def _hp_search_setup(self, trial: Any) -> None:
        """Sets the hyperparameters of a trial, those of Child-Tuning here and the others in Trainer."""
        if trial is None or self.hp_search_backend is None:
            super()._hp_search_setup(trial)
            return
        of_trial = self._config_of_trial
        space: Callable[[Any], Mapping[str, Any]] = self.hp_space
        params = trial if isinstance(trial, Mapping) else space(trial)  # optuna's trial suggests; others are the values
        any_key = of_trial is not None or number_of_arguments(self.model_init) == 1
        ours, others = _split(params, self.args, any_key=any_key)
        self.hp_space = lambda trial: others
        try:
            super()._hp_search_setup(others if params is trial else trial)
        finally:
            self.hp_space = space
        self._trial = trial
        config = self._without_trial if of_trial is None else _checked(of_trial(trial))
        self.child_tuning = config.changed(ours)

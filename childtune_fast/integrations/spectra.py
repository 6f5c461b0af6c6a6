"""SpectraCallback: the spectra of a model's layers as transformers' Trainer trains it."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from ..arguments import FilePath, check_type
from ..spectra import Spectra, analyze, plot_alpha
from ..spectra.layers import of_module
from ..spectra.pictures import check_picture

_PICTURE = "alpha.png"


class SpectraCallback(TrainerCallback):
    """Analyses the model before, while and after Trainer trains it, in float32, and changes nothing in the training.

    Each time it writes `step-000123.json`, which `Spectra.from_json` reads; at the end also `alpha.png`, the first and
    the last laid over each other. With several processes, the first one does so. What `load_best_model_at_end` loads
    is not analysed again.

        trainer.add_callback(SpectraCallback("spectra", every="epoch"))

    Args:
        folder: where the files are written; it is made if it is not there.
        every: "epoch", or a number of steps (default: "epoch").
        null: how many times each layer is shuffled, as `spectra.analyze` has it (default: 0).

    Attributes:
        found: {training step: Spectra}.

    Raises:
        ValueError: `every` is neither "epoch" nor a positive number; or, when the training begins, no layer can be
            analysed, as where parameters are sharded over processes.
        ImportError: matplotlib is not installed.
        OSError: a file cannot be written.
    """

    def __init__(self, folder: FilePath, *, every: Literal["epoch"] | int = "epoch", null: int = 0) -> None:
        check_type("SpectraCallback: folder", folder, (str, os.PathLike), "a path")
        if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"SpectraCallback: every must be 'epoch' or a number of steps (got {every!r})")
        self.folder, self.every, self.null = Path(folder), every, null
        check_picture(self.folder / _PICTURE)  # which needs matplotlib: said now, and not when the training is done
        self.found: dict[int, Spectra] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: D102
        source = of_module(kwargs["model"], split_fused=False)
        if not source.layers:  # raised on all processes, for the others would wait for the first
            name, reason = next(iter(source.skipped.items()), ("all", "none has two dimensions"))
            raise ValueError(
                f"SpectraCallback: the model must have a layer that can be analysed (got '{name}': {reason})"
            )
        self.found = {}
        self._look(state, kwargs["model"])

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: D102
        # The last step is looked at here: after it, Trainer may put the weights of the best checkpoint back.
        last = state.global_step == state.max_steps or control.should_training_stop
        if last or (self.every != "epoch" and state.global_step % self.every == 0):
            self._look(state, kwargs["model"])

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.every == "epoch":
            self._look(state, kwargs["model"])

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: D102
        fitted = [step for step, found in self.found.items() if found.summary()["fitted"]]
        if fitted:
            shown = {f"step {step}": self.found[step] for step in (fitted[0], fitted[-1])}
            plot_alpha(shown, self.folder / _PICTURE)

    def _look(self, state: TrainerState, model: nn.Module) -> None:
        """Analyses the model, unless that was done after this step, and writes a file."""
        if state.global_step in self.found or not state.is_world_process_zero:
            return
        spectra = analyze(model, dtype=torch.float32, null=self.null, progress=False)
        self.found[state.global_step] = spectra
        self.folder.mkdir(parents=True, exist_ok=True)
        spectra.to_json(self.folder / f"step-{state.global_step:06}.json")

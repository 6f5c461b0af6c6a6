"""ChildTuningConfig: the options of Child-Tuning for a trainer, checked when they are given."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ..arguments import Selector, check_seed, predicate, shown
from ..child.choice import Scope
from ..fisher.estimation import OnNonfinite
from ..ops.random_mask import keep_threshold
from ..ops.step_group import State
from ..optimizer.collect import Decay, Rounding, Variant

CHILD_FILE = "child.safetensors"  # name of the child network's file in the folder of a checkpoint or a saved model
Mode = Literal["F", "D"]
_ONLY_D = (
    "fisher_batches", "per_example", "grad_clip", "train_mode", "on_nonfinite", "scope", "maskable", "refresh_every",
)  # fmt: skip
_ONLY_F = ("seed",)


@dataclass(frozen=True, kw_only=True)
class ChildTuningConfig:
    """Options of Child-Tuning (Xu, Luo et al., EMNLP 2021, section 2), for `ChildTuningTrainer`.

    An option of the other mode must keep its default value.

    Attributes:
        mode: "F" trains a random child network in each step; "D" trains in all steps the child network of the weights
            with the highest Fisher scores. There is no default.
        reserve_p: share of the weights in the child network, in (0, 1]: in mode "F" of all weights, in mode "D" of the
            maskable ones (default: 0.3).
        decay: "all" decays every weight, "child" spares the maskable weights outside of the child network (mode "D"
            only); "auto" is "all" in mode "F" and "child" in mode "D" (default: "auto").
        variant: "torch" is torch.optim.AdamW's arithmetic; "hf" is that of the published code, which adds eps before
            the bias correction and decays after the update (default: "torch").
        state: how the optimizer's averages are stored: "float32"; "bfloat16"; or "8bit", one byte a value. See
            `ChildAdamW` (default: "float32").
        rounding: of bfloat16 and float16 weights: "nearest"; or "stochastic" (default: "nearest").
        seed: mode "F" only: integer of 64 bits that determines the random masks; None takes `TrainingArguments.seed`
            (default: None).
        fisher_batches: mode "D" only: number of batches of the training set to estimate the scores on; None takes all
            (default: None).
        per_example: mode "D" only: squares each example's gradient, as in the paper's formula; False squares each
            batch's (default: False).
        grad_clip: mode "D" only: limit of each tensor's gradient norm, to which the gradient is scaled before it is
            squared; None does not clip (default: None).
        train_mode: mode "D" only: estimates the scores with dropout on; False estimates them with dropout off
            (default: False).
        on_nonfinite: mode "D" only: "skip" leaves batches, or examples, whose loss or gradient is not finite out of the
            scores, with a warning; "raise" raises a ValueError (default: "raise").
        scope: mode "D" only: "global" chooses among all maskable weights together; "tensor" keeps the share in each
            tensor (default: "global").
        maskable: mode "D" only: selects the maskable parameters: a predicate over names, or a regular expression that
            is searched in them; None takes the weights of the repeated transformer blocks (default: None).
        refresh_every: mode "D" only: "epoch" chooses the child network again at the start of each later epoch; None
            keeps the first one (default: None).
        log_every: number of steps from one log of the share of the weights that a step moves to the next; see
            `integrations.metrics.StepLog`. Trainer's own logs then have `child/clip_factor` too. None logs none
            (default: None).

    Raises:
        ValueError: an option is out of its range, or the mode does not use it.
        TypeError: an option has a wrong type, or is unknown.
    """

    mode: Mode
    reserve_p: float = 0.3
    decay: Decay = "auto"
    variant: Variant = "torch"
    state: State = "float32"
    rounding: Rounding = "nearest"
    seed: int | None = None
    fisher_batches: int | None = None
    per_example: bool = False
    grad_clip: float | None = None
    train_mode: bool = False
    on_nonfinite: OnNonfinite = "raise"
    scope: Scope = "global"
    maskable: Selector = None
    refresh_every: Literal["epoch"] | None = None
    log_every: int | None = None

    def __post_init__(self) -> None:
        words = {"mode": Mode, "decay": Decay, "variant": Variant, "state": State, "rounding": Rounding, "scope": Scope}
        for name, choices in words.items():
            self._check_choice(name, *get_args(choices))
        self._check_choice("on_nonfinite", *get_args(OnNonfinite))
        self._check_choice("refresh_every", None, "epoch")
        self._check_options_of_mode()
        keep_threshold(self.reserve_p)
        if self.seed is not None:
            check_seed(self.seed)
        if self.maskable is not None:
            predicate(self.maskable, "ChildTuningConfig: maskable")
        for name in ("per_example", "train_mode"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"ChildTuningConfig: {name} must be True or False (got {shown(getattr(self, name))})")
        for name, none in (("fisher_batches", "the whole training set"), ("log_every", "no logs")):
            value = getattr(self, name)
            if value is not None and not (_is_number(value, int) and value >= 1):
                raise ValueError(
                    f"ChildTuningConfig: {name} must be a whole number above 0, or None for {none} (got {shown(value)})"
                )
        if self.grad_clip is not None and not (_is_number(self.grad_clip, (int, float)) and self.grad_clip > 0):
            raise ValueError(
                "ChildTuningConfig: grad_clip must be a number above 0, or None for no clipping of the gradients that "
                f"are squared (got {shown(self.grad_clip)})"
            )

    def changed(self, options: Mapping[str, Any]) -> "ChildTuningConfig":
        """Returns the configuration with other options. If the mode changes, those that it does not use are left out.

        Raises:
            ValueError: an option is out of its range, or the mode does not use it.
            TypeError: an option has a wrong type, or is unknown.
        """
        if options.get("mode", self.mode) == self.mode:
            return replace(self, **options)
        foreign = {*(_ONLY_D if options["mode"] == "F" else _ONLY_F)}
        if self.decay == "child":  # which F does not know
            foreign.add("decay")
        defaults = {field.name: field.default for field in fields(self) if field.name in foreign}
        return replace(self, **{**defaults, **options})

    def _check_choice(self, name: str, *choices: str | None) -> None:
        value = getattr(self, name)
        if not any(value == choice for choice in choices):
            raise ValueError(
                f"ChildTuningConfig: {name} must be {' or '.join(map(repr, choices))} (got {shown(value)})"
            )

    def _check_options_of_mode(self) -> None:
        foreign = _ONLY_D if self.mode == "F" else _ONLY_F
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in foreign and value != field.default:
                other = "D" if self.mode == "F" else "F"
                raise ValueError(
                    f"ChildTuningConfig: {field.name} must be left out with mode={self.mode!r}, which does not use it "
                    f"(got {shown(value)}); mode={other!r} does"
                )
        if self.mode == "F" and self.decay == "child":
            raise ValueError("ChildTuningConfig: decay='child' needs mode='D' (got mode='F'); use decay='all'")


def _is_number(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)

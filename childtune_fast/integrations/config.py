"""ChildTuningConfig: what a trainer needs to know of Child-Tuning, checked when it is made."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from ..arguments import Selector, check_seed, predicate
from ..child.choice import Scope
from ..ops.random_mask import keep_threshold
from ..optimizer.collect import Decay, Variant

Mode = Literal["F", "D"]
_ONLY_D = ("fisher_batches", "per_example", "grad_clip", "train_mode", "scope", "maskable", "refresh_every")
_ONLY_F = ("seed",)


@dataclass(frozen=True, kw_only=True)
class ChildTuningConfig:
    """Options of Child-Tuning (Xu, Luo et al., EMNLP 2021). An option that its mode would not use raises.

    Attributes:
        mode: "F", a random child network in each step, or "D", the weights with the highest Fisher scores in all of
            them. Must be given.
        reserve_p: share of the weights trained, in (0, 1]: of all in each step for F, of the maskable ones for D
            (default: 0.3).
        decay: "all" decays every weight, "child" only those in the child network; "auto" is "all" for F, "child" for D
            (default: "auto").
        variant: "torch" is torch.optim.AdamW's arithmetic, "hf" the published code's (default: "torch").
        seed: F only: of the masks, an integer of 64 bits; None takes that of the TrainingArguments (default: None).
        fisher_batches: D only: how many batches of the training set to estimate scores on; None for all
            (default: None).
        per_example: D only: squares each example's gradient, not each batch's; see `estimate_fisher` (default: False).
        grad_clip: D only: clips each tensor's gradient before it is squared; see `estimate_fisher` (default: None).
        train_mode: D only: keeps dropout on in the estimation (default: False).
        scope: D only: "global" or "tensor"; see `ChildNetwork.from_scores` (default: "global").
        maskable: D only: a predicate or a regex over parameter names; None takes the repeated transformer blocks
            (default: None).
        refresh_every: D only: "epoch" chooses the child network anew at the start of each later epoch; None keeps the
            first (default: None).

    Raises:
        ValueError, TypeError: an option is unknown, out of its range, of another kind, or not of this mode.
    """

    mode: Mode
    reserve_p: float = 0.3
    decay: Decay = "auto"
    variant: Variant = "torch"
    seed: int | None = None
    fisher_batches: int | None = None
    per_example: bool = False
    grad_clip: float | None = None
    train_mode: bool = False
    scope: Scope = "global"
    maskable: Selector = None
    refresh_every: Literal["epoch"] | None = None

    def __post_init__(self) -> None:
        for name, choices in (("mode", Mode), ("decay", Decay), ("variant", Variant), ("scope", Scope)):
            self._check_choice(name, *get_args(choices))
        self._check_choice("refresh_every", None, "epoch")
        self._check_options_of_mode()
        keep_threshold(self.reserve_p)
        if self.seed is not None:
            check_seed(self.seed)
        if self.maskable is not None:
            predicate(self.maskable, "ChildTuningConfig: maskable")
        for name in ("per_example", "train_mode"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"ChildTuningConfig: {name} must be True or False (got {getattr(self, name)!r})")
        if self.fisher_batches is not None and not (_is_number(self.fisher_batches, int) and self.fisher_batches >= 1):
            raise ValueError(
                "ChildTuningConfig: fisher_batches must be a whole number above 0, or None for the whole training set "
                f"(got {self.fisher_batches!r})"
            )
        if self.grad_clip is not None and not (_is_number(self.grad_clip, (int, float)) and self.grad_clip > 0):
            raise ValueError(
                "ChildTuningConfig: grad_clip must be a number above 0, or None for no clipping of the gradients that "
                f"are squared (got {self.grad_clip!r})"
            )

    def _check_choice(self, name: str, *choices: str | None) -> None:
        value = getattr(self, name)
        if not any(value == choice for choice in choices):
            raise ValueError(f"ChildTuningConfig: {name} must be {' or '.join(map(repr, choices))} (got {value!r})")

    def _check_options_of_mode(self) -> None:
        foreign = _ONLY_D if self.mode == "F" else _ONLY_F
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in foreign and value != field.default:
                other = "D" if self.mode == "F" else "F"
                raise ValueError(
                    f"ChildTuningConfig: {field.name} must be left out with mode={self.mode!r}, which does not use it "
                    f"(got {value!r}); mode={other!r} does"
                )
        if self.mode == "F" and self.decay == "child":
            raise ValueError("ChildTuningConfig: decay='child' needs mode='D' (got mode='F'); use decay='all'")


def _is_number(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)

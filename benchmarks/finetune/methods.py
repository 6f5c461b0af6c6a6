"""The methods that are compared: how each gets an optimizer, its learning rate, and what it trains.

A method of Child-Tuning (D) also has a child network, chosen once before the first step.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch

from .sources import UserError

LATER = {"later": True}  # marks a setting that is newer than runs that are kept; see `Settings.identity`


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, named as on the command line.

    Attributes:
        evaluations: how many there are in a run, evenly spaced; not if `evaluations_per_epoch` is given.
        head_epochs: epochs of methods that train a head alone; 0 for `epochs`.
        pooling: how one vector is made of a token's each; see `model.Encoder`.
        fisher_batches: batches that Fisher scores come from; 0 for all of the training set.
    """

    lr: float = 4e-4
    head_lr: float = 1e-1
    reserve_p: float = 0.3
    reserve_p_d: float = 0.3
    weight_decay: float = 0.01
    epochs: int = 3
    batch_size: int = 16
    max_length: int = 40
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    evaluations: int = 3
    head_epochs: int = field(default=0, metadata=LATER)
    evaluations_per_epoch: int = field(default=0, metadata=LATER)
    pooling: str = field(default="mean", metadata=LATER)
    fisher_batches: int = field(default=0, metadata=LATER)

    def identity(self):
        """Returns what a result depends on, as sorted (name, value) pairs; later settings if they are not default."""
        told = [one for one in fields(self) if not one.metadata or getattr(self, one.name) != one.default]
        return tuple(sorted((one.name, getattr(self, one.name)) for one in told))


def same(settings):
    """Returns 1, for a method that takes another's learning rate as it is."""
    return 1


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: its name in the table.
        optimizer: from (parameter groups, learning rate, settings, seed, child network or None) to an optimizer.
        lr: from settings to the learning rate where all methods share one, as in the demo.
        centre: from settings to the learning rate in the middle of a search; see `sweep`. None with `rate_of`.
        rate_of: (a method, from settings to a factor): takes what that method's search found, times the factor, instead
            of searching.
        fixed: a learning rate that is neither searched nor another's.
        settings: what this method sets otherwise than its sweep does, {name: value}.
        frozen: trains the head alone, on features that are computed once.
        prepare: from a pretrained transformer to what is trained in its place.
        child: from (model, Fisher scores or None, settings, seed) to a child network; None for methods without one.
        fisher: whether `child` needs Fisher scores.
    """

    title: str
    optimizer: Callable
    lr: Callable
    centre: Callable | None = None
    rate_of: tuple[str, Callable] | None = None
    fixed: float | None = None
    settings: dict = field(default_factory=dict)
    frozen: bool = False
    prepare: Callable | None = None
    child: Callable | None = None
    fisher: bool = False

    @property
    def partner(self):
        """The method that differs from this one in one option alone, at the same learning rate; None without one."""
        return self.rate_of[0] if self.rate_of and self.rate_of[1] is same else None

    def own(self, settings):
        """Returns the settings as this method takes them."""
        if self.frozen and settings.head_epochs:
            settings = replace(settings, epochs=settings.head_epochs)
        return replace(settings, **self.settings)


def adamw(groups, lr, settings, seed, child):
    """Returns PyTorch's fastest AdamW."""
    return torch.optim.AdamW(groups, lr=lr, weight_decay=settings.weight_decay, fused=True)


def child_adamw_f(groups, lr, settings, seed, child, state="float32"):
    """Returns Child-Tuning (F): the same call with `reserve_p` and a seed, and averages of the type `state`."""
    from childtune_fast import ChildAdamW

    p = settings.reserve_p
    return ChildAdamW(groups, lr=lr, weight_decay=settings.weight_decay, reserve_p=p, seed=seed, state=state)


def child_adamw_d(groups, lr, settings, seed, child, state="float32"):
    """Returns Child-Tuning (D): the same call with a child network, and averages of the type `state`."""
    from childtune_fast import ChildAdamW

    return ChildAdamW(groups, lr=lr, weight_decay=settings.weight_decay, child=child, seed=seed, state=state)


def highest(model, scores, settings, seed):
    """Returns the child network of the highest Fisher scores."""
    from childtune_fast import ChildNetwork

    return ChildNetwork.from_scores(model, scores, reserve_p=settings.reserve_p_d)


def lowest(model, scores, settings, seed):
    """Returns the child network of the lowest Fisher scores."""
    from childtune_fast import ChildNetwork

    return ChildNetwork.lowest(model, scores, reserve_p=settings.reserve_p_d)


def at_random(model, scores, settings, seed):
    """Returns a random child network of the same size."""
    from childtune_fast import ChildNetwork

    return ChildNetwork.random(model, reserve_p=settings.reserve_p_d, seed=seed)


def with_frozen_embeddings(backbone):
    """Freezes the token embeddings."""
    backbone.get_input_embeddings().requires_grad_(False)
    return backbone


def with_lora(backbone):
    """Freezes the transformer and adds LoRA to its linear layers: rank 8, alpha 16, dropout 0.1.

    Raises:
        UserError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("method lora needs: pip install peft (or leave it out of --methods)") from error
    config = peft.LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, lora_dropout=0.1)
    return peft.get_peft_model(backbone, config)


def root_p(settings):
    """Returns sqrt(p): the least, about, that F moves a weight, to AdamW at the same learning rate."""
    return math.sqrt(settings.reserve_p)


def lr(settings):
    """Returns the learning rate."""
    return settings.lr


def in_bytes(method):
    """Returns how a method gets its optimizer with averages in one byte each."""
    return functools.partial(method, state="8bit")


SLOW = 2e-5  # a rate at which BERT is often fine-tuned, and far too low for a head alone
SHARES = (0.05, 0.1, 0.2, 0.4, 0.5)  # of `reserve_p`, beside the sweep's own
FEW_BATCHES = (1, 4, 16)

# Where a search begins: at AdamW's rate; for F at AdamW's / sqrt(p); for LoRA at ten times AdamW's, as usual.
METHODS = {
    "frozen": Method(
        "frozen encoder, AdamW on the head", adamw, lambda s: s.head_lr, centre=lambda s: s.head_lr, frozen=True
    ),
    "frozen-slow": Method("frozen encoder, head at 2e-5", adamw, lambda s: SLOW, fixed=SLOW, frozen=True),
    "frozen-embeddings": Method("AdamW, frozen embeddings", adamw, lr, centre=lr, prepare=with_frozen_embeddings),
    "vanilla": Method("AdamW", adamw, lr, centre=lr),
    "vanilla-sqrtp": Method("AdamW at lr*sqrt(p)", adamw, lambda s: s.lr * root_p(s), rate_of=("f", root_p)),
    "f": Method("ChildAdamW (F)", child_adamw_f, lr, centre=lambda s: s.lr / root_p(s)),
    "d": Method("ChildAdamW (D)", child_adamw_d, lr, centre=lr, child=highest, fisher=True),
    "f-8bit": Method("F, 8-bit state", in_bytes(child_adamw_f), lr, rate_of=("f", same)),
    "d-8bit": Method("D, 8-bit state", in_bytes(child_adamw_d), lr, rate_of=("d", same), child=highest, fisher=True),
    "d-random": Method("D, child at random", child_adamw_d, lr, centre=lr, child=at_random),
    "d-lowest": Method("D, lowest Fisher", child_adamw_d, lr, centre=lr, child=lowest, fisher=True),
    "lora": Method("LoRA", adamw, lambda s: 10 * s.lr, centre=lambda s: 10 * s.lr, prepare=with_lora),
}
METHODS |= {f"f-p{p:g}": replace(METHODS["f"], title=f"F, p = {p:g}", settings={"reserve_p": p}) for p in SHARES}
METHODS |= {f"d-p{p:g}": replace(METHODS["d"], title=f"D, p = {p:g}", settings={"reserve_p_d": p}) for p in SHARES}
METHODS |= {
    f"d-{count}-batches": replace(
        METHODS["d"],
        title=f"D, Fisher scores of {count} batch{'es' * (count > 1)}",
        centre=None,
        rate_of=("d", same),
        settings={"fisher_batches": count},
    )
    for count in FEW_BATCHES
}
DEFAULT = [name for name, method in METHODS.items() if not method.settings and not method.fixed]
DEMO = ["frozen", "vanilla", "vanilla-sqrtp", "f", "d", "d-random", "d-lowest"]

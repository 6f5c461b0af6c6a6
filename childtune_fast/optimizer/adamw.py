"""ChildAdamW: torch.optim.AdamW that updates a child network, in one pass over memory."""

import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_seed, check_type
from ..child import ChildNetwork
from ..native import load
from ..ops.step import StepKernels, StepMemory, prepare, take_step
from ..ops.step_group import State
from .agreed import FINGERPRINT
from .checkpoint import VERSIONS, CheckpointedAdamW
from .checks import (
    agree_on_seed,
    check_child,
    check_masks,
    check_params,
    check_ranks_agree,
    refuse_interrupted,
    refuse_reserve_p,
)
from .collect import Decay, NormOf, Rounding, Variant, check_values, collect, norm_over_ranks, settle_options
from .groups import OF_PYTHON, check_groups, check_kinds, check_new_group, check_states, explain
from .masks import MaskBook

_RESERVE_P = float("0.3")  # a number of its own, by whose identity the default can be told from a 0.3 that was given


class ChildAdamW(CheckpointedAdamW):
    """AdamW that updates a child network of the weights: Child-Tuning (Xu, Luo et al., EMNLP 2021, section 2).

    Without `child`, each step draws a random child network (Child-Tuning_F): it keeps every weight's gradient with
    probability `reserve_p`, divided by it, and takes the others as zero. Momentum and weight decay move every weight.
    The mask is a pure function of the seed, the parameter's own step count, its index in the optimizer and the
    element's flat index; see `bernoulli_mask`. Nothing is drawn from torch's random state, no mask is stored, and
    `p.grad` is not written.

    With `child`, all steps train one child network (Child-Tuning_D): its weights are updated as by plain AdamW, the
    others are not touched. The state holds the values of the child network alone: `exp_avg` and `exp_avg_sq` of a
    masked parameter have the shape [weights of it in the child network], ordered by flat index. Parameters that
    `child` does not know are trained in full. Checkpoints hold the masks.

    What is not listed here is as in `torch.optim.AdamW`, errors included. The differences:

    - State is float32 for bfloat16 and float16 parameters, float64 for float64 ones, or takes fewer bits: `state`.
      Parameters are rounded once, when they are stored.
    - `max_grad_norm`, a GradScaler's unscaling and its skip of a step are part of the step.
    - A step that raises has written nothing.

    Args:
        params: parameters, named parameters, or parameter groups; float32, float64, bfloat16 or float16, of any shape
            and strides. Every argument below except `seed`, `foreach`, `fused`, `child` and `backend` may differ per
            group.
        lr: learning rate, a float or a tensor of one element (default: 1e-3).
        betas: decay rates of the running averages of gradient and squared gradient, floats or tensors of one element
            (default: (0.9, 0.999)).
        eps: number added to the denominator (default: 1e-8).
        weight_decay: decoupled weight decay (default: 1e-2).
        amsgrad: use the running maximum of the squared average (default: False).
        reserve_p: share of weights whose gradient each step uses, in (0, 1], rounded to a multiple of 1/65536; 1 is
            plain AdamW. Not with `child` (default: 0.3).
        child: ChildNetwork of the model whose parameters these are (default: None).
        seed: integer of 64 bits that determines the random masks; None takes `torch.initial_seed()`. In an initialised
            process group all ranks take rank 0's, so every rank must construct the optimizer (default: None).
        maximize: ascend instead of descend (default: False).
        foreach, fused: accepted for code written for AdamW; the backend decides instead (default: None).
        capturable: allow a CUDA graph to capture the step, after one step outside of it. Step counts are then on the
            GPU, and a replay reads an `lr` that is a tensor there; a float stays as it was, and state that
            `load_state_dict` makes is not the graph's. Needs GPUs and their kernels; the first step
            waits until these are proved (default: False).
        differentiable: must be False (default: False).
        decay: "all" decays every weight, "child" spares those that `child` leaves out of the parameters that it masks;
            "auto" is "child" with `child`, else "all" (default: "auto").
        variant: "torch" is torch.optim.AdamW's arithmetic; "hf" is that of the published code, which adds eps before
            the bias correction and decays after the update (default: "torch").
        max_grad_norm: limit of the gradients' 2-norm: this group's are multiplied by
            `min(1, max_grad_norm / (norm + 1e-6))`, where `norm` is that of all gradients of all groups, before
            masking, over all ranks that hold parts of a DTensor; None does not clip (default: None).
        norm_of: "child" leaves the gradient of the weights that `child` leaves out of the parameters that it masks out
            of that norm; "all" counts every gradient (default: "all").
        state: how averages are stored: "float32"; "bfloat16"; or "8bit", in bytes, with one more for each 128 weights,
            that `dense_state_dict` decodes. The last two are rounded stochastically, by bits that depend on seed, step,
            parameter and element alone. Parameters of fewer than 4096 weights keep float32; float64 ones, and DTensors
            cut elsewhere than at multiples of 128 weights, need it in a group of their own (default: "float32").
        rounding: of bfloat16 and float16 weights: "nearest"; or "stochastic", by which also small steps have their
            effect on average. It does nothing for float32 and float64 ones (default: "nearest").
        backend: "native" uses the compiled kernels, on a GPU without a proof; "torch" uses pure torch; "auto" uses the
            kernels on the CPU, and on a GPU once they have proved themselves there, as the environment variable
            CHILDTUNE_GPU says; else pure torch, with one warning. CHILDTUNE_BACKEND replaces "auto" (default: "auto").

    Raises:
        ValueError, TypeError, RuntimeError: torch.optim.AdamW raises for these arguments, `reserve_p` lies outside
            (0, 1] or is given together with `child`, parameters share memory, or an argument cannot be honoured.
        childtune_fast.native.BackendError: `backend` is "native", and there is no compiled module.
    """

    # torch's constructor sets `defaults` and adds the groups before it could know these options; then they are in it.
    _child_defaults: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        reserve_p: float = _RESERVE_P,
        child: ChildNetwork | None = None,
        seed: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decay: Decay = "auto",
        variant: Variant = "torch",
        max_grad_norm: float | None = None,
        norm_of: NormOf = "all",
        state: State = "float32",
        rounding: Rounding = "nearest",
        backend: load.Backend = "auto",
    ) -> None:
        self.backend = load.check(backend, "backend")
        self._step_memory = StepMemory()
        check_child(child, reserve_p is not _RESERVE_P, reserve_p, decay)
        self._book = MaskBook(child)
        options = {
            "reserve_p": reserve_p,
            "decay": decay,
            "variant": variant,
            "max_grad_norm": max_grad_norm,
            "norm_of": norm_of,
            "state": state,
            "rounding": rounding,
            "seed": check_seed(torch.initial_seed() if seed is None else seed),
            **{name: version for name, (_, version) in VERSIONS.items()},
            FINGERPRINT: None,
        }
        settle_options(options, child is not None)
        self._child_defaults = options
        check_kinds({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        check_type("ChildAdamW: params", params, Iterable, "parameters or parameter groups")
        flags = {"maximize": maximize, "capturable": capturable, "differentiable": differentiable}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, fused=fused, **flags)
        del self._child_defaults  # `defaults` has them now
        agree_on_seed(self.defaults, self.param_groups)
        masks = self._masks()
        if child is not None:
            check_masks(child, masks, self.param_groups, "those passed")
        check_ranks_agree(child, self.param_groups)
        prepare(self.backend, self.param_groups)

    @property
    def seed(self) -> int:
        """The seed of the random masks, unsigned, 64 bits; see `bernoulli_mask`."""
        return (self.param_groups or [self.defaults])[0].get("seed", self.defaults["seed"])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether unscaling and skipping are left to step(): yes, if torch's GradScaler asks.

        Lightning asks too, and would refuse to clip gradients. It then unscales them itself before it clips.
        """
        return sys._getframe(1).f_globals.get("__name__") == torch.amp.grad_scaler.__name__

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignores what torch's constructor sets if `fused` is true."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group.

        Args:
            param_group: dict with "params" and, optionally, the options that differ from the constructor's; `seed`
                must not differ.

        Raises:
            ValueError, TypeError, RuntimeError: the constructor would raise for this group. Nothing is added then.
        """
        if self._child_defaults:
            self.defaults = {**self._child_defaults, **self.defaults}
        check_groups(self.param_groups)
        with self._whole_or_not():
            try:
                super().add_param_group(param_group)
            except (AttributeError, LookupError, TypeError):
                check_new_group(param_group)
                raise
            group = self.param_groups[-1]
            check_values(group, self.defaults["seed"])
            check_params(self.param_groups, self._book.active)
            if self._book.active and group.get("reserve_p", 1.0) != 1.0:
                refuse_reserve_p(group["reserve_p"], " in a group")
            settle_options(group, self._book.active)
            if not self._child_defaults:  # else the constructor looks for masks when it has added all groups
                self._masks()
                prepare(self.backend, self.param_groups)

    def replace_child(self, child: ChildNetwork) -> None:
        """Gives the optimizer another child network, between two steps; without one before, it trains this one now.

        The state of every parameter that the old or the new child network masks begins again, step count included. The
        state of all other parameters stays.

        Args:
            child: the new ChildNetwork, of the model whose parameters the optimizer has.

        Raises:
            ValueError: the child network masks no parameter of the optimizer, or differs between ranks. Nothing has
                been changed then.
            TypeError: `child` is no ChildNetwork.
        """
        check_type("ChildAdamW.replace_child: child", child, ChildNetwork, "a ChildNetwork")
        check_groups(self.param_groups)
        check_states(self.state, self.param_groups)
        book = MaskBook(child)
        masks = book.read(self.param_groups)
        check_masks(child, masks, self.param_groups, "the optimizer")
        check_ranks_agree(child, self.param_groups)
        with self._whole_or_not():
            for param in self._book.masks.keys() | masks.keys():
                self.state.pop(param, None)
            for options in (self.defaults, *self.param_groups):
                settle_options(options, True)
            self._book.become(book)
            self._masks()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: function that reevaluates the model and returns the loss. It is called before the step, with
                gradients enabled; None calls nothing (default: None).

        Returns:
            What the closure returned; None without a closure.

        Raises:
            RuntimeError: a gradient is sparse, or a mask has been written to.
            TypeError, ValueError: a gradient or a state does not fit its parameter. Nothing has been written then.
            StepInterrupted: a GPU has refused to go on after a part of the step; until a checkpoint is loaded, later
                steps raise a RuntimeError.
        """
        if self._step_memory.interrupted:
            refuse_interrupted()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        undo: dict[Tensor, dict[str, Any] | None] = {}  # states as they were; a step that is taken clears it
        try:
            self._step(undo)
        except OF_PYTHON as error:
            explain(error, self.param_groups, self.state)
            raise
        finally:  # each state at once; one that has just begun is worth as much as none
            for param, state in undo.items():
                if state is None:
                    self.state.pop(param, None)
                else:
                    self.state[param] = state
        return loss

    # Compiled, the reference would round otherwise; the kernels cannot be traced. torch.compiler.disable does the same,
    # but importing it takes a second.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step(self, undo: dict[Tensor, dict[str, Any] | None]) -> None:
        kernels = StepKernels.find(self.backend, wait=any(group.get("capturable") for group in self.param_groups))
        masks = self._masks() if self._book.active else None
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))  # set by GradScaler
        with norm_over_ranks(self.param_groups) as over_ranks:
            groups = collect(self.param_groups, self.state, masks, kernels, undo)
            take_step(groups, kernels, self._step_memory, undo, grad_scale, found_inf, over_ranks)

    def __repr__(self) -> str:
        text = super().__repr__()
        if not self._book.active:
            return text
        masks = self._book.masks.values()
        count, numel = (sum(getattr(mask, f"whole_{key}") for mask in masks) for key in ("count", "numel"))
        return f"{text.removesuffix(')')}child: {count:,} of {numel:,} weights\n)"

"""ChildAdamW: torch.optim.AdamW that updates a child network, in one pass over memory."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import backend as backends
from . import fallback
from .checks import check_group, check_no_lazy_negation, check_options, check_overlap
from .collect import PLAIN_TENSORS, clip, collect
from .mask import MASK_VERSION, check_seed
from .state import restored_state


class ChildAdamW(torch.optim.AdamW):
    """AdamW that updates a random child network in each step: Child-Tuning_F (Xu, Luo et al., EMNLP 2021, section 2.2).

    Each step keeps every weight's gradient with probability `reserve_p`, divided by it, and takes the others as zero.
    Momentum and weight decay move every weight. The mask is a pure function of the seed, the parameter's own step
    count, its index in the optimizer and the element's flat index; see `bernoulli_mask`. Nothing is drawn from torch's
    random state, no mask is stored, and `p.grad` is not written.

    What is not listed here is as in `torch.optim.AdamW`, errors included. The differences:

    - State is float32 for bfloat16 and float16 parameters, which are rounded once, when stored (float64 for float64).
    - `max_grad_norm`, a GradScaler's unscaling and its skip of a step are part of the step.
    - A step that raises has written nothing.

    Args:
        params: parameters, named parameters, or parameter groups. Every argument below except `seed`, `foreach`,
            `fused` and `backend` may differ per group.
        lr: learning rate, a float or a tensor of one element (default: 1e-3).
        betas: decay rates of the running averages of gradient and squared gradient (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: decoupled weight decay (default: 1e-2).
        amsgrad: use the running maximum of the squared average (default: False).
        reserve_p: share of weights whose gradient each step uses, in (0, 1]; 1 is plain AdamW (default: 0.3).
        seed: of the masks, an integer of 64 bits; None takes `torch.initial_seed()`. In an initialised process group
            all ranks take rank 0's, so every rank must construct the optimizer (default: None).
        maximize: ascend instead of descend (default: False).
        foreach, fused: accepted for code written for AdamW; the backend decides instead (default: None).
        capturable, differentiable: must be False.
        decay: "all" decays every weight; "auto" is "all" here (default: "auto").
        variant: "torch" is torch.optim.AdamW's arithmetic; "hf" that of the published code, which adds eps before
            the bias correction and decays after the update (default: "torch").
        max_grad_norm: scales this group's gradients by `min(1, max_grad_norm / (norm + 1e-6))`, where `norm` is the
            2-norm of all gradients of all groups, before masking; None does not clip (default: None).
        backend: "native" (the compiled kernels, on the CPU), "torch" (the fallback), or "auto": native, else torch with
            one warning. CHILDTUNE_BACKEND in the environment replaces "auto" (default: "auto").

    Raises:
        ValueError, TypeError, RuntimeError: as torch.optim.AdamW does; for `reserve_p` outside (0, 1], parameters that
            share memory, and arguments that cannot be honoured.
        BackendError: backend="native" cannot be had.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to step()
    _child_defaults: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        reserve_p: float = 0.3,
        seed: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decay: str = "auto",
        variant: str = "torch",
        max_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        self.backend = backends.check(backend, "backend")
        self._child_defaults = {
            "reserve_p": reserve_p,
            "decay": decay,
            "variant": variant,
            "max_grad_norm": max_grad_norm,
            "seed": _agreed_seed(seed),
            "mask_version": MASK_VERSION,
        }
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        if self.backend == "native":
            backends.resolve("native")

    @property
    def seed(self) -> int:
        """The masks' seed, unsigned, 64 bits; see `bernoulli_mask`."""
        return self.param_groups[0]["seed"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does; see there. Raises as the constructor does, and then has added nothing."""
        self.defaults = {**self._child_defaults, **self.defaults}  # the base class calls this before they are complete
        super().add_param_group(param_group)
        try:
            check_options(self.param_groups[-1], self.defaults["seed"])
            plain = [p for group in self.param_groups for p in group["params"] if type(p) in PLAIN_TENSORS]
            check_no_lazy_negation(plain)
            check_overlap(plain)
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled, before the step.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: a gradient is sparse.
            TypeError, ValueError: a gradient or a state does not fit its parameter. Nothing has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)  # this and grad_scale are set by torch.amp.GradScaler
        if found_inf is not None and found_inf.item():
            return loss
        states_before: dict[Tensor, dict[str, Any]] = {}
        try:
            self._step(states_before)
        except Exception:
            for param, state in states_before.items():
                self.state[param].clear()
                self.state[param].update(state)
                if not state:
                    del self.state[param]
            raise
        return loss

    @torch._disable_dynamo  # compiled, the fallback would round otherwise; the kernels cannot be traced
    def _step(self, states_before: dict[Tensor, dict[str, Any]]) -> None:
        native = backends.resolve(self.backend)
        try:
            on_native, on_torch = collect(self, native is not None, states_before)
        except KeyError as error:
            raise ValueError(
                f"ChildAdamW: {error} is missing in a group or in the state of a parameter; load a whole checkpoint, "
                "or delete that parameter's state to begin anew"
            ) from None
        for group in on_torch:
            check_group(group)
        try:
            clip(native, on_native, on_torch)
            if on_native:
                native.step(on_native, torch.get_num_threads())
        except (TypeError, ValueError, RuntimeError, BufferError):
            for group in on_native:
                check_group(group)  # says in a sentence what the kernels refuse in a word
            raise
        fallback.step(on_torch)
        for group in on_native:
            increment_version([*group.params, *group.exp_avgs, *group.exp_avg_sqs, *group.max_exp_avg_sqs])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch.optim.AdamW.

        State keeps its precision: it is float32 for bfloat16 and float16 parameters too (torch casts it to the
        parameter's dtype), and it is copied, never shared with `state_dict`. What a checkpoint of torch.optim.AdamW
        does not hold (`reserve_p`, `seed`, ...) stays as it is.

        Raises:
            ValueError: as torch does; also for a checkpoint whose masks were placed by another version.
            TypeError: a state is no tensor. Whatever is raised, nothing has been loaded then.
        """
        loaded: dict[str, Any] = {}

        def before(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            loaded.update(state_dict, param_groups=self._complete_groups(state_dict["param_groups"]))
            return loaded

        def after(_: torch.optim.Optimizer) -> None:
            ids = itertools.chain.from_iterable(group["params"] for group in loaded["param_groups"])
            params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
            for param, saved in ((p, loaded["state"].get(i)) for i, p in zip(ids, params, strict=True)):
                if saved is not None:
                    self.state[param] = restored_state(param, saved)
            self.defaults["seed"] = self.seed  # of groups that are added later

        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        present = self.state, self.param_groups
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.state, self.param_groups = present
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _complete_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved groups with what they lack, and with what a checkpoint does not decide, taken from the present ones."""
        groups = []
        for i, saved in enumerate(saved_groups):
            present = self.param_groups[min(i, len(self.param_groups) - 1)]
            kept = {"foreach", "fused", "capturable", "differentiable"} & present.keys()
            group = {**{k: v for k, v in present.items() if k != "params"}, **saved, **{k: present[k] for k in kept}}
            check_options(group, groups[0]["seed"] if groups else check_seed(group["seed"]))
            if group["mask_version"] != MASK_VERSION:
                raise ValueError(
                    f"ChildAdamW.load_state_dict: the checkpoint's masks are of version {group['mask_version']}, "
                    f"those of this childtune_fast of version {MASK_VERSION}; resume with the release that saved it"
                )
            groups.append(group)
        return groups

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("reserve_p", "decay", "variant", "max_grad_norm", "seed", "mask_version"):
                group.setdefault(name, self.defaults[name])


def _agreed_seed(seed: int | None) -> int:
    """The seed as an unsigned number; rank 0's, where there are ranks."""
    agreed = [check_seed(torch.initial_seed() if seed is None else seed)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(agreed, src=0)
    return agreed[0]

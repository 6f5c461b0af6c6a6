"""ChildAdamW: torch.optim.AdamW that updates a child network, in one pass over memory."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _gpu, fallback
from . import backend as backends
from .checkpoint import CheckpointedAdamW
from .checks import check_group, check_no_lazy_negation, check_options, check_overlap
from .child_network import ChildNetwork
from .child_state import Masks, check_ranks_agree, masks_of
from .collect import PLAIN_TENSORS, check_norm, clip, collect, unscale
from .mask import MASK_VERSION, check_seed
from .state import mark_child
from .step_group import StepGroup

_RESERVE_P = float("0.3")  # a number of its own, by whose identity the default can be told from a 0.3 that was given


class ChildAdamW(CheckpointedAdamW):
    """AdamW that updates a child network of the weights: Child-Tuning (Xu, Luo et al., EMNLP 2021, section 2).

    Without `child`, a random one in each step (Child-Tuning_F): each step keeps every weight's gradient with
    probability `reserve_p`, divided by it, and takes the others as zero. Momentum and weight decay move every weight.
    The mask is a pure function of the seed, the parameter's own step count, its index in the optimizer and the
    element's flat index; see `bernoulli_mask`. Nothing is drawn from torch's random state, no mask is stored, and
    `p.grad` is not written.

    With `child`, the same one in all steps (Child-Tuning_D): its weights are trained as by plain AdamW, the others are
    not touched, and the state holds the child network's values alone, by flat index. Parameters that `child` does not
    know are trained in full. Checkpoints carry the masks.

    What is not listed here is as in `torch.optim.AdamW`, errors included. The differences:

    - State is float32 for bfloat16 and float16 parameters, which are rounded once, when stored (float64 for float64).
    - `max_grad_norm`, a GradScaler's unscaling and its skip of a step are part of the step.
    - A step that raises has written nothing.

    Args:
        params: parameters, named parameters, or parameter groups. Every argument below except `seed`, `foreach`,
            `fused`, `child` and `backend` may differ per group.
        lr: learning rate, a float or a tensor of one element (default: 1e-3).
        betas: decay rates of the running averages of gradient and squared gradient (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: decoupled weight decay (default: 1e-2).
        amsgrad: use the running maximum of the squared average (default: False).
        reserve_p: share of weights whose gradient each step uses, in (0, 1]; 1 is plain AdamW. Not with `child`
            (default: 0.3).
        child: a ChildNetwork of the model whose parameters these are (default: None).
        seed: of the masks, an integer of 64 bits; None takes `torch.initial_seed()`. In an initialised process group
            all ranks take rank 0's, so every rank must construct the optimizer (default: None).
        maximize: ascend instead of descend (default: False).
        foreach, fused: accepted for code written for AdamW; the backend decides instead (default: None).
        capturable: a CUDA graph may capture the step, after one outside of it: step counts are on the GPU, and a replay
            reads an `lr` that is a tensor there. Needs backend="native" and GPUs (default: False).
        differentiable: must be False.
        decay: "all" decays every weight, "child" only those in `child`; "auto" is "child" with `child`, else "all"
            (default: "auto").
        variant: "torch" is torch.optim.AdamW's arithmetic; "hf" that of the published code, which adds eps before
            the bias correction and decays after the update (default: "torch").
        max_grad_norm: scales this group's gradients by `min(1, max_grad_norm / (norm + 1e-6))`, where `norm` is the
            2-norm of all gradients of all groups, before masking; None does not clip (default: None).
        norm_of: "child" lets only the gradient of the weights in `child` count in that norm; "all" does not
            (default: "all").
        backend: "native" (the compiled kernels; on a GPU too, though none has run them yet), "torch" (the fallback), or
            "auto": native on the CPU, else torch with one warning, and torch on a GPU. CHILDTUNE_BACKEND in the
            environment replaces "auto" (default: "auto").

    Raises:
        ValueError, TypeError, RuntimeError: as torch.optim.AdamW does; for `reserve_p` outside (0, 1] or beside
            `child`, parameters that share memory, and arguments that cannot be honoured.
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
        reserve_p: float = _RESERVE_P,
        child: ChildNetwork | None = None,
        seed: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decay: str = "auto",
        variant: str = "torch",
        max_grad_norm: float | None = None,
        norm_of: str = "all",
        backend: str = "auto",
    ) -> None:
        self.backend = backends.check(backend, "backend")
        self.child_masks: Masks = {}
        self._gpu_memory: dict[int, Tensor] = {}
        self._child = _checked_child(child, reserve_p, decay)
        self._child_defaults = {
            "reserve_p": reserve_p if child is None else 1.0,
            "decay": decay,
            "variant": variant,
            "max_grad_norm": max_grad_norm,
            "norm_of": norm_of,
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
        if child is not None and not self.child_masks:
            raise ValueError(
                f"ChildAdamW: child must mask a parameter of those passed (got a child network of "
                f"{len(child.packed)} others); make it from the model whose parameters these are, after wrapping it"
            )
        check_ranks_agree(self.child_masks)
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
        group = self.param_groups[-1]
        try:
            check_options(group, self.defaults["seed"])
            plain = [p for group in self.param_groups for p in group["params"] if type(p) in PLAIN_TENSORS]
            check_no_lazy_negation(plain)
            check_overlap(plain)
            masks = self._masks_of(group)
        except Exception:
            self.param_groups.pop()
            raise
        self.child_masks.update(masks)
        for param, mask in masks.items():
            mark_child(self.state[param], mask)

    def _masks_of(self, group: dict[str, Any]) -> Masks:
        """The child network's masks of a group's parameters."""
        if self._child is None:
            return {}
        if group["reserve_p"] != 1.0:
            raise ValueError(
                f"ChildAdamW: reserve_p is not used with child= (got {group['reserve_p']} in a group); leave it out, "
                "the child network has a share of its own"
            )
        return masks_of(self._child, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled, before the step.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: a gradient is sparse, or somebody wrote to a mask.
            TypeError, ValueError: a gradient or a state does not fit its parameter. Nothing has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        states_before: dict[Tensor, dict[str, Any]] = {}
        taken = False
        try:
            taken = self._step(states_before)
        finally:
            if not taken:
                for param, state in states_before.items():
                    self.state[param].clear()
                    self.state[param].update(state)
                    if not state:
                        del self.state[param]
        return loss

    @torch._disable_dynamo  # compiled, the fallback would round otherwise; the kernels cannot be traced
    def _step(self, states_before: dict[Tensor, dict[str, Any]]) -> bool:
        """Takes the step; returns whether it was taken, as far as the host knows."""
        native = backends.resolve(self.backend)
        try:
            use_gpus = _gpu.asked_for(self.backend)
            on_native, on_gpu, on_torch = collect(self, native is not None, use_gpus, states_before)
        except KeyError as error:
            raise ValueError(
                f"ChildAdamW: {error} is missing in a group or in the state of a parameter; load a whole checkpoint, "
                "or delete that parameter's state to begin anew"
            ) from None
        of_gpus = list(itertools.chain.from_iterable(on_gpu.values()))
        groups = on_native + of_gpus + on_torch
        check_norm(groups)
        if on_gpu or on_torch:
            _gpu.check_capture(groups)
        alone = bool(on_native) + len(on_gpu) + bool(on_torch) == 1
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))  # by a GradScaler
        by_host = not (on_gpu and alone)  # a GPU that steps everything scales, skips and clips without the host
        if by_host:
            if found_inf is not None and found_inf.item():
                return False
            unscale(groups, grad_scale)
            grad_scale = found_inf = None
        for group in on_torch if alone else on_torch + of_gpus:  # kernels check before they write, but only theirs
            check_group(group)
        with _explaining(on_native + of_gpus):
            if by_host:
                clip(native, on_native, of_gpus + on_torch)
            if on_native:
                native.step(on_native, torch.get_num_threads())
            for device, on_device in on_gpu.items():
                _gpu.step(device, on_device, self._gpu_memory, grad_scale, found_inf)
        fallback.step(on_torch)
        for group in on_native + of_gpus:
            increment_version([*group.params, *group.exp_avgs, *group.exp_avg_sqs, *group.max_exp_avg_sqs])
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "backend": self.backend,
            "child_masks": self.child_masks,
            "_child": self._child,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_gpu_memory", {})
        for group in self.param_groups:
            for name in ("reserve_p", "decay", "variant", "max_grad_norm", "norm_of", "seed", "mask_version"):
                group.setdefault(name, self.defaults[name])


@contextlib.contextmanager
def _explaining(groups: list[StepGroup]) -> Iterator[None]:
    """Says in a sentence what the kernels refuse in a word."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, BufferError):
        for group in groups:
            check_group(group)
        raise


def _checked_child(child: Any, reserve_p: float, decay: str) -> ChildNetwork | None:
    if child is None:
        if decay == "child":
            raise ValueError("ChildAdamW: decay='child' needs a child network; pass child=, or decay='all'")
        return None
    if not isinstance(child, ChildNetwork):
        raise TypeError(f"ChildAdamW: child must be a ChildNetwork (got {child!r})")
    if reserve_p is not _RESERVE_P:
        raise ValueError(
            f"ChildAdamW: reserve_p is not used with child= (got {reserve_p}); leave it out, the child network has a "
            "share of its own"
        )
    return child


def _agreed_seed(seed: int | None) -> int:
    """The seed as an unsigned number; rank 0's, where there are ranks."""
    agreed = [check_seed(torch.initial_seed() if seed is None else seed)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(agreed, src=0)
    return agreed[0]

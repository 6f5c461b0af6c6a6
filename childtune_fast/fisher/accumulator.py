"""FisherAccumulator: running sums of squared gradients, one float32 tensor for each parameter."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..arguments import Selector, as_float, check_type, is_sharded, lost_memory, shown
from .data_parallel import add_over_ranks
from .sums import Offload, SquareSums, check_grad_clip


class FisherAccumulator:
    """The diagonal of the empirical Fisher information, for those who own their training loop.

    Call `update()` after the backward passes whose summed gradient is to be squared; `scores()` returns the weighted
    mean of the squares so far. Gradients are only read.

        fisher = FisherAccumulator(model)
        for batch in batches:
            model.zero_grad()
            loss_of(model, batch).backward()
            fisher.update()
        child = ChildNetwork.from_scores(model, fisher.scores(), reserve_p=0.3)

    The parameters that require a gradient when the accumulator is made are scored. A tied parameter is scored once,
    under its first name. docs/numerics.md says how exact the sums are.

    Of sharded parameters (DTensors), make it after they are sharded. Gradients are then over all ranks already, and all
    ranks must call every method together; a rank keeps the sums of what it holds. Under DistributedDataParallel, there
    are two recipes, and names are those of the model inside:

    - After a usual backward pass, gradients are their mean over the ranks. Every rank squares that, as one process with
      the ranks' batches as one would, and has the scores without more ado.
    - In `with model.no_sync():`, around both the forward and the backward pass, a rank has gradients of its own. In the
      end, `fisher.all_reduce()` gives what one process would have, that takes the ranks' batches one after the other.

    Args:
        model: torch.nn.Module whose gradients are squared; float32, float64, bfloat16 or float16, on any devices.
        grad_clip: scales the gradient of each tensor, on its own, by `min(1, grad_clip / (norm + 1e-6))`, as the
            published code does; None does not clip (default: None).
        names: selects the parameters to score: a predicate over names, or a regular expression that is searched in
            them; None scores all (default: None).
        offload: "cpu" keeps the sums in the CPU's memory and squares there, for a model that leaves no room for its
            scores on a GPU; each gradient is then copied. None keeps the sums on the parameters' devices
            (default: None).

    Raises:
        ValueError: `grad_clip` is not above 0, `offload` is another word, no parameter is left, or one is not dense, of
            another dtype, or without values (on the meta device).
        TypeError: `model` is no module, or `names` is neither a string, nor a pattern, nor a function.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        grad_clip: float | None = None,
        names: Selector = None,
        offload: Offload | None = None,
    ) -> None:
        self._sums = SquareSums(model, grad_clip=grad_clip, names=names, offload=offload)

    @property
    def grad_clip(self) -> float | None:
        """The limit of each gradient's 2-norm before it is squared; None does not clip."""
        return self._sums.grad_clip

    @grad_clip.setter
    def grad_clip(self, value: float | None) -> None:
        check_grad_clip(value)
        self._sums.grad_clip = value

    def reset(self) -> None:
        """Begins again, as if nothing had been accumulated."""
        self._sums.reset()

    @torch.no_grad()
    def update(self, *, weight: float = 1.0, grad_scale: float = 1.0) -> None:
        """Adds the squares of the present gradients. A parameter whose `grad` is None adds 0.

        Args:
            weight: weight of these squares in the mean (default: 1).
            grad_scale: number that the loss was multiplied by, such as `scaler.get_scale()`; gradients are divided by
                it before they are clipped and squared (default: 1).

        Raises:
            ValueError: an argument is not above 0 or not finite, no parameter has a gradient, or a gradient is not
                finite, be it on another rank, or has no memory any more. In the last two cases, and after an interrupt,
                the sums hold a part of this: `scores()` raises until `reset()`.
        """
        weight, grad_scale = _above_0("weight", weight), _above_0("grad_scale", grad_scale)
        self._check_usable("update")
        present = [name for name, param in self._sums.params.items() if param.grad is not None]
        if not self._sums.ranks.worst(len(present)):
            raise ValueError(
                "FisherAccumulator.update: no parameter has a gradient; call it after backward() and before zero_grad()"
            )
        kernels = self._sums.kernels()
        finite = {}
        with self._sums.adding():
            for name in present:
                grad = self._sums.gradient(name)
                if grad is not None:
                    finite[name] = self._sums.add(kernels, name, grad, weight, 1.0 / grad_scale)
            self._sums.close(finite, weight, "FisherAccumulator.update: ")

    def scores(self) -> dict[str, Tensor]:
        """Returns {parameter name: mean of its squared gradient}, new float32 tensors of the parameters' shapes.

        That of a DTensor is a DTensor, placed as it is.

        Raises:
            ValueError: nothing has been accumulated, or a gradient was not finite.
        """
        self._check_usable("scores")
        if self._sums.weight == 0:
            raise ValueError("FisherAccumulator.scores: nothing has been accumulated yet; call update() first")
        return self._sums.means()

    @torch.no_grad()
    def merge(self, other: "FisherAccumulator") -> None:
        """Adds what `other` has accumulated, over another part of the data.

        Args:
            other: FisherAccumulator of the same parameters and `grad_clip`, on any devices, sharded in any way or
                whole; it is only read.

        Raises:
            ValueError: `other` scores other parameters, clips otherwise, or either holds a gradient that was not
                finite. Nothing has been added then.
        """
        check_type("FisherAccumulator.merge: other", other, FisherAccumulator, "a FisherAccumulator")
        added = other._sums.tensors()
        with self._sums.ranks.agreeing():
            self._check_usable("merge")
            other._check_usable("merge")
            self._check_matches(added, other.grad_clip, "merge")
        with self._sums.adding():
            for name, tensor in added.items():
                sums = self._sums.sums[name]
                sums += self._sums.part_of(name, tensor).to(sums.device)
            self._sums.weight += other._sums.weight

    @torch.no_grad()
    def all_reduce(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Adds what the ranks of a process group have accumulated, each over its own part of the data.

        Every rank must call it, once, after its last update; all then have the same bits. It takes a collective for
        each parameter. The ranks may have had different numbers of batches, or none.

        Args:
            group: the ranks; None takes all of the default group (default: None).

        Raises:
            RuntimeError: there is no process group.
            ValueError: this rank is not in the group; or, on all its ranks: parameters are sharded, the ranks score
                different parameters or clip differently, or one holds a gradient that was not finite. Nothing has been
                added then.
        """
        add_over_ranks(self._sums, group)

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been accumulated. As in torch, the tensors are the ones in use, not copies.

        The sums of DTensors are DTensors, which torch.distributed.checkpoint loads onto models sharded in other ways.

        Raises:
            ValueError: a gradient was not finite.
        """
        self._check_usable("state_dict")
        return {"sums": self._sums.tensors(), "weight": self._sums.weight, "grad_clip": self.grad_clip}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replaces what has been accumulated by a copy of what another accumulator's `state_dict` returned.

        Args:
            state_dict: what `state_dict` of a FisherAccumulator with the same parameters and `grad_clip` returned,
                sharded in any way or whole; it is only read.

        Raises:
            ValueError: `state_dict` holds no sums, sums of other parameters, sums that were clipped otherwise, or
                damaged ones. Nothing has been loaded then.
            TypeError: `state_dict`, or the sums in it, is no mapping.
        """
        with self._sums.ranks.agreeing():
            self._check_loadable(state_dict)
        self.reset()
        with self._sums.adding():
            for name, tensor in state_dict["sums"].items():
                self._sums.sums[name].copy_(self._sums.part_of(name, tensor))
            self._sums.weight = float(state_dict["weight"])

    def _check_loadable(self, state_dict: Any) -> None:
        check_type("FisherAccumulator.load_state_dict: state_dict", state_dict, Mapping, "a mapping")
        missing = {"sums", "weight", "grad_clip"} - state_dict.keys()
        if missing:
            raise ValueError(
                "FisherAccumulator.load_state_dict: what FisherAccumulator.state_dict() returned is required (got one "
                f"without {', '.join(sorted(missing))}); load a whole checkpoint"
            )
        sums, weight = state_dict["sums"], state_dict["weight"]
        check_type("FisherAccumulator.load_state_dict: sums", sums, Mapping, "a mapping")
        here = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in sums.values()]
        numbers = [tensor for tensor in here if isinstance(tensor, Tensor) and not tensor.is_complex()]
        whole = len(numbers) == len(here) and not any(map(lost_memory, here))
        whole = whole and all(bool((tensor >= 0).all()) for tensor in numbers)
        if not (whole and isinstance(weight, (int, float)) and 0 <= weight < math.inf):
            raise ValueError(
                "FisherAccumulator.load_state_dict: sums and weight must be numbers from 0 on (got "
                f"others, or weight {shown(weight)}); the checkpoint is damaged"
            )
        check_grad_clip(state_dict["grad_clip"])
        self._check_matches(sums, state_dict["grad_clip"], "load_state_dict")

    def _check_usable(self, method: str) -> None:
        if self._sums.damaged:
            raise ValueError(
                f"FisherAccumulator.{method}: the sums must be whole (they hold a part of a gradient that was not "
                "finite, or of an addition that did not come to its end); call reset() and begin anew"
            )

    def _check_matches(self, sums: dict[str, Tensor], grad_clip: float | None, method: str) -> None:
        got = {name: tuple(tensor.shape) for name, tensor in sums.items()}
        required = {name: tuple(tensor.shape) for name, tensor in self._sums.tensors().items()}
        wrong = sorted(name for name in got.keys() | required.keys() if got.get(name) != required.get(name))
        if wrong:
            raise ValueError(
                f"FisherAccumulator.{method}: both must score the same parameters (got {len(wrong)} that differ, the "
                f"first is '{wrong[0]}': shape {required.get(wrong[0])} here, {got.get(wrong[0])} there); make both "
                "with the same model and `names`"
            )
        if grad_clip != self.grad_clip:
            raise ValueError(
                f"FisherAccumulator.{method}: both must have one grad_clip (got {self.grad_clip} here, {grad_clip} "
                "there)"
            )


def _above_0(name: str, value: float) -> float:
    """Returns an argument of `update` as a float; raises ValueError unless it is above 0 and finite."""
    found = as_float(f"FisherAccumulator.update: {name}", value)
    if not 0 < found < math.inf:
        raise ValueError(f"FisherAccumulator.update: {name} must be above 0 and finite (got {found})")
    return found

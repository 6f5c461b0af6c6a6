"""TaskVector: what fine-tuning changed, as a vector that can be scaled, added to others and applied to a base."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Union

import torch
from torch import Tensor, nn

from ..arguments import FilePath, check_model, check_type, is_sharded
from ..ops.packed_mask import PackedMask
from . import delta
from .names import renamed


class Change(NamedTuple):
    """What changed in one parameter.

    Attributes:
        mask: which weights changed.
        by: float32 tensor of shape [mask.count], on the CPU: by how much, in the order of flat indices.
    """

    mask: PackedMask
    by: Tensor

    @classmethod
    def of(cls, dense: Tensor) -> "Change":
        """Returns the change that a float32 tensor of differences, on the CPU, is."""
        mask = PackedMask.pack(dense != 0)
        return cls(mask, mask.gather(dense))

    def dense(self) -> Tensor:
        """Returns the differences as a float32 tensor of the parameter's shape."""
        return self.mask.scatter(self.by)


class TaskVector:
    """What turns a base into a model, weight by weight (Ilharco et al., ICLR 2023), kept for the weights that changed.

        both = TaskVector.from_delta("a.safetensors", base) + TaskVector.from_delta("b.safetensors", base)
        (0.5 * both).apply(base)

    Vectors of one base can be added, subtracted, negated and multiplied by numbers. Of a model that Child-Tuning_D
    trained, that is the child network and what was trained in full: a bit for each weight, and four bytes for each that
    changed. A vector has rounded differences: to get a model back to the bit, use `ChildNetwork.apply_delta`.

    Attributes:
        changes: {parameter name: Change}, of the parameters that changed.
        left_out: names of the parameters that cannot be compared, for the base has none of that name and shape, such as
            those of a new head; and of those that are not floats.
    """

    def __init__(self, changes: Mapping[str, Change], left_out: tuple[str, ...] = ()) -> None:
        """Holds the changes of parameters, {name: Change}."""
        self.changes = dict(changes)
        self.left_out = left_out

    @classmethod
    @torch.no_grad()
    def between(cls, model: nn.Module, base: nn.Module | Mapping[str, Tensor]) -> "TaskVector":
        """Returns what turns `base` into `model`. Buffers are not compared.

        Args:
            model: torch.nn.Module after fine-tuning, on any device.
            base: the module before fine-tuning, or its state dict.

        Raises:
            ValueError: a parameter is sharded, or no two parameters can be compared.
            TypeError: an argument is of another type.
        """
        check_model(model)
        check_type("TaskVector.between: base", base, (nn.Module, Mapping), "a torch.nn.Module or its state dict")
        params = dict(model.named_parameters())
        before = renamed(dict(base.named_parameters()) if isinstance(base, nn.Module) else base, params)
        changes, left_out = {}, []
        for name, param in params.items():
            old = before.get(name)
            for tensor in (param, old):
                if tensor is not None and is_sharded(tensor):
                    raise ValueError(f"TaskVector.between: parameters must be whole (got a DTensor for '{name}')")
            if old is None or old.shape != param.shape or not (param.is_floating_point() and old.is_floating_point()):
                left_out.append(name)
            elif (change := Change.of((param.cpu().double() - old.cpu().double()).float())).mask.count:
                changes[name] = change
        if len(left_out) == len(params):
            raise ValueError(
                "TaskVector.between: the base must have parameters of the model's names and shapes (got none of "
                f"{len(params)}); pass the model that was fine-tuned"
            )
        return cls(changes, tuple(left_out))

    @classmethod
    def from_delta(cls, path: FilePath, base: nn.Module) -> "TaskVector":
        """Returns the vector of a file that `ChildNetwork.save_delta` wrote. It copies the base once.

        Args:
            path: the file.
            base: torch.nn.Module that the delta is of; it stays as it is.

        Raises:
            ValueError: the file is damaged or of another kind, or the model is not its base.
            OSError: the file cannot be read.
            TypeError: an argument is of another type.
        """
        check_model(base, "base")
        tuned = copy.deepcopy(base)
        delta.apply(path, tuned)
        return cls.between(tuned, base)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Adds the vector to a model in place, in float32 or the parameter's wider dtype, rounded once to its own.

        Args:
            model: torch.nn.Module with a parameter of the name and shape of each change.

        Raises:
            ValueError: a parameter is missing, sharded, or of another shape. Nothing has been written then.
            TypeError: `model` is no module.
        """
        check_model(model)
        params = dict(model.named_parameters())
        changes = renamed(self.changes, params)
        for name, change in changes.items():
            param = params.get(name)
            if param is None or is_sharded(param) or tuple(param.shape) != change.mask.shape:
                got = "none" if param is None else "a DTensor" if is_sharded(param) else f"shape {tuple(param.shape)}"
                raise ValueError(
                    f"TaskVector.apply: the model must have a whole '{name}' of shape {change.mask.shape} (got {got})"
                )
        for name, change in changes.items():
            param, by = params[name], change.dense().to(params[name].device)
            param.copy_(param.to(torch.promote_types(param.dtype, torch.float32)) + by)

    @property
    def count(self) -> int:
        """The number of weights that changed."""
        return sum(change.mask.count for change in self.changes.values())

    def norm(self) -> float:
        """Returns the vector's 2-norm."""
        return math.sqrt(sum(change.by.double().square().sum().item() for change in self.changes.values()))

    def cosine(self, other: "TaskVector") -> float:
        """Returns the cosine of the angle to another vector: near 0 for tasks that hardly disturb each other.

        Raises:
            ValueError: a parameter has another shape in the other vector, or a vector is 0.
            TypeError: `other` is no TaskVector.
        """
        product = sum((a.double() * b.double()).sum().item() for _, a, b in self._paired(other))
        norms = self.norm() * other.norm()
        if not norms:
            raise ValueError("TaskVector.cosine: neither vector may be 0 (got one without a change)")
        return product / norms

    def __repr__(self) -> str:
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"TaskVector({self.count:,} weights in {len(self.changes)} tensors{left_out})"

    # ---- Arithmetic ------------------------------------------------------------------------------------------------

    def __add__(self, other: Union["TaskVector", int]) -> "TaskVector":
        if isinstance(other, int) and other == 0:  # where `sum` begins
            return self
        return self._combined(other, torch.add) if isinstance(other, TaskVector) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self._combined(other, torch.sub) if isinstance(other, TaskVector) else NotImplemented

    def __mul__(self, factor: float) -> "TaskVector":
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        changes = {name: change._replace(by=change.by * factor) for name, change in self.changes.items()}
        return TaskVector(changes, self.left_out)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "TaskVector":
        return self * (1 / divisor)

    def __neg__(self) -> "TaskVector":
        return self * -1

    def _combined(self, other: "TaskVector", operation: Callable[[Tensor, Tensor], Tensor]) -> "TaskVector":
        changes = {name: Change.of(operation(a, b)) for name, a, b in self._paired(other)}
        left_out = dict.fromkeys([*self.left_out, *other.left_out])
        return TaskVector({name: change for name, change in changes.items() if change.mask.count}, tuple(left_out))

    def _paired(self, other: "TaskVector") -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields the name of each parameter that either vector changes, and both vectors' differences of it."""
        check_type("TaskVector: the other", other, TaskVector, "a TaskVector")
        others = renamed(other.changes, self.changes)
        for name in dict.fromkeys([*self.changes, *others]):
            found = [changes[name] for changes in (self.changes, others) if name in changes]
            if len({change.mask.shape for change in found}) > 1:
                shapes = " and ".join(str(change.mask.shape) for change in found)
                raise ValueError(f"TaskVector: both must be of one base (got '{name}' of shapes {shapes})")
            zero = torch.zeros(found[0].mask.shape, device="cpu")
            a, b = (changes[name].dense() if name in changes else zero for changes in (self.changes, others))
            yield name, a, b

"""TaskVector: what fine-tuning changed, as a vector that can be scaled, added to others and applied to a base."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn

from ..arguments import FilePath, Selector, check_model, check_type, lost_memory, predicate
from ..ops.packed_mask import PackedMask
from ..ops.tensor_parts import kind_of
from . import delta, delta_entries, files
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
        left_out: names of the model's parameters that are not in it: the base has none of that name and shape, as of a
            new head; or they are not floats; or they were to be left out.
    """

    def __init__(self, changes: Mapping[str, Change], left_out: Iterable[str] = ()) -> None:
        """Holds the changes of parameters, {name: Change}."""
        self.changes = dict(changes)
        self.left_out = tuple(left_out)

    @classmethod
    @torch.no_grad()
    def between(
        cls, model: nn.Module, base: nn.Module | Mapping[str, Tensor], *, without: Selector = None
    ) -> "TaskVector":
        """Returns what turns `base` into `model`. Buffers are not compared.

        Args:
            model: torch.nn.Module after fine-tuning, on any device.
            base: the module before fine-tuning, or its state dict, with memory of its own for what was trained.
            without: selects parameters to leave out, such as heads: a predicate over names, or a regular expression
                that is searched in them; None leaves out none (default: None).

        Raises:
            ValueError: a parameter is sharded, sparse or has no values; the base has a trainable parameter in the
                model's memory; a difference is not finite; or no two parameters can be compared.
            TypeError: an argument is of another type.
        """
        check_model(model)
        check_type("TaskVector.between: base", base, (nn.Module, Mapping), "a torch.nn.Module or its state dict")
        leave = _leave(without)
        params = dict(model.named_parameters())
        named = dict(base.named_parameters(remove_duplicate=False)) if isinstance(base, nn.Module) else base
        before = renamed(named, params)
        changes, left_out = {}, []
        for name, param in params.items():
            old = before.get(name)
            if old is None or leave(name) or not _comparable(name, param, old):
                left_out.append(name)
                continue
            if param.requires_grad and delta.same_memory(param, old):
                raise ValueError(
                    f"TaskVector.between: the base must have memory of its own for what was trained (got '{name}' in "
                    "the model's); pass a copy that was made before training, or the pretrained model loaded anew"
                )
            if (change := _change(name, param, old)).mask.count:
                changes[name] = change
        if len(left_out) == len(params):
            raise ValueError(
                "TaskVector.between: the base must have parameters of the model's names and shapes (got none of "
                f"{len(params)}); pass the model that was fine-tuned"
            )
        return cls(changes, left_out)

    @classmethod
    @torch.no_grad()
    def from_delta(cls, path: FilePath, base: nn.Module, *, without: Selector = None) -> "TaskVector":
        """Returns the vector of a file that `ChildNetwork.save_delta` wrote, without what the base lacks.

        A head that the base has, too, is compared with it. If that was drawn at random it must be the same one, or be
        left out: the file cannot tell, for it holds the head in full.

        Args:
            path: the file.
            base: torch.nn.Module that the delta is of; it stays as it is. Its head may be another one, or missing.
            without: selects parameters to leave out: a predicate over names, or a regular expression that is searched
                in them; None leaves out none (default: None).

        Raises:
            ValueError: the file is damaged or of another kind, or the model is not its base; or what `between` raises.
            OSError: the file cannot be read.
            TypeError: an argument is of another type.
        """
        check_model(base, "base")
        leave = _leave(without)
        contents, description = files.read(path, files.DELTA)
        shapes = files.shapes_in(path, description)
        params = dict(base.named_parameters(remove_duplicate=False))
        buffers = dict(base.named_buffers())
        changes, left_out = {}, []
        for name, entry in renamed(delta_entries.entries(path, shapes, contents, description), params).items():
            old = params.get(name, buffers.get(name))
            if entry.digest is not None:
                if old is None:
                    files.check_shapes(path, {name: shapes.get(name, ())}, params)
                else:
                    delta.check_base(path, name, old, entry)
            if name in buffers or (entry.mask is None and entry.full is None):  # the base's own
                continue
            if old is None or leave(name) or (entry.full is not None and not _comparable(name, entry.full, old)):
                left_out.append(name)
                continue
            new = entry.full
            if entry.mask is not None and entry.values is not None:
                new = old.cpu().masked_scatter(entry.mask.unpack(), entry.values)
            if new is not None and (change := _change(name, new, old)).mask.count:
                changes[name] = change
        return cls(changes, left_out)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Adds the vector to a model in place, in float32, or float64 for a float64 parameter, and rounds once.

        Args:
            model: torch.nn.Module with a parameter of the name and shape of each change.

        Raises:
            ValueError: a parameter is missing, sharded, sparse or without values, or of another shape, or two changes
                are of one tied parameter. Nothing has been written then.
            TypeError: `model` is no module.
        """
        check_model(model)
        params = dict(model.named_parameters(remove_duplicate=False))
        changes = renamed(self.changes, params)
        found: dict[Tensor, str] = {}
        for name, change in changes.items():
            param = params.get(name)
            kind = "none" if param is None else kind_of(param) or f"shape {tuple(param.shape)}, {param.dtype}"
            if param is None or kind_of(param) or tuple(param.shape) != change.mask.shape or lost_memory(param):
                raise ValueError(
                    f"TaskVector.apply: the model must have a whole '{name}' of shape {change.mask.shape}, with values "
                    f"(got {kind})"
                )
            if found.setdefault(param, name) != name:
                raise ValueError(
                    f"TaskVector.apply: each parameter must have one change (got '{found[param]}' and '{name}', which "
                    "are tied here); leave one out by without="
                )
        for name, change in changes.items():
            param = params[name]
            param.copy_(param.to(_wide(param)) + change.dense().to(param.device))

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
        return max(-1.0, min(1.0, product / norms))

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
        if not math.isfinite(factor):
            raise ValueError(f"TaskVector: a factor must be finite (got {factor})")
        return self._with({name: Change.of(change.dense() * factor) for name, change in self.changes.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "TaskVector":
        return self * (1 / divisor)

    def __neg__(self) -> "TaskVector":
        return self * -1

    def _combined(self, other: "TaskVector", operation: Callable[[Tensor, Tensor], Tensor]) -> "TaskVector":
        changes = {name: Change.of(operation(a, b)) for name, a, b in self._paired(other)}
        others = renamed(dict.fromkeys(other.left_out), [*changes, *self.left_out])
        return self._with(changes, others)

    def _with(self, changes: Mapping[str, Change], left_out: Iterable[str] = ()) -> "TaskVector":
        """Returns the vector of other changes, without those that are none."""
        left = [name for name in dict.fromkeys([*self.left_out, *left_out]) if name not in changes]
        return TaskVector({name: change for name, change in changes.items() if change.mask.count}, left)

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


def _leave(without: Selector) -> Callable[[str], object]:
    return (lambda name: False) if without is None else predicate(without, "TaskVector: without")


def _comparable(name: str, new: Tensor, old: Any) -> bool:
    """Returns whether two tensors are floats of one shape.

    Raises:
        ValueError: one of them is not dense, or has no values.
        TypeError: the base's is no tensor.
    """
    check_type(f"TaskVector: '{name}' of the base", old, Tensor, "a tensor")
    if new.shape != old.shape or not (new.is_floating_point() and old.is_floating_point()):
        return False
    for tensor in (new, old):
        if kind_of(tensor) or lost_memory(tensor):
            raise ValueError(
                f"TaskVector: parameters must be whole dense tensors with values (got '{name}', "
                f"{kind_of(tensor) or 'whose storage was freed'}); make them so, or leave it out by without="
            )
    return True


def _change(name: str, new: Tensor, old: Tensor) -> Change:
    """Returns what turns `old` into `new`; raises ValueError if that is not finite."""
    new, old = new.detach().cpu(), old.detach().cpu()
    same = (new.to(_wide(new)) == old.to(_wide(old))) | (new.isnan() & old.isnan())  # infinite ones, too
    by = (new.to(_wide(new)) - old.to(_wide(old))).float().masked_fill_(same, 0)
    if not by.isfinite().all():
        raise ValueError(
            f"TaskVector: differences must be finite in float32 (got others in '{name}'); leave it out by without="
        )
    return Change.of(by)


def _wide(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which a tensor's values are added: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

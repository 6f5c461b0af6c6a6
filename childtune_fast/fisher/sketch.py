"""Short descriptions of gradients, by which two ways of computing them are compared without keeping them."""

import itertools
import math

import torch
from torch import Tensor

from .rules import Gradient, dense

_SIGNIFICANT = {torch.float64: 1e-9, torch.float32: 2e-4}  # of a gradient's norm; any other dtype: 0.1

_CHUNK = 1 << 20  # elements that are described at once
_FREQUENCIES = (0.7390851, 2.1544347)


class Sketches:
    """For each parameter and example, the norm of a gradient and its products with two fixed vectors."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], Tensor] = {}
        self._tolerance: dict[str, float] = {}
        self._vectors: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def add(self, name: str, example: int, grad: Gradient) -> None:
        """Describes the gradient of a parameter for an example."""
        whole = dense(grad).detach()
        values = (whole if whole.layout == torch.strided else whole.to_dense()).flatten()
        self._tolerance[name] = max(self._tolerance.get(name, 0.0), _SIGNIFICANT.get(values.dtype, 0.1))
        total = torch.zeros(3, dtype=torch.float64, device=values.device)
        for number, chunk in enumerate(values.split(_CHUNK)):
            part = chunk if chunk.dtype == torch.float64 else chunk.float()
            found = [torch.dot(part, wave) for wave in self._waves(part)]
            total[1:] += torch.stack(found).double() * math.cos(number)
            total[0] += torch.dot(part, part)
        total[0].sqrt_()
        self._found[name, example] = total.cpu()

    def _waves(self, values: Tensor) -> list[Tensor]:
        """Returns the two vectors, of the length of some values."""
        key = values.device, values.dtype
        if key not in self._vectors:
            positions = torch.arange(_CHUNK, dtype=torch.float64, device=values.device)
            self._vectors[key] = [torch.cos(positions * frequency).to(values.dtype) for frequency in _FREQUENCIES]
        return [vector[: len(values)] for vector in self._vectors[key]]

    def tell_apart(self) -> bool:
        """Returns whether no two examples have the same gradients, which would not show if they were exchanged."""
        names, examples = {name for name, _ in self._found}, {example for _, example in self._found}
        return all(
            any(self._differ(name, first, second) for name in names)
            for first, second in itertools.combinations(sorted(examples), 2)
        )

    def _differ(self, name: str, first: int, second: int) -> bool:
        nothing = torch.zeros(3, dtype=torch.float64, device="cpu")
        one, other = (self._found.get((name, example), nothing) for example in (first, second))
        return bool(((one - other).abs() > 2 * self._tolerance[name] * torch.maximum(one[0], other[0])).any())

    def different(self, other: "Sketches") -> str | None:
        """Returns the name of a parameter whose gradients differ by more than rounding; None if none do.

        A gradient that is nothing but rounding, such as that of a bias before a softmax, may differ altogether.
        """
        largest = max((float(found[0]) for found in other._found.values()), default=0.0)
        nothing = torch.zeros(3, dtype=torch.float64, device="cpu")
        for name, example in sorted(self._found.keys() | other._found.keys()):
            mine, others = (sketches._found.get((name, example), nothing) for sketches in (self, other))
            tolerance = max(self._tolerance.get(name, 0.0), other._tolerance.get(name, 0.0))
            allowed = tolerance * (float(others[0]) + 1e-3 * largest)
            if not bool(((mine - others).abs() <= allowed).all()):  # also if one is not a number
                return name
        return None

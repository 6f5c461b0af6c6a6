"""A child network as a set of weights: what is in it, and what it shares with another one."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import Self

from ..arguments import check_type
from ..ops.packed_mask import PackedMask, fingerprint
from .names import renamed


class WeightSet:
    """The masks of some parameters. ChildNetwork is its only subclass.

    Attributes:
        packed: {parameter name: PackedMask}, one bit per weight.
    """

    packed: dict[str, PackedMask]

    def masks(self) -> dict[str, Tensor]:
        """Returns {parameter name: bool tensor of the parameter's shape}; True marks the child network's weights."""
        return {name: mask.unpack() for name, mask in self.packed.items()}

    @property
    def fingerprint(self) -> str:
        """The SHA-256, in hexadecimal, of all masks and their shapes; parameter names and order do not matter."""
        return fingerprint(self.packed.values())

    def __repr__(self) -> str:
        count, numel = (sum(getattr(mask, key) for mask in self.packed.values()) for key in ("count", "numel"))
        return f"ChildNetwork({count:,} of {numel:,} weights, in {len(self.packed)} tensors)"

    def overlap(self, other: "WeightSet") -> float:
        """Returns how many weights are in both, as a share of the smaller child network's; 0 if that is empty.

        Args:
            other: another child network, which masks parameters of the same names and shapes.

        Raises:
            ValueError: `other` masks other parameters.
            TypeError: `other` is no child network.
        """
        both = sum(mask.count for mask in self.intersection(other).packed.values())
        smaller = min(sum(mask.count for mask in child.packed.values()) for child in (self, other))
        return both / smaller if smaller else 0.0

    def union(self, other: "WeightSet") -> Self:
        """Returns the child network of the weights that are in this one or in the other.

        Args:
            other: another child network, which masks parameters of the same names and shapes.

        Raises:
            ValueError: `other` masks other parameters.
            TypeError: `other` is no child network.
        """
        return self._combined(other, torch.bitwise_or)

    def intersection(self, other: "WeightSet") -> Self:
        """Returns the child network of the weights that are in this one and in the other.

        Args:
            other: another child network, which masks parameters of the same names and shapes.

        Raises:
            ValueError: `other` masks other parameters.
            TypeError: `other` is no child network.
        """
        return self._combined(other, torch.bitwise_and)

    def difference(self, other: "WeightSet") -> Self:
        """Returns the child network of the weights that are in this one and not in the other.

        Args:
            other: another child network, which masks parameters of the same names and shapes.

        Raises:
            ValueError: `other` masks other parameters.
            TypeError: `other` is no child network.
        """
        return self._combined(other, lambda a, b: a & ~b)

    def _combined(self, other: "WeightSet", operation: Callable[[Tensor, Tensor], Tensor]) -> Self:
        check_type("other", other, WeightSet, "a ChildNetwork")
        others = renamed(other.packed, self.packed)
        of_a, of_b = ({name: mask.shape for name, mask in packed.items()} for packed in (self.packed, others))
        if of_a != of_b:
            differing = next(name for name in [*of_a, *of_b] if of_a.get(name) != of_b.get(name))
            raise ValueError(
                "two child networks can be compared or combined if they mask the same parameters, of the same shapes "
                f"(got '{differing}' of shape {of_a.get(differing)} and {of_b.get(differing)}); make both with one "
                "maskable="
            )
        masks = {}
        for name, mask in self.packed.items():
            masks[name] = PackedMask(mask.shape, operation(mask.bits, others[name].bits.to(mask.bits.device)))
        combined = copy.copy(self)
        combined.packed = masks
        return combined

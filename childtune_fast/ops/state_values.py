"""The state of one parameter as a step computes with it, and how it is stored in fewer bits."""

import torch
from torch import Tensor

from .codes import (
    Codes,
    block_numbers,
    decode_average,
    decode_square,
    encode_average,
    encode_square,
    sanitize,
)
from .rounding import RoundingBits, rounding_bits, stored_randomly
from .step_group import StepGroup


def is_rounded(group: StepGroup) -> bool:
    """Returns whether a step over the group draws random bits to round: for state of fewer bits, or for parameters."""
    return group.stochastic or any(exp_avg.dtype in (torch.uint8, torch.bfloat16) for exp_avg in group.exp_avgs)


class StateValues:
    """The averages of a parameter as floats, and the random bits by which a step rounds.

    Where the state is in the type that computes, these are the tensors of the state, and `store` does nothing.

    Attributes:
        exp_avg, exp_avg_sq: float tensors, in the shape of the state.
        second_moment: what the update divides by: with amsgrad the maximum, else `exp_avg_sq`.
        random: the bits for each value, flat.
    """

    random: RoundingBits

    def __init__(self, group: StepGroup, i: int, step: int, child: Tensor | None) -> None:
        """Reads the state of parameter `i` of a group for a step; `child` is its mask, of the parameter's shape."""
        self._stored = [group.exp_avgs[i], group.exp_avg_sqs[i]] + ([group.max_exp_avg_sqs[i]] if group.amsgrad else [])
        self._scales: list[Tensor] = []
        values = self._stored
        if is_rounded(group):
            numel, device = group.params[i].numel(), group.params[i].device
            offset = 0 if group.slices is None else group.slices[i][0]
            inside = None if child is None else child.reshape(-1)
            bits = rounding_bits(
                numel, seed=group.seed, step=step, param_index=group.indices[i], offset=offset, device=device
            )
            self.random = RoundingBits(*(b if inside is None else b[inside] for b in bits))
            if self._stored[0].dtype == torch.uint8:
                scales = (group.exp_avg_scales, group.exp_avg_sq_scales, group.max_exp_avg_sq_scales)
                self._scales = [of_all[i] for of_all in scales[: len(self._stored)]]
                self._blocks = block_numbers(numel, inside, device)
                values = self._decoded()
            elif self._stored[0].dtype == torch.bfloat16:
                values = [stored.float() for stored in self._stored]
        self.exp_avg, self.exp_avg_sq, self.second_moment = values[0], values[1], values[-1]

    def _decoded(self) -> list[Tensor]:
        coded = [Codes(codes.reshape(-1), scales) for codes, scales in zip(self._stored, self._scales, strict=True)]
        values = [decode_average(coded[0], self._blocks), *(decode_square(c, self._blocks) for c in coded[1:])]
        return [value.view(codes.shape) for value, codes in zip(values, self._stored, strict=True)]

    def store(self) -> None:
        """Rounds the averages to what the state holds."""
        if self.exp_avg is self._stored[0]:
            return
        values = [v.reshape(-1) for v in (self.exp_avg, self.exp_avg_sq, self.second_moment)[: len(self._stored)]]
        random = (self.random.exp_avg, self.random.exp_avg_sq, self.random.max_exp_avg_sq)
        if not self._scales:
            for stored, value, bits in zip(self._stored, values, random):  # noqa: B905 - two or three
                stored.copy_(stored_randomly(value, torch.bfloat16, bits).view(stored.shape))
            return
        exp_avg, squares = sanitize(values[0], values[1:])
        blocks, count = self._blocks, len(self._scales[0])
        coded = [encode_average(exp_avg, blocks, count, random[0])]
        coded += [encode_square(square, blocks, count, bits) for square, bits in zip(squares, random[1:])]  # noqa: B905
        for stored, scales, new in zip(self._stored, self._scales, coded, strict=True):
            stored.copy_(new.codes.view(stored.shape))
            scales.copy_(new.scales)

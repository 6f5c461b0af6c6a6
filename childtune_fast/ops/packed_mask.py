"""One bit per weight: the mask of a child network in one parameter, and how it lies in memory.

Weight `i`, by flat index in the parameter's logical order, is in the child network if bit `i % 8` of byte `i // 8` is
set. Bits are stored in blocks of 1024, the last of which is filled up with zeros. `offsets[b]` counts the child
network's weights before block `b`, so that a kernel finds the place of a weight in the compact state without reading
other blocks. csrc/core/packed_mask.h describes the same layout in C++.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

BLOCK = 1024  # weights
_BLOCK_BYTES = BLOCK // 8
_ALIGNMENT = 16  # bytes that a kernel on a GPU reads at once
_POPCOUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint8)


class PackedMask:
    """The mask of one parameter: which of its weights are in the child network. It never changes.

    Attributes:
        shape: the parameter's shape.
        offsets: int64 tensor of shape [blocks + 1], on the device of `bits`: entry `b` is the number of the child
            network's weights before block `b` of 1024 weights, and the last entry is `count`.
        count: number of weights in the child network.
    """

    def __init__(self, shape: Sequence[int], bits: Tensor) -> None:
        """Makes a mask from its bits in memory.

        Args:
            shape: the parameter's shape.
            bits: uint8 tensor of shape [packed_size(number of weights)], contiguous, on any device. It is kept and not
                copied, unless it is on a GPU and not aligned to 16 bytes.

        Raises:
            ValueError: `bits` has another dtype or length, or bits beyond the last weight.
        """
        self.shape = tuple(shape)
        self._digest: bytes | None = None
        if bits.is_cuda and bits.data_ptr() % _ALIGNMENT:
            bits = bits.clone()
        self._bits, self._version = bits, _version(bits)
        size = packed_size(self.numel)
        if bits.dtype != torch.uint8 or bits.shape != (size,) or not bits.is_contiguous():
            raise ValueError(
                f"PackedMask: bits of a parameter of shape {self.shape} must be a contiguous uint8 tensor of {size} "
                f"bytes (got {bits.dtype}, shape {tuple(bits.shape)})"
            )
        packed = bits.cpu().numpy()
        rest = packed[self.numel // 8 :]
        if rest.size and (rest[1:].any() or rest[0] >> self.numel % 8):
            raise ValueError(f"PackedMask: bits beyond the {self.numel} weights must be 0; the mask is damaged")
        counts = _popcounts(packed).reshape(-1, _BLOCK_BYTES // 8).sum(axis=1, dtype=np.int64)
        offsets = np.concatenate([[0], counts.cumsum()])
        self.count = int(offsets[-1])
        self.offsets = torch.from_numpy(offsets).to(bits.device)

    @property
    def bits(self) -> Tensor:
        """The mask in memory: a uint8 tensor of 128 bytes for each block of 1024 weights.

        Raises:
            RuntimeError: the tensor has been written to since the mask was made.
        """
        if _version(self._bits) != self._version:
            raise RuntimeError(
                "the mask of a child network must not be changed (got one that was written to in place, perhaps by "
                "code that zeroes an optimizer's state); delete the state instead, and make the child network anew"
            )
        return self._bits

    @property
    def digest(self) -> bytes:
        """The SHA-256 of shape and bits, computed once."""
        bits = self.bits  # raises if they have been written to
        if self._digest is None:
            found = hashlib.sha256(repr(self.shape).encode())
            found.update(bits.cpu().numpy().data)
            self._digest = found.digest()
        return self._digest

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "bits": self.bits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def numel(self) -> int:
        """The number of the parameter's weights."""
        return math.prod(self.shape)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter, where this may be the mask of a rank's part (`shards.LocalMask`)."""
        return self.shape

    @property
    def whole_numel(self) -> int:
        """The number of the whole parameter's weights."""
        return math.prod(self.whole_shape)

    @property
    def whole_count(self) -> int:
        """The number of weights in the child network, of the whole parameter."""
        return self.count

    @classmethod
    def pack(cls, mask: Tensor) -> "PackedMask":
        """Returns the mask that a bool tensor of the parameter's shape holds, on that tensor's device."""
        return cls(mask.shape, pack(mask.detach()))

    def unpack(self) -> Tensor:
        """Returns the mask as a bool tensor of the parameter's shape, on the device of `bits`."""
        return unpack(self.bits, self.shape)

    def to(self, device: torch.device) -> "PackedMask":
        """Returns the mask on `device`: this object if it is on it already or the device has no memory, else a copy."""
        if self.bits.device == device or device.type == "meta":
            return self
        moved = PackedMask(self.shape, self.bits.to(device))
        moved._digest = self._digest
        return moved

    def gather(self, dense: Tensor) -> Tensor:
        """Returns the child network's values of a tensor.

        Args:
            dense: tensor of the parameter's shape, on the device of `bits`.

        Returns:
            tensor of shape [count] and the dtype of `dense`, ordered by flat index.
        """
        return dense.masked_select(self.unpack())

    def scatter(self, values: Tensor) -> Tensor:
        """Returns a tensor of the parameter's shape that holds the child network's values, and zeros elsewhere.

        Args:
            values: tensor of shape [count], ordered by flat index, on the device of `bits`.
        """
        return torch.zeros(self.shape, dtype=values.dtype, device=values.device).masked_scatter_(self.unpack(), values)


def _popcounts(packed: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.uint8]":
    """Returns how many bits are set in each group of eight bytes."""
    if hasattr(np, "bitwise_count"):  # new in numpy 2, and several times faster than the table
        return np.bitwise_count(packed.view(np.uint64))
    return _POPCOUNT[packed].reshape(-1, 8).sum(axis=1, dtype=np.uint8)


def _version(bits: Tensor) -> int | None:
    """Returns torch's count of writes to a tensor; None for a tensor made in inference mode, which has no count."""
    return None if bits.is_inference() else bits._version


Masks = dict[Tensor, PackedMask]  # {parameter: its mask}


def pack(mask: Tensor) -> Tensor:
    """Returns the bits of a bool tensor of any shape, as a uint8 tensor of shape [packed_size(numel)] on its device."""
    bits = torch.empty(packed_size(mask.numel()), dtype=torch.uint8, device=mask.device)
    flat = torch.nn.functional.pad(mask.reshape(-1).view(torch.uint8), (0, 8 * bits.numel() - mask.numel()))
    return torch.sum(flat.view(-1, 8) << _places(bits), dim=1, dtype=torch.uint8, out=bits)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the bool tensor that `bits` hold, of the given shape and on their device."""
    flat = (bits[:, None] >> _places(bits)).bitwise_and_(1)
    return flat.view(-1)[: math.prod(shape)].view(torch.bool).view(tuple(shape))


def _places(bits: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=bits.device)


def packed_size(numel: int) -> int:
    """Returns the number of bytes that the bits of `numel` weights take, padding included."""
    return -(-numel // BLOCK) * _BLOCK_BYTES


def fingerprint(masks: Iterable[PackedMask]) -> str:
    """Returns the SHA-256, in hexadecimal, of the shapes and bits of masks; their order does not matter."""
    return hashlib.sha256(b"".join(sorted(mask.digest for mask in masks))).hexdigest()

"""What holds the values of a tensor: the dense tensors inside of sparse and quantised ones, which are made of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

# The parts of compressed layouts, in the order in which torch.sparse_compressed_tensor takes them.
_COMPRESSED = {
    "sparse_csr": ("crow_indices", "col_indices", "values"),
    "sparse_csc": ("ccol_indices", "row_indices", "values"),
    "sparse_bsr": ("crow_indices", "col_indices", "values"),
    "sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
_PER_CHANNEL = ("per_channel_affine", "per_channel_affine_float_qparams")
_QUANTISED = ("per_tensor_affine", *_PER_CHANNEL)
_INTEGERS = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}
REBUILT = ("", "sparse_coo", *_COMPRESSED, *_QUANTISED)  # the kinds that `rebuilt` can make


def kind_of(tensor: Tensor) -> str:
    """Returns "" for a dense tensor with values, else what the tensor is, such as "meta", "sparse_csr" or "DTensor"."""
    if is_lazy(tensor):
        return "uninitialized"
    if tensor.is_meta:
        return "meta"
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass that wraps tensors, such as DTensor
        return type(tensor).__name__
    if tensor.is_quantized:
        return str(tensor.qscheme()).removeprefix("torch.")
    if tensor.is_nested:
        return "nested"
    return "" if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.").removeprefix("_")


def parts(tensor: Tensor) -> dict[str, Tensor]:
    """Returns the dense tensors that hold a tensor's values, by name, without a graph; {"": itself} for a dense tensor.

    They lie in the tensor's memory, but for what it does not hold in tensors, such as one scale for all its values.

    Raises:
        TypeError: the tensor is of a kind whose values cannot be reached.
    """
    kind = kind_of(tensor)
    tensor = tensor if kind == "uninitialized" else tensor.detach()
    if kind == "":
        return {"": tensor}
    if kind == "meta":  # it has no values
        return {}
    if kind == "sparse_coo":
        found = {"indices": tensor._indices(), "values": tensor._values()}
        return {**found, "coalesced": torch.tensor(tensor.is_coalesced(), device="cpu")}
    if kind in _COMPRESSED:
        return {name: getattr(tensor, name)() for name in _COMPRESSED[kind]}
    if kind in _QUANTISED and tensor.dtype in _INTEGERS:
        return _quantised_parts(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        inner = {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
        return {f"{n}.{p}": t for n, i in inner.items() if isinstance(i, Tensor) for p, t in parts(i).items()}
    raise TypeError(f"a tensor's values can be read if it is dense, sparse, or quantised to 8 or 32 bits (got {kind})")


def _quantised_parts(tensor: Tensor) -> dict[str, Tensor]:
    integers = torch.empty(0, dtype=_INTEGERS[tensor.dtype], device=tensor.device)
    integers.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    if tensor.qscheme() == torch.per_tensor_affine:
        scale = torch.tensor(tensor.q_scale(), dtype=torch.float64, device="cpu")
        zero_point = torch.tensor(tensor.q_zero_point(), device="cpu")
        return {"integers": integers, "scale": scale, "zero_point": zero_point}
    return {
        "integers": integers,
        "scale": tensor.q_per_channel_scales(),
        "zero_point": tensor.q_per_channel_zero_points(),
        "axis": torch.tensor(tensor.q_per_channel_axis(), device="cpu"),
    }


def rebuilt(kind: str, shape: Sequence[int], parts: Mapping[str, Tensor], *, check: bool = True) -> Tensor:
    """Returns the tensor that consists of the given parts; a dense or sparse one lies in their memory.

    Args:
        kind: what `kind_of` returned for the tensor, one of `REBUILT`.
        shape: the tensor's shape.
        parts: what `parts` returned for the tensor.
        check: whether indices of a sparse tensor are checked; wrong ones could lead outside of its memory
            (default: True).

    Raises:
        RuntimeError: the parts do not fit each other.
    """
    if kind == "":
        return parts[""]
    if kind == "sparse_coo":
        return torch.sparse_coo_tensor(
            parts["indices"],
            parts["values"],
            tuple(shape),
            is_coalesced=bool(parts["coalesced"]),
            device=parts["values"].device,
            check_invariants=check,
        )
    if kind in _COMPRESSED:
        compressed, plain, values = (parts[name] for name in _COMPRESSED[kind])
        return torch.sparse_compressed_tensor(
            compressed,
            plain,
            values,
            tuple(shape),
            layout=getattr(torch, kind),
            device=values.device,
            check_invariants=check,
        )
    integers, scale, zero_point = parts["integers"], parts["scale"], parts["zero_point"]
    if kind in _PER_CHANNEL:
        axis = int(parts["axis"])
        if not (0 <= axis < integers.dim() and scale.shape == zero_point.shape == integers.shape[axis : axis + 1]):
            raise RuntimeError("one scale and one zero point must be there for each channel")  # torch would read beyond
        return torch._make_per_channel_quantized_tensor(integers, scale, zero_point, axis)
    return torch._make_per_tensor_quantized_tensor(integers, float(scale), int(zero_point))


def raw(tensor: Tensor) -> Tensor:
    """Returns a dense tensor's bytes in logical order, as uint8 on its device."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors of any kinds and on any devices are equal in kind, dtype, shape and every bit.

    Raises:
        TypeError: they are of a kind whose values cannot be reached.
    """
    if (kind_of(a), a.dtype, a.shape) != (kind_of(b), b.dtype, b.shape):
        return False
    pairs = zip(parts(a).values(), parts(b).values(), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(raw(x), raw(y.to(x.device))) for x, y in pairs)


def copied(tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor of any kind, in memory of its own.

    Raises:
        TypeError: the tensor is of a kind whose values cannot be reached.
    """
    kind, inside = kind_of(tensor), parts(tensor)
    if kind not in REBUILT:
        return tensor.detach().clone()
    return rebuilt(kind, tensor.shape, {name: part.clone() for name, part in inside.items()}, check=False)


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Gives a tensor the values of another one, in place and without a graph, whatever its memory and mode allow.

    Args:
        tensor: the tensor to write to. If it cannot be written in its memory, as when that has another size by now or
            serves several elements at once (a dimension that was expanded), it gets new memory.
        values: tensor of the kind, dtype, shape and device that the other shall have.
    """
    same_form = all(getattr(tensor, key) == getattr(values, key) for key in ("shape", "dtype", "device"))
    kind = kind_of(values)
    with (
        torch.inference_mode(tensor.is_inference()),
        torch.no_grad(),
        torch._C.DisableTorchFunctionSubclass(),  # which may refuse it, amid the tensors that are written
    ):  # in this order: leaving a mode enables gradients
        if kind in _COMPRESSED:  # which ignore what is assigned to .data
            tensor.resize_as_sparse_(values).copy_(values)
        elif same_form and kind == kind_of(tensor) and kind not in _PER_CHANNEL and not _is_expanded(tensor):
            tensor.copy_(values)
        else:
            tensor.data = copied(values)  # made in the same mode, as `tensor` must stay


def _is_expanded(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))

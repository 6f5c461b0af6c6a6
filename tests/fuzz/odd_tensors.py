"""Tensors as users have them, in buffers with guard zones, and tensors and other things as nobody should pass."""

import math
import os
from types import MappingProxyType

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (5,), (3, 4), (2, 3, 2), (0, 3), (40,), (1, 1), (7, 1), (2, 1, 3), (33,))
LARGE = ((127,), (128,), (129,), (1023,), (1024,), (1025,), (4095,), (4097,), (32, 33), (2,) + (1,) * 66)
GUARD = 64  # bytes before and after a tensor
PATTERN = 0xA5
_NOISE = {dtype: torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype) for dtype in DTYPES}
_PLAIN = ("plain",) * 12 + ("transposed", "transposed", "gaps", "gaps")
_GUARDS = torch.full((1 << 17,), PATTERN, dtype=torch.uint8)
LAYOUTS = (*_PLAIN, "expanded", "sliding", "misaligned")


class Wrapper(torch.Tensor):
    """A tensor without memory, of which every operation raises."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (5,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, *args, **kwargs):
        raise NotImplementedError("a wrapper")

    __repr__ = object.__repr__


class Liar(torch.Tensor):
    """A tensor whose Python attributes say what it is not."""

    lies = MappingProxyType({})

    def __getattribute__(self, name):
        lies = type(self).lies
        return lies[name] if name in lies else super().__getattribute__(name)

    __repr__ = object.__repr__


def liar(rng, like):
    """A tensor like another one, which lies about one or two things."""
    lies = {
        "shape": rng.choice(((1 << 40,), (-1,), (), 7, None, [5], "x")),
        "ndim": rng.choice((-1, 1 << 40, 65, "x", None)),
        "dtype": rng.choice((torch.float32, torch.int64, "torch.float32", None)),
        "data_ptr": rng.choice((lambda: 8, lambda: -1, lambda: 1 << 70, lambda: "x", None)),
        "element_size": rng.choice((lambda: 32, lambda: -4, lambda: "x")),
        "stride": rng.choice((lambda: (1 << 40,), lambda: (-1,), lambda: (), lambda: None)),
        "is_cpu": rng.choice((False, "x")),
        "is_cuda": True,
        "get_device": lambda: rng.choice((-1, 0, 1 << 40)),
    }
    kind = type("Liar", (Liar,), {"lies": {name: lies[name] for name in rng.sample(sorted(lies), rng.choice((1, 2)))}})
    return like.detach().as_subclass(kind)


def shape(rng, large=0.04):
    return rng.choice(LARGE if rng.random() < large else SHAPES)


def strides(layout, sizes):
    """The strides of a layout, and how many elements its memory takes."""
    dense, step = [], 1
    for n in reversed(sizes):
        dense.insert(0, step)
        step *= max(n, 1)
    if layout == "transposed":
        dense, step = [], 1
        for n in sizes:
            dense.append(step)
            step *= max(n, 1)
    elif layout == "gaps":
        dense = [3 * s for s in dense]
    elif layout == "expanded" and sizes:
        dense[0] = 0
    elif layout == "sliding":
        dense = [1] * len(sizes)
    extent = 0 if 0 in sizes else 1 + sum((n - 1) * s for n, s in zip(sizes, dense, strict=True))
    return dense, extent


class Buffers:
    """Makes tensors, each in a buffer of its own or all in one, with guard zones of a fixed pattern around them."""

    def __init__(self, rng, shared=None):
        self.rng = rng
        self.shared = _GUARDS[: 1 << 13].clone() if shared else None
        self.used = GUARD

    def tensor(self, dtype, sizes, layout="plain"):
        """A tensor of noise."""
        size = torch.finfo(dtype).bits // 8
        steps, extent = strides(layout, sizes)
        if layout == "misaligned":
            memory = bytearray([PATTERN]) * (2 * GUARD + extent * size + 1)
            flat = torch.frombuffer(memory, dtype=dtype, offset=GUARD + 1, count=extent) if extent else None
            made = torch.empty(sizes, dtype=dtype) if flat is None else flat.as_strided(sizes, steps)
        else:
            need = -(-(extent * size + GUARD) // 8) * 8
            if self.shared is not None and self.used + need <= self.shared.untyped_storage().nbytes():
                buffer, first, self.used = self.shared, self.used, self.used + need
            else:
                buffer, first = _GUARDS[: need + GUARD].clone(), GUARD
            made = buffer.view(dtype).as_strided(sizes, steps, first // size)
        numel = math.prod(sizes)
        if layout in ("expanded", "sliding"):
            return made  # holds the pattern; torch refuses to copy into it
        begin = self.rng.randrange(100) if numel < 4800 else 0
        return made.copy_(_NOISE[dtype][begin : begin + numel].view(sizes))

    def parameter(self, dtype, sizes, layout="plain"):
        return torch.nn.Parameter(self.tensor(dtype, sizes, layout))


def freed(like):
    """A tensor like another one, whose storage has been freed."""
    made = torch.ones(tuple(like.shape), dtype=like.dtype)
    made.untyped_storage().resize_(0)
    return made


def shrunk(like):
    """A tensor like another one, at the end of a storage that has become smaller."""
    size = like.element_size()
    buffer = torch.ones(like.numel() * size + 4096, dtype=torch.uint8)
    made = buffer.view(like.dtype)[4096 // size :].view(tuple(like.shape))
    buffer.untyped_storage().resize_(64)
    return made


def memory_is_whole(tensor):
    """Whether torch itself can read a tensor; where it cannot, the fuzzer must not call torch alone."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    if tensor.device.type != "cpu" or any(n >= 1 << 20 for n in tensor.shape):
        return False
    try:
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        end = (tensor.storage_offset() + extent) * tensor.element_size()
        storage = tensor.untyped_storage()
        return tensor.numel() == 0 or (end <= storage.nbytes() and storage.data_ptr() != 0)
    except (RuntimeError, NotImplementedError):
        return False


FAULTY_MEMORY = (freed, shrunk)
ALIASED = (
    lambda like: like,
    lambda like: like.detach(),
    lambda like: like.new_ones(()).expand(tuple(like.shape)),
    lambda like: like.new_ones(1 + sum(like.shape)).as_strided(tuple(like.shape), (1,) * like.dim()),
)
OTHER = (
    lambda like: like.double(),
    lambda like: like.bfloat16(),
    lambda like: like.long(),
    lambda like: like.to(torch.cfloat),
    lambda like: like.to(torch.float8_e4m3fn),
    lambda like: like > 0,
    lambda like: like.unsqueeze(0),
    lambda like: like.reshape(-1),
    lambda like: like.new_ones(like.numel() + 1),
    lambda like: like.new_ones(max(like.numel() - 1, 0)),
    lambda like: torch.empty(tuple(like.shape), dtype=like.dtype, device="meta"),
    lambda like: torch.full(tuple(like.shape), math.nan, dtype=like.dtype),
    lambda like: torch.full(tuple(like.shape), -1.0, dtype=like.dtype),
    lambda like: like.detach().clone().requires_grad_(),
    lambda like: torch._neg_view(like),
    lambda like: torch._efficientzerotensor(tuple(like.shape)),
    lambda like: like.detach().clone().to_sparse() if like.dim() else like,
    lambda like: torch.empty(0).as_strided((1 << 62, 1 << 62, 0), (1, 1, 1)),
    lambda like: like.detach().clone().t() if like.dim() == 2 else like,
    lambda like: Wrapper(),
)
if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which ends the process where memory is refused
    OTHER += (lambda like: torch.ones(1).expand(1 << 62),)


def odd_tensor(rng, like):
    """A tensor that cannot, or hardly can, stand where `like` stands."""
    if not memory_is_whole(like):
        return rng.choice(FAULTY_MEMORY)(torch.ones(5)) if isinstance(like, torch.Tensor) else None
    if rng.random() < 0.25 and like.dtype in DTYPES and like.numel() < 9999:
        return rng.choice(FAULTY_MEMORY)(like)
    try:
        with torch.no_grad():
            return rng.choice(ALIASED if rng.random() < 0.2 else OTHER)(like)
    except (RuntimeError, TypeError, NotImplementedError):
        return None  # torch cannot make it


def odd_thing(rng):
    """Something that is no tensor, mostly."""
    things = (None, True, 0, 1, -1, 2, 1 << 31, 1 << 63, 1 << 70, -(1 << 63), 0.5, 1.0, -0.0, math.nan, math.inf, 1e308)
    more = (
        "",
        "x",
        "all",
        "child",
        "cpu",
        b"x",
        [],
        (),
        [1],
        (0.9, 0.999),
        (1, 2, 3),
        {},
        {"a": 1},
        object(),
        torch,
        int,
    )
    tensors = (
        torch.ones(()),
        torch.ones(1),
        torch.ones(5),
        torch.ones(2, 3),
        torch.tensor(7),
        torch.ones((), device="meta"),
    )
    kind = rng.random()
    if kind < 0.05:
        return freed(torch.ones(()))
    return rng.choice(things if kind < 0.5 else more if kind < 0.8 else tensors)

"""Calls of the compiled module itself, with groups that hold nonsense, or do things when they are looked at."""

import contextlib
import gc
import math
from collections import defaultdict

import torch
from acting import HARMFUL, Action, Number, act_when_read
from odd_tensors import DTYPES, LAYOUTS, Buffers, Wrapper, liar, odd_tensor, odd_thing, shape
from torch.overrides import TorchFunctionMode

from childtune_fast.native import load
from childtune_fast.ops.packed_mask import pack
from childtune_fast.ops.step_group import StepGroup

GOOD = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "amsgrad": True, "grad_factor": 1.0}
GOOD |= {"keep_threshold": 20000, "published_code": False, "seed": 3, "max_grad_norm": None}
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
CHILD = ("child_bits", "child_offsets", "child_counts")
OTHERS = ("indices", "slices", "decay_outside", "lr_on_device", "child_norm", "capturable", "sharded")
OFFSETS = (-9, -1, 0, 1, 17, 5000, 1 << 62)
THREADS = (1, 1, 1, 2, 2, 0, -5, 1 << 31, 1 << 70)


class Group:
    """A StepGroup with attributes that may be deleted, or belong to another class."""

    def __init__(self, group):
        self.__dict__.update({name: getattr(group, name) for name in StepGroup.__slots__})


def group_of(rng, buffers):
    """A group that can be stepped, mostly."""
    group = Group(StepGroup(**GOOD))
    group.amsgrad = rng.random() < 0.5
    masked = rng.random() < 0.3
    for i in range(rng.choice((1, 1, 2, 3))):
        dtype, sizes = rng.choice(DTYPES), shape(rng)
        averages = torch.float64 if dtype == torch.float64 else torch.float32
        layout = rng.choice(LAYOUTS[:16])
        group.params.append(buffers.tensor(dtype, sizes, layout))
        group.grads.append(buffers.tensor(dtype, sizes, rng.choice((layout, "plain"))))
        count = sizes
        if masked:
            mask = torch.rand(sizes) < 0.5
            bits = pack(mask)
            blocks = bits.view(-1, 128)
            sums = [int(mask.reshape(-1)[: 1024 * b].sum()) for b in range(len(blocks) + 1)]
            count = (sums[-1],)
            group.child_bits.append(bits)
            group.child_offsets.append(torch.tensor(sums))
            group.child_counts.append(sums[-1])
        for name in LISTS[2:5]:
            getattr(group, name).append(buffers.tensor(averages, count, "plain" if masked else layout))
        group.steps.append(torch.zeros(()))
        group.indices.append(i)
    group.keep_threshold = 65536 if masked else rng.choice((20000, 65536, 1))
    if not masked and rng.random() < 0.2:
        group.slices = [(rng.choice((0, 7, 1 << 40)), rng.choice((0, 1)), 1000) for _ in group.params]
    return group


def tensors_of(group, names=(*LISTS, "child_bits", "child_offsets")):
    lists = [group.__dict__.get(name) for name in names]
    return [t for values in lists if isinstance(values, list) for t in values if isinstance(t, torch.Tensor)]


def spoil(rng, group):
    """Puts something odd into a group."""
    kind = rng.random()
    name = rng.choice((*LISTS, *LISTS, *CHILD, *OTHERS[:2]))
    values = group.__dict__.get(name)
    if kind < 0.1:
        vars(group).pop(rng.choice((*GOOD, *LISTS, *CHILD, *OTHERS)), None)
    elif kind < 0.3:
        setattr(group, rng.choice((*GOOD, *OTHERS)), odd_thing(rng))
    elif not isinstance(values, list) or not values or kind < 0.4:
        setattr(group, name, rng.choice((odd_thing(rng), [odd_thing(rng)], (), [])))
    else:
        i = rng.randrange(len(values))
        if kind < 0.5:
            del values[i]
        elif kind < 0.6:
            values[i] = odd_thing(rng)
        elif kind < 0.7:
            values[i] = rng.choice(tensors_of(group) or [None])
        else:
            values[i] = _odd_entry(rng, name, values[i])


def _odd_entry(rng, name, value):
    """Something else in the place of an entry of one of a group's lists."""
    if name == "child_counts":
        return rng.choice((-1, 0, 1, 1 << 40, value))
    if name == "slices":
        return rng.choice(((1 << 63, 3, 1 << 63), (0, -1, 0), (0,), None, (0, 1 << 62, 5), (0, 1, 1 << 64)))
    if name == "steps" and rng.random() < 0.7:
        return torch.full((), rng.choice((2.0**24, 2.0**32, -1.0, math.nan, 0.5, 2.0**24 - 1)))
    if name in CHILD and rng.random() < 0.6 and isinstance(value, torch.Tensor) and value.dim() and len(value):
        value[rng.randrange(min(len(value), 8))] = 255 if name == "child_bits" else rng.choice(OFFSETS)
        return value
    return odd_tensor(rng, value)


def step(rng, oracle, native, buffers):
    groups = [group_of(rng, buffers) for _ in range(rng.choice((1, 1, 2)))]
    others = [group_of(rng, Buffers(rng))]
    acted, liars = False, []
    kind = rng.random()
    if kind < 0.2:
        group = rng.choice(groups)
        action = Action(rng, native, group, others, tensors_of(group))
        acted = action.name in HARMFUL
        if kind < 0.15:
            act_when_read(group, rng.choice((*GOOD, *LISTS, *OTHERS[:3], *CHILD)), action)
        else:
            setattr(group, rng.choice((*GOOD, "decay_outside", "keep_threshold")), Number(action))
    elif kind < 0.85:
        for _ in range(rng.choice((1, 1, 2))):
            spoil(rng, rng.choice(groups))
    elif kind < 0.9 and tensors_of(groups[0]):
        name = rng.choice([name for name in LISTS if vars(groups[0]).get(name)])
        values = getattr(groups[0], name)
        liars = values[-1:]  # as they are, for a liar's memory cannot be asked for
        values[-1] = liar(rng, values[-1])
    held = [list(v) for group in groups for v in vars(group).values() if isinstance(v, list)]
    tensors = [t for group in groups for t in tensors_of(group)]
    own = [t for group in groups for t in tensors_of(group, (*LISTS[:1], *LISTS[2:]))]
    watch = () if acted else tensors
    passed = groups if rng.random() < 0.97 else [*groups, odd_thing(rng)]
    oracle.call(
        "native.step",
        lambda: native.step(passed, rng.choice(THREADS)),
        watch=watch,
        own=() if acted else [*own, *liars],
        sentences=False,
    )
    del held


def operand(rng, buffers, dtype=None, odd=0.3):
    tensor = buffers.tensor(dtype or rng.choice(DTYPES), shape(rng), rng.choice(LAYOUTS))
    kind = rng.random()
    if kind < odd:
        return odd_tensor(rng, tensor) if kind < 0.8 * odd else odd_thing(rng)
    return tensor


def printable(rng, thing):
    """What may be an argument of its own: pybind11 prints those, and torch crashes on some when it prints them."""
    with contextlib.suppress(Exception):
        if thing.numel() and not thing.untyped_storage().nbytes():
            return None
    return None if isinstance(thing, Wrapper) else thing


def sums(rng, oracle, native, buffers):
    tensors = [operand(rng, buffers, odd=0.15) for _ in range(rng.choice((0, 1, 2, 5)))]
    bits = [None] * len(tensors)
    for i, t in enumerate(tensors):
        if rng.random() < 0.3 and isinstance(t, torch.Tensor) and t.numel() < 9999:
            bits[i] = torch.randint(0, 255, (-(-t.numel() // 1024) * 128,), dtype=torch.uint8)
            bits[i][t.numel() // 8 :] = 0
            if rng.random() < 0.2:
                bits[i] = odd_tensor(rng, bits[i])
    watch = [t for t in (*tensors, *bits) if isinstance(t, torch.Tensor)]
    bits = bits if rng.random() < 0.95 else printable(rng, odd_thing(rng))
    threads = rng.choice(THREADS)
    oracle.call("sums_of_squares", lambda: native.sums_of_squares(tensors, bits, threads), watch=watch, sentences=False)


def select(rng, oracle, native, buffers):
    scores = [operand(rng, buffers, torch.float32, 0.1) for _ in range(rng.choice((0, 1, 2, 3)))]
    counts = [t.numel() if isinstance(t, torch.Tensor) else 0 for t in scores]
    bits = [torch.zeros(-(-min(n, 9999) // 1024) * 128, dtype=torch.uint8) for n in counts]
    if bits and rng.random() < 0.15:
        i = rng.randrange(len(bits))
        bits[i] = rng.choice((odd_thing(rng), odd_tensor(rng, bits[i]), scores[i]))
    k = rng.choice((0, sum(counts) // 2, sum(counts), sum(counts) + 1, -1, 1 << 40, 1 << 70))
    tensors = [t for t in (*scores, *bits) if isinstance(t, torch.Tensor)]
    largest = rng.random() < 0.5
    threads = rng.choice(THREADS)
    own = [t for t in bits if isinstance(t, torch.Tensor)]
    oracle.call(
        "select_top",
        lambda: native.select_top(scores, bits, k, largest, threads),
        watch=tensors,
        own=own,
        sentences=False,
    )


def squares(rng, oracle, native, buffers):
    grad = printable(rng, operand(rng, buffers, odd=0.2))
    sizes = tuple(grad.shape) if isinstance(grad, torch.Tensor) and grad.numel() < 9999 else (5,)
    score = buffers.tensor(torch.float32, sizes)
    if rng.random() < 0.2:
        score = printable(rng, rng.choice((odd_tensor(rng, score), odd_thing(rng), grad)))
    weight = rng.choice((1.0, 0.0, -1.0, math.nan, printable(rng, odd_thing(rng))))
    watch = [t for t in (grad, score) if isinstance(t, torch.Tensor)]
    own = [score] if isinstance(score, torch.Tensor) else []
    oracle.call(
        "accumulate_squares",
        lambda: native.accumulate_squares(score, grad, weight, 1.0, rng.choice(THREADS)),
        watch=watch,
        own=own,
        sentences=False,
    )


class Meddling(TorchFunctionMode):
    """Changes what is being read, now and then when a function of torch is called."""

    def __init__(self, rng, changes):
        super().__init__()
        self.rng, self.changes = rng, changes

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.rng.random() < 0.5:
            self.rng.choice(self.changes)()
            gc.collect(0)
        return function(*args, **(kwargs or {}))


def read_states(rng, oracle, native, _):
    """Reads parameters and their states, whatever these are, while other code changes them."""
    keys = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(rng.choice((1, 4, 40)))]
    for param in rng.sample(params, rng.randint(0, len(params))):
        param.grad = rng.choice((torch.ones(3), torch.ones(3, dtype=torch.cfloat).conj().imag))
    known = rng.sample(params, len(params)) if rng.random() < 0.5 else list(params)
    states = defaultdict(dict, {param: {key: torch.ones(3) for key in keys} for param in known})
    masks = {param: object() for param in known if rng.random() < 0.5}
    thing, stranger = odd_thing(rng), torch.ones(3)
    changes = [params.clear, states.clear, masks.clear, lambda: states.update({torch.ones(1): {} for _ in range(50)})]
    changes += [lambda: states.pop(rng.choice(known), None), lambda: states.__setitem__(rng.choice(known), thing)]
    changes += [lambda: rng.choice(list(states.values()) or [{}]).clear(), lambda: params.append(stranger)]
    for change in rng.sample(changes, rng.choice((0, 0, 1))):
        change()
    arguments = [states, rng.choice((None, masks)), params, rng.choice((0, 7, 1 << 62)), rng.random() < 0.5]
    if rng.random() < 0.3:
        arguments[rng.randrange(5)] = printable(rng, odd_thing(rng))

    def read():
        reader = native.StateReader(*arguments[:2])
        with Meddling(rng, changes) if rng.random() < 0.5 else contextlib.nullcontext():
            return [reader.read(*arguments[2:]) for _ in range(2)]

    oracle.call("StateReader", read, sentences=False)


def other(rng, oracle, native, buffers):
    words = [rng.choice((0, 1, 0xFFFFFFFF, 1 << 32, -1, None, "x", 0.5)) for _ in range(rng.choice((4, 4, 2, 0, 5)))]
    things = [printable(rng, odd_thing(rng)) for _ in range(3)]
    calls = {
        "philox": lambda: native.philox4x32_10(words, words[:2]),
        "philox of things": lambda: native.philox4x32_10(*things[:2]),
        "GpuKernels": lambda: native.GpuKernels(
            rng.choice((0, -1, 1 << 31, things[0])), rng.choice((b"", b"x" * 9, things[1]))
        ),
        "tie_counts": lambda: native.GpuKernels.tie_counts(rng.choice((0, 5, -1, 1 << 62, things[0]))),
        "without a GPU": lambda: native.GpuKernels.__new__(native.GpuKernels).step([group_of(rng, buffers)], 0),
        "set_instruction_set": lambda: native.set_instruction_set(rng.choice(("baseline", "avx2", "x", things[0]))),
        "no arguments": lambda: rng.choice((native.step, native.select_top, native.sums_of_squares))(),
        "names": lambda: (native.instruction_set(), native.tensor_access(), native.parallel_runtime()),
    }
    name = rng.choice(tuple(calls))
    returned, _ = oracle.call(name, calls[name], sentences=False)
    if returned and name in ("GpuKernels", "without a GPU"):
        oracle.problem("bare errors", f"{name}: there is no GPU, and it returned")


def many_threads(rng, oracle, native, _):
    """Asks for far more threads than there can be, over so many elements that threads are worth it."""
    tensor, threads = torch.ones(1 << 18), rng.choice((3, 64, 1 << 20, 1 << 30))
    oracle.call("many threads", lambda: native.sums_of_squares([tensor], [None], threads), sentences=False)


CALLS = (step,) * 800 + (sums, select, squares, read_states, other) * 100 + (many_threads,)


def native_case(rng, oracle):
    """Some calls of the compiled module, with tensors read in one of the two ways."""
    native = load.load_native()
    native.force_attribute_access(rng.random() < 0.3)
    native.set_instruction_set(rng.choice(native.supported_instruction_sets()))
    try:
        for _ in range(4):
            rng.choice(CALLS)(rng, oracle, native, Buffers(rng, shared=rng.random() < 0.5))
    finally:
        native.force_attribute_access(False)
        native.set_instruction_set(native.supported_instruction_sets()[-1])

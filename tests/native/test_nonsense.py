"""Whatever is passed to the compiled module from Python, the process lives."""

import pytest
from processes import python, result_of

FUZZ = """
import random, sys, torch
sys.path.insert(0, "tests/support")
from childtune_fast.native import load
from childtune_fast.ops.step_group import StepGroup
native = load.load_native()
chance = random.Random(0)
GOOD = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, amsgrad=True, grad_factor=1.0,
            keep_threshold=20000, published_code=False, seed=3, max_grad_norm=None)
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
freed = torch.ones(6); freed.untyped_storage().resize_(0)
class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls): return torch.Tensor._make_wrapper_subclass(cls, (6,), dtype=torch.float32)
    @classmethod
    def __torch_dispatch__(cls, *a, **k): raise NotImplementedError
THINGS = [None, 1, -1, 1 << 70, 0.5, float("nan"), "x", b"x", [], (), [1], {}, object(), torch, int, Wrapper(), freed,
          torch.ones(5), torch.ones(6, dtype=torch.float64), torch.ones(6, dtype=torch.int64), torch.ones(()),
          torch.ones(6, device="meta"), torch.ones(6).to_sparse(), torch.ones(6, dtype=torch.cfloat), torch.ones(2, 3),
          torch.ones(6, dtype=torch.float8_e4m3fn), torch.ones(6, dtype=torch.bool), torch.ones(0),
          torch.full((), -1.0), torch._efficientzerotensor(6)]
def group():
    g = StepGroup(**GOOD)
    for name in LISTS[:-1]: getattr(g, name).extend([torch.ones(6), torch.ones(6)])
    g.steps.extend([torch.zeros(()), torch.zeros(())]); g.indices.extend([0, 1])
    return g
native.step([group()], 1)
refused = 0
def attempt(function, *args):
    global refused
    try: function(*args)
    except Exception: refused += 1
for thing in THINGS:
    for threads in (1, 0, -5, thing):
        if thing is freed: break  # pybind11 would print it, and torch crashes when printing it
        attempt(native.step, thing, threads); attempt(native.step, [thing], threads)
        for arguments in ((thing, [None]), ([torch.ones(6), thing], [None, None]), ([torch.ones(6)], [thing]),
                          ([torch.ones(6)], thing)):
            attempt(native.sums_of_squares, *arguments, threads)
        attempt(native.accumulate_squares, torch.ones(6), thing, 1.0, 1.0, threads)
        attempt(native.accumulate_squares, thing, torch.ones(6), 1.0, 1.0, threads)
        attempt(native.accumulate_squares, torch.ones(6), torch.ones(6), thing, thing, threads)
    for name in (*GOOD, *LISTS, "indices", "slices"):
        g = group(); setattr(g, name, thing); attempt(native.step, [group(), g], 2)
        if name not in GOOD:
            for bad in ([thing], [thing, thing]):
                g = group(); setattr(g, name, bad); attempt(native.step, [g], 2)
    for name in GOOD:
        g = group(); delattr(g, name); attempt(native.step, [g], 2)
    for slice in ((thing, 6, 6), (0, thing, 6), (0, 6, thing), (0,), (1 << 63, 3, 1 << 63)):
        g = group(); g.slices = [slice] * 2; attempt(native.step, [g], 2)
CHILD = ("child_bits", "child_offsets", "child_counts")
def masked():
    g = group()
    for name in LISTS[2:5]: getattr(g, name)[:] = [torch.ones(2), torch.ones(2)]
    bits = torch.zeros(128, dtype=torch.uint8); bits[0] = 0b10010
    g.child_bits += [bits.clone(), bits.clone()]; g.child_offsets += [torch.tensor([0, 2]), torch.tensor([0, 2])]
    g.child_counts += [2, 2]
    return g
native.step([masked()], 1)
MASKS = [torch.zeros(128, dtype=torch.uint8), torch.full((128,), 255, dtype=torch.uint8), torch.tensor([0, -1]),
         torch.tensor([-9, 2]), torch.tensor([9, 2]), torch.tensor([0, 7]), torch.tensor([1 << 62, 2]),
         torch.arange(256)[::2]]
for name in (*LISTS, *CHILD):
    for thing in [*THINGS, *MASKS]:
        for bad in (thing, [thing], [thing, thing]):
            g = masked(); setattr(g, name, bad); attempt(native.step, [g], 2)
g = masked(); g.child_bits[0][0] = 63; before = g.params[0].clone()  # more weights than were counted
native.step([g], 1); assert g.params[0].equal(before) and g.exp_avgs[0].tolist() == [1, 1]
for first in (1 << 63) - 1, -5, 17, 5000:  # offsets that were not counted
    g = masked(); g.child_offsets[0][0] = first
    try: native.step([g], 1)
    except ValueError: continue
    raise AssertionError(first)
for _ in range(300):
    g = group()
    for _ in range(chance.randint(1, 3)):
        getattr(g, chance.choice(LISTS))[chance.randrange(2)] = chance.choice(THINGS)
    attempt(native.step, [g], chance.choice([1, 2]))
assert refused > 1000, refused
good = group(); native.step([good], 2); assert good.steps[1] == 1
print("survived")
"""


@pytest.mark.parametrize("access", ["", "native.force_attribute_access(True)"], ids=["DLPack", "attributes"])
def test_nonsense_never_crashes_the_kernels(access):
    """Wrong objects, given to the compiled module directly: it raises or takes them, and the process lives."""
    code = FUZZ.replace("chance =", f"{access}\nchance =", 1)
    assert result_of(python(code))[0] == "survived\n"

"""Calls of the compiled module that meet other code: what they read calls them again, or takes away what they hold."""

import pytest
from processes import python, result_of

PRELUDE = """
import sys, threading, gc, torch
from childtune_fast.native import load
native = load.load_native()
OPTIONS = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, amsgrad=False, grad_factor=1.0,
               keep_threshold=20000, published_code=False, seed=3, max_grad_norm=None, decay_outside=False,
               slices=None, child_bits=[], child_offsets=[], child_counts=[], max_exp_avg_sqs=[],
               stochastic=False, state="float32", exp_avg_scales=[], exp_avg_sq_scales=[], max_exp_avg_sq_scales=[])
TENSORS = ("params", "grads", "exp_avgs", "exp_avg_sqs")
class Group:
    def __init__(self, numel=64, count=4):
        self.__dict__.update(OPTIONS)
        for name in TENSORS: setattr(self, name, [torch.ones(numel) for _ in range(count)])
        self.steps, self.indices = [torch.zeros(()) for _ in range(count)], list(range(count))
    def clear(self):
        for value in vars(self).values():
            if isinstance(value, list): value.clear()
        gc.collect()
        self.garbage = [torch.full((64,), float("nan")) for _ in range(64)]  # takes the memory that was freed
def acting(name, act):
    "A group that acts when one of its attributes is read."
    class Acting(Group): pass
    value = Group().__dict__[name]
    def read(self):
        act(self)
        return value
    setattr(Acting, name, property(read, lambda self, value: None))
    return Acting()
NAMES = sorted(Group().__dict__)
"""

AGAIN = """
for name in NAMES:
    raised = []
    def again(group):
        for call in (lambda: native.step([Group()], 1), lambda: native.sums_of_squares([torch.ones(3)], [None], 1),
                     lambda: native.accumulate_squares(torch.ones(3), torch.ones(3), 1.0, 1.0, 1),
                     lambda: native.select_top([torch.ones(3)], [torch.zeros(128, dtype=torch.uint8)], 1, True, 1)):
            try: call()
            except RuntimeError as error: raised.append(str(error))
    group = acting(name, again)
    if name != "max_grad_norm": native.step([Group(), group], 1)  # which is read on a GPU alone
    assert len(raised) in ((0,) if name == "max_grad_norm" else (4, 8)), (name, raised)
    assert all("must end before the next one on its thread begins" in text for text in raised), raised
native.step([Group()], 1)  # goes on after all that
print("survived")
"""

TAKEN = """
for name in NAMES:
    other = Group()
    group = acting(name, lambda group: other.clear())
    try: native.step([other, group], 1)
    except ValueError: pass
    group = acting(name, Group.clear)
    try: native.step([group], 1)
    except (ValueError, AttributeError): pass
class Number(int):
    def __index__(self):
        victim.params[0].untyped_storage().resize_(0)
        return 3
for name in ("keep_threshold", "seed", "indices"):
    victim = Group()
    setattr(victim, name, [Number(3)] * 4 if name == "indices" else Number(3))
    try: native.step([victim], 1)
    except (ValueError, RuntimeError, TypeError): pass
print("survived")
"""

CLEARED = """
sys.setswitchinterval(1e-6)
for _ in range(60):
    group = Group(numel=20000)
    other = threading.Thread(target=group.clear)
    other.start()
    try: native.step([group], 2)
    except ValueError: pass
    other.join()
    tensors, masks = [torch.ones(50000) for _ in range(4)], [None] * 4
    other = threading.Thread(target=tensors.clear)
    other.start()
    try: assert all(x in (0.0, 50000.0) for x in native.sums_of_squares(tensors, masks, 2))
    except ValueError: pass
    other.join()
print("survived")
"""

FREED = """
freed = torch.ones(3, 3)
freed.untyped_storage().resize_(0)  # torch crashes when it prints it
for name in ("step", "sums_of_squares", "select_top", "accumulate_squares"):
    for arguments, names in (((freed,), {}), (([freed],) * 9, {}), ((), {"threads": 1, "nonsense": [freed]})):
        try: getattr(native, name)(*arguments, **names)
        except TypeError as error: assert len(str(error)) < 100, error
        else: raise AssertionError(name)
print("survived")
"""


@pytest.mark.parametrize("access", ["", "native.force_attribute_access(True)\n"], ids=["DLPack", "attributes"])
@pytest.mark.parametrize("code", [AGAIN, TAKEN, CLEARED, FREED], ids=["calls again", "takes away", "clears", "freed"])
def test_code_that_runs_within_a_call(code, access):
    assert result_of(python(PRELUDE + access + code))[0] == "survived\n"

"""Groups and numbers that do something when the compiled module looks at them: step again, clear lists, free memory."""

import contextlib
import gc

import torch
from oracle import Mine

ACTIONS = ("step_others", "step_same", "norm", "squares", "clear", "resize", "replace", "fail", "forget")
HARMFUL = ("step_others", "step_same", "clear", "resize", "replace")  # what they write or take away is not judged


class Action:
    """What is done, a number of times."""

    def __init__(self, rng, native, group, others, tensors):
        self.rng, self.native, self.group, self.others, self.tensors = rng, native, group, others, tensors
        self.name, self.left = rng.choice(ACTIONS), rng.choice((1, 1, 3))

    def __call__(self):
        if self.left == 0:
            return
        self.left -= 1
        with contextlib.suppress(*(() if self.name == "fail" else (Exception,))):
            getattr(self, self.name)()

    def step_others(self):
        self.native.step([self.rng.choice(self.others)], 1)

    def step_same(self):
        self.native.step([self.group], 1)

    def norm(self):
        self.native.sums_of_squares([torch.ones(50)], [None], 1)

    def squares(self):
        self.native.accumulate_squares(torch.ones(5), torch.ones(5), 1.0, 1.0, 1)

    def _lists(self):
        return [value for value in vars(self.group).values() if isinstance(value, list)]

    def clear(self):
        self.rng.choice(self._lists()).clear()

    def resize(self):
        self.rng.choice(self.tensors).untyped_storage().resize_(self.rng.choice((0, 4, 1 << 12)))

    def replace(self):
        self.rng.choice(self._lists())[0] = torch.ones(3)
        gc.collect(0)

    def fail(self):
        raise Mine

    def forget(self):
        vars(self.group).pop("seed", None)


def act_when_read(group, name, action):
    """Makes reading an attribute of the group do something."""

    class Acting(type(group)):
        def __getattribute__(self, wanted):
            if wanted == name:
                action()
            return super().__getattribute__(wanted)

    group.__class__ = Acting


class Number:
    """Something that is taken for a number, and does something then."""

    def __init__(self, action):
        self.action = action

    def __float__(self):
        self.action()
        return 0.5

    def __index__(self):
        return int(2 * float(self))

    __int__ = __index__

    def __bool__(self):
        return bool(float(self))

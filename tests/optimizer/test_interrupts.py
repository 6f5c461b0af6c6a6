"""An exception at any moment, such as Ctrl-C's: what is no step is done whole or not at all, and nothing is lost."""

import copy
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import child_adamw, set_grads, train

from childtune_fast import ChildNetwork, optimizer

FOLDERS = (str(Path(optimizer.__file__).parent), str(Path(torch.optim.__file__).parent))
PACKAGE = str(Path(optimizer.__file__).parents[1])
STRIDE = 61  # every so many bytecodes; a prime, so that loops are interrupted at different ones


class Interrupt(BaseException):
    """As KeyboardInterrupt, but ours."""


class Interrupted:
    """Raises once, after a number of bytecodes of the optimizer's and torch's optimizers' code."""

    def __init__(self, after):
        self.left = after

    def counts(self, file):
        return file.startswith(FOLDERS)

    def interrupt(self):
        raise Interrupt

    def __call__(self, frame, event, argument):
        if not self.counts(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.interrupt()
        return self


def model_of():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2), torch.nn.Linear(2, 2))


def ready(with_child):
    """Returns a model and an optimizer of its first two layers, after a step, with a state of a parameter that left."""
    model = model_of()
    child = ChildNetwork.random(model, reserve_p=0.5, seed=0, maskable="weight") if with_child else None
    groups = [{"params": list(layer.parameters())} for layer in model[:2]]
    optimizer = child_adamw(groups, **({"child": child} if with_child else {}))
    gone = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [gone]})
    train(optimizer, [0])
    optimizer.param_groups.pop()
    return model, optimizer


def everything(model, optimizer):
    """All that may change, as a text, which calls parameters by their numbers in the model."""
    numbers = {id(p): i for i, p in enumerate(model.parameters())}
    groups = [{**group, "params": [numbers[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    states = [(numbers.get(id(p)), state) for p, state in optimizer.state.items()]
    masks = [(numbers[id(p)], mask.digest) for p, mask in optimizer.child_masks.items()]
    return repr((list(model.parameters()), groups, states, optimizer.defaults, masks, optimizer._book.active))


def other_child(model):
    return ChildNetwork.random(model, reserve_p=0.25, seed=1, maskable="weight")


def saved(with_child):
    _, optimizer = ready(with_child)
    train(optimizer, [1])
    return copy.deepcopy(optimizer.state_dict())


def add(model, optimizer, checkpoint):
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})


CALLS = {
    "state_dict": lambda model, optimizer, checkpoint: optimizer.state_dict(),
    "load_state_dict": lambda model, optimizer, checkpoint: optimizer.load_state_dict(checkpoint),
    "load_state_dict of a child": lambda model, optimizer, checkpoint: optimizer.load_state_dict(checkpoint),
    "add_param_group": add,
    "replace_child": lambda model, optimizer, checkpoint: optimizer.replace_child(other_child(model)),
}


@pytest.mark.slow
@pytest.mark.parametrize("with_child", [False, True], ids=["random", "child"])
@pytest.mark.parametrize("name", CALLS)
def test_whole_or_not_at_all(name, with_child):
    call, checkpoint = CALLS[name], saved(with_child or name.endswith("child"))
    model, optimizer = ready(with_child)
    call(model, optimizer, checkpoint)
    after = everything(model, optimizer)
    interrupts, ended = 0, False
    while not ended:
        model, optimizer = ready(with_child)
        before = everything(model, optimizer)
        sys.settrace(Interrupted(1 + STRIDE * interrupts))
        try:
            call(model, optimizer, checkpoint)
            ended = True
        except Interrupt:
            interrupts += 1
        finally:
            sys.settrace(None)
        assert everything(model, optimizer) in ((after,) if ended else (before, after)), interrupts
        set_grads([p for group in optimizer.param_groups for p in group["params"]], 2)
        optimizer.step()
    assert interrupts > 10


class Signalled(Interrupted):
    """Sends a signal, whose handler raises, after a number of bytecodes of what runs in this package and contextlib."""

    def counts(self, file):
        return file.startswith(PACKAGE) or file.endswith("contextlib.py")

    def interrupt(self):
        signal.raise_signal(signal.SIGUSR1)


FAILING = {
    "load_state_dict": lambda model, opt, checkpoint: opt.load_state_dict(checkpoint),
    "add_param_group": lambda model, opt, checkpoint: opt.add_param_group(
        {"params": list(model[2].parameters()), "variant": "nonsense"}
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signal")
@pytest.mark.parametrize("name", FAILING)
def test_an_interrupt_amid_the_undoing_of_a_call_that_fails(name):
    def handler(number, frame):
        raise Interrupt

    def refuse(optimizer):
        raise ValueError("a hook refuses")

    before, checkpoint, interrupts = signal.signal(signal.SIGUSR1, handler), saved(True), 0
    try:
        ended = False
        while not ended:
            model, optimizer = ready(True)
            optimizer.register_load_state_dict_post_hook(refuse)
            was = everything(model, optimizer)
            sys.settrace(Signalled(1 + 2 * STRIDE * interrupts))
            try:
                FAILING[name](model, optimizer, checkpoint)
            except Interrupt:
                interrupts += 1
            except ValueError:
                ended = True
            finally:
                sys.settrace(None)
            assert everything(model, optimizer) == was, interrupts
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert interrupts > 5

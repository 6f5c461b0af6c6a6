"""A signal's handler that raises, as Ctrl-C's does: a step is taken or not taken, whatever bytecode it comes at."""

import itertools
import signal
import sys
import threading

import pytest
import torch
from child_models import Model, child_adamw
from helpers import assert_same_run, both_backends, make_params, same_snapshot, set_grads, snapshot

from childtune_fast import ChildAdamW
from childtune_fast.ops.undisturbed import undisturbed

SHAPES = [(5, 3), (4,), (0,)]


class Interrupted(Exception):
    pass


def interrupt(number, frame):
    raise Interrupted


@pytest.fixture
def handler():
    """A handler of SIGUSR1 that raises."""
    before = signal.signal(signal.SIGUSR1, interrupt)
    yield interrupt
    signal.signal(signal.SIGUSR1, before)
    torch.set_grad_enabled(True)  # which torch.no_grad leaves off if it is interrupted while it ends


def interrupted_at(bytecode, call):
    """Calls `call`, with a signal at its bytecode of that number; returns whether it has one, and whether it raised."""
    left = [bytecode]

    def trace(frame, event, _):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGUSR1)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True, True
    finally:
        sys.settrace(before)
    return left[0] <= 0, False


def plain(**options):
    return lambda backend: ChildAdamW(make_params(SHAPES), seed=7, backend=backend, **options)


def masked(**options):
    return lambda backend: child_adamw(Model(shapes=((5, 3), (4,))), backend=backend, **options)


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def stepped(optimizer, steps):
    for step in steps:
        set_grads(params_of(optimizer), step)
        optimizer.step()
    return optimizer


# Which optimizer, how many steps it has taken, and at which bytecodes a step by kernels and one in torch are
# interrupted: at all of them (1), or at every so many, coprime to the lengths of loops.
CASES = {
    "F": (plain(), 0, 1, 47),
    "F, second step": (plain(), 1, 5, 47),
    "clipped, amsgrad": (plain(reserve_p=1.0, amsgrad=True, max_grad_norm=0.1), 0, 7, 47),
    "D": (masked(), 0, 7, 47),
}


@both_backends
@pytest.mark.parametrize(("make", "begun", "by_kernels", "in_torch"), CASES.values(), ids=CASES)
def test_a_step_is_taken_or_not_taken(make, begun, by_kernels, in_torch, backend, handler):
    taken = kept = 0
    after, later = stepped(make(backend), range(begun + 1)), stepped(make(backend), range(begun + 2))
    for bytecode in itertools.count(1, by_kernels if backend == "native" else in_torch):
        run = stepped(make(backend), range(begun))
        set_grads(params_of(run), begun)
        before = snapshot(run)[0]
        reached, raised = interrupted_at(bytecode, run.step)
        if not reached:
            break
        assert raised
        if same_snapshot((before, None), (snapshot(run)[0], None)):
            kept += 1
            stepped(run, [begun])
        else:
            taken += 1
        assert_same_run(run, after)
        assert_same_run(stepped(run, [begun + 1]), later)
        assert signal.getsignal(signal.SIGUSR1) is handler
    assert taken > 0
    assert kept > 0


def test_an_interrupt_that_comes_again_while_a_state_is_put_back(handler):
    """A state that has begun and was not put back is worth as much as none."""
    run, expected = plain()("native"), stepped(plain()("native"), range(2))
    set_grads(params_of(run), 0)
    params_of(run)[1].grad.data = torch.ones(9)  # refused, so that states are put back
    for bytecode in itertools.count(1):
        try:
            reached, _ = interrupted_at(bytecode, run.step)
        except ValueError:
            break
        assert reached
    params_of(run)[1].grad = None
    assert_same_run(stepped(run, range(2)), expected)


# ---- The block in which nothing is interrupted ---------------------------------------------------------------------


def test_what_came_in_the_block_comes_after_it(handler):
    def run():
        with undisturbed():
            signal.raise_signal(signal.SIGUSR1)
            done.append(signal.getsignal(signal.SIGUSR1) is not handler)

    done = []
    with pytest.raises(Interrupted):
        run()
    assert done == [True]
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_every_handler_runs_though_one_raises(handler):
    def run():
        with undisturbed():
            for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR2):
                signal.raise_signal(number)
            assert seen == []

    seen = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(Interrupted):
            run()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2] * 2


@pytest.mark.parametrize("interrupted", [True, False])
def test_the_blocks_own_error_is_not_lost(interrupted, handler):
    def run():
        with undisturbed():
            if interrupted:
                signal.raise_signal(signal.SIGUSR1)
            raise ValueError("of the block")

    with pytest.raises(Interrupted if interrupted else ValueError) as caught:
        run()
    assert str(caught.value.__context__ if interrupted else caught.value) == "of the block"


def test_blocks_in_blocks(handler):
    def run():
        with undisturbed():
            with undisturbed():
                signal.raise_signal(signal.SIGUSR1)
            done.append(True)

    done = []
    with pytest.raises(Interrupted):
        run()
    assert done == [True]
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_other_threads_are_left_alone(handler):
    """Handlers run in the main thread alone, which can be interrupted while another one writes."""

    def run():
        with undisturbed():
            seen.append(signal.getsignal(signal.SIGUSR1))

    seen = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [handler]

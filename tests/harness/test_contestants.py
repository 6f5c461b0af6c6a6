"""The contestants of `make bench`: what they are held to, who takes part only where it is, and memory alone."""

import sys
from types import ModuleType

import pytest
import torch

from benchmarks import contestants as module
from benchmarks.contestants import Contestant, held_to_narrower_sets, make_contestants, title_of
from benchmarks.deepspeed_adam import load_deepspeed_adam
from benchmarks.roof import make_stream
from benchmarks.workloads import DTYPES, make_workload


def test_a_contestant_is_held_to_each_narrower_instruction_set_and_to_no_other(native):
    *narrower, widest = native.supported_instruction_sets()
    if not narrower:
        pytest.skip("this processor has one instruction set")
    seen = []
    steps = {name: Contestant(lambda name=name: seen.append((name, native.instruction_set()))) for name in ("a", "b")}
    held = held_to_narrower_sets(steps, ["a"])
    assert list(held) == [f"a@{name}" for name in reversed(narrower)]
    for contestant in held.values():
        contestant.step()
        assert native.instruction_set() == widest
    assert seen == [("a", name) for name in reversed(narrower)]


def test_a_title_says_what_a_contestant_is_held_to():
    assert title_of("a@avx2", {"a": "A"}) == "A, held to avx2"
    assert title_of("a", {"a": "A"}) == "A"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_contestant_takes_a_finite_step_in_every_dtype(dtype, native):
    work = make_workload([(3,), (70,)], DTYPES[dtype])
    before = [param.clone() for param in work.params]
    for name, contestant in make_contestants(work).items():
        if contestant.before:
            contestant.before()
        contestant.step()
        assert all(torch.isfinite(param).all() for param in work.params), name
    assert not all(map(torch.equal, before, work.params))


def test_slow_ones_can_be_left_out():
    work = make_workload([(3,)], torch.float32)
    assert make_contestants(work).keys() - make_contestants(work, slow=False).keys() == {"foreach", "forloop", "naive"}


def test_deepspeed_takes_part_where_it_is(monkeypatch):
    """A stand-in with DeepSpeed's interface: an optimizer with float32 state and a step count that is an int."""

    class StandIn(torch.optim.Optimizer):
        def __init__(self, params, lr, weight_decay):
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

        def step(self):
            for state in self.state.values():
                state["step"] += 1
                state["exp_avg"] += 1

    monkeypatch.setattr(module, "load_deepspeed_adam", lambda: StandIn)
    work = make_workload([(3,)], torch.bfloat16)
    make_contestants(work)["deepspeed"].step()
    assert work.exp_avgs[0].tolist() == [1, 1, 1]  # ours, in float32
    assert work.peer_exp_avgs[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("builds", [True, False])
def test_deepspeed_that_does_not_compile_is_left_out_with_the_cause(monkeypatch, capsys, builds):
    class Builder:
        def load(self):
            if not builds:
                raise RuntimeError("no compiler")

    for name in ("deepspeed", "deepspeed.ops", "deepspeed.ops.adam", "deepspeed.ops.op_builder"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["deepspeed.ops.adam"], "DeepSpeedCPUAdam", dict, raising=False)
    monkeypatch.setattr(sys.modules["deepspeed.ops.op_builder"], "CPUAdamBuilder", Builder, raising=False)
    assert load_deepspeed_adam.__wrapped__() is (dict if builds else None)
    assert ("no compiler" in capsys.readouterr().out) is not builds


def test_deepspeed_that_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # its import fails
    assert load_deepspeed_adam.__wrapped__() is None
    assert not capsys.readouterr().out


@pytest.mark.parametrize("count", [3, 2**18 + 5])
def test_streams_read_everything_or_write_everything(count):
    words = torch.ones(count, dtype=torch.int32)
    make_stream(words, write=False)()
    assert words.all()
    make_stream(words, write=True)()
    assert not words.any()

"""The race of averages of few bits: who takes part, on which state, and what the report makes of it."""

import sys
from types import ModuleType

import pytest
import torch

from benchmarks import eight_bit
from benchmarks.eight_bit import (
    LOW_BIT_CHILD_TITLES,
    LOW_BIT_TITLES,
    CodedState,
    make_low_bit_child_contestants,
    make_low_bit_contestants,
)
from benchmarks.eight_bit_peers import PEERS
from benchmarks.promises import PROMISES
from benchmarks.readings import Results
from benchmarks.tables import low_bit_child_table, low_bit_table
from benchmarks.workloads import DTYPES, make_workload
from childtune_fast import ChildAdamW
from childtune_fast.ops.codes import Codes, block_numbers, decode_average, decode_square

SHAPES = [(64, 128), (4097,)]


@pytest.fixture
def no_peers(monkeypatch):
    """Leaves out the peers, whether they are installed or not: torchao compiles its step for a minute."""
    monkeypatch.setattr(eight_bit, "make_peer", lambda name, params, **hyper: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contestant_takes_a_finite_step(dtype, native, no_peers):
    work = make_workload(SHAPES, DTYPES[dtype])
    contestants, scales = make_low_bit_contestants(work)
    assert LOW_BIT_TITLES.keys() - contestants.keys() == PEERS.keys()
    assert_steps(work, contestants, scales, still={"roof"})


def test_every_contestant_with_a_child_network_takes_a_finite_step(native):
    work = make_workload(SHAPES, torch.float32)
    contestants, scales = make_low_bit_child_contestants(work)
    assert contestants.keys() == LOW_BIT_CHILD_TITLES.keys()
    assert_steps(work, contestants, scales, still={"roof", "roof_p0.1"})


def assert_steps(work, contestants, scales, still):
    """No block has zeros alone before the first step, and every contestant moves weights, but for those in `still`."""
    assert all(scale.all() for scale in scales)
    for name, contestant in contestants.items():
        work.params[0].fill_(2**-10)  # which a step of 1e-5 moves in bfloat16 too
        contestant.step()
        assert all(torch.isfinite(param).all() for param in work.params), name
        assert bool((work.params[0] == 2**-10).all()) is (name in still), name


def test_those_of_8_bit_state_work_on_the_same_averages(native):
    """One step of one with p = 1 from zeros: a tenth of the gradient, and a thousandth of its square."""
    work = make_workload([(64, 128)], torch.float32)
    coded = CodedState(work)
    param = torch.nn.Parameter(work.params[0])
    param.grad = work.grads[0]
    coded.give(ChildAdamW([param], reserve_p=1.0, state="8bit")).step()
    blocks = block_numbers(param.numel(), None, param.device)
    decoders = (decode_average, decode_square)
    expected = (0.1 * work.grads[0], 1e-3 * work.grads[0].square())
    for codes, scales, decode, value in zip(coded.codes[0], coded.scales[0], decoders, expected, strict=True):
        decoded = decode(Codes(codes.view(-1), scales), blocks)
        close = (decoded - value.view(-1)).abs() <= value.view(-1).abs() / 8 + 1e-8  # three bits of mantissa
        assert close.all()


@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_takes_part_after_a_step_where_it_is_installed_and_steps(monkeypatch, capsys, name, steps):
    class StandIn:
        def __init__(self, params, lr, weight_decay):
            self.steps = 0

        def step(self):
            if not steps:
                raise RuntimeError("no kernel")
            self.steps += 1

    module = ModuleType(PEERS[name])
    module.AdamW8bit = StandIn
    for peer, found in PEERS.items():
        monkeypatch.setitem(sys.modules, peer, ModuleType(peer) if peer == name else None)
        monkeypatch.setitem(sys.modules, found, module if peer == name else None)  # None: its import fails
    contestants, _ = make_low_bit_contestants(make_workload([(64, 128)], torch.float32))
    assert contestants.keys() & PEERS.keys() == ({name} if steps else set())
    if steps:
        assert contestants[name].step.__self__.steps == 1
        assert contestants[name].every == eight_bit.RARELY
    assert ("no kernel" in capsys.readouterr().out) is not steps


def results_of(**extras):
    benches = [{"name": f"test_{name}", "extra_info": noted} for name, noted in extras.items()]
    date = "2026-01-01T00:00:00"
    return Results({"machine_info": {}, "commit_info": {}, "datetime": date, "benchmarks": benches})


def step(**medians):
    times = {name: {"median": median} for name, median in medians.items()}
    return {"times_ns": times, "weights": 4, "ratios": {"ours": {"fused": {"median": 0.625}}, "ours_p1": {}}}


def test_the_tables_have_a_row_for_each_that_was_timed():
    noted = {
        "low_bit_step[float32-2]": step(ours=5.0, ours_p1=4.0, fused=8.0, torchao=200.0),
        "low_bit_step[bfloat16-2]": step(ours=4.0, fused=6.0, **{"ours@avx2": 12.0}),
    }
    lines = low_bit_table(results_of(**noted)).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [cell for cell in rows[0] if "thread" in cell] == ["float32, 2 threads", "bfloat16, 2 threads"]
    assert rows[2:] == [
        [LOW_BIT_TITLES["ours"], "1.25", "", "", "1", "", ""],
        [LOW_BIT_TITLES["ours_p1"], "1", "", "", "", "", ""],
        [LOW_BIT_TITLES["fused"], "2", "0.62", "", "1.5", "0.62", ""],
        [LOW_BIT_TITLES["torchao"], "50", "", "", "", "", ""],
        [LOW_BIT_TITLES["ours"] + ", held to avx2", "", "", "", "3", "", ""],
    ]
    assert low_bit_table(results_of()) == low_bit_child_table(results_of()) == ""


def test_what_is_promised_is_read_where_it_was_measured():
    found = {promise.text: promise for promise in PROMISES if "8-bit" in promise.name}
    assert not any(text.endswith("1 thread") for text in found)
    results = results_of(
        **{"low_bit_step[float32-2]": step(), "low_bit_state": {"bytes_per_weight": {"child_p0.1": 0.35}}}
    )
    assert found["F, float32, 8-bit state, 2 threads"].read(results)["median"] == 0.625
    assert found["8-bit state of D at p = 0.1, masks included, per weight"].read(results) == 0.35
    with pytest.raises(KeyError):
        found["F, float32, 8-bit state, 2 threads: to AdamW8bit of torchao"].read(results)

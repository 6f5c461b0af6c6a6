"""The proof of a GPU's kernels, and who steps before, during and after it: with the stand-in for the CUDA driver."""

import json
import os
import re
import socket
import sys
import warnings
from pathlib import Path

import pytest
import stand_in_gpu
import torch
from helpers import make_params, same_bits, set_grads
from processes import in_a_process_with, python, result_of
from stand_in import IMAGE

from childtune_fast import ChildAdamW
from childtune_fast.native import build, device_code, gpu, load
from childtune_fast.ops import proof, prover, radix, select, trust
from childtune_fast.ops import step as op
from childtune_fast.ops.squares import SquareKernels

ROOT = build.PACKAGE.parent
SITE = os.pathsep.join([str(ROOT), str(ROOT / "tests/standin/site")])


def with_gpus(driver, function, folder, **variables):
    """Calls a function where the stand-in is the GPUs, with a cache of its own."""
    paths = {"CHILDTUNE_CACHE": str(folder / "cache"), "STAND_IN_LOG": str(folder / "log"), "PYTHONPATH": SITE}
    return in_a_process_with(driver, function, **{**paths, **variables})


def proofs():
    """How many processes have proved kernels."""
    path = Path(os.environ["STAND_IN_LOG"])
    return len(path.read_text().splitlines()) if path.exists() else 0


def warned(function):
    """What a call returns, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(), [str(warning.message) for warning in caught]


# ---- A proof that passes -------------------------------------------------------------------------------------------


def check_every_case():
    found = prover.find(0, gpu.properties(0), by_hand=True)
    told = found.outcome.told
    assert found.outcome.verdict.word == "good", found.outcome.verdict
    assert len(told) == len(list(proof.cases()))
    assert all(case.seconds > 0 and not case.differs for case in told)
    names = " ".join(case.case for case in told)
    for part in ("float32", "float64", "bfloat16", "float16", "a random mask", "a child network", "all weights"):
        assert part in names
    for part in ("amsgrad", "many tensors", "shards", "captured", "side stream", "clipped", "lowest", "highest"):
        assert part in names
    again = prover.find(0, gpu.properties(0))
    assert again.outcome.verdict == found.outcome.verdict
    assert proofs() == 1


@pytest.mark.slow
def test_every_case_passes_and_the_verdict_is_kept(driver, tmp_path):
    with_gpus(driver, check_every_case, tmp_path, STAND_IN="all")


def check_training():
    noted, elsewhere = [], op.StepKernels.elsewhere

    def noting(kernels, tensors):
        noted.append(elsewhere(kernels, tensors))
        return noted[-1]

    op.StepKernels.elsewhere = noting
    plain, there = make_params(), [stand_in_gpu.OnGpu(param.detach()) for param in make_params()]
    expected = ChildAdamW(plain, seed=7, backend="torch")
    run = ChildAdamW(there, seed=7)
    assert list(trust._proofs) == [0]  # from the constructor on
    for step in range(3):
        for params, optimizer in ((plain, expected), (there, run)):
            set_grads(params, step)
            optimizer.step()
        if step == 0:
            trust._proofs[0].join()
    assert noted == [None] * len(there) + [0] * 2 * len(there)
    assert all(same_bits(p, q) for p, q in zip(plain, there, strict=True))
    assert SquareKernels.find([torch.device("cuda", 0)]).gpus == {0: trust._settled[0]}
    assert type(select._part(there[0].device, {0: there[0]}, True)) is radix.OnGpu


def test_training_goes_over_to_the_kernels_without_a_word(driver, tmp_path):
    _, errors = with_gpus(driver, check_training, tmp_path)
    assert errors == ""


# ---- CHILDTUNE_GPU -------------------------------------------------------------------------------------------------


def check_settings():
    for how, choice, wait, held, has in [
        ("off", "auto", False, 0, False),
        ("trust", "auto", False, 0, True),
        ("auto", "native", False, 0, True),
        ("auto", "torch", False, 0, False),
        ("prove", "auto", False, 1, True),
        ("prove", "auto", False, 1, True),  # by the verdict on disk
        ("auto", "auto", True, 1, True),
    ]:
        stand_in_gpu.forget()
        os.environ["CHILDTUNE_GPU"] = how
        kernels, messages = warned(lambda choice=choice, wait=wait: trust.kernels_of(0, choice, wait))
        assert (kernels is not None, proofs(), messages) == (has, held, []), how
    stand_in_gpu.forget()
    os.environ["CHILDTUNE_GPU"] = "on"
    with pytest.raises(ValueError, match=r"CHILDTUNE_GPU must be one of 'auto', 'prove', 'trust', 'off' \(got 'on'\)"):
        ChildAdamW([stand_in_gpu.OnGpu(torch.ones(3))])
    os.environ["CHILDTUNE_GPU"] = ""
    device_code.images = lambda capability: [("old", lambda: b"old"), ("stand-in", lambda: IMAGE)]
    found = prover.find(1, gpu.properties(1))
    assert found.origin == "stand-in"  # the driver refuses the first
    assert re.fullmatch(r"old: \w+: cuModuleLoadData failed: .*200\)", found.notes[0])
    device_code.images = lambda capability: [("old", lambda: b"old")]
    os.environ["CHILDTUNE_GPU"] = "trust"
    kernels, messages = warned(lambda: trust.kernels_of(2, "auto"))
    assert kernels is None
    assert "does not use its kernels on GPU 2: there are none: old: " in messages[0]


def test_the_environment_decides_for_auto(driver, tmp_path):
    with_gpus(driver, check_settings, tmp_path)


# ---- Proofs that fail ----------------------------------------------------------------------------------------------

FATES = {  # what happens to the process that proves: the warning, and whether the verdict is kept
    "differs": (r"differs: 1 of 3 values differ, first at 2: 1\.0, not 2\.0", True),
    "fault": (r"fault: RuntimeError: CUDA error: an illegal memory access was encountered", True),
    "segmentation fault": (r"segmentation fault: its process ended with signal 11", True),
    "killed": (r"killed: its process ended with signal 9", False),
    "terminated": (r"terminated: its process ended with signal 15", False),
    "other GPU": (r"its process found another GPU \(GPU-other, not GPU-5\)", False),
    "no memory": (r"no memory: OutOfMemoryError: CUDA out of memory\. Tried to allocate 2 MiB", False),
    "hangs": (r"(hangs: )?it was not done after 10 s", False),
}


def check_failures():
    proof.cases = lambda: iter([stand_in_gpu.Doomed("no memory")])  # in this process, should a proof be held here
    trust.prepare(range(len(FATES) - 1), "auto")
    for device, (cause, kept) in enumerate(FATES.values()):
        if device == len(FATES) - 1:
            proof.TIMEOUT = 10.0
            trust.prepare([device], "auto")
        trust._proofs[device].join()
        kernels, messages = warned(lambda device=device: [trust.kernels_of(device, "auto") for _ in range(2)])
        assert kernels == [None, None]
        assert len(messages) == 1
        wanted = rf"childtune_fast does not use its kernels on GPU {device}: {cause}\n.*pure-torch.*same results.*"
        wanted += r"`python -m childtune_fast prove` shows more; CHILDTUNE_GPU=.*\."
        assert re.fullmatch(wanted, messages[0]), messages[0]
        facts = trust._proofs[device].found.facts
        assert (prover.verdict.stored(facts) is not None) == kept
    params = [stand_in_gpu.OnGpu(param.detach()) for param in make_params()]  # of GPU 0, whose kernels differ
    run, expected = ChildAdamW(params, seed=7), ChildAdamW(plain := make_params(), seed=7, backend="torch")
    for each in (params, plain):
        set_grads(each, 0)
    run.step()
    expected.step()
    assert all(same_bits(p, q) for p, q in zip(params, plain, strict=True))


def test_whatever_ends_a_proof_training_goes_on_without_the_kernels(driver, tmp_path):
    with_gpus(driver, check_failures, tmp_path, STAND_IN=",".join(FATES))


def check_in_this_process():
    proof.cases = proof.trial_cases
    kernels, messages = warned(lambda: trust.kernels_of(0, "auto", wait=True))
    assert kernels is not None
    assert messages == []
    assert prover.verdict.stored(trust._proofs[0].found.facts).word == "good"
    stand_in_gpu.forget()
    proof.trial = lambda device: "step: 1 of 3 values differ"
    kernels, messages = warned(lambda: trust.kernels_of(0, "auto", wait=True))
    assert kernels is None
    assert "on GPU 0: in this process, step: 1 of 3 values differ" in messages[0]


def test_where_no_other_process_may_use_the_gpu_the_cases_run_here(driver, tmp_path):
    with_gpus(driver, check_in_this_process, tmp_path, STAND_IN="busy")


def check_a_cache_that_cannot_be_written():
    Path(os.environ["CHILDTUNE_CACHE"]).write_text("a file where the folder should be")
    for number in range(2):
        kernels, messages = warned(lambda: trust.kernels_of(0, "auto", wait=True))
        assert kernels is not None
        assert len(messages) == (number == 0)
        assert all("cannot be kept in" in message and "CHILDTUNE_CACHE" in message for message in messages)
        assert proofs() == number + 1
        warn_once = load.warn_once.cache_info()
        trust._settled.clear()
        trust._proofs.clear()
        assert warn_once.currsize == 1


def test_a_cache_that_cannot_be_written_is_told_once_and_proved_each_time(driver, tmp_path):
    with_gpus(driver, check_a_cache_that_cannot_be_written, tmp_path)


def test_no_proof_in_the_process_that_proves_nor_under_mps_nor_in_a_frozen_program(monkeypatch):
    assert prover.why_not() is None
    monkeypatch.setenv(proof.GUARD, "1")
    assert "proves kernels itself" in prover.why_not().verdict.cause
    assert not prover.why_not().here
    monkeypatch.delenv(proof.GUARD)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert prover.why_not().here
    monkeypatch.delattr(sys, "frozen")
    monkeypatch.setattr(sys, "executable", "/opt/program")
    assert prover.why_not().here
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    assert "MPS" in prover.why_not().verdict.cause
    assert not prover.why_not().here


# ---- Several processes ---------------------------------------------------------------------------------------------

RANK = """
import stand_in_gpu, torch, torch.distributed as dist
from helpers import make_params, set_grads
from childtune_fast import ChildAdamW
from childtune_fast.ops import trust
dist.init_process_group("gloo")
params = [stand_in_gpu.OnGpu(param.detach()) for param in make_params()]
optimizer = ChildAdamW(params)
dist.barrier()
for step in range(2):
    set_grads(params, step)
    optimizer.step()
mine = torch.cat([param.detach().flatten() for param in params])
every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
dist.all_gather(every, mine)
assert all(torch.equal(mine, other) for other in every)
assert trust._settled[0] is not None
"""


def test_eight_ranks_at_once_prove_once(driver, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"CHILDTUNE_CACHE": str(tmp_path / "cache"), "STAND_IN_LOG": str(tmp_path / "log"), "WORLD_SIZE": "8"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": SITE, "LD_LIBRARY_PATH": str(driver)}
    common |= {"CHILDTUNE_GPU": "prove", "OMP_NUM_THREADS": "1"}
    ranks = [python(RANK, RANK=str(rank), **common) for rank in range(8)]
    try:
        for rank in ranks:
            result_of(rank, timeout=300)
    finally:
        for rank in ranks:
            rank.kill()
    assert (tmp_path / "log").read_text() == "proof RANK=None\n"


def test_what_is_cut_off_is_not_read(tmp_path):
    told = json.dumps(proof.Told("a case", 1.0))
    (tmp_path / "told").write_text(f"{told}\n{told[:-5]}")
    assert proof._written(tmp_path) == ((proof.Told("a case", 1.0),), [])

"""The proof sees faults in kernels: each of many is seeded into the stand-in's, and one of its kernel's cases fails."""

import ctypes

import faulty_kernels
import pytest
from test_proof import with_gpus

from childtune_fast.native import gpu
from childtune_fast.ops import proof, proof_scores, proof_steps, prover


def first_to_fail(kernel):
    """The verdict of the cases of one kernel."""
    every = [*proof_steps.trial_cases(), *proof_scores.score_cases(), *proof_steps.step_cases()]
    proof.cases = lambda: (case for case in every if case.name.startswith(kernel))
    return proof.run(0, lambda told: None)[0]


def check_faults():
    found = prover.find(0, gpu.properties(0))
    gpu.use(0, found.origin, found.image)
    set_fault = ctypes.CDLL("libcuda.so.1").standin_set_fault
    for number, (fault, (*_, kernel)) in enumerate(faulty_kernels.FAULTS.items(), 1):
        set_fault(number)
        verdict = first_to_fail(kernel)
        assert verdict.word == "bad", fault
        assert verdict.cause.startswith(kernel), fault
        assert " differ, first at " in verdict.cause or "the flag of finite ones" in verdict.cause, fault


@pytest.mark.slow
def test_the_proof_sees_every_seeded_fault(tmp_path):
    with_gpus(faulty_kernels.build_driver(tmp_path), check_faults, tmp_path)

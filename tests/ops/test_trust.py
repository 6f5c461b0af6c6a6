"""What becomes of kernels that are right but cannot be loaded now. test_proof.py has the proof itself."""

import pytest
import torch

from childtune_fast.native import CudaError, load
from childtune_fast.ops import trust


@pytest.fixture
def attempts(monkeypatch):
    """Times at which loading was tried; it always fails with the error that `fails` holds."""
    times, fails = [0.0], []

    def proved(device, wait):
        fails[0].times.append(times[0])
        raise fails[0]

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(load, "resolve", lambda requested: object())
    monkeypatch.setattr(trust.time, "monotonic", lambda: times[0])
    monkeypatch.setattr(trust, "_proved", proved)
    monkeypatch.setattr(trust, "_settled", {})
    monkeypatch.setattr(trust, "_failures", {})
    load.warn_once.cache_clear()
    return times, fails


@pytest.mark.parametrize(
    "error", [CudaError("out of memory", 2), torch.OutOfMemoryError("CUDA out of memory")], ids=["driver", "torch"]
)
def test_kernels_that_there_is_no_memory_for_are_tried_three_times(attempts, error):
    times, fails = attempts
    error.times = []
    fails.append(error)
    for now in (0.0, 1.0, 4.0, 6.0, 7.0):  # several parameters, and steps
        times[0] = now
        assert trust.kernels_of(0, "auto") is None
    assert error.times == [0.0, 6.0]
    assert trust._settled == {}
    times[0] = 12.0
    with pytest.warns(UserWarning, match="does not use its kernels on GPU 0: .*out of memory"):
        assert trust.kernels_of(0, "auto") is None
    assert trust._settled == {0: None}


def test_any_other_error_leaves_the_kernels_at_once(attempts):
    error = CudaError("launch failed", 719)
    error.times = []
    attempts[1].append(error)
    with pytest.warns(UserWarning, match="does not use its kernels on GPU 0: launch failed"):
        assert trust.kernels_of(0, "auto") is None
    assert trust.kernels_of(0, "auto") is None
    assert len(error.times) == 1

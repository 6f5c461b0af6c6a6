"""Shared by all benchmarks: fewer rounds on demand, a process that does nothing else, what is told of the machine."""

import gc

import pytest
import torch

from childtune_fast.native import load


def pytest_addoption(parser):
    parser.addoption("--effort", type=float, default=1.0, help="multiplies the rounds of every benchmark (default: 1)")


@pytest.fixture
def rounds(request):
    """Returns a function from a number of rounds to that which --effort makes of it."""
    effort = request.config.getoption("--effort")
    return lambda usual: max(1, round(usual * effort))


@pytest.fixture
def quiet_process():
    """No garbage collection during the test, and torch's number of threads restored after it."""
    threads = torch.get_num_threads()
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(machine_info):
    """Keeps what explains the numbers; the name of the machine does not."""
    cpu = machine_info["cpu"]
    native = load.load_native()
    kept = {key: machine_info[key] for key in ("machine", "system", "python_implementation", "python_version")}
    kept["cpu"] = {key: cpu.get(key) for key in ("brand_raw", "family", "model", "stepping", "count", "l3_cache_size")}
    kept["torch"] = torch.__version__
    kept["native"] = {"compiler": native.compiler(), "instruction_set": native.instruction_set()}
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_commit_info(commit_info):
    for key in ("project", "branch", "author_time"):
        commit_info.pop(key, None)

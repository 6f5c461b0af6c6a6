"""Fixtures and hooks of all benchmarks: number of rounds, a quiet process, and the facts about the machine."""

import gc

import pytest
import torch

from childtune_fast.native import load


def pytest_addoption(parser):
    parser.addoption("--effort", type=float, default=1.0, help="multiplies the rounds of every benchmark (default: 1)")


@pytest.fixture
def rounds(request):
    """Returns a function that multiplies a number of rounds by --effort."""
    effort = request.config.getoption("--effort")
    return lambda usual: max(1, round(usual * effort))


@pytest.fixture
def quiet_process():
    """Switches garbage collection off during the test, and restores torch's number of threads after it."""
    threads = torch.get_num_threads()
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(machine_info):
    """Reduces the machine's facts to those that explain the numbers, and adds torch and the native backend."""
    cpu = machine_info["cpu"]
    native = load.load_native()
    kept = {key: machine_info[key] for key in ("machine", "system", "python_implementation", "python_version")}
    kept["cpu"] = {key: cpu.get(key) for key in ("brand_raw", "family", "model", "stepping", "count", "l3_cache_size")}
    kept["torch"] = torch.__version__
    kept["native"] = {
        "compiler": native.compiler(),
        "instruction_set": native.instruction_set(),
        "supported_instruction_sets": native.supported_instruction_sets(),
    }
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_commit_info(commit_info):
    for key in ("project", "branch", "author_time"):
        commit_info.pop(key, None)

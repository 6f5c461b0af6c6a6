"""The step on a GPU without one: the compiled module drives a stand-in for the CUDA driver, which runs the kernels in
loops on the CPU; and parameters go to whom they should.
"""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_run, make_params, set_grads
from processes import python, result_of

from childtune_fast import ChildAdamW, _build, _gpu, fallback, optimizer
from childtune_fast.backend import BackendError
from childtune_fast.collect import collect

ROOT = _build.csrc().parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The folder of the stand-in, as libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    sources = [ROOT / "tests/standin/libcuda.cpp", ROOT / "csrc/cuda/launch_plan.cpp"]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *flags, *map(str, sources), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


IN_A_PROCESS = """
import sys; sys.path.insert(0, {tests!r})
import test_gpu_step
test_gpu_step.{function}()
"""


def in_a_process_with(driver, function):
    code = IN_A_PROCESS.format(tests=str(ROOT / "tests"), function=function.__name__)
    result_of(python(code, LD_LIBRARY_PATH=str(driver)))


IMAGE = b"device code of the stand-in"
STREAM = 5
SHAPES = [(40, 70), (129,), (), (0,), (4097,), *[(33,)] * 300]  # more than one small table holds


def step_as_a_gpu(kernels, optimizer):
    """`optimizer.step()`, all of it by the kernels of a GPU."""
    on_native, _, on_torch = collect(optimizer, True, False, {})
    assert not on_torch
    kernels.step(on_native, STREAM)


def check_steps():
    from childtune_fast import backend

    kernels = backend.load_native().GpuKernels(-1, IMAGE)
    options = [{}, {"reserve_p": 1.0}, {"amsgrad": True, "variant": "torch"}, {"variant": "hf", "weight_decay": 0.5}]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for option in options:
            runs = []
            for _ in range(2):
                params = make_params(SHAPES, dtype)
                groups = [{"params": params[::2]}, {"params": params[1::2], "reserve_p": 0.5, "lr": 0.1}]
                runs.append(ChildAdamW(groups, lr=1e-2, seed=7, backend="native", **option))
            for step in range(3):
                for run in runs:
                    set_grads([p for group in run.param_groups for p in group["params"]], step)
                step_as_a_gpu(kernels, runs[0])
                runs[1].step()
            assert_same_run(*runs)


def check_refusals():
    from childtune_fast import backend

    native = backend.load_native()
    with pytest.raises(RuntimeError, match=r"^cuModuleLoadData failed: device kernel image is invalid \(.* 200\)"):
        native.GpuKernels(-1, b"of another architecture")
    with pytest.raises(RuntimeError, match=r"^cuDeviceGet failed: .* \(CUDA error 101\)$"):
        native.GpuKernels(3, IMAGE)
    kernels = native.GpuKernels(-1, IMAGE)
    for broken in ("strided", "dtype", "stream"):
        param = torch.nn.Parameter(torch.ones(4, 6))
        param.grad = torch.ones(6, 4).T if broken == "strided" else torch.ones(4, 6)
        optimizer = ChildAdamW([param], backend="native")
        on_native, _, _ = collect(optimizer, True, False, {})
        if broken == "dtype":
            on_native[0].exp_avgs[0] = torch.ones(4, 6, dtype=torch.float64)
        with pytest.raises(RuntimeError if broken == "stream" else ValueError):
            kernels.step(on_native, STREAM + (broken == "stream"))
        assert torch.equal(param, torch.ones(4, 6))
        assert optimizer.state[param]["step"] == 0


def test_the_modules_launches_have_the_bits_of_the_cpus_step(driver):
    in_a_process_with(driver, check_steps)


def test_the_drivers_refusals_are_told(driver):
    in_a_process_with(driver, check_refusals)


# ---- Who steps what ------------------------------------------------------------------------------------------------


class OnGpu(torch.nn.Parameter):
    """A parameter that says it is on a GPU."""

    is_cpu = False
    is_cuda = True
    device = torch.device("cuda", 1)


def on_gpu(param):
    return OnGpu(param.detach())


@pytest.fixture
def gpu(monkeypatch):
    """Kernels for every GPU, which note what they are given and step it in torch."""
    calls = []

    def step(groups, stream):
        calls.append((groups, stream))
        fallback.step(groups)

    monkeypatch.setattr(_gpu, "find", lambda device: _gpu.Gpu(SimpleNamespace(step=step), "", []))
    monkeypatch.setattr(optimizer, "check_group", lambda group: None)  # it would find that state is on the CPU
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1000 + device))
    return calls


def test_each_parameter_goes_to_the_kernels_of_its_device(gpu):
    cpu, gpus = make_params(), [on_gpu(p) for p in make_params(seed=1)]
    expected = ChildAdamW(make_params() + make_params(seed=1), seed=7, backend="torch")
    mixed = ChildAdamW(cpu + gpus, seed=7, backend="native")
    for step in range(2):
        for run in (expected, mixed):
            set_grads(run.param_groups[0]["params"], step)
            run.step()
    assert_same_run(mixed, expected)
    assert [(len(groups), stream) for groups, stream in gpu] == [(1, 1001)] * 2
    assert [id(p) for p in gpu[0][0][0].params] == [id(p) for p in gpus]
    assert gpus[0]._version == 2 * expected.param_groups[0]["params"][-1]._version  # the fallback counts, and the step


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_unless_asked_for_they_take_nothing(gpu, backend, monkeypatch):
    params = [on_gpu(p) for p in make_params()]
    run = ChildAdamW(params, backend=backend)
    set_grads(params, 0)
    run.step()
    assert gpu == []
    monkeypatch.setenv("CHILDTUNE_BACKEND", "native")
    run.step()
    assert len(gpu) == (backend == "auto")


def test_what_they_cannot_do_is_left_to_the_fallback(gpu):
    strided, plain = on_gpu(torch.ones(4, 6).T), on_gpu(torch.ones(4, 6))
    run = ChildAdamW([strided, plain], backend="native")
    set_grads([strided, plain], 0)
    run.step()
    assert [p is plain for groups, _ in gpu for group in groups for p in group.params] == [True]
    assert run.state[strided]["step"] == 1


def test_native_says_why_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(_gpu, "find", lambda device: _gpu.Gpu(None, "", ["prebuilt: none is prebuilt", "compiled: no"]))
    param = on_gpu(torch.ones(3))
    param.grad = torch.ones(3)
    run = ChildAdamW([param], backend="native")
    with pytest.raises(BackendError, match=r"no kernels for GPU 1: prebuilt: none is prebuilt; compiled: no; repair"):
        run.step()
    assert len(run.state) == 0

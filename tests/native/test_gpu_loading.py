"""Which way to make a GPU's kernels is taken, what is kept of a failure, and what the report says of it."""

import contextlib
import ctypes
import pickle
from types import SimpleNamespace

import pytest
import torch

from childtune_fast import __main__ as report
from childtune_fast.native import BackendError, CudaError, device_code, gpu, load


@pytest.fixture
def ways(monkeypatch):
    """Sets what each way gives: bytes, codes with which the driver refuses it in turn, or an error.

    The driver refuses b"old" for good.
    """

    def kernels(device, image):
        if isinstance(image, list) and image:
            raise CudaError("cuModuleLoadData failed: it says why", image.pop(0))
        if image == b"old":
            raise CudaError("cuModuleLoadData failed: no kernel image is available", 209)
        return device, image

    def of(*results):
        def make(result):
            if isinstance(result, Exception):
                raise result
            return result

        made = [(f"way {i}", lambda result=result: make(result)) for i, result in enumerate(results)]
        monkeypatch.setattr(device_code, "images", lambda capability: made)
        gpu._found.clear()
        return gpu.find(1)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu, "properties", lambda device: SimpleNamespace(major=9, minor=0))
    module = SimpleNamespace(GpuKernels=kernels)
    monkeypatch.setattr(load, "find_native", lambda: load.Native(module, "prebuilt", []))
    yield of
    gpu._found.clear()


def test_the_first_way_that_leads_there_is_taken(ways):
    assert ways(b"new", b"newer") == gpu.Gpu((1, b"new"), "way 0", [])
    found = ways(BackendError("none is prebuilt"), b"old", b"new")
    assert found.kernels == (1, b"new")
    assert found.origin == "way 2"
    assert found.notes == [
        "way 0: none is prebuilt",
        "way 1: cuModuleLoadData failed: no kernel image is available",
    ]


def test_if_none_does_all_causes_are_told(ways):
    ways(BackendError("none is prebuilt"), b"old")
    with pytest.raises(BackendError, match=r"no kernels for GPU 1: way 0: none is prebuilt; way 1: cuModuleLoadData"):
        gpu.load_kernels(1)


def test_a_gpu_without_free_memory_is_tried_again(ways, monkeypatch):
    """At once, after torch has given back what it holds free, and then at each later call."""
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    assert ways([2]) == gpu.Gpu((1, []), "way 0", [])
    assert len(emptied) == 1
    with pytest.raises(CudaError, match=r"onto GPU 1 now: cuModuleLoadData failed: it says why; .*torch\"$") as caught:
        ways([2, 2, 2], b"new")
    assert caught.value.code == 2
    assert len(emptied) == 2
    assert gpu.load_kernels(1) == (1, [])
    assert len(emptied) == 3


@pytest.mark.parametrize("code", [700, 719, 46, 3])
def test_an_error_that_is_not_the_images_is_raised_at_once(code, ways):
    with pytest.raises(CudaError, match="onto GPU 1 now") as caught:
        ways([code], b"new")
    assert caught.value.code == code
    assert gpu.find(1).origin == "way 0"


@pytest.mark.parametrize("code", [200, 209, 218, 221, 222, 223, 0])
def test_an_image_that_the_driver_cannot_take_is_not_tried_again(code, ways):
    assert ways([code]).notes == ["way 0: cuModuleLoadData failed: it says why"]
    assert gpu.find(1).kernels is None


def test_nothing_is_loaded_while_a_graph_is_captured(ways, monkeypatch):
    capturing = [True]
    monkeypatch.setattr(gpu, "is_capturing", lambda device: capturing[0])
    with pytest.raises(BackendError, match=r"onto GPU 1 while a CUDA graph is captured; take one step outside of the"):
        ways(b"new")
    capturing[0] = False
    assert gpu.load_kernels(1) == (1, b"new")


def test_a_torch_without_cuda_has_no_kernels(ways, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert ways(b"new").notes == ["this torch was built without CUDA"]


def test_a_missing_driver_is_named(native):
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("there is a driver")
    with pytest.raises(CudaError, match=r"^there is no CUDA driver \(libcuda\.so\.1: .*\)$") as caught:
        native.GpuKernels(0, b"")
    assert caught.value.code in gpu.LASTING
    assert pickle.loads(pickle.dumps(caught.value)).code == caught.value.code


def test_without_a_native_backend_nothing_launches_them(ways, monkeypatch):
    monkeypatch.setattr(load, "find_native", lambda: load.Native(None, "", ["no compiler"]))
    assert ways(b"new").notes == ["there is no native backend to launch them"]


def test_the_report_says_how_kernels_are_had_and_who_serves(ways, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ways(BackendError("none is prebuilt"), b"new")
    native = load.Native(SimpleNamespace(), "prebuilt", [])
    why = ("  because", "way 0: none is prebuilt")
    for name, word in (("CHILDTUNE_BACKEND", "native"), ("CHILDTUNE_GPU", "trust")):
        monkeypatch.setenv("CHILDTUNE_BACKEND", "")
        monkeypatch.setenv(name, word)
        how = f"native (kernels way 1, not proved: {name}={word} asks for them)"
        lines = [("serves cpu", "native (prebuilt)"), ("serves cuda:0", how), why, ("serves cuda:1", how), why]
        assert list(report._devices(native)) == lines
    monkeypatch.setenv("CHILDTUNE_BACKEND", "native")
    ways(b"old")
    assert ("serves cuda:1", "none: it has no kernels") in list(report._devices(native))
    gpu._found.clear()
    monkeypatch.setattr(device_code, "images", lambda capability: [("way", lambda: [46])])
    assert any(line.startswith("unknown: ") and "it says why" in line for _, line in report._devices(native))

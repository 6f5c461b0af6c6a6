"""The CUDA kernels through NVRTC, as far as a machine without a GPU goes: to the cubin."""

import ctypes.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python, result_of

from childtune_fast.native import BackendError, device_code, nvrtc, nvrtc_files

INSTALLED = [path for path in nvrtc_files.nvrtc_files() if path.is_absolute()]
# `make test` installs the release that torch's CUDA 13.0 wheels bring beside the newest. It has no run path.
OLD = sorted(Path(sys.prefix, "nvrtc-13.0").glob("nvidia/cu13/lib/libnvrtc.so.13"))
# One of each optimizer that NVRTC has: it changes at 10.0. For 12.0, 13.5 spills in steps that round: docs/design.md.
TARGETS = [*((path, "sm_75") for path in INSTALLED), *((path, "sm_120") for path in OLD)]
SMALL = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
MACHINE_CODE = Path(__file__).parents[1] / "support" / "check_machine_code.py"
KERNELS = [
    "step_" + "_".join(filter(None, parts))
    for parts in itertools.product(
        ("float32", "float64", "bfloat16", "float16"), ("", "masked", "child"), ("", "amsgrad"), ("small", "large")
    )
]
KERNELS += [
    "step_" + "_".join(filter(None, (dtype, trained, "rounded", size)))
    for dtype in ("float32", "bfloat16", "float16")
    for trained, size in itertools.product(("", "masked", "child"), ("small", "large"))
]
KERNELS += ["count_steps", "norm_chunks", "norm_tensors", "norm_total"]
KERNELS += ["add_squares", "count_digits", "write_above", "add_ties"]

pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.mark.parametrize(("path", "target"), TARGETS, ids=str)
def test_compiles_every_kernel(path, target, tmp_path):
    compiler = nvrtc.Nvrtc(path)
    cubin = compiler.compile(*nvrtc.kernel_source(), target)
    assert cubin.startswith(b"\x7fELF")
    expected = KERNELS if compiler.version >= (12, 1) else [name for name in KERNELS if not name.endswith("large")]
    for name in expected:
        assert b"\0.text." + name.encode() + b"\0" in cubin, name
    (tmp_path / "kernels.cubin").write_bytes(cubin)
    check = [sys.executable, MACHINE_CODE, "--loose", tmp_path / "kernels.cubin"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [*INSTALLED, *OLD], ids=str)
def test_makes_ptx_which_ends_as_a_c_string(path):
    compiler = nvrtc.Nvrtc(path)
    assert {75, 90, 120} <= set(compiler.architectures())
    ptx = compiler.compile(SMALL, {}, "compute_90")
    assert b".target sm_90\n" in ptx
    assert b".entry twice(" in ptx
    assert ptx.endswith(b"\0")


@pytest.mark.parametrize("path", OLD or INSTALLED[:1], ids=str)
def test_finds_the_builtins_of_a_library_that_is_known_by_its_name_alone(path):
    """As one that torch has loaded from a folder of its own, in which the loader does not look."""
    code = f"""
import ctypes, pathlib
from childtune_fast.native import nvrtc
ctypes.CDLL({str(path)!r})
compiler = nvrtc.Nvrtc(pathlib.Path({path.name!r}))
print(compiler.path, compiler.compile({SMALL!r}, {{}}, "sm_75")[1:4].decode())
"""
    output, errors = result_of(python(code, LD_LIBRARY_PATH=""))
    assert output == f"{path} ELF\n", errors


def test_compiles_in_another_process_too():
    path = INSTALLED[0]
    made = device_code._compile_apart(path, SMALL, {}, "sm_75")
    assert made == nvrtc.Nvrtc(path).compile(SMALL, {}, "sm_75")
    with pytest.raises(BackendError, match=r'(?s)identifier "nonsense" is undefined'):
        device_code._compile_apart(path, "int x = nonsense;", {}, "sm_75")


def test_says_what_does_not_compile():
    with pytest.raises(BackendError, match=r'(?s)NVRTC .* for sm_90:.*identifier "nonsense" is undefined'):
        nvrtc.Nvrtc(INSTALLED[0]).compile("int x = nonsense;", {}, "sm_90")


@pytest.mark.parametrize("name", ["/nonexistent/libnvrtc.so", ctypes.util.find_library("m") or "libm.so.6"])
def test_says_which_library_is_none(name):
    with pytest.raises(BackendError, match=f"NVRTC could not be loaded from {name}"):
        nvrtc.Nvrtc(Path(name))

"""The CUDA kernels through NVRTC, as far as a machine without a GPU goes: to the cubin."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from childtune_fast.native import BackendError, device_code

MACHINE_CODE = Path(__file__).parents[1] / "support" / "check_machine_code.py"
LIBRARIES = device_code.nvrtc_libraries()
KERNELS = [
    "step_" + "_".join(filter(None, parts))
    for parts in itertools.product(
        ("float32", "float64", "bfloat16", "float16"), ("", "masked", "child"), ("", "amsgrad"), ("small", "large")
    )
]
KERNELS += ["count_steps", "norm_chunks", "norm_tensors", "norm_total"]
KERNELS += ["add_squares", "count_digits", "write_above", "add_ties"]

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="needs NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.fixture(params=LIBRARIES, ids=lambda path: path.name)
def nvrtc(request):
    return device_code.Nvrtc(request.param)


@pytest.mark.parametrize("architecture", [75, 120])
def test_compiles_every_kernel(nvrtc, architecture, tmp_path):
    source, headers = device_code.kernel_source()
    cubin = nvrtc.compile(source, headers, architecture)
    assert cubin.startswith(b"\x7fELF")
    expected = KERNELS if nvrtc.version() >= (12, 1) else [name for name in KERNELS if not name.endswith("large")]
    for name in expected:
        assert b"\0.text." + name.encode() + b"\0" in cubin, name
    (tmp_path / "kernels.cubin").write_bytes(cubin)
    check = [sys.executable, MACHINE_CODE, "--loose", tmp_path / "kernels.cubin"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_says_what_does_not_compile(nvrtc):
    with pytest.raises(BackendError, match=r'(?s)NVRTC .* for sm_90:.*identifier "nonsense" is undefined'):
        nvrtc.compile("int x = nonsense;", {}, 90)


def test_says_which_library_does_not_load(tmp_path):
    with pytest.raises(BackendError, match="NVRTC could not be loaded from"):
        device_code.Nvrtc(tmp_path / "libnvrtc.so")

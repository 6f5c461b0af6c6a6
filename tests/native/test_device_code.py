"""Device code for a GPU: prebuilt, by NVRTC, by nvcc; what is told when a way leads nowhere, and the next one taken."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from processes import script

from childtune_fast.native import BackendError, build, device_code, nvrtc

# An nvcc that knows three GPUs, writes what it was asked for, and fails if there is a file "broken" beside it.
FALSE_NVCC = """
case "$1" in
  --version) echo "nvcc of a test"; exit;;
  --list-gpu-code) printf "sm_75\\nsm_90\\nsm_100\\n"; exit;;
esac
if [ -e "$(dirname "$0")/broken" ]; then echo "unsupported GNU version! gcc 99"; exit 2; fi
asked="$1 $2"
while [ "$1" != -o ]; do shift; done
echo "$asked" > "$2"
"""
CUBIN = b"-cubin -arch=sm_90\n"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CHILDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """The path of an nvcc that works."""
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "nvcc", FALSE_NVCC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path / "bin" / "nvcc"


@pytest.fixture
def one_kernel(monkeypatch, tmp_path):
    """In place of all of them, whose compilation takes a minute: `make cuda` and test_nvrtc.py see to that."""
    source = tmp_path / "one.cu"
    source.write_text('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }')
    monkeypatch.setattr(build, "device_source", lambda: source)


def way(name, capability=(9, 0)):
    return dict(device_code.images(capability))[name]


def test_the_ways_in_their_order():
    assert [name for name, _ in device_code.images((7, 5))] == ["prebuilt", "compiled by NVRTC", "compiled by nvcc"]


@pytest.mark.parametrize("capability", [(5, 2), (6, 1), (7, 0)])
def test_a_gpu_that_is_too_old_is_told_so_and_nothing_is_compiled(capability):
    ((name, make),) = device_code.images(capability)
    assert name == f"compute capability {capability[0]}.{capability[1]}"
    with pytest.raises(BackendError, match=r"^the kernels need 7.5 or later$"):
        make()


NVRTC_12_8 = [70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 120]
NVRTC_13_0 = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121]


@pytest.mark.parametrize(
    ("architecture", "known", "target"),
    [
        (90, NVRTC_12_8, "sm_90"),
        (87, NVRTC_12_8, "sm_87"),
        (103, NVRTC_12_8, "sm_100"),  # not 101, an integrated GPU's
        (121, NVRTC_12_8, "sm_120"),
        (121, NVRTC_13_0, "sm_121"),
        (110, NVRTC_12_8, "compute_100"),
        (101, NVRTC_13_0, "compute_100"),  # an integrated GPU runs no other's machine code
        (130, NVRTC_13_0, "compute_121"),
        (86, [90, 75], "compute_75"),
    ],
)
def test_a_gpu_that_the_compiler_does_not_know_gets_what_it_can_run(architecture, known, target):
    assert device_code.target_for(architecture, "nvcc", known) == target


@pytest.mark.parametrize(("known", "listed"), [([100, 120], "10.0, 12.0"), ([], "no GPU that it names")])
def test_a_compiler_for_later_gpus_alone_is_told(known, listed):
    with pytest.raises(BackendError, match=f"^nvcc compiles for {listed}, and the GPU has 9.0$"):
        device_code.target_for(90, "nvcc", known)


# ---- Prebuilt ------------------------------------------------------------------------------------------------------


def test_prebuilt_device_code_is_taken_if_it_is_of_these_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "FATBIN", str(tmp_path / "_kernels.fatbin"))
    with pytest.raises(BackendError, match="none is prebuilt"):
        way("prebuilt")()
    (tmp_path / "_kernels.fatbin").write_bytes(b"fatbin")
    record = tmp_path / "_kernels.json"
    record.write_text("damaged")
    with pytest.raises(BackendError, match="none is prebuilt"):
        way("prebuilt")()
    record.write_text(json.dumps({"fingerprint": "of others"}))
    with pytest.raises(BackendError, match="made from other sources"):
        way("prebuilt")()
    record.write_text(json.dumps({"fingerprint": build.device_fingerprint()}))
    assert way("prebuilt")() == b"fatbin"


# ---- nvcc ----------------------------------------------------------------------------------------------------------


def test_nvcc_compiles_once(nvcc, cache):
    assert way("compiled by nvcc")() == CUBIN
    (cubin,) = cache.glob("*.cubin")
    (nvcc.parent / "broken").touch()
    assert way("compiled by nvcc")() == CUBIN
    with pytest.raises(BackendError, match=r"nvcc failed \(status 2\)"):
        way("compiled by nvcc", (10, 0))()
    cubin.chmod(0o666)  # others can write it
    with pytest.raises(BackendError, match=r"nvcc failed \(status 2\)"):
        way("compiled by nvcc")()
    cubin.chmod(0o600)
    cubin.write_bytes(b"half a cu")
    with pytest.raises(BackendError, match=r"nvcc failed \(status 2\)"):
        way("compiled by nvcc")()


def test_ptx_is_made_for_a_gpu_newer_than_nvcc(nvcc, cache):
    for _ in range(2):  # compiled, then from the cache
        assert way("compiled by nvcc", (13, 0))() == b"-ptx -arch=compute_100\n\0"
        (nvcc.parent / "broken").touch()


def another_banner(nvcc, monkeypatch):
    status = nvcc.stat()
    script(nvcc, FALSE_NVCC.replace("of a test", "of a tesd"))  # as long
    os.utime(nvcc, ns=(status.st_atime_ns, status.st_mtime_ns))


def another_size(nvcc, monkeypatch):
    status = nvcc.stat()
    script(nvcc, FALSE_NVCC + "\n")
    os.utime(nvcc, ns=(status.st_atime_ns, status.st_mtime_ns))


def another_time(nvcc, monkeypatch):
    os.utime(nvcc, ns=(0, 0))


def another_folder(nvcc, monkeypatch):
    shutil.copytree(nvcc.parent, nvcc.parents[1] / "other" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1] / "other"))


def another_standard_header(nvcc, monkeypatch):
    monkeypatch.setitem(nvrtc.STANDARD_HEADERS, "cmath", "#pragma once")


def another_flag(nvcc, monkeypatch):
    monkeypatch.setattr(build, "DEVICE_FLAGS", [*build.DEVICE_FLAGS, "-lineinfo"])


@pytest.mark.parametrize(
    "change", [another_banner, another_size, another_time, another_folder, another_standard_header, another_flag]
)
def test_what_the_device_code_depends_on_compiles_anew(nvcc, cache, monkeypatch, change):
    way("compiled by nvcc")()
    change(nvcc, monkeypatch)
    way("compiled by nvcc")()
    keys = {path.name.partition("-")[0] for path in cache.glob("*.cubin")}
    assert len(keys) == 2


def test_a_cache_that_cannot_be_written_is_done_without(nvcc, cache):
    cache.write_text("a file where the folder should be")
    assert way("compiled by nvcc")() == CUBIN


def test_what_nvcc_says_is_told(nvcc, cache):
    (nvcc.parent / "broken").touch()
    with pytest.raises(BackendError, match=r"(?s)nvcc failed \(status 2\); its last lines:.*unsupported GNU version"):
        way("compiled by nvcc")()
    assert not list(cache.glob("*.cubin"))


def test_without_nvcc(monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(BackendError, match="there is no nvcc: install a CUDA toolkit, and set CUDA_HOME"):
        way("compiled by nvcc")()


@pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
def test_a_real_nvcc_gives_a_cubin(cache, one_kernel):
    assert way("compiled by nvcc")().startswith(b"\x7fELF")


@pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
def test_a_real_nvcc_makes_a_fatbin_for_what_is_shipped(one_kernel, tmp_path):
    nvcc = build.find_nvcc()
    listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    codes = [code for code in build.DEVICE_CODES if code in build.listed_codes(listed)]
    assert codes
    subprocess.run(build.fatbin_command(nvcc, codes, tmp_path / "kernels.fatbin"), check=True)
    assert (tmp_path / "kernels.fatbin").read_bytes().startswith(b"\x50\xed\x55\xba")  # CUDA's mark of a fatbin


# ---- NVRTC ---------------------------------------------------------------------------------------------------------


FOUND = [path for path in device_code.nvrtc_files() if path.is_absolute()]


@pytest.mark.skipif(not FOUND, reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
def test_the_first_nvrtc_that_works_gives_a_cubin_once(cache, one_kernel, monkeypatch, tmp_path):
    (tmp_path / "libnvrtc.so.13").write_text("no library")
    monkeypatch.setattr(device_code, "nvrtc_files", lambda: [tmp_path / "libnvrtc.so.13", *FOUND])
    cubin = way("compiled by NVRTC")()
    assert cubin.startswith(b"\x7fELF")
    monkeypatch.setattr(device_code.Nvrtc, "compile", None)
    assert way("compiled by NVRTC")() == cubin


def test_if_no_nvrtc_works_the_words_of_each_are_told(monkeypatch, tmp_path):
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        (tmp_path / name).write_text("no library")
    monkeypatch.setattr(device_code, "nvrtc_files", lambda: sorted(tmp_path.iterdir()))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    words = (
        "there is no NVRTC of CUDA 12 that works; run `pip install nvidia-cuda-nvrtc-cu12`; NVRTC could not be loaded "
    )
    with pytest.raises(BackendError, match=words + r"from .*\.so\.12 \(.*; NVRTC could not be loaded from .*\.so\.13"):
        way("compiled by NVRTC")()

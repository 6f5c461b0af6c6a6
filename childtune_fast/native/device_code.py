"""Device code for a GPU: prebuilt by `pip install`, else compiled now by NVRTC or nvcc, and cached on disk.

All three ways make the same kernels from `csrc/cuda/kernels.cu`. NVRTC comes with torch's CUDA wheels, so that its
version fits torch and the driver, and it needs no toolkit, no host compiler and no GPU. nvcc is used where NVRTC is
missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from . import BackendError, build, kept
from .jit import cache_folder
from .nvrtc import Nvrtc, kernel_source
from .nvrtc_files import nvrtc_files, wanted_majors
from .toolchain import PROBE_TIMEOUT, can_start_python, quoted, run

NVCC_TIMEOUT = 300.0  # seconds
INTEGRATED = (72, 87, 88, 101, 110)  # Tegra's compute capabilities: their machine code and that of others do not mix


def images(capability: tuple[int, int]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields the ways to make device code for a GPU of this compute capability, the best one first.

    Yields:
        The name of the way, and a function that returns the device code or raises BackendError. The driver may refuse
        the code later.
    """
    architecture = 10 * capability[0] + capability[1]
    if architecture < build.DEVICE_CODES[0]:
        yield f"compute capability {_dotted(architecture)}", _refuse
        return
    yield "prebuilt", _prebuilt
    yield "compiled by NVRTC", lambda: _by_nvrtc(architecture)
    yield "compiled by nvcc", lambda: _by_nvcc(architecture)


def _refuse() -> bytes:
    raise BackendError(f"the kernels need {_dotted(build.DEVICE_CODES[0])} or later")


def _dotted(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"


def _prebuilt() -> bytes:
    """Returns the fatbin that `pip install` made.

    Raises:
        BackendError: there is none, or it was made from other sources than those of this package.
    """
    path = build.PACKAGE / build.FATBIN
    try:
        recorded = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["fingerprint"]
        image = path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        raise BackendError("none is prebuilt") from None
    if recorded != build.device_fingerprint():
        raise BackendError(f"{path} was made from other sources than this package's; run `pip install` again")
    return image


def target_for(architecture: int, compiler: str, known: list[int]) -> str:
    """Returns what a compiler is to compile for, so that a GPU can run it.

    Machine code runs on later GPUs of its major version too, except that of and for integrated GPUs; PTX, which the
    driver compiles, runs on all later ones. So a GPU that is newer than the compiler is served.

    Args:
        architecture: compute capability of the GPU, such as 90 for 9.0.
        compiler: the compiler's name, for the error.
        known: compute capabilities that the compiler knows.

    Returns:
        "sm_90" for the machine code of 9.0, "compute_90" for its PTX.

    Raises:
        BackendError: the compiler knows only GPUs that are later than this one.
    """
    if architecture in known:
        return f"sm_{architecture}"
    best = max((code for code in known if code < architecture and code not in INTEGRATED), default=None)
    if best is None:
        listed = ", ".join(map(_dotted, known)) or "no GPU that it names"
        raise BackendError(f"{compiler} compiles for {listed}, and the GPU has {_dotted(architecture)}")
    runs = best // 10 == architecture // 10 and architecture not in INTEGRATED
    return f"{'sm' if runs else 'compute'}_{best}"


def _by_nvrtc(architecture: int) -> bytes:
    """Returns what the first NVRTC that can compile made; raises BackendError, with each one's words, if none can."""
    failures = []
    for path in nvrtc_files():
        try:
            return _compile_with_nvrtc(Nvrtc(path), architecture)
        except BackendError as error:  # noqa: PERF203 - each one's words are told
            failures.append(str(error))
    major = wanted_majors()[0]
    wheel = "nvidia-cuda-nvrtc" if major > 12 else f"nvidia-cuda-nvrtc-cu{major}"
    raise BackendError(
        "; ".join([f"there is no NVRTC of CUDA {major} that works; run `pip install {wheel}`", *failures])
    )


def _compile_with_nvrtc(nvrtc: Nvrtc, architecture: int) -> bytes:
    target = target_for(architecture, str(nvrtc.path), nvrtc.architectures())
    here = threading.current_thread() is threading.main_thread() or not can_start_python()
    make = nvrtc.compile if here else functools.partial(_compile_apart, nvrtc.path)
    return _cached([*_identity(nvrtc.path), nvrtc.version], target, lambda: make(*kernel_source(), target))


def _compile_apart(path: Path, source: str, headers: dict[str, str], target: str) -> bytes:
    """Compiles as `Nvrtc.compile` does, in another process.

    A process that ends while a thread of it compiles would be aborted by what NVRTC does at a process's end.
    """
    with tempfile.TemporaryDirectory(prefix="childtune_fast-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        sys_path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        job = {"sys_path": sys_path, "path": str(path), "arguments": [source, headers, target]}
        (folder / "job").write_text(json.dumps(job))
        (folder / "compile.py").write_text(
            "import json, sys\njob = json.load(open('job'))\nsys.path[:] = job['sys_path']\nfrom pathlib import Path\n"
            "from childtune_fast.native.nvrtc import Nvrtc\n"
            "Path('made').write_bytes(Nvrtc(Path(job['path'])).compile(*job['arguments']))\n"
        )
        _output([sys.executable, "compile.py"], NVCC_TIMEOUT, folder)
        return (folder / "made").read_bytes()


def _by_nvcc(architecture: int) -> bytes:
    """Returns what nvcc made; raises BackendError if there is none or it fails."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise BackendError("there is no nvcc: install a CUDA toolkit, and set CUDA_HOME to its folder")
    banner, listing = (_output([nvcc, question], PROBE_TIMEOUT) for question in ("--version", "--list-gpu-code"))
    target = target_for(architecture, nvcc, build.listed_codes(listing))
    return _cached([*_identity(Path(nvcc)), banner], target, lambda: _compile_with_nvcc(nvcc, target))


def _compile_with_nvcc(nvcc: str, target: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="childtune_fast-", ignore_cleanup_errors=True) as folder:
        file = Path(folder, "kernels")
        _output(build.nvcc_command(nvcc, target, file), NVCC_TIMEOUT)
        return file.read_bytes() + (b"" if target.startswith("sm_") else b"\0")  # the driver reads PTX as a C string


def _output(command: list[str], timeout: float, folder: Path | None = None) -> str:
    try:
        status, output = run(command, timeout=timeout, cwd=folder)
    except subprocess.TimeoutExpired:
        raise BackendError(f"{command[0]} was stopped after {timeout:.0f} s") from None
    except OSError as error:
        raise BackendError(f"{command[0]} cannot be run ({error})") from None
    if status:
        raise BackendError(f"{command[0]} failed (status {status}); its last lines:{quoted(output)}")
    return output


# ---- The cache -----------------------------------------------------------------------------------------------------


def _cached(compiler: list[object], target: str, make: Callable[[], bytes]) -> bytes:
    """Returns what a compiler makes of the kernels, from the cache if it holds a complete and trusted file.

    What is new is written to the cache, unless the folder cannot be written.

    Args:
        compiler: facts that differ between any two compilers.
        target: what it compiles for.
        make: function that compiles.
    """
    facts = json.dumps([kernel_source(), build.DEVICE_FLAGS, compiler, target])
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    suffix = ".cubin" if target.startswith("sm_") else ".ptx"
    cache = cache_folder()

    def found() -> bytes | None:
        images = {path.stem: kept.read(path) for path in sorted(cache.glob(f"{key}-*{suffix}"))}
        whole = (image for stem, image in images.items() if image and stem == f"{key}-{_digest(image)}")
        return next(whole, None)

    image = found()
    if image is None:
        with kept.one_at_a_time(cache / f"{key}.lock", NVCC_TIMEOUT):  # processes that start together compile once
            image = found() or make()
            kept.write(cache / f"{key}-{_digest(image)}{suffix}", image)
    return image


def _identity(file: Path) -> list[object]:
    """Returns path, size and time of a file, so that another one in its place is told from it."""
    path = file.resolve()
    try:
        status = path.stat()
    except OSError as error:
        raise BackendError(f"{path} cannot be read ({error.strerror})") from None
    return [str(path), status.st_size, status.st_mtime_ns]


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:32]

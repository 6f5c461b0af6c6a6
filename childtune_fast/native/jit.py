"""The just-in-time build: `torch.utils.cpp_extension.load` with a cache that survives crashes, kills and full disks.

torch's own lock file remains after a killed build and then blocks every later build (pytorch#189245). Each build here
therefore gives torch a new private folder. Processes share two things: a lock that the operating system releases when
its holder dies, and finished binaries. A binary is put in place by an atomic rename, under a name that contains its
digest, so that an incomplete file is never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock, Timeout

from . import BackendError, build, toolchain

LOCK_TIMEOUT = 120.0  # seconds to wait for another process's build; after that, both build, which is safe
STALE_AFTER = 3600.0  # seconds after which a build folder is removed; every build is stopped much earlier
SPACE_NEEDED = 8 << 20  # bytes; more than the objects and the binary of one build take
SUFFIX = ".pyd" if sys.platform == "win32" else ".so"


def load() -> ModuleType:
    """Returns the compiled module, from the cache if it holds a complete one, else built now.

    Raises:
        BackendError: the module cannot be built or loaded; the message has the cause, the compiler's last lines and the
            remedy.
    """
    compiler = toolchain.find_compiler()
    cache, key = cache_folder(), _key(compiler)
    module = _cached(cache, key)  # looks before it writes anything, so that a read-only cache works too
    if module is not None:
        return module
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        with _locked(cache / f"{key}.lock"):
            return _cached(cache, key) or _build_in(cache, key, compiler)
    except OSError as error:
        problem = f"cannot write to the cache folder {cache} ({error.strerror or error})"
    try:
        with tempfile.TemporaryDirectory(prefix="childtune_fast-", ignore_cleanup_errors=True) as private:
            _say(f"{problem}; this build will serve this process alone")
            return _build_in(Path(private), key, compiler)
    except OSError as error:
        raise BackendError(
            f"{problem}, nor to a temporary one ({error.strerror or error}); a build needs {SPACE_NEEDED >> 20} MiB: "
            f"set CHILDTUNE_CACHE to a folder with room"
        ) from None


def cache_folder() -> Path:
    """Returns the folder of finished builds: CHILDTUNE_CACHE, else a subfolder of torch's folder for extensions."""
    chosen = os.environ.get("CHILDTUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        from torch.utils.cpp_extension import get_default_build_root

        root = get_default_build_root()
    return Path(root).absolute() / "childtune_fast"


def _key(compiler: toolchain.Compiler) -> str:
    """Returns the digest of all facts on which a binary depends: sources, compiler, flags, Python, system, torch."""
    facts = [
        build.fingerprint(),
        compiler.path,
        compiler.banner,
        toolchain.local_flags(),
        sysconfig.get_config_var("SOABI") or sys.version,
        [sys.platform, platform.machine(), *platform.libc_ver()],
        torch.__version__,  # the build includes torch's own pybind11 headers
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _cached(cache: Path, key: str) -> ModuleType | None:
    """Imports and returns a finished binary, or returns None; deletes binaries that are damaged or do not load."""
    for path in sorted(cache.glob(f"{key}-*{SUFFIX}")):
        with contextlib.suppress(OSError):
            if path.stem == f"{key}-{_digest(path)}":  # checked first, because loading a truncated library crashes
                with contextlib.suppress(ImportError):
                    return _import(path)
            path.unlink()
    return None


def _build_in(folder: Path, key: str, compiler: toolchain.Compiler) -> ModuleType:
    """Builds in a new subfolder of `folder`, moves the binary into `folder`, and imports and returns it.

    Raises:
        BackendError: the build fails, or its binary does not load.
        OSError: `folder` cannot be written, or has too little space.
    """
    private = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        _check_space(private / "probe")
        _say(f"building the native backend in {folder} (once; about {toolchain.USUAL_SECONDS} s)")
        toolchain.compile_native(private, compiler)
        built = private / f"{build.MODULE}{SUFFIX}"
        with built.open("rb+") as file:
            os.fsync(file.fileno())  # the content must be on the disk before the name with its digest is
        finished = folder / f"{key}-{_digest(built)}{SUFFIX}"
        os.replace(built, finished)
        return _import(finished)
    except ImportError as error:
        raise BackendError(f"the native backend was built and does not load ({error})") from error
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"childtune_fast.{build.MODULE}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock at `path`; after LOCK_TIMEOUT, continues without it."""
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say("waiting for another process to build the native backend")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=LOCK_TIMEOUT)
        yield
    finally:
        lock.release()


def _check_space(path: Path) -> None:
    """Raises OSError unless as many bytes can be written as a build needs; a compiler's error would be less clear."""
    path.write_bytes(bytes(SPACE_NEEDED))
    path.unlink()


def _remove_stale(cache: Path) -> None:
    """Removes the folders of builds that were killed."""
    for folder in cache.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _say(line: str) -> None:
    print(f"childtune_fast: {line}", file=sys.stderr, flush=True)

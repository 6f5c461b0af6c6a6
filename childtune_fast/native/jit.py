"""The just-in-time build: `torch.utils.cpp_extension.load` with a cache that survives crashes, kills and full disks.

torch's own lock file outlives a killed build and then blocks everybody (pytorch#189245), so torch only ever sees a
fresh private folder here. Shared are (1) a lock that the operating system drops when its holder dies, and (2) finished
binaries, put in place by an atomic rename under a name that holds their own digest: half a file never passes for one.
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

LOCK_TIMEOUT = 120.0  # seconds to wait for another process's build; then this one builds too, which does no harm
STALE_AFTER = 3600.0  # seconds after which a build folder has lost its owner: no build is let run so long
SPACE_NEEDED = 8 << 20  # bytes: objects and binary of one build, with room to spare
SUFFIX = ".pyd" if sys.platform == "win32" else ".so"


def load() -> ModuleType:
    """Returns the compiled module, from the cache if it holds a whole one, else built now.

    Raises:
        BackendError: it cannot be had; the message holds the cause, the compiler's last lines and the remedy.
    """
    compiler = toolchain.find_compiler()
    cache, key = cache_folder(), _key(compiler)
    module = _cached(cache, key)  # before anything is written: a read-only cache serves as well
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
    """Returns the folder of finished builds: CHILDTUNE_CACHE, else a subfolder of torch's own for extensions."""
    chosen = os.environ.get("CHILDTUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        from torch.utils.cpp_extension import get_default_build_root

        root = get_default_build_root()
    return Path(root).absolute() / "childtune_fast"


def _key(compiler: toolchain.Compiler) -> str:
    """Returns the digest of everything that decides whether a binary fits this process."""
    facts = [
        build.fingerprint(),
        compiler.path,
        compiler.banner,
        toolchain.local_flags(),
        sysconfig.get_config_var("SOABI") or sys.version,
        [sys.platform, platform.machine(), *platform.libc_ver()],
        torch.__version__,  # its pybind11 headers are the ones that are compiled in
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _cached(cache: Path, key: str) -> ModuleType | None:
    """Imports a finished binary; one that is damaged, or does not load here any more, is thrown away."""
    for path in sorted(cache.glob(f"{key}-*{SUFFIX}")):
        with contextlib.suppress(OSError):
            if path.stem == f"{key}-{_digest(path)}":  # a truncated library would not raise but crash
                with contextlib.suppress(ImportError):
                    return _import(path)
            path.unlink()
    return None


def _build_in(folder: Path, key: str, compiler: toolchain.Compiler) -> ModuleType:
    """Builds in a fresh subfolder of `folder`, puts the binary there and imports it."""
    private = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        _check_space(private / "probe")
        _say(f"building the native backend in {folder} (once; about {toolchain.USUAL_SECONDS} s)")
        toolchain.compile_native(private, compiler)
        built = private / f"{build.MODULE}{SUFFIX}"
        with built.open("rb+") as file:
            os.fsync(file.fileno())  # the content first, then the name that vouches for it
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
    """Holds the lock at `path`, or goes on without it if its holder takes too long."""
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
    """Raises OSError unless a build's worth of bytes can be written: a compiler would say so far less clearly."""
    path.write_bytes(bytes(SPACE_NEEDED))
    path.unlink()


def _remove_stale(cache: Path) -> None:
    """Removes what killed builds left behind."""
    for folder in cache.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _say(line: str) -> None:
    print(f"childtune_fast: {line}", file=sys.stderr, flush=True)

"""The just-in-time build: `torch.utils.cpp_extension.load` with a cache that survives crashes, kills and full disks.

torch's own lock file remains after a killed build and then blocks every later build (pytorch#189245). Each build here
therefore gives torch a new private folder. Processes share two things: a lock that the operating system releases when
its holder dies, and finished binaries. A binary is put in place by an atomic rename, under a name that contains its
digest, so that an incomplete file is never loaded.

The name begins with the digest of what a binary needs where it runs. So a machine without a compiler finds what another
one, which shares the folder, has built: a cluster's compute nodes use the binary of its login node.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import stat
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._appdirs import user_cache_dir

from .. import whole_file
from . import BackendError, build, kept, toolchain

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
    cache = cache_folder()
    try:
        return _own(cache, toolchain.find_compiler())
    except BackendError:
        module = _cached(cache, f"{_needs()}-*")  # of another compiler, perhaps on another machine
        if module is None:
            raise
        return module


def _own(cache: Path, compiler: toolchain.Compiler) -> ModuleType:
    """Returns the module that this compiler has built or builds now; raises BackendError as `load` does."""
    key = _key(compiler)
    module = _cached(cache, key)  # looks before it writes anything, so that a read-only cache works too
    if module is not None:
        return module
    try:
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)  # whatever the umask, others cannot write there
        _remove_stale(cache)
        with kept.one_at_a_time(cache / f"{key}.lock", LOCK_TIMEOUT, _say_waiting):
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
    """Returns the folder of finished builds: CHILDTUNE_CACHE, else a subfolder of torch's folder for extensions.

    Raises:
        BackendError: CHILDTUNE_CACHE names no folder: the home or the working directory that it begins in is not known.
    """
    chosen = os.environ.get("CHILDTUNE_CACHE")
    if chosen:
        try:
            return Path(chosen).expanduser().absolute()
        except (RuntimeError, OSError):
            raise BackendError(
                f"the environment variable CHILDTUNE_CACHE must name a folder (got {chosen!r}, which begins in a home "
                "or working directory that is not known); set it to an absolute path"
            ) from None
    # As torch.utils.cpp_extension says, which is not asked: to import it prints a line where a GPU's torch finds none.
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.realpath(user_cache_dir("torch_extensions"))
    return Path(root).absolute() / "childtune_fast"


def _needs(options: Sequence[str] = ()) -> str:
    """Returns the digest of what a binary needs where it runs, but for the C and C++ libraries.

    The loader refuses libraries that are too old. Instruction sets are no need: the code chooses among those there are,
    unless `options`, those in the compiler's command, say otherwise. So a binary made with options serves only where
    the same ones are asked for.
    """
    return _digest_of(
        [
            build.fingerprint(),
            sysconfig.get_config_var("SOABI") or sys.version,
            [sys.platform, platform.machine(), platform.libc_ver()[0]],
            torch.__version__,  # the build includes torch's own pybind11 headers
            *options,
        ]
    )[:16]


def _key(compiler: toolchain.Compiler) -> str:
    """Returns how the name of a binary by this compiler begins: digests of what it needs and of how it is made."""
    made_with = [compiler.path, compiler.banner, toolchain.local_flags(), platform.libc_ver()]
    return f"{_needs(compiler.options)}-{_digest_of(made_with)[:16]}"


def _digest_of(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _cached(cache: Path, key: str) -> ModuleType | None:
    """Imports and returns the newest finished binary that loads, or returns None.

    Args:
        cache: the folder.
        key: what its name begins with, up to its digest; a pattern with "*" leaves alone what others have built, though
            it does not load here, while damaged and useless ones of this key are deleted. One that was to be loaded
            from a copy may be useful: the copy's place may be at fault.
    """
    for path in sorted(cache.glob(f"{key}-{'[0-9a-f]' * 32}{SUFFIX}"), key=_age):
        content = kept.read(path)
        if content is None:
            _say_not_ours(path)
            continue
        whole = path.stem.endswith(_digest(content))
        if whole:  # checked first, because loading a truncated library crashes
            with contextlib.suppress(ImportError, OSError):
                return _import_checked(path, content)
        if "*" not in key and not (whole and not kept.only_ours(cache)):
            with contextlib.suppress(OSError):
                path.unlink()
    return None


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


@functools.cache
def _say_not_ours(path: Path) -> None:
    _say(
        f"{path} is not used, since others than you and root own it or may write it; let root own what several users "
        "share, or set CHILDTUNE_CACHE to a folder of your own"
    )


def _import_checked(path: Path, content: bytes) -> ModuleType:
    """Imports a binary that has been read; from a copy where others may put another file in its place."""
    if kept.only_ours(path.parent):
        return _import(path)
    with tempfile.TemporaryDirectory(prefix="childtune_fast-", ignore_cleanup_errors=True) as private:
        copy = Path(private, path.name)
        try:
            copy.write_bytes(content)
            return _import(copy)
        except (ImportError, OSError):  # the temporary folder may be mounted "noexec", or full
            if not hasattr(os, "memfd_create"):
                raise
            # A new subfolder of the cache would not do: who can write in the cache can put another in its place.
            with open(os.memfd_create(path.stem), "wb") as file:
                file.write(content)
                file.flush()
                link = Path(private, f"memory{SUFFIX}")  # dlopen takes two files of one name for the same library
                link.symlink_to(f"/proc/self/fd/{file.fileno()}")
                return _import(link)


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
        built.chmod(built.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))  # else it would not be read, see `kept`
        content = built.read_bytes()
        finished = folder / f"{key}-{_digest(content)}{SUFFIX}"
        os.replace(built, finished)
        whole_file.sync(folder)
        return _import_checked(finished, content)
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


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _say_waiting() -> None:
    _say("waiting for another process to build the native backend")


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

"""Writing files whole or not at all: a new file is written beside the old one, and on the disk before it has its name.

Whoever dies while it writes leaves an unfinished file behind, which the next write in that folder removes. A lock tells
it from the file of a process that lives: the system gives the lock up when its holder dies.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

_UNFINISHED = re.compile(r"\.childtune_fast-(?P<host>\w{8})-(?P<boot>\w{8})-\w{16}\.unfinished")


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a user's file for writing: what the block writes is there as a whole after it, or nothing if it raises.

    A new file has the permissions that the process's umask leaves, an existing one keeps its own. A symbolic link stays
    and leads to the new content. Pipes and devices, which cannot be replaced, are written to directly.

    Raises:
        OSError: the file cannot be written, or may not be: a file that is write-protected is not replaced.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb") as file:  # raises for a folder
            yield file
        return
    if mode is not None:
        os.close(os.open(path, os.O_WRONLY))  # raises for a protected file, which a new one could take the place of
    with replacing(Path(os.path.realpath(path)), None if mode is None else mode & 0o777) as file:
        yield file


@contextlib.contextmanager
def replacing(path: Path, mode: int | None) -> Iterator[BinaryIO]:
    """Opens a new file, which takes the place of `path` after the block, or is removed if the block raises.

    Args:
        path: a regular file or a free name, in a folder that exists. A symbolic link would itself be replaced.
        mode: the new file's permissions; None leaves them to the umask.

    Raises:
        OSError: the file cannot be written.
    """
    _remove_leftovers(path.parent)
    file, unfinished = _new_file(path.parent, mode)
    try:
        with file:
            if mode is not None and sys.platform != "win32":
                os.fchmod(file.fileno(), mode)  # whatever the umask
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content must be on the disk before the name is
            if sys.platform == "win32":
                file.close()  # an open file cannot be renamed there
            os.replace(unfinished, path)  # still locked: unlocked, it would be a leftover
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    sync(path.parent)


def _new_file(folder: Path, mode: int | None) -> tuple[BinaryIO, Path]:
    """Returns a new, locked file and its path; nobody else ever uses that name."""
    while True:
        unfinished = folder / f".childtune_fast-{_host()}-{_boot()}-{secrets.token_hex(8)}.unfinished"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(unfinished, flags, 0o666 if mode is None else mode), "wb")
        try:
            if _lock(file) is not False and unfinished.exists():
                return file, unfinished
        except BaseException:
            file.close()
            raise
        file.close()  # another process has taken the file for a leftover before it was locked


def _remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files of dead processes of this machine; of what cannot be locked, none."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            found = _UNFINISHED.fullmatch(name)
            # Where hosts share a folder, locks may hold on one host only. A container has a new host name each time.
            if found and (found["host"] == _host() or found["boot"] == _boot()):
                with contextlib.suppress(OSError), open(folder / name, "r+b") as file:
                    if _lock(file):
                        os.unlink(folder / name)


def _lock(file: BinaryIO) -> bool | None:
    """Locks a file until it is closed; returns whether it is, or None if the system or the file's cannot do that."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sync(folder: Path) -> None:
    """Puts the names in a folder on the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@functools.cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@functools.cache
def _boot() -> str:
    """Returns what tells the running system, with all its containers, from every other; the host where it has none."""
    try:
        found = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return _host()
    return hashlib.sha256(found).hexdigest()[:8]

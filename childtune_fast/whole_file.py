"""Writing files whole or not at all: a new file is written beside the old one, and on the disk before it has its name.

Whoever dies while it writes leaves an unfinished file behind, which the next write in that folder removes. A lock tells
it from the file of a process that lives: the system gives the lock up when its holder dies.
"""

from __future__ import annotations

import contextlib
import errno
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
# Where every process has its open files by number: a name there is no place in a folder, whatever it leads to.
_OPEN_FILES = re.compile(r"/dev/fd|/proc/\d+/(task/\d+/)?fd")
_ACCESS_LIST = "system.posix_acl_access"


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a user's file for writing: what the block writes is there as a whole after it, or nothing if it raises.

    A new file has the permissions that the process's umask leaves. An existing one keeps its own, with its owner, group
    and access list as far as the user may set these, and nobody gains access to it. A symbolic link stays and leads to
    the new content. Pipes, devices and what is named as an open file, such as /dev/stdout, cannot be replaced: they are
    written to directly.

    Raises:
        OSError: the file cannot be written, or may not be: a file that is write-protected is not replaced.
    """
    try:
        old = os.stat(path)
    except FileNotFoundError:
        # As open would. Of a folder that is not there, such as "new/", the real path would be free for a file.
        if not os.fspath(path) or not os.path.isdir(os.path.dirname(path) or "."):
            raise
        old = None
    if old is not None and (not stat.S_ISREG(old.st_mode) or _is_open_file(path)):
        with open(path, "wb") as file:  # raises for a folder
            yield file
        return
    if old is not None:
        os.close(os.open(path, os.O_WRONLY))  # raises for a protected file, which a new one could take the place of
    real = Path(os.path.realpath(path))
    with replacing(real, None if old is None else 0o600, path) as file:
        if old is not None:
            _keep_access(file.fileno(), real, old)
        yield file


def _is_open_file(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path leads to a file by a descriptor that is open, as /dev/stdout does, and not by its name.

    Links are followed by name, for two looks at a file could be before and after another process replaces it.
    """
    place = os.fspath(path)
    while True:
        folder = os.path.realpath(os.path.dirname(place) or ".")
        if _OPEN_FILES.fullmatch(folder):
            return True
        try:
            place = os.path.join(folder, os.readlink(os.path.join(folder, os.path.basename(place))))
        except OSError:  # no link
            return False


def _keep_access(file: int, path: Path, old: os.stat_result) -> None:
    """Gives a new file the owner, group, access list and permissions of the one at `path`.

    What cannot be kept makes it less accessible, never more.
    """
    if sys.platform == "win32":
        return
    mode = old.st_mode & 0o777
    with contextlib.suppress(OSError):
        os.fchown(file, -1, old.st_gid)
    if os.fstat(file).st_gid != old.st_gid:
        both = mode & mode >> 3 & 0o7  # one of the old group may now be among the others, and the other way round
        mode = mode & 0o700 | both << 3 | both
    if sys.platform == "linux":
        entries = _access_list(path)
        with contextlib.suppress(OSError):
            if entries is None:
                os.removexattr(file, _ACCESS_LIST)  # the one that a folder gives to new files
            else:
                os.setxattr(file, _ACCESS_LIST, entries)
        if _access_list(file) != entries:
            mode &= 0o700
    os.fchmod(file, mode)  # whatever the umask
    with contextlib.suppress(OSError):
        os.fchown(file, old.st_uid, -1)  # last: who gives a file away may no longer change it


def _access_list(file: int | Path) -> bytes | None:
    """Returns a file's POSIX access control list, or None if it has no other than its permissions."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return os.getxattr(file, _ACCESS_LIST)
    return None


@contextlib.contextmanager
def replacing(path: Path, mode: int | None, called: str | os.PathLike[str] | None = None) -> Iterator[BinaryIO]:
    """Opens a new file, which takes the place of `path` after the block, or is removed if the block raises.

    Args:
        path: a regular file or a free name, in a folder that exists. A symbolic link would itself be replaced.
        mode: the new file's permissions; None leaves them to the umask.
        called: the name that an error gives the file; by default, `path`.

    Raises:
        OSError: the file cannot be written.
    """
    _remove_leftovers(path.parent)
    called = path if called is None else called
    try:
        file, unfinished = _new_file(path.parent, mode)
    except OSError as error:
        raise _refusal(error, called) from None
    try:
        with file:
            if mode is not None and sys.platform != "win32":
                os.fchmod(file.fileno(), mode)  # whatever the umask
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content must be on the disk before the name is
            if sys.platform == "win32":
                file.close()  # an open file cannot be renamed there
            try:
                os.replace(unfinished, path)  # still locked: unlocked, it would be a leftover
            except OSError as error:
                raise _refusal(error, called) from None
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    sync(path.parent)


def _refusal(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """Returns the same error of the file that the user named, and not of the unfinished one."""
    text = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY):  # the last of a file that is a mount
        text += " (its folder must allow a new file beside it, which then takes its place; use a folder that does)"
    return OSError(error.errno, text, os.fspath(path))


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
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
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

"""Files kept between processes: read only if trusted, written atomically.

Device code goes from such a file to the driver, so what anyone else could have written there is not read.
"""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .. import whole_file


def read(path: Path) -> bytes | None:
    """Returns a file's content, or None if there is none or others than this user and root could have written it.

    On POSIX systems the file must be a regular one of the process's user or of root, as in an image of a container, and
    neither group nor world may have the right to write. A symbolic link is not followed.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            return file.read() if _trusted(os.fstat(file.fileno())) else None
    except OSError:
        return None


def _open(path: str, flags: int) -> int:
    # Windows has neither flag. Without the second, opening a named pipe would wait for its writer.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _trusted(found: os.stat_result) -> bool:
    if os.name != "posix":
        return True
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISREG(found.st_mode) and found.st_uid in (os.geteuid(), 0) and not others_write


def only_ours(folder: Path) -> bool:
    """Returns whether nobody but this user and root can put another file in the place of one in a folder."""
    try:
        found = folder.stat()
    except OSError:
        return False
    if os.name != "posix":
        return True
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid in (os.geteuid(), 0) and (not others_write or bool(found.st_mode & stat.S_ISVTX))


def write(path: Path, data: bytes) -> bool:
    """Writes a file whole or not at all, and its folder if that is missing; only the user can read what is made new.

    Returns:
        Whether the file is written. If it is not, what was there is unchanged.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file.replacing(path, mode=0o600) as file:
            file.write(data)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def one_at_a_time(lock_file: Path, timeout: float, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Waits while another process of this machine holds a lock.

    Args:
        lock_file: the lock's file. Where it cannot be made, or the file system has no locks, nobody waits.
        timeout: seconds after which this process goes on without the lock.
        waits: function that is called once before this process waits (default: nothing).
    """
    lock = FileLock(lock_file)
    try:
        with contextlib.suppress(Timeout, OSError, NotImplementedError):
            lock_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # some versions of filelock warn where there are no locks
                    lock.acquire(timeout=0)
            except Timeout:
                waits()
                lock.acquire(timeout=timeout)
        yield
    finally:
        with contextlib.suppress(OSError, NotImplementedError):  # the work is done, and the lock ends with the process
            lock.release()

"""A cache folder without locks, one that others may write while temporary folders are "noexec", one with no name."""

import errno
import os
import tempfile
import threading
import warnings
from pathlib import Path

import filelock
import pytest
import torch
from processes import cause_of_failure

import childtune_fast
from childtune_fast import __main__ as report
from childtune_fast.native import jit, kept, load, toolchain

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.usefixtures("fresh_process")


def binaries(cache):
    return sorted(cache.glob(f"*{jit.SUFFIX}"))


# ---- Locks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_flock(monkeypatch):
    """Returns a function that lets every lock fail with the named error; ENOSYS leads filelock 4 to warn."""

    def fail_with(name):
        def flock(descriptor, operation):
            raise OSError(getattr(errno, name), "no locks")

        monkeypatch.setattr(fcntl, "flock", flock)

    return fail_with


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["ENOSYS", "ENOTSUP", "ENOLCK", "EIO", "EINVAL"])
def test_without_locks_builds_are_shared_all_the_same(monkeypatch, builds, cache, capfd, no_flock, name):
    monkeypatch.setattr(jit, "LOCK_TIMEOUT", 0.2)  # filelock 3.12 takes most of these for a lock that is held
    no_flock(name)
    assert load.load_native().answer() == 42
    assert "cannot write" not in capfd.readouterr().err
    assert len(binaries(cache)) == 1
    assert jit.load().answer() == 42
    assert len(builds) == 1


@pytest.mark.filterwarnings("error")
def test_what_old_versions_of_filelock_raise_without_locks(monkeypatch, builds, cache):
    def acquire(self, timeout):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert load.load_native().answer() == 42
    assert len(binaries(cache)) == len(builds) == 1


def test_errors_and_warnings_of_what_runs_under_the_lock_are_not_hidden(tmp_path):
    for error in (OSError("disk"), NotImplementedError("not yet"), filelock.Timeout("another")):
        with pytest.raises(type(error)) as caught, kept.one_at_a_time(tmp_path / "lock", 1.0):
            raise error
        assert caught.value is error
    with pytest.warns(UserWarning, match="from inside"), kept.one_at_a_time(tmp_path / "lock", 1.0):
        warnings.warn("from inside", stacklevel=1)


def test_a_lock_is_held_waited_for_and_given_up(tmp_path):
    told = []
    with kept.one_at_a_time(tmp_path / "lock", 1.0, lambda: told.append("first")):
        with kept.one_at_a_time(tmp_path / "lock", 0.1, lambda: told.append("second")):  # after 0.1 s, without it
            assert told == ["second"]

        def wait():
            with kept.one_at_a_time(tmp_path / "lock", 60.0, lambda: told.append("third")):
                told.append("has it")

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.3)
        assert told == ["second", "third"]
    thread.join()
    assert told == ["second", "third", "has it"]


def test_a_lock_that_cannot_be_given_back_loses_no_build(monkeypatch, builds, cache, capfd):
    real, failed = fcntl.flock, []

    def flock(descriptor, operation):
        if operation == fcntl.LOCK_UN and not failed:
            failed.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert jit.load().answer() == 42
    assert failed
    assert "cannot write" not in capfd.readouterr().err
    assert len(binaries(cache)) == len(builds) == 1


# ---- Folders that others may write ---------------------------------------------------------------------------------


@pytest.fixture
def no_exec(monkeypatch, tmp_path):
    """Makes a temporary folder from which nothing can be imported; returns it and what was tried to import."""
    folder, tried = tmp_path / "noexec", []
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    real = jit._import

    def imported(path):
        tried.append(path)
        if folder in path.resolve().parents:
            raise ImportError(f"{path}: failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(jit, "_import", imported)
    return folder, tried


@pytest.mark.parametrize("mask", [0, 0o002, 0o022, 0o077])
def test_nobody_else_can_write_in_a_folder_that_is_made(builds, cache, mask):
    before = os.umask(mask)
    try:
        module = jit.load()
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o755 & ~mask
    assert module.__file__ == str(binaries(cache)[0])  # so it needs no copy


@pytest.mark.parametrize("present", [True, False])
def test_a_copy_is_loaded_where_temporary_folders_are_noexec(builds, cache, no_exec, present):
    cache.mkdir()
    if present:
        jit.load()
    cache.chmod(0o775)
    folder, tried = no_exec
    tried.clear()
    assert jit.load().answer() == 42
    assert len(builds) == len(binaries(cache)) == 1
    assert [path.parent.parent for path in tried] == [folder, folder]  # never the file that others can replace
    assert list(folder.iterdir()) == []
    assert [path.suffix for path in cache.iterdir() if path.suffix != ".lock"] == [jit.SUFFIX]


def test_a_copy_is_loaded_where_temporary_folders_are_full(monkeypatch, builds, cache):
    jit.load()
    cache.chmod(0o775)

    def refuse(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert jit.load().answer() == 42
    assert len(builds) == 1


def test_a_file_whose_copy_cannot_be_loaded_is_kept(monkeypatch, builds, cache, no_exec):
    jit.load()
    (path,) = binaries(cache)
    cache.chmod(0o775)
    monkeypatch.delattr(os, "memfd_create")  # as on macOS
    key = jit._key(toolchain.find_compiler())
    assert jit._cached(cache, key) is None
    assert binaries(cache) == [path]
    path.rename(path.with_stem(f"{path.stem[:-32]}{'0' * 32}"))  # damaged: content and digest differ
    assert jit._cached(cache, key) is None
    assert binaries(cache) == []


# ---- Folders without a name ----------------------------------------------------------------------------------------

NAMELESS = (
    "the environment variable CHILDTUNE_CACHE must name a folder (got '~nosuchuser/x', which begins in a home or "
    "working directory that is not known); set it to an absolute path"
)


def test_a_home_that_is_not_known_leads_to_the_fallback(monkeypatch, capsys):
    monkeypatch.setenv("CHILDTUNE_CACHE", "~nosuchuser/x")
    assert cause_of_failure() == f"childtune_fast has no native backend: {NAMELESS}"
    with pytest.warns(UserWarning, match="'~nosuchuser/x'.*\n.*pure-torch"):
        assert load.resolve("auto") is None
    assert report.main() == 0
    assert f"cache folder      none ({NAMELESS})" in capsys.readouterr().out


def test_an_optimizer_steps_without_a_cache_folder(monkeypatch):
    monkeypatch.setenv("CHILDTUNE_CACHE", "~nosuchuser/x")
    weights = torch.nn.Parameter(torch.ones(3))
    weights.grad = torch.ones(3)
    optimizer = childtune_fast.ChildAdamW([weights], lr=0.1, reserve_p=1.0, seed=0)
    with pytest.warns(UserWarning, match="CHILDTUNE_CACHE must name a folder"):
        optimizer.step()
    assert (weights < 1).all()


def test_a_working_directory_that_is_gone(monkeypatch):
    def getcwd():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setenv("CHILDTUNE_CACHE", "relative")
    monkeypatch.setattr(os, "getcwd", getcwd)
    assert "CHILDTUNE_CACHE must name a folder (got 'relative', which begins in a home or working" in cause_of_failure()

"""How files are written: whole or not at all, under the names and with the permissions that people set."""

import errno
import os
import resource
import stat
import tempfile
import threading
from pathlib import Path

import pytest
import safetensors
from models import Tiny, child_of

from childtune_fast import ChildNetwork, whole_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


@pytest.fixture
def child():
    return child_of(Tiny())


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


# ---- Permissions and links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0])
def test_the_umask_says_who_may_read_a_new_file(path, child, umask):
    before = os.umask(umask)
    try:
        child.save(path)
    finally:
        os.umask(before)
    assert mode_of(path) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_an_existing_file_keeps_its_permissions(path, child, mode):
    path.touch()
    path.chmod(mode)
    child.save(path)
    assert mode_of(path) == mode
    assert ChildNetwork.load(path, Tiny()).fingerprint == child.fingerprint


def test_a_protected_file_is_not_replaced(child):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "file"
        path.write_bytes(b"old")
        path.chmod(0o444)
        before = os.geteuid()
        try:
            if before == 0:
                os.seteuid(65534)  # root may write to all files
            with pytest.raises(PermissionError):
                child.save(path)
        finally:
            os.seteuid(before)
        assert path.read_bytes() == b"old"
        assert os.listdir(folder) == ["file"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(tmp_path, child, exists):
    (tmp_path / "folder").mkdir()
    target, link, first = tmp_path / "folder" / "target", tmp_path / "link", tmp_path / "first"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(Path("folder") / "target")
    first.symlink_to(link)
    child.save(first)
    assert first.is_symlink()
    assert link.is_symlink()
    assert not target.is_symlink()
    assert ChildNetwork.load(target, Tiny()).fingerprint == child.fingerprint
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "target", "link", "first"}


def test_what_cannot_be_a_file_is_the_systems_own_error(tmp_path, child):
    (tmp_path / "loop").symlink_to("loop")
    for path, code in ((tmp_path / "loop", errno.ELOOP), (tmp_path, errno.EISDIR), ("/dev/full", errno.ENOSPC)):
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            child.save(path)
        assert caught.value.errno == code
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert os.listdir(tmp_path) == ["loop"]


def test_a_pipe_gets_the_whole_file(tmp_path, path, child):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    child.save(tmp_path / "pipe")
    reader.join()
    child.save(path)
    assert read == [path.read_bytes()]


# ---- Writes that fail ----------------------------------------------------------------------------------------------


def test_a_full_disk_is_the_systems_own_error_and_leaves_the_old_file(path, child):
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            child.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(path, child, monkeypatch, failing):
    path.write_bytes(b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        child.save(path)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name_and_then_the_name(path, child, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        calls.append(os.fstat(descriptor).st_size > 1000)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("name"), replace(*names)))
    child.save(path)
    assert calls[:4] == ["file", True, "name", "folder"]


# ---- What the dead leave -------------------------------------------------------------------------------------------


def leftover(folder, host="", boot="", number=0):
    path = folder / f".childtune_fast-{host or 'f' * 8}-{boot or 'f' * 8}-{number:016x}.unfinished"
    path.write_bytes(b"half")
    return path


def test_leftovers_of_this_machine_are_removed_at_the_next_write(path, child):
    host, boot = whole_file._host(), whole_file._boot()
    gone = [leftover(path.parent, host, boot), leftover(path.parent, host), leftover(path.parent, boot=boot)]
    foreign, similar = leftover(path.parent), path.parent / f".childtune_fast-{host}-{boot}-mine.unfinished"
    similar.touch()
    child.save(path)
    assert not any(map(os.path.exists, gone))
    assert set(path.parent.iterdir()) == {path, foreign, similar}


def test_the_file_of_a_living_process_stays(path, child):
    with whole_file.replacing(path, None) as file:
        file.write(b"whole")
        names = os.listdir(path.parent)
        assert len(names) == 1
        child.save(path)
        assert set(os.listdir(path.parent)) == {*names, path.name}
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_where_files_cannot_be_locked_none_is_removed(path, child, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    left = leftover(path.parent, whole_file._host())
    monkeypatch.setattr(whole_file.fcntl, "flock", refuse)
    child.save(path)
    assert set(path.parent.iterdir()) == {path, left}


@pytest.mark.parametrize("moment", ["before the lock", "while it is taken"])
def test_a_new_file_that_is_taken_for_a_leftover_is_made_again(path, child, monkeypatch, moment):
    flock, calls = whole_file.fcntl.flock, []

    def late(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            if moment == "while it is taken":
                raise BlockingIOError
            for name in path.parent.glob(".childtune_fast-*"):
                name.unlink()
        flock(*arguments)

    monkeypatch.setattr(whole_file.fcntl, "flock", late)
    child.save(path)
    assert len(calls) == 2
    assert ChildNetwork.load(path, Tiny()).fingerprint == child.fingerprint


def test_threads_may_save_one_path(path):
    children = [ChildNetwork.random(Tiny(), reserve_p=0.3, seed=seed) for seed in range(4)]
    fingerprints, seen, errors = {child.fingerprint for child in children}, set(), []
    children[0].save(path)

    def work(child):
        try:
            for _ in range(25):
                child.save(path)
                seen.add(ChildNetwork.load(path, Tiny()).fingerprint)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(child,)) for child in children]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert seen <= fingerprints
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(path, monkeypatch):
    old, new = (ChildNetwork.random(Tiny(), reserve_p=0.3, seed=seed) for seed in range(2))
    old.save(path)
    safe_open = safetensors.safe_open

    def opened(*arguments, **options):
        new.save(path)
        return safe_open(*arguments, **options)

    monkeypatch.setattr(safetensors, "safe_open", opened)
    assert ChildNetwork.load(path, Tiny()).fingerprint == old.fingerprint
    monkeypatch.undo()
    assert ChildNetwork.load(path, Tiny()).fingerprint == new.fingerprint

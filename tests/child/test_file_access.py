"""Where files may be written, and who may read them afterwards: descriptors, access lists, owners, closed folders."""

import contextlib
import errno
import os
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from models import Tiny, child_of

from childtune_fast import whole_file

LIST = "system.posix_acl_access"
OTHER = 65534  # a user
GROUP = 1235

as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="takes other users' part")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


@pytest.fixture
def child():
    return child_of(Tiny())


@pytest.fixture
def content(tmp_path, child):
    """What a save of the child network writes."""
    whole = tmp_path / "whole"
    child.save(whole)
    found = whole.read_bytes()
    whole.unlink()
    return found


@pytest.fixture
def open_folder():
    """A folder that every user can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@contextlib.contextmanager
def user(groups=()):
    before, groups_before = os.geteuid(), os.getgroups()
    os.setgroups(groups)
    os.seteuid(OTHER)
    try:
        yield
    finally:
        os.seteuid(before)
        os.setgroups(groups_before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


# ---- What is named as an open file ---------------------------------------------------------------------------------


@on_linux
@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "/proc/thread-self/fd/{}", "link"])
@pytest.mark.parametrize("kind", ["named", "deleted", "in memory"])
def test_an_open_file_is_written_to_and_not_replaced(tmp_path, child, content, name, kind):
    held = tmp_path / "held"
    descriptor = os.memfd_create("held") if kind == "in memory" else os.open(held, os.O_RDWR | os.O_CREAT)
    if kind == "deleted":
        held.unlink()
    before = set(os.listdir(tmp_path))
    number = os.fstat(descriptor).st_ino
    with os.fdopen(descriptor, "r+b") as file:
        target = Path(name.format(file.fileno()))
        if name == "link":
            target = tmp_path / "link"
            target.symlink_to(f"/dev/fd/{file.fileno()}")
            before.add("link")
        child.save(target)
        assert file.read() == content
    assert set(os.listdir(tmp_path)) == before
    if kind == "named":
        assert held.stat().st_ino == number


@on_linux
def test_prints_after_a_save_to_standard_output_are_not_lost(tmp_path, child, content):
    script = (
        "import os; from models import Tiny, child_of; child_of(Tiny()).save('/dev/stdout');"
        "os.lseek(1, 0, os.SEEK_END); print('after')"
    )
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(out, "wb") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, env=environment, check=True)
    assert out.read_bytes() == content + b"after\n"
    assert os.listdir(tmp_path) == ["out"]


@on_linux
def test_a_file_in_an_open_folder_is_replaced_as_every_other(path, child, content):
    path.write_bytes(b"old")
    old = path.stat().st_ino
    folder = os.open(path.parent, os.O_RDONLY)
    with path.open("rb") as held:  # so that its number is not given anew
        child.save(f"/proc/self/fd/{folder}/{path.name}")
        assert held.read() == b"old"
    os.close(folder)
    assert path.read_bytes() == content
    assert path.stat().st_ino != old
    assert list(path.parent.iterdir()) == [path]


# ---- What is no name of a file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_bytes", [True, False])
def test_a_number_and_bytes_are_no_path(path, child, as_bytes):
    with path.open("wb") as file:
        wrong = os.fsencode(path) if as_bytes else file.fileno()
        for save in (child.save, lambda path: child.save_delta(path, Tiny(), Tiny())):
            with pytest.raises(TypeError, match=rf"^path must be a path \(got {type(wrong).__name__}\)$"):
                save(wrong)
        file.write(b"mine")  # it is still open
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["", "new/", "new/.", "new/../file", "new/file", "link/", "link"])
def test_what_is_no_place_for_a_file_is_refused_by_the_name_that_was_given(tmp_path, child, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.symlink("missing/file", "link")
    with pytest.raises(FileNotFoundError, match="No such file or directory") as caught:
        child.save(name)
    assert caught.value.filename == name
    assert os.listdir() == ["link"]


# ---- Who may read a file that is overwritten -----------------------------------------------------------------------


def access_list(mask):
    """A list by which user 1234 may read and write as far as the mask allows, and the group and others may not."""
    none = 0xFFFFFFFF
    entries = [(0x01, 6, none), (0x02, 6, 1234), (0x04, 0, none), (0x10, mask, none), (0x20, 0, none)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def set_list(path, mask, name=LIST):
    try:
        os.setxattr(path, name, access_list(mask))
    except (OSError, AttributeError):
        pytest.skip("no access lists here")


@pytest.mark.parametrize("mask", [6, 4])
def test_an_access_list_is_kept(path, child, content, mask):
    path.touch()
    set_list(path, mask)
    child.save(path)
    assert path.read_bytes() == content
    assert os.getxattr(path, LIST) == access_list(mask)
    assert mode_of(path) == 0o600 | mask << 3


def test_where_an_access_list_cannot_be_kept_only_the_owner_has_access(path, child, content, monkeypatch):
    path.touch()
    set_list(path, 6)

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "setxattr", refuse)
    child.save(path)
    assert path.read_bytes() == content
    assert mode_of(path) == 0o600


def test_a_folders_list_for_new_files_gives_no_access_to_an_old_one(path, child):
    path.touch()
    path.chmod(0o660)
    set_list(path.parent, 6, "system.posix_acl_default")
    child.save(path)
    with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
        os.getxattr(path, LIST)
    assert mode_of(path) == 0o660
    child.save(path.parent / "new")
    assert os.getxattr(path.parent / "new", LIST) == access_list(6)  # as of every new file there


@as_root
def test_an_existing_file_keeps_its_owner_and_group(path, child):
    path.touch()
    path.chmod(0o640)
    os.chown(path, OTHER, GROUP)
    child.save(path)
    assert (path.stat().st_uid, path.stat().st_gid, mode_of(path)) == (OTHER, GROUP, 0o640)


@as_root
@pytest.mark.parametrize(
    ("groups", "mode", "expected"),
    [([GROUP], 0o664, 0o664), ([], 0o666, 0o666), ([], 0o676, 0o666), ([], 0o672, 0o622), ([], 0o646, 0o644)],
)
def test_a_group_that_cannot_be_kept_gives_no_other_group_its_access(open_folder, child, groups, mode, expected):
    path = open_folder / "file"
    path.touch()
    path.chmod(mode)
    os.chown(path, 1, GROUP)
    with user(groups):
        child.save(path)
    found = path.stat()
    assert found.st_uid == OTHER
    assert (found.st_gid == GROUP) == bool(groups)
    assert mode_of(path) == expected


@pytest.mark.parametrize("existing", [True, False])
def test_nobody_can_open_the_unfinished_file_who_could_not_open_the_old_one(path, child, monkeypatch, existing):
    modes, new_file = [], whole_file._new_file

    def noted(*arguments):
        file, unfinished = new_file(*arguments)
        modes.append(mode_of(unfinished))
        return file, unfinished

    if existing:
        path.touch()
        path.chmod(0o644)
    monkeypatch.setattr(whole_file, "_new_file", noted)
    before = os.umask(0)
    try:
        child.save(path)
    finally:
        os.umask(before)
    assert modes == [0o600 if existing else 0o666]


# ---- Folders that refuse new files ---------------------------------------------------------------------------------


@as_root
@pytest.mark.parametrize("mode", [0o755, 0o1777])
@pytest.mark.parametrize("linked", [True, False])
def test_a_folder_that_keeps_a_new_file_out_is_named_by_the_users_path(open_folder, child, mode, linked):
    path = open_folder / "file"
    path.write_bytes(b"old")
    path.chmod(0o666)
    os.chown(path, 1, 1)
    (open_folder / "link").symlink_to("file")
    named = open_folder / "link" if linked else path
    os.chown(open_folder, 1, 1)
    open_folder.chmod(mode)
    with user(), pytest.raises(PermissionError, match="its folder must allow a new file beside it") as caught:
        child.save(named)
    assert caught.value.filename == str(named)
    assert caught.value.filename2 is None
    assert "unfinished" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert set(os.listdir(open_folder)) == {"file", "link"}


@pytest.mark.parametrize(("code", "advised"), [(errno.EBUSY, True), (errno.ENOSPC, False)])
def test_a_file_that_cannot_be_replaced_stays_and_no_other_is_left(path, child, monkeypatch, code, advised):
    """As a single file that is mounted into a container."""
    path.write_bytes(b"old")

    def refuse(old, new):
        raise OSError(code, os.strerror(code), os.fspath(old), None, os.fspath(new))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        child.save(path)
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert ("use a folder that does" in str(caught.value)) == advised
    assert "unfinished" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupt_at_the_lock_leaves_no_unfinished_file(path, child, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_file.fcntl, "flock", interrupt)
    with pytest.raises(KeyboardInterrupt):
        child.save(path)
    assert list(path.parent.iterdir()) == []

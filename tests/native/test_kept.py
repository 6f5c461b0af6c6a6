"""Files kept between processes: who may have written what is read, and that a file is written whole or not at all."""

import os

import pytest

from childtune_fast.native import kept

posix = pytest.mark.skipif(os.name != "posix", reason="asks for owner and mode of a file")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "folder" / "verdict"


def test_what_was_written_is_read(path):
    assert kept.read(path) is None
    for data in (b"first", b"", b"\0\r\n" * 100_000):
        assert kept.write(path, data)
        assert kept.read(path) == data
    assert list(path.parent.iterdir()) == [path]


@posix
def test_nobody_else_can_write_what_is_made(path):
    before = os.umask(0)
    try:
        assert kept.write(path, b"data")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_what_others_may_write_is_ignored(path, mode):
    kept.write(path, b"data")
    path.chmod(mode)
    assert kept.read(path) is None
    path.chmod(0o644)  # others may read
    assert kept.read(path) == b"data"


@posix
def test_what_belongs_to_another_user_is_ignored_but_for_root(path, monkeypatch):
    kept.write(path, b"data")
    me = os.geteuid()
    for owner, expected in ((me, b"data"), (0, b"data"), (me + 1, None)):
        fields = list(path.stat())
        fields[4] = owner
        monkeypatch.setattr(os, "fstat", lambda descriptor, fields=fields: os.stat_result(fields))
        assert kept.read(path) == expected
        monkeypatch.undo()


@posix
@pytest.mark.parametrize("make", [lambda path: path.symlink_to(__file__), os.mkfifo, os.mkdir])
def test_what_is_no_file_is_ignored_at_once(tmp_path, make):
    make(tmp_path / "name")
    assert kept.read(tmp_path / "name") is None


def test_the_content_is_on_the_disk_before_the_name(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    assert kept.write(path, b"data")
    assert calls == ["fsync", "replace", "fsync"]  # the last one of the folder


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was(path, monkeypatch, failing):
    kept.write(path, b"old")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, refuse)
    assert not kept.write(path, b"new")
    assert kept.read(path) == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    assert not kept.write(tmp_path / "file" / "name", b"data")
    assert kept.read(tmp_path / "file" / "name") is None
